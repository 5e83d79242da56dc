"""One step of DolphinFlow on all tensors of one shape, in one launch where a row fits on chip; see `ops.dolphinflow`.

A row of weights and gradients is read once, its products are formed, and the update follows while both are in
registers. Longer rows are read twice: first for their products, by several programs a row, then for the update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl

from trysquare.kernels import moments, projection
from trysquare.kernels._arithmetic import address, clipped, moved, narrowed, quotient, widened
from trysquare.kernels._launch import DTYPES, Table, cdiv, floats, launch, tile, warps
from trysquare.kernels.moments import correction, denominator, second_moment
from trysquare.kernels.polar import Products
from trysquare.kernels.projection import coefficient, subtract
from trysquare.ops import polar
from trysquare.ops.dolphinflow import Rule

ON_CHIP = 8192
"""Columns up to which a program holds whole rows of float32 numbers."""

TILE = 1024
"""Elements of a program that holds several short rows, or a part of a long one."""


class Bucket(NamedTuple):
    """Parallel lists of contiguous tensors of one shape and dtype, and the state of each."""

    parameters: Sequence[Tensor]
    gradients: Sequence[Tensor]
    momentum_buffers: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor] | None
    steps: Sequence[Tensor]
    updates: Sequence[Tensor] | None = None
    """What parameters move along if that was computed elsewhere (matrix mode); the momentum is up to date then."""


def numbers_of(device: torch.device, *values: float | Tensor) -> Tensor:
    """η, λ, μ, ε and β₂ on the device, and log₂ β₂ behind them."""
    beta2 = float(values[-1])
    return floats(device, *values, math.log2(beta2) if beta2 > 0 else -math.inf)


def step_(
    bucket: Bucket,
    shape: tuple[int, int],
    numbers: Tensor,
    scale: Tensor | None,
    finite: Tensor | None,
    rule: Rule,
    eps: float,
) -> None:
    """Step every member in place, the steps of which are counted already; ``gradients`` are only read.

    Args:
        bucket: What is stepped.
        shape: Rows and columns of each member.
        numbers: As `numbers_of` makes them.
        scale: The clipping factor, 0-dim; None: 1.
        finite: Where it is false nothing is written; 0-dim, None: true.
        rule: What selects a formula.
        eps: ε once more, for the matrix mode.
    """
    if rule.ortho_mode != "matrix":
        whole = shape if rule.ortho_mode == "vector" else (1, shape[0] * shape[1])
        update_(bucket, whole, numbers, scale, finite, rule)
        return
    first = bucket.momentum_buffers[0]
    u = torch.empty(len(bucket.parameters), *shape, dtype=first.dtype, device=first.device)
    moments.nesterov_(bucket.momentum_buffers, bucket.gradients, list(u.unbind()), numbers[2:3], scale, finite)
    products = Products(min(shape), u.dtype, u.device)
    u = polar.newton_schulz(u, rule.ns_steps, eps, products=products).contiguous()
    update_(bucket._replace(updates=list(u.unbind())), (1, shape[0] * shape[1]), numbers, scale, finite, rule)


def update_(
    bucket: Bucket, shape: tuple[int, int], numbers: Tensor, scale: Tensor | None, finite: Tensor | None, rule: Rule
) -> None:
    """The same as one pass, or two where rows are long; one row where there is nothing to project."""
    rows, columns = shape
    projects = rule.ortho_mode == "vector"
    table = Table([list(tensors) for tensors in _operands(bucket)])
    constants = {**_constants(bucket, rule), "ALIGNED": table.aligned}
    count = len(bucket.parameters)
    on_chip = ON_CHIP * 4 // bucket.momentum_buffers[0].element_size()
    if projects and columns <= on_chip:
        height, block = tile(rows, columns, TILE, on_chip)
        programs = count * cdiv(rows, height)
        arguments = table.addresses, numbers, scale, finite, count, rows, columns
        del constants["GIVEN"]
        constants |= {**projection.BOUNDS, "ROWS": height, "COLUMNS": block}
        launch(_update_rows, programs, *arguments, constants=constants, num_warps=warps(height * block))
        return
    coefficients = None
    if projects:
        kinds = {name: constants[name] for name in ("PARAMETER", "STATE", "PROJECTS")}
        empty = torch.empty(count, rows, dtype=bucket.momentum_buffers[0].dtype, device=numbers.device)
        coefficients = projection.row_coefficients_(empty, table, columns, numbers, scale, kinds)
    programs = count * rows * cdiv(columns, TILE)
    of_parts = table.addresses, numbers, scale, finite, coefficients, count, rows, columns
    launch(_update_parts, programs, *of_parts, constants=constants | {"COLUMNS": TILE}, num_warps=warps(TILE))


def _operands(bucket: Bucket) -> list[Sequence[Tensor]]:
    """The rows of the table; where there is no second moment or update, the momentum stands in and is not touched."""
    spare = bucket.momentum_buffers
    return [
        bucket.parameters,
        bucket.gradients,
        bucket.momentum_buffers,
        spare if bucket.exp_avg_sqs is None else bucket.exp_avg_sqs,
        bucket.steps,
        spare if bucket.updates is None else bucket.updates,
    ]


def _constants(bucket: Bucket, rule: Rule) -> dict[str, object]:
    return {
        "PARAMETER": DTYPES[bucket.parameters[0].dtype],
        "STATE": DTYPES[bucket.momentum_buffers[0].dtype],
        "PROJECTS": rule.project if rule.ortho_mode == "vector" else "nothing",
        "ADAPTIVE": bucket.exp_avg_sqs is not None,
        "CORRECTED": rule.bias_correction,
        "GIVEN": bucket.updates is not None,
    }


@triton.jit
def _update_rows(
    table,
    numbers,
    scale,
    finite,
    count,
    rows,
    columns,
    PARAMETER: tl.constexpr,
    STATE: tl.constexpr,
    PROJECTS: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    CORRECTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some whole rows."""
    programs = tl.cdiv(rows, ROWS)
    member = tl.program_id(0) // programs
    row = (tl.program_id(0) % programs) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    here = (row < rows) & (column < columns)
    places = row.to(tl.int64) * columns + column
    w_place = address(table, member, count, 0, PARAMETER, ALIGNED) + places
    g_place = address(table, member, count, 1, PARAMETER, ALIGNED) + places
    m_place = address(table, member, count, 2, STATE, ALIGNED) + places
    w = widened(tl.load(w_place, mask=here, other=0.0), STATE)
    g = clipped(tl.load(g_place, mask=here, other=0.0), scale, STATE)
    mu, eps = tl.load(numbers + 2).to(STATE), tl.load(numbers + 3).to(STATE)
    written = moved(here, finite)
    if PROJECTS == "gradient":
        along, square = tl.sum(w * g, axis=1, keep_dims=True), tl.sum(w * w, axis=1, keep_dims=True)
        g = subtract(g, w, coefficient(along, square, eps, PROJECTS, SMALLEST, LARGEST))
    m = tl.load(m_place, mask=here, other=0.0) * mu + g
    tl.store(m_place, m, mask=written)
    u = g + m * mu
    if PROJECTS == "update":
        along, square = tl.sum(w * u, axis=1, keep_dims=True), tl.sum(w * w, axis=1, keep_dims=True)
        u = subtract(u, w, coefficient(along, square, eps, PROJECTS, SMALLEST, LARGEST))
    if ADAPTIVE:
        v_place = address(table, member, count, 3, STATE, ALIGNED) + places
        step = address(table, member, count, 4, tl.float64, False)
        u = _adapted(u, g, v_place, step, numbers, eps, here, written, STATE, CORRECTED)
    tl.store(w_place, narrowed(_moved(w, u, numbers, STATE), PARAMETER), mask=written)


@triton.jit
def _update_parts(
    table,
    numbers,
    scale,
    finite,
    coefficients,
    count,
    rows,
    columns,
    PARAMETER: tl.constexpr,
    STATE: tl.constexpr,
    PROJECTS: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    CORRECTED: tl.constexpr,
    GIVEN: tl.constexpr,
    ALIGNED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A part of a row, whose coefficient is known if it has one."""
    parts = tl.cdiv(columns, COLUMNS)
    row = tl.program_id(0) // parts
    member = row // rows
    column = (tl.program_id(0) % parts).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    here = column < columns
    places = (row % rows).to(tl.int64) * columns + column
    w_place = address(table, member, count, 0, PARAMETER, ALIGNED) + places
    g_place = address(table, member, count, 1, PARAMETER, ALIGNED) + places
    m_place = address(table, member, count, 2, STATE, ALIGNED) + places
    w = widened(tl.load(w_place, mask=here, other=0.0), STATE)
    g = clipped(tl.load(g_place, mask=here, other=0.0), scale, STATE)
    mu, eps = tl.load(numbers + 2).to(STATE), tl.load(numbers + 3).to(STATE)
    written = moved(here, finite)
    if PROJECTS == "gradient":
        g = subtract(g, w, tl.load(coefficients + row))
    if GIVEN:
        u = tl.load(address(table, member, count, 5, STATE, ALIGNED) + places, mask=here, other=0.0)
    else:
        m = tl.load(m_place, mask=here, other=0.0) * mu + g
        tl.store(m_place, m, mask=written)
        u = g + m * mu
    if PROJECTS == "update":
        u = subtract(u, w, tl.load(coefficients + row))
    if ADAPTIVE:
        v_place = address(table, member, count, 3, STATE, ALIGNED) + places
        step = address(table, member, count, 4, tl.float64, False)
        u = _adapted(u, g, v_place, step, numbers, eps, here, written, STATE, CORRECTED)
    tl.store(w_place, narrowed(_moved(w, u, numbers, STATE), PARAMETER), mask=written)


@triton.jit
def _adapted(u, g, v_place, step, numbers, eps, here, written, STATE: tl.constexpr, CORRECTED: tl.constexpr):
    """v ← β₂·v + (1 − β₂)·g²; u/(√v̂ + ε)."""
    beta2 = tl.load(numbers + 4)
    v = second_moment(tl.load(v_place, mask=here, other=0.0), g, beta2.to(STATE), (1.0 - beta2).to(STATE))
    tl.store(v_place, v, mask=written)
    if CORRECTED:
        below = denominator(v, eps, correction(step, tl.load(numbers + 5), STATE))
    else:
        below = denominator(v, eps, None)
    return quotient(u, below)


@triton.jit
def _moved(w, u, numbers, STATE: tl.constexpr):
    """θ·(1 − ηλ) − η·u."""
    lr = tl.load(numbers)
    return w * (1.0 - lr * tl.load(numbers + 1)).to(STATE) - u * lr.to(STATE)
