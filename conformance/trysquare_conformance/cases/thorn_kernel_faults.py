"""Mistakes that could be made with THORN's Triton kernels, planted where the interpreter looks functions up.

A kernel that is compiled keeps the functions that it was compiled with, so that these exist in the interpreter only.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from trysquare_conformance.planting import Planter

plant = Planter("thorn", lanes=("triton-interpreter",))
FAULTS = plant.faults


def _with(position: int, value: Any) -> Any:
    """One argument of a function replaced."""

    def planted(f: Any) -> Any:
        def changed(*arguments: Any, **named: Any) -> Any:
            return f(*arguments[:position], value, *arguments[position + 1 :], **named)

        return changed

    return planted


def _named(**numbers: float) -> Any:
    """Numbers of a group replaced, where they are given."""
    return lambda f: lambda device, **given: f(device, **{**given, **numbers})


def _after(kernel: str, change: Any) -> Any:
    """Something done to the arguments of one kernel after its launch."""

    def planted(f: Any) -> Any:
        def launch(launched: Any, programs: int, *arguments: Any, **options: Any) -> None:
            f(launched, programs, *arguments, **options)
            if launched.__name__ == kernel:
                change(arguments)

        return launch

    return planted


def _products(polar: Any) -> None:
    plant.add("kernel-mirror-not-transposed", "a tile is mirrored as it is", polar, "transposed", lambda _: _same)
    plant.add("kernel-diagonal-unequal", "tiles on the diagonal are not made equal", polar, "symmetric", _first)
    plant.add("kernel-one-tile", "every program computes the first tile", polar, "tile_of", _always_first)
    plant.add("kernel-tile-over-tile", "the second of two tiles is stored over the first", polar, "store_block", _over)
    plant.add("kernel-first-block", "every described block is the first of its rows", polar, "block_of", _at_start)
    plant.add("kernel-last-terms", "the tail of the sums is left out", polar, "symmetric_product", _without_tail)
    plant.add(
        "kernel-wrong-stride", "a transposed matrix is read as if it were none", polar, "symmetric_product", _flat
    )
    plant.add("kernel-beta-lost", "β is 0 in β·base + α·LRᵀ", polar, "symmetric_product", _times(0.0, 1.0))
    plant.add("kernel-alpha-lost", "α is 1", polar, "symmetric_product", _times(1.0, None))
    plant.add("kernel-scale-lost", "what was not normalised is not scaled either", polar, "factors_of", _unscaled)
    plant.add("kernel-base-is-factor", "the left factor is added instead of the base", polar, "symmetric_product", _own)
    plant.add("kernel-tiles-left-out", "tiles beyond the last whole one are left out", polar, "cdiv", _floored)


def _same(tile: Any) -> Any:
    return tile


def _first(_: Any) -> Any:
    return lambda tile, *_: tile


def _over(f: Any) -> Any:
    return lambda total, base, out, beta, alpha, batch, i, j, *rest: f(
        total, base, out, beta, alpha, batch, i, j - j % 2, *rest
    )


def _at_start(f: Any) -> Any:
    return lambda operand, batch, row, start, *rest: f(operand, batch, row, start * 0, *rest)


def _always_first(f: Any) -> Any:
    return lambda index: f(index * 0)


def _without_tail(f: Any) -> Any:
    def product(left: Tensor, right: Tensor, *rest: Any) -> Tensor:
        whole = max(1, left.shape[-1] // 16 * 16)
        result: Tensor = f(left[..., :whole], right[..., :whole], *rest)
        return result

    return product


def _flat(f: Any) -> Any:
    def product(left: Tensor, right: Tensor, *rest: Any) -> Tensor:
        plain = torch.empty(left.shape).stride()
        result: Tensor = f(*(x.as_strided(x.shape, plain) for x in (left, right)), *rest)
        return result

    return product


def _times(first: float, second: float | None) -> Any:
    def planted(f: Any) -> Any:
        def product(
            left: Tensor, right: Tensor, tile: Any, base: Any = None, beta: float = 0.0, alpha: float = 1.0
        ) -> Any:
            return f(left, right, tile, base, first * beta, alpha if second else 1.0)

        return product

    return planted


def _unscaled(f: Any) -> Any:
    return lambda batch, numbers, _: f(batch, numbers, None)


def _own(f: Any) -> Any:
    return lambda left, right, tile, base=None, *numbers: f(left, right, tile, base if base is None else left, *numbers)


def _floored(_: Any) -> Any:
    return lambda a, b: max(1, a // b)


def _matrices(thorn: Any) -> None:
    plant.add("kernel-stale-workspace", "the X of the step before is multiplied", thorn, "prepare_", _stale)
    plant.add(
        "kernel-sum-lost", "the last partial sum of squares is not added", thorn, "launch", _after("_accumulate", _drop)
    )
    plant.add("kernel-all-plain", "matrices of any norm are multiplied as they are", thorn, "is_plain", _always)
    plant.add(
        "kernel-norm-not-kept", "rows are normalised and ‖X‖ is not", thorn, "launch", _after("_rates", _ratios_one)
    )
    plant.add("kernel-stale-row-factor", "rows are not divided", thorn, "launch", _after("_row_squares", _factors_one))
    plant.add(
        "kernel-row-sum", "q is the sum of squares of a row", thorn, "mean_square", lambda _: lambda total, *_: total
    )
    plant.add("kernel-not-rectified", "no rectification of matrices", thorn, "rectification", _unrectified)
    plant.add("kernel-decay-everywhere", "decay is not cautious", thorn, "cautious_decay", _everywhere)
    plant.add("kernel-decay-by-product", "signs by a product that underflows", thorn, "cautious_decay", _by_product)
    plant.add("kernel-one-slice", "only the first matrix of a batch", thorn, "Shape", _with(0, 1))
    plant.add("kernel-row-tail", "rows beyond the last whole tile are left out", thorn, "cdiv", _floored)
    plant.add(
        "kernel-always-half", "products in bfloat16 whatever is asked for", thorn, "prepare_", _with(4, torch.bfloat16)
    )
    plant.add("kernel-moves-when-skipping", "matrices move in a step to be skipped", thorn, "step_", _with(3, None))
    plant.add("kernel-betas-swapped", "β₁ and β₂ exchanged", thorn, "numbers_of", _betas_swapped)
    plant.add("kernel-no-safety", "the norm without 1 + safety", thorn, "numbers_of", _named(safety_factor=0.0))
    plant.add("kernel-no-scale", "the rate without its scale", thorn, "numbers_of", _named(scale=1.0))
    plant.add("kernel-eps-lost", "ε is 1e-30", thorn, "numbers_of", _named(eps=1e-30))
    plant.add("kernel-no-decay", "λ = 0", thorn, "numbers_of", _named(weight_decay=0.0))


def _stale(f: Any) -> Any:
    kept: dict[Any, Tensor] = {}

    def prepare_(*arguments: Any) -> Tensor:
        x = f(*arguments)
        return kept.setdefault((x.shape, x.dtype), x.clone())

    return prepare_


def _drop(arguments: Any) -> None:
    if arguments[3] is not None:
        arguments[3][-1:] = 0


def _ratios_one(arguments: Any) -> None:
    arguments[4].fill_(1.0)


def _factors_one(arguments: Any) -> None:
    arguments[4].fill_(1.0)


def _unrectified(_: Any) -> Any:
    return lambda t, *_: t * 0.0 + 1.0


def _everywhere(_: Any) -> Any:
    return lambda u, theta, weight_decay: u + theta * weight_decay


def _always(_: Any) -> Any:
    return lambda norm: norm == norm  # noqa: PLR0124  # all but NaN


def _by_product(_: Any) -> Any:
    def cautious_decay(u: Any, theta: Any, weight_decay: Any) -> Any:
        return u + theta * weight_decay * ((u * theta) >= 0).to(u.dtype)

    return cautious_decay


def _betas_swapped(f: Any) -> Any:
    return lambda device, **numbers: f(device, **{**numbers, "betas": numbers["betas"][::-1]})


def _others(schedule_free: Any) -> None:
    plant.add("kernel-z-first", "y follows z after its step", schedule_free, "followed", _z_first)
    plant.add("kernel-share-for-pull", "share and pull exchanged", schedule_free, "followed", _exchanged)
    plant.add("kernel-first-member", "the first member's numbers for all", schedule_free, "weigh_", _first_member)
    plant.add("kernel-mean-unweighed", "counters of the mean stay", schedule_free, "weigh_", _uncounted)
    plant.add("kernel-free-not-rectified", "no rectification", schedule_free, "rectification", _unrectified)
    plant.add("kernel-free-decays-everywhere", "decay is not cautious", schedule_free, "cautious_decay", _everywhere)
    plant.add("kernel-free-moves-when-skipping", "others move when skipping", schedule_free, "step_", _with(3, None))
    plant.add("kernel-sum-kept", "S is not emptied", schedule_free, "step_", _kept)
    plant.add("kernel-sum-times-zero", "S becomes 0·S, so NaN stays", schedule_free, "step_", _times_zero)
    plant.add("kernel-not-collected", "S takes up nothing", schedule_free, "step_", _uncollected)
    plant.add("kernel-operands-exchanged", "y and x exchanged", schedule_free, "_operands", _exchanged_operands)
    plant.add("kernel-uncorrected", "no bias correction", schedule_free, "launch", _after("_weigh", _uncorrect))


def _z_first(f: Any) -> Any:
    return lambda y, z, u, share, pull: f(y, z + u * pull, u, share, pull)


def _exchanged(f: Any) -> Any:
    return lambda y, z, u, share, pull: f(y, z, u, pull, share)


def _first_member(f: Any) -> Any:
    return lambda *arguments, **named: (found := f(*arguments, **named))[:, :1].expand_as(found).contiguous()


def _uncounted(f: Any) -> Any:
    def weigh_(counters: Any, *rest: Any, **named: Any) -> Any:
        copies = (None if c is None else [x.clone() for x in c] for c in counters[1:])
        return f(type(counters)(counters.steps, *copies), *rest, **named)

    return weigh_


def _kept(f: Any) -> Any:
    def step_(bucket: Any, *rest: Any) -> None:
        before = [s.clone() for s in bucket.update_sums or ()]
        f(bucket, *rest)
        for s, old in zip(bucket.update_sums or (), before, strict=True):
            if rest[-1] == "spend":
                s.copy_(old)

    return step_


def _times_zero(f: Any) -> Any:
    def step_(bucket: Any, *rest: Any) -> None:
        before = [s * 0 for s in bucket.update_sums or ()]
        f(bucket, *rest)
        for s, zero in zip(bucket.update_sums or (), before, strict=True):
            if rest[-1] == "spend":
                s.add_(zero)

    return step_


def _uncollected(f: Any) -> Any:
    def step_(bucket: Any, *rest: Any) -> None:
        f(bucket, *rest)
        for s in bucket.update_sums or ():
            s.zero_()

    return step_


def _exchanged_operands(f: Any) -> Any:
    def operands(bucket: Any) -> Any:
        *first, y, x, s = f(bucket)
        return [*first, x, y, s]

    return operands


def _uncorrect(arguments: Any) -> None:
    arguments[3][3:].fill_(1.0)


if find_spec("triton"):
    from trysquare.kernels import polar, schedule_free, thorn

    _products(polar)
    _matrices(thorn)
    _others(schedule_free)
