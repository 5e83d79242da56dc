"""The loss-aware schedule as an optimizer has it: arguments that concern all groups, and what each group carries."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from trysquare._constraints import Constraint, Integer, Number
from trysquare._optimizer import BatchedOptimizer, Group
from trysquare.ops import loss_schedule
from trysquare.ops._scalar import Scalar


class LossAware(BatchedOptimizer):
    """Base of optimizers with ``loss_aware_schedule``."""

    _global: ClassVar[frozenset[str]] = frozenset({"gradient_clipping", "loss_aware_schedule", "loss_ema_beta"})
    _carried: ClassVar[Mapping[str, tuple[Any, Constraint]]] = {
        "loss_ema": (None, Number(low=-math.inf, none=True)),
        "stall_count": (0, Integer(0)),
        "loss_lr_scale": (1.0, Number()),
    }

    def _before_step(self, closure: Callable[[], Any] | None) -> None:
        if closure is None and self.param_groups[0]["loss_aware_schedule"]:
            raise ValueError("loss_aware_schedule=True needs the loss: call step(closure) with one that returns it")

    def _after_closure(self, loss: Any) -> None:
        if not self.param_groups[0]["loss_aware_schedule"]:
            return
        try:
            number = float(loss)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"loss_aware_schedule=True needs the loss as one number, but the closure returned {loss!r}"
            ) from error
        for group in self.param_groups:
            past = group["loss_ema"], group["stall_count"], group["loss_lr_scale"]
            now = loss_schedule.update(*past, number, group["loss_ema_beta"])
            group["loss_ema"], group["stall_count"], group["loss_lr_scale"] = now


def rate(group: Group) -> Scalar:
    """The learning rate times what the loss-aware schedule has left of it."""
    lr: Scalar = group["lr"]
    left: float = group["loss_lr_scale"]
    return lr if left == 1.0 else lr * left
