"""One step of DolphinFlow8bit, in the order of the reference page."""

from __future__ import annotations

import torch
from torch import Tensor

from trysquare.ops import blockwise8bit, decay, moments, polar, projection
from trysquare.ops._scalar import Scalar, add_scaled_, add_scaled_square_
from trysquare.ops.dolphinflow import clipped


def orthogonalized(gradient: Tensor, scale: Tensor | None, steps: int, eps: Scalar, dtype: torch.dtype) -> Tensor:
    """The clipped gradient (B, R, C) after its Newton–Schulz iterations."""
    return polar.newton_schulz(clipped(gradient, scale, dtype), steps, eps)


def row_coefficient(theta: Tensor, gradient: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """How much of every row of θ the clipped gradient holds, shape (B, R, 1)."""
    return projection.gradient_coefficient(clipped(gradient, scale, dtype), theta.to(dtype))


def direction(theta: Tensor, gradient: Tensor, scale: Tensor | None, coefficient: Tensor | None) -> Tensor:
    """g̃ in the dtype of θ: the gradient clipped, and projected off θ by what `row_coefficient` found."""
    g = clipped(gradient, scale, theta.dtype)
    if coefficient is None:
        return g
    return projection.subtract_(g.clone() if g is gradient else g, theta, coefficient)


def products(w: Tensor, g: Tensor) -> Tensor:
    """⟨w,g⟩ and ⟨w,w⟩ of a part of a row, shape (2,)."""
    wide = w.float()
    return torch.stack([(wide * g).sum(), (wide * wide).sum()])


def average_(m: Tensor, g: Tensor, beta: Scalar, rest: Scalar) -> Tensor:
    """m ← β·m + rest·g. The rest is 1 − β, or 1; the difference of two float32 would miss it by several roundings."""
    return add_scaled_(m.mul_(beta), g, rest)


def average_square_(v: Tensor, g: Tensor, beta: Scalar, rest: Scalar) -> Tensor:
    """v ← β·v + rest·g²."""
    return add_scaled_square_(v.mul_(beta), g, rest)


def move_(
    theta: Tensor,
    m: Tensor,
    v: Tensor | None,
    correction1: Tensor | None,
    correction2: Tensor | None,
    lr: Scalar,
    weight_decay: Scalar,
    eps: Scalar,
) -> None:
    """θ ← θ(1 − ηλ) − ηu, where u is m̂/(√v̂ + ε), or m without a second moment."""
    u = m if v is None or correction1 is None else m * correction1 / moments.denominator(v, eps, correction2)
    decay.decoupled_decay_(theta, lr, weight_decay)
    add_scaled_(theta, u, -lr)


def update_(
    theta: Tensor,
    gradient: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    correction1: Tensor | None,
    correction2: Tensor | None,
    scale: Tensor | None,
    coefficient: Tensor | None,
    lr: Scalar,
    weight_decay: Scalar,
    beta1: Scalar,
    rest1: Scalar,
    beta2: Scalar,
    rest2: Scalar,
    eps: Scalar,
) -> None:
    """Steps ``theta`` and its moments, which are kept as they are, in place; all (B, R, C), corrections (B, 1, 1)."""
    wide = theta.to(state1.dtype)
    g = direction(wide, gradient, scale, coefficient)
    m = average_(state1, g, beta1, rest1)
    v = None if state2 is None else average_square_(state2, g, beta2, rest2)
    move_(wide, m, v, correction1, correction2, lr, weight_decay, eps)
    if wide is not theta:
        theta.copy_(wide)


def update_coded_(
    theta: Tensor,
    gradient: Tensor,
    codes1: Tensor,
    absmax1: Tensor,
    qmap1: Tensor,
    bounds1: Tensor,
    codes2: Tensor | None,
    absmax2: Tensor | None,
    qmap2: Tensor | None,
    bounds2: Tensor | None,
    correction1: Tensor | None,
    correction2: Tensor | None,
    scale: Tensor | None,
    coefficient: Tensor | None,
    lr: Scalar,
    weight_decay: Scalar,
    beta1: Scalar,
    rest1: Scalar,
    beta2: Scalar,
    rest2: Scalar,
    eps: Scalar,
) -> None:
    """Steps ``theta`` and its coded moments in place; θ, gradient and codes are (K, 256), scales (K,).

    ``bounds`` are the boundaries of the maps; without a second moment everything of it is None.
    """
    for whole in (theta, gradient, codes1):  # torch.compile, told the width, compiles sooner and without remainders
        if whole.shape[-1] != blockwise8bit.BLOCK:
            raise ValueError(f"shape {tuple(whole.shape)}: the last dimension must be {blockwise8bit.BLOCK}")
    m = blockwise8bit.dequantize(codes1, absmax1, qmap1)
    v = None
    if codes2 is not None and absmax2 is not None and qmap2 is not None:
        v = blockwise8bit.dequantize(codes2, absmax2, qmap2)
    places = codes1, absmax1, bounds1, codes2, absmax2, bounds2
    numbers = lr, weight_decay, beta1, rest1, beta2, rest2, eps
    update_decoded_(theta, gradient, m, v, *places, correction1, correction2, scale, coefficient, *numbers)


def update_decoded_(
    theta: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor | None,
    codes1: Tensor,
    absmax1: Tensor,
    bounds1: Tensor,
    codes2: Tensor | None,
    absmax2: Tensor | None,
    bounds2: Tensor | None,
    correction1: Tensor | None,
    correction2: Tensor | None,
    scale: Tensor | None,
    coefficient: Tensor | None,
    lr: Scalar,
    weight_decay: Scalar,
    beta1: Scalar,
    rest1: Scalar,
    beta2: Scalar,
    rest2: Scalar,
    eps: Scalar,
) -> None:
    """The same with the moments as float32, which it may write into, beside the places of their codes."""
    wide = theta.float()
    g = direction(wide, gradient, scale, coefficient)
    m = average_(m, g, beta1, rest1)
    if v is not None and codes2 is not None and absmax2 is not None and bounds2 is not None:
        v = average_square_(v, g, beta2, rest2)
        write_(codes2, absmax2, *blockwise8bit.quantize_unsigned(v, bounds2))
    move_(wide, m, v, correction1, correction2, lr, weight_decay, eps)
    if wide is not theta:
        theta.copy_(wide)
    write_(codes1, absmax1, *blockwise8bit.quantize_signed(m, bounds1))


def write_(codes: Tensor, absmax: Tensor, new_codes: Tensor, new_absmax: Tensor) -> None:
    """Put new codes and scales in place of the old."""
    codes.copy_(new_codes)
    absmax.copy_(new_absmax)
