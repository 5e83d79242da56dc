"""The norm of all gradients and the clipping factor, named as in the reference.

Two kinds of launches: one a bucket, whose programs each leave a sum of squares of their part, and a last one of a
single program that adds these up. Sums are of float64 numbers in an order that never changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton import language as tl

from trysquare.kernels._arithmetic import widened
from trysquare.kernels._launch import DTYPES, Table, cdiv, floats, launch
from trysquare.ops.clipping import MARGIN

PART = 1 << 14
"""Elements whose squares one program adds up, at most; of a tensor of one block, only that block."""

BLOCK = 1024
"""Elements that it holds at a time."""


def sums_of_squares(gradients: Sequence[Tensor]) -> Tensor:
    """Σ g² of parts of contiguous tensors of one shape and dtype; float64, to be added up."""
    first = gradients[0]
    part = PART if first.numel() > BLOCK else BLOCK
    parts = cdiv(first.numel(), part)
    sums = torch.empty(len(gradients) * parts, dtype=torch.float64, device=first.device)
    table = Table([gradients])
    constants = {"DTYPE": DTYPES[first.dtype], "PART": part, "BLOCK": BLOCK, "ALIGNED": table.aligned}
    launch(_sums_of_squares, sums.numel(), table.addresses, sums, first.numel(), parts, constants=constants)
    return sums


@triton.jit
def _sums_of_squares(
    table, sums, elements, parts, DTYPE: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr
):
    program = tl.program_id(0)
    gradient = tl.load(table + program // parts).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        gradient = tl.multiple_of(gradient, 16)
    start = (program % parts).to(tl.int64) * PART
    within = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for offset in range(0, PART, BLOCK):
        places = start + offset + within
        g = widened(tl.load(gradient + places, mask=places < elements, other=0.0), tl.float64)
        total += g * g
    tl.store(sums + program, tl.sum(total))


def finish(sums: Sequence[Tensor], max_norm: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """From sums of squares on one device: their norm, the clipping factor, and whether the norm is finite.

    0-dim tensors, float64, float64 and bool. Without ``max_norm`` the factor is 1. As `ops.clipping.clip_scale`, it is
    NaN for a norm that is not finite.
    """
    whole = sums[0] if len(sums) == 1 else torch.cat([one.view(-1) for one in sums])
    norm, scale = torch.empty((2,), dtype=torch.float64, device=whole.device).unbind()
    finite = torch.empty((), dtype=torch.bool, device=whole.device)
    bound = floats(whole.device, max_norm or 0.0)
    constants = {"CLIPS": bool(max_norm), "MARGIN": MARGIN, "BLOCK": BLOCK}
    launch(_finish, 1, whole, norm, scale, finite, bound, whole.numel(), constants=constants)
    return norm, scale, finite


@triton.jit
def _finish(
    sums, norm, scale, finite, max_norm, count, CLIPS: tl.constexpr, MARGIN: tl.constexpr, BLOCK: tl.constexpr
):
    within = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, count, BLOCK):
        total += tl.load(sums + start + within, mask=start + within < count, other=0.0)
    length = tl.sqrt(tl.sum(total))
    is_finite = length < float("inf")
    tl.store(norm, length)
    tl.store(finite, is_finite)
    factor = tl.full((), 1.0, tl.float64)
    if CLIPS:
        factor = tl.minimum(tl.load(max_norm) / (length + MARGIN), factor)
        factor = tl.where(is_finite, factor, float("nan"))
    tl.store(scale, factor)


def advance(steps: Sequence[Tensor], finite: Tensor | None) -> None:
    """t ← t + 1, or t + 0 where ``finite`` is false; ``steps`` are 0-dim float64 tensors."""
    table = Table([steps])
    constants = {"BLOCK": BLOCK}
    programs = cdiv(len(steps), BLOCK)
    launch(_advance, programs, table.addresses, finite, len(steps), constants=constants)


@triton.jit
def _advance(table, finite, count, BLOCK: tl.constexpr):
    member = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = member < count
    step = tl.load(table + member, mask=here, other=0).to(tl.pointer_type(tl.float64))
    if finite is None:
        moves = tl.full((), 1.0, tl.float64)
    else:
        moves = tl.load(finite).to(tl.float64)
    tl.store(step, tl.load(step, mask=here, other=0.0) + moves, mask=here)
