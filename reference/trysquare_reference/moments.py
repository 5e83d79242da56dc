r"""Moments: Nesterov momentum for the direction of the update, a second moment for the size of its entries.

The first averages the noise of the batches out, the second gives every entry a step of about the same size.

## Equations

Momentum in the form of SGD, from $m = 0$:

$$ m \leftarrow \mu m + g, \qquad u = g + \mu m $$

Second moment from $v = 0$, then the adapted update at step $t = 1, 2, \dots$:

$$ v \leftarrow \beta_2 v + (1 - \beta_2)\,g^2, \qquad
   \hat v = \frac{v}{1 - \beta_2^t} \text{ with bias correction, else } v, \qquad
   u \leftarrow \frac{u}{\sqrt{\hat v} + \varepsilon} $$

## Symbols

| symbol | argument | meaning |
|---|---|---|
| $m$ | `m` | momentum buffer |
| $v$ | `v` | running mean of the squared gradient, `exp_avg_sq` in the state |
| $g$ | `g` | gradient |
| $u$ | `u` | update |
| $\mu$ | `momentum` | in [0, 1) |
| $\beta_2$ | `beta2` | in [0, 1); `beta` where it may be that of another mean |
| $\varepsilon$ | `eps` | outside the root, positive |
| $t$ | `step` | number of this step, from 1 |

## Departures

- Adam averages the first moment, $m \leftarrow \beta_1 m + (1 - \beta_1) g$; this momentum sums, as SGD's does, and
  is $1/(1-\mu)$ times as long. Under a constant gradient the adapted update is therefore $10\,\mathrm{sign}(g)$ in
  the steady state for $\mu = 0.9$.
- Only $v$ is corrected for its bias. The first update is $1.9\,\mathrm{sign}(g)$; the published package corrects
  nothing and starts with $19\,\mathrm{sign}(g)$ (`bias_correction=False`).
- $\beta^t$ is taken in float64 whatever the precision of the mean (`dtype=np.float64` below says so also when this page
  runs in simulated float32): with $\beta_2 = 0.999$ as float32 holds it, $1 - \beta_2$ is off by $10^{-5}$ already.

## References

- Sutskever, Martens, Dahl, Hinton. On the importance of initialization and momentum in deep learning. 2013.
- Kingma, Ba. Adam: a method for stochastic optimization. 2014. arXiv:1412.6980.

Examples:
    >>> g, zero = np.array([2.0, -4.0]), np.zeros(2)
    >>> m, u = nesterov(zero, g, momentum=0.5)
    >>> m, u
    (array([ 2., -4.]), array([ 3., -6.]))
    >>> adapt(u, second_moment(zero, g, beta2=0.75), step=1, beta2=0.75, eps=1.0, bias_correction=True)
    array([ 1. , -1.2])
"""

import numpy as np

from trysquare_reference._array import Array


def nesterov(m: Array, g: Array, momentum: float) -> tuple[Array, Array]:
    r"""Return the new momentum buffer $m$ and the update $u$.

    Args:
        m: Momentum buffer before the step.
        g: Gradient, shaped as `m`.
        momentum: $\mu$.

    Examples:
        >>> nesterov(np.array([1.0]), np.array([2.0]), momentum=0.5)
        (array([2.5]), array([3.25]))
    """
    m = momentum * m + g
    u = g + momentum * m
    return m, u


def second_moment(v: Array, g: Array, beta2: float) -> Array:
    r"""Return the new running mean $v$ of the squared gradient.

    Args:
        v: The mean before the step.
        g: Gradient, shaped as `v`.
        beta2: $\beta_2$.

    Examples:
        >>> second_moment(np.array([4.0]), np.array([2.0]), beta2=0.5)
        array([4.])
    """
    return beta2 * v + (1 - beta2) * np.square(g)


def bias_corrected(mean: Array, beta: float, step: int) -> Array:
    r"""Return a running mean that began at zero over the weight of its gradients, $1 - \beta^t$.

    Args:
        mean: A moment after this step.
        beta: $\beta$ of this mean.
        step: $t$, from 1.

    Examples:
        >>> bias_corrected(np.array([7.0]), beta=0.5, step=3)
        array([8.])
    """
    # a 0-dimensional array like the mean, not a Python number: in simulated precision the power then errs too
    power = np.power(np.full_like(mean, beta, shape=(), dtype=np.float64), step, dtype=np.float64)
    corrected: Array = mean / (1 - power)
    return corrected


def adapt(u: Array, v: Array, step: int, beta2: float, eps: float, bias_correction: bool) -> Array:
    r"""Return the update with every entry divided by the root of its second moment.

    Args:
        u: Update.
        v: Second moment after this step, shaped as `u`.
        step: $t$, from 1.
        beta2: $\beta_2$.
        eps: $\varepsilon$.
        bias_correction: Whether $v$ is divided by $1 - \beta_2^t$ first.

    Examples:
        >>> adapt(np.array([3.0]), np.array([4.0]), step=1, beta2=0.75, eps=0.5, bias_correction=False)
        array([1.2])
    """
    v_hat = bias_corrected(v, beta2, step) if bias_correction else v
    return u / (np.sqrt(v_hat) + eps)
