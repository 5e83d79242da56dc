r"""Projection of rows: take out of each row of a gradient what lies along the same row of the weights.

A gradient along the weights only makes them longer, which lowers the loss without learning anything new
("naïve loss minimisation"). Orthogonal to the weights, every step has to turn them.

## Equations

For each row $w$ of the weights and $g$ of the gradient (a row is a leading index, flattened):

$$ \tilde g = g - w\,\frac{\langle w, g\rangle}{\langle w, w\rangle + 10^{-30}}
   \qquad\text{if } 10^{-30} \le \langle w, w\rangle \le 10^{38}, \qquad \tilde g = g \text{ otherwise.} $$

The published package projects the update instead, with the rule

$$ \tilde u = u - w\,\frac{\langle w, u\rangle}{\langle w, w\rangle}
   \qquad\text{if } \langle w, w\rangle \ge \varepsilon, \qquad \tilde u = u \text{ otherwise.} $$

## Symbols

| symbol | argument | meaning |
|---|---|---|
| $w$ | `w` | weights, at least two dimensions |
| $g$ | `g` | gradient, shaped as `w` |
| $u$ | `u` | update, shaped as `w` |
| $\varepsilon$ | `eps` | rows with a smaller squared norm stay as they are |

## Departures

- The paper's code projects each parameter as one vector; DolphinFlow does it for each row, so that every neuron
  is free to turn by itself.
- $\langle w, w\rangle$ outside $[10^{-30}, 10^{38}]$ leaves the row alone in every precision: float32 can hold
  neither the quotient nor the squared norm there, and the two precisions have to agree on what is right.

## References

- Prieto, Barsbey, Mediano, Birdal. Grokking at the Edge of Numerical Stability. 2025. arXiv:2501.04697.
- `dolphinflow` 0.2.0, `project_away_from_vector`.

Examples:
    >>> project_rows(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0, 0.0], [0.0, 0.0]]))
    array([[0., 2.],
           [3., 4.]])
"""

import numpy as np

from trysquare_reference._array import Array, as_matrix

SMALLEST_SQUARED_NORM = 1e-30
LARGEST_SQUARED_NORM = 1e38


def project_rows(g: Array, w: Array) -> Array:
    r"""Return $\tilde g$: each row of `g` without its part along the same row of `w`.

    Args:
        g: Gradient, at least two dimensions.
        w: Weights, shaped as `g`.

    Returns:
        The projected gradient, shaped as `g`.

    Examples:
        >>> project_rows(np.array([[3.0, 1.0]]), np.array([[1.0, 1.0]]))
        array([[ 1., -1.]])
        >>> project_rows(np.array([[3.0, 1.0]]), np.array([[1e-16, 0.0]]))
        array([[3., 1.]])
    """
    rows, weights = as_matrix(g), as_matrix(w)
    wg = np.sum(weights * rows, axis=1, keepdims=True)
    ww = np.sum(weights * weights, axis=1, keepdims=True)
    projected = rows - weights * (wg / (ww + SMALLEST_SQUARED_NORM))
    in_domain = (ww >= SMALLEST_SQUARED_NORM) & (ww <= LARGEST_SQUARED_NORM)
    return np.where(in_domain, projected, rows).reshape(g.shape)


def project_update_rows(u: Array, w: Array, eps: float) -> Array:
    r"""Return $\tilde u$: each row of `u` without its part along the same row of `w`, by the package's rule.

    Args:
        u: Update, at least two dimensions.
        w: Weights, shaped as `u`.
        eps: Rows with $\langle w, w\rangle <$ `eps` stay as they are.

    Returns:
        The projected update, shaped as `u`.

    Examples:
        >>> project_update_rows(np.array([[3.0, 1.0]]), np.array([[1.0, 1.0]]), eps=1e-8)
        array([[ 1., -1.]])
        >>> project_update_rows(np.array([[3.0, 1.0]]), np.array([[1e-5, 0.0]]), eps=1e-8)
        array([[3., 1.]])
    """
    rows, weights = as_matrix(u), as_matrix(w)
    wu = np.sum(weights * rows, axis=1, keepdims=True)
    ww = np.sum(weights * weights, axis=1, keepdims=True)
    unchanged = ww < eps
    projected = rows - weights * (wu / np.where(unchanged, 1.0, ww))
    return np.where(unchanged, rows, projected).reshape(u.shape)
