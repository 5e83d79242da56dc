"""Decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101)."""

from __future__ import annotations

from torch import Tensor

from trysquare.ops._scalar import Scalar


def decoupled_decay_(theta: Tensor, lr: Scalar, weight_decay: Scalar) -> Tensor:
    """θ ← θ·(1 − ηλ)."""
    return theta.mul_(1 - lr * weight_decay)
