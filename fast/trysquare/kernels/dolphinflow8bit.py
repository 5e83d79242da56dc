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
from trysquare.kernels._launch import DTYPES, TRITON, Table, cdiv, floats, launch, power_of_2, tile, warps
from trysquare.kernels.blockwise8bit import BLOCK, block_absmax, coded, decoded
from trysquare.kernels.moments import correction, denominator, mean_weight, second_moment
from trysquare.kernels.projection import coefficient, subtract
from trysquare.ops import blockwise8bit as format8bit
from trysquare.ops import dolphinflow8bit as ops

ON_CHIP = {"blocks": 1024, "float32": 4096}
"""Columns up to which a program holds whole rows, of coded moments and of those that are not."""

IN_CACHE = 8192
"""Columns up to which a program reads a row twice, the second time from a cache, and finds its coefficient itself."""

TILE = 1024
"""Elements of a program that holds several short rows, or a part of a long one."""

REGISTERS = 96 if TRITON < (3, 8) else 168
"""Of a thread, at most: with more there are too few threads at once to hide what looking up codes takes, with fewer the
compiler spills some, and newer ones would with these. (On an H100 with Triton 3.6 an earlier version of the kernel took
10.7 ms for a billion parameters with 80, 11.7 with 128.)"""

TILES = 8
"""Tiles that a program steps one after the other, at most: what is the same for all of a member is found once."""

PROGRAMS = 1 << 12
"""Where tiles make fewer programs than these, a program steps fewer of them; but two, so that small ones loop too."""


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
    whole = projects and columns % format8bit.BLOCK == 0 and columns <= IN_CACHE
    if projects and not whole:
        given = Given(row_coefficients(bucket.parameters, bucket.gradients, shape, scale), columns)
    if not whole:
        rows, columns = 1, rows * columns
    kind = "nothing" if given is None else "given"
    if whole:
        kind = "rows" if columns <= ON_CHIP["blocks"] else "long"
    high, wide = _blocks_of_tile(rows, cdiv(columns, format8bit.BLOCK), kind)
    across = cdiv(columns, wide * format8bit.BLOCK)
    in_all = cdiv(rows, high) * across
    count, table = len(bucket.parameters), Table(_operands(bucket))
    tiles = min(TILES, max(2, count * in_all // PROGRAMS))
    tiles = cdiv(tiles, across) * across if kind == "long" else tiles
    height, period, start = (1, 0, 0) if given is None else (given.coefficients.shape[1], *given[1:])
    constants = _constants(bucket, table)
    constants |= {"PROJECTS": kind, "LONG": period >= format8bit.BLOCK, "ROWS": high, "BLOCKS": wide}
    coefficients = None if given is None else given.coefficients
    shapes = count, rows, columns, height, period, start, tiles
    arguments = table.addresses, numbers, scale, finite, coefficients, *shapes
    options = {"num_warps": warps(high * wide * format8bit.BLOCK), "registers": REGISTERS}
    launch(_update_blocks, count * cdiv(in_all, tiles), *arguments, constants=constants, **options)


def _blocks_of_tile(rows: int, blocks: int, kind: str) -> tuple[int, int]:
    """Rows of a tile, and blocks of each: powers of two, which of a long row leave nothing over if they can."""
    most = TILE // format8bit.BLOCK
    wide = min(most, power_of_2(blocks))
    if kind == "long":
        return 1, math.gcd(most, blocks)
    return max(1, min(most // wide, power_of_2(rows))), wide


def update_(
    bucket: Bucket, shape: tuple[int, int], numbers: Tensor, scale: Tensor | None, finite: Tensor | None, projects: bool
) -> None:
    """The step of moments that are not coded, along the gradient as it is or projected row by row."""
    rows, columns = shape
    state, count, table = bucket.moments[0].states[0], len(bucket.parameters), Table(_operands(bucket))
    most = ON_CHIP["float32"] * 4 // state.element_size() if projects else TILE
    high, block = tile(rows, columns, TILE, most)
    constants = {**_constants(bucket, table), "STATE": DTYPES[state.dtype]}
    constants["PROJECTS"] = "rows" if projects else "nothing"
    coefficients = None
    if projects and columns > most:
        kinds = {name: constants[name] for name in ("PARAMETER", "STATE")} | {"PROJECTS": "gradient"}
        coefficients = torch.empty(count, rows, dtype=state.dtype, device=numbers.device)
        projection.row_coefficients_(coefficients, table, columns, numbers, scale, kinds)
        constants["PROJECTS"], block = "given", TILE
    programs = count * cdiv(rows, high) * cdiv(columns, block)
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
    tiles,
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
    """So many tiles, one after the other; each is some rows of blocks, one row where nothing is projected here.

    A block is a column of its tile: of loads through a table Triton lays out the first dimension along a warp, and so
    all that is loaded and stored lies in the same threads.
    """
    blocks = tl.cdiv(columns, BLOCK)
    across = tl.cdiv(blocks, BLOCKS)
    all_tiles = tl.cdiv(rows, ROWS) * across
    programs = tl.cdiv(all_tiles, tiles)
    member = tl.program_id(0) // programs
    first = tl.program_id(0) % programs * tiles
    w_start = address(table, member, count, 0, PARAMETER, ALIGNED)
    g_start = address(table, member, count, 1, GRADIENT, ALIGNED)
    beta1, share, beta2, rest, eps, decay, lr = rates_of(numbers, tl.float32, ADAPTIVE)
    if ADAPTIVE:
        weight, factor = corrections(address(table, member, count, 2, tl.float64, False), numbers, tl.float32)
    line, element = tl.arange(0, ROWS * BLOCKS)[None, :], tl.arange(0, BLOCK)[:, None]
    late: tl.constexpr = PROJECTS == "nothing" and GRADIENT != PARAMETER  # a wide gradient leaves few registers
    of_row = 0.0  # the coefficient of a long row
    for index in range(first, tl.minimum(first + tiles, all_tiles)):
        row = (index // across).to(tl.int64) * ROWS + line // BLOCKS
        block = (index % across).to(tl.int64) * BLOCKS + line % BLOCKS
        column = block * BLOCK + element
        inside = (row < rows) & (block < blocks)
        here = inside & (column < columns)
        places, scales = row * columns + column, row * blocks + block
        if not late:
            w = widened(tl.load(w_start + places, mask=here, other=0.0), tl.float32)
        g = clipped(tl.load(g_start + places, mask=here, other=0.0), scale, tl.float32)
        if PROJECTS == "rows":
            along, square = sum_of_rows(w * g, ROWS, BLOCKS), sum_of_rows(w * w, ROWS, BLOCKS)
            g = subtract(g, w, coefficient(along, square, None, "gradient", SMALLEST, LARGEST))
        if PROJECTS == "long":
            if index % across == 0:
                of_row = row_coefficient(w_start, g_start, index // across, scale, columns, BLOCKS, SMALLEST, LARGEST)
            g = subtract(g, w, of_row)
        if PROJECTS == "given":
            place = row_of(start + block * BLOCK, period, LONG) + member.to(tl.int64) * height
            g = subtract(g, w, tl.load(coefficients + place, mask=here, other=0.0))
        m_codes, m_absmax, m_qmap, m_bounds = moment_at(table, member, count, 3, ALIGNED)
        m = load_coded(m_codes + places, m_absmax + scales, m_qmap, here, inside)
        m = first_moment(m, g, beta1, share)
        u = m
        if ADAPTIVE:
            v_codes, v_absmax, v_qmap, v_bounds = moment_at(table, member, count, 7, ALIGNED)
            v = load_coded(v_codes + places, v_absmax + scales, v_qmap, here, inside)
            v = second_moment(v, g, beta2, rest)
            u = direction(m, v, eps, weight, factor)
            store_coded(v, v_codes + places, v_absmax + scales, v_bounds, here, inside, finite, False)
        if late:
            w = widened(tl.load(w_start + places, mask=here, other=0.0), tl.float32)
        store_coded(m, m_codes + places, m_absmax + scales, m_bounds, here, inside, finite, True)
        tl.store(w_start + places, narrowed(stepped(w, u, decay, lr), PARAMETER), mask=moved(here, finite))


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
    w = widened(tl.load(w_place, mask=here, other=0.0), STATE)
    g = clipped(tl.load(g_place, mask=here, other=0.0), scale, STATE)
    if PROJECTS == "rows":
        along, square = tl.sum(w * g, axis=1, keep_dims=True), tl.sum(w * w, axis=1, keep_dims=True)
        g = subtract(g, w, coefficient(along, square, None, "gradient", SMALLEST, LARGEST))
    if PROJECTS == "given":
        of_row = member.to(tl.int64) * rows + row
        g = subtract(g, w, tl.load(coefficients + of_row, mask=row < rows, other=0.0))
    beta1, share, beta2, rest, eps, decay, lr = rates_of(numbers, STATE, ADAPTIVE)
    m = first_moment(tl.load(m_place, mask=here, other=0.0), g, beta1, share)
    written = moved(here, finite)
    u = m
    if ADAPTIVE:
        v_place = address(table, member, count, 4, STATE, ALIGNED) + places
        v = second_moment(tl.load(v_place, mask=here, other=0.0), g, beta2, rest)
        weight, factor = corrections(address(table, member, count, 2, tl.float64, False), numbers, STATE)
        u = direction(m, v, eps, weight, factor)
        tl.store(v_place, v, mask=written)
    tl.store(m_place, m, mask=written)
    tl.store(w_place, narrowed(stepped(w, u, decay, lr), PARAMETER), mask=written)


# Rows


@triton.jit
def sum_of_rows(x, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """The sum of each row of blocks, at each of its blocks: (1, ROWS × BLOCKS)."""
    sums = tl.sum(tl.reshape(tl.sum(x, axis=0), (ROWS, BLOCKS)), axis=1, keep_dims=True)
    return tl.reshape(tl.broadcast_to(sums, (ROWS, BLOCKS)), (1, ROWS * BLOCKS))


@triton.jit
def row_coefficient(
    w_start, g_start, row, scale, columns, BLOCKS: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr
):
    """How much of a row the clipped gradient holds; both are in a cache then."""
    first = row.to(tl.int64) * columns
    within = tl.arange(0, BLOCKS * BLOCK)
    along = tl.zeros((BLOCKS * BLOCK,), dtype=tl.float32)
    square = tl.zeros((BLOCKS * BLOCK,), dtype=tl.float32)
    for begin in range(0, columns, BLOCKS * BLOCK):
        here, places = begin + within < columns, first + begin + within
        w = widened(tl.load(w_start + places, mask=here, other=0.0), tl.float32)
        along += w * clipped(tl.load(g_start + places, mask=here, other=0.0), scale, tl.float32)
        square += w * w
    return coefficient(tl.sum(along), tl.sum(square), None, "gradient", SMALLEST, LARGEST)


@triton.jit
def row_of(first, period, LONG: tl.constexpr):
    """The row of each element of blocks that begin at ``first``, if so many elements make a row."""
    row = first // period
    within, element = first - row * period, tl.arange(0, BLOCK)[:, None]
    if LONG:  # a block then meets one end of a row at most
        further = (within + element >= period).to(tl.int64)
    else:
        further = ((within.to(tl.int32) + element) // period).to(tl.int64)
    return row + further


# Moments


@triton.jit
def moment_at(table, member, count, FIRST: tl.constexpr, ALIGNED: tl.constexpr):
    """Where codes, scales, map and boundaries of a moment begin: ``FIRST`` is the codes' row of the table."""
    codes = address(table, member, count, FIRST, tl.uint8, ALIGNED)
    absmax = address(table, member, count, FIRST + 1, tl.float32, ALIGNED)
    qmap = address(table, member, count, FIRST + 2, tl.float32, ALIGNED)
    return codes, absmax, qmap, address(table, member, count, FIRST + 3, tl.float32, ALIGNED)


@triton.jit
def load_coded(codes, absmax, qmap, here, inside):
    """A moment from where its codes and scales are."""
    return decoded(tl.load(codes, mask=here, other=0), tl.load(absmax, mask=inside, other=0.0), qmap)


@triton.jit
def store_coded(x, codes, absmax, bounds, here, inside, finite, SIGNED: tl.constexpr):
    """Code a moment and put codes and scales where they were; what lies behind the end counts for no scale."""
    largest = block_absmax(tl.where(here, x, 0.0))
    tl.store(codes, coded(x, largest, bounds, SIGNED), mask=moved(here, finite))
    tl.store(absmax, largest, mask=moved(inside, finite))


@triton.jit
def rates_of(numbers, STATE: tl.constexpr, ADAPTIVE: tl.constexpr):
    """β₁, the share of a gradient in the first moment, β₂, 1 − β₂, ε, 1 − ηλ and η, in the format of the arithmetic."""
    lr, beta1, beta2 = tl.load(numbers), tl.load(numbers + 2), tl.load(numbers + 4)
    share = 1.0 - beta1 if ADAPTIVE else tl.full((), 1.0, tl.float64)
    beta1, share, beta2, rest = beta1.to(STATE), share.to(STATE), beta2.to(STATE), (1.0 - beta2).to(STATE)
    decay = (1.0 - lr * tl.load(numbers + 1)).to(STATE)
    return beta1, share, beta2, rest, tl.load(numbers + 3).to(STATE), decay, lr.to(STATE)


@triton.jit
def corrections(step, numbers, STATE: tl.constexpr):
    """1 − β₁ᵗ and 1/√(1 − β₂ᵗ), from the address of t."""
    return mean_weight(step, tl.load(numbers + 5), STATE), correction(step, tl.load(numbers + 6), STATE)


@triton.jit
def first_moment(m, g, beta1, share):
    """β₁·m + (1 − β₁)·g, or, with a share of 1, β₁·m + g."""
    return m * beta1 + g * share


@triton.jit
def direction(m, v, eps, weight, factor):
    """m̂/(√v̂ + ε)."""
    return quotient(m, denominator(v, eps, factor) * weight)


@triton.jit
def stepped(w, u, decay, lr):
    """θ·(1 − ηλ) − η·u."""
    return w * decay - u * lr
