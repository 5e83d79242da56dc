"""Newton–Schulz iteration towards the polar factor, with the quintic of Muon (Jordan et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from trysquare.ops._scalar import Scalar

Coefficients = tuple[float, float, float]
MUON_COEFFICIENTS: Coefficients = (3.4445, -4.7750, 2.0315)


def newton_schulz(u: Tensor, steps: int, eps: Scalar, coefficients: Coefficients = MUON_COEFFICIENTS) -> Tensor:
    """n·X after ``steps`` of X ← aX + bAX + cA²X with A = XXᵀ, from X = u/n with n = ‖u‖_F; u itself where n < ε.

    ``u`` has shape (B, R, C). The smaller of the two Gram matrices is formed: XXᵀX = X(XᵀX).
    """
    tall = u.shape[-2] > u.shape[-1]
    norm = u.square().sum(dim=(-2, -1), keepdim=True).sqrt()
    x = (u / norm).mT if tall else u / norm
    for _ in range(steps):
        x = quintic(x, coefficients)
    return torch.where(norm < eps, u, (x.mT if tall else x) * norm)


def quintic(x: Tensor, coefficients: Coefficients) -> Tensor:
    """aX + (bA + cA²)X with A = XXᵀ."""
    a, b, c = coefficients
    gram = x @ x.mT
    return torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
