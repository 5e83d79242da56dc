"""Mistakes that could be made in DolphinFlow8bit: in its equations, around its windows, and in what is coded.

A function here is given the original and returns what takes its place; its name and docstring are the fault's.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trysquare import _backend, _coded_state, _coded_windows, _windows, dolphinflow8bit
from trysquare.ops import blockwise8bit, clipping, decay, moments, polar, projection
from trysquare.ops import dolphinflow8bit as ops
from trysquare_conformance.planting import Planter

Optimizer = dolphinflow8bit.DolphinFlow8bit
EAGER = ("eager-*", "bitsandbytes-*")
HERE = (*EAGER, "compiled-*")
"""Where the tensor operations of the fast code run; kernels have faults of their own."""

_planter = Planter("dolphinflow8bit")
FAULTS = _planter.faults
everywhere = partial(_planter, lanes=("*",))
plant = partial(_planter, lanes=HERE)

# Moments


@plant(Optimizer, "_numbers")
def betas_swapped(f: Any) -> Any:
    """β₁ where β₂ belongs, and the reverse."""
    return lambda self, group, dtype: f(self, {**group, "momentum": group["beta2"], "beta2": group["momentum"]}, dtype)


@plant(ops, "average_")
def first_moment_summed(f: Any) -> Any:
    """m ← β₁m + g̃, as DolphinFlow's momentum."""
    return lambda m, g, beta, _: f(m, g, beta, 1.0)


@plant(ops, "average_")
def first_moment_forgotten(f: Any) -> Any:
    """m ← (1−β₁)g̃."""
    return lambda m, *rest: f(m.zero_(), *rest)


@plant(ops, "average_square_")
def second_moment_summed(f: Any) -> Any:
    """v ← β₂v + g̃²."""
    return lambda v, g, beta, _: f(v, g, beta, 1.0)


@plant(ops, "average_square_")
def second_moment_forgotten(f: Any) -> Any:
    """v ← (1−β₂)g̃²."""
    return lambda v, *rest: f(v.zero_(), *rest)


@plant(ops, "average_square_")
def second_moment_of_magnitude(f: Any) -> Any:
    """v ← β₂v + (1−β₂)|g̃|."""
    return lambda v, g, *rest: f(v, g.abs().sqrt(), *rest)


@plant(_coded_windows, "corrections_of")
def bias_of_the_first_uncorrected(f: Any) -> Any:
    """m̂ = m."""

    def corrections(*arguments: Any) -> Any:
        first, second = f(*arguments)
        return None if first is None else torch.ones_like(first), second

    return corrections


@plant(_coded_windows, "corrections_of")
def bias_of_the_second_uncorrected(f: Any) -> Any:
    """v̂ = v."""

    def corrections(*arguments: Any) -> Any:
        first, second = f(*arguments)
        return first, None if second is None else torch.ones_like(second)

    return corrections


@plant(_coded_windows, "corrections_of")
def bias_of_the_step_before(f: Any) -> Any:
    """t − 1 where t belongs."""
    return lambda group, steps, dtype: f(group, (steps - 1).clamp(min=0.5), dtype)


@plant(moments, "denominator")
def eps_inside_the_root(_: Any) -> Any:
    """√(v̂ + ε)."""
    return lambda v, eps, correction: (v * (1 if correction is None else correction.square()) + eps).sqrt()


@plant(moments, "denominator")
def eps_ignored(f: Any) -> Any:
    """√v̂."""
    return lambda v, _, correction: f(v, 0.0, correction)


@plant(moments, "denominator")
def no_root(_: Any) -> Any:
    """v̂ + ε."""
    return lambda v, eps, correction: v * (1 if correction is None else correction.square()) + eps


@plant(ops, "move_")
def nesterov(f: Any) -> Any:
    """DolphinFlow's look ahead."""
    return lambda theta, m, v, *rest: f(theta, m + 0.9 * m, v, *rest)


@plant(ops, "move_")
def moments_after_coding(f: Any) -> Any:
    """The step uses the first moment as it comes back from its codes."""

    def move(theta: Tensor, m: Tensor, v: Tensor | None, *rest: Any) -> None:
        if m.ndim == 2:
            qmap = blockwise8bit.dynamic_map(True, m.device)
            m = blockwise8bit.dequantize(*blockwise8bit.quantize_signed(m, blockwise8bit.boundaries(qmap)), qmap)
        f(theta, m, v, *rest)

    return move


# Decay and rate


@plant(decay, "decoupled_decay_")
def decay_forgotten(_: Any) -> Any:
    """λ = 0."""
    return lambda theta, *_: theta


@plant(ops, "move_")
def decay_after_update(_: Any) -> Any:
    """θ ← (θ − ηu)(1 − ηλ), as bitsandbytes' CUDA kernel."""

    def move(
        theta: Tensor, m: Tensor, v: Tensor | None, first: Any, second: Any, lr: Any, weight_decay: Any, eps: Any
    ) -> None:
        u = m if v is None else m * first / moments.denominator(v, eps, second)
        decay.decoupled_decay_(theta.sub_(u * lr), lr, weight_decay)

    return move


@plant(_coded_windows, "rate", lanes=EAGER)
def loss_scale_ignored(_: Any) -> Any:
    """The loss schedule never lowers the rate."""
    return lambda group: group["lr"]


@plant(_coded_windows, "rate")
def rate_fixed(_: Any) -> Any:
    """The default rate."""
    return lambda _: 1e-4


# Gradient


@plant(clipping, "clip_scale")
def clip_ignored(_: Any) -> Any:
    """s = 1."""
    return lambda norm, _: torch.ones_like(norm)


@everywhere(Optimizer, "_move")
def clip_each(f: Any) -> Any:
    """Each bucket is clipped by its own norm."""
    return lambda self, batches: [f(self, [batch]) for batch in batches] and None


@plant(ops, "direction")
def clip_in_place(f: Any) -> Any:
    """p.grad itself is scaled."""

    def direction(theta: Tensor, gradient: Tensor, scale: Tensor | None, coefficient: Tensor | None) -> Tensor:
        if scale is not None:
            gradient.mul_(scale.to(gradient.dtype))
        return f(theta, gradient, None, coefficient)  # type: ignore[no-any-return]

    return direction


@plant(projection, "subtract_")
def not_projected(_: Any) -> Any:
    """g̃ = g."""
    return lambda x, *_: x


@plant(projection, "subtract_")
def projected_by_zero(_: Any) -> Any:
    """A coefficient of 0 is subtracted like others: beside an infinite weight that is NaN."""
    return lambda x, w, coefficient: x.addcmul_(w, coefficient, value=-1)


@plant(projection, "subtract_")
def projected_twice_over(f: Any) -> Any:
    """g̃ = g − 2w⟨w,g⟩/⟨w,w⟩."""
    return lambda x, w, coefficient: f(x, w, 2 * coefficient)


@everywhere(_coded_windows, "mode_of")
def projection_of_vectors(_: Any) -> Any:
    """Parameters of one dimension are projected too."""
    return lambda group, _: group["ortho_mode"]


@plant(Optimizer, "_row_coefficients")
def coefficient_of_the_row_before(f: Any) -> Any:
    """Each row is projected by its neighbour's coefficient."""
    return lambda *arguments: f(*arguments).roll(1)


@plant(Optimizer, "_row_coefficients")
def coefficient_of_the_matrix(f: Any) -> Any:
    """All rows are projected as one."""

    def coefficients(*arguments: Any) -> Tensor:
        found = f(*arguments)
        return found.mean().expand_as(found).contiguous()  # type: ignore[no-any-return]

    return coefficients


@plant(polar, "newton_schulz", lanes=EAGER)
def polar_once(f: Any) -> Any:
    """One iteration whatever ns_steps."""
    return lambda u, _, eps: f(u, 1, eps)


@plant(polar, "newton_schulz", lanes=EAGER)
def polar_of_norm_one(f: Any) -> Any:
    """The norm of the gradient is lost."""
    return lambda u, *rest: f(u, *rest) / u.square().sum(dim=(-2, -1), keepdim=True).sqrt()


# Windows


@plant(_coded_windows, "spans", lanes=EAGER)
def last_window_skipped(f: Any) -> Any:
    """The last window is left out where there are several."""

    def spans(*arguments: Any) -> Iterator[_windows.Span]:
        found = list(f(*arguments))
        yield from found[:-1] or found

    return spans


@plant(_coded_windows, "spans", lanes=EAGER)
def short_block_skipped(f: Any) -> Any:
    """The last block is left out where it ends early."""

    def spans(*arguments: Any) -> Iterator[_windows.Span]:
        for start, stop in f(*arguments):
            yield _windows.Span(start, stop - stop % 256 if stop - start > 256 else stop)

    return spans


@plant(_windows.Window, "store", lanes=EAGER)
def copies_not_stored(_: Any) -> Any:
    """What was copied is not written back."""
    return lambda _: None


@plant(_windows.Window, "__init__", lanes=EAGER)
def filled_with_code_zero(f: Any) -> Any:
    """A short block is filled up with codes of the largest negative value."""
    return lambda self, tensor, span, width, _=0: f(self, tensor, span, width)


@plant(_coded_windows, "spread", lanes=EAGER)
def rows_out_of_step(f: Any) -> Any:
    """A window begins with the first row's coefficient."""
    return lambda values, width, span: f(values, width, _windows.Span(0, span.stop - span.start))


@plant(Optimizer, "_move_coded", lanes=EAGER)
def first_of_a_bucket_for_all(f: Any) -> Any:
    """Every parameter of a bucket takes the first one's gradient."""

    def move(self: Any, batch: Any, *rest: Any) -> None:
        f(self, batch._replace(gradients=[batch.gradients[0]] * len(batch.gradients)), *rest)

    return move


# State


@everywhere(_coded_state, "is_coded")
def everything_coded(_: Any) -> Any:
    """Small tensors are coded too."""
    return lambda parameter: parameter.numel() > 0


@everywhere(_coded_state, "is_coded")
def nothing_coded(_: Any) -> Any:
    """Large tensors keep float32 moments."""
    return lambda _: False


@plant(dolphinflow8bit, "advance")
def step_not_counted(_: Any) -> Any:
    """t stays."""
    return lambda *_: None


@plant(dolphinflow8bit, "advance", lanes=EAGER)
def skip_counts_the_step(f: Any) -> Any:
    """A step that is skipped is counted."""
    return lambda steps, _: f(steps, None)


@plant(Optimizer, "_finite", lanes=EAGER)
def skip_moves(f: Any) -> Any:
    """A step that is to be skipped is taken."""

    def finite(*arguments: Any) -> None:
        f(*arguments)

    return finite


@plant(ops, "write_")
def codes_not_written(_: Any) -> Any:
    """New scales with old codes."""
    return lambda _, absmax, __, new: absmax.copy_(new)


@plant(ops, "write_")
def scales_not_written(_: Any) -> Any:
    """New codes with old scales."""
    return lambda codes, _, new, __: codes.copy_(new)


@everywhere(Optimizer, "_move")
def no_op(_: Any) -> Any:
    """The step does nothing."""
    return lambda *_: None


# Coding, inside the compiled step


@plant(blockwise8bit, "quantize_unsigned")
def positive_becomes_zero(f: Any) -> Any:
    """A positive second moment may take code 0."""

    def quantize(x: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
        codes, absmax = f(x, bounds)
        return torch.where(blockwise8bit.scaled(x, absmax) <= bounds[0], 0, codes).to(torch.uint8), absmax

    return quantize


@plant(blockwise8bit, "step_up")
def code_below(_: Any) -> Any:
    """The first guess is taken, without a look at the boundary above."""
    return lambda _, first, __: first.clamp(0, 255).to(torch.uint8)


@plant(blockwise8bit, "block_absmax")
def absmax_of_half(f: Any) -> Any:
    """Of the first 128 entries of a block."""
    return lambda x: f(x[..., :128])


@plant(blockwise8bit, "block_absmax")
def absmax_of_the_block_before(f: Any) -> Any:
    """Each block has its neighbour's scale."""
    return lambda x: f(x).roll(1)


# Backends


@plant(_backend, "choose", lanes=("compiled-*", "bitsandbytes-*", "triton-*"))
def silently_eager(_: Any) -> Any:
    """Another backend was asked for and eager runs."""
    return lambda _: "eager"
