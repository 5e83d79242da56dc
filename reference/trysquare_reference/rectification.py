r"""Rectification (RAdam): hold the first steps back, whose second moment rests on too few gradients.

It does by itself what a warm-up of the learning rate does by hand.

## Equations

At step $t = 1, 2, \dots$:

$$ \rho_\infty = \frac{2}{1 - \beta_2} - 1, \qquad
   \rho = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t}, \qquad
   r = \sqrt{\frac{(\rho - 4)(\rho - 2)\,\rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2)\,\rho}}
   \text{ if } \rho > 4, \qquad r = 0 \text{ otherwise.} $$

$\rho$ is 1 at the first step whatever $\beta_2$ is, and passes 4 at the fifth if $\beta_2 \ge 0.7734$; $r$ tends to 1.
For $0 < \beta_2 \le 0.6$ it never passes 4 and nothing ever moves.

## Symbols

| symbol | argument | meaning |
|---|---|---|
| $t$ | `step` | number of this step, from 1 |
| $\beta_2$ | `beta2` | decay of the second moment, in [0, 1); 0 keeps none and needs no rectification: $r = 1$ |

## Departures

- RAdam steps by momentum alone while $\rho \le 4$, torch's while $\rho \le 5$; here nothing moves ("silent phase").

## References

- Liu, Jiang, He, Chen, Liu, Gao, Han. On the variance of the adaptive learning rate and beyond. 2019.
  arXiv:1908.03265.

Examples:
    >>> [round(rectification(t, 0.99), 7) for t in (1, 4, 5, 6, 1000)]
    [0.0, 0.0, 0.054471, 0.0816792, 0.9997764]
"""

import math


def rectification(step: int, beta2: float) -> float:
    r"""Return $r$.

    Args:
        step: $t$, from 1.
        beta2: $\beta_2$.

    Examples:
        >>> [round(rectification(5, beta2), 7) for beta2 in (0.95, 0.99, 0.999, 0.75, 0.0)]
        [0.1181397, 0.054471, 0.0173115, 0.0, 1.0]
    """
    if beta2 == 0:
        return 1.0
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * step * beta2**step / (1 - beta2**step)
    if rho <= 4:
        return 0.0
    return math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
