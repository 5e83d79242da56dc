"""How much of a row of weights a gradient or an update holds, named as in `ops.projection`.

Where a row fits on chip the kernels of a step form its products themselves, with `coefficient`. Else the coefficients
of all rows are found first: by one launch, or by two where a row has several parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor
from triton import language as tl

from trysquare.kernels._arithmetic import address, clipped, quotient, widened
from trysquare.kernels._launch import Table, cdiv, launch, power_of_2, warps
from trysquare.ops.projection import LARGEST_SQUARE, SMALLEST_SQUARE

PART = 1 << 14
"""Columns of a row whose products one program forms, at most."""

TILE = 1024
"""Elements that it holds at a time: columns of one row, or several short rows."""

BOUNDS = {"SMALLEST": SMALLEST_SQUARE, "LARGEST": LARGEST_SQUARE}
"""Of ⟨w,w⟩ as `coefficient` takes them."""


def row_coefficients_(
    found: Tensor, table: Table, columns: int, numbers: Tensor, scale: Tensor | None, kinds: Mapping[str, Any]
) -> Tensor:
    """Fill in the coefficients of all rows of all members, and return them.

    Args:
        found: Written; (members, rows), in the dtype of the arithmetic.
        table: Weights, gradients and, to project an update, momentum buffers, each (rows, columns).
        columns: How long a row is.
        numbers: To project an update, μ and ε as the third and fourth.
        scale: The clipping factor, 0-dim; None: 1.
        kinds: The constants PARAMETER, STATE and PROJECTS of the kernels: dtypes, and "gradient" or "update".
    """
    count, rows = found.shape
    part = min(PART, power_of_2(columns))
    parts, tile = cdiv(columns, part), min(part, TILE)
    high = min(TILE // tile, power_of_2(rows))
    along = square = None
    if parts > 1:
        along, square = torch.empty(2, count * rows * parts, dtype=torch.float64, device=found.device).unbind()
    constants = {**kinds, **BOUNDS, "ALIGNED": table.aligned, "PART": part, "TILE": tile, "ROWS": high}
    arguments = table.addresses, numbers, scale, found, along, square, count, rows, columns, parts
    programs = count * cdiv(rows, high) * parts
    launch(_row_products, programs, *arguments, constants=constants, num_warps=warps(tile * high))
    if parts > 1:
        own = {"PROJECTS": kinds["PROJECTS"], **BOUNDS, "BLOCK": 128}
        launch(_row_coefficients, count * rows, along, square, numbers, found, parts, constants=own)
    return found


@triton.jit
def _row_products(
    table,
    numbers,
    scale,
    coefficients,
    alongs,
    squares,
    count,
    rows,
    columns,
    parts,
    PARAMETER: tl.constexpr,
    STATE: tl.constexpr,
    PROJECTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """⟨w,g⟩ (or ⟨w,u⟩) and ⟨w,w⟩ of a part of each row; without places for them, the coefficients of whole rows."""
    part = tl.program_id(0) % parts
    down = tl.cdiv(rows, ROWS)
    member = tl.program_id(0) // parts // down
    row = (tl.program_id(0) // parts % down).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    w_place = address(table, member, count, 0, PARAMETER, ALIGNED) + row[:, None] * columns
    g_place = address(table, member, count, 1, PARAMETER, ALIGNED) + row[:, None] * columns
    mu = tl.load(numbers + 2).to(STATE)
    along = tl.zeros((ROWS, TILE), dtype=tl.float64)
    square = tl.zeros((ROWS, TILE), dtype=tl.float64)
    for offset in range(0, PART, TILE):
        column = part.to(tl.int64) * PART + offset + tl.arange(0, TILE)[None, :]
        here = (row[:, None] < rows) & (column < columns)
        w = widened(tl.load(w_place + column, mask=here, other=0.0), STATE)
        x = clipped(tl.load(g_place + column, mask=here, other=0.0), scale, STATE)
        if PROJECTS == "update":
            m_place = address(table, member, count, 2, STATE, ALIGNED) + row[:, None] * columns
            x = x + (tl.load(m_place + column, mask=here, other=0.0) * mu + x) * mu
        along += (w * x).to(tl.float64)
        square += (w * w).to(tl.float64)
    wx, ww = tl.sum(along, axis=1), tl.sum(square, axis=1)
    place = member.to(tl.int64) * rows + row
    if alongs is None:
        found = coefficient(wx, ww, tl.load(numbers + 3), PROJECTS, SMALLEST, LARGEST)
        tl.store(coefficients + place, found.to(coefficients.dtype.element_ty), mask=row < rows)
    else:
        tl.store(alongs + place * parts + part, wx, mask=row < rows)
        tl.store(squares + place * parts + part, ww, mask=row < rows)


@triton.jit
def _row_coefficients(
    alongs,
    squares,
    numbers,
    coefficients,
    parts,
    PROJECTS: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The coefficient of a row from the sums of its parts."""
    row = tl.program_id(0).to(tl.int64)
    along = tl.zeros((BLOCK,), dtype=tl.float64)
    square = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        along += tl.load(alongs + row * parts + part, mask=part < parts, other=0.0)
        square += tl.load(squares + row * parts + part, mask=part < parts, other=0.0)
    ww = tl.sum(square)
    found = coefficient(tl.sum(along), ww, tl.load(numbers + 3), PROJECTS, SMALLEST, LARGEST)
    tl.store(coefficients + row, found.to(coefficients.dtype.element_ty))


@triton.jit
def coefficient(along, square, eps, PROJECTS: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr):
    """How much of a row of θ the gradient or the update holds; 0 outside of the domain of the rule."""
    if PROJECTS == "gradient":
        inside = (square >= SMALLEST) & (square <= LARGEST)
        found = quotient(along, square + SMALLEST)
    else:
        inside = square >= eps
        found = quotient(along, tl.where(inside, square, 1.0))
    return tl.where(inside, found, 0.0)


@triton.jit
def subtract(x, w, c):
    """x − c·w; where there is nothing to subtract x stays as it is, also beside weights that are not finite."""
    return tl.where(c != 0, x - w * c, x)
