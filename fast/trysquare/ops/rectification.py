"""The variance rectification of RAdam (Liu et al. 2020, arXiv 1908.03265)."""

from __future__ import annotations

import torch
from torch import Tensor


def rectification(step: Tensor, beta2: float) -> Tensor:
    """r of every step count t ≥ 1 (float64, any shape): 0 while ρ ≤ 4, towards 1 after that; 1 if β₂ = 0.

    ρ∞ = 2/(1 − β₂) − 1 and ρ = ρ∞ − 2tβ₂ᵗ/(1 − β₂ᵗ).
    """
    if beta2 == 0:
        return torch.ones_like(step)
    limit = 2 / (1 - beta2) - 1
    if limit <= 4:
        return torch.zeros_like(step)
    power = beta2**step
    rho = limit - 2 * step * power / (1 - power)
    share = (rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)
    return torch.where(rho > 4, share, 0.0).sqrt()
