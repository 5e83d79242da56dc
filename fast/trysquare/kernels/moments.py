"""Nesterov momentum and the second moment, named as in `ops.moments`."""

from __future__ import annotations

from collections.abc import Sequence

import triton
from torch import Tensor
from triton import language as tl

from trysquare.kernels._arithmetic import address, clipped, moved, root
from trysquare.kernels._launch import DTYPES, Table, cdiv, launch, warps

TILE = 1024
"""Elements of a program."""


def nesterov_(
    momentum_buffers: Sequence[Tensor],
    gradients: Sequence[Tensor],
    updates: Sequence[Tensor],
    momentum: Tensor,
    scale: Tensor | None,
    finite: Tensor | None,
) -> None:
    """m ← μ·m + g, and u = g + μ·m into ``updates``; lists of contiguous tensors of one shape.

    Args:
        momentum_buffers: m, float32 or float64.
        gradients: g before it is clipped.
        updates: u, in the dtype of m.
        momentum: μ, the first of float64 numbers.
        scale: The clipping factor, 0-dim; None: 1.
        finite: Where it is false m stays; 0-dim, None: true.
    """
    first = momentum_buffers[0]
    table = Table([momentum_buffers, gradients, updates])
    parts = cdiv(first.numel(), TILE)
    constants = {"GRADIENT": DTYPES[gradients[0].dtype], "STATE": DTYPES[first.dtype], "ALIGNED": table.aligned}
    arguments = table.addresses, momentum, scale, finite, len(gradients), first.numel(), parts
    launch(_nesterov, len(gradients) * parts, *arguments, constants=constants | {"TILE": TILE}, num_warps=warps(TILE))


@triton.jit
def _nesterov(
    table,
    momentum,
    scale,
    finite,
    count,
    elements,
    parts,
    GRADIENT: tl.constexpr,
    STATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0)
    member = program // parts
    places = (program % parts).to(tl.int64) * TILE + tl.arange(0, TILE)
    here = places < elements
    m_place = address(table, member, count, 0, STATE, ALIGNED) + places
    g_place = address(table, member, count, 1, GRADIENT, ALIGNED) + places
    u_place = address(table, member, count, 2, STATE, ALIGNED) + places
    mu = tl.load(momentum).to(STATE)
    g = clipped(tl.load(g_place, mask=here, other=0.0), scale, STATE)
    m = tl.load(m_place, mask=here, other=0.0) * mu + g
    tl.store(m_place, m, mask=moved(here, finite))
    tl.store(u_place, g + m * mu, mask=here)


@triton.jit
def second_moment(v, g, beta2, rest):
    """β₂·v + (1 − β₂)·g²; ``rest`` is 1 − β₂."""
    return v * beta2 + g * g * rest


@triton.jit
def correction(step, log2_beta2, DTYPE: tl.constexpr):
    """1/√(1 − β₂ᵗ), from the address of t; in float64 until it is rounded."""
    t = tl.load(step)
    return tl.rsqrt(1.0 - tl.exp2(t * log2_beta2)).to(DTYPE)


@triton.jit
def mean_weight(step, log2_beta1, DTYPE: tl.constexpr):
    """1 − β₁ᵗ, likewise: what a mean is divided by."""
    t = tl.load(step)
    return (1.0 - tl.exp2(t * log2_beta1)).to(DTYPE)


@triton.jit
def denominator(v, eps, factor):
    """√v̂ + ε; v̂ is v times the square of the factor (None: v itself)."""
    y = root(v)
    if factor is not None:
        y = y * factor
    return y + eps
