r"""Decoupled weight decay: shrink the parameters beside the update instead of through the gradient.

The strength then depends on neither the momentum nor the second moment. Cautious decay shrinks only where the update
does so too, and leaves alone what the gradient makes longer.

## Equations

Decoupled, on the parameter:

$$ \theta \leftarrow \theta\,(1 - \eta\lambda) $$

Cautious, on the update, which is then subtracted: entry by entry

$$ u \leftarrow u + \lambda\theta \quad\text{where } u = 0 \text{ or } \theta = 0 \text{ or }
   \operatorname{sign} u = \operatorname{sign} \theta, \qquad u \leftarrow u \quad\text{elsewhere.} $$

## Symbols

| symbol | argument | meaning |
|---|---|---|
| $\theta$ | `theta` | parameter |
| $u$ | `u` | update, shaped as `theta` |
| $\eta$ | `lr` | learning rate of this step |
| $\lambda$ | `weight_decay` | strength of the decay |

## Departures

- The paper's mask is $u\theta \ge 0$. The product of two tiny numbers of opposite sign underflows to $-0 \ge 0$; their
  signs do not. A zero update decays under either.

## References

- Loshchilov, Hutter. Decoupled weight decay regularization. 2017. arXiv:1711.05101.
- Chen, Li, Liang, et al. Cautious weight decay. 2025. arXiv:2510.12402.

Examples:
    >>> import numpy as np
    >>> decoupled_decay(np.array([4.0, -2.0]), lr=0.5, weight_decay=0.5)
    array([ 3. , -1.5])
    >>> cautious_decay(np.array([1.0, 1.0, 0.0]), np.array([4.0, -4.0, -4.0]), weight_decay=0.5)
    array([ 3.,  1., -2.])
"""

import numpy as np

from trysquare_reference._array import Array


def decoupled_decay(theta: Array, lr: float, weight_decay: float) -> Array:
    r"""Return the decayed parameter.

    Args:
        theta: $\theta$.
        lr: $\eta$.
        weight_decay: $\lambda$.

    Examples:
        >>> import numpy as np
        >>> decoupled_decay(np.array([1.0]), lr=0.25, weight_decay=0.0)
        array([1.])
    """
    return theta * (1 - lr * weight_decay)


def cautious_decay(u: Array, theta: Array, weight_decay: float) -> Array:
    r"""Return the update with the decay of those entries that it shrinks.

    Args:
        u: $u$.
        theta: $\theta$, shaped as `u`.
        weight_decay: $\lambda$.

    Examples:
        >>> import numpy as np
        >>> cautious_decay(np.array([1e-200, 1e-200]), np.array([-1e-200, 2.0]), weight_decay=0.5)
        array([1.e-200, 1.e+000])
    """
    shrinks = (u == 0) | (theta == 0) | (np.sign(u) == np.sign(theta))
    return np.where(shrinks, u + weight_decay * theta, u)
