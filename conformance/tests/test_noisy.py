"""Noisy arrays: each draw is what the array alone would be, with errors of its own, and these cannot get lost."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from trysquare_conformance.noise import BFLOAT16, FLOAT32
from trysquare_conformance.noisy import Noisy, computed_in, exactly, wrapper

U = FLOAT32.elementwise
DRAWS = 3  # as many as the arrays below have rows, so that a draw taken for a row would fit, and show


def source(seed: int = 0, draws: int = DRAWS) -> Callable[[Any], Any]:
    return wrapper(FLOAT32, np.random.default_rng(seed), draws)


def gaussian(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape)


MATRIX, ROW, CUBE, SCALAR = gaussian(3, 3), gaussian(3, seed=1), gaussian(3, 3, 3, seed=2), np.array(0.7)

MOVES: dict[str, Callable[..., Any]] = {
    "scalar, matrix": lambda wrap: wrap(SCALAR) * wrap(MATRIX),
    "row, matrix": lambda wrap: wrap(MATRIX) + wrap(ROW),
    "matrix, cube": lambda wrap: wrap(MATRIX) - wrap(CUBE),
    "plain matrix, row": lambda wrap: MATRIX / wrap(ROW),
    "matrix, plain row": lambda wrap: wrap(MATRIX) * ROW,
    "row, plain cube": lambda wrap: wrap(ROW) * CUBE,
    "constant": lambda wrap: 1.1 * wrap(MATRIX) + 0.3,
    "product": lambda wrap: wrap(MATRIX) @ wrap(MATRIX).T,
    "product of a plain matrix": lambda wrap: MATRIX @ wrap(MATRIX),
    "products of matrices and a cube": lambda wrap: wrap(MATRIX) @ wrap(CUBE).mT,
    "choice": lambda wrap: np.where(wrap(ROW) > 0, wrap(MATRIX), wrap(SCALAR)),
    "choice by a plain mask": lambda wrap: np.where(CUBE > 0, wrap(MATRIX), 1.0),
    "masks together": lambda wrap: np.where((wrap(MATRIX) > 0) | ~(wrap(ROW) < 0), wrap(MATRIX), 0.0),
    "sum": lambda wrap: np.sum(wrap(CUBE)),
    "sum of an axis": lambda wrap: np.sum(wrap(CUBE), axis=0),
    "sum from the end": lambda wrap: np.sum(wrap(CUBE), axis=-1, keepdims=True),
    "sum of axes": lambda wrap: np.sum(wrap(CUBE), axis=(0, 2)),
    "largest": lambda wrap: np.max(wrap(CUBE), axis=1),
    "mean": lambda wrap: np.mean(wrap(MATRIX), axis=0, keepdims=True),
    "entry": lambda wrap: wrap(MATRIX)[1, 2],
    "row of it": lambda wrap: wrap(MATRIX)[-1],
    "rows of it": lambda wrap: wrap(MATRIX)[1:],
    "with an axis more": lambda wrap: wrap(ROW)[:, np.newaxis],
    "last of it": lambda wrap: wrap(CUBE)[..., 0],
    "chosen rows": lambda wrap: wrap(MATRIX)[np.array([2, 0])],
    "reshaped": lambda wrap: wrap(CUBE).reshape(-1, 9),
    "flattened": lambda wrap: wrap(CUBE).reshape((-1,)),
    "transposed": lambda wrap: wrap(CUBE).T,
    "joined": lambda wrap: np.concatenate([wrap(MATRIX), MATRIX, wrap(MATRIX)], axis=1),
    "stacked": lambda wrap: np.stack([wrap(MATRIX), MATRIX]),
    "spread": lambda wrap: np.broadcast_to(wrap(ROW), (3, 3)),
    "wider": lambda wrap: np.expand_dims(wrap(MATRIX), 1),
    "like it": lambda wrap: np.zeros_like(wrap(MATRIX), shape=(3, 1)) + wrap(ROW),
    "a number like it": lambda wrap: np.full_like(wrap(MATRIX), 0.7, shape=()) * wrap(MATRIX),
    "looked up": lambda wrap: np.searchsorted(np.array([-1.0, 0.0, 1.0]), wrap(MATRIX)),
    "copied": lambda wrap: wrap(MATRIX).copy(),
    "added up by Python": lambda wrap: sum(wrap(MATRIX)),
}


@pytest.mark.parametrize("move", MOVES)
def test_every_draw_is_computed_as_an_array_alone(move: str) -> None:
    exact, noisy = MOVES[move](np.asarray), MOVES[move](source())
    values = np.asarray(noisy)
    assert isinstance(noisy, Noisy)
    assert (noisy.shape, noisy.ndim, noisy.size) == (exact.shape, exact.ndim, exact.size)
    assert values.shape == (DRAWS, *exact.shape)
    for draw in values:
        assert np.max(np.abs(draw - exact)) <= 100 * U * max(1, np.max(np.abs(exact)))


def test_draws_have_errors_of_their_own_and_a_source_the_same_again() -> None:
    first, again, other = (np.asarray(source(seed)(np.ones(50)) / 3) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    for one, two in ((first[0], first[1]), (first[0], first[2]), (first[0], other[0])):
        assert not np.any(one == two)
    constants = np.asarray(source()(np.zeros(2)) + 0.9)
    assert np.array_equal(constants[:, 0], constants[:, 1])
    assert len(set(constants[:, 0])) == DRAWS


def test_wrapping_starts_without_noise_and_never_twice() -> None:
    wrap = source()
    x = wrap(MATRIX)
    assert np.array_equal(np.asarray(x), np.stack([MATRIX] * DRAWS))
    assert wrap(x) is x


def test_comparisons_are_exact_in_every_draw_and_scalars_stay_arrays() -> None:
    x = source()(gaussian(4))
    for mask in (x > 0, np.isfinite(x)):
        assert isinstance(mask, Noisy)
        assert mask.dtype == bool
    for scalar in (np.sum(x), x[0], x.max(), np.sqrt(np.sum(x * x)), *x):
        assert isinstance(scalar, Noisy)
        assert scalar.shape == ()


def test_a_truth_is_what_all_draws_agree_on() -> None:
    x = source()(np.ones(2)) / 3
    assert bool(x[0] < 1)
    assert not np.all(x > 1)
    with pytest.raises(TypeError, match="all draws agree"):
        bool(x[0] > np.asarray(np.median(np.asarray(x)[:, 0])))


def test_in_place_operations_are_perturbed_too() -> None:
    x = source()(np.ones(100))
    view = x[:]
    x *= 1.1
    assert isinstance(x, Noisy)
    assert np.array_equal(np.asarray(view), np.asarray(x))
    assert np.any(np.asarray(x) != 1.1)


def test_a_part_can_be_computed_in_another_arithmetic_with_the_constants_of_the_whole() -> None:
    x, seen = source()(gaussian(50)), []

    def part(inner: Any) -> Any:
        seen.append(inner.source.arithmetic)
        return inner * 1.1

    y = computed_in(BFLOAT16, part, x)
    assert seen == [BFLOAT16]
    assert isinstance(y, Noisy)
    assert y.source is x.source
    error = np.abs(np.asarray(y) / (np.asarray(x) * 1.1) - 1)
    assert U * 100 < np.max(error) <= 2.1 * BFLOAT16.elementwise
    constants = np.asarray(computed_in(BFLOAT16, lambda inner: inner + 1.1, source()(np.zeros(1))))
    assert np.all(np.abs(constants - 1.1) <= 2 * U)


def test_what_is_not_noisy_is_computed_as_it_is() -> None:
    assert computed_in(BFLOAT16, lambda x: x * 1.1, np.ones(1)) == 1.1
    assert type(exactly(np.rint, np.array([0.4]))) is np.ndarray


def test_a_function_of_the_values_adds_no_error() -> None:
    x = source()(gaussian(9)) / 3
    y = exactly(lambda values: values * 1.1, x)
    assert isinstance(y, Noisy)
    assert np.array_equal(np.asarray(y), np.asarray(x) * 1.1)


LEAKS: dict[str, Callable[[Any], Any]] = {
    "dot": lambda x: np.dot(x, x),
    "dot method": lambda x: x.dot(x),
    "vdot": lambda x: np.vdot(x, x),
    "einsum": lambda x: np.einsum("i,i", x, x),
    "norm": np.linalg.norm,
    "product": np.prod,
    "product with a vector": lambda x: np.eye(3) @ x,
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
    "entries one by one": lambda x: x.flat,
    "a method that knows no draws": lambda x: x.swapaxes(0, 0),
    "a function that knows no draws": lambda x: np.flip(x, 0),
    "rows that differ by draw": lambda x: x[x > 1],
    "an entry set": lambda x: x.__setitem__(0, 1.0),
    "a step of its own in each draw": lambda x: np.searchsorted(x, ROW),
    "into a plain array": lambda x: np.add(x, x, out=np.zeros((DRAWS, 3))),
    "another source": lambda x: x + source()(np.ones(3)),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_what_would_lose_the_noise_raises(leak: str) -> None:
    with pytest.raises(TypeError):
        LEAKS[leak](source()(np.ones(3)))


def test_axes_are_those_of_a_draw() -> None:
    x = source()(ROW)
    with pytest.raises(IndexError, match="axis 1"):
        np.sum(x, axis=1)
    with pytest.raises(ValueError, match="two dimensions"):
        _ = x.mT
