"""Rows of an orthogonalized update brought to one size, on batches (B, R, C) (NorMuon, arXiv 2510.05491)."""

from __future__ import annotations

import torch
from torch import Tensor

from trysquare.ops import clipping
from trysquare.ops._scalar import Scalar, add_scaled_


def normalize_rows_(x: Tensor, row_exp_avg_sq: Tensor, beta2: Scalar, eps: Scalar) -> Tensor:
    """v ← β₂·v + (1 − β₂)·q with q the mean square of every row; X ← X/√max(v, ε), brought back to its ‖·‖_F.

    ``x`` is (B, R, C), ``row_exp_avg_sq`` (B, R, 1), both written. Norms follow from q alone: a row that is divided by
    d has the mean square q/d².
    """
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])  # one pass over X
    add_scaled_(row_exp_avg_sq.mul_(beta2), mean_square, 1 - beta2)
    factor = row_exp_avg_sq.clamp(min=eps).rsqrt()
    before = _norm(mean_square, x.shape[-1])
    after = _norm(mean_square * factor.square(), x.shape[-1])
    return x.mul_(factor * (before / after.clamp(min=eps)).to(x.dtype))


def _norm(mean_square: Tensor, columns: int) -> Tensor:
    """‖·‖_F of each slice, shape (B, 1, 1), from the mean squares of its rows."""
    wide = mean_square.to(clipping.wide_dtype(mean_square.device))
    return (wide.sum(-2, keepdim=True) * columns).sqrt()
