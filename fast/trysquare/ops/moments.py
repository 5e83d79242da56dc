"""Nesterov momentum and the second moment, on batches (B, R, C)."""

from __future__ import annotations

import torch
from torch import Tensor

from trysquare.ops._scalar import Scalar, add_scaled_square_


def nesterov_(momentum_buffer: Tensor, gradient: Tensor, momentum: Scalar) -> Tensor:
    """m ← μ·m + g; returns u = g + μ·m as a new tensor."""
    momentum_buffer.mul_(momentum).add_(gradient)
    if isinstance(momentum, Tensor):
        return gradient + momentum_buffer * momentum
    return torch.add(gradient, momentum_buffer, alpha=momentum)


def second_moment_(exp_avg_sq: Tensor, gradient: Tensor, beta2: Scalar) -> Tensor:
    """v ← β₂·v + (1 − β₂)·g²."""
    return add_scaled_square_(exp_avg_sq.mul_(beta2), gradient, 1 - beta2)


def denominator(exp_avg_sq: Tensor, step: Tensor, beta2: Scalar, eps: Scalar, bias_correction: bool) -> Tensor:
    """√v̂ + ε with v̂ = v/(1 − β₂ᵗ), or v without bias correction; ``step`` holds t of every slice, shape (B,)."""
    root = exp_avg_sq.sqrt()
    if bias_correction:
        root.mul_((1 - beta2**step).rsqrt().to(root.dtype).view(-1, 1, 1))
    return root.add_(eps)
