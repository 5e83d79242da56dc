"""A large (N, C, d₁, …) tensor worked through in blocks of positions, so that nothing between takes memory with N."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trysquare import _backend

CPU_ELEMENTS = 1 << 17
"""Half a megabyte in float32: what a core's cache holds while a handful of elementwise passes go over it."""

DEVICE_ELEMENTS = 1 << 23
"""Enough for every multiprocessor of a GPU, and 32 megabytes in float32."""

Block = tuple[slice, ...]


def blocks(shape: Sequence[int], elements: int) -> Iterator[Block]:
    """Slices of the positions (N, d₁, …) of a tensor (N, C, d₁, …), with at most this many elements, or one position.

    Examples:
        >>> [[(s.start, s.stop) for s in block] for block in blocks((2, 10, 5), elements=30)]
        [[(0, 1), (0, 3)], [(0, 1), (3, 6)], [(1, 2), (0, 3)], [(1, 2), (3, 6)]]
    """
    positions = (shape[0], *shape[2:])
    sizes = [shape[1] * math.prod(positions[i + 1 :]) for i in range(len(positions))]
    axis = next((i for i, size in enumerate(sizes) if size <= elements), len(sizes) - 1)
    step = max(1, elements // max(1, sizes[axis]))
    whole = tuple(slice(0, n) for n in positions[axis + 1 :])
    for outer in itertools.product(*(range(n) for n in positions[:axis])):
        for start in range(0, positions[axis], step):
            yield (*(slice(i, i + 1) for i in outer), slice(start, start + step), *whole)


@dataclass(frozen=True)
class Blockwise:
    """A function of large tensors, called on one block of them after another.

    Attributes:
        compute: Called as `compute(*entries, *positions, *constants)`, with tensors of one block.
        entries: Tensors of shape (N, C, d₁, …), converted to `dtype` a block at a time.
        positions: Tensors of shape (N, d₁, …), or None.
        constants: Passed on as they are.
        dtype: Of the arithmetic.
    """

    compute: Callable[..., Tensor]
    entries: Sequence[Tensor]
    positions: Sequence[Tensor | None]
    constants: Sequence[Any]
    dtype: torch.dtype

    def per_position(self) -> Tensor:
        """The values that it gives each position, in `dtype`."""
        x = self.entries[0]
        if self._is_small():
            return self._whole()
        output = torch.empty((x.shape[0], *x.shape[2:]), dtype=self.dtype, device=x.device)
        for block in self._blocks():
            output[block] = self._on(block)
        return output

    def per_entry(self, like: Tensor) -> Tensor:
        """The values that it gives each entry, in the dtype and layout of `like`."""
        if self._is_small():
            return self._whole().to(like.dtype)
        output = torch.empty_like(like)
        for block in self._blocks():
            output[_with_classes(block)] = self._on(block)
        return output

    def per_class(self) -> Tensor:
        """The values that it gives each class, summed over the blocks, in `dtype`."""
        if self._is_small():
            return self._whole()
        return torch.stack([self._on(block) for block in self._blocks()]).sum(0)

    def _is_small(self) -> bool:
        """Whether one block is enough; a compiler makes its own blocks."""
        return torch.compiler.is_compiling() or self.entries[0].numel() <= _elements(self.entries[0].device)

    def _blocks(self) -> Iterator[Block]:
        return blocks(self.entries[0].shape, _elements(self.entries[0].device))

    def _whole(self) -> Tensor:
        return self._on((slice(None),) * (self.entries[0].ndim - 1))

    def _on(self, block: Block) -> Tensor:
        entries = [entry[_with_classes(block)].to(self.dtype) for entry in self.entries]
        positions = [None if position is None else position[block] for position in self.positions]
        result: Tensor = _backend.run("eager", self.compute, *entries, *positions, *self.constants)
        return result


def _elements(device: torch.device) -> int:
    return CPU_ELEMENTS if device.type == "cpu" else DEVICE_ELEMENTS


def _with_classes(block: Block) -> Block:
    """A block of positions as one of entries, with all classes."""
    return (block[0], slice(None), *block[1:])
