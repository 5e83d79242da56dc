"""The steps of THORN on a batch, in the order of the reference page: one for each kind of group."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from trysquare.ops import _scratch, decay, moments, polar, row_norm, schedule_free
from trysquare.ops._row_blocks import row_blocks
from trysquare.ops._scalar import Scalar, add_scaled_


class Rule(NamedTuple):
    """What selects a formula rather than a number; a compiled update exists once per rule."""

    coefficients: tuple[polar.Coefficients, ...]
    safety_factor: float
    matmul_dtype: torch.dtype
    form: str


def scale(rows: int, columns: int, target_rms: float) -> float:
    """The factor of the learning rate of an R × C matrix: ρ√max(R, C), or √max(1, R/C) if ρ = 0."""
    return target_rms * math.sqrt(max(rows, columns)) if target_rms > 0 else math.sqrt(max(1.0, rows / columns))


def prepare_(momentum_buffer: Tensor, gradient: Tensor, momentum: Scalar) -> Tensor:
    """m ← β₁m + g; returns u = g + β₁m, of which the polar factor is taken, as a new tensor."""
    dtype, (first, *others) = momentum_buffer.dtype, row_blocks(momentum_buffer)
    if not others:
        return moments.nesterov_(momentum_buffer, gradient.to(dtype), momentum)
    u = _scratch.empty(_scratch.UPDATE, momentum_buffer.shape, dtype, momentum_buffer.device)
    for block in (first, *others):
        moments.nesterov_(momentum_buffer[block], gradient[block].to(dtype), momentum, u[block])
    return u


def apply_(
    theta: Tensor,
    x: Tensor,
    row_exp_avg_sq: Tensor | None,
    rate: Tensor,
    weight_decay: Scalar,
    eps: Scalar,
    beta2: Scalar,
) -> None:
    """Steps ``theta``, (B, R, C), and ``row_exp_avg_sq``, (B, R, 1) (None: rows stay), along the polar factor ``x``.

    ``rate`` is η times scale and rectification, (B, 1, 1); ``x`` is used up.
    """
    if row_exp_avg_sq is not None:
        x = row_norm.normalize_rows_(x, row_exp_avg_sq, beta2, eps)
    for block in row_blocks(x):
        descend_(theta[block], x[block], rate[block[0]], weight_decay)


def accumulate_(momentum_buffer: Tensor, gradient: Tensor, momentum: Scalar) -> None:
    """m ← β₁m + g: what gradient release does with a matrix between two of its updates."""
    momentum_buffer.mul_(momentum).add_(gradient)


def schedule_free_(
    theta: Tensor,
    gradient: Tensor,
    z: Tensor,
    exp_avg_sq: Tensor,
    y: Tensor | None,
    x: Tensor | None,
    correction: Tensor,
    lr: Tensor,
    share: Tensor,
    pull: Tensor,
    weight_decay: Scalar,
    eps: Scalar,
    beta2: Scalar,
) -> None:
    """Steps everything that is given in place, each (B, R, C), but for ``gradient``.

    ``y`` is the exact value of a half-precision ``theta`` (None: ``theta`` itself), ``x`` the mean where it does not
    follow from y and z (None: it does). Of every slice, (B, 1, 1): ``correction`` is 1/√(1 − β₂ᵗ), ``share`` the c of
    this step and ``pull`` what u moves y by.
    """
    u = adam_update(gradient.to(z.dtype), exp_avg_sq, correction, eps, beta2)
    follow_(theta, u, z, y, x, lr, share, pull, weight_decay)


def collect_(
    update_sum: Tensor,
    gradient: Tensor,
    exp_avg_sq: Tensor,
    correction: Tensor,
    part: Scalar,
    eps: Scalar,
    beta2: Scalar,
) -> None:
    """S ← S + u/N with ``part`` = 1/N: what gradient release does between two of its updates."""
    u = adam_update(gradient.to(update_sum.dtype), exp_avg_sq, correction, eps, beta2)
    add_scaled_(update_sum, u, part)


def adam_update(gradient: Tensor, exp_avg_sq: Tensor, correction: Tensor, eps: Scalar, beta2: Scalar) -> Tensor:
    """v ← β₂v + (1 − β₂)g²; returns u = g/(√v̂ + ε) as a new tensor."""
    moments.second_moment_(exp_avg_sq, gradient, beta2)
    return gradient / moments.denominator(exp_avg_sq, eps, correction)


def follow_(
    theta: Tensor,
    u: Tensor,
    z: Tensor,
    y: Tensor | None,
    x: Tensor | None,
    lr: Tensor,
    share: Tensor,
    pull: Tensor,
    weight_decay: Scalar,
) -> None:
    """Decay, and a schedule-free step along u, which is used up."""
    exact = theta if y is None else y
    u = decay.cautious_decay_(u, exact, weight_decay)
    schedule_free.step_(exact, z, u, lr, share, pull)
    if x is not None:
        schedule_free.average_(x, z, share)
    if y is not None:
        theta.copy_(y)


def adam_(
    theta: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    mean_correction: Tensor,
    correction: Tensor,
    lr: Tensor,
    weight_decay: Scalar,
    eps: Scalar,
    beta1: Scalar,
    beta2: Scalar,
) -> None:
    """Steps ``theta``, ``exp_avg`` and ``exp_avg_sq``, each (B, R, C), in place: Adam with cautious decay.

    ``mean_correction`` is 1/(1 − β₁ᵗ), ``correction`` 1/√(1 − β₂ᵗ), ``lr`` η times rectification, each (B, 1, 1).
    """
    u = mean_update(gradient.to(exp_avg.dtype), exp_avg, exp_avg_sq, mean_correction, correction, eps, beta1, beta2)
    descend_(theta, u, lr, weight_decay)


def mean_update(
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    mean_correction: Tensor,
    correction: Tensor,
    eps: Scalar,
    beta1: Scalar,
    beta2: Scalar,
) -> Tensor:
    """m ← β₁m + (1 − β₁)g and v as in `adam_update`; returns u = m̂/(√v̂ + ε) as a new tensor."""
    add_scaled_(exp_avg.mul_(beta1), gradient, 1 - beta1)
    moments.second_moment_(exp_avg_sq, gradient, beta2)
    return (exp_avg * mean_correction).div_(moments.denominator(exp_avg_sq, eps, correction))


def collect_mean_(
    update_sum: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    mean_correction: Tensor,
    correction: Tensor,
    part: Scalar,
    eps: Scalar,
    beta1: Scalar,
    beta2: Scalar,
) -> None:
    """As `collect_`, of Adam with a mean of gradients."""
    g = gradient.to(update_sum.dtype)
    u = mean_update(g, exp_avg, exp_avg_sq, mean_correction, correction, eps, beta1, beta2)
    add_scaled_(update_sum, u, part)


def descend_(theta: Tensor, u: Tensor, lr: Tensor, weight_decay: Scalar) -> None:
    """θ ← θ − η·u with u decayed first, which uses it up."""
    wide = theta.to(u.dtype)
    wide.addcmul_(decay.cautious_decay_(u, wide, weight_decay), lr, value=-1)
    if wide is not theta:
        theta.copy_(wide)
