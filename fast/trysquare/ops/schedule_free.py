"""Schedule-free averaging (arXiv 2405.15682): gradients at y, steps at z, and their mean x, which y and z determine."""

from __future__ import annotations

import torch
from torch import Tensor

from trysquare.ops._scalar import Scalar


def weigh(lr: Tensor, lr_max: Tensor, weight_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest rate so far, the sum W of its squares w, and the share c = w/W of this step (0 if W = 0)."""
    lr_max = torch.maximum(lr_max, lr)
    weight = lr_max.square()
    weight_sum = weight_sum + weight
    return lr_max, weight_sum, torch.where(weight_sum > 0, weight / weight_sum, 0.0)


def pull(lr: Tensor, share: Tensor, beta1: float) -> Tensor:
    """What u moves y by: η·(β₁(1 − c) − 1)."""
    return lr * (beta1 * (1 - share) - 1)


def step_(y: Tensor, z: Tensor, u: Tensor, lr: Tensor, share: Tensor, pull: Tensor) -> None:
    """y ← y + c·(z − y) + pull·u, then z ← z − η·u; the rates are one a slice, shape (B, 1, 1)."""
    y.add_((z - y).mul_(share)).add_(u * pull)
    z.sub_(u * lr)


def average_(x: Tensor, z: Tensor, share: Tensor) -> Tensor:
    """x ← (1 − c)·x + c·z."""
    return x.add_((z - x).mul_(share))


def averaged(y: Tensor, z: Tensor, beta1: Scalar) -> Tensor:
    """x = (y − (1 − β₁)·z)/β₁, for β₁ > 0."""
    return (y - z * (1 - beta1)) / beta1
