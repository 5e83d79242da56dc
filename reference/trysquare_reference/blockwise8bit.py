r"""Blockwise 8-bit numbers: a code for every entry of a tensor, and one float32 scale for every 256 of them.

Optimizer state takes a quarter of the memory that way. The codes stand for 256 values that lie denser towards 0, and a
block with an outlier loses precision in that block alone.

## Equations

Flatten the tensor (row-major) and cut it into blocks of 256; the last one may be short. For a block $x$ and a map
$q_0 < \dots < q_{255}$ of values in $[-1, 1]$:

$$ a = \max_k |x_k|, \qquad s_k = x_k / a, \qquad c_k = \operatorname{argmin}_c |s_k - q_c|,
   \qquad \hat x_k = q_{c_k}\,a $$

A tie goes to the lower code.

In a block whose $a$ is 0 or not finite, $s = 0$. With an unsigned map a positive $x_k$ never takes code 0:
$c_k \leftarrow \max(c_k, 1)$.

The signed map: for $i = 0, \dots, 6$ with $n = 2^i$, cut $[0.1, 1]$ into $n$ equal cells; their midpoints times
$10^{i-6}$, and the same negated; beside them 0 and 1. The unsigned map: $n = 2^{i+1}$, nothing negated.

## Symbols

| symbol | argument | meaning |
|---|---|---|
| $x$ | `x` | tensor of any shape |
| $a$ | `absmax` | one scale for every block, shape (blocks,) |
| $s$ | `s` | the tensor over its scales, shaped as `x` |
| $c$ | `codes` | integers from 0 to 255, shaped as `x` |
| $q$ | `qmap` | the 256 values in ascending order |

## Departures

- bitsandbytes lets a small positive second moment become 0 beside a large one. The next update of that entry then
  divides by $\varepsilon$ alone and is thousands of learning rates long; with code 1 as its least value it is not.
- NaN and infinities: $a$ is NaN or infinite, $s = 0$, and $0 \cdot a$ makes the whole block NaN. That shows; a block
  that went on with some of its entries would not.
- The maps are float32 values, each product and sum of their construction rounded once to float32, as torch's `linspace`
  rounds (NumPy's differs in the last place).

## References

- Dettmers, Lewis, Shleifer, Zettlemoyer. 8-bit optimizers via block-wise quantization. 2022. arXiv:2110.02861.
- Dettmers. 8-bit approximations for parallelism in deep learning. 2016. arXiv:1511.04561 (the dynamic map).
- `bitsandbytes.functional.create_dynamic_map`, version 0.50.

Examples:
    >>> codes, absmax = quantize(np.array([0.0, 3.0, -1.5, 1e-9]), dynamic_map(signed=True))
    >>> codes, absmax
    (array([127, 255,  35, 127], dtype=uint8), array([3.]))
    >>> np.round(dequantize(codes, absmax, dynamic_map(signed=True)), 3)
    array([ 0.   ,  3.   , -1.502,  0.   ])
"""

import functools
from typing import Any, TypeAlias

import numpy as np

from trysquare_reference._array import Array, quiet

Codes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
"""Integers from 0 to 255."""

BLOCK = 256
"""Entries that share a scale."""

DECADES = 7
"""The map reaches down to the decade of 1e-6."""


@functools.cache
def dynamic_map(signed: bool) -> Array:
    r"""Return $q$, the 256 values of a code, ascending; each of them is a float32.

    Args:
        signed: Whether it has negative values.

    Examples:
        >>> q = dynamic_map(signed=True)
        >>> float(q[0]), float(q[127]), float(q[128]), float(q[255])
        (-0.992968738079071, 0.0, 5.500000384017767e-07, 1.0)
        >>> q = dynamic_map(signed=False)
        >>> float(q[0]), round(float(q[1]), 10), len(q)
        (0.0, 3.25e-07, 256)
    """
    halves = [_decade(i, 2 ** (i if signed else i + 1)) for i in range(DECADES)]
    mirrored = [-values for values in halves] if signed else []
    ends = np.array([0.0, 1.0], dtype=np.float32)
    q = np.sort(np.concatenate([*halves, *mirrored, ends])).astype(np.float64)
    q.flags.writeable = False
    return q


def _decade(i: int, n: int) -> Any:
    """The midpoints of n cells of [0.1, 1], times 10^(i-6), in float32; edges are counted from the nearer end."""
    low, one = np.float32(0.1), np.float32(1.0)
    h = float((one - low) / np.float32(n))
    k = np.arange(n + 1)
    edges = np.where(k < (n + 1) // 2, float(low) + h * k, 1.0 - h * (n - k)).astype(np.float32)
    return np.float32(10.0 ** (i - DECADES + 1)) * ((edges[:-1] + edges[1:]) / np.float32(2.0))


def midpoints(qmap: Array) -> Array:
    """Return the 255 boundaries between neighbouring values of a map.

    Examples:
        >>> round(float(midpoints(dynamic_map(signed=True))[127]), 10)
        2.75e-07
    """
    return (qmap[:-1] + qmap[1:]) / 2


def blocks(x: Array) -> Array:
    """Return a tensor as (blocks, 256), the last block filled up with zeros.

    Examples:
        >>> blocks(np.ones((3, 100))).shape
        (2, 256)
    """
    flat = x.reshape(-1)
    return np.concatenate([flat, np.zeros(-x.size % BLOCK)]).reshape(-1, BLOCK)


def unblocked(x: Array, shape: tuple[int, ...]) -> Array:
    """Return what `blocks` was given, of this shape.

    Examples:
        >>> unblocked(blocks(np.ones((3, 100))), (3, 100)).shape
        (3, 100)
    """
    return x.reshape(-1)[: int(np.prod(shape))].reshape(shape)


def block_absmax(x: Array) -> Array:
    """Return $a$, the largest magnitude in each block, shape (blocks,); NaN where the block has one.

    Examples:
        >>> block_absmax(np.arange(-400.0, 1.0))
        array([400., 144.])
    """
    return np.asanyarray(np.max(np.abs(blocks(x)), axis=1))


@quiet
def scaled(x: Array, absmax: Array) -> Array:
    r"""Return $s$, every entry over the scale of its block, within $[-1, 1]$; 0 where that scale is 0 or not finite.

    Args:
        x: The tensor.
        absmax: $a$ of its blocks.

    Examples:
        >>> scaled(np.array([1.0, -4.0]), np.array([4.0]))
        array([ 0.25, -1.  ])
        >>> scaled(np.array([1.0, np.inf]), np.array([np.inf]))
        array([0., 0.])
    """
    usable = _usable(absmax)
    s = blocks(x) / np.where(usable, absmax, 1.0)[:, np.newaxis]
    return unblocked(np.where(usable[:, np.newaxis], s, 0.0), x.shape)


def _usable(absmax: Array) -> Any:
    return np.logical_and(absmax > 0, np.isfinite(absmax))


def nearest(s: Array, qmap: Array) -> Codes:
    """Return the code of the nearest value for every entry; a tie goes to the lower code.

    Examples:
        >>> nearest(np.array([-2.0, 0.0, 0.99648, 0.9965, 1.0]), dynamic_map(signed=True))
        array([  0, 127, 254, 255, 255], dtype=uint8)
    """
    return np.searchsorted(midpoints(qmap), s, side="left").astype(np.uint8)


@quiet
def quantize(x: Array, qmap: Array) -> tuple[Codes, Array]:
    """Return the codes of a tensor, shaped as it is, and the scales of its blocks.

    Args:
        x: A tensor of any shape.
        qmap: The values of the codes. One without negative values keeps positive entries from code 0.

    Examples:
        >>> quantize(np.array([1.0, 1e-12, 0.0]), dynamic_map(signed=False))
        (array([255,   1,   0], dtype=uint8), array([1.]))
    """
    absmax = block_absmax(x)
    codes = nearest(scaled(x, absmax), qmap)
    if qmap[0] < 0:
        return codes, absmax
    usable = unblocked(np.broadcast_to(_usable(absmax)[:, np.newaxis], (absmax.size, BLOCK)), x.shape)
    return np.where(np.logical_and(x > 0, usable), np.maximum(codes, 1), codes).astype(np.uint8), absmax


@quiet
def dequantize(codes: Codes, absmax: Array, qmap: Array) -> Array:
    r"""Return $\hat x$, what the codes stand for.

    Args:
        codes: Integers from 0 to 255, of any shape.
        absmax: The scales of their blocks.
        qmap: The values of the codes.

    Examples:
        >>> dequantize(np.array([127, 255], dtype=np.uint8), np.array([8.0]), dynamic_map(signed=True))
        array([0., 8.])
    """
    values = qmap[np.asarray(codes).astype(np.intp)]
    return unblocked(blocks(values) * absmax[:, np.newaxis], codes.shape)


def interval(codes: Codes, qmap: Array) -> tuple[Array, Array]:
    r"""Return the ends (low, high) of all $s$ that take a code; $s = $ low itself takes the code below.

    Code 0 of an unsigned map holds nothing but 0, and code 1 everything down to it.

    Examples:
        >>> low, high = interval(np.array([0, 255]), dynamic_map(signed=True))
        >>> low.round(3), high.round(3)
        (array([-1.   ,  0.996]), array([-0.986,  1.   ]))
    """
    signed, between = qmap[0] < 0, midpoints(qmap)
    ends = np.concatenate([[-1.0, between[0]] if signed else [0.0, 0.0], between[1:], [1.0]])
    index = np.asarray(codes).astype(np.intp)
    return ends[index], ends[index + 1]


def error_bound(codes: Codes, absmax: Array, qmap: Array) -> Array:
    r"""Return the most by which $\hat x$ can be off, for every entry: the farther end of its code's interval times $a$.

    Args:
        codes: Integers from 0 to 255, of any shape.
        absmax: The scales of their blocks.
        qmap: The values of the codes.

    Examples:
        >>> x = np.linspace(-1.0, 1.0, 1000)
        >>> q = dynamic_map(signed=True)
        >>> codes, absmax = quantize(x, q)
        >>> bool(np.all(np.abs(dequantize(codes, absmax, q) - x) <= error_bound(codes, absmax, q)))
        True
    """
    low, high = interval(codes, qmap)
    value = qmap[np.asarray(codes).astype(np.intp)]
    widest = np.maximum(value - low, high - value)
    return unblocked(blocks(widest) * absmax[:, np.newaxis], codes.shape)
