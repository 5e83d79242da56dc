r"""Loss-aware schedule: lower the learning rate a little each time the loss has stalled for five steps in a row.

A step stalls if its loss is not below a running mean of the losses before it. The factor multiplies whatever
learning rate the user or a scheduler has set.

## Equations

At each step with loss $L$; the first loss initialises $\bar L$:

$$ k \leftarrow \begin{cases} k + 1 & L \ge \bar L - 10^{-8} \\ 0 & \text{otherwise} \end{cases} \qquad
   \text{at } k = 5\colon\; r \leftarrow 0.99\,r,\; k \leftarrow 0; \qquad
   \bar L \leftarrow \beta \bar L + (1 - \beta) L $$

The step uses $\eta r$ in place of $\eta$. A loss that is not finite changes nothing.

## Symbols

| symbol | argument | meaning |
|---|---|---|
| $L$ | `loss` | loss of this step |
| $\bar L$ | `loss_ema` | running mean, None before the first loss |
| $k$ | `stall_count` | stalled steps in a row |
| $r$ | `loss_lr_scale` | factor of the learning rate |
| $\beta$ | `loss_ema_beta` | in [0, 1) |

## Departures

- The published package crashes on its first step with the schedule on, and it means to write the learning rate itself,
  which the next scheduler step overwrites; $r$ is kept beside it.
- The first loss equals the mean that it initialises, and counts as one stall.

## References

- `dolphinflow` 0.2.0, `_update_lr_from_loss`.

Examples:
    >>> schedule = LossSchedule()
    >>> for loss in (1.0, 1.0, 1.0, 1.0, 1.0):
    ...     schedule = update(schedule, loss, loss_ema_beta=0.98)
    >>> schedule
    LossSchedule(loss_ema=1.0, stall_count=0, loss_lr_scale=0.99)
"""

import math
from dataclasses import dataclass, replace

PATIENCE = 5
DECAY = 0.99
MARGIN = 1e-8


@dataclass(frozen=True)
class LossSchedule:
    r"""What the schedule remembers between steps, Python numbers.

    Attributes:
        loss_ema: $\bar L$, None before the first finite loss.
        stall_count: $k$.
        loss_lr_scale: $r$.
    """

    loss_ema: float | None = None
    stall_count: int = 0
    loss_lr_scale: float = 1.0


def update(schedule: LossSchedule, loss: float, loss_ema_beta: float) -> LossSchedule:
    r"""Return the schedule after a step with this loss.

    Args:
        schedule: The schedule before the step.
        loss: $L$.
        loss_ema_beta: $\beta$.

    Examples:
        >>> update(LossSchedule(loss_ema=2.0, stall_count=3), 1.0, loss_ema_beta=0.5)
        LossSchedule(loss_ema=1.5, stall_count=0, loss_lr_scale=1.0)
        >>> update(LossSchedule(loss_ema=2.0, stall_count=3), float("nan"), loss_ema_beta=0.5)
        LossSchedule(loss_ema=2.0, stall_count=3, loss_lr_scale=1.0)
    """
    if not math.isfinite(loss):
        return schedule
    mean = loss if schedule.loss_ema is None else schedule.loss_ema
    stalls = schedule.stall_count + 1 if loss >= mean - MARGIN else 0
    scale = schedule.loss_lr_scale
    if stalls == PATIENCE:
        stalls, scale = 0, DECAY * scale
    mean = loss_ema_beta * mean + (1 - loss_ema_beta) * loss
    return replace(schedule, loss_ema=mean, stall_count=stalls, loss_lr_scale=scale)
