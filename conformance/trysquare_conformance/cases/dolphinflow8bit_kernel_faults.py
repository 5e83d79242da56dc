"""Mistakes that could be made in the Triton kernels of DolphinFlow8bit and of its format.

A function here is given the original and returns what takes its place; its name and docstring are the fault's. What
stands for a part of a kernel is plain Python, which the interpreter runs within it and a compiler would not take.
"""

from functools import partial
from importlib.util import find_spec
from typing import Any

from trysquare_conformance.planting import Fault, Planter

INTERPRETER = ("triton-interpreter",)


def _moment_faults() -> list[Fault]:
    """What becomes of both moments, and the direction that they give."""
    from trysquare.kernels import dolphinflow8bit as kernels

    planter = Planter("dolphinflow8bit")
    plant = partial(planter, lanes=INTERPRETER)

    @plant(kernels, "rates_of")
    def kernel_sums_the_first_moment(f: Any) -> Any:
        """β₁·m + g where a mean belongs, and the reverse."""
        return lambda numbers, dtype, adaptive: f(numbers, dtype, not adaptive)

    @plant(kernels, "second_moment")
    def kernel_forgets_the_second_moment(f: Any) -> Any:
        """(1 − β₂)·g²."""
        return lambda v, *rest: f(v * 0.0, *rest)

    @plant(kernels, "mean_weight")
    def kernel_leaves_the_bias_of_the_first(_: Any) -> Any:
        """m̂ = m."""
        return lambda *_: 1.0

    @plant(kernels, "correction")
    def kernel_leaves_the_bias_of_the_second(_: Any) -> Any:
        """v̂ = v."""
        return lambda *_: 1.0

    @plant(kernels, "denominator")
    def kernel_ignores_eps(f: Any) -> Any:
        """√v̂."""
        return lambda v, eps, factor: f(v, eps * 0.0, factor)

    return planter.faults


def _projection_faults() -> list[Fault]:
    """What the gradient loses, by whole rows."""
    from triton import language as tl

    from trysquare.kernels import dolphinflow8bit as kernels

    planter = Planter("dolphinflow8bit")
    plant = partial(planter, lanes=INTERPRETER)

    @plant(kernels, "subtract")
    def kernel_does_not_project(_: Any) -> Any:
        """g̃ = g."""
        return lambda x, *_: x

    @plant(kernels, "sum_of_rows")
    def kernel_projects_each_block(_: Any) -> Any:
        """A row's products are those of one block."""
        return lambda x, *_: tl.sum(x, axis=0, keep_dims=True)

    @plant(kernels, "row_coefficient")
    def kernel_projects_by_the_first_row(f: Any) -> Any:
        """Long rows all have the coefficient of the first."""
        return lambda w, g, row, *rest: f(w, g, row * 0, *rest)

    @plant(kernels, "row_of")
    def kernel_takes_a_block_for_a_row(_: Any) -> Any:
        """All of a block has the coefficient of its first element."""
        return lambda first, period, _: first // period + 0 * tl.arange(0, 256)[:, None]

    return planter.faults


def _weight_faults() -> list[Fault]:
    """What is read of the gradient and written of the weights."""
    from triton import language as tl

    from trysquare.kernels import dolphinflow8bit as kernels

    planter = Planter("dolphinflow8bit")
    plant = partial(planter, lanes=INTERPRETER)

    @plant(kernels, "stepped")
    def kernel_decays_after_the_update(_: Any) -> Any:
        """(θ − ηu)(1 − ηλ)."""
        return lambda w, u, decay, lr: (w - u * lr) * decay

    @plant(kernels, "clipped")
    def kernel_does_not_clip(f: Any) -> Any:
        """The clipping factor is not applied."""
        return lambda g, _, dtype: f(g, None, dtype)

    @plant(kernels, "moved")
    def kernel_moves_what_is_skipped(f: Any) -> Any:
        """The mask of a step that is not taken is missing."""
        return lambda here, _: f(here, None)

    @plant(kernels, "narrowed")
    def kernel_truncates(f: Any) -> Any:
        """Weights are rounded towards zero to four digits."""

        def narrowed(x: Any, dtype: Any) -> Any:
            return f((x.to(tl.float32).to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True), dtype)

        return narrowed

    return planter.faults


def _scale_faults() -> list[Fault]:
    """What a block is scaled by when its moments are coded again."""
    from triton import language as tl

    from trysquare.kernels import _arithmetic, blockwise8bit
    from trysquare.kernels import dolphinflow8bit as kernels

    planter = Planter("dolphinflow8bit")
    plant = partial(planter, lanes=INTERPRETER)

    @plant(kernels, "store_coded")
    def kernel_scales_by_what_lies_behind(_: Any) -> Any:
        """What is loaded behind the end of a short block counts for its scale."""

        def store(x: Any, codes: Any, absmax: Any, bounds: Any, here: Any, *rest: Any) -> None:
            inside, finite, signed = rest
            largest = blockwise8bit.block_absmax(tl.where(here, x, 4.0))
            tl.store(codes, blockwise8bit.coded(x, largest, bounds, signed), mask=_arithmetic.moved(here, finite))
            tl.store(absmax, largest, mask=_arithmetic.moved(inside, finite))

        return store

    @plant(kernels, "block_absmax")
    def kernel_scales_by_half_a_block(f: Any) -> Any:
        """The scale of the first 128 elements."""
        return lambda x: f(tl.where(tl.arange(0, 256)[:, None] < 128, x, 0.0))

    return planter.faults


def _launch_faults() -> list[Fault]:
    from trysquare.kernels import dolphinflow8bit as kernels

    planter = Planter("dolphinflow8bit")
    plant = partial(planter, lanes=("triton-*",))

    @plant(kernels, "launch")
    def last_program_left_out(f: Any) -> Any:
        """The last program of a grid is not launched."""
        return lambda kernel, programs, *rest, **options: f(kernel, max(1, programs - 1), *rest, **options)

    @plant(kernels, "Table")
    def table_of_the_first(f: Any) -> Any:
        """All members of a bucket are at the first one's addresses."""
        return lambda lists: f([[tensors[0]] * len(tensors) for tensors in lists])

    @plant(kernels, "numbers_of")
    def numbers_in_another_order(f: Any) -> Any:
        """β₂ where β₁ belongs, and the reverse."""
        return lambda device, lr, decay, beta1, eps, beta2: f(device, lr, decay, beta2, eps, beta1)

    @plant(kernels, "row_coefficients")
    def coefficients_of_the_row_before(f: Any) -> Any:
        """Each row is projected by its neighbour's coefficient."""
        return lambda *arguments: f(*arguments).roll(1, -1)

    return planter.faults


def _format_faults() -> list[Fault]:
    from triton import language as tl

    from trysquare.kernels import blockwise8bit as kernels

    planter = Planter("blockwise8bit")
    plant = partial(planter, lanes=INTERPRETER)

    @plant(kernels, "step_up")
    def kernel_takes_the_code_below(_: Any) -> Any:
        """The first guess is taken, without a look at the boundary above."""
        return lambda _, first, __: tl.minimum(tl.maximum(first, 0), 255).to(tl.uint8)

    @plant(kernels, "step_up")
    def kernel_sends_a_tie_up(_: Any) -> Any:
        """A value on a boundary takes the upper code."""

        def step_up(s: Any, first: Any, bounds: Any) -> Any:
            code = tl.minimum(tl.maximum(first, 0), 255)
            return (code + (s >= tl.load(bounds + code)).to(tl.int32)).to(tl.uint8)

        return step_up

    @plant(kernels, "coded")
    def kernel_takes_zero_for_a_positive(f: Any) -> Any:
        """A positive value may take code 0."""

        def coded(x: Any, absmax: Any, bounds: Any, signed: Any) -> Any:
            codes = f(x, absmax, bounds, signed)
            return codes if signed else tl.where(x <= absmax * tl.load(bounds), 0, codes).to(tl.uint8)

        return coded

    @plant(kernels, "quotient")
    def kernel_multiplies_by_the_reciprocal(_: Any) -> Any:
        """x·(1/absmax), which overflows for small scales."""
        return lambda x, absmax: x * (1.0 / absmax)

    @plant(kernels, "block_absmax")
    def kernel_takes_the_largest_value(_: Any) -> Any:
        """The largest value of a block, not the largest magnitude."""
        return lambda x: tl.max(x, axis=0, keep_dims=True)

    @plant(kernels, "decoded")
    def kernel_decodes_without_scale(_: Any) -> Any:
        """The values of the map as they are."""
        return lambda codes, absmax, qmap: tl.load(qmap + codes.to(tl.int32)) + 0.0 * absmax

    planter.add(
        "kernel-has-six-decades", "the lowest decade has no line", kernels, "DECADES", lambda _: 6, lanes=INTERPRETER
    )
    return planter.faults


GROUPS = (_moment_faults, _projection_faults, _weight_faults, _scale_faults, _launch_faults, _format_faults)
FAULTS = [fault for group in GROUPS for fault in group()] if find_spec("triton") else []
