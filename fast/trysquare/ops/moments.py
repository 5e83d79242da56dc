"""Nesterov momentum and the second moment, on batches (B, R, C)."""

from __future__ import annotations

import torch
from torch import Tensor

from trysquare.ops._scalar import Scalar, add_scaled_square_


def nesterov_(momentum_buffer: Tensor, gradient: Tensor, momentum: Scalar, out: Tensor | None = None) -> Tensor:
    """m ← μ·m + g; returns u = g + μ·m, as a new tensor or in ``out``."""
    if isinstance(momentum, Tensor):
        momentum_buffer.mul_(momentum).add_(gradient)
        return torch.add(gradient, momentum_buffer * momentum, out=out)
    torch.add(gradient, momentum_buffer, alpha=momentum, out=momentum_buffer)
    return torch.add(gradient, momentum_buffer, alpha=momentum, out=out)


def second_moment_(exp_avg_sq: Tensor, gradient: Tensor, beta2: Scalar, rest: Scalar | None = None) -> Tensor:
    """v ← β₂·v + (1 − β₂)·g²; ``rest`` is 1 − β₂ where β₂ itself has too few digits left to tell."""
    return add_scaled_square_(exp_avg_sq.mul_(beta2), gradient, 1 - beta2 if rest is None else rest)


def correction(step: Tensor, beta2: float, dtype: torch.dtype) -> Tensor:
    """1/√(1 − β₂ᵗ) of every slice, shape (B, 1, 1), from t in float64, shape (B,)."""
    return (1 - beta2**step).rsqrt().to(dtype).view(-1, 1, 1)


def denominator(exp_avg_sq: Tensor, eps: Scalar, correction: Tensor | None) -> Tensor:
    """√v̂ + ε; v̂ is v times the square of the correction (None: v itself)."""
    root = exp_avg_sq.sqrt()
    return (root if correction is None else root.mul_(correction)).add_(eps)
