"""Hyperparameters enter an update as floats (eager) or as 0-dim tensors (scheduled on the device, or compiled)."""

from __future__ import annotations

from torch import Tensor

Scalar = float | Tensor


def add_scaled_(y: Tensor, x: Tensor, a: Scalar) -> Tensor:
    """y ← y + a·x. Reading a tensor would synchronise; it costs a second pass instead."""
    return y.add_(x * a) if isinstance(a, Tensor) else y.add_(x, alpha=a)


def add_scaled_square_(y: Tensor, x: Tensor, a: Scalar) -> Tensor:
    """y ← y + a·x²."""
    return y.add_(x.square().mul_(a)) if isinstance(a, Tensor) else y.addcmul_(x, x, value=a)
