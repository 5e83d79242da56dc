"""How a kernel is launched: counted, compiled ahead of what must not be half done, and with an error one can act on.

A kernel works on many tensors of one shape at once. It finds them through a table of addresses, one row for each
operand, and its numbers in one float64 tensor: what changes from step to step is data, and nothing is compiled for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl
from triton.compiler.errors import CompilationError
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

from trysquare import _backend

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
"""Its version."""

ALIGNMENT = 16
"""Bytes of the widest load; addresses that are multiples of it are promised to the compiler."""

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
}
"""The formats of elements, as kernels are told them."""

FUSES = True
"""Whether a·b + c is rounded once. Said with every launch: Triton's default is going to change."""


@dataclass
class Launch:
    """One launch as it was asked for: all that decides what is compiled."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]


_recorded: list[Launch] = []


class Ready(NamedTuple):
    """A kernel as it was compiled for arguments of a kind."""

    kernel: Any
    """What it was compiled from: as long as it is held, no other one has its address."""
    compiled: Any
    constants: tuple[Any, ...]
    """In the order of the kernel, behind the arguments."""


_ready: dict[Any, Ready] = {}
DIRECT = TRITON >= (3, 4)
"""Whether a compiled kernel takes arguments and constants as it was launched with them, as it does from then on."""


@contextmanager
def compiling() -> Iterator[None]:
    """While it lasts, launches compile their kernels and run nothing: what cannot be compiled then changes nothing."""
    _backend.rehearsing = True
    try:
        yield
    finally:
        _backend.rehearsing = False


@contextmanager
def recording(capability: tuple[int, int] | None = None) -> Iterator[list[Launch]]:
    """While it lasts, launches are written down and nothing runs: so it is known what to compile without a GPU.

    Those of an NVIDIA GPU of the ``capability``, or, without one, those that any GPU may see.
    """
    _backend.only_recorded, _backend.recorded_for = True, capability
    _recorded.clear()
    try:
        yield _recorded
    finally:
        _backend.only_recorded, _backend.recorded_for = False, None


def launch(
    kernel: Any,
    programs: int,
    *arguments: Any,
    constants: Mapping[str, Any],
    num_warps: int = 4,
    num_stages: int = 2,
    registers: int | None = None,
) -> None:
    """Launch so many programs of a kernel on the device of its first argument.

    Args:
        kernel: A function of `triton.jit`.
        programs: How many; none is no launch.
        arguments: Tensors, integers or None, in the kernel's order.
        constants: What the kernel is compiled for, by name.
        num_warps: Of 32 threads, a program.
        num_stages: Of the software pipeline of its loops.
        registers: Of a thread of an NVIDIA GPU, at most; None: as many as the compiler finds useful.

    Raises:
        RuntimeError: The kernel cannot be compiled; names kernel, shapes and versions.
    """
    if programs == 0:
        return
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": FUSES}
    if registers is not None and torch.version.hip is None:
        options["maxnreg"] = registers
    if _backend.only_recorded:
        _recorded.append(Launch(kernel, arguments, constants, options))
        return
    if _backend.rehearsing:
        if hasattr(kernel, "warmup"):  # not in the interpreter of Triton 3.2, which compiles nothing
            _compile(kernel, programs, arguments, constants, options)
        return
    _launch(kernel, programs, arguments, constants, options)
    _backend.calls["triton", kernel.__name__] += 1


def _launch(
    kernel: Any, programs: int, arguments: Sequence[Any], constants: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """By Triton's own way the first time, which finds out all it compiles for; from then on by what that led to.

    Its way takes several times as long, of the processor, as the launch itself.
    """
    kinds = map(_kind, arguments)
    key = id(kernel), arguments[0].device, *kinds, *constants.items(), *options.items()
    ready = _ready.get(key)
    with _device_of(arguments[0]):
        if ready is not None:
            ready.compiled[programs, 1, 1](*arguments, *ready.constants)
            return
        try:
            compiled = kernel[(programs,)](*arguments, **constants, **options)
        except (CompilationError, OutOfResources) as error:  # before anything runs
            raise _not_compiled(kernel, arguments, constants, error) from error
    if DIRECT and compiled is not None:  # as in the interpreter
        ordered = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
        _ready[key] = Ready(kernel, compiled, ordered)


def _kind(argument: Any) -> Any:
    """All of an argument that Triton compiles for, or more: dtype and alignment, and what it sees in an integer."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % ALIGNMENT == 0
    if isinstance(argument, int):
        return argument == 1, argument % ALIGNMENT == 0, argument.bit_length() > 31
    if argument is None:
        return None
    return argument.base.dtype, *argument.block_shape  # described; where it lies and how far it reaches is data


def _compile(
    kernel: Any, programs: int, arguments: Sequence[Any], constants: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    try:
        with _device_of(arguments[0]):
            kernel.warmup(*arguments, grid=(programs,), **constants, **options)
    except Exception as error:
        raise _not_compiled(kernel, arguments, constants, error) from error


def _not_compiled(
    kernel: Any, arguments: Sequence[Any], constants: Mapping[str, Any], error: Exception
) -> RuntimeError:
    shapes = ", ".join(str(tuple(a.shape)) for a in arguments if isinstance(a, Tensor))
    chosen = ", ".join(f"{name}={value}" for name, value in constants.items())
    return RuntimeError(
        f"Triton cannot compile the kernel {kernel.__name__} ({chosen}; arguments of shape {shapes}) on "
        f"{arguments[0].device} with Triton {triton.__version__} and torch {torch.__version__}: {error}. "
        "Nothing was changed; backend='eager' does the same without Triton"
    )


def _device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, on its current stream."""
    device = tensor.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


_HERE = nullcontext()


def cdiv(a: int, b: int) -> int:
    """⌈a/b⌉. Triton's own, called on the host, takes ten times as long."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest one that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def warps(elements: int) -> int:
    """Of a program that holds so many elements of each operand: from 8 elements a thread on, one warp to sixteen."""
    return min(16, max(1, power_of_2(elements) // 256))


def tile(rows: int, columns: int, elements: int, widest: int) -> tuple[int, int]:
    """Rows and columns of a program, powers of two: short rows of so many elements, or ``widest`` of a long one."""
    across = min(widest, max(16, power_of_2(columns)))
    return max(1, min(elements // across, power_of_2(rows))), across


# What kernels are told of tensors


class Table:
    """The addresses of parallel lists of tensors: one row for each list, on the device.

    Attributes:
        addresses: int64, (lists, members).
        aligned: Whether every one of them is a multiple of 16 bytes.
    """

    def __init__(self, lists: Sequence[Sequence[Tensor]]) -> None:
        found = tuple(tuple(map(Tensor.data_ptr, tensors)) for tensors in lists)
        self.aligned = all(reduce(or_, row) % ALIGNMENT == 0 for row in found)
        self.addresses = _on(lists[0][0].device, found, torch.int64)


def floats(device: torch.device, *values: float | Tensor) -> Tensor:
    """Numbers as one float64 tensor on the device, of floats and of 0-dim tensors, which are not read."""
    if not any(isinstance(value, Tensor) for value in values):
        return _on(device, tuple(float(value) for value in values), torch.float64)
    parts = [v.detach() if isinstance(v, Tensor) else _on(device, float(v), torch.float64) for v in values]
    return torch.stack([part.to(device, torch.float64, non_blocking=True) for part in parts])


def integers(device: torch.device, *values: int) -> Tensor:
    """Numbers as one int64 tensor on the device."""
    return _on(device, values, torch.int64)


KEPT = 4096
"""Tables and numbers that are kept on their device: a step asks for the same ones as the one before it."""

_kept: dict[Any, Tensor] = {}

class Reserved(NamedTuple):
    """Places for tables and numbers, by what belongs there, and the stream that their memory is of (None: of a CPU)."""

    places: dict[Any, Tensor]
    stream: Any


_reserved: Reserved | None = None


@contextmanager
def reserving(stream: Any = None) -> Iterator[dict[Any, Tensor]]:
    """While it lasts, tables and numbers of the host get a place on their device, and nothing is copied there.

    For a capture into a graph, within which nothing can be copied from the host, and need not be: nothing runs. `fill`
    does so afterwards. The places are the graph's own, and have to be kept as long as it. Their memory is that of a
    stream which is not captured: from the graph's own they might get what an earlier kernel of it had for scratch, and
    every replay would write over them.
    """
    global _reserved  # noqa: PLW0603 (the launchers have no other way to know)
    _reserved = Reserved({}, stream)
    try:
        yield _reserved.places
    finally:
        _reserved = None


def fill(places: Mapping[Any, Tensor]) -> None:
    """Copy from the host what was asked for while places were reserved."""
    for (_, values, dtype, _), place in places.items():
        place.copy_(torch.tensor(values, dtype=dtype))


def _on(device: torch.device, values: Any, dtype: torch.dtype) -> Tensor:
    """A tensor of host numbers on a device, copied there once and without waiting for it."""
    key = device, values, dtype, driver.active.get_current_stream(device.index) if device.type == "cuda" else None
    if _reserved is not None and _writes_down(device):
        return _place(key, _reserved)
    if key not in _kept:
        if device.type == "cuda" and _writes_down(device):
            raise RuntimeError(
                "a step by Triton kernels cannot be captured into a CUDA graph as it is, for it copies addresses from "
                "the host: use trysquare.CapturedStep(optimizer) beside your own graph, or backend='eager'"
            )
        if len(_kept) >= KEPT:
            _kept.clear()
        _kept[key] = torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
    return _kept[key]


def _writes_down(device: torch.device) -> bool:
    """Whether what is launched now is captured; other threads may step while one captures."""
    return device.type != "cuda" or torch.cuda.is_current_stream_capturing()


def _place(key: Any, reserved: Reserved) -> Tensor:
    """The place of a tensor of host numbers, by its shape."""
    device, values, dtype, _ = key
    if key not in reserved.places:
        with nullcontext() if reserved.stream is None else torch.cuda.stream(reserved.stream):
            reserved.places[key] = torch.empty(_shape(values), dtype=dtype, device=device)
    return reserved.places[key]


def _shape(values: Any) -> tuple[int, ...]:
    return (len(values), *_shape(values[0])) if isinstance(values, tuple) else ()
