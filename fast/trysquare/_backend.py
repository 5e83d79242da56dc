"""Which implementation of an update runs. A request that cannot be met raises; ``"auto"`` chooses and says so."""

from __future__ import annotations

import functools
import importlib.util
import os
import types
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch

BACKENDS = ("auto", "eager", "compiled", "triton")

OLDEST_CAPABILITY = (7, 0)
"""Of an NVIDIA GPU that Triton compiles for."""

TOGETHER = 4
"""Sets of arguments that share one call of a compiled update, at most."""

SHARED = 1 << 15
"""Elements from which the loops of a compiled update on a CPU are shared among the threads: below, waking them takes
longer. Inductor would decide that by the first shapes which it sees, for all that follow: where those are small, a
large tensor is stepped by one thread, even by a later process, for its cache knows no sizes."""

CHUNKS: dict[bool, dict[str, str | int | bool | Callable[..., Any]]] = {
    True: {"cpp.min_chunk_size": 0},
    False: {"cpp.min_chunk_size": 1 << 60},
}
"""By whether loops are shared: how much of one inductor leaves to a thread at least."""

calls: Counter[tuple[str, str]] = Counter()
"""How often each (backend, function) ran outside a trace: the witness that a backend was really used."""


rehearsing = False
"""Whether kernels are only compiled and nothing may change; `kernels.compiling` sets it."""

only_recorded = False
"""Whether kernels' launches are only written down, so that no GPU is needed; `kernels.recording` sets it."""

recorded_for: tuple[int, int] | None = None
"""The compute capability that they are written down for, where there is a choice; None: those without a choice."""


WITHOUT_TRITON = "'auto', 'eager' or 'compiled'"
"""What may be asked for instead, of an optimizer."""


def check(backend: str, algorithm: str, instead: str = WITHOUT_TRITON) -> None:
    """Raise if ``backend`` cannot be met on this machine, whatever device the tensors will be on.

    Raises:
        ImportError: Triton is not installed.
        ValueError: Triton finds nothing to run on.
    """
    if backend != "triton":
        return
    if importlib.util.find_spec("triton") is None:
        raise ImportError(
            f"backend='triton': {algorithm} needs the package triton, which is not installed: "
            f"pip install 'trysquare[triton]', or use {instead}, which do without it"
        )
    if not (torch.cuda.is_available() or interpreted() or only_recorded):
        raise ValueError(
            f"backend='triton': {algorithm} needs an NVIDIA or AMD GPU for its kernels, and torch sees none: use "
            f"{instead}, or set TRITON_INTERPRET=1 before the start to interpret kernels on the CPU"
        )


def check_device(device: torch.device, name: str, instead: str = WITHOUT_TRITON) -> None:
    """Raise a ValueError if Triton kernels cannot run where a tensor is."""
    missing = triton_missing(device)
    if missing is not None:
        raise ValueError(f"{name} is on {device} and backend='triton': {missing}; use {instead}")


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_missing(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device, or None."""
    if only_recorded or (device.type == "cpu" and interpreted()):
        return None
    if device.type != "cuda":
        return "Triton kernels run on NVIDIA and AMD GPUs"
    return _triton_missing_on(device)


@functools.cache
def _triton_missing_on(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'trysquare[triton]')"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < OLDEST_CAPABILITY:
        return f"Triton needs a GPU of compute capability {OLDEST_CAPABILITY}, this one has {capability}"
    return None


def choose(backend: str, device: torch.device) -> str:
    """What runs on a device: "auto" is Triton on a GPU that has it, else eager; torch.compile never unasked."""
    if backend != "auto":
        return backend
    return "triton" if device.type == "cuda" and triton_missing(device) is None else "eager"


def run(backend: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call an update. Inside a trace of the whole step there is nothing left to choose: it is traced as it is."""
    if torch.compiler.is_compiling():
        return function(*args)
    calls[backend, function.__name__] += 1
    if backend == "compiled":
        return _compiled(function, 1, len(args), *[_seen(arg) for arg in args])(*[_detached(arg) for arg in args])
    return function(*args)


def run_each(backend: str, function: Callable[..., Any], each: Sequence[Sequence[Any]], *shared: Any) -> list[Any]:
    """Call an update on several sets of arguments, and shared ones behind them.

    Compiled, neighbours that one compilation serves go four, two or one at a time: most of what a call costs on a CPU
    is the way into the graph, which they then go together.
    """
    if torch.compiler.is_compiling() or backend != "compiled":
        return [run(backend, function, *own, *shared) for own in each]
    seen = [[_seen(arg) for arg in own] for own in each]
    kinds = [_kind(*own) for own in seen]
    results: list[Any] = []
    while len(results) < len(each):
        start = len(results)
        alike = next((i for i in range(start, len(each)) if kinds[i] != kinds[start]), len(each)) - start
        count = 1 << (min(TOGETHER, alike).bit_length() - 1)
        sets, seen_sets = each[start : start + count], chain.from_iterable(seen[start : start + count])
        calls[backend, function.__name__] += count
        update = _compiled(function, count, len(sets[0]), *seen_sets, *map(_seen, shared))
        found = update(*[_detached(arg) for arg in (*chain.from_iterable(sets), *shared)])
        results += found if count > 1 else [found]
    return results


@functools.lru_cache(maxsize=4096)
def _kind(*seen: Any) -> Any:
    """What a compilation specialises on in a set of arguments."""
    return any(_is_shared(*arg) for arg in seen if _is_tensor(arg)), *map(_static, seen)


def _seen(arg: Any) -> Any:
    """What can be told of an argument quickly: all of it, or of a tensor what `_static` asks for."""
    if not isinstance(arg, torch.Tensor):
        return arg
    return arg.dtype, arg.device, arg.shape, arg.is_contiguous()


def _is_tensor(seen: Any) -> bool:
    return isinstance(seen, tuple) and len(seen) == 4 and isinstance(seen[0], torch.dtype)


def _static(seen: Any) -> Any:
    """What a compilation specialises on: all of an argument, or of a tensor what torch.compile does not keep open."""
    if not _is_tensor(seen):
        return seen
    dtype, device, shape, contiguous = seen
    return dtype, device.type, tuple(size == 1 for size in shape), contiguous


def _detached(arg: Any) -> Any:
    """A tensor that says neither whether it needs a gradient nor of what it is a view: each would be compiled anew."""
    return arg.detach() if isinstance(arg, torch.Tensor) else arg


@functools.lru_cache(maxsize=4096)
def _compiled(function: Callable[..., Any], count: int, own: int, *seen: Any) -> Callable[..., Any]:
    """The compilation for arguments like these, found by their shapes: a step asks for the same few every time."""
    shared = any(_is_shared(*arg) for arg in seen if _is_tensor(arg))
    return _compiled_once(function, count, own, shared, *map(_static, seen))


def _is_shared(_: torch.dtype, device: torch.device, shape: torch.Size, *__: bool) -> bool:
    return device.type == "cpu" and shape.numel() >= SHARED


@functools.cache
def _compiled_once(
    function: Callable[..., Any], count: int, own: int, shared: bool, *static: Any
) -> Callable[..., Any]:
    """``function``, on ``count`` sets of ``own`` arguments at once, compiled for dynamic shapes.

    It has a code object of its own: torch.compile keeps its compilations by code object and stops compiling one after a
    handful; with one for every rule and dtype a program with many kinds of groups still runs what it asked for.
    """
    whole = function if count == 1 else _several(function, count, own)
    code = whole.__code__.replace(co_name=f"{function.__name__}_{abs(hash((count, own, shared, static))):x}")
    renamed = types.FunctionType(code, whole.__globals__, closure=whole.__closure__)
    return _for_all_sizes(torch.compile(renamed, dynamic=True, fullgraph=True, options=CHUNKS[shared]))


def _for_all_sizes(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Takes sizes that happen to be equal in the first call for different ones.

    Torch would take them for one, and compile anew at the first matrix that is not square, as the first one was.
    """
    compiles = True

    def call(*args: Any) -> Any:
        nonlocal compiles
        if not compiles:
            return compiled(*args)
        with torch.fx.experimental._config.patch(use_duck_shape=False):  # type: ignore[attr-defined]  # noqa: SLF001
            result = compiled(*args)
        compiles = False
        return result

    return call


def _several(function: Callable[..., Any], count: int, own: int) -> Callable[..., Any]:
    def several(*args: Any) -> list[Any]:
        shared = args[count * own :]
        return [function(*args[first * own : (first + 1) * own], *shared) for first in range(count)]

    return several


def forget_compilations() -> None:
    """The next call of every compiled update compiles it anew."""
    _compiled.cache_clear()
    _compiled_once.cache_clear()


def scalars(backend: str, values: list[float | torch.Tensor], dtype: torch.dtype) -> list[float | torch.Tensor]:
    """Hyperparameters as a backend takes them: floats; for a compiled update 0-dim tensors of the arithmetic's dtype.

    A kernel of inductor's loads and converts a scalar anew for every vector of elements; in the dtype of the elements
    there is nothing to convert (a tenth of the time of an update on a CPU).
    """
    if backend != "compiled" or torch.compiler.is_compiling():
        return values
    return [
        v.to(dtype) if isinstance(v, torch.Tensor) else _scalar(float(v), place, dtype)
        for place, v in enumerate(values)
    ]


@functools.lru_cache(maxsize=1024)
def _scalar(value: float, _place: int, dtype: torch.dtype) -> torch.Tensor:
    """A float as a 0-dim tensor: a compiled update takes a new value without being compiled again.

    One for each place: were two equal values the same tensor, an update would be compiled for that coincidence.
    """
    return torch.tensor(value, dtype=dtype)
