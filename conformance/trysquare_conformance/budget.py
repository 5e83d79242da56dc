"""Error budgets that the reference sets itself. The only file that knows a tolerance.

A reference page runs once in float64, and in D draws of the noisy arithmetic of the lane (`noise`). How far the draws
stray from the float64 result is what honest code of that precision may stray on this very input.

**Entry by entry.** σᵢ² is the mean square of the D errors of entry i. An entry is allowed

    floorᵢ + multiple(D)·σᵢ,      multiple(D) = HONEST · t(D; FALSE_ALARM)

An error over its σᵢ, both from D draws, follows Student's distribution with D degrees of freedom if errors are about
Gaussian, and t is its two-sided quantile. It is large for few draws, whose σᵢ may be small by chance: the multiple is
9.3 for 16 draws, 6.3 for 32. HONEST is the root mean square of real rounding over the model's: the model's relative
error is uniform within ±u, a real one within ±u·2ᵉ/|x| for |x| in [2ᵉ, 2ᵉ⁺¹), and the mean of 4ᵉ/x² over a binade, with
x spread logarithmically, is 3/(8·ln 2) = 0.74².

**As a whole.** The error of each draw has a 2-norm, before and after it is rounded to the storage format. A tensor is
allowed

    max(½·‖floor‖₂, SLACK·(mean + multiple(D)·deviation))

with the mean of the norms after rounding, and the larger of the two standard deviations (rounding to a coarse format
hides how the result itself scatters). With many independent errors the deviation is small, and the norm is allowed
little more than one spread, far less than its entries. With one entry, or one direction that carries all the error, it
says about what the entry's rule says. SLACK is for what an implementation rounds and the equations do not show, such as
a correction kept as a factor.

**Floor.** One unit in the last place of what is stored: an entry may be kept as either neighbour. As a whole a tensor
is held to half of that, to rounding to nearest: truncation would show.

**Discontinuities are sets.** Where the draws of an entry fall into two groups further apart than `multiple(D)` times
the scatter within the groups, an answer near either group is right and one between them is not. Draws of
several steps are rounded to storage between them; then ulp²/12 belongs to that scatter: a few draws may happen to fall
on two neighbouring numbers, which would seem two groups without any scatter. In float64, which the draws simulate in
float64 itself, errors are one or two units of the last place of something on the way, and what is left after
cancellation has few values: there a discontinuity must show again in draws whose errors are COARSER times as large.

**A second look.** Sixteen draws may all miss what an honest run meets once in fifty, such as the step between two
groups. Up to DOUBTFUL budgets away an output is therefore judged by SECOND_LOOK draws instead: they know the spread
better, and their multiple is 4.5.

**Range.** An entry that is infinite or NaN in the reference and in all draws must be so in the lane (infinite or NaN:
which of the two depends on the order of operations). An entry where they differ is undetermined and not judged.

**Measured** (`python conformance/tests/test_budget.py 24`): of 660,000 entries that torch stepped in float32, 5e-5 lay
beyond the multiple for a false alarm in 1e-2, 3e-6 beyond that for 1e-3, none beyond 57 % of the one in use. The worst
honest margin was 0.56, but for a 1×1 matrix whose projected gradient is nothing but rounding: 0.8, which is 1/SLACK.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from trysquare_conformance.noise import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, Arithmetic, coarsened
from trysquare_conformance.noisy import wrapper

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Mask: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]
Wrap: TypeAlias = Callable[[Array], Array]

DRAWS = 16
FALSE_ALARM = 1e-9
HONEST = math.sqrt(3 / (8 * math.log(2)))
SLACK = 1.25
COARSER = 16.0
DOUBTFUL = 10.0
SECOND_LOOK, SECOND_LOOK_ENTRIES = 1024, 1 << 24


@dataclass(frozen=True)
class Stored:
    """The format in which a result is kept, and beside what.

    Attributes:
        unit_roundoff: 2⁻ᵖ for a significand of p bits.
        smallest: The smallest subnormal.
        largest: Results beyond it are stored as infinite.
        offset: What is stored is `offset` + result. An update is seen as the difference of two stored parameters: its
            offset is the old parameter, whose size decides how it is rounded.
    """

    unit_roundoff: float
    smallest: float
    largest: float
    offset: Array | float = 0.0

    def beside(self, offset: Array) -> "Stored":
        """The same format for a result that is stored added to `offset`."""
        return replace(self, offset=offset)

    def store(self, result: Array) -> Array:
        """The result, infinite where rounding to nearest leaves the format: from half a unit beyond the largest."""
        half_ulp = math.ldexp(self.unit_roundoff, math.frexp(self.largest)[1] - 1)
        beyond = np.abs(self.offset + result) >= self.largest + half_ulp
        return np.where(beyond, np.copysign(np.inf, result), result)

    def ulp(self, magnitude: Array) -> Array:
        """The distance between two stored numbers of this magnitude."""
        binade = np.where(magnitude == 0, 0.0, np.ldexp(1.0, np.frexp(magnitude)[1]))
        return np.asarray(np.maximum(self.unit_roundoff * binade, self.smallest))

    def round(self, result: Array) -> Array:
        """The result as it is read back: rounded to nearest when it was stored."""
        whole = self.offset + result
        ulp = self.ulp(np.abs(whole))
        return np.asarray(np.rint(whole / ulp) * ulp - self.offset)


STORED = {
    arithmetic.name: Stored(unit, arithmetic.smallest, arithmetic.largest)
    for arithmetic, unit in ((FLOAT64, 2.0**-53), (FLOAT32, 2.0**-24), (BFLOAT16, 2.0**-8), (FLOAT16, 2.0**-11))
}
"""By the name of the dtype."""


@dataclass(frozen=True)
class Budget:
    """What an output may be.

    Attributes:
        reference: The float64 result.
        low, high: The accepted answers of every entry: both the reference, or the two sides of a discontinuity.
        element: Allowed distance of each entry from the nearer one.
        norm: Allowed 2-norm of these distances over the entries that are judged.
        undetermined: Entries that are not judged.
        non_finite: Entries that must be infinite or NaN.
        spread: σ of each entry.
        floor: One unit in the last place of each entry as it is stored.
        norm_spread: Mean plus multiple deviations of the draws' norms.
        multiple: Of the spread, in `element`.
        draws: How many there were.
    """

    reference: Array
    low: Array
    high: Array
    element: Array
    norm: float
    undetermined: Mask
    non_finite: Mask
    spread: Array
    floor: Array
    norm_spread: float
    multiple: float
    draws: int

    def at(self, index: tuple[int, ...]) -> dict[str, float]:
        """The arithmetic of one entry's budget: allowed = floor + multiple·spread."""
        return {
            "draws": self.draws,
            "spread": float(self.spread[index]),
            "multiple": self.multiple,
            "floor": float(self.floor[index]),
            "allowed": float(self.element[index]),
        }


@dataclass(frozen=True)
class Margin:
    """Observed over allowed: right up to 1.

    Attributes:
        norm: Of the whole tensor.
        element: Of the worst entry; infinite where an entry is NaN or infinite and must not be, or the reverse.
        worst_index: Where that is; empty for 0-dimensional and for empty outputs.
        worst_observed, worst_reference: The two values there; NaN for empty outputs.
        undetermined: How many entries were not judged.
    """

    norm: float
    element: float
    worst_index: tuple[int, ...]
    worst_observed: float
    worst_reference: float
    undetermined: int

    @property
    def worst(self) -> float:
        """The headline: the larger of the two margins."""
        return max(self.norm, self.element)

    @property
    def right(self) -> bool:
        """Within both budgets."""
        return self.worst <= 1


def measure(
    run: Callable[[Wrap], Mapping[str, Array]],
    arithmetic: Arithmetic,
    stored: Mapping[str, Stored],
    *,
    seed: int,
    draws: int = DRAWS,
) -> dict[str, Budget]:
    """Run a reference in float64 and in draws of noisy arithmetic, and make a budget for each of its outputs.

    Args:
        run: Computes the outputs from inputs that it passes through the given function first; once it is all draws'
            inputs that come back, and its outputs are then noisy, or have the draws along their first axis.
        arithmetic: In which the lane computes.
        stored: How the lane keeps each output.
        seed: Of the noise: the same seed gives the same budget.
        draws: Even, at least 2; fewer draws make wider budgets, not more false alarms.

    Raises:
        KeyError: An output has no entry in `stored`.
        ValueError: An output has another shape in noisy arithmetic.
    """
    rng = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        reference = {name: np.asarray(x, dtype=np.float64) for name, x in run(np.asarray).items()}

        def drawn(arithmetic: Arithmetic) -> dict[str, Array]:
            found = run(wrapper(arithmetic, rng, draws))
            return {name: _samples(name, found[name], x, draws) for name, x in reference.items()}

        @functools.cache
        def again() -> dict[str, Array]:
            return drawn(coarsened(arithmetic, COARSER))

        def coarse(name: str) -> Callable[[], Array] | None:
            return (lambda: again()[name]) if arithmetic.elementwise <= FLOAT64.elementwise else None

        samples = drawn(arithmetic)
        return {name: _budget(x, samples[name], stored[name], coarse(name)) for name, x in reference.items()}


def _samples(name: str, drawn: Array, reference: Array, draws: int) -> Array:
    """An output with the draws along its first axis. What depends on no input is the same in all of them."""
    values, shape = np.asarray(drawn, dtype=np.float64), (draws, *reference.shape)
    if values.shape not in {shape, reference.shape}:
        raise ValueError(f"{name} has shape {values.shape} in {draws} draws, the reference's has {reference.shape}")
    return np.broadcast_to(values, shape)


def _budget(reference: Array, samples: Array, stored: Stored, coarse: Callable[[], Array] | None = None) -> Budget:
    """The budget of one output; `samples` has the draws along its first axis, and `coarse` gives coarser ones."""
    draws = len(samples)
    samples = stored.store(samples)
    finite, finite_draws = np.isfinite(reference), np.isfinite(samples)
    judged = finite & finite_draws.all(axis=0)
    reference_or_0, samples = np.where(judged, reference, 0.0), np.where(judged, samples, 0.0)
    low, high = _sides(reference_or_0, samples, stored, coarse)
    errors = _distance(samples, low, high)
    spread = _norm(errors, axis=0) / math.sqrt(draws)
    scatter = multiple(draws) * spread
    largest = np.maximum(np.abs(stored.offset + low), np.abs(stored.offset + high))
    floor = np.where(judged, stored.ulp(np.where(judged, largest, 0.0) + scatter), 0.0)
    norm_spread = _norm_spread(errors, np.where(judged, _distance(stored.round(samples), low, high), 0.0))
    return Budget(
        reference=reference,
        low=np.where(judged, low, reference),
        high=np.where(judged, high, reference),
        element=floor + scatter,
        norm=max(float(_norm(floor)) / 2, SLACK * norm_spread),
        undetermined=~judged & (finite | finite_draws.any(axis=0)),
        non_finite=~finite & ~finite_draws.any(axis=0),
        spread=spread,
        floor=floor,
        norm_spread=norm_spread,
        multiple=multiple(draws),
        draws=draws,
    )


def _sides(reference: Array, samples: Array, stored: Stored, coarse: Callable[[], Array] | None) -> tuple[Array, Array]:
    """The accepted answers (low, high) of every entry: the two sides of a discontinuity, or the reference twice.

    The answers at a discontinuity are the means of the sides, with the reference itself standing for its own.
    """
    cut = _cut(reference, samples, stored)
    both = cut.is_wide
    if coarse is not None and both.any():
        both = both & _cut(reference, coarse(), stored).is_wide
    is_low = reference <= cut.last_below
    return np.where(both & ~is_low, cut.below, reference), np.where(both & is_low, cut.above, reference)


@dataclass(frozen=True)
class _Cut:
    """Where the draws of every entry are furthest apart: the means of the two sides, and the largest value below.

    `is_wide` if it is a discontinuity: at least two draws lie on each side, and the gap is wider than any honest error.
    """

    below: Array
    above: Array
    last_below: Array
    is_wide: Mask


def _cut(reference: Array, samples: Array, stored: Stored) -> _Cut:
    """The draws and the reference, in order, are cut at their widest gap."""
    together = np.sort(np.concatenate([reference[np.newaxis], samples]), axis=0)
    gaps = np.diff(together, axis=0)
    cut = np.argmax(gaps, axis=0)
    gap = np.take_along_axis(gaps, cut[np.newaxis], axis=0)[0]
    is_below = np.arange(len(together)).reshape(-1, *([1] * reference.ndim)) <= cut
    count = cut + 1
    below = np.sum(np.where(is_below, together, 0.0), axis=0) / count
    above = np.sum(np.where(is_below, 0.0, together), axis=0) / (len(together) - count)
    within = _norm(together - np.where(is_below, below, above), axis=0) / math.sqrt(len(together))
    within = np.hypot(within, _deviation_of_rounding(samples, stored))
    is_wide = (count >= 2) & (count <= len(together) - 2) & (gap > multiple(len(samples)) * within)
    return _Cut(below, above, np.take_along_axis(together, cut[np.newaxis], axis=0)[0], is_wide)


def _deviation_of_rounding(samples: Array, stored: Stored) -> Array:
    """ulp/√12 where all draws are numbers of the storage format, because they are rounded on the way; else 0."""
    ulp = stored.ulp(np.abs(stored.offset + samples[0]))
    return np.where((stored.round(samples) == samples).all(axis=0), ulp / math.sqrt(12), 0.0)


def _distance(x: Array, low: Array, high: Array) -> Array:
    """How far each entry is from the nearer of two accepted answers."""
    return np.minimum(np.abs(x - low), np.abs(x - high))


def _norm_spread(errors: Array, rounded: Array) -> float:
    """Mean plus multiple deviations of the norms of the draws' errors, before and after rounding to storage."""
    axes = tuple(range(1, errors.ndim))
    norms, rounded_norms = (_norm(x, axes) for x in (errors, rounded))
    deviation = max(_norm(x - np.mean(x)) for x in (norms, rounded_norms)) / math.sqrt(len(errors) - 1)
    return float(np.mean(rounded_norms) + multiple(len(errors)) * deviation)


def _norm(x: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """The 2-norm, scaled so that no square leaves the range of float64 on either side."""
    largest = np.max(np.abs(x), initial=0.0)
    scale = np.ldexp(1.0, np.frexp(largest)[1] - 1) if 0 < largest < math.inf else 1.0
    return np.asarray(scale * np.sqrt(np.sum(np.square(x / scale), axis=axis)))


@functools.cache
def multiple(draws: int, probability: float = FALSE_ALARM) -> float:
    """Spreads that an honest entry is allowed: HONEST times Student's quantile, found by bisection.

    Args:
        draws: Even, at least 2.
        probability: Of a false alarm for one entry.

    Examples:
        >>> round(multiple(32), 1), round(multiple(8), 1)
        (6.3, 23.5)
    """
    if draws < 2 or draws % 2:
        raise ValueError(f"draws={draws}: must be an even number, at least 2")
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_tail(middle, draws) > probability else (low, middle)
    return HONEST * high


def _student_tail(t: float, degrees: int) -> float:
    """Probability of a value beyond ±t, for even degrees of freedom (Abramowitz and Stegun 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    term, total = 1.0, 1.0
    for k in range(1, degrees // 2):
        term *= (2 * k - 1) / (2 * k) * math.cos(angle) ** 2
        total += term
    return 1 - math.sin(angle) * total


def judge(budget: Budget, observed: Array) -> Margin:
    """Hold an observed output against its budget.

    Raises:
        ValueError: The output has another shape than the reference's.
    """
    if observed.shape != budget.reference.shape:
        raise ValueError(f"the output has shape {observed.shape}, the reference's has {budget.reference.shape}")
    if observed.size == 0:
        return Margin(0.0, 0.0, (), math.nan, math.nan, 0)
    judged = ~budget.undetermined & ~budget.non_finite
    with np.errstate(all="ignore"):
        distance = np.where(judged, _distance(observed, budget.low, budget.high), 0.0)
        element = np.where(judged & (distance > 0), distance / budget.element, 0.0)
        element = np.where(judged & ~np.isfinite(observed), np.inf, element)
        element = np.where(budget.non_finite & np.isfinite(observed), np.inf, element)
        norm = float(np.divide(_norm(distance), budget.norm)) if distance.any() else 0.0
    worst = tuple(int(i) for i in np.unravel_index(np.argmax(element), element.shape))
    return Margin(
        norm=math.inf if math.isnan(norm) or np.isinf(element).any() else norm,
        element=float(element[worst]),
        worst_index=worst,
        worst_observed=float(observed[worst]),
        worst_reference=float(budget.reference[worst]),
        undetermined=int(budget.undetermined.sum()),
    )


def draws_of_second_look(entries: int) -> int:
    """How many draws there are of outputs with so many entries together: memory must hold them all.

    Examples:
        >>> draws_of_second_look(100), draws_of_second_look(1 << 17), draws_of_second_look(1 << 22)
        (1024, 128, 32)
    """
    return max(2 * DRAWS, min(SECOND_LOOK, SECOND_LOOK_ENTRIES // max(1, entries) // 2 * 2))


def rounding_error(expected: Array | float, operations: int = 64) -> Array:
    """How far a float64 result may be from `expected` after this many operations without cancellation, for tests.

    Args:
        expected: The value, or the largest value on the way to it where terms cancel.
        operations: In the longest chain.
    """
    return np.asarray(operations * STORED["float64"].unit_roundoff * np.abs(expected))


def assert_same(actual: Any, expected: Any, *, scale: Array | float | None = None, operations: int = 64) -> None:
    """Assert that two float64 results agree up to rounding, for tests.

    Args:
        actual: A result.
        expected: What it should be.
        scale: Size of the largest terms on the way, where they cancel; the size of `expected` by default.
        operations: In the longest chain.
    """
    actual, expected = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    allowed = rounding_error(expected if scale is None else scale, operations)
    with np.errstate(invalid="ignore"):
        close = np.abs(actual - expected) <= allowed
    same = close | (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    if actual.shape != expected.shape or not same.all():
        raise AssertionError(f"not the same up to {operations} roundings\nactual:   {actual}\nexpected: {expected}")
