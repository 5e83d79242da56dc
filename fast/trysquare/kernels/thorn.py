"""One step of THORN on all matrices of one shape; see `ops.thorn`.

Before the products: one launch for momentum and sums of squares, a small one that adds these up, one that divides by
the norm and rounds. Behind them: one for the mean squares of rows and their v, a small one for the norms of whole
matrices and the rates, and one for decay and weights. A member of a bucket may be a batch of matrices.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl

from trysquare.kernels._arithmetic import address, moved, narrowed, quotient, root, widened
from trysquare.kernels._launch import DTYPES, Table, cdiv, floats, launch, tile, warps
from trysquare.kernels.decay import cautious_decay
from trysquare.kernels.polar import Products
from trysquare.kernels.rectification import rectification
from trysquare.ops import polar
from trysquare.ops.thorn import Rule

TILE = 1024
"""Elements that a program holds at a time."""

PART = 1 << 12
"""Elements whose squares one program adds up."""

BLOCK = 256
"""Rows or partial sums that a program of the small launches holds at a time."""

SELDOM = 64
"""Programs of a matrix for what most matrices need not: they see that, and end."""

FOLDED = (torch.bfloat16, torch.float32)
"""Formats with the range of float32, whose matrices may be multiplied before they are normalised."""

PLAIN = tl.constexpr(2.0**40)
"""Norms up to it, and down to 1 over it."""


class Matrices(NamedTuple):
    """Parallel lists of contiguous tensors of one shape, and the state of each."""

    parameters: Sequence[Tensor]
    gradients: Sequence[Tensor]
    momentum_buffers: Sequence[Tensor]
    row_exp_avg_sqs: Sequence[Tensor] | None
    steps: Sequence[Tensor]


class Shape(NamedTuple):
    """Of a member: so many matrices, and the rows and columns of each."""

    each: int
    rows: int
    columns: int


def numbers_of(
    device: torch.device,
    lr: float | Tensor,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float,
    update_rate: int = 1,
    scale: float = 1.0,
    safety_factor: float = 0.0,
) -> Tensor:
    """η, λ, β₁, ε, β₂, log₂ of both β, N, the scale of the rate and 1 + safety on the device, as float64."""
    logarithms = [math.log2(beta) if beta > 0 else -math.inf for beta in betas]
    beta1, beta2 = betas
    numbers = lr, weight_decay, beta1, eps, beta2, logarithms[1], logarithms[0], float(update_rate), scale
    return floats(device, *numbers, 1.0 + safety_factor)


def step_(
    bucket: Matrices,
    shape: Shape,
    numbers: Tensor,
    finite: Tensor | None,
    rule: Rule,
    products: Products,
    *,
    rectifies: bool,
) -> None:
    """Step every member in place, the steps of which are counted already; ``gradients`` are only read.

    Args:
        bucket: What is stepped.
        shape: Of each member.
        numbers: As `numbers_of` makes them.
        finite: Where it is false nothing is written; 0-dim, None: true.
        rule: Coefficients, form and dtype of the products.
        products: Of matrices of this shape.
        rectifies: Whether the rate is rectified.
    """
    evaluate, inverse = polar.evaluator(rule.form), None
    if rule.form == "gram" and products.scale_for_nothing and rule.matmul_dtype in FOLDED:
        slices = len(bucket.parameters) * shape.each
        inverse = torch.empty(slices, dtype=torch.float64, device=bucket.parameters[0].device)
        evaluate = functools.partial(evaluate, inverse=inverse)
    # no name for what X was: its memory is free as soon as it has been multiplied
    x = evaluate(
        polar.widthwise(prepare_(bucket, shape, numbers, finite, rule.matmul_dtype, inverse)),
        rule.coefficients,
        products,
    )
    x = (x.mT if shape.rows > shape.columns else x).contiguous()
    apply_(bucket, shape, x, numbers, finite, rectifies=rectifies)


def prepare_(
    bucket: Matrices,
    shape: Shape,
    numbers: Tensor,
    finite: Tensor | None,
    matmul_dtype: torch.dtype,
    inverse: Tensor | None = None,
) -> Tensor:
    """m ← β₁m + g; returns u = g + β₁m over (1 + safety)·max(‖u‖_F, ε), (B, R, C) in ``matmul_dtype``.

    Squares are added up as float64 numbers, and the quotient is rounded once. u is not kept: the second pass forms it
    anew from m and g, which is less to move. Where ``inverse``, (B,) float64, is given there is no second pass: u is
    returned as it is, and 1 over its divisor is written there; or, where squares might leave the range of float32, the
    quotient and 1.
    """
    first, count = bucket.momentum_buffers[0], len(bucket.parameters)
    slices = count * shape.each
    elements, device = shape.rows * shape.columns, first.device
    parts = cdiv(elements, PART)
    sums = torch.empty(slices * parts, dtype=torch.float64, device=device)
    x = torch.empty(slices, shape.rows, shape.columns, dtype=matmul_dtype, device=device)
    accumulate_(bucket, shape, numbers, finite, sums, None if inverse is None else x)
    norms = torch.empty(slices, dtype=torch.float64, device=device)
    launch(_norms, slices, sums, numbers, norms, inverse, parts, constants={"BLOCK": BLOCK}, num_warps=2)
    table = Table([bucket.momentum_buffers, bucket.gradients])
    formats = {"GRADIENT": DTYPES[bucket.gradients[0].dtype], "STATE": DTYPES[first.dtype]}
    constants = {**formats, "MATMUL": DTYPES[matmul_dtype], "ALIGNED": _aligned(table, bucket, elements), "TILE": TILE}
    tiles = cdiv(elements, TILE)
    each = tiles if inverse is None else min(tiles, SELDOM)
    arguments = table.addresses, numbers, norms, inverse, x, count, shape.each, elements, each
    launch(_normalize, slices * each, *arguments, constants=constants, num_warps=warps(TILE))
    return x


def accumulate_(
    bucket: Matrices,
    shape: Shape,
    numbers: Tensor,
    finite: Tensor | None,
    sums: Tensor | None = None,
    x: Tensor | None = None,
) -> None:
    """m ← β₁m + g, Σu² of every part of a matrix into ``sums`` (None: of none), and u into ``x`` (None: nowhere)."""
    first, elements = bucket.momentum_buffers[0], shape.rows * shape.columns
    table = Table([bucket.momentum_buffers, bucket.gradients])
    formats = {"GRADIENT": DTYPES[bucket.gradients[0].dtype], "STATE": DTYPES[first.dtype]}
    formats["MATMUL"] = formats["STATE"] if x is None else DTYPES[x.dtype]
    constants = {**formats, "ALIGNED": _aligned(table, bucket, elements), "PART": PART, "TILE": TILE}
    count, parts = len(bucket.parameters), cdiv(elements, PART)
    arguments = table.addresses, numbers, finite, sums, x, count, shape.each, elements, parts
    launch(_accumulate, count * shape.each * parts, *arguments, constants=constants, num_warps=warps(TILE))


def _aligned(table: Table, bucket: Matrices, elements: int) -> bool:
    """Whether the matrices within members begin at multiples of 16 bytes too."""
    return table.aligned and elements * bucket.gradients[0].element_size() % 16 == 0


@triton.jit
def _accumulate(
    table,
    numbers,
    finite,
    sums,
    x,
    count,
    each,
    elements,
    parts,
    GRADIENT: tl.constexpr,
    STATE: tl.constexpr,
    MATMUL: tl.constexpr,
    ALIGNED: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
):
    whole = tl.program_id(0) // parts
    start = (whole % each).to(tl.int64) * elements
    m_start = address(table, whole // each, count, 0, STATE, ALIGNED) + start
    g_start = address(table, whole // each, count, 1, GRADIENT, ALIGNED) + start
    beta1 = tl.load(numbers + 2).to(STATE)
    total = tl.zeros((TILE,), dtype=tl.float64)
    for offset in range(0, PART, TILE):
        places = (tl.program_id(0) % parts).to(tl.int64) * PART + offset + tl.arange(0, TILE)
        here = places < elements
        g = widened(tl.load(g_start + places, mask=here, other=0.0), STATE)
        m = tl.load(m_start + places, mask=here, other=0.0) * beta1 + g
        tl.store(m_start + places, m, mask=moved(here, finite))
        if sums is not None:
            u = g + m * beta1
            wide = u.to(tl.float64)
            total += wide * wide
            if x is not None:
                tl.store(x + whole.to(tl.int64) * elements + places, narrowed(u, MATMUL), mask=here)
    if sums is not None:
        tl.store(sums + tl.program_id(0), tl.sum(total))


@triton.jit
def _norms(sums, numbers, norms, inverse, parts, BLOCK: tl.constexpr):
    """(1 + safety)·max(‖u‖_F, ε) of every matrix; NaN stays NaN. And 1 over it, or 1 where `is_plain` says no."""
    whole = tl.program_id(0)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        total += tl.load(sums + whole.to(tl.int64) * parts + part, mask=part < parts, other=0.0)
    length, eps = tl.sqrt(tl.sum(total)), tl.load(numbers + 3)
    norm = tl.where(length < eps, eps, length) * tl.load(numbers + 9)
    tl.store(norms + whole, norm)
    if inverse is not None:
        tl.store(inverse + whole, tl.where(is_plain(norm), 1.0 / norm, 1.0))


@triton.jit
def is_plain(norm):
    """Whether a matrix of this norm may be multiplied before it is divided by it; no for NaN.

    Within, entries whose squares are lost are 2⁻²³ of the norm or less, and change no multiplier.
    """
    return (norm > 1.0 / PLAIN) & (norm < PLAIN)


@triton.jit
def _normalize(
    table,
    numbers,
    norms,
    inverse,
    x,
    count,
    each,
    elements,
    programs,
    GRADIENT: tl.constexpr,
    STATE: tl.constexpr,
    MATMUL: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    """u over its norm, rounded to the format of the products; with an inverse, of matrices that are not plain only."""
    whole = tl.program_id(0) // programs
    norm = tl.load(norms + whole)
    end = elements
    if inverse is not None:
        end = tl.where(is_plain(norm), 0, elements)
    start = (whole % each).to(tl.int64) * elements
    m_start = address(table, whole // each, count, 0, STATE, ALIGNED) + start
    g_start = address(table, whole // each, count, 1, GRADIENT, ALIGNED) + start
    beta1 = tl.load(numbers + 2).to(STATE)
    for offset in range((tl.program_id(0) % programs).to(tl.int64) * TILE, end, programs * TILE):
        places = offset + tl.arange(0, TILE)
        here = places < elements
        g = widened(tl.load(g_start + places, mask=here, other=0.0), STATE)
        u = g + tl.load(m_start + places, mask=here, other=0.0) * beta1
        found = (u.to(tl.float64) / norm).to(STATE)
        tl.store(x + whole.to(tl.int64) * elements + places, narrowed(found, MATMUL), mask=here)


# Behind the products


def apply_(
    bucket: Matrices, shape: Shape, x: Tensor, numbers: Tensor, finite: Tensor | None, *, rectifies: bool
) -> None:
    """Step parameters and row states along the polar factors ``x``, contiguous (B, R, C)."""
    state = bucket.momentum_buffers[0].dtype
    count, device, rows = len(bucket.parameters), x.device, shape.rows
    slices = count * shape.each
    normalizes = bucket.row_exp_avg_sqs is not None
    high, wide = tile(rows, shape.columns, TILE, TILE)
    of_tile = {"ROWS": high, "COLUMNS": wide}
    factors = squares = None
    if bucket.row_exp_avg_sqs is not None:
        factors, squares = torch.empty(2, slices * rows, dtype=state, device=device).unbind()
        table = Table([bucket.row_exp_avg_sqs])
        constants = {"STATE": DTYPES[state], **of_tile}
        of_rows = table.addresses, x, numbers, finite, factors, squares, shape.each, rows, shape.columns
        programs = slices * cdiv(rows, high)
        launch(_row_squares, programs, *of_rows, constants=constants, num_warps=warps(TILE))
    ratios, rates = torch.empty(2, slices, dtype=torch.float64, device=device).unbind()
    own = {"RECTIFIES": rectifies, "BLOCK": BLOCK}
    steps = Table([bucket.steps]).addresses
    of_slices = steps, numbers, factors, squares, ratios, rates, shape.each, rows, shape.columns
    launch(_rates, slices, *of_slices, constants=own, num_warps=2)
    table = Table([bucket.parameters])
    constants = {"PARAMETER": DTYPES[bucket.parameters[0].dtype], "STATE": DTYPES[state], "NORMALIZES": normalizes}
    constants |= {"ALIGNED": _aligned(table, bucket, shape.rows * shape.columns), **of_tile}
    arguments = table.addresses, x, numbers, finite, factors, ratios, rates, shape.each, rows, shape.columns
    programs = slices * cdiv(rows, high) * cdiv(shape.columns, wide)
    launch(_apply, programs, *arguments, constants=constants, num_warps=warps(TILE))


@triton.jit
def _row_squares(
    table,
    x,
    numbers,
    finite,
    factors,
    squares,
    each,
    rows,
    columns,
    STATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """q of some rows, v ← β₂v + (1 − β₂)q, and the factor 1/√max(v, ε) of each row."""
    programs = tl.cdiv(rows, ROWS)
    whole = tl.program_id(0) // programs
    row = (tl.program_id(0) % programs) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    place = x + (whole.to(tl.int64) * rows + row)[:, None] * columns
    total = tl.zeros((ROWS, COLUMNS), dtype=STATE)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        part = tl.load(place + column[None, :], mask=here[:, None] & (column < columns)[None, :], other=0.0)
        wide = widened(part, STATE)
        total += wide * wide
    square = mean_square(tl.sum(total, axis=1), columns, STATE)
    v_start = tl.load(table + whole // each).to(tl.pointer_type(STATE))
    v_place = v_start + (whole % each).to(tl.int64) * rows + row
    beta2 = tl.load(numbers + 4)
    v = tl.load(v_place, mask=here, other=0.0) * beta2.to(STATE) + square * (1.0 - beta2).to(STATE)
    tl.store(v_place, v, mask=moved(here, finite))
    eps = tl.load(numbers + 3).to(STATE)
    above = tl.where(v < eps, eps, v)
    at = whole.to(tl.int64) * rows + row
    tl.store(factors + at, quotient(tl.full((ROWS,), 1.0, STATE), root(above)), mask=here)
    tl.store(squares + at, square, mask=here)


@triton.jit
def mean_square(total, columns, STATE: tl.constexpr):
    """Σx²/C."""
    return quotient(total, tl.zeros_like(total) + columns).to(STATE)


@triton.jit
def _rates(
    steps,
    numbers,
    factors,
    squares,
    ratios,
    rates,
    each,
    rows,
    columns,
    RECTIFIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """‖X‖_F over max(‖Y‖_F, ε), Y the rows times their factors, and η times scale and rectification."""
    whole = tl.program_id(0)
    eps = tl.load(numbers + 3)
    if factors is not None:
        before = tl.zeros((BLOCK,), dtype=tl.float64)
        after = tl.zeros((BLOCK,), dtype=tl.float64)
        for start in range(0, rows, BLOCK):
            row = start + tl.arange(0, BLOCK)
            at = whole.to(tl.int64) * rows + row
            square = tl.load(squares + at, mask=row < rows, other=0.0).to(tl.float64)
            factor = tl.load(factors + at, mask=row < rows, other=0.0).to(tl.float64)
            before += square
            after += square * factor * factor
        length = tl.sqrt(tl.sum(after) * columns)
        tl.store(ratios + whole, tl.sqrt(tl.sum(before) * columns) / tl.where(length < eps, eps, length))
    rate = tl.load(numbers) * tl.load(numbers + 8)
    if RECTIFIES:
        step = tl.load(steps + whole // each).to(tl.pointer_type(tl.float64))
        t = tl.floor(tl.load(step) / tl.load(numbers + 7))
        rate = rate * rectification(t, tl.load(numbers + 4), tl.load(numbers + 5))
    tl.store(rates + whole, rate)


@triton.jit
def _apply(
    table,
    x,
    numbers,
    finite,
    factors,
    ratios,
    rates,
    each,
    rows,
    columns,
    PARAMETER: tl.constexpr,
    STATE: tl.constexpr,
    NORMALIZES: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """X at the size of its rows, cautious decay, and θ ← θ − rate·X."""
    tall, wide = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    whole = tl.program_id(0) // (tall * wide)
    row = (tl.program_id(0) // wide % tall) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % wide) * COLUMNS + tl.arange(0, COLUMNS)
    here = (row < rows)[:, None] & (column < columns)[None, :]
    places = row.to(tl.int64)[:, None] * columns + column[None, :]
    start = address(table, whole // each, 1, 0, PARAMETER, ALIGNED) + (whole % each).to(tl.int64) * rows * columns
    u = widened(tl.load(x + whole.to(tl.int64) * rows * columns + places, mask=here, other=0.0), STATE)
    w = widened(tl.load(start + places, mask=here, other=0.0), STATE)
    if NORMALIZES:
        factor = tl.load(factors + whole.to(tl.int64) * rows + row, mask=row < rows, other=0.0)
        u = u * (factor * tl.load(ratios + whole).to(STATE))[:, None]
    u = cautious_decay(u, w, tl.load(numbers + 1).to(STATE))
    w = w - u * tl.load(rates + whole).to(STATE)
    tl.store(start + places, narrowed(w, PARAMETER), mask=moved(here, finite))
