"""What kernels share: addresses from a table, and correctly rounded roots and quotients.

Triton's own `sqrt` and `/` of float32 numbers are approximations that flush subnormal numbers to zero.
"""

from __future__ import annotations

import triton
from triton import language as tl

from trysquare import _backend

BY_BITS = tl.constexpr(_backend.interpreted())
"""Whether bfloat16 is converted by integer arithmetic: Triton's interpreter truncates where a GPU rounds, and loses
subnormal numbers."""


@triton.jit
def address(table, member, count, operand: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where an operand of a member begins."""
    pointer = tl.load(table + operand * count + member).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def root(x):
    """√x, correctly rounded."""
    if x.dtype == tl.float64:
        y = tl.sqrt(x)
    else:
        y = tl.sqrt_rn(x)
    return y


@triton.jit
def quotient(x, y):
    """x/y, correctly rounded."""
    if x.dtype == tl.float64:
        z = x / y
    else:
        z = tl.div_rn(x, y)
    return z


@triton.jit
def moved(here, finite):
    """Which of the elements that are here are written: none in a step that is not taken (``finite`` is false there)."""
    written = here
    if finite is not None:  # in int32: the interpreter has no product of a mask and a single bit
        written = (here.to(tl.int32) * tl.load(finite).to(tl.int32)) != 0
    return written


@triton.jit
def widened(x, DTYPE: tl.constexpr):
    """A number as it was stored, in the format of the arithmetic."""
    if BY_BITS and x.dtype == tl.bfloat16:
        y = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True).to(DTYPE)
    else:
        y = x.to(DTYPE)
    return y


@triton.jit
def narrowed(x, DTYPE: tl.constexpr):
    """A number in the format that it is stored in, rounded to the nearest, ties to even."""
    if BY_BITS and DTYPE == tl.bfloat16:  # noqa: SIM300  # a dtype, whatever its name looks like
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        up = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        y = tl.where(x == x, up, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)  # noqa: PLR0124  # NaN is not itself
    else:
        y = x.to(DTYPE)
    return y


@triton.jit
def clipped(g, scale, DTYPE: tl.constexpr):
    """s·g in the format of the arithmetic."""
    wide = widened(g, DTYPE)
    if scale is not None:
        wide = wide * tl.load(scale).to(DTYPE)
    return wide


@triton.jit
def dotted(left, right, total):
    """total + left · right in float32; products of float32 numbers are not rounded to TF32."""
    if BY_BITS:  # the interpreter multiplies the bits of bfloat16 numbers as integers
        y = tl.dot(widened(left, tl.float32), widened(right, tl.float32), total)
    else:
        y = tl.dot(left, right, total, input_precision="ieee")
    return y
