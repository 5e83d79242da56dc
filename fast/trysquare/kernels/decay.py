"""Cautious decay, named as in `ops.decay`."""

from __future__ import annotations

import triton
from triton import language as tl


@triton.jit
def cautious_decay(u, theta, weight_decay):
    """u + λθ where u does not point away from zero, by signs: u·θ can underflow. u where λ = 0, also beside inf."""
    against = ((u > 0) & (theta < 0)) | ((u < 0) & (theta > 0))
    decay = tl.where(weight_decay == 0, tl.zeros_like(theta), theta * weight_decay)
    return tl.where(against, u, u + decay)
