"""Blockwise 8-bit numbers on chip, named as in `ops.blockwise8bit`: what is decoded and coded never leaves registers.

Codes and values are (K, 256) here, K blocks; scales are (K,). Within a kernel a block is a column of a tile, for then
Triton lays out what is loaded through a table as it lays out what is loaded in order: (256, K) and (1, K).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton import language as tl

from trysquare import _backend
from trysquare.kernels._arithmetic import quotient
from trysquare.kernels._launch import cdiv, launch, warps
from trysquare.ops import blockwise8bit as ops

BLOCK = tl.constexpr(ops.BLOCK)
LAST = tl.constexpr(ops.CODES - 1)
SIGNED_ZERO, UNSIGNED_ZERO = tl.constexpr(ops.SIGNED_ZERO), tl.constexpr(ops.UNSIGNED_ZERO)
DECADES = tl.constexpr(ops.DECADES)
BELOW = tl.constexpr(ops.BELOW)

FUSED = tl.constexpr(not _backend.interpreted())
"""Whether a·b + c is rounded once, which Triton's interpreter does not."""

TOGETHER = 4
"""Blocks of a program, each of which a warp holds: a scale is found within it."""


def dequantize(codes: Tensor, absmax: Tensor, qmap: Tensor) -> Tensor:
    """What codes stand for, float32."""
    values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    _launch(_dequantize, codes.shape[0], codes, absmax, qmap, values)
    return values


def quantize_signed(x: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of values of either sign; ``bounds`` are the boundaries of the map."""
    return _quantized(x, bounds, True)


def quantize_unsigned(x: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of values that are not negative; a positive one never takes code 0."""
    return _quantized(x, bounds, False)


def _quantized(x: Tensor, bounds: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    _launch(_quantize, x.shape[0], x, bounds, codes, absmax, SIGNED=signed)
    return codes, absmax


def _launch(kernel: object, blocks: int, *arguments: Tensor, **constants: bool) -> None:
    programs = cdiv(blocks, TOGETHER)
    own = {**constants, "TOGETHER": TOGETHER}
    launch(kernel, programs, *arguments, blocks, constants=own, num_warps=warps(TOGETHER * ops.BLOCK))


@triton.jit
def _dequantize(codes, absmax, qmap, values, blocks, TOGETHER: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * TOGETHER + tl.arange(0, TOGETHER)[None, :]
    places = block * BLOCK + tl.arange(0, BLOCK)[:, None]
    here = (block < blocks) & (places >= 0)
    own = tl.load(absmax + block, mask=block < blocks, other=0.0)
    tl.store(values + places, decoded(tl.load(codes + places, mask=here, other=0), own, qmap), mask=here)


@triton.jit
def _quantize(x, bounds, codes, absmax, blocks, SIGNED: tl.constexpr, TOGETHER: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * TOGETHER + tl.arange(0, TOGETHER)[None, :]
    places = block * BLOCK + tl.arange(0, BLOCK)[:, None]
    here = (block < blocks) & (places >= 0)
    values = tl.load(x + places, mask=here, other=0.0)
    own = block_absmax(values)
    tl.store(codes + places, coded(values, own, bounds, SIGNED), mask=here)
    tl.store(absmax + block, own, mask=block < blocks)


# What other kernels use


@triton.jit
def decoded(codes, absmax, qmap):
    """What codes stand for; the map is read where it is, for in its 1 KiB it stays in the nearest cache."""
    return tl.load(qmap + codes.to(tl.int32)) * absmax


@triton.jit
def block_absmax(x):
    """The largest magnitude of each block, (1, K); NaN where it has one: as integers these are the largest."""
    magnitudes = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(magnitudes, axis=0, keep_dims=True).to(tl.float32, bitcast=True)


@triton.jit
def coded(x, absmax, bounds, SIGNED: tl.constexpr):
    """The nearest codes: the place of a magnitude among the codes, or one too few, and a look at the boundary above."""
    usable = is_usable(absmax)
    s = tl.where(usable, share(x, tl.where(usable, absmax, 1.0)), 0.0)
    if SIGNED:
        above = above_on_lines(tl.abs(s), 1)
        first = tl.where(s < 0, SIGNED_ZERO - 1 - above, SIGNED_ZERO + above)
    else:
        least = (usable & (x > 0)).to(tl.int32)
        first = tl.maximum(above_on_lines(s, 2) + UNSIGNED_ZERO, least)
    return step_up(s, first, bounds)


@triton.jit
def share(x, absmax):
    """x over the scale of its block, (1, K), correctly rounded where that decides a code.

    Each block is divided into 1 once. Of x·(1/absmax), which may be an ulp and a half off, two steps x − q·absmax make
    the rounded quotient (Markstein 1990, theorem 8.1): the first one is faithful. What is left over is exact if neither
    factor is near the ends of the range, to which end both are scaled by a power of two.
    """
    if FUSED:
        by = tl.where(absmax < 2.0**-60, 2.0**64, tl.where(absmax > 2.0**60, 2.0**-64, 1.0))
        y, below = x * by, absmax * by
        inverse = quotient(tl.full(absmax.shape, 1.0, tl.float32), below)
        q = y * inverse
        q = tl.fma(tl.fma(-q, below, y), inverse, q)
        q = tl.fma(tl.fma(-q, below, y), inverse, q)
    else:
        q = quotient(x, absmax)
    return q


@triton.jit
def is_usable(absmax):
    """Whether a block can be divided by its scale."""
    return (absmax > 0) & (absmax < float("inf"))


@triton.jit
def step_up(s, first, bounds):
    """The code of s, which is ``first`` or the next: one comparison with the boundary between them decides."""
    code = tl.minimum(tl.maximum(first, 0), LAST)
    return (code + (s > tl.load(bounds + code)).to(tl.int32)).to(tl.uint8)


@triton.jit
def above_on_lines(s, CELLS: tl.constexpr):
    """How many positive codes lie below a magnitude: right, or one too few, but none less than 0."""
    lowest = line(s, 0, CELLS)
    for i in tl.static_range(1, DECADES):
        lowest = tl.minimum(lowest, line(s, i, CELLS))
    return tl.maximum(lowest, 0.0).to(tl.int32)


@triton.jit
def line(s, i: tl.constexpr, CELLS: tl.constexpr):
    """The codes up to 10^(i-6)·[0.1, 1], and of these the part up to s; as `ops.blockwise8bit`, and one more."""
    n: tl.constexpr = CELLS * 2**i
    slope: tl.constexpr = 10.0 ** (DECADES - 1 - i) * n / 0.9
    offset: tl.constexpr = n - CELLS - 0.1 * n / 0.9 - BELOW + 1
    return s * slope + offset
