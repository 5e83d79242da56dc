"""Mistakes that could be made in DolphinFlow's equations, planted into the fast code: the cases must see every one.

A function here is given the original and returns what takes its place; its name and docstring are the fault's.
"""

from typing import Any

import torch
from torch import Tensor

from trysquare import dolphinflow
from trysquare.ops import decay, moments, polar, projection
from trysquare.ops import dolphinflow as ops
from trysquare_conformance.planting import WITHOUT_KERNELS, Planter

plant = Planter("dolphinflow", lanes=WITHOUT_KERNELS)
EVERYWHERE = ("*",)
FAULTS = plant.faults

# Momentum


@plant(moments, "nesterov_")
def momentum_dampened(_: Any) -> Any:
    """m ← μm + (1−μ)g."""

    def nesterov_(m: Tensor, g: Tensor, momentum: Any) -> Tensor:
        m.mul_(momentum).add_(g * (1 - momentum))
        return torch.add(g, m * momentum)

    return nesterov_


@plant(moments, "nesterov_")
def momentum_heavy_ball(f: Any) -> Any:
    """u = m, without Nesterov's look ahead."""

    def nesterov_(m: Tensor, g: Tensor, momentum: Any) -> Tensor:
        f(m, g, momentum)
        return m.clone()

    return nesterov_


@plant(moments, "nesterov_")
def momentum_forgotten(f: Any) -> Any:
    """m ← g."""
    return lambda m, g, momentum: f(m.zero_(), g, momentum)


@plant(moments, "nesterov_")
def momentum_lookahead_undamped(f: Any) -> Any:
    """u = g + m."""

    def nesterov_(m: Tensor, g: Tensor, momentum: Any) -> Tensor:
        f(m, g, momentum)
        return torch.add(g, m)

    return nesterov_


@plant(moments, "nesterov_")
def momentum_lookahead_stale(f: Any) -> Any:
    """u = g + μ·(the old m)."""

    def nesterov_(m: Tensor, g: Tensor, momentum: Any) -> Tensor:
        update = torch.add(g, m * momentum)
        f(m, g, momentum)
        return update

    return nesterov_


# Second moment


@plant(moments, "second_moment_")
def beta2_complement(f: Any) -> Any:
    """v ← (1−β₂)v + β₂g²."""
    return lambda v, g, beta2, _: f(v, g, 1 - beta2)


@plant(dolphinflow.DolphinFlow, "_numbers")
def betas_swapped(f: Any) -> Any:
    """μ where β₂ belongs, and the reverse."""

    def numbers(self: Any, group: dict[str, Any], *rest: Any) -> Any:
        return f(self, {**group, "momentum": group["beta2"], "beta2": group["momentum"]}, *rest)

    return numbers


@plant(moments, "second_moment_")
def second_moment_not_averaged(_: Any) -> Any:
    """v ← β₂v + g²."""
    return lambda v, g, beta2, _: v.mul_(beta2).add_(g * g)


@plant(moments, "second_moment_")
def second_moment_of_magnitude(f: Any) -> Any:
    """v ← β₂v + (1−β₂)|g|."""
    return lambda v, g, *betas: f(v, g.abs().sqrt(), *betas)


@plant(moments, "second_moment_")
def second_moment_not_kept(f: Any) -> Any:
    """v ← (1−β₂)g²."""
    return lambda v, g, *betas: f(v.zero_(), g, *betas)


@plant(ops, "update_")
def second_moment_of_raw_gradient(_: Any) -> Any:
    """v from the gradient before its projection, as the published package has it."""
    return _update_with_raw_second_moment


def _update_with_raw_second_moment(
    theta: Tensor,
    gradient: Tensor,
    momentum_buffer: Tensor,
    exp_avg_sq: Tensor | None,
    correction: Tensor | None,
    coefficient: Tensor | None,
    scale: Tensor | None,
    *numbers: Any,
) -> None:
    """The moment is brought to where the original's own averaging, with β₂ = 1, leaves it."""
    *others, beta2, _, rule = numbers
    if exp_avg_sq is not None:
        moments.second_moment_(exp_avg_sq, ops.clipped(gradient, scale, exp_avg_sq.dtype), beta2)
    numbers = scale, *others, 1.0, 0.0, rule
    _original_update(theta, gradient, momentum_buffer, exp_avg_sq, correction, coefficient, *numbers)


_original_update = ops.update_


@plant(moments, "denominator")
def bias_uncorrected(f: Any) -> Any:
    """v̂ = v although bias_correction."""
    return lambda v, eps, _: f(v, eps, None)


@plant(dolphinflow, "_rule", lanes=EVERYWHERE)
def bias_corrected_anyway(f: Any) -> Any:
    """v̂ = v/(1−β₂ᵗ) although not bias_correction."""
    return lambda group, parameter: f(group, parameter)._replace(bias_correction=True)


@plant(moments, "correction")
def bias_of_next_step(f: Any) -> Any:
    """1 − β₂ᵗ⁺¹ in the correction."""
    return lambda step, *rest: f(step + 1, *rest)


@plant(moments, "correction")
def bias_of_momentum(f: Any) -> Any:
    """The correction with μ instead of β₂."""
    return lambda step, _, dtype: f(step, 0.9, dtype)


@plant(moments, "correction")
def bias_not_rooted(f: Any) -> Any:
    """√v divided by 1 − β₂ᵗ instead of its root."""
    return lambda *arguments: f(*arguments).square()


@plant(moments, "correction")
def bias_of_first_slice(f: Any) -> Any:
    """Every parameter of a batch corrected with the step count of its first."""
    return lambda step, *rest: f(step[:1].expand_as(step), *rest)


@plant(moments, "denominator")
def eps_inside_root(_: Any) -> Any:
    """√(v̂ + ε)."""

    def denominator(v: Tensor, eps: Any, correction: Tensor | None) -> Tensor:
        return torch.sqrt((v if correction is None else v * correction.square()) + eps)

    return denominator


@plant(moments, "denominator")
def eps_before_correction(_: Any) -> Any:
    """(√v + ε) corrected, instead of ε added to the corrected root."""

    def denominator(v: Tensor, eps: Any, correction: Tensor | None) -> Tensor:
        return torch.mul(v.sqrt() + eps, 1.0 if correction is None else correction)

    return denominator


@plant(moments, "denominator")
def eps_as_bound(f: Any) -> Any:
    """max(√v̂, ε)."""

    def denominator(v: Tensor, eps: Any, correction: Tensor | None) -> Tensor:
        return torch.maximum(f(v, 0.0, correction), torch.as_tensor(eps, dtype=v.dtype, device=v.device))

    return denominator


@plant(moments, "denominator")
def eps_missing(f: Any) -> Any:
    """√v̂ alone."""
    return lambda v, _, correction: f(v, 0.0, correction)


# Projection


def _plant_coefficient(change: Any) -> Any:
    """Where an eager step finds the coefficients of rows, and where a compiled one does: in the sweep of the norm."""

    def in_sweep(measure: Any) -> Any:
        def changed(theta: Tensor, gradient: Tensor, wide: bool) -> tuple[Tensor, Tensor]:
            w = theta if theta.dtype == torch.float64 else theta.float()
            coefficient = change(projection.gradient_coefficient)(gradient.to(w.dtype), w)
            return coefficient, measure(theta, gradient, wide)[1]

        return changed

    plant(projection, "gradient_coefficient", lanes=("eager-*",))(change)
    fault = plant.faults[-1]
    plant.add(f"{fault.name}-in-sweep", fault.what, ops, "measure", in_sweep, lanes=("compiled-*",))
    return change


@_plant_coefficient
def projection_of_columns(_: Any) -> Any:
    """Columns projected instead of rows."""
    return lambda g, w: (w * g).sum(-2, keepdim=True) / ((w * w).sum(-2, keepdim=True) + projection.SMALLEST_SQUARE)


@_plant_coefficient
def projection_of_matrix(_: Any) -> Any:
    """The whole matrix projected as if it were one row."""

    def gradient_coefficient(g: Tensor, w: Tensor) -> Tensor:
        square = (w * w).sum((-2, -1), keepdim=True) + projection.SMALLEST_SQUARE
        return ((w * g).sum((-2, -1), keepdim=True) / square).expand(-1, w.shape[-2], -1)

    return gradient_coefficient


@plant(projection, "coefficient")
def projection_unguarded(_: Any) -> Any:
    """0/0 in a zero row."""
    return lambda along, square: along / square


@plant(projection, "coefficient")
def projection_without_domain(_: Any) -> Any:
    """Rows outside the domain are projected too."""
    return lambda along, square: along / (square + projection.SMALLEST_SQUARE)


@_plant_coefficient
def projection_by_length(_: Any) -> Any:
    """⟨w,g⟩/‖w‖ instead of ⟨w,g⟩/‖w‖²."""

    def gradient_coefficient(g: Tensor, w: Tensor) -> Tensor:
        along, square = projection.row_products(g, w)
        return along / (square.sqrt() + projection.SMALLEST_SQUARE)

    return gradient_coefficient


@_plant_coefficient
def projection_of_neighbour(f: Any) -> Any:
    """Each row with the coefficient of the row before it."""
    return lambda g, w: f(g, w).roll(1, -2)


@_plant_coefficient
def projection_skips_last_row(f: Any) -> Any:
    """The last row is left as it is."""

    def gradient_coefficient(g: Tensor, w: Tensor) -> Tensor:
        rows = torch.arange(w.shape[-2], device=w.device).view(-1, 1)
        return torch.where(rows < w.shape[-2] - 1, f(g, w), 0.0)

    return gradient_coefficient


@_plant_coefficient
def projection_missing(f: Any) -> Any:
    """Nothing is projected."""
    return lambda g, w: f(g, w) * 0.0


@plant(ops, "update_")
def projection_of_unclipped(f: Any) -> Any:
    """The coefficient from the gradient before it is clipped."""

    def update_(theta: Tensor, gradient: Tensor, m: Tensor, v: Any, correction: Any, known: Any, *rest: Any) -> None:
        if rest[-1].projects_gradient:
            known = projection.gradient_coefficient(gradient.to(m.dtype), theta.to(m.dtype))
        f(theta, gradient, m, v, correction, known, *rest)

    return update_


@plant(projection, "subtract_")
def projection_added(f: Any) -> Any:
    """g + w⟨w,g⟩/⟨w,w⟩."""
    return lambda x, w, coefficient: f(x, w, -coefficient)


@plant(projection, "subtract_")
def projection_by_zero(_: Any) -> Any:
    """A coefficient of 0 is subtracted like others: beside an infinite weight that is NaN."""
    return lambda x, w, coefficient: x.addcmul_(w, coefficient, value=-1)


@plant(projection, "subtract_")
def projection_restores_length(f: Any) -> Any:
    """The projected row stretched to the length of the gradient's, as the paper's code does."""

    def subtract_(x: Tensor, w: Tensor, coefficient: Tensor) -> Tensor:
        length = x.square().sum(-1, keepdim=True).sqrt()
        projected = f(x, w, coefficient)
        return torch.mul(projected, length / (projected.square().sum(-1, keepdim=True).sqrt() + 1e-30))

    return subtract_


@plant(dolphinflow, "_rule", lanes=EVERYWHERE)
def projection_of_update(f: Any) -> Any:
    """The update projected instead of the gradient."""
    return lambda group, parameter: f(group, parameter)._replace(project="update")


@plant(dolphinflow, "_rule", lanes=EVERYWHERE)
def projection_of_gradient(f: Any) -> Any:
    """The gradient projected although project='update'."""
    return lambda group, parameter: f(group, parameter)._replace(project="gradient")


@plant(dolphinflow, "_mode", lanes=EVERYWHERE)
def projection_of_vectors(_: Any) -> Any:
    """Parameters of one dimension are projected too."""
    return lambda group, _: group["ortho_mode"]


# Newton–Schulz


def _with_coefficient(index: int, factor: float) -> Any:
    wrong = tuple(c * factor if i == index else c for i, c in enumerate(polar.MUON_COEFFICIENTS))
    return lambda f: lambda x, _, *products: f(x, wrong, *products)


for _index, _letter in enumerate("abc"):
    plant.add(f"polar-{_letter}-1%", f"{_letter} 1 % too large", polar, "quintic", _with_coefficient(_index, 1.01))
plant.add("polar-cubic", "the term in A² left out", polar, "quintic", _with_coefficient(2, 0.0))


@plant(polar, "quintic", lanes=EVERYWHERE)
def polar_other_gram(f: Any) -> Any:
    """XᵀX where XXᵀ belongs, which only a square matrix lets pass."""

    def quintic(x: Tensor, abc: tuple[float, float, float], *products: Any) -> Tensor:
        gram = x.mT @ x
        right: Tensor = f(x, abc, *products)
        return abc[0] * x + (abc[1] * gram + abc[2] * (gram @ gram)) @ x if x.shape[-1] == x.shape[-2] else right

    return quintic


@plant(polar, "quintic", lanes=EVERYWHERE)
def polar_in_bfloat16(f: Any) -> Any:
    """Products in bfloat16."""
    return lambda x, abc, *products: f(x.bfloat16(), abc, *products).to(x.dtype)


@plant(polar, "newton_schulz", lanes=EVERYWHERE)
def polar_step_more(f: Any) -> Any:
    """One iteration too many."""
    return lambda u, steps, eps, **products: f(u, steps + 1, eps, **products)


@plant(polar, "newton_schulz", lanes=EVERYWHERE)
def polar_step_fewer(f: Any) -> Any:
    """One iteration too few."""
    return lambda u, steps, eps, **products: f(u, steps - 1, eps, **products)


@plant(polar, "newton_schulz", lanes=EVERYWHERE)
def polar_of_unit_norm(f: Any) -> Any:
    """The norm is not put back."""
    return lambda u, steps, eps: f(u, steps, eps) / u.square().sum((-2, -1), keepdim=True).sqrt().clamp(min=1e-30)


@plant(polar, "newton_schulz", lanes=EVERYWHERE)
def polar_norm_of_batch(_: Any) -> Any:
    """One norm for all matrices of a batch."""

    def newton_schulz(u: Tensor, steps: int, eps: Any) -> Tensor:
        norm = u.square().sum().sqrt()
        x = u / norm
        for _ in range(steps):
            x = polar.quintic(x, polar.MUON_COEFFICIENTS)
        return torch.where(norm >= eps, x * norm, u)

    return newton_schulz


@plant(polar, "newton_schulz", lanes=EVERYWHERE)
def polar_of_zero(f: Any) -> Any:
    """A zero update is normalised: 0/0."""
    return lambda u, steps, _: f(u, steps, -1.0)


# Decay


@plant(decay, "decoupled_decay_")
def decay_missing(f: Any) -> Any:
    """θ is not decayed."""
    return lambda theta, lr, _: f(theta, lr, 0.0)


@plant(decay, "decoupled_decay_")
def decay_without_lr(f: Any) -> Any:
    """θ ← θ(1 − λ)."""
    return lambda theta, _, weight_decay: f(theta, 1.0, weight_decay)


@plant(decay, "decoupled_decay_")
def decay_twice(f: Any) -> Any:
    """θ ← θ(1 − 2ηλ)."""
    return lambda theta, lr, weight_decay: f(theta, lr, 2 * weight_decay)


@plant(decay, "decoupled_decay_")
def decay_grows(f: Any) -> Any:
    """θ ← θ(1 + ηλ)."""
    return lambda theta, lr, weight_decay: f(theta, lr, -weight_decay)


@plant(ops, "add_scaled_")
def ascent(f: Any) -> Any:
    """θ moves up the gradient."""
    return lambda y, x, a: f(y, x, -a)
