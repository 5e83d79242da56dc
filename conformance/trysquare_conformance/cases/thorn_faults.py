"""Mistakes that could be made with THORN's matrices, planted into the fast code: the cases must see every one.

A function here is given the original and returns what takes its place; its name and docstring are the fault's.
"""

import math
from typing import Any

import torch
from torch import Tensor

from trysquare import _thorn_steps
from trysquare._thorn_steps import Steps
from trysquare.ops import _symmetric, decay, moments, polar, polar_express, rectification, row_norm
from trysquare.ops import thorn as ops
from trysquare_conformance.planting import WITHOUT_KERNELS, Planter

plant = Planter("thorn", lanes=WITHOUT_KERNELS)
FAULTS = plant.faults

# Momentum


@plant(moments, "nesterov_")
def momentum_dampened(_: Any) -> Any:
    """m ← β₁m + (1−β₁)g, which normalisation hides in u but not in the state."""

    def nesterov_(m: Tensor, g: Tensor, momentum: float) -> Tensor:
        m.mul_(momentum).add_(g * (1 - momentum))
        return g + m * momentum

    return nesterov_


@plant(moments, "nesterov_")
def momentum_heavy_ball(f: Any) -> Any:
    """u = m, without Nesterov's look ahead."""

    def nesterov_(m: Tensor, g: Tensor, momentum: float) -> Tensor:
        f(m, g, momentum)
        return m.clone()

    return nesterov_


@plant(moments, "nesterov_")
def momentum_forgotten(f: Any) -> Any:
    """m ← g."""
    return lambda m, g, momentum: f(m.zero_(), g, momentum)


@plant(moments, "nesterov_")
def momentum_undamped_lookahead(f: Any) -> Any:
    """u = g + m."""

    def nesterov_(m: Tensor, g: Tensor, momentum: float) -> Tensor:
        f(m, g, momentum)
        return torch.add(g, m)

    return nesterov_


@plant(Steps, "_scalars")
def betas_swapped(f: Any) -> Any:
    """β₁ and β₂ exchanged."""
    return lambda self, group, parameter: f(self, {**group, "betas": group["betas"][::-1]}, parameter)


# Coefficients


def _changed_coefficients(change: Any) -> Any:
    """`change` makes of the rule's coefficients other ones."""

    def planted(f: Any) -> Any:
        def rule(*arguments: Any) -> Any:
            made = f(*arguments)
            return made._replace(coefficients=change(made.coefficients))

        return rule

    return planted


def _one_percent(iteration: int, place: int) -> Any:
    """One coefficient of one iteration 1 % too large."""

    def change(coefficients: Any) -> Any:
        changed = [list(triple) for triple in coefficients]
        changed[min(iteration, len(changed) - 1)][place] *= 1.01
        return tuple(map(tuple, changed))

    return change


for _iteration in range(5):
    for _place, _letter in enumerate("abc"):
        plant.add(
            f"coefficient-{_letter}{_iteration + 1}-1%",
            f"{_letter} of iteration {_iteration + 1} too large by 1 %",
            _thorn_steps,
            "rule_of",
            _changed_coefficients(_one_percent(_iteration, _place)),
        )
plant.add("coefficients-reversed", "last first", _thorn_steps, "rule_of", _changed_coefficients(lambda c: c[::-1]))
plant.add(
    "iteration-missing",
    "the last is left out",
    _thorn_steps,
    "rule_of",
    _changed_coefficients(lambda c: c[:-1] or c * 2),
)
plant.add(
    "iteration-more", "the last is done twice", _thorn_steps, "rule_of", _changed_coefficients(lambda c: (*c, c[-1]))
)
plant.add(
    "coefficients-always-default",
    "the default table whatever is asked for",
    _thorn_steps,
    "rule_of",
    _changed_coefficients(lambda c: (polar_express.DEFAULT_COEFFICIENTS * 3)[: len(c)]),
)


@plant(polar_express, "coefficients")
def safety_not_in_coefficients(f: Any) -> Any:
    """The quintics allow nothing for rounding."""
    return lambda iters, lower_bound, _, cushion: f(iters, lower_bound, 0.0, cushion)


@plant(polar_express, "coefficients")
def cushion_ignored(f: Any) -> Any:
    """No cushion."""
    return lambda iters, lower_bound, safety_factor, _: f(iters, lower_bound, safety_factor, 0.0)


@plant(polar_express, "coefficients")
def lower_bound_ignored(f: Any) -> Any:
    """Always from 1e-3."""
    return lambda iters, _, safety_factor, cushion: f(iters, 1e-3, safety_factor, cushion)


# Polar factor


@plant(polar, "normalized")
def safety_not_in_norm(f: Any) -> Any:
    """X = u/‖u‖."""
    return lambda u, _, *rest: f(u, 0.0, *rest)


@plant(polar, "normalized")
def norm_plus_eps(_: Any) -> Any:
    """X = u/((1 + safety)‖u‖ + ε), so that small updates come out smaller."""

    def normalized(u: Tensor, safety_factor: float, eps: float, dtype: torch.dtype) -> Tensor:
        return (u / ((1 + safety_factor) * u.square().sum((-2, -1), keepdim=True).sqrt() + eps)).to(dtype)

    return normalized


@plant(polar, "normalized")
def norm_unbounded(f: Any) -> Any:
    """0/0 for a zero update."""
    return lambda u, *rest: f(u, *rest) if u.any() else (u / 0.0).to(rest[-1])


@plant(polar, "normalized")
def norm_of_batch(f: Any) -> Any:
    """One norm for all matrices of a batch."""
    return lambda u, *rest: f(u.flatten(0, 1).unsqueeze(0), *rest).view(u.shape)


@plant(polar, "normalized")
def norm_of_rows(_: Any) -> Any:
    """Each row by its own length."""

    def normalized(u: Tensor, safety_factor: float, eps: float, dtype: torch.dtype) -> Tensor:
        return (u / ((1 + safety_factor) * u.square().sum(-1, keepdim=True).sqrt().clamp(min=eps))).to(dtype)

    return normalized


@plant(polar, "normalized")
def norm_in_float32(_: Any) -> Any:
    """The squares overflow."""

    def normalized(u: Tensor, safety_factor: float, eps: float, dtype: torch.dtype) -> Tensor:
        norm = u.float().square().sum((-2, -1), keepdim=True).sqrt().to(u.dtype)
        return (u / ((1 + safety_factor) * norm.clamp(min=eps))).to(dtype)

    return normalized


@plant(polar, "normalized")
def norm_by_quotient(f: Any) -> Any:
    """Of subnormal u, ε over the largest entry is infinite, and X = 0."""

    def normalized(u: Tensor, safety_factor: float, eps: float, dtype: torch.dtype) -> Tensor:
        largest = u.abs().amax((-2, -1), keepdim=True)
        return f(u * torch.isfinite(eps / largest), safety_factor, eps, dtype)  # type: ignore[no-any-return]

    return normalized


@plant(polar, "polar_factor")
def polar_in_bfloat16(f: Any) -> Any:
    """Products in bfloat16 where float32 was asked for."""
    return lambda u, c, safety, eps, _, form: f(u, c, safety, eps, torch.bfloat16, form)


@plant(polar, "polar_factor")
def polar_times_norm(f: Any) -> Any:
    """The norm is put back, as DolphinFlow does."""
    return lambda u, *rest: f(u, *rest) * u.square().sum((-2, -1), keepdim=True).sqrt()


@plant(polar, "polar_factor")
def polar_transposed_back_wrongly(f: Any) -> Any:
    """A tall matrix is reshaped back instead of transposed."""

    def polar_factor(u: Tensor, *rest: Any) -> Tensor:
        x: Tensor = f(u, *rest)
        return x.mT.reshape(u.shape) if u.shape[-2] > u.shape[-1] else x

    return polar_factor


@plant(polar, "polar_factor")
def polar_left_out(_: Any) -> Any:
    """u/‖u‖ is taken for it."""
    return lambda u, _, safety, eps, *__: polar.normalized(u, safety, eps, u.dtype) * math.sqrt(min(u.shape[-2:]))


@plant(polar, "standard_form")
def standard_other_gram(f: Any) -> Any:
    """XᵀX where XXᵀ belongs, which only a square matrix lets pass."""

    def standard_form(x: Tensor, coefficients: Any) -> Tensor:
        if x.shape[-1] != x.shape[-2]:
            right: Tensor = f(x, coefficients)
            return right
        for a, b, c in coefficients:
            gram = x.mT @ x
            x = a * x + (b * gram + c * (gram @ gram)) @ x
        return x

    return standard_form


@plant(polar, "standard_form")
def standard_cubic(f: Any) -> Any:
    """The term in A² is left out."""
    return lambda x, coefficients: f(x, [(a, b, 0.0) for a, b, _ in coefficients])


@plant(polar, "gram_form")
def gram_of_first_coefficients(f: Any) -> Any:
    """After a restart the coefficients begin anew."""
    return lambda x, coefficients: f(x, [*coefficients[:2], *coefficients[: len(coefficients) - 2]])


@plant(polar, "gram_form")
def gram_not_transposed(f: Any) -> Any:
    """The result of another matrix of the batch."""
    return lambda x, coefficients: f(x, coefficients).flip(-2)


@plant(polar, "_in_order")
def gram_other_order(f: Any) -> Any:
    """Q takes up multipliers from the right."""
    return lambda multiplier, q, tall: f(q, multiplier, tall)


@plant(_symmetric, "plus_identity_")
def identity_in_bfloat16(f: Any) -> Any:
    """A multiple of the identity is rounded to bfloat16 before it is added."""
    return lambda z, number: f(z, float(torch.tensor(number, dtype=torch.bfloat16)))


# Rows


@plant(row_norm, "normalize_rows_")
def rows_left_out(_: Any) -> Any:
    """v is updated, X stays."""

    def normalize_rows_(x: Tensor, v: Tensor, beta2: float, _: Any) -> Tensor:
        v.mul_(beta2).add_(x.square().mean(-1, keepdim=True) * (1 - beta2))
        return x

    return normalize_rows_


@plant(row_norm, "normalize_rows_")
def rows_are_columns(f: Any) -> Any:
    """Of a square matrix the columns are normalised."""
    return lambda x, *rest: f(x.mT.contiguous(), *rest).mT if x.shape[-1] == x.shape[-2] else f(x, *rest)


@plant(row_norm, "normalize_rows_")
def rows_not_rescaled(_: Any) -> Any:
    """‖X‖_F is not put back."""

    def normalize_rows_(x: Tensor, v: Tensor, beta2: float, eps: float) -> Tensor:
        v.mul_(beta2).add_(x.square().mean(-1, keepdim=True) * (1 - beta2))
        return x.mul_(v.clamp(min=eps).rsqrt())

    return normalize_rows_


@plant(row_norm, "normalize_rows_")
def rows_by_this_step(f: Any) -> Any:
    """X is divided by this step's mean square instead of the running one."""

    def normalize_rows_(x: Tensor, v: Tensor, beta2: float, eps: float) -> Tensor:
        v.mul_(beta2).add_(x.square().mean(-1, keepdim=True) * (1 - beta2))
        normalized: Tensor = f(x, torch.zeros_like(v), beta2, eps)
        return normalized

    return normalize_rows_


@plant(row_norm, "normalize_rows_")
def rows_by_sum(f: Any) -> Any:
    """q is the sum of the squares, not their mean."""

    def normalize_rows_(x: Tensor, v: Tensor, beta2: float, eps: float) -> Tensor:
        summed = v / x.shape[-1]
        normalized: Tensor = f(x, summed, beta2, eps)
        v.copy_(summed * x.shape[-1])
        return normalized

    return normalize_rows_


@plant(row_norm, "normalize_rows_")
def rows_eps_outside(_: Any) -> Any:
    """X/(√v + ε)."""

    def normalize_rows_(x: Tensor, v: Tensor, beta2: float, eps: float) -> Tensor:
        v.mul_(beta2).add_(x.square().mean(-1, keepdim=True) * (1 - beta2))
        y = x / (v.sqrt() + eps)
        lengths = [t.square().sum((-2, -1), keepdim=True).sqrt() for t in (x, y)]
        return y * (lengths[0] / lengths[1].clamp(min=eps))

    return normalize_rows_


@plant(row_norm, "normalize_rows_")
def rows_beta_swapped(f: Any) -> Any:
    """v ← (1−β₂)v + β₂q."""
    return lambda x, v, beta2, eps: f(x, v, 1 - beta2, eps)


@plant(row_norm, "normalize_rows_")
def rows_scaled_by_batch(f: Any) -> Any:
    """One length for all matrices of a batch."""

    def normalize_rows_(x: Tensor, v: Tensor, beta2: float, eps: float) -> Tensor:
        whole: Tensor = f(x.flatten(0, 1).unsqueeze(0), v.flatten(0, 1).unsqueeze(0), beta2, eps)
        return whole.view(x.shape)

    return normalize_rows_


# Decay


@plant(decay, "cautious_decay_")
def decay_missing(_: Any) -> Any:
    """θ is not decayed."""
    return lambda u, *_: u


@plant(decay, "cautious_decay_")
def decay_everywhere(_: Any) -> Any:
    """The mask is left out."""
    return lambda u, theta, weight_decay: u.add_(theta * weight_decay)


@plant(decay, "cautious_decay_")
def decay_mask_reversed(f: Any) -> Any:
    """Where the signs differ."""
    return lambda u, theta, weight_decay: f(u.neg_(), theta, -weight_decay).neg_()


@plant(decay, "cautious_decay_")
def decay_mask_of_product(_: Any) -> Any:
    """Where uθ ≥ 0, which underflows."""
    return lambda u, theta, weight_decay: u.add_(torch.where(u * theta >= 0, theta, 0.0) * weight_decay)


@plant(decay, "cautious_decay_")
def decay_mask_strict(_: Any) -> Any:
    """A zero update does not decay."""
    return lambda u, theta, weight_decay: u.add_(torch.where(u.sign() * theta.sign() > 0, theta, 0.0) * weight_decay)


@plant(decay, "cautious_decay_")
def decay_grows(f: Any) -> Any:
    """λ with the wrong sign."""
    return lambda u, theta, weight_decay: f(u, theta, -weight_decay)


@plant(ops, "apply_")
def decay_not_scaled(f: Any) -> Any:
    """λ outside of the scaled update, as AdamW has it."""

    def apply_(theta: Tensor, x: Tensor, v: Any, rate: Tensor, weight_decay: Any, *rest: Any) -> None:
        k = ops.scale(theta.shape[-2], theta.shape[-1], 0.2)
        f(theta, x, v, rate, weight_decay / k, *rest)

    return apply_


# Scale and rate


def _other_scale(change: Any) -> Any:
    return lambda f: lambda rows, columns, target_rms: change(f, rows, columns, target_rms)


_SCALES = {
    "scale-of-min": ("ρ√min(R, C)", lambda f, r, c, rms: f(min(r, c), min(r, c), rms) if rms else f(r, c, rms)),
    "scale-of-rows": ("ρ√R", lambda f, r, c, rms: f(r, r, rms) if rms else f(r, c, rms)),
    "scale-of-columns": ("ρ√C", lambda f, r, c, rms: f(c, c, rms) if rms else f(r, c, rms)),
    "scale-without-root": (
        "ρ·max(R, C)",
        lambda f, r, c, rms: f(r, c, rms) * math.sqrt(max(r, c)) if rms else f(r, c, 0),
    ),
    "scale-missing": ("1", lambda *_: 1.0),
    "scale-ignores-target": ("0.2√max(R, C) though target_rms = 0", lambda f, r, c, _: f(r, c, 0.2)),
    "scale-of-muon-inverted": ("√max(1, C/R)", lambda f, r, c, rms: f(r, c, rms) if rms else f(c, r, rms)),
    "scale-of-muon-unbounded": ("√(R/C)", lambda f, r, c, rms: f(r, c, rms) if rms else math.sqrt(r / c)),
}
for _name, (_what, _change) in _SCALES.items():
    plant.add(_name, f"the scale is {_what}", ops, "scale", _other_scale(_change))


def _scale(sizes: tuple[int, ...], target_rms: float) -> float:
    rows, columns = sizes
    return ops.scale(rows, columns, target_rms)


def _scaled_by(rows_and_columns: Any) -> Any:
    """The scale of a parameter with more than two dimensions from other sizes than its matrix has."""

    def planted(f: Any) -> Any:
        def orthogonalized(self: Any, batch: Any, finite: Any) -> None:
            group, parameter = batch.group, batch.parameters[0]
            if parameter.ndim > 2:
                right = _thorn_steps.matrix_shape(group, parameter)[-2:]
                wrong = rows_and_columns(parameter.shape)
                ratio = _scale(wrong, group["target_rms"]) / _scale(right, group["target_rms"])
                batch = batch._replace(group={**group, "lr": group["lr"] * ratio})
            f(self, batch, finite)

        return orthogonalized

    return planted


for _name, _what, _sizes in (
    ("kernel", "height and width of the kernel make the scale", lambda shape: shape[-2:]),
    ("channels", "output and input channels make the scale", lambda shape: shape[:2]),
):
    plant.add(f"scale-of-{_name}", _what, Steps, "_orthogonalized", _scaled_by(_sizes))


@plant(ops, "apply_", lanes=("eager-*",))  # inductor leaves out a conversion there and back
def rate_in_parameter_dtype(f: Any) -> Any:
    """The rate rounded to half precision, where it can overflow."""
    return lambda theta, x, v, rate, *rest: f(theta, x, v, rate.to(theta.dtype), *rest)


@plant(Steps, "_rates")
def lr_ignored(f: Any) -> Any:
    """Every group at 1e-3."""
    return lambda self, group, steps: f(self, {**group, "lr": 1e-3}, steps)


@plant(Steps, "_rates")
def rectification_missing(f: Any) -> Any:
    """r = 1."""
    return lambda self, group, steps: f(self, {**group, "rectify": False}, steps)


@plant(Steps, "_rates")
def rectification_unasked(f: Any) -> Any:
    """r although rectify=False."""
    return lambda self, group, steps: f(self, {**group, "rectify": True}, steps)


@plant(rectification, "rectification")
def rectification_early(f: Any) -> Any:
    """t one too large."""
    return lambda step, beta2: f(step + 1, beta2)


@plant(rectification, "rectification")
def rectification_late(f: Any) -> Any:
    """t one too small."""
    return lambda step, beta2: f((step - 1).clamp(min=1), beta2)


@plant(rectification, "rectification")
def rectification_from_five(f: Any) -> Any:
    """ρ > 5, as torch has it."""

    def later(step: Tensor, beta2: float) -> Tensor:
        power = beta2**step
        rho = 2 / (1 - beta2) - 1 - 2 * step * power / (1 - power)
        r: Tensor = f(step, beta2)
        return torch.where(rho > 5, r, 0.0)

    return later


@plant(rectification, "rectification")
def rectification_squared(f: Any) -> Any:
    """r² in place of r."""
    return lambda step, beta2: f(step, beta2).square()


@plant(rectification, "rectification")
def rectification_one_in_silence(f: Any) -> Any:
    """1 where r is 0."""
    return lambda step, beta2: torch.where((r := f(step, beta2)) > 0, r, 1.0)


@plant(rectification, "rectification")
def rectification_of_beta1(f: Any) -> Any:
    """Silent for one step more."""
    return lambda step, beta2: torch.where(step > 5, f(step, beta2), 0.0)
