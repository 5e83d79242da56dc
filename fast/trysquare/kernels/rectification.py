"""RAdam's rectification, named as in `ops.rectification`."""

from __future__ import annotations

import triton
from triton import language as tl


@triton.jit
def rectification(t, beta2, log2_beta2):
    """r of step counts t ≥ 1 in float64: 0 while ρ ≤ 4, 1 if β₂ = 0; without a branch on any number."""
    limit = 2.0 / (1.0 - beta2) - 1.0
    power = tl.exp2(t * log2_beta2)
    rho = limit - 2.0 * t * power / (1.0 - power)
    rho = tl.where(limit > 4.0, rho, 0.0)
    active = rho > 4.0
    rho = tl.where(active, rho, 5.0)
    below = tl.where(active, (limit - 4.0) * (limit - 2.0) * rho, 1.0)
    share = tl.where(active, (rho - 4.0) * (rho - 2.0) * limit, 0.0)
    return tl.where(beta2 > 0.0, tl.sqrt(share / below), 1.0)
