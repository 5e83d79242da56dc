"""Coefficients of the Polar Express (Amsel et al. 2025, arXiv 2505.16932), solved in plain float64."""

from __future__ import annotations

import functools
import math

Coefficients = tuple[float, float, float]
Points = tuple[float, float, float, float]

FLAT = 1 - 5e-6  # an interval of this lower over upper end is a point to float64's square root
SWEEPS = 100
CONVERGED = 1e-15

DEFAULT_COEFFICIENTS: tuple[Coefficients, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""``coefficients(5, 1e-3, 0.02, 0.02)``, as THORN's defaults have it; a test solves them again."""


@functools.cache
def coefficients(iters: int, lower_bound: float, safety_factor: float, cushion: float) -> tuple[Coefficients, ...]:
    """(a, b, c) of every iteration for singular values from ``lower_bound`` to 1.

    Each quintic is the best odd one towards 1 on what its predecessors have left. ``cushion`` bounds from below, in
    parts of the upper end, what the small values are fitted for; all but the last allow for values
    1 + ``safety_factor`` times too large.
    """
    lower, upper = lower_bound, 1.0
    table: list[Coefficients] = []
    for remaining in reversed(range(iters)):
        start = max(lower, cushion * upper)
        triple = quintic(start, upper)
        if start > lower:
            triple = substituted(triple, 2 / (value(triple, lower) + value(triple, upper)), 1.0)
        if remaining:
            triple = substituted(triple, 1.0, 1 / (1 + safety_factor))
        table.append(triple)
        lower = value(triple, lower)
        upper = 2 - lower
    return tuple(table)


def substituted(triple: Coefficients, outer: float, inner: float) -> Coefficients:
    """The quintic outer · p(inner · x)."""
    a, b, c = triple
    return outer * inner * a, outer * inner**3 * b, outer * inner**5 * c


def value(triple: Coefficients, x: float) -> float:
    """ax + bx³ + cx⁵."""
    a, b, c = triple
    return x * (a + x * x * (b + x * x * c))


def quintic(lower: float, upper: float) -> Coefficients:
    """The odd quintic that is nearest to 1 on [lower, upper], by Remez's exchange of its four extrema."""
    if lower / upper >= FLAT:
        return 15 / (8 * upper), -10 / (8 * upper**3), 3 / (8 * upper**5)
    points = lower, (3 * lower + upper) / 4, (lower + 3 * upper) / 4, upper
    error = math.inf
    for _ in range(SWEEPS):
        before, error = error, levelled_error(points)
        triple = interpolated(points, error)
        if abs(error - before) <= CONVERGED:
            break
        points = lower, *extrema(triple), upper
    return triple


def levelled_error(points: Points) -> float:
    """E with p(x) = 1 − E, 1 + E, 1 − E, 1 + E at the four points for some odd quintic p.

    With y = p(x)/x a parabola in t = x², the third divided difference of y vanishes: that of 1/x, which as a quotient
    of determinants is a sum of positive terms over a product of sums, is E times that of ±1/x, whose terms agree in
    sign. So nothing cancels, however close the points are, where the 4 × 4 system for (a, b, c, E) becomes singular.
    """
    p, q, r, s = points
    schur = (p + q + r + s) * (p * (q + r + s) + q * (r + s) + r * s) - (p * q * (r + s) + (p + q) * r * s)
    sums = (p + q) * (p + r) * (p + s) * (q + r) * (q + s) * (r + s)
    alternating = 0.0
    for i, x in enumerate(points):
        others = points[:i] + points[i + 1 :]
        alternating += math.prod(others) / math.prod(abs(x - y) * (x + y) for y in others)
    return schur / sums / alternating


def interpolated(points: Points, error: float) -> Coefficients:
    """(a, b, c) with p = 1 + E, 1 − E, 1 + E at the last three points: Newton's divided differences of p/x in x²."""
    _, q, r, s = points
    first = -(1 - error * (q + r) / (q - r)) / (q * r * (q + r))
    then = -(1 + error * (r + s) / (r - s)) / (r * s * (r + s))
    c = (first - then) / ((q - s) * (q + s))
    b = first - c * (q * q + r * r)
    a = (1 + error) / q - q * q * (b + c * q * q)
    return a, b, c


def extrema(triple: Coefficients) -> tuple[float, float]:
    """Where p′ = a + 3bx² + 5cx⁴ vanishes."""
    a, b, c = triple
    root = math.sqrt(max(9 * b * b - 20 * a * c, 0.0))
    return math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
