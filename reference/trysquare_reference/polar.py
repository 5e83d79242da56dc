r"""Newton–Schulz iteration: push the singular values of a matrix together with matrix products alone.

Few large singular values dominate a usual update; nearly equal ones let it act on every direction. Five iterations
come close to the polar factor, all singular values 1: THORN takes that; DolphinFlow iterates twice and keeps the norm.

## Equations

With $n = \lVert u\rVert_F$ and $X = u / n$, $T$ times

$$ A = X X^\top, \qquad X \leftarrow a X + b A X + c A^2 X, $$

then $u \leftarrow n X$. If $n < \varepsilon$, $u$ stays as it is.

Each iteration maps a singular value $\sigma$ to $a\sigma + b\sigma^3 + c\sigma^5$ and leaves the singular vectors.

The **polar factor** has coefficients of their own for each iteration and its result is $X$ itself, from

$$ X = \frac{u}{(1 + \text{safety})\,\max(n, \varepsilon)} . $$

Its **Gram form** computes the same polynomials from $R = X X^\top$ alone, which is cheaper where $X$ is much longer
than wide. From $Q = I$, for each $a, b, c$:

$$ Z = bR + cR^2, \qquad Q \leftarrow ZQ + aQ, \qquad RZ = R\,Z + aR, \qquad R \leftarrow Z\,(RZ) + a\,(RZ), $$

and the result is $QX$. Rounding grows in $Q$; so before the iterations whose index, from 0, is in the restart set,
$X \leftarrow QX$, $R \leftarrow X X^\top$, $Q \leftarrow I$. All of these are polynomials in $R$ and commute, but for
their rounding: what that of a multiplier $aI + Z$ adds to small singular values is enlarged by those behind it. So $Q$
takes up each from the left, in the order in which $X$ would.

## Symbols

| symbol | argument | meaning |
|---|---|---|
| $u$ | `u` | update, at least two dimensions: flattened to rows × rest, for `polar_factor` a batch of matrices |
| $T$ | `steps` | number of iterations, at least 1; for `polar_factor` that of the coefficients |
| $\varepsilon$ | `eps` | an update with a smaller norm stays as it is; `polar_factor` divides by no smaller one |
| $a, b, c$ | `coefficients` | of the odd quintic polynomial, or one such triple for each iteration |
| safety | `safety_factor` | room for rounding between the largest singular value and the end of the interval |
| | `form`, `restarts` | `"standard"`, or `"gram"` and the restart set |

## Departures

- $X X^\top X = X (X^\top X)$: the iteration on $X^\top$ gives the transposed result, so the smaller of the two Gram
  matrices is used. The published package always takes rows × rows and fails on more than two dimensions.
- Muon divides by $n + 10^{-7}$ and returns $X$; DolphinFlow divides by $n$ and returns $n X$.
- Polar Express divides by $1.02\,n + 10^{-6}$, so that small updates come out smaller still. Here any update with
  $n \ge \varepsilon$ gives the same factor as its multiples, and $n$ is computed in float64 in every precision, so that
  no square leaves the range.
- The package gram-newton-schulz 0.1.6 takes multipliers up from the right, $QZ + aQ$, and mirrors half of each product.

## References

- Jordan et al. Muon: an optimizer for hidden layers in neural networks. 2024.
  <https://kellerjordan.github.io/posts/muon/>
- Amsel, Persson, Musco, Gower. The Polar Express. 2025. arXiv:2505.16932: the coefficients of `polar_factor`,
  see [polar_express][trysquare_reference.polar_express].
- Dao-AILab. Gram Newton–Schulz. 2026. <https://github.com/Dao-AILab/gram-newton-schulz>
- Björck, Bowie. An iterative algorithm for computing the best estimate of an orthogonal matrix. 1971.

Examples:
    >>> u = np.diag([3.0, 4.0])
    >>> np.round(newton_schulz(u, steps=1, eps=1e-8), 4)
    array([[5.9663, 0.    ],
           [0.    , 4.8824]])

    Two steps of Newton's cubic bring 0.6 and 0.8 near 1:

    >>> np.round(polar_factor(u, [(1.5, -0.5, 0.0)] * 2, safety_factor=0.0, eps=1e-8), 4)
    array([[0.9396, 0.    ],
           [0.    , 0.9954]])
"""

from collections.abc import Collection, Sequence
from typing import Literal

import numpy as np

from trysquare_reference._array import Array, as_matrix

MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Found by Jordan et al.: steep at 0, and the interval that it maps into itself lies around 1."""


def newton_schulz(
    u: Array, steps: int, eps: float, coefficients: tuple[float, float, float] = MUON_COEFFICIENTS
) -> Array:
    r"""Return $nX$ after `steps` iterations, shaped as `u`.

    Args:
        u: Update, at least two dimensions.
        steps: $T$, at least 1.
        eps: $\varepsilon$.
        coefficients: $a$, $b$, $c$.

    Examples:
        >>> newton_schulz(np.array([[2.0]]), steps=1, eps=1e-8, coefficients=(1.5, -0.5, 0.0))
        array([[2.]])
        >>> newton_schulz(np.array([[1e-9]]), steps=1, eps=1e-8)
        array([[1.e-09]])
    """
    a, b, c = coefficients
    matrix = as_matrix(u)
    n = np.sqrt(np.sum(np.square(matrix)))
    unchanged = n < eps
    X = matrix / np.where(unchanged, 1.0, n)
    tall = X.shape[0] > X.shape[1]
    X = X.T if tall else X
    for _ in range(steps):
        A = X @ X.T
        X = a * X + (b * A + c * (A @ A)) @ X
    X = X.T if tall else X
    return np.where(unchanged, matrix, n * X).reshape(u.shape)


def polar_factor(
    u: Array,
    coefficients: Sequence[tuple[float, float, float]],
    safety_factor: float,
    eps: float,
    form: Literal["standard", "gram"] = "standard",
    restarts: Collection[int] = (2,),
) -> Array:
    r"""Return $X$ after one iteration for each of the coefficients, shaped as `u`.

    Args:
        u: Matrices, any number of dimensions before the last two.
        coefficients: $a, b, c$ of each iteration.
        safety_factor: Not negative.
        eps: $\varepsilon$.
        form: How the polynomials are computed; the result is the same but for rounding.
        restarts: Indices from 0 of the iterations before which the Gram form starts again.

    Examples:
        >>> polar_factor(np.array([[2.0], [0.0]]), [(1.5, -0.5, 0.0)], safety_factor=0.0, eps=1e-8)
        array([[1.],
               [0.]])
        >>> polar_factor(np.array([[5e-9]]), [(1.5, -0.5, 0.0)], safety_factor=0.0, eps=1e-8, form="gram")
        array([[0.6875]])
    """
    squares = np.square(u, dtype=np.float64)
    n = np.sqrt(np.sum(squares, axis=(-2, -1), keepdims=True, dtype=np.float64), dtype=np.float64)
    X = u / ((1 + safety_factor) * np.maximum(n, eps))
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X
    X = _gram_form(X, coefficients, restarts) if form == "gram" else _standard_form(X, coefficients)
    return X.mT if tall else X


def _standard_form(X: Array, coefficients: Sequence[tuple[float, float, float]]) -> Array:
    for a, b, c in coefficients:
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    return X


def _gram_form(X: Array, coefficients: Sequence[tuple[float, float, float]], restarts: Collection[int]) -> Array:
    identity = np.eye(X.shape[-2])
    R, Q = X @ X.mT, identity
    for index, (a, b, c) in enumerate(coefficients):
        if index in restarts:
            X = Q @ X
            R, Q = X @ X.mT, identity
        Z = b * R + c * (R @ R)
        Q = Z @ Q + a * Q
        RZ = R @ Z + a * R
        R = Z @ RZ + a * RZ
    return Q @ X
