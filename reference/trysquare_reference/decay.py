r"""Decoupled weight decay: shrink the parameters beside the update instead of through the gradient.

The strength then depends on neither the momentum nor the second moment.

## Equations

$$ \theta \leftarrow \theta\,(1 - \eta\lambda) $$

## Symbols

| symbol | argument | meaning |
|---|---|---|
| $\theta$ | `theta` | parameter |
| $\eta$ | `lr` | learning rate of this step |
| $\lambda$ | `weight_decay` | strength of the decay |

## Departures

None.

## References

- Loshchilov, Hutter. Decoupled weight decay regularization. 2017. arXiv:1711.05101.

Examples:
    >>> import numpy as np
    >>> decoupled_decay(np.array([4.0, -2.0]), lr=0.5, weight_decay=0.5)
    array([ 3. , -1.5])
"""

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
