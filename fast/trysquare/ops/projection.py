"""Projection of the rows of one matrix off the rows of another (⊥Grad, Prieto et al. 2025, arXiv 2501.04697).

The coefficient of every row and its subtraction are two functions: the first is a reduction, the second fuses into
the elementwise update that follows it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trysquare.ops._scalar import Scalar

SMALLEST_SQUARE = 1e-30
LARGEST_SQUARE = 1e38


def project_rows_(g: Tensor, w: Tensor) -> Tensor:
    """g ← g − w·⟨w,g⟩/(⟨w,w⟩ + 1e-30) per row; a row with ⟨w,w⟩ outside [1e-30, 1e38] stays as it is."""
    return subtract_(g, w, gradient_coefficient(g, w))


def project_update_rows_(u: Tensor, w: Tensor, eps: Scalar) -> Tensor:
    """u ← u − w·⟨w,u⟩/⟨w,w⟩ per row; a row with ⟨w,w⟩ < ε stays as it is (the rule of the package dolphinflow)."""
    return subtract_(u, w, update_coefficient(u, w, eps))


def gradient_coefficient(g: Tensor, w: Tensor) -> Tensor:
    """⟨w,g⟩/(⟨w,w⟩ + 1e-30) of every row, 0 where ⟨w,w⟩ is outside [1e-30, 1e38]; shape (B, R, 1)."""
    return coefficient(*row_products(g, w))


def coefficient(along: Tensor, square: Tensor) -> Tensor:
    """The same from ⟨w,g⟩ and ⟨w,w⟩."""
    outside = square.clamp(SMALLEST_SQUARE, LARGEST_SQUARE) != square  # as NaN is, too
    return (along / (square + SMALLEST_SQUARE)).masked_fill_(outside, 0.0)


def update_coefficient(u: Tensor, w: Tensor, eps: Scalar) -> Tensor:
    """⟨w,u⟩/⟨w,w⟩ of every row, 0 where ⟨w,w⟩ < ε; shape (B, R, 1)."""
    along, square = row_products(u, w)
    return torch.where(square < eps, 0.0, along / square)


def row_products(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """⟨w,x⟩ and ⟨w,w⟩ of every row, each of shape (B, R, 1).

    Compiled they are stacked, because inductor then takes both sums in one loop over the row; on torch 2.13 its CPU
    code generation fails on the direct form. Eager, a length needs no product in memory.
    """
    if not torch.compiler.is_compiling():
        return (w * x).sum(-1, keepdim=True), torch.linalg.vector_norm(w, dim=-1, keepdim=True).square_()
    products = torch.stack([(w * x).sum(-1, keepdim=True), (w * w).sum(-1, keepdim=True)])
    return products[0], products[1]


def subtract_(x: Tensor, w: Tensor, coefficient: Tensor) -> Tensor:
    """x ← x − c·w with one c per row; where c = 0 the row stays, also beside weights that are not finite.

    Compiled that is selected in the same loop. Eager, a selection takes four times as long as to make all w finite,
    and to look whether one is not would be to wait for the device.
    """
    w = torch.where(coefficient == 0, 0.0, w) if torch.compiler.is_compiling() else w.nan_to_num(0.0)
    return x.addcmul_(w, coefficient, value=-1)
