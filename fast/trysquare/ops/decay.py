"""Weight decay, decoupled (Loshchilov and Hutter 2019, arXiv 1711.05101) and cautious (arXiv 2510.12402)."""

from __future__ import annotations

from torch import Tensor

from trysquare.ops._scalar import Scalar, add_scaled_


def decoupled_decay_(theta: Tensor, lr: Scalar, weight_decay: Scalar) -> Tensor:
    """θ ← θ·(1 − ηλ)."""
    return theta.mul_(1 - lr * weight_decay)


def cautious_decay_(u: Tensor, theta: Tensor, weight_decay: Scalar) -> Tensor:
    """u ← u + λθ where u does not point away from zero: where u = 0 or θ = 0 or their signs agree.

    There the sign of u times θ is not negative. It is the sign that is multiplied, as u·θ can underflow; and nothing is
    selected by a mask, which on a CPU takes six times as long: θ is multiplied by 1 there, and by 0 elsewhere.
    """
    if not isinstance(weight_decay, Tensor) and weight_decay == 0:
        return u
    along = u.sign().mul_(theta).ge_(0)
    if isinstance(weight_decay, Tensor):
        return add_scaled_(u, along.mul_(theta), weight_decay)
    return u.addcmul_(theta, along, value=weight_decay)
