"""Schedule-free Adam, and Adam with cautious decay, on all tensors of one shape; see `ops.thorn`.

A tiny launch first brings the counters of every member up to date and leaves the numbers of its step; then one launch
reads every element once. Gradient release has two more phases of it: "collect" adds the update to a sum and moves
nothing, "spend" moves along that sum and empties it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl

from trysquare.kernels._arithmetic import address, moved, narrowed, quotient, widened
from trysquare.kernels._launch import DTYPES, Table, cdiv, launch, warps
from trysquare.kernels.decay import cautious_decay
from trysquare.kernels.moments import denominator, second_moment
from trysquare.kernels.rectification import rectification

TILE = 1024
"""Elements of a program."""

BLOCK = 256
"""Members of a program of the launch that only counts."""

Phase = Literal["step", "collect", "spend"]


class Counters(NamedTuple):
    """0-dim float64 tensors, one a member."""

    steps: Sequence[Tensor]
    lr_maxs: Sequence[Tensor] | None
    weight_sums: Sequence[Tensor] | None


class Bucket(NamedTuple):
    """Parallel lists of contiguous tensors of one shape."""

    parameters: Sequence[Tensor]
    gradients: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    zs: Sequence[Tensor] | None
    """z of schedule-free members; None: they are Adam's."""
    exp_avgs: Sequence[Tensor] | None
    """m of Adam's members."""
    ys: Sequence[Tensor] | None
    """Exact values of half-precision parameters; None: parameters are exact."""
    xs: Sequence[Tensor] | None
    """Means where they do not follow from y and z."""
    update_sums: Sequence[Tensor] | None
    """S of gradient release."""


def weigh_(counters: Counters, numbers: Tensor, finite: Tensor | None, *, moves: bool, rectifies: bool) -> Tensor:
    """Rate, share, pull, 1/√(1 − β₂ᵗ) and 1/(1 − β₁ᵗ) of every member, (5, members) in float64.

    Where members have a mean and ``moves``, the largest rate and the sum of weights are brought up to date, unless
    ``finite`` is false.
    """
    count, device = len(counters.steps), numbers.device
    found = torch.empty(5, count, dtype=torch.float64, device=device)
    counts = moves and counters.lr_maxs is not None
    table = Table([counters.steps, counters.lr_maxs or counters.steps, counters.weight_sums or counters.steps])
    constants = {"COUNTS": counts, "RECTIFIES": rectifies, "BLOCK": BLOCK}
    launch(
        *(_weigh, cdiv(count, BLOCK), table.addresses, numbers, finite, found, count),
        constants=constants,
        num_warps=2,
    )
    return found


@triton.jit
def _weigh(
    table, numbers, finite, found, count, COUNTS: tl.constexpr, RECTIFIES: tl.constexpr, BLOCK: tl.constexpr
):
    member = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = member < count
    step = tl.load(table + member, mask=here, other=0).to(tl.pointer_type(tl.float64))
    t = tl.load(step, mask=here, other=1.0)
    rate = tl.load(numbers) + t * 0.0
    if RECTIFIES:
        rate = rate * rectification(t, tl.load(numbers + 4), tl.load(numbers + 5))
    tl.store(found + member, rate, mask=here)
    tl.store(found + 3 * count + member, 1.0 / tl.sqrt(1.0 - tl.exp2(t * tl.load(numbers + 5))), mask=here)
    tl.store(found + 4 * count + member, 1.0 / (1.0 - tl.exp2(t * tl.load(numbers + 6))), mask=here)
    if COUNTS:
        max_place = tl.load(table + count + member, mask=here, other=0).to(tl.pointer_type(tl.float64))
        sum_place = tl.load(table + 2 * count + member, mask=here, other=0).to(tl.pointer_type(tl.float64))
        highest = tl.maximum(tl.load(max_place, mask=here, other=0.0), rate)
        weight = highest * highest
        total = tl.load(sum_place, mask=here, other=0.0) + weight
        share = tl.where(total > 0.0, weight / tl.where(total > 0.0, total, 1.0), 0.0)
        tl.store(max_place, highest, mask=moved(here, finite))
        tl.store(sum_place, total, mask=moved(here, finite))
        tl.store(found + count + member, share, mask=here)
        tl.store(found + 2 * count + member, rate * (tl.load(numbers + 2) * (1.0 - share) - 1.0), mask=here)


def step_(bucket: Bucket, found: Tensor, numbers: Tensor, finite: Tensor | None, phase: Phase) -> None:
    """One phase of every member in place; ``found`` is `weigh_`'s for these members, (5, members)."""
    first, count = bucket.exp_avg_sqs[0], len(bucket.parameters)
    table = Table([list(tensors) for tensors in _operands(bucket)])
    constants = {
        "PARAMETER": DTYPES[bucket.parameters[0].dtype],
        "STATE": DTYPES[first.dtype],
        "PHASE": phase,
        "AVERAGES": bucket.zs is not None,
        "EXACT": bucket.ys is not None,
        "MEAN": bucket.xs is not None,
        "ALIGNED": table.aligned,
        "TILE": TILE,
    }
    parts = cdiv(first.numel(), TILE)
    arguments = table.addresses, found, numbers, finite, count, first.numel(), parts
    launch(_step, count * parts, *arguments, constants=constants, num_warps=warps(TILE))


def _operands(bucket: Bucket) -> list[Sequence[Tensor]]:
    """The rows of the table; the second moment stands in for what there is none of, and is not touched for it."""
    moments = bucket.exp_avg_sqs
    own = bucket.zs or bucket.exp_avgs or moments
    optional = (bucket.ys, bucket.xs, bucket.update_sums)
    return [bucket.parameters, bucket.gradients, moments, own, *(tensors or moments for tensors in optional)]


@triton.jit
def _step(
    table,
    found,
    numbers,
    finite,
    count,
    elements,
    parts,
    PARAMETER: tl.constexpr,
    STATE: tl.constexpr,
    PHASE: tl.constexpr,
    AVERAGES: tl.constexpr,
    EXACT: tl.constexpr,
    MEAN: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    member = tl.program_id(0) // parts
    places = (tl.program_id(0) % parts).to(tl.int64) * TILE + tl.arange(0, TILE)
    here = places < elements
    written = moved(here, finite)
    own_place = address(table, member, count, 3, STATE, ALIGNED) + places
    sum_place = address(table, member, count, 6, STATE, ALIGNED) + places
    if PHASE == "spend":
        u = tl.load(sum_place, mask=here, other=0.0)
        tl.store(sum_place, tl.zeros_like(u), mask=written)
    else:
        g_place = address(table, member, count, 1, PARAMETER, ALIGNED) + places
        g = widened(tl.load(g_place, mask=here, other=0.0), STATE)
        v_place = address(table, member, count, 2, STATE, ALIGNED) + places
        u = _update(g, v_place, own_place, found + member, count, numbers, here, written, STATE, AVERAGES)
    if PHASE == "collect":
        part = (1.0 / tl.load(numbers + 7)).to(STATE)
        tl.store(sum_place, tl.load(sum_place, mask=here, other=0.0) + u * part, mask=written)
    else:
        w_place = address(table, member, count, 0, PARAMETER, ALIGNED) + places
        exact_place = address(table, member, count, 4, STATE, ALIGNED) + places
        if EXACT:
            y = tl.load(exact_place, mask=here, other=0.0)
        else:
            y = widened(tl.load(w_place, mask=here, other=0.0), STATE)
        u = cautious_decay(u, y, tl.load(numbers + 1).to(STATE))
        rate = tl.load(found + member).to(STATE)
        if AVERAGES:
            share, pull = tl.load(found + count + member).to(STATE), tl.load(found + 2 * count + member).to(STATE)
            z = tl.load(own_place, mask=here, other=0.0)
            y = followed(y, z, u, share, pull)
            z = z - u * rate
            tl.store(own_place, z, mask=written)
            if MEAN:
                x_place = address(table, member, count, 5, STATE, ALIGNED) + places
                x = tl.load(x_place, mask=here, other=0.0)
                tl.store(x_place, x + (z - x) * share, mask=written)
        else:
            y = y - u * rate
        if EXACT:
            tl.store(exact_place, y, mask=written)
        tl.store(w_place, narrowed(y, PARAMETER), mask=written)


@triton.jit
def followed(y, z, u, share, pull):
    """y + c·(z − y) + pull·u, with z from before its step."""
    return y + (z - y) * share + u * pull


@triton.jit
def _update(
    g, v_place, m_place, corrections, count, numbers, here, written, STATE: tl.constexpr, AVERAGES: tl.constexpr
):
    """v, and m if there is one, take up the gradient; u = g/(√v̂ + ε), or m̂ instead of g."""
    beta2 = tl.load(numbers + 4)
    v = second_moment(tl.load(v_place, mask=here, other=0.0), g, beta2.to(STATE), (1.0 - beta2).to(STATE))
    tl.store(v_place, v, mask=written)
    above = g
    if not AVERAGES:
        beta1 = tl.load(numbers + 2)
        above = tl.load(m_place, mask=here, other=0.0) * beta1.to(STATE) + g * (1.0 - beta1).to(STATE)
        tl.store(m_place, above, mask=written)
        above = above * tl.load(corrections + 4 * count).to(STATE)
    eps, factor = tl.load(numbers + 3).to(STATE), tl.load(corrections + 3 * count).to(STATE)
    return quotient(above, denominator(v, eps, factor))
