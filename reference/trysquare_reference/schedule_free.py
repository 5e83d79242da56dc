r"""Schedule-free averaging: gradients are taken at one point, steps are made at another, and their mean is the result.

The mean $x$ needs no decaying learning rate to settle, and the training need not know when it will end.

## Equations

At each step with the update $u$ found at $y$ (before the first, $x = y = z = \theta$):

$$ z \leftarrow z - \eta u, \qquad x \leftarrow (1 - c)\,x + c\,z, \qquad y = (1 - \beta_1)\,z + \beta_1 x . $$

The weight of a step in the mean is the square of the largest learning rate so far:

$$ \eta_{\max} \leftarrow \max(\eta_{\max}, \eta), \qquad w = \eta_{\max}^2, \qquad W \leftarrow W + w, \qquad
   c = \frac{w}{W} \;(0 \text{ if } W = 0) . $$

Under a constant learning rate $c = 1/t$ and $x$ is the mean of $z_1 \dots z_t$.

For $\beta_1 > 0$ one of the three is redundant. Only $y$, which is where the parameters are while training, and $z$
are kept; eliminating $x = (y - (1 - \beta_1)z)/\beta_1$ gives, in this order,

$$ y \leftarrow y + c\,(z - y) + \eta\,(\beta_1(1 - c) - 1)\,u, \qquad z \leftarrow z - \eta u . $$

## Symbols

| symbol | argument | meaning |
|---|---|---|
| $x$ | `x` | the mean: weights to evaluate with |
| $y$ | `y` | where the gradient is taken: weights to train with |
| $z$ | `z` | where the steps are made |
| $u$ | `u` | update, of Adam for instance |
| $\eta$ | `lr` | learning rate of this step |
| $\beta_1$ | `beta1` | 0: $y = z$ (Polyak–Ruppert averaging), towards 1: $y = x$ (primal averaging) |
| $\eta_{\max}$ | `lr_max` | the largest rate so far, 0 before the first step |
| $W$ | `weight_sum` | of the weights so far, 0 before the first step |
| $c$ | `c` | share of this step in the mean |

## Departures

- The published THORN steps $z$ before $y$, which moves $y$ twice as far as it should.
- The paper's weight has a factor $t^r$ with $r = 0$ by default, which is left out.

## References

- Defazio, Yang, Mehta, Mishchenko, Khaled, Cutkosky. The road less scheduled. 2024. arXiv:2405.15682.

Examples:
    Both ways to write a step agree:

    >>> import numpy as np
    >>> theta, u = np.array([1.0]), np.array([2.0])
    >>> x, y, z = explicit_step(theta, theta, u, lr=0.25, c=0.5, beta1=0.5)
    >>> x, y, z
    (array([0.75]), array([0.625]), array([0.5]))
    >>> step(theta, theta, u, lr=0.25, c=0.5, beta1=0.5)
    (array([0.625]), array([0.5]))
    >>> averaged(y, z, beta1=0.5)
    array([0.75])
"""

from trysquare_reference._array import Array


def weigh(lr: float, lr_max: float, weight_sum: float) -> tuple[float, float, float]:
    r"""Return $\eta_{\max}$, $W$ and $c$ of this step.

    Args:
        lr: $\eta$, of this step.
        lr_max: $\eta_{\max}$ before the step.
        weight_sum: $W$ before the step.

    Examples:
        >>> weigh(0.5, lr_max=0.0, weight_sum=0.0)
        (0.5, 0.25, 1.0)
        >>> weigh(0.25, lr_max=0.5, weight_sum=0.25)
        (0.5, 0.5, 0.5)
        >>> weigh(0.0, lr_max=0.0, weight_sum=0.0)
        (0.0, 0.0, 0.0)
    """
    lr_max = max(lr_max, lr)
    w = lr_max**2
    weight_sum = weight_sum + w
    return lr_max, weight_sum, w / weight_sum if weight_sum > 0 else 0.0


def average(x: Array, z: Array, c: float) -> Array:
    """Return the mean $x$ with $z$ of this step.

    Args:
        x: The mean before the step.
        z: $z$ after the step.
        c: $c$.

    Examples:
        >>> import numpy as np
        >>> average(np.array([1.0]), np.array([3.0]), c=0.25)
        array([1.5])
    """
    return (1 - c) * x + c * z


def explicit_step(x: Array, z: Array, u: Array, lr: float, c: float, beta1: float) -> tuple[Array, Array, Array]:
    r"""Return $x, y, z$ after a step, as the paper writes it.

    Args:
        x: $x$ before the step.
        z: $z$ before the step.
        u: $u$.
        lr: $\eta$.
        c: $c$.
        beta1: $\beta_1$.

    Examples:
        >>> import numpy as np
        >>> explicit_step(np.array([1.0]), np.array([3.0]), np.array([2.0]), lr=0.5, c=0.5, beta1=0.5)
        (array([1.5]), array([1.75]), array([2.]))
    """
    z = z - lr * u
    x = average(x, z, c)
    return x, (1 - beta1) * z + beta1 * x, z


def step(y: Array, z: Array, u: Array, lr: float, c: float, beta1: float) -> tuple[Array, Array]:
    r"""Return $y, z$ after a step, without $x$.

    Args:
        y: $y$ before the step.
        z: $z$ before the step.
        u: $u$.
        lr: $\eta$.
        c: $c$.
        beta1: $\beta_1$.

    Examples:
        The same as above, from $y = 2$:

        >>> import numpy as np
        >>> step(np.array([2.0]), np.array([3.0]), np.array([2.0]), lr=0.5, c=0.5, beta1=0.5)
        (array([1.75]), array([2.]))
    """
    y = y + c * (z - y) + lr * (beta1 * (1 - c) - 1) * u
    return y, z - lr * u


def averaged(y: Array, z: Array, beta1: float) -> Array:
    r"""Return $x$, for $\beta_1 > 0$.

    Args:
        y: $y$.
        z: $z$ of the same step.
        beta1: $\beta_1$, positive: where it is 0, $y$ and $z$ are the same and $x$ must be kept.

    Examples:
        >>> import numpy as np
        >>> averaged(np.array([1.75]), np.array([2.0]), beta1=0.5)
        array([1.5])
    """
    return (y - (1 - beta1) * z) / beta1
