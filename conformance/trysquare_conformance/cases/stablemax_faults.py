"""Mistakes that could be made in StableMax, planted into the fast code: the cases must see every one.

A function here is given the original and returns what takes its place; its name and docstring are the fault's.
"""

import importlib
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trysquare import _blocks, _stablemax_autograd
from trysquare.ops import stablemax as ops
from trysquare_conformance.planting import Planter

_planter = Planter("stablemax")
FAULTS = _planter.faults
plant = partial(_planter, lanes=("eager-*", "compiled-*"))  # those of kernels have a page of their own

EAGER = ("eager-*",)
"""The compiled lane compiles the same functions, with one quick case: only faults that it can see are planted there."""

functions = importlib.import_module("trysquare.stablemax")  # the package's attribute of that name is the function

# Values


@plant(ops, "log_sum")
def softmax_normalizer(_: Any) -> Any:
    """log Σ exp x, as in softmax."""
    return lambda x, dim=1: torch.logsumexp(x, dim)


@plant(ops, "log_s")
def log_without_one(_: Any) -> Any:
    """γ = sign(x)·log|x|."""
    return lambda x: x.abs().log().copysign(x)


@plant(ops, "log_s", lanes=EAGER)
def log_of_softsign(_: Any) -> Any:
    """γ = x / (1 + |x|)."""
    return lambda x: x / (1 + x.abs())


@plant(ops, "s_below")
def exponential_below(_: Any) -> Any:
    """s(x) = exp x for x < 0."""
    return lambda x: x.clamp(max=0).exp()


@plant(ops, "s_below", lanes=EAGER)
def s_of_magnitude(_: Any) -> Any:
    """1 / (1 + |x|) on both sides."""
    return lambda x: (1 + x.abs()).reciprocal()


@plant(ops, "log_sum", lanes=EAGER)
def sum_overflows(_: Any) -> Any:
    """Σ s without headroom."""
    return lambda x, dim=1: ops.s(x).sum(dim).log()


@plant(ops, "surprise", lanes=EAGER)
def loss_capped(f: Any) -> Any:
    """−log(p + 1e-12)."""
    return lambda gamma, normalizer: ((-f(gamma, normalizer)).exp() + 1e-12).log().neg()


@plant(ops, "stablemax", lanes=EAGER)
def stablemax_of_last_dimension(f: Any) -> Any:
    """p over the last dimension, whatever `dim` says."""
    return lambda x, _: f(x, -1)


@plant(ops, "log_stablemax", lanes=EAGER)
def log_of_probability(_: Any) -> Any:
    """Log(s / Σs + 1e-12)."""
    return lambda x, dim: (ops.stablemax(x, dim) + 1e-12).log()


# Slopes


@plant(ops, "log_s_slope")
def slope_missing(_: Any) -> Any:
    """p − [k = y] without 1 / (1 + |x|) at the target."""
    return torch.ones_like


@plant(ops, "log_s_slope", lanes=EAGER)
def slope_by_autograd(f: Any) -> Any:
    """γ′(0) = 0, as autograd differentiates sign(x)·log(1 + |x|)."""
    return lambda x: f(x).masked_fill(x == 0, 0)


@plant(ops, "log_s_slope", lanes=EAGER)
def slope_nan_at_one(f: Any) -> Any:
    """NaN at x = 1, as autograd differentiates the branch that is not taken."""
    return lambda x: f(x).masked_fill(x == 1, math.nan)


@plant(ops, "index_gradient")
def slope_of_one_side(_: Any) -> Any:
    """s′ = 1 / (1 − x) for x < 0."""

    def index_gradient(x: Tensor, y: Tensor, at_y: Tensor, scale: Tensor, *_: Any) -> Tensor:
        return (ops.s_below(x) * scale.unsqueeze(1)).scatter(1, y.unsqueeze(1), at_y.unsqueeze(1))

    return index_gradient


@plant(ops, "index_gradient")
def target_not_subtracted(f: Any) -> Any:
    """∂ℓ/∂x = γ′·p, also at the target."""

    def index_gradient(x: Tensor, y: Tensor, _: Tensor, scale: Tensor, *rest: Any) -> Tensor:
        x_y = x.gather(1, y.unsqueeze(1)).squeeze(1)
        return f(x, y, ops.s_below(x_y).square() * scale, scale, *rest)  # type: ignore[no-any-return]

    return index_gradient


@plant(ops, "stablemax_gradient", lanes=EAGER)
def diagonal_of_jacobian(_: Any) -> Any:
    """Only ∂p_k/∂x_k."""
    return lambda x, p, g, _: p * ops.log_s_slope(x) * g * (1 - p)


@plant(ops, "log_stablemax_gradient", lanes=EAGER)
def normalizer_without_gradient(_: Any) -> Any:
    """γ′·g: log Σ s taken as a constant."""
    return lambda x, _p, g, _dim: ops.log_s_slope(x) * g


# Weights, smoothing, what is ignored


@plant(functions, "_total_weight", lanes=EAGER)
def mean_forgets_weights(f: Any) -> Any:
    """Divided by the number of targets instead of Σ w_y."""
    return lambda target, _, *rest: f(target, None, *rest)


@plant(functions, "_total_weight", lanes=EAGER)
def mean_counts_ignored(f: Any) -> Any:
    """Divided by all positions."""
    return lambda target, weight, _, dtype: f(target.clamp(min=0), weight, -1, dtype)


@plant(ops, "chosen_gradient", lanes=EAGER)
def gradient_forgets_weight(f: Any) -> Any:
    """The target's gradient without w_y."""
    return lambda x_y, normalizer, _, *rest: f(x_y, normalizer, 1.0, *rest)


@plant(ops, "weighted_surprise", lanes=EAGER)
def smoothing_forgets_weights(f: Any) -> Any:
    """Label smoothing over unweighted classes."""
    return lambda x, normalizer, _: f(x, normalizer, None)


@plant(ops, "weighted_surprise", lanes=EAGER)
def smoothing_over_others(f: Any) -> Any:
    """α / (C − 1)."""
    return lambda x, *rest: f(x, *rest) * (x.shape[1] / max(1, x.shape[1] - 1))


@plant(ops, "index_gradient", lanes=EAGER)
def smoothing_without_gradient(f: Any) -> Any:
    """Label smoothing in the loss only."""
    return lambda x, y, at_y, scale, _, weight: f(x, y, at_y, scale, None, weight)


@plant(ops, "smoothed", lanes=EAGER)
def probabilities_not_smoothed(_: Any) -> Any:
    """Label smoothing for class indices only."""
    return lambda target, _: target


@plant(ops, "_weighted_sum", lanes=EAGER)
def zero_times_infinity(_: Any) -> Any:
    """A probability of 0 times log p = −∞ is NaN."""
    return lambda a, surprises, dim: (a * surprises).sum(dim)


@plant(ops, "target_gradient", lanes=EAGER)
def target_gradient_unweighted(f: Any) -> Any:
    """∂ℓ/∂t without w."""
    return lambda x, normalizer, factor, _, label_smoothing: f(x, normalizer, factor, None, label_smoothing)


@plant(ops, "weight_gradient", lanes=EAGER)
def weight_gradient_unsmoothed(f: Any) -> Any:
    """∂ℓ/∂w from t instead of t′."""
    return lambda *arguments: f(*arguments[:4], 0.0)


@plant(_stablemax_autograd, "index_losses", lanes=EAGER)
def ignored_counted(f: Any) -> Any:
    """Ignored positions count as class 0."""
    return lambda x, target, weight, _, *rest: f(x, target.clamp(min=0), weight, -1, *rest)


@plant(_stablemax_autograd, "_zero_where", lanes=EAGER)
def ignored_nan_spreads(_: Any) -> Any:
    """NaN logits of an ignored position reach its gradient."""
    return lambda _, gradient: gradient


# Precision and blocks


@plant(functions, "_arithmetic", lanes=EAGER)
def arithmetic_in_half(_: Any) -> Any:
    """Half-precision logits are summed in half precision."""
    return lambda dtype: dtype


@plant(functions, "_arithmetic", lanes=EAGER)
def arithmetic_in_float32(_: Any) -> Any:
    """float64 logits are computed in float32."""
    return lambda _: torch.float32


@plant(_blocks.Blockwise, "per_entry", lanes=EAGER)
def last_block_skipped(f: Any) -> Any:
    """The gradient of the last of several blocks is not written."""

    def per_entry(self: _blocks.Blockwise, like: Tensor) -> Tensor:
        gradient: Tensor = f(self, like)
        if not self._is_small():
            gradient[-1:] = 0
        return gradient

    return per_entry


@plant(ops, "index_gradient", lanes=EAGER)
def no_gradient(_: Any) -> Any:
    """The gradient is zero."""
    return lambda x, *_: torch.zeros_like(x)
