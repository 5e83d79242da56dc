r"""Row normalisation (NorMuon): give each row of an orthogonalised update the same share, and the whole its length.

A polar factor evens out directions but not neurons: its rows may differ widely in length. Dividing each row by a
running mean of its size makes every neuron learn at the same pace.

## Equations

For each matrix $X$ of $R$ rows and $C$ columns, with $q, v$ one number a row:

$$ q = \frac{1}{C}\sum_{j} X_{\cdot j}^2, \qquad n_0 = \lVert X\rVert_F, \qquad
   v \leftarrow \beta_2 v + (1 - \beta_2)\,q, $$

$$ Y = \frac{X}{\sqrt{\max(v, \varepsilon)}}, \qquad
   X \leftarrow Y\,\frac{n_0}{\max(\lVert Y\rVert_F, \varepsilon)} . $$

## Symbols

| symbol | argument | meaning |
|---|---|---|
| $X$ | `x` | orthogonalised update, matrices in the last two dimensions |
| $v$ | `v` | running mean of the squared rows, from 0, `row_exp_avg_sq` in the state |
| $\beta_2$ | `beta2` | in (0, 1) |
| $\varepsilon$ | `eps` | inside the root, and the least length that is divided by |

## Departures

- The paper divides by $\sqrt v + \varepsilon$ and sets the length to $0.2\sqrt{RC}$, its learning rate's scale. Here
  the length is kept, and the scale is the optimizer's business.
- $v$ is not corrected for its bias: a common factor of all rows falls out with the length.

## References

- Li, Liu, Liang, Chen, Zhao. NorMuon: making Muon more efficient and scalable. 2025. arXiv:2510.05491.

Examples:
    In the first step the rows become equally long:

    >>> x, v = normalize_rows(np.array([[3.0, 4.0], [0.0, 1.0]]), np.zeros((2, 1)), beta2=0.5, eps=1e-8)
    >>> v
    array([[6.25],
           [0.25]])
    >>> np.round(np.sum(x * x, axis=1), 6)
    array([13., 13.])
"""

import numpy as np

from trysquare_reference._array import Array


def normalize_rows(x: Array, v: Array, beta2: float, eps: float) -> tuple[Array, Array]:
    r"""Return the update with evened rows and the new running mean $v$.

    Args:
        x: $X$, of shape (…, rows, columns).
        v: The mean before the step, of shape (…, rows, 1).
        beta2: $\beta_2$.
        eps: $\varepsilon$.

    Examples:
        >>> normalize_rows(np.array([[2.0, 0.0], [0.0, 0.0]]), np.zeros((2, 1)), beta2=0.5, eps=1e-8)
        (array([[2., 0.], [0., 0.]]), array([[1.], [0.]]))
    """
    q = np.mean(np.square(x), axis=-1, keepdims=True)
    n_0 = _length(x)
    v = beta2 * v + (1 - beta2) * q
    y = x / np.sqrt(np.maximum(v, eps))
    return y * (n_0 / np.maximum(_length(y), eps)), v


def _length(x: Array) -> Array:
    length: Array = np.sqrt(np.sum(np.square(x), axis=(-2, -1), keepdims=True))
    return length
