"""Memory of large matrices that is used again from one to the next.

The C library gives large blocks back to the system as soon as they are free, and of what it gets anew every page is
zeroed at the first touch: 1.5 to 2 µs for 4 KiB on a virtual machine, a fifth of a step of THORN.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

UPDATE = "update"
"""Name of the memory of what is orthogonalized, which is not needed any more when the result goes there."""

X, BESIDE = "X", "beside X"
"""Of what products are multiplied to, by turns."""

_local = threading.local()


@contextmanager
def kept() -> Iterator[None]:
    """While it lasts, what `empty` returns on a CPU is overwritten by who asks next for the same name."""
    _local.held = {}
    try:
        yield
    finally:
        _local.held = None


def empty(name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous tensor: new, or inside of `kept` the memory of that name."""
    held: dict[str, Tensor] | None = getattr(_local, "held", None)
    if held is None or device.type != "cpu" or torch.compiler.is_compiling():
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    if name not in held or held[name].numel() < size:
        held.pop(name, None)  # to be free before the next is taken
        held[name] = torch.empty(size, dtype=torch.uint8)
    return held[name][:size].view(dtype).view(shape)


def beside(x: Tensor, shape: Sequence[int]) -> Tensor:
    """What a product of X is written to, in the dtype of X: of X and BESIDE that which X is not in."""
    held: dict[str, Tensor] = getattr(_local, "held", None) or {}
    taken = BESIDE in held and held[BESIDE].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    return empty(X if taken else BESIDE, shape, x.dtype, x.device)
