"""Which implementation of an update runs. A request that cannot be met raises; ``"auto"`` chooses and says so."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from trysquare import _graphs

BACKENDS = ("auto", "eager", "compiled", "triton")

OLDEST_CAPABILITY = (7, 0)
"""Of an NVIDIA GPU that Triton compiles for."""

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
    return run_each(backend, function, [args])[0]


def run_each(backend: str, function: Callable[..., Any], each: Sequence[Sequence[Any]], *shared: Any) -> list[Any]:
    """Call an update on several sets of arguments, and shared ones behind them."""
    if torch.compiler.is_compiling():
        return [function(*own, *shared) for own in each]
    calls[backend, function.__name__] += len(each)
    if backend == "compiled":
        return _graphs.run_each(function, each, shared)
    return [function(*own, *shared) for own in each]


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
