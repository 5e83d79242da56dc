"""Monte Carlo arithmetic: how large its errors are, and where there are none. Here of one draw."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from trysquare_conformance.noise import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, Arithmetic, mixed
from trysquare_conformance.noisy import Noisy, wrapper

U = FLOAT32.elementwise


def source(arithmetic: Arithmetic = FLOAT32, seed: int = 0) -> Callable[[Any], Any]:
    return wrapper(arithmetic, np.random.default_rng(seed), draws=1)


def drawn(x: Any) -> Any:
    """The values of the one draw."""
    assert isinstance(x, Noisy)
    (values,) = np.asarray(x)
    return values


def gaussian(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(np.float64)


def relative(x: Any, exact: Any) -> Any:
    return (drawn(x) - exact) / np.abs(exact)


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
    assert np.array_equal(drawn(result), EXACT[operation](x))


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
    errors = [drawn(np.sum(source(seed=s)(x))) - total for s in range(200)]
    assert np.max(np.abs(errors)) <= amplitude * 1.01
    assert 0.5 * amplitude < np.std(errors) < 0.65 * amplitude


@pytest.mark.parametrize("terms", [16, 100, 512, 4096])
@pytest.mark.parametrize("kind", TERMS)
def test_real_float32_products_err_as_the_model_does(terms: int, kind: str) -> None:
    a, b = TERMS[kind](gaussian(24, terms)), TERMS[kind](gaussian(terms, 24, seed=1))
    a, b = (x.astype(np.float32).astype(np.float64) for x in (a, b))
    real = np.linalg.norm((torch.tensor(a).float() @ torch.tensor(b).float()).double().numpy() - a @ b)
    draws = [np.linalg.norm(drawn(wrap(a) @ wrap(b)) - a @ b) for wrap in map(partial(source, FLOAT32), range(8))]
    assert (0.2 if kind == "either sign" else 0) < real / np.sqrt(np.mean(np.square(draws))) < 1.25


@pytest.mark.parametrize("reduce", [lambda a: np.mean(a, axis=0), lambda a: a.mean(axis=0), lambda a: sum(a) / 9])
def test_means_are_sums_that_are_divided(reduce: Callable[[Any], Any]) -> None:
    x = gaussian(9, 40) + 3
    result = reduce(source()(x))
    assert 0 < np.max(np.abs(relative(result, np.mean(x, axis=0)))) < 20 * U


@pytest.mark.parametrize("arithmetic", [FLOAT32, BFLOAT16, mixed(FLOAT32, BFLOAT16)], ids=lambda a: a.name)
def test_a_product_draws_with_the_roundoff_of_its_inputs_accumulator_and_output(arithmetic: Arithmetic) -> None:
    a, b = gaussian(60, 64), gaussian(64, 50, seed=1)
    size = np.abs(a @ b)
    walk = np.sqrt(64 * (a * a) @ (b * b) + 64 / 3 * size**2)
    amplitude = arithmetic.accumulate * (walk + size) + arithmetic.product_output * size
    from_inputs = 2 * arithmetic.product_input * (np.abs(a) @ np.abs(b))
    wrap = source(arithmetic)
    error = np.abs(drawn(wrap(a) @ wrap(b)) - a @ b)
    assert np.all(error <= (amplitude + from_inputs) * 1.01)
    assert np.linalg.norm(error) > np.linalg.norm(amplitude) / 2


def test_mixed_precision_takes_products_from_one_format_and_the_rest_from_another() -> None:
    arithmetic = mixed(FLOAT32, FLOAT16)
    assert (arithmetic.elementwise, arithmetic.accumulate) == (FLOAT32.elementwise, FLOAT32.accumulate)
    assert arithmetic.product_input == arithmetic.product_output == FLOAT16.elementwise
    assert arithmetic.largest == FLOAT16.largest


def test_a_symmetric_product_stays_symmetric() -> None:
    x = source(BFLOAT16)(gaussian(12, 30))
    a = drawn(x @ x.T)
    assert np.array_equal(a, a.T)


def test_equal_entries_get_equal_errors_and_opposite_ones_opposite_errors() -> None:
    x = np.array([1 / 3, 1 / 3, -1 / 3])
    y = drawn(source()(x) * 1.1)
    assert y[0] == y[1] == -y[2] != x[0] * 1.1


def test_a_constant_enters_rounded_alike_wherever_it_is_used() -> None:
    wrap = source()
    one, two = drawn(wrap(np.zeros(1)) + 0.9), drawn(wrap(np.zeros(1)) + 0.9)
    assert one == two != 0.9
    assert abs(one[0] - 0.9) <= 0.9 * U
    assert drawn(wrap(np.zeros(1)) + 0.75) == 0.75


def test_float64_asked_for_by_name_is_float64_in_every_arithmetic() -> None:
    x = source(BFLOAT16)(gaussian(100) * 1e30)
    squares = np.square(x, dtype=np.float64)
    assert np.max(np.abs(relative(squares, np.square(drawn(x))))) <= FLOAT64.elementwise * 2
    assert np.isfinite(drawn(np.sum(squares, dtype=np.float64)))
    with pytest.raises(TypeError, match="float32"):
        np.square(x, dtype=np.float32)


def test_a_number_like_an_array_is_exact_until_something_is_computed_with_it() -> None:
    x = source(BFLOAT16)(gaussian(3))
    number = np.full_like(x, 0.999, shape=())
    assert drawn(number) == 0.999
    assert 0 < np.abs(relative(np.power(number, 2, dtype=np.float64), 0.999**2)) <= 2 * FLOAT64.elementwise * 1.01
    with pytest.raises(TypeError, match="float32"):
        np.full_like(x, 0.999, dtype=np.float32)


def test_results_outside_the_range_overflow_and_underflow() -> None:
    with np.errstate(all="ignore"):
        squares = drawn(np.square(source()(np.array([1e25, -1e19, 1e-30, 0.0, np.nan]))))
        half = drawn(source(FLOAT16)(np.array([300.0, -300.0])) * np.array([300.0, 300.0]))
    assert squares[0] == np.inf
    assert np.isfinite(squares[1])
    assert 0 <= squares[2] <= FLOAT32.smallest
    assert squares[3] == 0
    assert np.isnan(squares[4])
    assert half.tolist() == [np.inf, -np.inf]


def test_a_sum_whose_terms_leave_the_range_together_overflows_in_every_second_draw() -> None:
    wrap = wrapper(FLOAT32, np.random.default_rng(0), draws=4)
    terms = np.array([2e38, 2e38, -2e38, -1e38])
    for sums in (np.sum(wrap(terms)), wrap(terms[np.newaxis]) @ np.ones((4, 1))):
        assert np.isinf(np.asarray(sums)).ravel().tolist() == [False, True, False, True]
    assert np.isfinite(np.asarray(np.sum(wrap(terms / 4)))).all()


def test_a_sum_in_float64_keeps_its_error_where_squares_leave_the_range() -> None:
    x = 1e200 * np.abs(gaussian(100))
    assert 0 < np.abs(relative(np.sum(source(FLOAT64)(x)), np.sum(x))) < 1e-13
    square = 1e200 * np.abs(gaussian(10, 10))
    assert np.max(np.abs(relative(source(FLOAT64)(square) @ np.eye(10), square))) < 1e-13


def test_a_subnormal_result_keeps_an_absolute_error_and_its_sign() -> None:
    x = np.geomspace(FLOAT32.smallest / 64, FLOAT32.smallest * 1e4, 500)
    y = drawn(source()(x) * 0.7)
    assert np.all(y >= 0)
    assert np.all(np.abs(y - 0.7 * x) <= FLOAT32.smallest * 0.51 + 3 * U * x)
    assert np.max(np.abs(y - 0.7 * x)) > FLOAT32.smallest / 4
