"""What the kernels of StableMax's losses and of their gradient share: where logits are, tiles, and γ.

Logits (N, C, d₁, …) may have any strides: a table on the device says where each position begins. Logits of ignored
positions are not read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl

from trysquare.kernels._arithmetic import widened
from trysquare.kernels._launch import ALIGNMENT, DTYPES, floats, integers, power_of_2

TILE = 1 << 12
"""Logits that a program holds at a time."""

ACROSS = 32
"""Classes of a tile whose neighbours in memory are positions."""

WARPS = 8
"""Of a program that holds a tile: 16 logits a thread."""

BLOCK = 128
"""Positions of a program that only has some numbers for each."""


class Places(NamedTuple):
    """Where the numbers of a position are: the first where `table` says, each further class a `stride` on.

    Attributes:
        table: (size, stride) of every dimension of positions, innermost first; int64, on the device.
        dims: How many these are.
        stride: From one class to the next.
        aligned: Whether every position begins at a multiple of 16 bytes.
        across: Whether positions lie closer together than classes.
    """

    table: Tensor
    dims: int
    stride: int
    aligned: bool
    across: bool


def places_of(x: Tensor) -> Places:
    """Of a tensor (N, C, d₁, …)."""
    merged = _merged(zip((x.shape[0], *x.shape[2:]), (x.stride(0), *x.stride()[2:]), strict=True))
    offsets = x.data_ptr(), *(stride * x.element_size() for _, stride in merged)
    aligned = all(offset % ALIGNMENT == 0 for offset in offsets)
    across = 0 < merged[0][1] < x.stride(1)
    return Places(integers(x.device, *sum(merged, ())), len(merged), x.stride(1), aligned, across)


def _merged(dimensions: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(size, stride), innermost first; dimensions through which one stride leads are one."""
    merged: list[tuple[int, int]] = []
    for size, stride in reversed(list(dimensions)):
        if size == 1:
            continue
        if merged and stride == merged[-1][0] * merged[-1][1]:
            merged[-1] = merged[-1][0] * size, merged[-1][1]
        else:
            merged.append((size, stride))
    return merged or [(1, 0)]


def tile_of(positions: int, classes: int, across: bool) -> tuple[int, int]:
    """Positions and classes of a tile, powers of two, with many of those that are neighbours in memory."""
    all_positions, all_classes = (power_of_2(max(1, n)) for n in (positions, classes))
    if across:
        height = min(all_positions, max(1, TILE // ACROSS))
        return height, min(all_classes, TILE // height)
    width = min(all_classes, TILE)
    return min(all_positions, TILE // width), width


class Problem(NamedTuple):
    """What forward and backward share.

    Attributes:
        x: Logits (N, C, d₁, …).
        places: Where they are.
        target: Class indices, (N·d₁·…), int64 and contiguous.
        weight: (C), contiguous; None: all 1.
        smoothing: α, α/C and Σ w, float64 on the device; None: α = 0.
        ignore_index: Of positions with loss and gradient 0.
        dtype: Of the arithmetic, float32 or float64.
    """

    x: Tensor
    places: Places
    target: Tensor
    weight: Tensor | None
    smoothing: Tensor | None
    ignore_index: int
    dtype: torch.dtype

    @property
    def chunk(self) -> int:
        """Logits in 16 bytes, if rows are read in chunks of these that begin ahead of a row; 1 if they need not be.

        They need not where all rows begin with such a chunk and end with one, as far as a compiler is told.
        """
        x, places = self.x, self.places
        if places.across or places.stride != 1 or x.shape[1] <= TILE:
            return 1
        return 1 if places.aligned and x.shape[1] % ALIGNMENT == 0 else ALIGNMENT // x.element_size()

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """What every kernel is told: positions, classes, the stride of these, and what is ignored."""
        return self.target.numel(), self.x.shape[1], self.places.stride, self.ignore_index

    @property
    def constants(self) -> dict[str, object]:
        """What every kernel is compiled for."""
        return {"DIMS": self.places.dims, "DTYPE": DTYPES[self.dtype]}


def problem_of(
    x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float, dtype: torch.dtype
) -> Problem:
    """From the arguments of a loss with class indices."""
    w = None if weight is None else weight.detach().contiguous()
    smoothing = None
    if label_smoothing:
        total = float(x.shape[1]) if w is None else w.sum(dtype=torch.float64)
        smoothing = floats(x.device, label_smoothing, label_smoothing / max(1, x.shape[1]), total)
    return Problem(x, places_of(x), target.reshape(-1).contiguous(), w, smoothing, ignore_index, dtype)


def tile_constants(problem: Problem, height: int, width: int) -> dict[str, object]:
    """What a kernel is told of its tiles; dimension CLASSES of them has the classes, the last one is fastest."""
    across, aligned = problem.places.across, problem.places.aligned
    layout = {"CLASSES": 0 if across else 1, "ALIGNED": aligned or problem.chunk > 1, "CHUNK": problem.chunk}
    return {"POSITIONS": height, "COLUMNS": width, **layout}


# On the device


@triton.jit
def damped(a: tl.constexpr, x):
    """a/(1 + |x|) by a GPU's quick quotient; by quarters its reciprocals are no subnormal numbers either."""
    return (0.25 * a) / (0.25 + 0.25 * tl.abs(x))


@triton.jit
def log_s(x):
    """γ."""
    y = tl.log(1.0 + tl.abs(x))
    return tl.where(x < 0, -y, y)


@triton.jit
def not_negative(x):
    """max(x, 0), but NaN for NaN."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def begins(position, table, DIMS: tl.constexpr):
    """How far the first class of each position is from the first of all."""
    rest = position
    offset = position * 0
    for dim in tl.static_range(DIMS - 1):
        size = tl.load(table + 2 * dim)
        offset += rest % size * tl.load(table + 2 * dim + 1)
        rest = rest // size
    return offset + rest * tl.load(table + 2 * DIMS - 1)


@triton.jit
def ahead(begin, CHUNK: tl.constexpr):
    """How many elements behind a multiple of 16 bytes each row begins: where the columns of its tiles begin."""
    if CHUNK == 1:
        shift = tl.zeros(begin.shape, dtype=tl.int32)
    else:
        shift = (begin.to(tl.int64) // (16 // CHUNK) % CHUNK).to(tl.int32)
    return shift


@triton.jit
def tile_at(x, offset, ALIGNED: tl.constexpr, CLASSES: tl.constexpr):
    """Where each row of a tile begins."""
    begin = x + offset
    if ALIGNED:
        begin = tl.multiple_of(begin, 16)
    return tl.expand_dims(begin, CLASSES)


@triton.jit
def in_chunks(column, shift, classes, CHUNK: tl.constexpr):
    """Whether a column is of a chunk that is wholly within its row, all of which are read and written at once."""
    if CHUNK == 1:
        found = column < classes
    else:
        found = (column >= (shift + CHUNK - 1) // CHUNK * CHUNK) & (column < (shift + classes) // CHUNK * CHUNK)
    return found


@triton.jit
def at_ends(shift, classes, CHUNK: tl.constexpr):
    """The columns of the first chunk and of the one behind the last whole one, and which are of the row alone."""
    along = tl.arange(0, 2 * CHUNK)[None, :]
    column = tl.where(along < CHUNK, along, (shift + classes) // CHUNK * CHUNK + along - CHUNK)
    within = (column >= shift) & (column < shift + classes)
    return column, within & (in_chunks(column, shift, classes, CHUNK) == 0)


@triton.jit
def chosen_weight(weight, y, chosen):
    """w_y, float64."""
    if weight is None:
        w = tl.where(chosen, 1.0, 0.0).to(tl.float64)
    else:
        w = widened(tl.load(weight + y, mask=chosen, other=0.0), tl.float64)
    return w


@triton.jit
def chosen_logit(x, places, y, chosen, stride):
    """x_y, float64; NaN where there is no such class."""
    return tl.where(chosen, widened(tl.load(x + places + y * stride, mask=chosen, other=0.0), tl.float64), float("nan"))


@triton.jit
def weighted(values, weight, column, inside, is_class):
    """The values times w; a class of weight 0 counts nothing, not even γ = −∞."""
    if weight is None:
        terms = values
    else:
        w = widened(tl.load(weight + column, mask=is_class, other=0.0), values.dtype)
        terms = tl.where(w == 0, 0.0, w * values)
    return tl.where(inside, terms, 0.0)
