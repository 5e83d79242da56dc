"""The budget on trial: honest code keeps to it, a lower precision and small faults do not.

`python conformance/tests/test_budget.py 50` prints the calibration over many seeds.
"""

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch

from trysquare_conformance.budget import (
    DRAWS,
    HONEST,
    STORED,
    Array,
    Budget,
    Margin,
    Stored,
    Wrap,
    assert_same,
    judge,
    measure,
    multiple,
)
from trysquare_conformance.noise import BFLOAT16, FLOAT32, FLOAT64, Arithmetic
from trysquare_conformance.noisy import Noisy, wrapper
from trysquare_reference import dolphinflow, moments
from trysquare_reference.dolphinflow import Hyperparameters, State

Outputs = dict[str, Array]
KINDS = ("gaussian", "rank one", "huge", "tiny", "constant", "parallel", "sparse")
SHAPES = ((48, 20), (20, 48), (1, 1), (7,), (3, 2, 3), (40, 1))


class Problem(NamedTuple):
    """One step to take."""

    theta: Array
    gradient: Array
    state: State
    hp: Hyperparameters


def single(x: Array) -> Array:
    return np.asarray(x, dtype=np.float32).astype(np.float64)


def values(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    x = rng.standard_normal(shape)
    scale = {"huge": 1e12, "tiny": 1e-12}.get(kind, 1.0)
    if kind == "rank one" and len(shape) > 1:
        x = rng.standard_normal((shape[0], *[1] * (len(shape) - 1))) * rng.standard_normal((1, *shape[1:]))
    if kind == "constant":
        x = np.full(shape, rng.standard_normal())
    if kind == "sparse":
        x = x * (rng.random(shape) < 0.2)
    return single(scale * x)


def problem(kind: str, shape: tuple[int, ...], seed: int, **settings: Any) -> Problem:
    rng = np.random.default_rng([seed, KINDS.index(kind), *shape])
    chosen: dict[str, Any] = {
        "lr": 10 ** rng.uniform(-5, -1),
        "weight_decay": float(rng.choice([0.0, 0.01, 0.1])),
        "momentum": rng.uniform(0, 0.99),
        "beta2": rng.uniform(0.9, 0.9999),
        "ortho_mode": [None, "vector", "matrix"][rng.integers(3)],
        "project": ["gradient", "update"][rng.integers(2)],
        "adaptive_lr": bool(rng.integers(4)),
        "bias_correction": bool(rng.integers(2)),
        "gradient_clipping": [None, 1.0][rng.integers(2)],
    }
    hp = Hyperparameters(**{**chosen, **settings})
    theta = single(0.1 * values("constant" if kind == "constant" else "gaussian", shape, rng))
    gradient = single(theta * rng.standard_normal()) if kind == "parallel" else values(kind, shape, rng)
    state = dolphinflow.init(theta, hp)
    if rng.integers(2):
        state = {"step": int(rng.integers(1, 60)), "momentum_buffer": values(kind, shape, rng)}
        if hp.adaptive_lr:
            state["exp_avg_sq"] = single(np.square(values(kind, shape, rng)))
    return Problem(theta, gradient, state, hp)


def reference(p: Problem, wrap: Wrap) -> Outputs:
    """The page, on arrays that pass through `wrap` first."""
    theta, state = wrap(p.theta), {name: x if name == "step" else wrap(x) for name, x in p.state.items()}
    (new,), (after,) = dolphinflow.step([theta], [wrap(p.gradient)], [state], p.hp)
    return {"update": np.asarray(new, dtype=np.float64) - p.theta, **{k: v for k, v in after.items() if k != "step"}}


def in_numpy(p: Problem, dtype: Any = np.float32) -> Outputs:
    """The page again, in NumPy's own lower precision. (Without clipping, whose float64 scale would spread.)

    So would the weight of a mean, which is a Python number here: that takes the precision of what it meets.
    """
    corrected = patch.object(moments, "bias_corrected", lambda mean, beta, step: mean / (1 - beta**step))
    with corrected, np.errstate(all="ignore"):
        outputs = reference(p, lambda x: x.astype(dtype))
    return {name: np.asarray(x, dtype=np.float64) for name, x in outputs.items()}


def in_torch(p: Problem, dtype: torch.dtype = torch.float32, fault: str = "") -> Outputs:
    """Written from the specification for tensors, with other operations in another order than the page."""
    hp, t = p.hp, p.state["step"] + 1
    theta, g, m = (torch.tensor(x, dtype=dtype) for x in (p.theta, p.gradient, p.state["momentum_buffer"]))
    if hp.gradient_clipping:
        norm = g.double().square().sum().sqrt()
        g = g * (hp.gradient_clipping / (norm + 1e-6)).clamp(max=1).to(dtype)
    mode = hp.ortho_mode if theta.ndim > 1 else None
    if mode == "vector" and hp.project == "gradient":
        g = without_rows(g, theta, 1e-30)
    m = m.mul(hp.momentum).add(g)
    u = g.add(m, alpha=hp.momentum)
    if mode == "vector" and hp.project == "update":
        u = without_rows(u, theta, hp.eps)
    if mode == "matrix":
        u = even_out(u, hp, (3.4445, -4.7750, 2.0315 * (1.001 if fault == "third coefficient" else 1)))
    outputs = {"momentum_buffer": m}
    if hp.adaptive_lr:
        v = torch.tensor(p.state["exp_avg_sq"], dtype=dtype).mul(hp.beta2).addcmul(g, g, value=1 - hp.beta2)
        corrected = hp.bias_correction and fault != "missing bias correction"
        root = v.sqrt() * torch.tensor((1 - hp.beta2**t) ** -0.5 if corrected else 1.0, dtype=dtype)
        outputs["exp_avg_sq"] = v
        u = u / ((root.square() + hp.eps).sqrt() if fault == "eps inside the root" else root + hp.eps)
    new = theta.mul(1 - hp.lr * hp.weight_decay).add(u, alpha=-hp.lr)
    outputs["update"] = torch.zeros_like(theta) if fault == "no-op" else new.double() - theta.double()
    return {name: x.double().numpy() for name, x in outputs.items()}


def without_rows(x: torch.Tensor, w: torch.Tensor, smallest: float) -> torch.Tensor:
    rows, weights = x.reshape(len(x), -1), w.reshape(len(w), -1)
    along, square = (weights * rows).sum(1, keepdim=True), (weights * weights).sum(1, keepdim=True)
    return rows.addcmul(weights, torch.where(square >= smallest, along / square, 0.0), value=-1).reshape(x.shape)


def even_out(u: torch.Tensor, hp: Hyperparameters, coefficients: tuple[float, float, float]) -> torch.Tensor:
    a, b, c = coefficients
    matrix = u.reshape(len(u), -1)
    norm = matrix.square().sum().sqrt()
    x = matrix / norm
    for _ in range(hp.ns_steps):
        gram = x @ x.mT  # rows × rows, whichever is the smaller side
        x = a * x + (b * gram + c * gram @ gram) @ x
    return torch.where(norm >= hp.eps, x * norm, matrix).reshape(u.shape)


def budgets(p: Problem, arithmetic: Arithmetic = FLOAT32, seed: int = 0, draws: int = DRAWS) -> dict[str, Budget]:
    kept = STORED[arithmetic.name]
    stored = {"update": kept.beside(p.theta), "momentum_buffer": kept, "exp_avg_sq": kept}
    return measure(partial(reference, p), arithmetic, stored, seed=seed, draws=draws)


def judged(allowed: dict[str, Budget], observed: Outputs) -> dict[str, Margin]:
    assert observed.keys() == allowed.keys()
    return {name: judge(budget, observed[name]) for name, budget in allowed.items()}


def worst(margins: dict[str, Margin]) -> float:
    return max(margin.worst for margin in margins.values())


def problems(seeds: int, **settings: Any) -> Iterator[tuple[str, Problem]]:
    for kind in KINDS:
        for shape in SHAPES:
            for seed in range(seeds):
                yield kind, problem(kind, shape, seed, **settings)


class Trial(NamedTuple):
    """A problem, its budgets, and what honest float32 made of it."""

    kind: str
    problem: Problem
    budgets: dict[str, Budget]
    observed: Outputs


def trials(seeds: int) -> Iterator[Trial]:
    for kind, p in problems(seeds):
        yield Trial(kind, p, budgets(p), in_torch(p))


def ratios(honest: Iterable[Trial]) -> Array:
    """Errors beyond the floor in spreads. Without constant tensors, whose entries all have the same error."""
    parts = [
        (np.abs(trial.observed[name] - budget.reference) - budget.floor)[budget.spread > 0]
        / budget.spread[budget.spread > 0]
        for trial in honest
        if trial.kind != "constant"
        for name, budget in trial.budgets.items()
    ]
    return np.concatenate(parts)


@pytest.fixture(scope="module")
def honest() -> list[Trial]:
    return list(trials(seeds=3))


def test_honest_float32_keeps_to_the_budget_in_torch(honest: list[Trial]) -> None:
    for _, p, allowed, observed in honest:
        assert worst(judged(allowed, observed)) <= 1, p


def test_honest_float32_keeps_to_the_budget_in_numpy(honest: list[Trial]) -> None:
    plain = [trial for trial in honest if trial.problem.hp.gradient_clipping is None]
    assert len(plain) > len(honest) / 4
    for _, p, allowed, _ in plain:
        assert worst(judged(allowed, in_numpy(p))) <= 1, p


@pytest.mark.parametrize("probability", [1e-1, 1e-2, 1e-3, 1e-4])
def test_false_alarms_are_no_more_frequent_than_promised(honest: list[Trial], probability: float) -> None:
    assert np.mean(ratios(honest) > multiple(DRAWS, probability)) <= probability


@pytest.mark.parametrize("kind", KINDS)
def test_a_float64_lane_has_margins_near_zero(kind: str) -> None:
    for shape in SHAPES:
        p = problem(kind, shape, seed=1)
        assert worst(judged(budgets(p), in_torch(p, torch.float64))) < 1e-6


@pytest.mark.parametrize("kind", ["gaussian", "rank one", "huge", "tiny"])
@pytest.mark.parametrize("mode", ["vector", "matrix", None])
def test_a_lane_at_half_the_precision_exceeds_every_budget(kind: str, mode: str | None) -> None:
    p = problem(kind, (48, 20), seed=2, ortho_mode=mode, adaptive_lr=True)
    margins = judged(budgets(p), in_torch(p, torch.bfloat16))
    assert all(min(margin.norm, margin.element) > 1 for margin in margins.values()), margins


@pytest.mark.parametrize("mode", ["vector", "matrix", None])
def test_a_lane_with_half_the_digits_exceeds_the_budget(mode: str | None) -> None:
    p = problem("gaussian", (48, 20), seed=3, ortho_mode=mode, lr=1e-2)
    rough = replace(FLOAT32, elementwise=2.0**-20, accumulate=2.0**-20)
    observed = reference(p, wrapper(rough, np.random.default_rng(0), draws=1))
    assert worst(judged(budgets(p), {name: np.asarray(x)[0] for name, x in observed.items()})) > 1


ORDINARY: dict[str, Any] = asdict(Hyperparameters(lr=1e-3))
FAULTS: dict[str, dict[str, Any]] = {
    "missing bias correction": {},
    "eps inside the root": {},
    "no-op": {"lr": 1e-6},
    "third coefficient": {"ortho_mode": "matrix"},
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("seed", range(4))
def test_a_planted_fault_is_caught_in_float32(fault: str, seed: int) -> None:
    p = problem("gaussian", (48, 20), seed, **{**ORDINARY, **FAULTS[fault]})
    p = p._replace(state=dolphinflow.init(p.theta, p.hp))
    assert not all(margin.right for margin in judged(budgets(p), in_torch(p, fault=fault)).values())
    assert all(margin.right for margin in judged(budgets(p), in_torch(p)).values())


@pytest.mark.parametrize("argument", ["lr", "momentum", "beta2", "gradient_clipping", "weight_decay"])
@pytest.mark.parametrize("seed", range(4))
def test_an_argument_that_is_off_by_a_thousandth_is_caught_in_float32(argument: str, seed: int) -> None:
    settings = {**ORDINARY, "weight_decay": 1.0} if argument == "weight_decay" else ORDINARY
    p = problem("gaussian", (48, 20), seed, **settings)
    p = p._replace(state={"step": 3, "momentum_buffer": p.gradient, "exp_avg_sq": single(np.square(p.gradient))})
    off: dict[str, Any] = {argument: getattr(p.hp, argument) * (1 - 1e-3)}
    faulty = in_torch(p._replace(hp=replace(p.hp, **off)))
    assert worst(judged(budgets(p), faulty)) > 1
    assert worst(judged(budgets(p), in_torch(p))) <= 1


def simple(run: Callable[[Wrap], Any], stored: Stored = STORED["float32"], arithmetic: Arithmetic = FLOAT32) -> Budget:
    return measure(lambda wrap: {"x": run(wrap)}, arithmetic, {"x": stored}, seed=0)["x"]


THIRDS = np.array([1.0, 2.0, 5.0])


def test_a_value_that_is_not_finite_is_never_right_where_a_number_is_due() -> None:
    budget = simple(lambda wrap: wrap(THIRDS) / 3)
    for bad in (math.nan, math.inf, -math.inf):
        margin = judge(budget, np.array([1 / 3, bad, 5 / 3]))
        assert (margin.element, margin.norm, margin.worst_index) == (math.inf, math.inf, (1,))
        assert not margin.right


def test_a_number_is_never_right_where_nan_or_infinity_is_due() -> None:
    budget = simple(lambda wrap: wrap(np.array([1.0, math.nan, math.inf])) / 3)
    assert judge(budget, np.array([1 / 3, math.nan, math.inf])).right
    assert not judge(budget, np.array([1 / 3, 0.0, math.inf])).right
    assert not judge(budget, np.array([1 / 3, math.nan, 1e38])).right


def test_an_entry_that_the_format_may_or_may_not_hold_is_not_judged() -> None:
    budget = simple(lambda wrap: wrap(np.array([1.0, 3.4028234e38])) * 1.00000008)
    assert budget.undetermined.tolist() == [False, True]
    for either in (math.inf, 3.4028234e38):
        margin = judge(budget, np.array([1.00000008, either]))
        assert margin.right
        assert margin.undetermined == 1


def test_what_the_storage_format_cannot_hold_is_not_judged() -> None:
    budget = simple(lambda wrap: wrap(np.array([7e4, 1.1])), STORED["float16"])
    assert budget.undetermined.tolist() == [True, False]
    assert judge(budget, np.array([np.inf, float(np.float16(1.1))])).right


def test_infinity_is_stored_where_rounding_to_nearest_says_so() -> None:
    for name, stored in STORED.items():
        if name == "float64":
            continue
        dtype = getattr(torch, name)
        half_ulp = stored.largest * stored.unit_roundoff / (2 - 2 * stored.unit_roundoff)
        values = stored.largest + half_ulp * np.array([0.0, 0.999, 1.0, 1.5])
        assert np.array_equal(np.isinf(stored.store(values)), torch.tensor(values).to(dtype).isinf().numpy())


def test_entries_whose_squares_leave_float64_are_judged() -> None:
    for scale in (1e200, 1e-200):
        x = scale * np.array([1.1, -2.3, 0.7])
        budget = measure(lambda wrap, x=x: {"y": wrap(x) * 1.3}, FLOAT64, {"y": STORED["float64"]}, seed=0)["y"]
        assert 0 < budget.norm < scale * 1e-13
        assert judge(budget, x * 1.3).right
        assert not judge(budget, x * 1.3 * (1 + 1e-12)).right


def test_the_few_errors_that_float64_can_have_are_no_discontinuity() -> None:
    """What is left of terms that cancel has an error of −1, 0 or 1 units of the terms, a fused sum half one."""
    rng = np.random.default_rng(0)
    x = rng.uniform(1, 1.5, 4000)
    y = -0.9 * x + rng.standard_normal(4000) * 1e-3
    budget = measure(lambda wrap: {"y": wrap(x) * 0.9 + wrap(y)}, FLOAT64, {"y": STORED["float64"]}, seed=0)["y"]
    fused = [float(Fraction(a) * Fraction(0.9) + Fraction(b)) for a, b in zip(x, y, strict=True)]
    assert judge(budget, np.array(fused)).right
    assert judge(budget, budget.reference).right


def test_either_side_of_a_discontinuity_is_right_in_float64_too() -> None:
    x = np.array([0.7, 1.0, 1.3])

    def run(wrap: Wrap) -> dict[str, Array]:
        return {"y": np.where(wrap(x) * 3.3 / 3.3 < 1, wrap(x) * 1.1, wrap(x) * 0.5)}

    budget = measure(run, FLOAT64, {"y": STORED["float64"]}, seed=0)["y"]
    assert judge(budget, np.array([0.7 * 1.1, 0.5, 0.65])).right
    assert judge(budget, np.array([0.7 * 1.1, 1.1, 0.65])).right
    assert not judge(budget, np.array([0.7 * 1.1, 0.8, 0.65])).right


def test_either_side_of_a_discontinuity_is_right_and_nothing_between_them() -> None:
    x, bound = np.array([0.7, 1.0, 1.3]) / 3, 1 / 3

    def run(wrap: Wrap) -> Array:
        inside = wrap(x) * 3.3 < 3.3 * bound
        return np.where(inside, wrap(x) * 1.1, wrap(x) * 0.5)

    budget = simple(run)
    low, high = x * 0.5, x * 1.1
    assert judge(budget, np.array([high[0], low[1], low[2]])).right
    assert judge(budget, np.array([high[0], high[1], low[2]])).right
    assert not judge(budget, np.array([high[0], (low[1] + high[1]) / 2, low[2]])).right
    assert not judge(budget, np.array([low[0], low[1], low[2]])).right
    assert not judge(budget, np.array([high[0], high[1], high[2]])).right
    assert budget.low[1] < budget.high[1]
    assert budget.low[0] == budget.high[0] == budget.reference[0]


def test_draws_on_two_neighbouring_numbers_are_no_discontinuity() -> None:
    """Draws of several steps are rounded between them. What is as far beyond one of them as that beyond it is right."""
    x, unit = np.ones(1), 2.0**-23

    def run(wrap: Wrap) -> Array:
        return x if wrap is np.asarray else x + unit * (np.arange(DRAWS)[:, np.newaxis] % 2)

    budget = simple(run)
    assert budget.low == budget.high == budget.reference
    assert judge(budget, x - 3 * unit).right
    assert not judge(budget, x + 9 * unit).right


def test_a_row_at_the_bound_of_its_domain_may_be_projected_or_not() -> None:
    w = np.full((1, 4), math.sqrt(1e-8 / 4))
    hp = Hyperparameters(project="update", lr=1.0, weight_decay=0.0, gradient_clipping=None, adaptive_lr=False)
    p = Problem(w, np.array([[1.0, 2.0, 3.0, 4.0]]), dolphinflow.init(w, hp), hp)
    allowed = budgets(p, draws=32)["update"]
    projected, raw = np.array([[2.85, 0.95, -0.95, -2.85]]), np.array([[-1.9, -3.8, -5.7, -7.6]])
    assert judge(allowed, single(projected)).right
    assert judge(allowed, single(raw)).right
    assert not judge(allowed, single((projected + raw) / 2)).right


def test_the_stored_result_may_be_either_neighbour_but_not_truncated_throughout() -> None:
    x = 1 + np.arange(1, 400) / 777
    stored = STORED["bfloat16"]
    budget = simple(lambda wrap: wrap(x), stored)
    rounded = torch.tensor(x).to(torch.bfloat16).double().numpy()
    truncated = np.floor(x * 128) / 128
    assert 0.4 < judge(budget, rounded).worst < 0.9
    assert judge(budget, truncated).element <= 1 < judge(budget, truncated).norm
    assert judge(budget, np.where(x == x[7], rounded + 2.0**-6, rounded)).element > 1
    assert_same(stored.round(x), rounded)


def test_an_update_is_rounded_where_the_parameter_is() -> None:
    theta = torch.tensor(np.linspace(-2, 2, 37)).to(torch.bfloat16).double().numpy()
    step = np.full(37, 1e-2)
    budget = simple(lambda wrap: wrap(step) * 1.1, STORED["bfloat16"].beside(theta))
    new = torch.tensor(theta + step * 1.1).to(torch.bfloat16).double().numpy()
    assert judge(budget, new - theta).right
    assert not judge(simple(lambda wrap: wrap(step) * 1.1, STORED["bfloat16"]), new - theta).right


def test_what_a_format_holds_is_what_torch_says() -> None:
    for name, stored in STORED.items():
        info = torch.finfo(getattr(torch, name))
        assert stored.unit_roundoff == info.eps / 2
        assert stored.largest == info.max
        assert stored.smallest == info.smallest_normal * info.eps


def test_exact_results_are_held_to_the_last_place() -> None:
    budget = simple(lambda wrap: 2.0 * wrap(THIRDS))
    assert np.all(budget.spread == 0)
    assert judge(budget, 2 * THIRDS).worst == 0
    assert not judge(budget, 2 * THIRDS * (1 + 2.0**-22)).right


def test_the_same_seed_makes_the_same_budget_and_another_a_similar_one() -> None:
    p = problem("gaussian", (20, 48), seed=5, ortho_mode="vector")
    one, again, other = (budgets(p, seed=seed)["update"] for seed in (0, 0, 1))
    assert np.array_equal(one.element, again.element)
    assert one.norm == again.norm
    assert not np.array_equal(one.element, other.element)
    assert 0.9 < np.mean(one.element) / np.mean(other.element) < 1.1


def test_fewer_draws_make_wider_budgets() -> None:
    assert multiple(8) > multiple(16) > multiple(32) > multiple(64) > HONEST * 6.1  # the Gaussian quantile of 1e-9
    assert_same(multiple(2, probability=0.05) / HONEST, 4.302652729911275, operations=1 << 20)  # from a table
    for draws in (0, 1, 7):
        with pytest.raises(ValueError, match=f"draws={draws}"):
            multiple(draws)


def test_margins_name_the_worst_entry() -> None:
    budget = simple(lambda wrap: wrap(THIRDS.reshape(3, 1)) / 3)
    observed = THIRDS.reshape(3, 1) / 3 * (1 + np.array([[0.0], [1e-5], [1e-6]]))
    margin = judge(budget, observed)
    assert margin.worst_index == (1, 0)
    assert (margin.worst_observed, margin.worst_reference) == (observed[1, 0], 2 / 3)
    arithmetic = budget.at((1, 0))
    assert arithmetic["allowed"] == arithmetic["floor"] + arithmetic["multiple"] * arithmetic["spread"]


def test_empty_and_0_dimensional_outputs_have_margins_too() -> None:
    assert judge(simple(lambda wrap: wrap(np.zeros((0, 3))) / 3), np.zeros((0, 3))).right
    scalar = simple(lambda wrap: np.sum(wrap(THIRDS)))
    assert judge(scalar, np.array(8.0)).right
    assert not judge(scalar, np.array(8.001)).right


def test_an_output_of_another_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"\(3, 1\)"):
        judge(simple(lambda wrap: wrap(THIRDS) / 3), np.zeros((3, 1)))


def test_the_noise_of_a_budget_is_that_of_the_lane() -> None:
    seen: list[Any] = []

    def run(wrap: Wrap) -> Array:
        x = wrap(THIRDS)
        seen.append(x.source.arithmetic if isinstance(x, Noisy) else FLOAT64)
        return x

    simple(run, arithmetic=BFLOAT16)
    assert seen == [FLOAT64, BFLOAT16]


def test_float64_results_agree_up_to_rounding_or_not() -> None:
    assert_same([1.0, math.nan, math.inf], [1.0 + 2.0**-50, math.nan, math.inf])
    for wrong in ([1.0 + 1e-10, math.nan], [1.0, 0.0], [1.0]):
        with pytest.raises(AssertionError, match="not the same"):
            assert_same(wrong, [1.0, math.nan])


def calibrate(seeds: int) -> None:
    """Print the distribution of honest margins, and how often errors exceed smaller multiples than the budget's."""
    margins: dict[str, list[tuple[float, float]]] = defaultdict(list)
    honest = list(trials(seeds))
    for trial in honest:
        for name, margin in judged(trial.budgets, trial.observed).items():
            margins[f"{name}, {trial.kind}"].append((margin.norm, margin.element))
    for label, pairs in margins.items():
        norm, element = np.array(pairs).T
        print(f"{label:30} norm {np.median(norm):.2f} … {norm.max():.2f}  element {element.max():.2f}")
    ratio = ratios(honest)
    for probability in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-9):
        beyond = np.mean(ratio > multiple(DRAWS, probability))
        print(f"promised at most {probability:.0e}: {beyond:.1e} of {ratio.size:,} entries")
    print(f"worst: {np.max(ratio):.2f} spreads, allowed {multiple(DRAWS):.2f}")


if __name__ == "__main__":
    calibrate(int(sys.argv[1]))
