"""Operands by descriptors: a GPU's copy engine fetches their blocks (NVIDIA's TMA), and no thread counts addresses."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from trysquare.kernels._launch import ALIGNMENT

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ModuleNotFoundError:  # until Triton 3.4
    TensorDescriptor = None


class Described(NamedTuple):
    """A descriptor of a batch of matrices, and whether their rows lie together in memory or their columns."""

    descriptor: Any
    by_rows: bool


def describable(x: Tensor) -> bool:
    """Whether a descriptor can be made of a batch of matrices (B, n, k), as it is or transposed."""
    if TensorDescriptor is None or 0 in x.shape or x.data_ptr() % ALIGNMENT:
        return False
    batch, row, inner = x.stride()
    steps = (batch, row) if inner == 1 else (batch, inner)
    return 1 in {row, inner} and all(step * x.element_size() % ALIGNMENT == 0 for step in steps)


def described(x: Tensor, rows: int, inner: int) -> Described:
    """Of a batch of matrices that is `describable`, in blocks of so many rows and terms; what lies outside is 0."""
    by_rows = x.stride(-1) == 1
    laid_out, block = (x, [1, rows, inner]) if by_rows else (x.mT, [1, inner, rows])
    return Described(TensorDescriptor.from_tensor(laid_out, block), by_rows)
