"""Monte Carlo arithmetic: how large its errors are, where there are none, and that they never get lost."""

import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import trysquare_reference
from trysquare_conformance.noise import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    Arithmetic,
    Noisy,
    computed_in,
    mixed,
    noisy,
    wrapper,
)
from trysquare_reference import (
    blockwise8bit,
    clipping,
    decay,
    dolphinflow,
    dolphinflow8bit,
    moments,
    polar,
    polar_express,
    projection,
    row_norm,
    schedule_free,
    stablemax,
    thorn,
)

U = FLOAT32.elementwise
Wrap = Callable[[Any], Noisy]


def source(arithmetic: Arithmetic = FLOAT32, seed: int = 0) -> Wrap:
    return wrapper(arithmetic, np.random.default_rng(seed))


def gaussian(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(np.float64)


def relative(x: Any, exact: Any) -> Any:
    return (np.asarray(x) - exact) / np.abs(exact)


ELEMENTWISE: dict[str, tuple[Callable[[Any, Any], Any], float]] = {
    "add": (lambda x, y: x + y, 1),
    "multiply": (lambda x, y: x * y, 1),
    "divide": (lambda x, y: x / y, 1),
    "square": (lambda x, _: np.square(x), 1),
    "power": (lambda x, _: x**2, 1),
    "sqrt": (lambda x, _: np.sqrt(np.abs(x)), 1),
    "exp": (lambda x, _: np.exp(x), 2),
    "log1p": (lambda x, _: np.log1p(np.abs(x)), 2),
}


@pytest.mark.parametrize("operation", ELEMENTWISE)
@pytest.mark.parametrize("arithmetic", [FLOAT32, BFLOAT16, FLOAT16], ids=lambda a: a.name)
def test_an_elementwise_result_is_off_by_a_uniform_error_of_one_roundoff(
    operation: str, arithmetic: Arithmetic
) -> None:
    function, roundoffs = ELEMENTWISE[operation]
    x, y = 1 + np.abs(gaussian(4000)), 1.5 + np.abs(gaussian(4000, seed=1))
    wrap = source(arithmetic)
    error = relative(function(wrap(x), wrap(y)), function(x, y)) / (roundoffs * arithmetic.elementwise)
    assert np.all(np.abs(error) <= 1.01)
    assert 0.55 < np.std(error) < 0.61  # 1/√3 if uniform
    assert abs(np.mean(error)) < 0.04


EXACT: dict[str, Callable[[Any], Any]] = {
    "times one": lambda x: 1.0 * x,
    "times a power of two": lambda x: x * 0.25,
    "times zero": lambda x: 0.0 * x,
    "times a mask": lambda x: x * (np.arange(50) % 2),
    "over a power of two": lambda x: x / 8,
    "plus zero": lambda x: x + 0,
    "zero plus": lambda x: np.zeros(50) + x,
    "minus zero": lambda x: x - 0.0,
    "negative": lambda x: -x,
    "absolute value": np.abs,
    "sign": np.sign,
    "minimum": lambda x: np.minimum(1.0, x),
    "where": lambda x: np.where(x > 0, x, 0.0),
    "stack": lambda x: np.stack([x, x]),
    "concatenate": lambda x: np.concatenate([x, x]),
    "reshape and transpose": lambda x: x.reshape(5, 10).T,
    "index": lambda x: x[3],
    "largest": lambda x: np.max(x, keepdims=True),
    "sum of one": lambda x: np.sum(x.reshape(50, 1), axis=1),
    "copy": lambda x: x.copy(),
}


@pytest.mark.parametrize("operation", EXACT)
def test_what_is_exact_in_a_machine_stays_exact(operation: str) -> None:
    x = gaussian(50) * 1e-3 + 1 / 3  # not a value of any format: exactness must not depend on it
    result = EXACT[operation](source(BFLOAT16)(x))
    assert isinstance(result, Noisy)
    assert np.array_equal(np.asarray(result), EXACT[operation](x))


TERMS: dict[str, Callable[[Any], Any]] = {
    "either sign": lambda x: x,
    "one sign": lambda x: np.abs(x) + 1,
    "equal": lambda x: np.full_like(x, 1.1),
}


@pytest.mark.parametrize("terms", [2, 16, 4096, 65536])
@pytest.mark.parametrize("kind", TERMS)
def test_the_error_of_a_sum_grows_with_its_terms_up_to_a_chain(terms: int, kind: str) -> None:
    x = TERMS[kind](gaussian(terms))
    total, squares = np.sum(x), np.sum(x * x)
    growth = min(terms, 256) / 4 if kind == "equal" else math.sqrt(min(terms, 128) / 3)
    amplitude = U * (math.sqrt(min(terms, 512) * squares + (growth * total) ** 2) + abs(total))
    errors = [np.asarray(np.sum(source(seed=s)(x))) - total for s in range(200)]
    assert np.max(np.abs(errors)) <= amplitude * 1.01
    assert 0.5 * amplitude < np.std(errors) < 0.65 * amplitude


@pytest.mark.parametrize("terms", [16, 100, 512, 4096])
@pytest.mark.parametrize("kind", TERMS)
def test_real_float32_products_err_as_the_model_does(terms: int, kind: str) -> None:
    a, b = TERMS[kind](gaussian(24, terms)), TERMS[kind](gaussian(terms, 24, seed=1))
    a, b = (x.astype(np.float32).astype(np.float64) for x in (a, b))
    real = np.linalg.norm((torch.tensor(a).float() @ torch.tensor(b).float()).double().numpy() - a @ b)
    draws = [np.linalg.norm(np.asarray(wrap(a) @ wrap(b)) - a @ b) for wrap in map(partial(source, FLOAT32), range(8))]
    assert (0.2 if kind == "either sign" else 0) < real / np.sqrt(np.mean(np.square(draws))) < 1.25


@pytest.mark.parametrize("reduce", [lambda a: np.mean(a, axis=0), lambda a: a.mean(axis=0), lambda a: sum(a) / 9])
def test_means_are_sums_that_are_divided(reduce: Callable[[Any], Any]) -> None:
    x = gaussian(9, 40) + 3
    result = reduce(source()(x))
    assert isinstance(result, Noisy)
    assert 0 < np.max(np.abs(relative(result, np.mean(x, axis=0)))) < 20 * U


@pytest.mark.parametrize("arithmetic", [FLOAT32, BFLOAT16, mixed(FLOAT32, BFLOAT16)], ids=lambda a: a.name)
def test_a_product_draws_with_the_roundoff_of_its_inputs_accumulator_and_output(arithmetic: Arithmetic) -> None:
    a, b = gaussian(60, 64), gaussian(64, 50, seed=1)
    size = np.abs(a @ b)
    walk = np.sqrt(64 * (a * a) @ (b * b) + 64 / 3 * size**2)
    amplitude = arithmetic.accumulate * (walk + size) + arithmetic.product_output * size
    from_inputs = 2 * arithmetic.product_input * (np.abs(a) @ np.abs(b))
    wrap = source(arithmetic)
    error = np.abs(np.asarray(wrap(a) @ wrap(b)) - a @ b)
    assert np.all(error <= (amplitude + from_inputs) * 1.01)
    assert np.linalg.norm(error) > np.linalg.norm(amplitude) / 2


def test_mixed_precision_takes_products_from_one_format_and_the_rest_from_another() -> None:
    arithmetic = mixed(FLOAT32, FLOAT16)
    assert (arithmetic.elementwise, arithmetic.accumulate) == (FLOAT32.elementwise, FLOAT32.accumulate)
    assert arithmetic.product_input == arithmetic.product_output == FLOAT16.elementwise
    assert arithmetic.largest == FLOAT16.largest


def test_a_part_can_be_computed_in_another_arithmetic_with_the_constants_of_the_whole() -> None:
    x, seen = source()(gaussian(50)), []

    def part(inner: Any) -> Any:
        seen.append(inner.source.arithmetic)
        return inner * 1.1

    y = computed_in(BFLOAT16, part, x)
    assert seen == [BFLOAT16]
    assert isinstance(y, Noisy)
    assert y.source is x.source
    error = np.abs(relative(y, np.asarray(x) * 1.1))
    assert FLOAT32.elementwise * 100 < np.max(error) <= 2.1 * BFLOAT16.elementwise
    constant = np.asarray(computed_in(BFLOAT16, lambda inner: inner + 1.1, source()(np.zeros(1))))
    assert abs(constant[0] - 1.1) <= 2 * FLOAT32.elementwise


def test_what_is_not_noisy_is_computed_as_it_is() -> None:
    assert computed_in(BFLOAT16, lambda x: x * 1.1, np.ones(1)) == 1.1


def test_a_symmetric_product_stays_symmetric() -> None:
    x = source(BFLOAT16)(gaussian(12, 30))
    a = np.asarray(x @ x.T)
    assert np.array_equal(a, a.T)


def test_equal_entries_get_equal_errors_and_opposite_ones_opposite_errors() -> None:
    x = np.array([1 / 3, 1 / 3, -1 / 3])
    y = np.asarray(source()(x) * 1.1)
    assert y[0] == y[1] == -y[2] != x[0] * 1.1


def test_a_constant_enters_rounded_alike_wherever_it_is_used() -> None:
    wrap = source()
    one, two = np.asarray(wrap(np.zeros(1)) + 0.9), np.asarray(wrap(np.zeros(1)) + 0.9)
    assert one == two != 0.9
    assert abs(one[0] - 0.9) <= 0.9 * U
    assert np.asarray(wrap(np.zeros(1)) + 0.75) == 0.75


def test_float64_asked_for_by_name_is_float64_in_every_arithmetic() -> None:
    x = source(BFLOAT16)(gaussian(100) * 1e30)
    squares = np.square(x, dtype=np.float64)
    assert np.max(np.abs(relative(squares, np.square(np.asarray(x))))) <= FLOAT64.elementwise * 2
    assert np.all(np.isfinite(np.sum(squares, dtype=np.float64)))
    with pytest.raises(TypeError, match="float32"):
        np.square(x, dtype=np.float32)


def test_results_outside_the_range_overflow_and_underflow() -> None:
    with np.errstate(all="ignore"):
        squares = np.asarray(np.square(source()(np.array([1e25, -1e19, 1e-30, 0.0, np.nan]))))
        half = np.asarray(source(FLOAT16)(np.array([300.0, -300.0])) * np.array([300.0, 300.0]))
    assert squares[0] == np.inf
    assert np.isfinite(squares[1])
    assert 0 <= squares[2] <= FLOAT32.smallest
    assert squares[3] == 0
    assert np.isnan(squares[4])
    assert half.tolist() == [np.inf, -np.inf]


def test_a_subnormal_result_keeps_an_absolute_error_and_its_sign() -> None:
    x = np.geomspace(FLOAT32.smallest / 64, FLOAT32.smallest * 1e4, 500)
    y = np.asarray(source()(x) * 0.7)
    assert np.all(y >= 0)
    assert np.all(np.abs(y - 0.7 * x) <= FLOAT32.smallest * 0.51 + 3 * U * x)
    assert np.max(np.abs(y - 0.7 * x)) > FLOAT32.smallest / 4


def test_comparisons_are_plain_and_scalars_stay_arrays() -> None:
    x = source()(gaussian(4))
    assert type(x > 0) is np.ndarray
    assert type(np.isfinite(x)) is np.ndarray
    for scalar in (np.sum(x), x[0], x.max(), np.sqrt(np.sum(x * x)), *x):
        assert isinstance(scalar, Noisy)
        assert scalar.shape == ()


def test_in_place_operations_are_perturbed_too() -> None:
    x = source()(np.ones(100))
    view = x[:]
    x *= 1.1
    assert isinstance(x, Noisy)
    assert np.array_equal(np.asarray(view), np.asarray(x))
    assert np.any(np.asarray(x) != 1.1)


LEAKS: dict[str, Callable[[Any], Any]] = {
    "dot": lambda x: np.dot(x, x),
    "dot method": lambda x: x.dot(x),
    "vdot": lambda x: np.vdot(x, x),
    "einsum": lambda x: np.einsum("i,i", x, x),
    "norm": np.linalg.norm,
    "product": np.prod,
    "cumulative sum": lambda x: x.cumsum(),
    "outer": lambda x: np.add.outer(x, x),
    "vecdot": lambda x: np.vecdot(x, x),
    "hypot": lambda x: np.hypot(x, x),
    "masked sum": lambda x: np.sum(x, where=x > 0),
    "sum from a start": lambda x: np.sum(x, initial=1.0),
    "float": lambda x: float(x[0]),
    "truth": lambda x: bool(x[0]),
    "item": lambda x: x[0].item(),
    "list": lambda x: x.tolist(),
    "another draw": lambda x: x + source()(np.ones(3)),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_what_would_lose_the_noise_raises(leak: str) -> None:
    with pytest.raises(TypeError):
        LEAKS[leak](source()(np.ones(3)))


def test_the_same_seed_gives_the_same_draw_and_another_another() -> None:
    first, again, other = (np.asarray(noisy(np.ones(50), FLOAT32, np.random.default_rng(s)) / 3) for s in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


X, W, PER_ROW = gaussian(4, 3), gaussian(4, 3, seed=1), np.array([0, 2, 1, 2])
SHARES = np.abs(X) / np.sum(np.abs(X), axis=1, keepdims=True)
HP = dolphinflow.Hyperparameters()


def _dolphinflow(wrap: Wrap, **settings: Any) -> Any:
    hp = dolphinflow.Hyperparameters(**settings)
    theta = [wrap(X), wrap(X[0])]
    return dolphinflow.step(theta, [wrap(W), wrap(W[0])], [dolphinflow.init(t, hp) for t in theta], hp)


def _thorn(wrap: Wrap, **settings: Any) -> Any:
    hp = thorn.Hyperparameters(**settings)
    state = thorn.init(wrap(X), hp)
    theta = wrap(X)
    for g in (W, X):
        (theta,), (state,) = thorn.step([theta], [wrap(g)], [state], hp)
    return theta, state


def _micro_step(wrap: Wrap, **settings: Any) -> Any:
    hp = thorn.Hyperparameters(update_rate=2, **settings)
    return thorn.release_step(wrap(X), wrap(W), thorn.init(wrap(X), hp), hp)


GROUPS: list[dict[str, Any]] = [
    {"orthogonalize": orthogonalize, "schedule_free": schedule_free, "betas": betas}
    for orthogonalize, schedule_free in ((True, True), (False, True), (False, False))
    for betas in ((0.9, 0.95), (0.0, 0.0))
]


LARGE = dolphinflow8bit.SMALLEST_CODED // 8
CODED = gaussian(8, LARGE, seed=2)
QMAP, HP8BIT = blockwise8bit.dynamic_map(signed=True), dolphinflow8bit.Hyperparameters()


def _dolphinflow8bit(wrap: Wrap, **settings: Any) -> Any:
    """What is not a code: codes are integers, where noise ends."""
    hp = dolphinflow8bit.Hyperparameters(**settings)
    theta = [wrap(X), wrap(CODED)]
    states = [dolphinflow8bit.init(t, hp) for t in theta]
    stepped, after = dolphinflow8bit.step(theta, [wrap(W), wrap(CODED[::-1])], states, hp)
    return stepped, after[0], [after[1][name] for name in after[1] if name.startswith("absmax")]


CALLS: dict[str, Callable[[Wrap], Any]] = {
    "blockwise8bit.midpoints": lambda wrap: blockwise8bit.midpoints(wrap(QMAP)),
    "blockwise8bit.blocks": lambda wrap: blockwise8bit.blocks(wrap(X)),
    "blockwise8bit.unblocked": lambda wrap: blockwise8bit.unblocked(wrap(X), (3, 2)),
    "blockwise8bit.block_absmax": lambda wrap: blockwise8bit.block_absmax(wrap(CODED)),
    "blockwise8bit.scaled": lambda wrap: blockwise8bit.scaled(wrap(X), wrap(np.array([5.0]))),
    "blockwise8bit.quantize": lambda wrap: blockwise8bit.quantize(wrap(X * X), QMAP)[1],
    "blockwise8bit.dequantize": lambda wrap: blockwise8bit.dequantize(PER_ROW, wrap(np.array([5.0])), QMAP),
    "blockwise8bit.error_bound": lambda wrap: blockwise8bit.error_bound(PER_ROW, wrap(np.array([5.0])), QMAP),
    "dolphinflow8bit.init": lambda wrap: dolphinflow8bit.init(wrap(X), HP8BIT),
    "dolphinflow8bit.store": lambda wrap: dolphinflow8bit.store(wrap(CODED), 1)["absmax1"],
    "dolphinflow8bit.load": lambda wrap: dolphinflow8bit.load(
        {**dolphinflow8bit.store(CODED, 1), "absmax1": wrap(np.ones(16))}, 1
    ),
    "dolphinflow8bit.update_moments": lambda wrap: dolphinflow8bit.update_moments(
        wrap(X), wrap(W), dolphinflow8bit.init(wrap(X), HP8BIT), HP8BIT
    ),
    "dolphinflow8bit.step": lambda wrap: [
        _dolphinflow8bit(wrap, ortho_mode=mode, adaptive_lr=adaptive)
        for mode in ("vector", "matrix", None)
        for adaptive in (True, False)
    ],
    "projection.project_rows": lambda wrap: projection.project_rows(wrap(X), wrap(W)),
    "projection.project_update_rows": lambda wrap: projection.project_update_rows(wrap(X), wrap(W), 1e-8),
    "clipping.global_norm": lambda wrap: clipping.global_norm([wrap(X), wrap(W)]),
    "clipping.clip_scale": lambda wrap: clipping.clip_scale([wrap(X), wrap(W)], 1.0),
    "moments.nesterov": lambda wrap: moments.nesterov(wrap(X), wrap(W), 0.9),
    "moments.second_moment": lambda wrap: moments.second_moment(wrap(X * X), wrap(W), 0.99),
    "moments.adapt": lambda wrap: [moments.adapt(wrap(X), wrap(W * W), 3, 0.99, 1e-8, b) for b in (True, False)],
    "polar.newton_schulz": lambda wrap: [polar.newton_schulz(wrap(x), 5, 1e-8) for x in (X, X.T, X.reshape(2, 2, 3))],
    "decay.decoupled_decay": lambda wrap: decay.decoupled_decay(wrap(X), 0.1, 0.1),
    "decay.cautious_decay": lambda wrap: decay.cautious_decay(wrap(X), wrap(W), 0.1),
    "polar.polar_factor": lambda wrap: [
        polar.polar_factor(wrap(x), polar_express.coefficients(), 0.02, 1e-8, form)
        for x in (X, X.T, X.reshape(2, 2, 3))
        for form in ("standard", "gram")
    ],
    "row_norm.normalize_rows": lambda wrap: row_norm.normalize_rows(wrap(X), wrap(X[:, :1] ** 2), 0.95, 1e-8),
    "schedule_free.average": lambda wrap: schedule_free.average(wrap(X), wrap(W), 0.3),
    "schedule_free.averaged": lambda wrap: schedule_free.averaged(wrap(X), wrap(W), 0.9),
    "schedule_free.explicit_step": lambda wrap: schedule_free.explicit_step(
        wrap(X), wrap(W), wrap(X * W), 0.1, 0.3, 0.9
    ),
    "schedule_free.step": lambda wrap: schedule_free.step(wrap(X), wrap(W), wrap(X * W), 0.1, 0.3, 0.9),
    "thorn.init": lambda wrap: [
        thorn.init(wrap(X), thorn.Hyperparameters(**group), half=True) for group in GROUPS if not group["orthogonalize"]
    ],
    "thorn.step": lambda wrap: [_thorn(wrap, weight_decay=decay, **group) for group in GROUPS for decay in (0.0, 0.1)],
    "thorn.release_step": lambda wrap: [_micro_step(wrap, **group) for group in GROUPS],
    "thorn.accumulate": lambda wrap: [
        thorn.accumulate(wrap(W), thorn.init(wrap(X), hp), hp)
        for hp in (thorn.Hyperparameters(**group) for group in GROUPS if not group["orthogonalize"])
    ],
    "thorn.mean": lambda wrap: [
        thorn.mean(wrap(X), thorn.init(wrap(W), hp), hp) for hp in (thorn.Hyperparameters(**group) for group in GROUPS)
    ],
    "dolphinflow.init": lambda wrap: dolphinflow.init(wrap(X), HP),
    "dolphinflow.step": lambda wrap: [
        _dolphinflow(wrap, ortho_mode=mode, project=project, adaptive_lr=adaptive)
        for mode in ("vector", "matrix", None)
        for project in ("gradient", "update")
        for adaptive in (True, False)
    ],
    "stablemax.s": lambda wrap: stablemax.s(wrap(X)),
    "stablemax.s_slope": lambda wrap: stablemax.s_slope(wrap(X)),
    "stablemax.log_s": lambda wrap: stablemax.log_s(wrap(X)),
    "stablemax.log_s_slope": lambda wrap: stablemax.log_s_slope(wrap(X)),
    "stablemax.stablemax": lambda wrap: stablemax.stablemax(wrap(X)),
    "stablemax.log_stablemax": lambda wrap: stablemax.log_stablemax(wrap(X)),
    "stablemax.stablemax_gradient": lambda wrap: stablemax.stablemax_gradient(wrap(X), wrap(W)),
    "stablemax.log_stablemax_gradient": lambda wrap: stablemax.log_stablemax_gradient(wrap(X), wrap(W)),
    "stablemax.cross_entropy": lambda wrap: [
        stablemax.cross_entropy(wrap(X), target, reduction=reduction)
        for target in (PER_ROW, wrap(SHARES))
        for reduction in ("mean", "sum", "none")
    ],
    "stablemax.cross_entropy_gradient": lambda wrap: [
        stablemax.cross_entropy_gradient(wrap(X), target, wrap(np.abs(W[0])), label_smoothing=0.1)
        for target in (PER_ROW, wrap(SHARES))
    ],
    "stablemax.probability_gradients": lambda wrap: stablemax.probability_gradients(wrap(X), wrap(SHARES)),
    "stablemax.coefficients": lambda wrap: stablemax.coefficients(wrap(X), wrap(SHARES), None, -100, 0.1),
    "stablemax.denominator": lambda wrap: stablemax.denominator(wrap(X), PER_ROW, wrap(np.abs(W[0])), -100),
}
"""Every public function of every page, with all its inputs noisy."""

WITHOUT_ARRAYS = {
    "blockwise8bit.dynamic_map",
    "blockwise8bit.interval",
    "blockwise8bit.nearest",
    "loss_schedule.update",
    "polar_express.coefficients",
    "polar_express.quintic",
    "rectification.rectification",
    "schedule_free.weigh",
    "stablemax.class_axis",
    "thorn.scale",
}
NUMBERS = {"step", "lr_max", "weight_sum"}  # of a state: float64 whatever the precision


def public_functions() -> Iterator[str]:
    for page in pkgutil.iter_modules(trysquare_reference.__path__):
        if not page.name.startswith("_"):
            module = importlib.import_module(f"trysquare_reference.{page.name}")
            for name, function in inspect.getmembers(module, inspect.isfunction):
                if inspect.unwrap(function).__module__ == module.__name__ and not name.startswith("_"):
                    yield f"{page.name}.{name}"


def leaves(result: Any) -> Iterator[Any]:
    if isinstance(result, (list, tuple)):
        for part in result:
            yield from leaves(part)
    elif isinstance(result, dict):
        yield from leaves([value for name, value in result.items() if name not in NUMBERS])
    else:
        yield result


def test_every_function_of_every_page_is_called_here() -> None:
    assert set(CALLS) == set(public_functions()) - WITHOUT_ARRAYS


@pytest.mark.parametrize("function", CALLS)
def test_the_noise_survives_to_every_output_of_every_page(function: str) -> None:
    outputs = list(leaves(CALLS[function](source())))
    assert outputs
    assert all(type(x) is Noisy for x in outputs), [type(x) for x in outputs]


@pytest.mark.parametrize("function", CALLS)
def test_a_noisy_page_computes_what_the_plain_page_does(function: str) -> None:
    plain: Any = np.asarray
    for exact, x in zip(leaves(CALLS[function](plain)), leaves(CALLS[function](source())), strict=True):
        assert np.shape(x) == np.shape(exact)
        scale = np.max(np.abs(np.asarray(exact)))
        assert np.max(np.abs(np.asarray(x) - exact)) <= 2000 * U * scale
