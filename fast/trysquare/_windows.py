"""Large tensors worked through as rows of blocks, in windows of bounded size, whatever their shape and layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from trysquare._batches import rows_and_columns

LEAST = 2
"""Blocks of a window at least, filled up if need be: torch.compile makes a special case of every size of 1."""


class Span(NamedTuple):
    """Entries ``start`` to ``stop`` of a row-major flattening."""

    start: int
    stop: int


class Window:
    """A span of a tensor as (K, width), or (K,) for a width of 1: a view where the memory allows, else a copy.

    Args:
        tensor: Of any shape and layout.
        span: Which of its entries.
        width: Entries of a block.
        filler: What stands behind the end of the last block.

    Attributes:
        values: What is read and, before `store`, written.
    """

    def __init__(self, tensor: Tensor, span: Span, width: int, filler: int = 0) -> None:
        entries, self._rows = _entries(tensor, span)
        self._entries = entries
        blocks = max(LEAST, -(-entries.numel() // width))
        self._filled = blocks * width != entries.numel()
        if self._filled:
            entries = torch.cat([entries, entries.new_full((blocks * width - entries.numel(),), filler)])
        self.values = entries.view(blocks, width) if width > 1 else entries

    def store(self) -> None:
        """Write back what was copied."""
        if self._filled:
            self._entries.copy_(self.values.view(-1)[: self._entries.numel()])
        if self._rows is not None:
            target, copy = self._rows
            target.copy_(copy.view(target.shape))


def _entries(tensor: Tensor, span: Span) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """A span, flat; of a tensor that is not contiguous the rows around it are copied, and returned beside the copy."""
    if tensor.is_contiguous():
        return tensor.view(-1)[span.start : span.stop], None
    width = rows_and_columns(tensor.shape)[1] if tensor.ndim > 1 else 1
    first, last = span.start // width, -(-span.stop // width)
    rows = tensor[first:last]
    copy = rows.reshape(-1).contiguous()  # a single row may be seen flat without being it
    return copy[span.start - first * width : span.stop - first * width], (rows, copy)


def spans(entries: int, most: int, width: int) -> Iterator[Span]:
    """Cut so many entries into spans of whole blocks, the last one but for its end, of at most so many entries.

    Examples:
        >>> [tuple(span) for span in spans(1000, 600, 256)]
        [(0, 512), (512, 1000)]
    """
    step = max(LEAST, most // width) * width
    if torch.compiler.is_compiling():
        step = entries
    for start in range(0, entries, step):
        yield Span(start, min(entries, start + step))


def spread(values: Tensor, width: int, span: Span) -> Tensor:
    """One value a row, repeated for each of the row's entries in a span; ``width`` entries make a row.

    Examples:
        >>> spread(torch.tensor([1.0, 2.0]), 3, Span(1, 5))
        tensor([1., 1., 2., 2.])
    """
    first, last = span.start // width, (span.stop - 1) // width
    if first == last:
        return values[first].expand(span.stop - span.start)
    head = values[first].expand((first + 1) * width - span.start)
    middle = values[first + 1 : last].unsqueeze(-1).expand(-1, width).reshape(-1)
    tail = values[last].expand(span.stop - last * width)
    return torch.cat([head, middle, tail])
