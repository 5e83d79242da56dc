"""One step of DolphinFlow on a batch, in the order of the reference page."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trysquare.ops import clipping, decay, moments, polar, projection
from trysquare.ops._scalar import Scalar, add_scaled_


class Rule(NamedTuple):
    """What selects a formula rather than a number; a compiled update exists once per rule."""

    ortho_mode: str | None
    project: str
    adaptive_lr: bool
    bias_correction: bool
    ns_steps: int

    @property
    def projects_gradient(self) -> bool:
        """Whether rows of the gradient are projected off the weights."""
        return self.ortho_mode == "vector" and self.project == "gradient"


def clipped(gradient: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """s·g in the dtype of the arithmetic; the gradient itself where there is nothing to do."""
    wide = gradient.to(dtype)
    return wide if scale is None else wide * scale


def measure(theta: Tensor, gradient: Tensor, wide: bool) -> tuple[Tensor, Tensor]:
    """The coefficient of every row for the gradient as it is, (B, R, 1), and Σg², in one pass over both tensors.

    The gradient is not clipped yet and may be large: ``wide`` sums what holds it in float64 (where the device has it).
    Without it a row is summed in the dtype of the arithmetic, and Σg² is not finite where a square leaves its range.
    """
    w = theta if theta.dtype == torch.float64 else theta.float()
    wide_dtype = clipping.wide_dtype(gradient.device)
    dtype = wide_dtype if wide else w.dtype
    x, g = w.to(dtype), gradient.to(dtype)
    sums = torch.stack([(x * g).sum(-1, keepdim=True), (g * g).sum(-1, keepdim=True)])
    return projection.coefficient(sums[0], (w * w).sum(-1, keepdim=True)), sums[1].to(wide_dtype).sum()


def update_(
    theta: Tensor,
    gradient: Tensor,
    momentum_buffer: Tensor,
    exp_avg_sq: Tensor | None,
    correction: Tensor | None,
    coefficient: Tensor | None,
    scale: Tensor | None,
    lr: Scalar,
    weight_decay: Scalar,
    momentum: Scalar,
    eps: Scalar,
    beta2: Scalar,
    rest: Scalar,
    rule: Rule,
) -> None:
    """Steps ``theta``, ``momentum_buffer`` and ``exp_avg_sq``, each (B, R, C), in place; ``gradient`` is only read.

    ``correction`` is that of the second moment, ``coefficient`` how much of every row of θ the clipped gradient holds,
    if that is known already, ``scale`` the clipping factor (None: 1) and ``rest`` 1 − β₂. Arithmetic is that of the
    state.
    """
    wide = theta.to(momentum_buffer.dtype)
    g = clipped(gradient, scale, wide.dtype)
    if rule.ortho_mode == "vector" and rule.project == "gradient":  # no property: torch 2.6 cannot trace one here
        along = projection.gradient_coefficient(g, wide) if coefficient is None else coefficient
        g = projection.subtract_(g.clone() if g is gradient else g, wide, along)
    u = moments.nesterov_(momentum_buffer, g, momentum)
    if rule.ortho_mode == "vector" and rule.project == "update":
        u = projection.project_update_rows_(u, wide, eps)
    if rule.ortho_mode == "matrix":
        u = polar.newton_schulz(u, rule.ns_steps, eps)
    if exp_avg_sq is not None:
        moments.second_moment_(exp_avg_sq, g, beta2, rest)
        u = u.div_(moments.denominator(exp_avg_sq, eps, correction))
    decay.decoupled_decay_(wide, lr, weight_decay)
    add_scaled_(wide, u, -lr)
    if wide is not theta:
        theta.copy_(wide)
