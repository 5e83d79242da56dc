"""Mistakes around DolphinFlow's equations: in clipping, schedule, groups, batches, precision, policies, backends."""

from typing import Any

import torch
from torch import Tensor

from trysquare import _backend, _batches, _graphs, dolphinflow
from trysquare._optimizer import BatchedOptimizer
from trysquare.ops import clipping, decay, loss_schedule
from trysquare.ops import dolphinflow as ops
from trysquare_conformance.planting import WITHOUT_KERNELS, Planter
from trysquare_conformance.snapshots import to_array
from trysquare_reference import dolphinflow as reference

Optimizer = dolphinflow.DolphinFlow
COMPILED, EAGER = ("compiled-*",), ("eager-*",)
EVERYWHERE = ("*",)
plant = Planter("dolphinflow", lanes=WITHOUT_KERNELS)
FAULTS = plant.faults

# Clipping


@plant(clipping, "clip_scale")
def clip_ignored(_: Any) -> Any:
    """s = 1."""
    return lambda norm, _: torch.ones_like(norm)


@plant(clipping, "clip_scale")
def clip_stretches(_: Any) -> Any:
    """A short gradient is made long."""
    return lambda norm, max_norm: max_norm / (norm + clipping.MARGIN)


@plant(clipping, "clip_scale")
def clip_without_margin(_: Any) -> Any:
    """G/n instead of G/(n + 1e-6)."""
    return lambda norm, max_norm: (max_norm / norm).clamp(max=1.0)


@plant(clipping, "clip_scale")
def clip_squared(f: Any) -> Any:
    """s²."""
    return lambda norm, max_norm: f(norm, max_norm).square()


@plant(clipping, "clip_scale")
def clip_silent_zero(_: Any) -> Any:
    """An infinite norm makes a step of zero."""
    return lambda norm, max_norm: (max_norm / (norm + clipping.MARGIN)).clamp(max=1.0).nan_to_num(0.0)


@plant(clipping, "summed_in_parts")
def clip_leaves_out_the_end(f: Any) -> Any:
    """The norm of whole parts of a long gradient, without what is left."""
    return lambda gradient: f(gradient.flatten()[: gradient.numel() // clipping.SUMMED * clipping.SUMMED])


@plant(clipping, "summed_in_parts", lanes=EAGER)
def clip_overflows(f: Any) -> Any:
    """A sum of squares beyond float32 is taken for the largest number."""
    return lambda gradient: f(gradient).nan_to_num(posinf=3e38)


@plant(Optimizer, "_sweep", lanes=COMPILED)
def sweep_stays_narrow(f: Any) -> Any:
    """Where a sum of squares is beyond float32 it is not formed again in float64."""
    return lambda self, runs, **_: f(self, runs, wide=False)


@plant(dolphinflow, "_scaled", lanes=COMPILED)
def coefficients_not_clipped(f: Any) -> Any:
    """The clipped gradient is projected as if it were still as long as before."""
    return lambda measured, _, parameter: f(measured, None, parameter)


@plant(Optimizer, "_move", lanes=EVERYWHERE)
def clip_each(f: Any) -> Any:
    """Each bucket is clipped by its own norm."""
    return lambda self, batches: [f(self, [batch]) for batch in batches] and None


@plant(ops, "clipped")
def clip_in_place(_: Any) -> Any:
    """p.grad itself is scaled."""

    def clipped(gradient: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        return gradient.to(dtype) if scale is None else gradient.mul_(scale.to(gradient.dtype)).to(dtype)

    return clipped


@plant(clipping, "total_norm")
def clip_norm_in_float32(f: Any) -> Any:
    """The norm of float64 gradients in float32."""
    return lambda sums: f(sums).float().double()


# Learning rate, schedule, groups


@plant(ops, "update_")
def decay_coupled(f: Any) -> Any:
    """λθ added to the gradient."""

    def update_(theta: Tensor, gradient: Tensor, *rest: Any) -> None:
        *tensors, scale, lr, weight_decay, momentum, eps, beta2, beta2_rest, rule = rest
        f(theta, gradient + weight_decay * theta, *tensors, scale, lr, 0.0, momentum, eps, beta2, beta2_rest, rule)

    return update_


@plant(ops, "update_")
def decay_after_update(f: Any) -> Any:
    """θ ← (θ − ηu)(1 − ηλ)."""

    def update_(theta: Tensor, *rest: Any) -> None:
        *tensors, scale, lr, weight_decay, momentum, eps, beta2, beta2_rest, rule = rest
        f(theta, *tensors, scale, lr, 0.0, momentum, eps, beta2, beta2_rest, rule)
        decay.decoupled_decay_(theta, lr, weight_decay)

    return update_


@plant(Optimizer, "_numbers")
def loss_scale_not_in_decay(f: Any) -> Any:
    """The loss schedule lowers the rate of the update and not of the decay."""

    def numbers(self: Any, group: dict[str, Any], *rest: Any) -> Any:
        return f(self, {**group, "weight_decay": group["weight_decay"] / group["loss_lr_scale"]}, *rest)

    return numbers


@plant(dolphinflow, "_rate")
def loss_scale_ignored(_: Any) -> Any:
    """The loss schedule never lowers the rate."""
    return lambda group: group["lr"]


@plant(loss_schedule, "PATIENCE")
def loss_patience(_: Any) -> Any:
    """The loss may stall six times."""
    return 6


@plant(loss_schedule, "FACTOR")
def loss_factor(_: Any) -> Any:
    """The rate falls by 2 % instead of 1 %."""
    return 0.98


@plant(loss_schedule, "update")
def loss_mean_of_past(f: Any) -> Any:
    """Weight β for the new loss."""
    return lambda *arguments: f(*arguments[:-1], 1 - arguments[-1])


@plant(Optimizer, "_move_run")
def rate_of_first_group(f: Any) -> Any:
    """Every group has the learning rate of the first."""

    def move_run(self: Any, run: Any, *rest: Any) -> None:
        lr = self.param_groups[0]["lr"]
        f(self, [batch._replace(group={**batch.group, "lr": lr}) for batch in run], *rest)

    return move_run


# Batches


@plant(Optimizer, "_move", lanes=EVERYWHERE)
def no_op(_: Any) -> Any:
    """The step does nothing."""
    return lambda *_: None


@plant(Optimizer, "_move", lanes=EVERYWHERE)
def copied_reference(_: Any) -> Any:
    """The answer is right, because the reference itself computes it."""

    def move(self: Any, batches: Any) -> None:
        for batch in batches:
            hp = reference.Hyperparameters(**{name: batch.group[name] for name in self._constraints})
            for index in range(len(batch.parameters)):
                _copy_reference(batch, index, hp)

    return move


def _copy_reference(batch: Any, index: int, hp: reference.Hyperparameters) -> None:
    theta, g = to_array(batch.parameters[index]), to_array(batch.gradients[index])
    held = {name: tensors[index] for name, tensors in batch.state.items()}
    before = {name: int(t) if name == "step" else to_array(t) for name, t in held.items()}
    (new,), (after,) = reference.step([theta], [g], [before], hp)
    batch.parameters[index].copy_(torch.from_numpy(new))
    for name, tensor in held.items():
        tensor.copy_(torch.as_tensor(after[name]))


@plant(dolphinflow, "_advance")
def step_not_counted(_: Any) -> Any:
    """t stays."""
    return lambda *_: None


@plant(dolphinflow, "_advance")
def step_counted_twice(f: Any) -> Any:
    """t ← t + 2."""
    return lambda *arguments: (f(*arguments), f(*arguments))


@plant(Optimizer, "_pieces", lanes=("compiled-*",))
def corrections_of_first_shape(f: Any) -> Any:
    """In a call for several shapes, corrections of the second moment are those of the first shape's members."""
    return lambda self, run: (piece for batch in run for piece in f(self, [batch]))


@plant(BatchedOptimizer, "_batches", lanes=EVERYWHERE)
def gradient_of_neighbour(f: Any) -> Any:
    """A missing gradient shifts those of its bucket by one."""

    def batches(self: Any, group: dict[str, Any], traced: bool) -> Any:
        complete = all(parameter.grad is not None for parameter in group["params"])
        made = f(self, group, traced)
        return made if complete else [b._replace(gradients=b.gradients[1:] + b.gradients[:1]) for b in made]

    return batches


@plant(_batches, "pieces", lanes=("eager-*",))
def last_piece_skipped(f: Any) -> Any:
    """The last rows of a parameter that is stepped in pieces stay."""

    def pieces(*arguments: Any) -> Any:
        made = list(f(*arguments))
        return made[: max(1, len(made) - 1)]

    return pieces


@plant(_batches.Piece, "store")
def last_member_skipped(_: Any) -> Any:
    """The last parameter of a batch is not written back."""

    def store(self: Any) -> None:
        for targets, batch in self.copies:
            for target, values in list(zip(targets, batch.unbind(), strict=True))[: max(1, len(targets) - 1)]:
                target.copy_(values.view(target.shape))

    return store


# Precision


@plant(Optimizer, "_layout", lanes=EVERYWHERE)
def state_in_parameter_dtype(f: Any) -> Any:
    """The state of bfloat16 parameters in bfloat16."""

    def layout(self: Any, group: dict[str, Any], parameter: Tensor) -> Any:
        made = f(self, group, parameter)
        return {name: entry._replace(dtype=parameter.dtype) if entry.shape else entry for name, entry in made.items()}

    return layout


@plant(ops, "clipped")
def arithmetic_in_bfloat16(f: Any) -> Any:
    """The gradient rounded to bfloat16."""
    return lambda gradient, scale, dtype: f(gradient, scale, dtype).bfloat16().to(dtype)


@plant(ops, "clipped", lanes=("eager-*",))
def arithmetic_in_float32(f: Any) -> Any:
    """Gradients of float64 rounded to float32."""
    return lambda gradient, scale, dtype: f(gradient, scale, dtype).float().to(dtype)


# Policies and backends


@plant(dolphinflow, "_advance")
def skip_counts_the_step(f: Any) -> Any:
    """A step that is skipped is counted."""
    return lambda steps, _: f(steps, None)


@plant(_batches.Piece, "restore")
def skip_moves(_: Any) -> Any:
    """A step that is skipped moves parameters and state."""
    return lambda *_: None


@plant(BatchedOptimizer, "_refuse_nonfinite", lanes=EVERYWHERE)
def raise_lets_pass(_: Any) -> Any:
    """A gradient that is not finite does not raise."""
    return lambda *_: None


@plant(_backend, "run_each", lanes=COMPILED)
def falls_back(f: Any) -> Any:
    """Eager runs where another backend was asked for."""
    return lambda _, function, each, *shared: f("eager", function, each, *shared)


@plant(_graphs, "run_each", lanes=COMPILED)
def compiles_nothing(_: Any) -> Any:
    """The compiled backend is counted, and eager runs."""
    return lambda function, each, shared: [function(*own, *shared) for own in each]
