"""Lower the learning rate a little whenever the loss has not improved on its running mean for five steps."""

from __future__ import annotations

import math

PATIENCE = 5
FACTOR = 0.99
TOLERANCE = 1e-8


def update(
    loss_ema: float | None, stall_count: int, loss_lr_scale: float, loss: float, loss_ema_beta: float
) -> tuple[float | None, int, float]:
    """(loss_ema, stall_count, loss_lr_scale) after ``loss``; a loss that is not finite changes nothing."""
    if not math.isfinite(loss):
        return loss_ema, stall_count, loss_lr_scale
    mean = loss if loss_ema is None else loss_ema
    stall_count = stall_count + 1 if loss >= mean - TOLERANCE else 0
    if stall_count == PATIENCE:
        stall_count, loss_lr_scale = 0, loss_lr_scale * FACTOR
    return loss_ema_beta * mean + (1 - loss_ema_beta) * loss, stall_count, loss_lr_scale
