"""The gradient of StableMax's cross-entropy for class indices, named as in `ops.stablemax`.

A small launch makes the factors of each position, in float64; then the logits are read once more and the gradient is
written once.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton import language as tl

from trysquare.kernels._arithmetic import narrowed, widened
from trysquare.kernels._launch import ALIGNMENT, DTYPES, cdiv, launch
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
    places_of,
    tile_at,
    tile_constants,
    tile_of,
    weighted,
)


def gradient(problem: Problem, normalizer: Tensor, g: Tensor) -> Tensor:
    """∂/∂x of Σ g·ℓ, in the dtype and layout of x; g is (N·d₁·…), of any stride, in the arithmetic's dtype."""
    x, places, target, weight, smoothing, _, dtype = problem
    positions, classes = target.numel(), x.shape[1]
    factors = torch.empty((3, positions), dtype=dtype, device=x.device)
    launch(
        _factors,
        cdiv(positions, BLOCK),
        *(x, target, weight, smoothing, places.table, normalizer, g, factors),
        *(*problem.sizes, g.stride(0)),
        constants={**problem.constants, "BLOCK": BLOCK},
    )
    output = torch.empty_like(x)
    to = places_of(output)
    height, width = tile_of(positions, classes, places.across)
    launch(
        _gradient,
        cdiv(positions, height) * cdiv(classes, width),
        *(x, target, weight, places.table, factors, output, to.table),
        *(*problem.sizes, to.stride, cdiv(classes, width)),
        constants={
            **problem.constants,
            **tile_constants(problem, height, width),
            "SMOOTHS": smoothing is not None,
            "TO_DIMS": to.dims,
            "TO_ALIGNED": to.aligned if problem.chunk == 1 else _alike(x, output),
            "TO": DTYPES[output.dtype],
        },
        num_warps=WARPS,
    )
    return output


def _alike(x: Tensor, output: Tensor) -> bool:
    """Whether rows of both begin equally far behind a multiple of 16 bytes."""
    return x.stride() == output.stride() and (x.data_ptr() - output.data_ptr()) % ALIGNMENT == 0


@triton.jit
def _factors(
    x,
    target,
    weight,
    smoothing,
    table,
    normalizers,
    g,
    factors,
    positions,
    classes,
    stride,
    ignore_index,
    g_stride,
    DIMS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of every position: the gradient at the chosen class, and the factors of s′ and of w·γ′ elsewhere."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = position < positions
    y = tl.load(target + position, mask=here, other=0)
    counted = here & (y != ignore_index)
    chosen = counted & (y >= 0) & (y < classes)
    normalizer = tl.load(normalizers + position, mask=here, other=0.0)
    factor = tl.load(g + position * g_stride, mask=counted, other=0.0).to(tl.float64)
    x_y = chosen_logit(x, begins(position, table, DIMS), y, chosen, stride)
    w = chosen_weight(weight, y, chosen)
    log_p = -not_negative(normalizer - log_s(x_y))
    error = expm1(log_p) * w
    total = w
    place = factors + position
    if smoothing is not None:
        rest = 1.0 - tl.load(smoothing)
        uniform = tl.load(smoothing + 1)
        w_sum = tl.load(smoothing + 2)
        error = error * rest + (tl.exp(log_p) * w_sum - w) * uniform
        total = rest * w + uniform * w_sum
        tl.store(place + positions + positions, (uniform * factor).to(DTYPE), mask=here)
    at_y = error / (1.0 + tl.abs(x_y)) * factor
    scale = factor * tl.exp(-normalizer) * total
    scale = tl.where(chosen, scale, float("nan"))
    tl.store(place, tl.where(counted, at_y, 0.0).to(DTYPE), mask=here)
    tl.store(place + positions, tl.where(counted, scale, 0.0).to(DTYPE), mask=here)


@triton.jit
def _gradient(
    x,
    target,
    weight,
    table,
    factors,
    output,
    to_table,
    positions,
    classes,
    stride,
    ignore_index,
    to_stride,
    parts,
    DIMS: tl.constexpr,
    DTYPE: tl.constexpr,
    POSITIONS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CLASSES: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    SMOOTHS: tl.constexpr,
    TO_DIMS: tl.constexpr,
    TO_ALIGNED: tl.constexpr,
    TO: tl.constexpr,
):
    program = tl.program_id(0)
    position = (program // parts).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    here = position < positions
    y = tl.load(target + position, mask=here, other=0)
    at_y = tl.expand_dims(tl.load(factors + position, mask=here, other=0.0), CLASSES)
    scale = tl.expand_dims(tl.load(factors + position + positions, mask=here, other=0.0), CLASSES)
    lift = scale
    if SMOOTHS:
        lift = tl.expand_dims(tl.load(factors + position + positions + positions, mask=here, other=0.0), CLASSES)
    offset = begins(position, table, DIMS)
    shift = ahead(x + offset, CHUNK)
    begin = tile_at(x, offset - shift, ALIGNED, CLASSES)
    to_begin = tile_at(output, begins(position, to_table, TO_DIMS) - shift * to_stride, TO_ALIGNED, CLASSES)
    shift = tl.expand_dims(shift, CLASSES)
    column = tl.expand_dims(program % parts * COLUMNS + tl.arange(0, COLUMNS), 1 - CLASSES)
    is_class = in_chunks(column, shift, classes, CHUNK)
    counted = tl.expand_dims(here & (y != ignore_index), CLASSES)
    z = widened(tl.load(begin + column.to(tl.int64) * stride, mask=counted & is_class, other=0.0), DTYPE)
    here = tl.expand_dims(here, CLASSES)
    y = tl.expand_dims(y.to(tl.int32), CLASSES) + shift
    value = gradient_at(z, column, shift, y, at_y, scale, lift, weight, counted & is_class, is_class, SMOOTHS)
    tl.store(to_begin + column.to(tl.int64) * to_stride, narrowed(value, TO), mask=here & is_class)
    if CHUNK > 1 and program % parts == 0:
        column_at, is_end = at_ends(shift, classes, CHUNK)
        z_at = widened(tl.load(begin + column_at, mask=counted & is_end, other=0.0), DTYPE)
        value_at = gradient_at(z_at, column_at, shift, y, at_y, scale, lift, weight, counted & is_end, is_end, SMOOTHS)
        tl.store(to_begin + column_at.to(tl.int64) * to_stride, narrowed(value_at, TO), mask=here & is_end)


@triton.jit
def gradient_at(z, column, shift, y, at_y, scale, lift, weight, inside, is_class, SMOOTHS: tl.constexpr):
    """The gradient at classes of these logits; a target that is no class has made the factors NaN."""
    slope = log_s_slope(z)
    value = s_slope(z, slope, scale)
    if SMOOTHS:
        value -= weighted(slope * lift, weight, column - shift, inside, is_class)
    return tl.where(column == y, at_y, value)


@triton.jit
def expm1(x):
    """exp x − 1 with all digits, for x ≤ 0, float64 (Kahan's way)."""
    u = tl.exp(x)
    near = (u > 0.5) & (u < 1)
    exact = (u - 1.0) * (x / tl.log(tl.where(near, u, 0.5)))
    return tl.where(near, exact, tl.where(u == 1, x, u - 1.0))


@triton.jit
def log_s_slope(x):
    """γ′."""
    return damped(1.0, x)


@triton.jit
def s_slope(x, slope, scale):
    """s′·scale, from γ′; scaled before it is squared, which is 1e-77 at −3e38."""
    return tl.where(x > 0, scale, slope * scale * slope)
