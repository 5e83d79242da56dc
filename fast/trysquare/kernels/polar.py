"""The products of `ops.polar` in Triton: symmetric ones at little more than half the work.

Every product of the iterations but βX + QX is a polynomial in the symmetric A = XXᵀ, or A itself, and so is symmetric
but for rounding, of which `ops.polar.gram_form` says more. Only tiles on and below the diagonal are computed; the
transposed tile is stored at the mirrored place.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl

from trysquare.kernels import _polar_choices
from trysquare.kernels._arithmetic import dotted, narrowed, widened
from trysquare.kernels._described import Described, described
from trysquare.kernels._launch import DTYPES, cdiv, floats, launch
from trysquare.kernels._polar_choices import Tile
from trysquare.ops import polar


class Products(polar.Products):
    """Those of `ops.polar`, each by the kernel or by cuBLAS as the table of `_polar_choices` says for so many rows."""

    def __init__(self, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self._rows, self._device = rows, device
        self._gram = _polar_choices.of_symmetric("gram", rows, dtype, device)
        self._square = _polar_choices.of_symmetric("square", rows, dtype, device)

    @property
    def scale_for_nothing(self) -> bool:
        """Whether both kinds run by the kernel, whose products cost no more where they are scaled."""
        return self._gram is not None and self._square is not None

    def gram(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """XXᵀ, times a number of each matrix."""
        if self._gram is None:
            return super().gram(x, scale)
        return symmetric_product(x, x, self._gram.tile, scale=scale)

    def add_multiple(
        self,
        base: Tensor,
        left: Tensor,
        right: Tensor,
        beta: float,
        alpha: float = 1.0,
        scale: Tensor | None = None,
        *,
        symmetric: bool = True,
    ) -> Tensor:
        """β·base + α·left · right, times a number of each matrix, by the kernel where it is symmetric."""
        if self._square is None or not symmetric:
            return super().add_multiple(base, left, right, beta, alpha, scale)
        return symmetric_product(left, right, self._square.tile, base, beta, alpha, scale)

    def at_once(self, members: int, most: int, each: int = 1) -> int:
        """How many members of so many matrices are multiplied at a time: ``most``, or fewer that keep a GPU busier."""
        if self._square is None or members <= most:
            return most
        tile = self._square.tile
        return _at_once(members, most, each * _triangle(self._rows, tile), _polar_choices.places(self._device, tile))


@functools.lru_cache(maxsize=1024)
def _at_once(members: int, most: int, programs: int, places: int) -> int:
    """The size of parts, up to ``most``, whose programs take the fewest rounds in so many places; else the largest."""

    def rounds(size: int) -> int:
        whole, rest = divmod(members, size)
        return whole * cdiv(size * programs, places) + cdiv(rest * programs, places)

    return min(range(most, 0, -1), key=rounds)


def _triangle(size: int, tile: Tile) -> int:
    """The tiles, or pairs of them, of a lower triangle."""
    rows = cdiv(size, tile.side * max(1, tile.wide))
    return max(1, tile.wide) * rows * (rows + 1) // 2


def symmetric_product(
    left: Tensor,
    right: Tensor,
    tile: Tile,
    base: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
    scale: Tensor | None = None,
) -> Tensor:
    """s·(β·base + α·left · rightᵀ) where that is symmetric, as a new contiguous tensor (B, n, n).

    Args:
        left: (B, n, k) with any strides; half precision or float32. Sums are of float32 numbers.
        right: Of the same shape and dtype.
        tile: How; what cannot be described is read and written through pointers, by a tile for these.
        base: (B, n, n), symmetric; None: 0.
        beta: β, a factor of ``base``.
        alpha: α.
        scale: s of each matrix, (B,), float64 and contiguous; None: 1.
    """
    batch, size, inner = left.shape
    out = torch.empty(batch, size, size, dtype=left.dtype, device=left.device)
    base = None if base is None else base.contiguous()
    numbers = floats(left.device, beta, alpha)
    if tile.wide:
        blocks = _blocks(left, right, base, out, tile)
        if blocks is not None:
            _multiply_blocks(blocks, numbers, scale, batch, size, inner, tile)
            return out
        tile = _polar_choices.by_pointers(tile)
    triangle = _triangle(size, tile)
    operands = left, right, base, out, numbers, scale
    arguments = *operands, size, inner, triangle, *left.stride(), *right.stride()
    constants = {"DTYPE": DTYPES[left.dtype], "SIDE": tile.side, "INNER": tile.inner}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    launch(_symmetric_product, batch * triangle, *arguments, constants=constants, **options)
    return out


class Blocks(NamedTuple):
    """Descriptors of a product."""

    left: Described
    right: Described
    base: Described | None
    out: Described


def _blocks(left: Tensor, right: Tensor, base: Tensor | None, out: Tensor, tile: Tile) -> Blocks | None:
    """None where one cannot be described."""
    x = described(left, tile.side, tile.inner)
    y = x if right is left and tile.wide == 1 else described(right, tile.side * tile.wide, tile.inner)
    written = described(out, tile.side, tile.side)
    added = None if base is None else described(base, tile.side, tile.side)
    if x is None or y is None or written is None or (base is not None and added is None):
        return None
    return Blocks(x, y, added, written)


def _multiply_blocks(
    blocks: Blocks, numbers: Tensor, scale: Tensor | None, batch: int, size: int, inner: int, tile: Tile
) -> None:
    triangle = _triangle(size, tile)
    programs = min(batch * triangle, _polar_choices.places(numbers.device, tile))
    base = None if blocks.base is None else blocks.base.descriptor
    descriptors = blocks.left.descriptor, blocks.right.descriptor, base, blocks.out.descriptor
    constants = {"DTYPE": DTYPES[blocks.out.descriptor.base.dtype], "SIDE": tile.side, "INNER": tile.inner}
    constants |= {"WIDE": tile.wide, "LEFT_ROWS": blocks.left.by_rows, "RIGHT_ROWS": blocks.right.by_rows}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    arguments = numbers, scale, *descriptors, size, inner, triangle, batch * triangle
    launch(_symmetric_product_of_blocks, programs, *arguments, constants=constants, **options)


@triton.jit
def _symmetric_product(
    left,
    right,
    base,
    out,
    numbers,
    scale,
    size,
    inner,
    triangle,
    left_batch,
    left_row,
    left_inner,
    right_batch,
    right_row,
    right_inner,
    DTYPE: tl.constexpr,
    SIDE: tl.constexpr,
    INNER: tl.constexpr,
):
    """Operands of any strides, through pointers."""
    batch = (tl.program_id(0) // triangle).to(tl.int64)
    i, j = tile_of(tl.program_id(0) % triangle)
    row = i * SIDE + tl.arange(0, SIDE)
    column = j * SIDE + tl.arange(0, SIDE)
    within = tl.arange(0, INNER)
    left_place = left + batch * left_batch + row.to(tl.int64)[:, None] * left_row
    right_place = right + batch * right_batch + column.to(tl.int64)[None, :] * right_row
    total = tl.zeros((SIDE, SIDE), dtype=tl.float32)
    for start in range(0, inner, INNER):
        term = start + within
        here = term < inner
        at = term.to(tl.int64)
        x = tl.load(left_place + at[None, :] * left_inner, mask=(row < size)[:, None] & here[None, :], other=0.0)
        y = tl.load(right_place + at[:, None] * right_inner, mask=here[:, None] & (column < size)[None, :], other=0.0)
        total = dotted(x, y, total)
    beta, alpha = factors_of(batch, numbers, scale)
    store_tile(total, base, out, beta, alpha, batch, i, j, size, DTYPE, SIDE)


@triton.jit
def _symmetric_product_of_blocks(
    numbers,
    scale,
    left,
    right,
    base,
    out,
    size,
    inner,
    triangle,
    tiles,
    DTYPE: tl.constexpr,
    SIDE: tl.constexpr,
    INNER: tl.constexpr,
    WIDE: tl.constexpr,
    LEFT_ROWS: tl.constexpr,
    RIGHT_ROWS: tl.constexpr,
):
    """Operands whose blocks a Hopper GPU's copy engine fetches, and a result that it writes, one tile or two at once.

    Two need less to be fetched for as many products; of those that reach over the diagonal, what lies above it is lost.
    A program computes one place after the other: the first blocks of the next are on their way while the sums of this
    one are written. For that Triton makes one loop of both, which must not branch.
    """
    for program in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        batch, index = program // triangle, program % triangle
        down, j = tile_of(index // WIDE)
        i = down * WIDE + index % WIDE
        total = tl.zeros((SIDE, SIDE * WIDE), dtype=tl.float32)
        for start in range(0, inner, INNER):
            x = block_of(left, batch, i * SIDE, start, SIDE, INNER, LEFT_ROWS)
            y = block_of(right, batch, j * SIDE * WIDE, start, SIDE * WIDE, INNER, RIGHT_ROWS)
            total = dotted(x, tl.trans(y), total)
        beta, alpha = factors_of(batch, numbers, scale)
        if WIDE == 1:
            store_block(total, base, out, beta, alpha, batch, i, j, size, DTYPE, SIDE)
        else:
            first, second = tl.split(tl.permute(tl.reshape(total, (SIDE, 2, SIDE)), (0, 2, 1)))
            store_block(first, base, out, beta, alpha, batch, i, 2 * j, size, DTYPE, SIDE)
            store_block(second, base, out, beta, alpha, batch, i, 2 * j + 1, size, DTYPE, SIDE)


@triton.jit
def block_of(operand, batch, row, start, ROWS: tl.constexpr, INNER: tl.constexpr, BY_ROWS: tl.constexpr):
    """(ROWS, INNER) of a described operand, which lies in memory by rows or by columns."""
    if BY_ROWS:
        block = tl.reshape(operand.load([batch, row, start]), (ROWS, INNER))
    else:
        block = tl.trans(tl.reshape(operand.load([batch, start, row]), (INNER, ROWS)))
    return block


@triton.jit
def factors_of(batch, numbers, scale):
    """β and α, times the number of a matrix."""
    beta, alpha = tl.load(numbers), tl.load(numbers + 1)
    if scale is not None:
        own = tl.load(scale + batch)
        beta, alpha = beta * own, alpha * own
    return beta.to(tl.float32), alpha.to(tl.float32)


@triton.jit
def store_block(total, base, out, beta, alpha, batch, i, j, size, DTYPE: tl.constexpr, SIDE: tl.constexpr):
    """α times a tile of sums and β times the base, described: where it belongs, and at the mirrored place.

    What is not to be written is put beyond the last row, where descriptors write nothing: a tile above the diagonal,
    and the mirrored one of those on it.
    """
    found = total * alpha
    if base is not None:
        addend = tl.reshape(base.load([batch, i * SIDE, j * SIDE]), (SIDE, SIDE))
        found += widened(addend, tl.float32) * beta
    rounded = narrowed(found, DTYPE)
    mirrored = transposed(rounded)
    along = tl.arange(0, SIDE)
    rounded = symmetric(rounded, mirrored, (along[:, None] < along[None, :]) & (i == j))
    row = tl.where(j <= i, i * SIDE, size)
    out.store([batch, row, j * SIDE], tl.reshape(rounded, (1, SIDE, SIDE)))
    row = tl.where(j < i, j * SIDE, size)
    out.store([batch, row, i * SIDE], tl.reshape(mirrored, (1, SIDE, SIDE)))


@triton.jit
def store_tile(total, base, out, beta, alpha, batch, i, j, size, DTYPE: tl.constexpr, SIDE: tl.constexpr):
    """The same through pointers."""
    row = i * SIDE + tl.arange(0, SIDE)
    column = j * SIDE + tl.arange(0, SIDE)
    found = total * alpha
    whole = batch * size * size
    inside = (row < size)[:, None] & (column < size)[None, :]
    place = whole + row.to(tl.int64)[:, None] * size + column[None, :]
    if base is not None:
        addend = widened(tl.load(base + place, mask=inside, other=0.0), tl.float32)
        found += addend * beta
    rounded = narrowed(found, DTYPE)
    mirrored = transposed(rounded)
    if i == j:
        rounded = symmetric(rounded, mirrored, row[:, None] < column[None, :])
    tl.store(out + place, rounded, mask=inside)
    if i != j:
        there = whole + column.to(tl.int64)[:, None] * size + row[None, :]
        tl.store(out + there, mirrored, mask=(column < size)[:, None] & (row < size)[None, :])


@triton.jit
def transposed(tile):
    """A tile as it is stored at the mirrored place."""
    return tl.trans(tile)


@triton.jit
def symmetric(tile, mirrored, above):
    """A tile on the diagonal, with what is below it above too: bit for bit, as the next product reads it transposed.

    L·Rᵀ of matrices that are symmetric but for rounding is as good as L·R; in the Gram form these differences grow
    from one iteration to the next, to an error ten times as large.
    """
    return tl.where(above, mirrored, tile)


@triton.jit
def tile_of(index):
    """(i, j), i ≥ j, of the tile of a lower triangle that is counted row by row: index = i(i + 1)/2 + j.

    The root is of float32 numbers and may be off by one either way, which integers then put right.
    """
    i = ((tl.sqrt((8 * index + 1).to(tl.float32)) - 1.0) * 0.5).to(tl.int32)
    i = tl.where((i + 1) * (i + 2) // 2 <= index, i + 1, i)
    i = tl.where(i * (i + 1) // 2 > index, i - 1, i)
    return i, index - i * (i + 1) // 2
