"""Mistakes in THORN's other groups and around its equations: averaging, Adam, release, groups, batches, precision."""

from typing import Any

import torch
from torch import Tensor

from trysquare import THORN, _backend, _batches
from trysquare._averaging import Averaging
from trysquare._optimizer import BatchedOptimizer
from trysquare._release import Release
from trysquare._thorn_steps import Steps
from trysquare.ops import moments, schedule_free
from trysquare.ops import thorn as ops
from trysquare_conformance.planting import WITHOUT_KERNELS, Planter

COMPILED = ("compiled-*",)
plant = Planter("thorn", lanes=WITHOUT_KERNELS)
FAULTS = plant.faults

# Second moment


@plant(moments, "second_moment_")
def second_moment_not_squared(_: Any) -> Any:
    """v ← β₂v + (1−β₂)|g|."""
    return lambda v, g, beta2: v.mul_(beta2).add_(g.abs() * (1 - beta2))


@plant(moments, "second_moment_")
def second_moment_betas(f: Any) -> Any:
    """v ← (1−β₂)v + β₂g²."""
    return lambda v, g, beta2: f(v, g, 1 - beta2)


@plant(moments, "correction")
def bias_not_corrected(_: Any) -> Any:
    """v itself instead of v/(1−β₂ᵗ)."""
    return lambda step, _, dtype: torch.ones_like(step).to(dtype).view(-1, 1, 1)


@plant(moments, "correction")
def bias_of_step_before(f: Any) -> Any:
    """t one too small."""
    return lambda step, beta2, dtype: f((step - 1).clamp(min=1), beta2, dtype)


@plant(moments, "denominator")
def eps_inside(_: Any) -> Any:
    """√(v̂ + ε)."""

    def denominator(v: Tensor, eps: float, correction: Tensor) -> Tensor:
        return (v * correction.square() + eps).sqrt()

    return denominator


@plant(moments, "denominator")
def eps_corrected(_: Any) -> Any:
    """(√v + ε)/√(1−β₂ᵗ)."""
    return lambda v, eps, correction: (v.sqrt() + eps) * correction


@plant(moments, "denominator")
def eps_missing(f: Any) -> Any:
    """√v̂ alone: 0/0."""
    return lambda v, _, correction: f(v, 0.0, correction)


# Averaging


@plant(schedule_free, "step_")
def z_before_y(_: Any) -> Any:
    """z is stepped first, so y moves twice as far (the original)."""

    def step_(y: Tensor, z: Tensor, u: Tensor, lr: Any, share: Any, pull: Any) -> None:
        z.sub_(u * lr)
        y.add_((z - y) * share).add_(u * pull)

    return step_


@plant(schedule_free, "step_")
def y_not_drawn(_: Any) -> Any:
    """c(z − y) is left out."""

    def step_(y: Tensor, z: Tensor, u: Tensor, lr: Any, _: Any, pull: Any) -> None:
        y.add_(u * pull)
        z.sub_(u * lr)

    return step_


@plant(schedule_free, "step_")
def z_stands(f: Any) -> Any:
    """z stays."""
    return lambda y, z, *rest: f(y, z.clone(), *rest)


@plant(schedule_free, "step_")
def z_decays_not(f: Any) -> Any:
    """z goes by half of the rate."""
    return lambda y, z, u, lr, share, pull: f(y, z, u, lr / 2, share, pull)


@plant(schedule_free, "pull")
def pull_whole(_: Any) -> Any:
    """y moves by −ηu."""
    return lambda lr, *_: -lr


@plant(schedule_free, "pull")
def pull_without_share(f: Any) -> Any:
    """η(β₁ − 1)."""
    return lambda lr, share, beta1: f(lr, torch.zeros_like(share), beta1)


@plant(schedule_free, "pull")
def pull_of_other_beta(f: Any) -> Any:
    """β₁ and 1 − β₁ exchanged."""
    return lambda lr, share, beta1: f(lr, share, 1 - beta1)


@plant(schedule_free, "weigh")
def rate_not_largest(_: Any) -> Any:
    """lr_max is this step's rate."""

    def weigh(lr: Tensor, _: Tensor, weight_sum: Tensor) -> Any:
        weight_sum = weight_sum + lr.square()
        return lr, weight_sum, torch.where(weight_sum > 0, lr.square() / weight_sum, 0.0)

    return weigh


@plant(schedule_free, "weigh")
def weight_not_squared(_: Any) -> Any:
    """w = lr_max."""

    def weigh(lr: Tensor, lr_max: Tensor, weight_sum: Tensor) -> Any:
        lr_max = torch.maximum(lr, lr_max)
        weight_sum = weight_sum + lr_max
        return lr_max, weight_sum, torch.where(weight_sum > 0, lr_max / weight_sum, 0.0)

    return weigh


@plant(schedule_free, "weigh")
def weight_of_past(_: Any) -> Any:
    """c = w over the sum before this step."""

    def weigh(lr: Tensor, lr_max: Tensor, weight_sum: Tensor) -> Any:
        lr_max = torch.maximum(lr, lr_max)
        share = torch.where(weight_sum > 0, lr_max.square() / weight_sum, 1.0)
        return lr_max, weight_sum + lr_max.square(), share

    return weigh


@plant(schedule_free, "weigh")
def weight_zero_over_zero(_: Any) -> Any:
    """0/0 at a rate of zero."""

    def weigh(lr: Tensor, lr_max: Tensor, weight_sum: Tensor) -> Any:
        lr_max = torch.maximum(lr, lr_max)
        weight_sum = weight_sum + lr_max.square()
        return lr_max, weight_sum, lr_max.square() / weight_sum

    return weigh


@plant(schedule_free, "average_")
def mean_of_half(f: Any) -> Any:
    """x ← x/2 + z/2."""
    return lambda x, z, share: f(x, z, torch.full_like(share, 0.5))


@plant(schedule_free, "average_")
def mean_stands(_: Any) -> Any:
    """x stays where it began."""
    return lambda x, *_: x


@plant(schedule_free, "averaged")
def mean_of_other_beta(f: Any) -> Any:
    """(y − β₁z)/(1−β₁)."""
    return lambda y, z, beta1: f(y, z, 1 - beta1)


@plant(schedule_free, "averaged")
def mean_is_z(_: Any) -> Any:
    """z is shown for the mean."""
    return lambda _, z, beta1: z * (beta1 / beta1)


@plant(Averaging, "_put_back")
def y_lost(f: Any) -> Any:
    """train() puts back y with its last bit lost."""

    def put_back(self: Any, group: Any, parameter: Tensor) -> None:
        f(self, group, parameter)
        parameter.mul_(1 + torch.finfo(parameter.dtype).eps)

    return put_back


@plant(Averaging, "eval")
def mean_not_shown(_: Any) -> Any:
    """eval() does nothing."""
    return lambda _: None


@plant(THORN, "_new_state")
def z_from_zero(_: Any) -> Any:
    """x, y and z begin at zero instead of θ."""
    return BatchedOptimizer._new_state  # noqa: SLF001  # what THORN's own builds upon


@plant(ops, "schedule_free_")
def half_steps_from_rounding(f: Any) -> Any:
    """A half-precision parameter steps from itself and not from its y."""

    def schedule_free_(theta: Tensor, g: Tensor, z: Tensor, v: Tensor, y: Tensor | None, *rest: Any) -> None:
        if y is not None:
            y.copy_(theta)
        f(theta, g, z, v, y, *rest)

    return schedule_free_


# Adam


@plant(ops, "mean_update")
def adam_without_mean(f: Any) -> Any:
    """g in place of m̂."""

    def mean_update(g: Tensor, m: Tensor, v: Tensor, mean_correction: Tensor, correction: Tensor, *rest: Any) -> Tensor:
        f(g, m, v, mean_correction, correction, *rest)
        return g / moments.denominator(v, rest[0], correction)

    return mean_update


@plant(ops, "mean_update")
def adam_mean_not_corrected(f: Any) -> Any:
    """m in place of m/(1−β₁ᵗ)."""
    return lambda g, m, v, correction, *rest: f(g, m, v, torch.ones_like(correction), *rest)


@plant(ops, "mean_update")
def adam_sums(_: Any) -> Any:
    """m ← β₁m + g."""

    def mean_update(g: Tensor, m: Tensor, v: Tensor, mean_correction: Tensor, correction: Tensor, *rest: Any) -> Tensor:
        eps, beta1, beta2 = rest
        m.mul_(beta1).add_(g)
        moments.second_moment_(v, g, beta2)
        return (m * mean_correction) / moments.denominator(v, eps, correction)

    return mean_update


@plant(ops, "descend_")
def adam_ascends(f: Any) -> Any:
    """θ moves up the gradient."""
    return lambda theta, u, lr, weight_decay: f(theta, u, -lr, weight_decay)


# Gradient release


@plant(ops, "collect_")
def release_sums(f: Any) -> Any:
    """S collects the sum of the updates, not their mean."""
    return lambda *arguments: f(*arguments[:4], arguments[4] * 0 + 1, *arguments[5:])


@plant(ops, "collect_")
def release_last_update(f: Any) -> Any:
    """The last update alone is in S."""
    return lambda update_sum, *rest: f(update_sum.zero_(), *rest)


@plant(ops, "collect_mean_")
def release_last_update_of_adam(f: Any) -> Any:
    """The last update alone is in S."""
    return lambda update_sum, *rest: f(update_sum.zero_(), *rest)


@plant(ops, "accumulate_")
def release_forgets(_: Any) -> Any:
    """Between updates m stays."""
    return lambda *_: None


@plant(Release, "_spend")
def release_keeps_sum(f: Any) -> Any:
    """S is not begun anew."""

    def spend(self: Any, batch: Any) -> None:
        kept = [total.clone() for total in batch.state["update_sum"]]
        f(self, batch)
        torch._foreach_copy_(batch.state["update_sum"], kept)

    return spend


@plant(Release, "_spend")
def release_empties_sum_by_zero(f: Any) -> Any:
    """S is begun anew as 0·S, in which NaN stays."""

    def spend(self: Any, batch: Any) -> None:
        zeros = [total * 0 for total in batch.state["update_sum"]]
        f(self, batch)
        for total, zero in zip(batch.state["update_sum"], zeros, strict=True):
            total.add_(zero)

    return spend


@plant(Release, "_micro_step")
def release_one_early(_: Any) -> Any:
    """Parameters move at n = N − 1, 2N − 1, … (the original)."""

    def micro_step(self: Any, batch: Any) -> None:
        rate = batch.group["update_rate"]
        moves = (int(batch.state["step"][0]) + 1) % rate == 0
        if rate == 1:
            self._move_batch(batch, None)
        elif batch.group["orthogonalize"]:
            (self._orthogonalized if moves else self._accumulate)(batch, None)
        else:
            self._collect(batch)
            if moves:
                self._spend(batch)

    return micro_step


@plant(Release, "_micro_step")
def release_every_time(_: Any) -> Any:
    """Every backward pass is an update."""
    return lambda self, batch: self._move_batch(batch, None)


@plant(Steps, "_orthogonalized")
def release_rectifies_by_calls(f: Any) -> Any:
    """r of a matrix at n instead of n / N."""
    return lambda self, batch, finite: f(self, batch._replace(group={**batch.group, "update_rate": 1}), finite)


@plant(Steps, "_corrections")
def release_corrects_by_updates(_: Any) -> Any:
    """v/(1−β₂ᵗ) with t = n / N."""

    def corrections(_: Any, batch: Any) -> Tensor:
        steps = (torch.stack(batch.state["step"]) / batch.group["update_rate"]).floor().clamp(min=1)
        return moments.correction(steps, batch.group["betas"][1], steps.dtype)

    return corrections


@plant(Release, "_hook")
def release_keeps_gradients(f: Any) -> Any:
    """The gradient is not freed."""

    def hook(self: Any, member: Any) -> Any:
        right = f(self, member)

        def keeping(parameter: Tensor) -> None:
            kept = parameter.grad
            right(parameter)
            parameter.grad = kept

        return keeping

    return hook


# Groups and batches


@plant(THORN, "_averages")
def schedule_free_ignored(_: Any) -> Any:
    """schedule_free=False is schedule-free all the same."""
    return lambda _, group: not group["orthogonalize"]


@plant(Steps, "_move_batch")
def rate_of_first_group(f: Any) -> Any:
    """Every group has the learning rate of the first."""
    return lambda self, batch, finite: f(
        self, batch._replace(group={**batch.group, "lr": self.param_groups[0]["lr"]}), finite
    )


@plant(Steps, "_move")
def no_op(_: Any) -> Any:
    """The step does nothing."""
    return lambda *_: None


@plant(_batches, "advance")
def step_not_counted(_: Any) -> Any:
    """t stays."""
    return lambda *_: None


@plant(_batches, "advance")
def step_counted_twice(f: Any) -> Any:
    """t ← t + 2."""
    return lambda *arguments: (f(*arguments), f(*arguments))


@plant(BatchedOptimizer, "_batches")
def gradient_of_neighbour(f: Any) -> Any:
    """A missing gradient shifts those of its bucket by one."""

    def batches(self: Any, group: dict[str, Any], traced: bool) -> Any:
        complete = all(parameter.grad is not None for parameter in group["params"])
        made = f(self, group, traced)
        return made if complete else [b._replace(gradients=b.gradients[1:] + b.gradients[:1]) for b in made]

    return batches


@plant(_batches.Piece, "store")
def last_member_skipped(_: Any) -> Any:
    """The last parameter of a batch is not written back."""

    def store(self: Any) -> None:
        for targets, batch in self.copies:
            for target, values in list(zip(targets, batch.unbind(), strict=True))[: max(1, len(targets) - 1)]:
                target.copy_(values.view(target.shape))

    return store


# Precision, policies, backends


@plant(THORN, "_layout")
def state_in_parameter_dtype(f: Any) -> Any:
    """The state of bfloat16 parameters in bfloat16."""

    def layout(self: Any, group: dict[str, Any], parameter: Tensor) -> Any:
        made = f(self, group, parameter)
        return {name: entry._replace(dtype=parameter.dtype) if entry.shape else entry for name, entry in made.items()}

    return layout


@plant(_batches.Piece, "restore")
def skip_moves(_: Any) -> Any:
    """A step that is skipped moves parameters and state."""
    return lambda *_: None


@plant(_batches, "advance")
def skip_counts_the_step(f: Any) -> Any:
    """A step that is skipped is counted."""
    return lambda steps, _: f(steps, None)


@plant(BatchedOptimizer, "_refuse_nonfinite")
def raise_lets_pass(_: Any) -> Any:
    """A gradient that is not finite does not raise."""
    return lambda *_: None


@plant(_backend, "run", lanes=COMPILED)
def falls_back(f: Any) -> Any:
    """Eager runs where another backend was asked for."""
    return lambda _, function, *arguments: f("eager", function, *arguments)
