"""Mistakes that could be made in StableMax's Triton kernels: in what they call, and in what they are launched with.

A function here is given the original and returns what takes its place; its name and docstring are the fault's. A
compiled kernel does not look up again what it calls: such faults are for the interpreter. Without Triton there is
nothing to plant into, and no lane to plant for.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trysquare import _cross_entropy
from trysquare_conformance.planting import Change, Planter

HAS_TRITON = importlib.util.find_spec("triton") is not None


def module(name: str) -> Any:
    """What faults are planted in."""
    return importlib.import_module(name) if HAS_TRITON else None


forward, backward = module("trysquare.kernels.stablemax"), module("trysquare.kernels.stablemax_gradient")
shared, tl = module("trysquare.kernels.stablemax_problem"), module("triton.language")

INTERPRETER = ("triton-interpreter",)
_planter = Planter("stablemax")
FAULTS = _planter.faults
plant = partial(_planter, lanes=INTERPRETER)
launched = partial(_planter.add, lanes=("triton-*",))


def plant_in_each(attribute: str) -> Callable[[Change], Change]:
    """Into what both passes call, once for each of them: they look it up by themselves."""

    def declare(change: Change) -> Change:
        plant(forward, attribute)(change)
        fault = FAULTS[-1]
        _planter.add(f"{fault.name}-backward", fault.what, backward, attribute, change, lanes=INTERPRETER)
        return change

    return declare


def given(kernel: str, **changed: Any) -> Change:
    """A launch of this kernel gets other arguments or constants; a function is given the value that it changes."""

    def change(launch: Any) -> Any:
        def faulty(called: Any, programs: int, *arguments: Any, constants: Any, **options: Any) -> None:
            if called.__name__ == kernel:
                named = dict(zip(called.arg_names, arguments, strict=False))
                new = {name: to(named.get(name)) if callable(to) else to for name, to in changed.items()}
                arguments = tuple(new.get(name, value) for name, value in named.items())
                constants = {name: new.get(name, value) for name, value in constants.items()}
            launch(called, programs, *arguments, constants=constants, **options)

        return faulty

    return change


# What kernels are launched with

for name, what, change in (
    ("kernel-last-class-not-summed", "the sums stop before the last class", given("_sums", classes=lambda c: c - 1)),
    ("kernel-half-of-a-part", "a program sums only half of its classes", given("_sums", part=lambda part: part // 2)),
    ("kernel-parts-not-added", "only the first part of a row counts", given("_finish", parts=1)),
    ("kernel-reads-side-by-side", "classes are read as neighbours, whatever the layout", given("_sums", stride=1)),
    ("kernel-target-read-side-by-side", "the chosen logit is read so", given("_finish", stride=1)),
    ("kernel-ignored-has-a-loss", "ignored positions have a loss", given("_finish", ignore_index=-1)),
    ("kernel-loss-not-smoothed", "label smoothing in the gradient only", given("_finish", smoothing=None)),
    ("kernel-loss-forgets-weight", "the loss without w_y", given("_finish", weight=None)),
    ("kernel-smoothing-forgets-weights", "label smoothing over unweighted classes", given("_sums", weight=None)),
    ("kernel-sums-in-float32", "float64 logits are summed in float32", given("_sums", DTYPE=getattr(tl, "float32", 0))),
):
    launched(name, what, forward, "launch", change)

for name, what, change in (
    ("kernel-gradient-reads-side-by-side", "the same in the backward pass", given("_gradient", stride=1)),
    ("kernel-gradient-written-side-by-side", "the gradient is written so", given("_gradient", to_stride=1)),
    ("kernel-one-incoming-gradient", "the first position's incoming gradient for all", given("_factors", g_stride=0)),
    ("kernel-ignored-nan-spreads", "ignored NaN logits reach their gradient", given("_gradient", ignore_index=-1)),
    ("kernel-gradient-not-smoothed", "label smoothing in the loss only", given("_gradient", SMOOTHS=False)),
    ("kernel-gradient-forgets-weight", "the chosen gradient without w_y", given("_factors", weight=None)),
    ("kernel-lift-forgets-weights", "the same in the backward pass", given("_gradient", weight=None)),
):
    launched(name, what, backward, "launch", change)


@_planter(shared, "floats", lanes=("triton-*",))
def kernel_smoothing_over_others(f: Any) -> Any:
    """α / (C − 1)."""
    return lambda device, alpha, uniform, total: f(device, alpha, uniform / (1 - uniform / alpha), total)


@_planter(shared, "floats", lanes=("triton-*",))
def kernel_weights_not_summed(f: Any) -> Any:
    """Σ w = C."""
    return lambda device, alpha, uniform, _: f(device, alpha, uniform, alpha / uniform)


@_planter(shared, "floats", lanes=("triton-*",))
def kernel_target_keeps_all(f: Any) -> Any:
    """Label smoothing takes nothing from the target."""
    return lambda device, _, uniform, total: f(device, 0.0, uniform, total)


@_planter(shared, "problem_of", lanes=("triton-*",))
def kernel_ignored_counted(f: Any) -> Any:
    """Ignored positions count as class 0."""
    return lambda x, target, weight, _, *rest: f(x, target.clamp(min=0), weight, -1, *rest)


@_planter(backward, "gradient", lanes=("triton-*",))
def kernel_no_gradient(_: Any) -> Any:
    """The gradient is zero."""
    return lambda problem, *_: torch.zeros_like(problem.x)


@_planter(forward, "losses", lanes=("triton-*",))
def kernel_normalizer_of_first(f: Any) -> Any:
    """The normalizer of the first position is kept for all."""

    def losses(problem: Any) -> tuple[Tensor, Tensor]:
        loss, normalizer = f(problem)
        return loss, normalizer[:1].repeat(normalizer.shape)

    return losses


@_planter(shared, "_merged", lanes=("triton-*",))
def kernel_positions_in_one_stride(f: Any) -> Any:
    """All positions at the stride of the innermost dimension."""

    def merged(dimensions: Any) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = f(dimensions)
        return [found[0]]

    return merged


@_planter(_cross_entropy, "chosen_backend", lanes=("triton-*",))
def kernel_falls_back_silently(_: Any) -> Any:
    """Eager operations run where kernels were asked for."""
    return lambda *_: "eager"


# What kernels call


@plant(forward, "HEADROOM")
def kernel_sum_overflows(_: Any) -> Any:
    """Σ s without headroom."""
    return tl.constexpr(1.0)


@plant(forward, "falls")
def kernel_exponential_below(_: Any) -> Any:
    """s(x) = exp x for x < 0."""
    return lambda x: tl.exp(tl.where(x > 0, 0.0, x)) * forward.LIFT


@plant(forward, "falls")
def kernel_s_of_magnitude(_: Any) -> Any:
    """1 / (1 + |x|) on both sides."""
    return lambda x: forward.damped(forward.LIFT, x)


@plant_in_each("log_s")
def kernel_log_without_sign(f: Any) -> Any:
    """γ = log(1 + |x|)."""
    return lambda x: f(tl.abs(x))


@plant(forward, "log_sum")
def kernel_infinite_logit_not_nan(_: Any) -> Any:
    """A logit of +∞ makes log Σ s infinite."""
    return lambda below, above: tl.log(below / forward.LIFT + above / forward.HEADROOM)


@plant(backward, "log_s_slope")
def kernel_slope_missing(_: Any) -> Any:
    """Smoothing's part of the gradient, and that of s below 0, without 1 / (1 + |x|)."""
    return lambda x: x * 0 + 1


@plant(backward, "s_slope")
def kernel_slope_of_one_side(_: Any) -> Any:
    """s′ = 1 / (1 − x) for x < 0."""
    return lambda x, slope, scale: tl.where(x > 0, scale, slope * scale)


@plant(backward, "s_slope")
def kernel_slope_of_both_sides(_: Any) -> Any:
    """s′ = (1 + |x|)⁻² on both sides."""
    return lambda _, slope, scale: slope * scale * slope


@plant(backward, "expm1")
def kernel_target_not_subtracted(_: Any) -> Any:
    """∂ℓ/∂x = γ′·p, also at the target."""
    return lambda x: tl.exp(x) * 1.0


@plant_in_each("weighted")
def kernel_weight_of_first_class(f: Any) -> Any:
    """Label smoothing with the first class's weight for all."""
    return lambda values, weight, column, *masks: f(values, weight, column * 0, *masks)


@plant_in_each("chosen_weight")
def kernel_weight_of_next_class(f: Any) -> Any:
    """w of the class before the target."""
    return lambda weight, y, chosen: f(weight, tl.where(y > 0, y - 1, y), chosen)


@plant_in_each("chosen_logit")
def kernel_logit_of_first_class(f: Any) -> Any:
    """x_0 in place of x_y."""
    return lambda x, places, y, *rest: f(x, places, y * 0, *rest)


@plant_in_each("begins")
def kernel_positions_not_moved(f: Any) -> Any:
    """Every position reads the first one's logits."""
    return lambda position, *rest: f(position, *rest) * 0


@plant_in_each("in_chunks")
def kernel_head_not_masked(_: Any) -> Any:
    """The first chunk of a row is taken with what lies ahead of the row."""
    return lambda column, shift, classes, chunk: column < (shift + classes) // chunk * chunk


@plant(forward, "in_chunks")
def kernel_tail_not_masked(_: Any) -> Any:
    """The last chunk of a row is taken with what lies behind the row."""

    def in_chunks(column: Any, shift: Any, classes: Any, chunk: Any) -> Any:
        whole = (shift + chunk - 1) // chunk * chunk
        return (column >= whole) & (column < (shift + classes + chunk - 1) // chunk * chunk)

    return in_chunks


@plant_in_each("at_ends")
def kernel_ends_left_out(f: Any) -> Any:
    """Nothing is taken of chunks that are not wholly of a row."""

    def at_ends(*arguments: Any) -> Any:
        column, is_end = f(*arguments)
        return column, is_end & (column < 0)

    return at_ends


@plant(backward, "narrowed")
def kernel_gradient_truncated(_: Any) -> Any:
    """A bfloat16 gradient is cut off, not rounded."""

    def narrowed(x: Any, dtype: Any) -> Any:
        if dtype != tl.bfloat16:
            return x.to(dtype)
        return (x.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)

    return narrowed
