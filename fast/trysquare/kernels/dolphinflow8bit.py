"""One step of DolphinFlow8bit on all tensors of one shape, in one launch; see `ops.dolphinflow8bit`.

A program holds whole blocks: it decodes their moments, moves weights and moments, and codes these again. Where rows
consist of whole blocks and fit on chip it holds whole rows, and projects them too; else the coefficients of all rows
are found first. Moments that are not coded are stepped in the same way, without blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl

from trysquare.kernels import projection
from trysquare.kernels._arithmetic import address, clipped, moved, narrowed, quotient, widened
from trysquare.kernels._launch import DTYPES, Table, floats, launch, tile, warps
from trysquare.kernels.blockwise8bit import BLOCK, block_absmax, coded, decoded
from trysquare.kernels.moments import correction, denominator, mean_weight, second_moment
from trysquare.kernels.projection import coefficient, subtract
from trysquare.ops import blockwise8bit as format8bit
from trysquare.ops import dolphinflow8bit as ops

ON_CHIP = 4096
"""Columns up to which a program holds whole rows of float32 numbers."""

TILE = 1024
"""Elements of a program that holds several short rows, or a part of a long one."""


class Moment(NamedTuple):
    """One moment of every member: codes with their scales, maps and boundaries, or, without these, the moment."""

    states: Sequence[Tensor]
    absmaxes: Sequence[Tensor] = ()
    qmaps: Sequence[Tensor] = ()
    bounds: Sequence[Tensor] = ()


class Bucket(NamedTuple):
    """Parallel lists of contiguous tensors of one shape and dtype; one moment, or two."""

    parameters: Sequence[Tensor]
    gradients: Sequence[Tensor]
    steps: Sequence[Tensor]
    moments: Sequence[Moment]


class Rule(NamedTuple):
    """What selects a formula."""

    ortho_mode: str | None
    ns_steps: int
    eps: float


class Given(NamedTuple):
    """Coefficients that were found before: (members, rows), the length of a row, and where in θ its part begins."""

    coefficients: Tensor
    columns: int
    start: int = 0


def numbers_of(device: torch.device, *values: float | Tensor) -> Tensor:
    """η, λ, β₁, ε and β₂ on the device, and log₂ β₁ and log₂ β₂ behind them."""
    logs = (math.log2(beta) if beta > 0 else -math.inf for beta in (float(values[2]), float(values[4])))
    return floats(device, *values, *logs)


def step_(
    bucket: Bucket, shape: tuple[int, int], numbers: Tensor, scale: Tensor | None, finite: Tensor | None, rule: Rule
) -> None:
    """Step every member in place, the steps of which are counted already; ``gradients`` are only read.

    Args:
        bucket: What is stepped.
        shape: Rows and columns of each member.
        numbers: As `numbers_of` makes them.
        scale: The clipping factor, 0-dim; None: 1.
        finite: Where it is false nothing is written; 0-dim, None: true.
        rule: What selects a formula.
    """
    kind = torch.float32 if bucket.moments[0].absmaxes else bucket.moments[0].states[0].dtype
    if rule.ortho_mode == "matrix":
        whole = torch.stack([gradient.view(shape) for gradient in bucket.gradients])
        found = ops.orthogonalized(whole, scale, rule.ns_steps, rule.eps, kind).contiguous()
        bucket, scale = bucket._replace(gradients=list(found.unbind())), None
    shape = shape if rule.ortho_mode == "vector" else (1, shape[0] * shape[1])
    update = update_blocks_ if bucket.moments[0].absmaxes else update_
    update(bucket, shape, numbers, scale, finite, rule.ortho_mode == "vector")


def row_coefficients(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], shape: tuple[int, int], scale: Tensor | None
) -> Tensor:
    """How much of every row of θ the clipped gradient holds, (members, rows), of contiguous coded parameters."""
    device = parameters[0].device
    found = torch.empty(len(parameters), shape[0], dtype=torch.float32, device=device)
    kinds = {"PARAMETER": DTYPES[parameters[0].dtype], "STATE": tl.float32, "PROJECTS": "gradient"}
    unused = floats(device, 0.0, 0.0, 0.0, 0.0)
    return projection.row_coefficients_(found, Table([parameters, gradients]), shape[1], unused, scale, kinds)


def update_blocks_(
    bucket: Bucket,
    shape: tuple[int, int],
    numbers: Tensor,
    scale: Tensor | None,
    finite: Tensor | None,
    projects: bool,
    given: Given | None = None,
) -> None:
    """The step of coded moments along the gradient as it is, or projected row by row or by what is ``given``."""
    rows, columns = shape
    projects_here = projects and columns % format8bit.BLOCK == 0 and columns <= ON_CHIP
    if projects and not projects_here:
        given = Given(row_coefficients(bucket.parameters, bucket.gradients, shape, scale), columns)
    if not projects_here:
        rows, columns = 1, rows * columns
    blocks, most = triton.cdiv(columns, format8bit.BLOCK), (ON_CHIP if projects_here else TILE) // format8bit.BLOCK
    wide = min(most, int(triton.next_power_of_2(blocks)))
    high = max(1, min(TILE // format8bit.BLOCK // wide, int(triton.next_power_of_2(rows))))
    count, table = len(bucket.parameters), Table(_operands(bucket))
    height, period, start = (1, 0, 0) if given is None else (given.coefficients.shape[1], *given[1:])
    constants = {
        **_constants(bucket, table),
        "PROJECTS": "rows" if projects_here else "nothing" if given is None else "given",
        "LONG": period >= format8bit.BLOCK,
        "ROWS": high,
        "BLOCKS": wide,
    }
    coefficients = None if given is None else given.coefficients
    programs = count * triton.cdiv(rows, high) * triton.cdiv(blocks, wide)
    shapes = count, rows, columns, height, period, start
    arguments = table.addresses, numbers, scale, finite, coefficients, *shapes
    launch(_update_blocks, programs, *arguments, constants=constants, num_warps=warps(high * wide * format8bit.BLOCK))


def update_(
    bucket: Bucket, shape: tuple[int, int], numbers: Tensor, scale: Tensor | None, finite: Tensor | None, projects: bool
) -> None:
    """The step of moments that are not coded, along the gradient as it is or projected row by row."""
    rows, columns = shape
    state, count, table = bucket.moments[0].states[0], len(bucket.parameters), Table(_operands(bucket))
    most = ON_CHIP * 4 // state.element_size() if projects else TILE
    high, block = tile(rows, columns, TILE, most)
    constants = {**_constants(bucket, table), "STATE": DTYPES[state.dtype]}
    constants["PROJECTS"] = "rows" if projects else "nothing"
    coefficients = None
    if projects and columns > most:
        kinds = {name: constants[name] for name in ("PARAMETER", "STATE")} | {"PROJECTS": "gradient"}
        coefficients = torch.empty(count, rows, dtype=state.dtype, device=numbers.device)
        projection.row_coefficients_(coefficients, table, columns, numbers, scale, kinds)
        constants["PROJECTS"], block = "given", TILE
    programs = count * triton.cdiv(rows, high) * triton.cdiv(columns, block)
    arguments = table.addresses, numbers, scale, finite, coefficients, count, rows, columns
    constants |= {"ROWS": high, "COLUMNS": block}
    launch(_update, programs, *arguments, constants=constants, num_warps=warps(high * block))


def _operands(bucket: Bucket) -> list[Sequence[Tensor]]:
    """The rows of the table: θ, g and t, then of each moment its codes, scales, maps and boundaries, or itself."""
    return [bucket.parameters, bucket.gradients, bucket.steps, *(own for m in bucket.moments for own in m if own)]


def _constants(bucket: Bucket, table: Table) -> dict[str, Any]:
    return {
        **projection.BOUNDS,
        "PARAMETER": DTYPES[bucket.parameters[0].dtype],
        "GRADIENT": DTYPES[bucket.gradients[0].dtype],
        "ADAPTIVE": len(bucket.moments) > 1,
        "ALIGNED": table.aligned,
    }


@triton.jit
def _update_blocks(
    table,
    numbers,
    scale,
    finite,
    coefficients,
    count,
    rows,
    columns,
    height,
    period,
    start,
    PARAMETER: tl.constexpr,
    GRADIENT: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    PROJECTS: tl.constexpr,
    LONG: tl.constexpr,
    ALIGNED: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Some rows of blocks, each a line of the tile; one row where nothing is projected here."""
    blocks = tl.cdiv(columns, BLOCK)
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(blocks, BLOCKS)
    member = tl.program_id(0) // across // down
    line = tl.arange(0, ROWS * BLOCKS)[:, None]
    row = (tl.program_id(0) // across % down).to(tl.int64) * ROWS + line // BLOCKS
    block = (tl.program_id(0) % across).to(tl.int64) * BLOCKS + line % BLOCKS
    column = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (block < blocks)
    here = inside & (column < columns)
    places, scales = row * columns + column, row * blocks + block
    w_place = address(table, member, count, 0, PARAMETER, ALIGNED) + places
    g_place = address(table, member, count, 1, GRADIENT, ALIGNED) + places
    step = address(table, member, count, 2, tl.float64, False)
    late: tl.constexpr = PROJECTS == "nothing" and GRADIENT != PARAMETER  # a wide gradient leaves few registers
    if not late:
        w = widened(tl.load(w_place, mask=here, other=0.0), tl.float32)
    g = clipped(tl.load(g_place, mask=here, other=0.0), scale, tl.float32)
    if PROJECTS == "rows":
        along, square = sum_of_rows(w * g, ROWS, BLOCKS), sum_of_rows(w * w, ROWS, BLOCKS)
        g = subtract(g, w, coefficient(along, square, None, "gradient", SMALLEST, LARGEST))
    if PROJECTS == "given":
        of_row = row_of(start + block * BLOCK, period, LONG) + member.to(tl.int64) * height
        g = subtract(g, w, tl.load(coefficients + of_row, mask=here, other=0.0))
    m = load_coded(table, member, count, 3, places, scales, here, inside, ALIGNED)
    m = first_moment(m, g, numbers, tl.float32, ADAPTIVE)
    u = m
    if ADAPTIVE:
        v = load_coded(table, member, count, 7, places, scales, here, inside, ALIGNED)
        v = average_square(v, g, numbers, tl.float32)
        u = direction(m, v, step, numbers, tl.float32)
        store_coded(v, table, member, count, 7, places, scales, here, inside, finite, False, ALIGNED)
    if late:
        w = widened(tl.load(w_place, mask=here, other=0.0), tl.float32)
    store_coded(m, table, member, count, 3, places, scales, here, inside, finite, True, ALIGNED)
    tl.store(w_place, narrowed(stepped(w, u, numbers, tl.float32), PARAMETER), mask=moved(here, finite))


@triton.jit
def _update(
    table,
    numbers,
    scale,
    finite,
    coefficients,
    count,
    rows,
    columns,
    PARAMETER: tl.constexpr,
    GRADIENT: tl.constexpr,
    STATE: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    PROJECTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some rows whose moments are not coded, or a part of a row."""
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    member = tl.program_id(0) // across // down
    row = (tl.program_id(0) // across % down).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % across).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    here = (row < rows) & (column < columns)
    places = row * columns + column
    w_place = address(table, member, count, 0, PARAMETER, ALIGNED) + places
    g_place = address(table, member, count, 1, GRADIENT, ALIGNED) + places
    m_place = address(table, member, count, 3, STATE, ALIGNED) + places
    step = address(table, member, count, 2, tl.float64, False)
    w = widened(tl.load(w_place, mask=here, other=0.0), STATE)
    g = clipped(tl.load(g_place, mask=here, other=0.0), scale, STATE)
    if PROJECTS == "rows":
        along, square = tl.sum(w * g, axis=1, keep_dims=True), tl.sum(w * w, axis=1, keep_dims=True)
        g = subtract(g, w, coefficient(along, square, None, "gradient", SMALLEST, LARGEST))
    if PROJECTS == "given":
        of_row = member.to(tl.int64) * rows + row
        g = subtract(g, w, tl.load(coefficients + of_row, mask=row < rows, other=0.0))
    m = first_moment(tl.load(m_place, mask=here, other=0.0), g, numbers, STATE, ADAPTIVE)
    written = moved(here, finite)
    u = m
    if ADAPTIVE:
        v_place = address(table, member, count, 4, STATE, ALIGNED) + places
        v = average_square(tl.load(v_place, mask=here, other=0.0), g, numbers, STATE)
        u = direction(m, v, step, numbers, STATE)
        tl.store(v_place, v, mask=written)
    tl.store(m_place, m, mask=written)
    tl.store(w_place, narrowed(stepped(w, u, numbers, STATE), PARAMETER), mask=written)


# Rows


@triton.jit
def sum_of_rows(x, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """The sum of each row of blocks, at each of its blocks: (ROWS × BLOCKS, 1)."""
    sums = tl.sum(tl.reshape(tl.sum(x, axis=1), (ROWS, BLOCKS)), axis=1, keep_dims=True)
    return tl.reshape(tl.broadcast_to(sums, (ROWS, BLOCKS)), (ROWS * BLOCKS, 1))


@triton.jit
def row_of(first, period, LONG: tl.constexpr):
    """The row of each element of blocks that begin at ``first``, if so many elements make a row."""
    row = first // period
    within, element = first - row * period, tl.arange(0, BLOCK)[None, :]
    if LONG:  # a block then meets one end of a row at most
        further = (within + element >= period).to(tl.int64)
    else:
        further = ((within.to(tl.int32) + element) // period).to(tl.int64)
    return row + further


# Moments


@triton.jit
def load_coded(table, member, count, FIRST: tl.constexpr, places, scales, here, inside, ALIGNED: tl.constexpr):
    """A moment from its codes, the first of its rows of the table."""
    codes = tl.load(address(table, member, count, FIRST, tl.uint8, ALIGNED) + places, mask=here, other=0)
    absmax = tl.load(address(table, member, count, FIRST + 1, tl.float32, ALIGNED) + scales, mask=inside, other=0.0)
    return decoded(codes, absmax, address(table, member, count, FIRST + 2, tl.float32, ALIGNED))


@triton.jit
def store_coded(
    x,
    table,
    member,
    count,
    FIRST: tl.constexpr,
    places,
    scales,
    here,
    inside,
    finite,
    SIGNED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Code a moment and put codes and scales where they were; what lies behind the end counts for no scale."""
    absmax = block_absmax(tl.where(here, x, 0.0))
    codes = coded(x, absmax, address(table, member, count, FIRST + 3, tl.float32, ALIGNED), SIGNED)
    tl.store(address(table, member, count, FIRST, tl.uint8, ALIGNED) + places, codes, mask=moved(here, finite))
    tl.store(address(table, member, count, FIRST + 1, tl.float32, ALIGNED) + scales, absmax, mask=moved(inside, finite))


@triton.jit
def first_moment(m, g, numbers, STATE: tl.constexpr, ADAPTIVE: tl.constexpr):
    """β₁·m + (1 − β₁)·g, or β₁·m + g."""
    beta1 = tl.load(numbers + 2)
    if ADAPTIVE:
        y = m * beta1.to(STATE) + g * (1.0 - beta1).to(STATE)
    else:
        y = m * beta1.to(STATE) + g
    return y


@triton.jit
def average_square(v, g, numbers, STATE: tl.constexpr):
    """β₂·v + (1 − β₂)·g²."""
    beta2 = tl.load(numbers + 4)
    return second_moment(v, g, beta2.to(STATE), (1.0 - beta2).to(STATE))


@triton.jit
def direction(m, v, step, numbers, STATE: tl.constexpr):
    """m̂/(√v̂ + ε)."""
    eps = tl.load(numbers + 3).to(STATE)
    below = denominator(v, eps, correction(step, tl.load(numbers + 6), STATE))
    return quotient(m, below * mean_weight(step, tl.load(numbers + 5), STATE))


@triton.jit
def stepped(w, u, numbers, STATE: tl.constexpr):
    """θ·(1 − ηλ) − η·u."""
    lr = tl.load(numbers)
    return w * (1.0 - lr * tl.load(numbers + 1)).to(STATE) - u * lr.to(STATE)
