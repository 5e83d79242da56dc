"""StableMax: its values, the parts of its cross-entropy, and every derivative written out; named as in the reference.

Logits x are (N, C, d₁, …) with the classes in dimension 1; a value for each position is (N, d₁, …). All numbers are in
the precision of the arithmetic already, float32 or float64. Nothing here is differentiated by autograd: it would find
slope 0 for log s at x = 0, and NaN for s at x = 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

HEADROOM = 2.0**-32


def s_below(x: Tensor) -> Tensor:
    """1 / (1 − min(x, 0)): s(x) where x < 0, and 1 elsewhere, so that its square is s′(x)."""
    return (1 - x.clamp(max=0)).reciprocal_()


def s(x: Tensor) -> Tensor:
    """max(x, 0) + 1 / (1 − min(x, 0)): both branches of s in one formula."""
    return s_below(x).add_(x.clamp(min=0))


def log_s(x: Tensor) -> Tensor:
    """γ(x) = sign(x)·log(1 + |x|).

    Not log1p: it is infinite above 1e38 in torch 2.6, and what it would keep of a tiny x is lost beside log Σ s anyway.
    """
    return (1 + x.abs()).log_().copysign_(x)


def log_s_slope(x: Tensor) -> Tensor:
    """γ′(x) = 1 / (1 + |x|)."""
    return (1 + x.abs()).reciprocal_()


def log_sum(x: Tensor, dim: int = 1) -> Tensor:
    """log Σ s(x_j), with no exponential and in one reading of x.

    The part of s that grows is summed with 32 binary digits of headroom, so that no finite logits overflow. A logit of
    inf gives NaN, as in softmax.
    """
    above = x.clamp(min=0).mul_(HEADROOM).sum(dim)
    total = s_below(x).sum(dim).add_(above, alpha=1 / HEADROOM)
    huge = (above.log() - math.log(HEADROOM)).masked_fill_(above == math.inf, math.nan)
    return torch.where(total == math.inf, huge, total.log())


def stablemax(x: Tensor, dim: int) -> Tensor:
    """p = s(x) / Σ s(x_j); relative to the largest first, so that the sum does not overflow."""
    if x.numel() == 0:
        return torch.empty_like(x)
    values = s(x)
    values /= values.amax(dim, keepdim=True)
    return values.div_(values.sum(dim, keepdim=True))


def stablemax_gradient(x: Tensor, p: Tensor, g: Tensor, dim: int) -> Tensor:
    """Σ_k g_k ∂p_k/∂x, with s′/Σs = p·γ′."""
    return p * log_s_slope(x) * (g - (g * p).sum(dim, keepdim=True))


def log_stablemax(x: Tensor, dim: int) -> Tensor:
    """log p = γ − log Σ exp γ_j, which is the log-softmax of γ."""
    return torch.log_softmax(log_s(x), dim)


def log_stablemax_gradient(x: Tensor, p: Tensor, g: Tensor, dim: int) -> Tensor:
    """Σ_k g_k ∂log p_k/∂x."""
    return log_s_slope(x) * (g - p * g.sum(dim, keepdim=True))


def surprise(gamma: Tensor, normalizer: Tensor) -> Tensor:
    """−log p, where `normalizer` is log Σ s. It is never negative, so its rounding error must not be."""
    return (normalizer - gamma).clamp_(min=0)


def smoothed(target: Tensor, label_smoothing: float) -> Tensor:
    """t′ = (1 − α)·t + α/C."""
    return target * (1 - label_smoothing) + label_smoothing / target.shape[1] if label_smoothing else target


def coefficients(target: Tensor, weight: Tensor | None, label_smoothing: float) -> Tensor:
    """a = w·t′ for class probabilities."""
    t = smoothed(target, label_smoothing)
    return t if weight is None else t * _per_class(weight, t)


def weighted_surprise(x: Tensor, normalizer: Tensor, weight: Tensor | None) -> Tensor:
    """−Σ_k w_k·log p_k of every position: what label smoothing adds to the loss of a class index."""
    surprises = surprise(log_s(x), normalizer.unsqueeze(1))
    return surprises.sum(1) if weight is None else _weighted_sum(_per_class(weight, x), surprises, 1)


def index_losses(x_y: Tensor, normalizer: Tensor, w_y: Tensor | None) -> Tensor:
    """−w_y·log p_y of every position, from the logits x_y and weights w_y of the chosen classes.

    A weight of 0 counts nothing even if the surprise is infinite.
    """
    losses = surprise(log_s(x_y), normalizer)
    return losses if w_y is None else (losses * w_y).masked_fill_(w_y == 0, 0)


def index_gradient(
    x: Tensor, y: Tensor, at_y: Tensor, scale: Tensor, lift: Tensor | None, weight: Tensor | None
) -> Tensor:
    """s′(x_k)·scale − w_k·γ′(x_k)·lift for every class but the chosen one, and `at_y` for that.

    With a_k = w_k·α/C where k is not chosen, `scale` is Σ_j a_j / Σ_j s(x_j) and `lift` is α/C, both times the factor
    of the position in the result.
    """
    below = s_below(x)
    gradient = (below * scale.unsqueeze(1)).mul_(below)
    if lift is not None:
        slope = log_s_slope(x).mul_(lift.unsqueeze(1))
        gradient -= slope if weight is None else slope.mul_(_per_class(weight, x))
    return gradient.scatter_(1, y.unsqueeze(1), at_y.unsqueeze(1))


def chosen_gradient(
    x_y: Tensor, normalizer: Tensor, w_y: Tensor | float, w_sum: Tensor | float, uniform: float, label_smoothing: float
) -> Tensor:
    """γ′_y·(p_y·Σ_j a_j − a_y) of the chosen classes, `uniform` being α/C and `w_sum` the sum of the class weights.

    p_y − 1 is expm1(log p_y), which keeps the digits of a p_y close to 1.
    """
    log_p = surprise(log_s(x_y), normalizer).neg_()
    error = log_p.expm1() * w_y
    if label_smoothing:
        error = error * (1 - label_smoothing) + (log_p.exp() * w_sum - w_y) * uniform
    return error.mul_(log_s_slope(x_y))


def probability_losses(
    x: Tensor, target: Tensor, normalizer: Tensor, weight: Tensor | None, label_smoothing: float
) -> Tensor:
    """−Σ_k a_k·log p_k of every position."""
    a = coefficients(target, weight, label_smoothing)
    return _weighted_sum(a, surprise(log_s(x), normalizer.unsqueeze(1)), 1)


def probability_gradient(
    x: Tensor, target: Tensor, normalizer: Tensor, factor: Tensor, weight: Tensor | None, label_smoothing: float
) -> Tensor:
    """γ′_k·(p_k·Σ_j a_j − a_k)·factor, with γ′·p = s′/Σs."""
    a = coefficients(target, weight, label_smoothing)
    below = s_below(x)
    gradient = (below * (a.sum(1) * factor * (-normalizer).exp()).unsqueeze(1)).mul_(below)
    return gradient.sub_(log_s_slope(x).mul_(a).mul_(factor.unsqueeze(1)))


def target_gradient(
    x: Tensor, normalizer: Tensor, factor: Tensor, weight: Tensor | None, label_smoothing: float
) -> Tensor:
    """∂/∂t of Σ factor·ℓ: −(1 − α)·w_k·log p_k·factor."""
    surprises = surprise(log_s(x), normalizer.unsqueeze(1)).mul_((factor * (1 - label_smoothing)).unsqueeze(1))
    return surprises if weight is None else surprises.mul_(_per_class(weight, x))


def weight_gradient(x: Tensor, target: Tensor, normalizer: Tensor, factor: Tensor, label_smoothing: float) -> Tensor:
    """∂/∂w of Σ factor·ℓ for class probabilities: −Σ t′_k·log p_k·factor over the positions."""
    surprises = surprise(log_s(x), normalizer.unsqueeze(1)).mul_(factor.unsqueeze(1))
    return _weighted_sum(smoothed(target, label_smoothing), surprises, [0, *range(2, x.ndim)])


def _per_class(weight: Tensor, x: Tensor) -> Tensor:
    """The class weights, shaped to multiply x."""
    return weight.view(-1, *[1] * (x.ndim - 2))


def _weighted_sum(a: Tensor, surprises: Tensor, dim: int | list[int]) -> Tensor:
    """Σ a·surprises, where a = 0 counts nothing even if the surprise is infinite."""
    terms = a * surprises
    total = terms.sum(dim)
    may_look = total.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere the host would wait
    return total if may_look and not total.isnan().any() else torch.where(a == 0, 0, terms).sum(dim)
