r"""Polar Express: for each iteration the odd quintic that brings an interval of singular values nearest to 1.

The first polynomials are steep at 0 and lift the small values, the last are flat at 1 and gather what has arrived.

## Equations

On $[\ell, u]$ the best $p(x) = ax + bx^3 + cx^5$ errs by the same $E$ at four points with alternating signs (Remez).
From $q = (3\ell + u)/4$, $r = (\ell + 3u)/4$, until $E$ stays as it is, solve for $a, b, c, E$

$$ p(\ell) + E = 1, \quad p(q) - E = 1, \quad p(r) + E = 1, \quad p(u) - E = 1, $$

then move $q$ and $r$ to the extrema of $p$ between the ends, where $p' = 0$:

$$ q, r \leftarrow \sqrt{\frac{-3b \mp \sqrt{9b^2 - 20ac}}{10c}} . $$

On an interval that is a point but for rounding, $\ell/u \ge 1 - 5\cdot10^{-6}$, $p$ is the quintic with
$p(u) = 1$, $p'(u) = p''(u) = 0$:

$$ a = \frac{15}{8u}, \qquad b = -\frac{10}{8u^3}, \qquad c = \frac{3}{8u^5} . $$

The composition begins with $\ell$ and $u = 1$. For each of the $T$ iterations, with the cushion $\kappa$ and $s = 1 +$
safety:

1. $p \leftarrow$ the best quintic on $[\max(\ell, \kappa u), u]$
2. if $\kappa u > \ell$: $p \leftarrow 2p\,/\,(p(\ell) + p(u))$
3. in all iterations but the last: $a, b, c \leftarrow a/s,\ b/s^3,\ c/s^5$
4. $\ell \leftarrow p(\ell)$, $u \leftarrow 2 - \ell$

## Symbols

| symbol | argument | meaning |
|---|---|---|
| $\ell$ | `lower`, `lower_bound` | smallest singular value that is to arrive at 1 |
| $u$ | `upper` | largest singular value |
| $T$ | `iters` | number of iterations |
| safety | `safety_factor` | how far a value may lie above $u$, by rounding, without being thrown out |
| $\kappa$ | `cushion` | of $u$: smaller values are lifted as if they lay there, at the price of a slower start |

## Departures

- $9b^2 - 20ac$ counts as 0 where rounding makes it negative, which happens on intervals that are nearly a point; the
  paper's program takes the root of it. `safety_factor=0` with eight iterations and more is an ordinary setting.

## References

- Amsel, Persson, Musco, Gower. The Polar Express: optimal matrix sign methods and their application to the Muon
  algorithm. 2025. arXiv:2505.16932.

Examples:
    >>> for abc in coefficients():
    ...     print("%.10f %.10f %.10f" % abc)
    8.1565545249 -22.4832929256 15.8787699152
    4.0429299352 -2.8089174659 0.5000178451
    3.8916678023 -2.7724841532 0.5060648179
    3.2857536578 -2.3681294933 0.4644902423
    2.3465413259 -1.7097828383 0.4232355117
"""

import math

import numpy as np

from trysquare_reference._array import Array

Coefficients = tuple[float, float, float]
"""$a, b, c$ of an odd quintic."""

POINT = 1 - 5e-6
MOST_EXCHANGES = 100
UNCHANGED = 1e-15


def quintic(lower: float, upper: float) -> Coefficients:
    r"""Return $a, b, c$ of the odd quintic that stays nearest to 1 on $[\ell, u]$.

    Args:
        lower: $\ell$, positive.
        upper: $u$, at least `lower`.

    Examples:
        >>> quintic(1.0, 1.0)
        (1.875, -1.25, 0.375)
        >>> a, b, c = quintic(0.5, 1.5)
        >>> [round(a * x + b * x**3 + c * x**5, 6) for x in (0.5, 1.5)]  # the same error on either side
        [0.914491, 1.085509]
    """
    if lower / upper >= POINT:
        return 15 / (8 * upper), -10 / (8 * upper**3), 3 / (8 * upper**5)
    q, r = (3 * lower + upper) / 4, (lower + 3 * upper) / 4
    error = math.inf
    for _ in range(MOST_EXCHANGES):
        a, b, c, new_error = _equal_errors(np.array([lower, q, r, upper]))
        q, r = _extrema(a, b, c)
        if abs(new_error - error) <= UNCHANGED:
            break
        error = new_error
    return a, b, c


def coefficients(
    iters: int = 5, lower_bound: float = 1e-3, safety_factor: float = 0.02, cushion: float = 0.02
) -> tuple[Coefficients, ...]:
    r"""Return $a, b, c$ of each iteration.

    Args:
        iters: $T$, at least 1.
        lower_bound: $\ell$, in (0, 1].
        safety_factor: Not negative.
        cushion: $\kappa$, in [0, 1).

    Examples:
        Without safety factor the last of eight has arrived at the quintic of a point:

        >>> eight = coefficients(8, safety_factor=0.0, cushion=0.02407327424182761)
        >>> [tuple(round(x, 8) for x in eight[i]) for i in (0, 7)]
        [(8.28721202, -23.59588652, 17.30038731), (1.875, -1.25, 0.375)]
    """
    lower, upper, s, composed = lower_bound, 1.0, 1 + safety_factor, []
    for iteration in range(iters):
        a, b, c = quintic(max(lower, cushion * upper), upper)
        if cushion * upper > lower:
            k = 2 / (_value(a, b, c, lower) + _value(a, b, c, upper))
            a, b, c = k * a, k * b, k * c
        if iteration < iters - 1:
            a, b, c = a / s, b / s**3, c / s**5
        composed.append((a, b, c))
        lower = _value(a, b, c, lower)
        upper = 2 - lower
    return tuple(composed)


def _value(a: float, b: float, c: float, x: float) -> float:
    return a * x + b * x**3 + c * x**5


def _equal_errors(x: Array) -> Coefficients | tuple[float, ...]:
    """Return a, b, c, E with the error E at the four points, of alternating sign."""
    signs = np.array([1.0, -1.0, 1.0, -1.0])
    system = np.stack([x, x**3, x**5, signs], axis=1)
    return tuple(np.linalg.solve(system, np.ones(4)).tolist())


def _extrema(a: float, b: float, c: float) -> tuple[float, float]:
    """Return the two positive points where the derivative is zero, the smaller one first."""
    root = math.sqrt(max(9 * b * b - 20 * a * c, 0.0))
    return math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
