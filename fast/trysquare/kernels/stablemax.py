"""Cross-entropy of StableMax for class indices, named as in `ops.stablemax`; `stablemax_gradient` is its backward pass.

The logits are read once: each program adds up s over tiles of some positions (and Σ w·γ, if labels are smoothed), and a
small second launch makes of the sums the loss and log Σ s of each position. These few numbers are computed in float64,
so that what float32 loses is lost in the sums alone.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor
from triton import language as tl

from trysquare.kernels._arithmetic import widened
from trysquare.kernels._launch import cdiv, launch
from trysquare.kernels.stablemax_problem import (
    BLOCK,
    WARPS,
    Problem,
    ahead,
    at_ends,
    begins,
    chosen_logit,
    chosen_weight,
    damped,
    in_chunks,
    log_s,
    not_negative,
    tile_at,
    tile_constants,
    tile_of,
    weighted,
)

TILES = 8
"""Tiles that a program adds up, at most."""

PROGRAMS = 1 << 10
"""Where positions make fewer programs than these, a program adds up fewer tiles."""

HEADROOM = tl.constexpr(2.0**-32)
"""Of the part of s that grows: its sum does not overflow, whatever the logits are."""

LIFT = tl.constexpr(2.0**24)
"""Of the part of s that falls, which is 3e-39 at −3e38: no term is a subnormal number, which a GPU might take for 0."""

LOG_HEADROOM = tl.constexpr(math.log(2.0**-32))


def losses(problem: Problem) -> tuple[Tensor, Tensor]:
    """The loss of every position in the arithmetic's dtype and log Σ s in float64, both (N·d₁·…).

    A target that is neither a class nor `ignore_index` makes its loss NaN, and with it the gradient of its position:
    nothing outside the logits is read, and the host need not wait to see it.
    """
    x, places, target, weight, smoothing, _, dtype = problem
    positions, sums = target.numel(), _sums_of(problem)
    loss, normalizer = torch.empty_like(target, dtype=dtype), torch.empty_like(target, dtype=torch.float64)
    launch(
        _finish,
        cdiv(positions, BLOCK),
        *(x, target, weight, smoothing, places.table, sums, loss, normalizer),
        *(*problem.sizes, sums.shape[1]),
        constants={**problem.constants, "BLOCK": BLOCK},
    )
    return loss, normalizer


def _sums_of(problem: Problem) -> Tensor:
    """Σ of the falling and of the growing part of s, and with smoothing Σ w·γ: (2 or 3, parts of a row, positions)."""
    x, places, target, weight, smoothing, _, dtype = problem
    positions, classes = target.numel(), x.shape[1]
    height, width = tile_of(positions, classes, places.across)
    rows, columns = cdiv(positions, height), cdiv(classes, width)
    tiles = min(TILES, max(1, rows * columns // PROGRAMS))
    parts = max(1, cdiv(columns, tiles))
    sums = torch.empty((2 if smoothing is None else 3, parts, positions), dtype=dtype, device=x.device)
    launch(
        _sums,
        rows * parts,
        *(x, target, weight, places.table, sums),
        *(*problem.sizes, parts, tiles * width),
        constants={**problem.constants, **tile_constants(problem, height, width), "SMOOTHS": smoothing is not None},
        num_warps=WARPS,
    )
    return sums


@triton.jit
def _sums(
    x,
    target,
    weight,
    table,
    sums,
    positions,
    classes,
    stride,
    ignore_index,
    parts,
    part,
    DIMS: tl.constexpr,
    DTYPE: tl.constexpr,
    POSITIONS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CLASSES: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    SMOOTHS: tl.constexpr,
):
    program = tl.program_id(0)
    position = (program // parts).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    here = position < positions
    counted = here & (tl.load(target + position, mask=here, other=0) != ignore_index)
    offset = begins(position, table, DIMS)
    shift = ahead(x + offset, CHUNK)
    begin = tile_at(x, offset - shift, ALIGNED, CLASSES)
    shift = tl.expand_dims(shift, CLASSES)
    counted = tl.expand_dims(counted, CLASSES)
    if CLASSES == 1:
        below = tl.zeros((POSITIONS, COLUMNS), dtype=DTYPE)
    else:
        below = tl.zeros((COLUMNS, POSITIONS), dtype=DTYPE)
    above = below
    gammas = below
    first = (program % parts) * part
    for start in range(first, tl.minimum(first + part, classes), COLUMNS):
        column = tl.expand_dims(start + tl.arange(0, COLUMNS), 1 - CLASSES)
        is_class = in_chunks(column, shift, classes, CHUNK)
        inside = counted & is_class
        z = widened(tl.load(begin + column.to(tl.int64) * stride, mask=inside, other=float("-inf")), DTYPE)
        below += falls(z)
        above = with_growing(above, z)
        if SMOOTHS:
            gammas += weighted(log_s(z), weight, column - shift, inside, is_class)
    below, above, gammas = tl.sum(below, axis=CLASSES), tl.sum(above, axis=CLASSES), tl.sum(gammas, axis=CLASSES)
    if CHUNK > 1 and first == 0:
        column_at, is_end = at_ends(shift, classes, CHUNK)
        z_at = widened(tl.load(begin + column_at, mask=counted & is_end, other=float("-inf")), DTYPE)
        none = tl.zeros_like(z_at)  # an interpreted quotient of a constant becomes a tensor by it
        below += tl.sum(none + falls(z_at), axis=1)
        above += tl.sum(with_growing(none, z_at), axis=1)
        if SMOOTHS:
            gammas += tl.sum(weighted(log_s(z_at), weight, column_at - shift, counted & is_end, is_end), axis=1)
    place = sums + (program % parts).to(tl.int64) * positions + position
    along = parts * positions
    tl.store(place, below, mask=here)
    tl.store(place + along, above, mask=here)
    if SMOOTHS:
        tl.store(place + along + along, gammas, mask=here)


@triton.jit
def _finish(
    x,
    target,
    weight,
    smoothing,
    table,
    sums,
    losses,
    normalizers,
    positions,
    classes,
    stride,
    ignore_index,
    parts,
    DIMS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = position < positions
    y = tl.load(target + position, mask=here, other=0)
    counted = here & (y != ignore_index)
    chosen = counted & (y >= 0) & (y < classes)
    along = parts * positions
    below = tl.zeros((BLOCK,), dtype=tl.float64)
    above = tl.zeros((BLOCK,), dtype=tl.float64)
    gammas = tl.zeros((BLOCK,), dtype=tl.float64)
    for part in range(parts):
        place = sums + position + part * positions
        below += tl.load(place, mask=here, other=0.0).to(tl.float64)
        above += tl.load(place + along, mask=here, other=0.0).to(tl.float64)
        if smoothing is not None:
            gammas += tl.load(place + along + along, mask=here, other=0.0).to(tl.float64)
    normalizer = log_sum(below, above)
    w = chosen_weight(weight, y, chosen)
    surprise = not_negative(normalizer - log_s(chosen_logit(x, begins(position, table, DIMS), y, chosen, stride)))
    loss = tl.where(chosen & (w == 0), 0.0, w * surprise)
    if smoothing is not None:
        of_all = normalizer * tl.load(smoothing + 2) - gammas
        if weight is None:
            of_all = not_negative(of_all)
        loss = loss * (1.0 - tl.load(smoothing)) + of_all * tl.load(smoothing + 1)
    loss = tl.where(counted, loss, 0.0)
    tl.store(losses + position, loss.to(DTYPE), mask=here)
    tl.store(normalizers + position, normalizer, mask=here)


@triton.jit
def with_growing(total, x):
    """total + max(x, 0), which is scaled by the headroom."""
    return tl.fma(tl.maximum(x, 0.0), HEADROOM, total)


@triton.jit
def falls(x):
    """1/(1 − min(x, 0)), scaled by the lift; NaN for NaN, 0 for −∞."""
    return damped(LIFT, tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def log_sum(below, above):
    """log Σ s from the sums of both parts; of infinite ones NaN, as in softmax."""
    total = below / LIFT + above / HEADROOM
    huge = tl.where(above < float("inf"), tl.log(above) - LOG_HEADROOM, float("nan"))  # float64 alone overflows
    return tl.where(total < float("inf"), tl.log(total), tl.where(total == float("inf"), huge, total))
