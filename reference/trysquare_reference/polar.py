r"""Newton–Schulz iteration: push the singular values of a matrix together with matrix products alone.

Few large singular values dominate a usual update; nearly equal ones let it act on every direction. Five iterations
with these coefficients come close to the polar factor, DolphinFlow takes two and keeps the norm as a scale.

## Equations

With $n = \lVert u\rVert_F$ and $X = u / n$, $T$ times

$$ A = X X^\top, \qquad X \leftarrow a X + b A X + c A^2 X, $$

then $u \leftarrow n X$. If $n < \varepsilon$, $u$ stays as it is.

Each iteration maps a singular value $\sigma$ to $a\sigma + b\sigma^3 + c\sigma^5$ and leaves the singular vectors.

## Symbols

| symbol | argument | meaning |
|---|---|---|
| $u$ | `u` | update, at least two dimensions, flattened to rows × rest |
| $T$ | `steps` | number of iterations, at least 1 |
| $\varepsilon$ | `eps` | an update with a smaller norm stays as it is |
| $a, b, c$ | `coefficients` | of the odd quintic polynomial |

## Departures

- $X X^\top X = X (X^\top X)$: the iteration on $X^\top$ gives the transposed result, so the smaller of the two Gram
  matrices is used. The published package always takes rows × rows and fails on more than two dimensions.
- Muon divides by $n + 10^{-7}$ and returns $X$; DolphinFlow divides by $n$ and returns $n X$.

## References

- Jordan et al. Muon: an optimizer for hidden layers in neural networks. 2024.
  <https://kellerjordan.github.io/posts/muon/>
- Björck, Bowie. An iterative algorithm for computing the best estimate of an orthogonal matrix. 1971.

Examples:
    >>> u = np.diag([3.0, 4.0])
    >>> np.round(newton_schulz(u, steps=1, eps=1e-8), 4)
    array([[5.9663, 0.    ],
           [0.    , 4.8824]])
"""

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
