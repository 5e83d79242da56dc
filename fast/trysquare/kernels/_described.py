"""Operands by descriptors: a GPU's copy engine fetches their blocks (NVIDIA's TMA), and no thread counts addresses."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trysquare.kernels._launch import ALIGNMENT, TRITON

if TRITON >= (3, 5):  # before, there are none, or the kernels that use them do not fit into registers
    from triton.tools.tensor_descriptor import TensorDescriptor
else:
    TensorDescriptor = None


class Described(NamedTuple):
    """A descriptor of a batch of matrices, and whether their rows lie together in memory or their columns."""

    descriptor: Any
    by_rows: bool


def described(x: Tensor, rows: int, inner: int) -> Described | None:
    """A batch of matrices (B, n, k), in blocks of so many rows and terms; what lies outside is 0.

    None where it cannot be described, as it is or transposed.
    """
    if x.data_ptr() % ALIGNMENT:
        return None
    form = _form(x.shape, x.stride(), x.dtype, rows, inner)
    if form is None:
        return None
    own = TensorDescriptor.__new__(TensorDescriptor)
    vars(own).update(vars(form.descriptor), base=x)
    return Described(own, form.by_rows)


@functools.lru_cache(maxsize=1024)
def _form(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, rows: int, inner: int
) -> Described | None:
    """The descriptor of such a batch, which lies nowhere: what Triton checks of one takes longer than its launch."""
    batch, row, term = strides
    by_rows = term == 1
    steps = (batch, row) if by_rows else (batch, term)
    aligned = all(step * dtype.itemsize % ALIGNMENT == 0 for step in steps)
    if TensorDescriptor is None or 0 in shape or 1 not in {row, term} or not aligned:
        return None
    size, terms = shape[1:]
    laid_out, block = ((size, terms), (rows, inner)) if by_rows else ((terms, size), (inner, rows))
    nowhere, leap = torch.empty(0, dtype=dtype), row if by_rows else term
    return Described(TensorDescriptor(nowhere, [shape[0], *laid_out], [batch, leap, 1], [1, *block]), by_rows)
