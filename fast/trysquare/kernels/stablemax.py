"""Cross-entropy of StableMax for class indices, named as in `ops.stablemax`.

Forward, the logits are read once: each program adds up s over tiles of some positions (and Σ w·γ, if labels are
smoothed), and a small second launch makes of the sums the loss and log Σ s of each position. Backward, a small launch
makes the factors of each position, then the logits are read once more and the gradient is written once. Between the two
passes there are a few numbers for each position; these are computed in float64, so that what float32 loses is lost in
the sums alone.

Logits (N, C, d₁, …) may have any strides: a table on the device says where each position begins. Logits of ignored
positions are not read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl

from trysquare.kernels._arithmetic import narrowed, widened
from trysquare.kernels._launch import ALIGNMENT, DTYPES, floats, integers, launch

TILE = 1 << 12
"""Logits that a program holds at a time."""

TILES = 8
"""Tiles that a program adds up, at most."""

PROGRAMS = 1 << 10
"""Where positions make fewer programs than these, a program adds up fewer tiles."""

ACROSS = 32
"""Classes of a tile whose neighbours in memory are positions."""

WARPS = 8
"""Of a program that holds a tile: 16 logits a thread."""

BLOCK = 128
"""Positions of a program that only has some numbers for each."""

HEADROOM = tl.constexpr(2.0**-32)
"""Of the part of s that grows: its sum does not overflow, whatever the logits are."""

LIFT = tl.constexpr(2.0**24)
"""Of the part of s that falls, which is 3e-39 at −3e38: no term is a subnormal number, which a GPU might take for 0."""

LOG_HEADROOM = tl.constexpr(math.log(2.0**-32))


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
    all_positions, all_classes = (int(triton.next_power_of_2(max(1, n))) for n in (positions, classes))
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
        triton.cdiv(positions, BLOCK),
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
    rows, columns = triton.cdiv(positions, height), triton.cdiv(classes, width)
    tiles = min(TILES, max(1, rows * columns // PROGRAMS))
    parts = max(1, triton.cdiv(columns, tiles))
    sums = torch.empty((2 if smoothing is None else 3, parts, positions), dtype=dtype, device=x.device)
    launch(
        _sums,
        rows * parts,
        *(x, target, weight, places.table, sums),
        *(*problem.sizes, parts, tiles * width),
        constants={**problem.constants, **_tile(problem, height, width), "SMOOTHS": smoothing is not None},
        num_warps=WARPS,
    )
    return sums


def gradient(problem: Problem, normalizer: Tensor, g: Tensor) -> Tensor:
    """∂/∂x of Σ g·ℓ, in the dtype and layout of x; g is (N·d₁·…), of any stride, in the arithmetic's dtype."""
    x, places, target, weight, smoothing, _, dtype = problem
    positions, classes = target.numel(), x.shape[1]
    factors = torch.empty((3, positions), dtype=dtype, device=x.device)
    launch(
        _factors,
        triton.cdiv(positions, BLOCK),
        *(x, target, weight, smoothing, places.table, normalizer, g, factors),
        *(*problem.sizes, g.stride(0)),
        constants={**problem.constants, "BLOCK": BLOCK},
    )
    output = torch.empty_like(x)
    to = places_of(output)
    height, width = tile_of(positions, classes, places.across)
    launch(
        _gradient,
        triton.cdiv(positions, height) * triton.cdiv(classes, width),
        *(x, target, weight, places.table, factors, output, to.table),
        *(*problem.sizes, to.stride, triton.cdiv(classes, width)),
        constants={
            **problem.constants,
            **_tile(problem, height, width),
            "SMOOTHS": smoothing is not None,
            "TO_DIMS": to.dims,
            "TO_ALIGNED": to.aligned,
            "TO": DTYPES[output.dtype],
        },
        num_warps=WARPS,
    )
    return output


def _tile(problem: Problem, height: int, width: int) -> dict[str, object]:
    """What a kernel is told of its tiles; dimension CLASSES of them has the classes, the last one is fastest."""
    across, aligned = problem.places.across, problem.places.aligned
    return {"POSITIONS": height, "COLUMNS": width, "CLASSES": 0 if across else 1, "ALIGNED": aligned}


# The function, and what is made of it


@triton.jit
def with_growing(total, x):
    """total + max(x, 0), which is scaled by the headroom."""
    return tl.fma(tl.maximum(x, 0.0), HEADROOM, total)


@triton.jit
def damped(a: tl.constexpr, x):
    """a/(1 + |x|) by a GPU's quick quotient; by quarters its reciprocals are no subnormal numbers either."""
    return (0.25 * a) / (0.25 + 0.25 * tl.abs(x))


@triton.jit
def falls(x):
    """1/(1 − min(x, 0)), scaled by the lift; NaN for NaN, 0 for −∞."""
    return damped(LIFT, tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def log_s(x):
    """γ."""
    y = tl.log(1.0 + tl.abs(x))
    return tl.where(x < 0, -y, y)


@triton.jit
def log_sum(below, above):
    """log Σ s from the sums of both parts; of infinite ones NaN, as in softmax."""
    total = below / LIFT + above / HEADROOM
    huge = tl.where(above < float("inf"), tl.log(above) - LOG_HEADROOM, float("nan"))  # float64 alone overflows
    return tl.where(total < float("inf"), tl.log(total), tl.where(total == float("inf"), huge, total))


@triton.jit
def not_negative(x):
    """max(x, 0), but NaN for NaN."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def expm1(x):
    """exp x − 1 with all digits, for x ≤ 0, float64 (Kahan's way)."""
    u = tl.exp(x)
    near = (u > 0.5) & (u < 1)
    exact = (u - 1.0) * (x / tl.log(tl.where(near, u, 0.5)))
    return tl.where(near, exact, tl.where(u == 1, x, u - 1.0))


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


# Forward


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
    SMOOTHS: tl.constexpr,
):
    program = tl.program_id(0)
    position = (program // parts).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    here = position < positions
    counted = here & (tl.load(target + position, mask=here, other=0) != ignore_index)
    begin = x + begins(position, table, DIMS)
    if ALIGNED:
        begin = tl.multiple_of(begin, 16)
    begin = tl.expand_dims(begin, CLASSES)
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
        inside = counted & (column < classes)
        z = widened(tl.load(begin + column.to(tl.int64) * stride, mask=inside, other=float("-inf")), DTYPE)
        below += falls(z)
        above = with_growing(above, z)
        if SMOOTHS:
            gammas += weighted(log_s(z), weight, column, inside, column < classes)
    place = sums + (program % parts).to(tl.int64) * positions + position
    along = parts * positions
    tl.store(place, tl.sum(below, axis=CLASSES), mask=here)
    tl.store(place + along, tl.sum(above, axis=CLASSES), mask=here)
    if SMOOTHS:
        tl.store(place + along + along, tl.sum(gammas, axis=CLASSES), mask=here)


@triton.jit
def weighted(values, weight, column, inside, is_class):
    """The values times w; a class of weight 0 counts nothing, not even γ = −∞."""
    if weight is None:
        terms = values
    else:
        w = widened(tl.load(weight + column, mask=is_class, other=0.0), values.dtype)
        terms = tl.where(w == 0, 0.0, w * values)
    return tl.where(inside, terms, 0.0)


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


# Backward


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
def log_s_slope(x):
    """γ′."""
    return damped(1.0, x)


@triton.jit
def s_slope(x, slope, scale):
    """s′·scale, from γ′; scaled before it is squared, which is 1e-77 at −3e38."""
    return tl.where(x > 0, scale, slope * scale * slope)


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
    begin = x + begins(position, table, DIMS)
    if ALIGNED:
        begin = tl.multiple_of(begin, 16)
    to_begin = output + begins(position, to_table, TO_DIMS)
    if TO_ALIGNED:
        to_begin = tl.multiple_of(to_begin, 16)
    column = tl.expand_dims(program % parts * COLUMNS + tl.arange(0, COLUMNS), 1 - CLASSES)
    is_class = column < classes
    inside = tl.expand_dims(here & (y != ignore_index), CLASSES) & is_class
    offset = column.to(tl.int64)
    z = widened(tl.load(tl.expand_dims(begin, CLASSES) + offset * stride, mask=inside, other=0.0), DTYPE)
    slope = log_s_slope(z)
    value = s_slope(z, slope, scale)
    if SMOOTHS:
        lift = tl.load(factors + position + positions + positions, mask=here, other=0.0)
        value -= weighted(slope * tl.expand_dims(lift, CLASSES), weight, column, inside, is_class)
    value = tl.where(column == tl.expand_dims(y.to(tl.int32), CLASSES), at_y, value)  # an index outside makes all NaN
    written = tl.expand_dims(here, CLASSES) & is_class
    tl.store(tl.expand_dims(to_begin, CLASSES) + offset * to_stride, narrowed(value, TO), mask=written)
