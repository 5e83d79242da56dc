"""Which implementation of an update runs. A request that cannot be met raises; ``"auto"`` chooses and says so."""

from __future__ import annotations

import functools
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

BACKENDS = ("auto", "eager", "compiled", "triton")

calls: Counter[tuple[str, str]] = Counter()
"""How often each (backend, function) ran outside a trace: the witness that a backend was really used."""


def check(backend: str, algorithm: str) -> None:
    """Raise unless ``backend`` can be asked for."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(map(repr, BACKENDS))}")
    if backend == "triton":
        raise ValueError(
            f"backend='triton': {algorithm} has no Triton kernels in this version of trysquare; "
            "use 'auto', 'eager' or 'compiled'"
        )


def choose(backend: str) -> str:
    """The implementation that runs: "auto" is eager, and nothing is compiled unasked."""
    return "eager" if backend == "auto" else backend


def run(backend: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call an update. Inside a trace of the whole step there is nothing left to choose: it is traced as it is."""
    if torch.compiler.is_compiling():
        return function(*args)
    calls[backend, function.__name__] += 1
    if backend == "compiled":
        return _compiled(function, *map(_static, args))(*map(_detached, args))
    return function(*args)


def _static(arg: Any) -> Any:
    """What a compilation specialises on: all of an argument, or of a tensor what torch.compile does not keep open."""
    if not isinstance(arg, torch.Tensor):
        return arg
    return arg.dtype, arg.device.type, tuple(size == 1 for size in arg.shape), arg.is_contiguous()


def _detached(arg: Any) -> Any:
    """A tensor that says neither whether it needs a gradient nor of what it is a view: each would be compiled anew."""
    return arg.detach() if isinstance(arg, torch.Tensor) else arg


@functools.cache
def _compiled(function: Callable[..., Any], *static: Any) -> Callable[..., Any]:
    """``function`` compiled for dynamic shapes, with a code object of its own.

    torch.compile keeps its compilations by code object and stops compiling one after a handful; with one for every
    rule and dtype a program with many kinds of groups still runs what it asked for.
    """
    own = types.FunctionType(
        function.__code__.replace(co_name=f"{function.__name__}_{abs(hash(static)):x}"), function.__globals__
    )
    return torch.compile(own, dynamic=True, fullgraph=True)


def scalars(backend: str, values: list[float | torch.Tensor]) -> list[float | torch.Tensor]:
    """Hyperparameters as a backend takes them: floats, or 0-dim tensors for a compiled update."""
    if backend != "compiled" or torch.compiler.is_compiling():
        return values
    return [v if isinstance(v, torch.Tensor) else _scalar(float(v), place) for place, v in enumerate(values)]


@functools.lru_cache(maxsize=1024)
def _scalar(value: float, _place: int) -> torch.Tensor:
    """A float as a 0-dim tensor: a compiled update takes a new value without being compiled again.

    One for each place: were two equal values the same tensor, an update would be compiled for that coincidence.
    """
    return torch.tensor(value, dtype=torch.float64)
