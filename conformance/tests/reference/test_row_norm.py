"""Row normalisation: after the first step all rows are equally long, and the length of the whole never changes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trysquare_conformance.budget import Array, assert_same
from trysquare_reference.polar import polar_factor
from trysquare_reference.polar_express import coefficients
from trysquare_reference.row_norm import normalize_rows

sides, seeds = st.integers(1, 8), st.integers(0, 2**32 - 1)
probabilities = st.floats(1e-3, 0.999)


def matrix(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def lengths(x: Array) -> Array:
    return np.sqrt(np.sum(np.square(x), axis=-1))


@given(rows=sides, columns=sides, seed=seeds, beta2=probabilities)
def test_after_the_first_step_all_rows_are_equally_long(rows: int, columns: int, seed: int, beta2: float) -> None:
    x = matrix(seed, rows, columns) + 1
    y, v = normalize_rows(x, np.zeros((rows, 1)), beta2, eps=1e-30)
    assert_same(lengths(y), np.full(rows, np.sqrt(np.sum(x * x) / rows)))
    assert_same(v[:, 0], (1 - beta2) * lengths(x) ** 2 / columns)


@given(rows=sides, columns=sides, seed=seeds, beta2=probabilities, steps=st.integers(1, 5))
def test_the_length_of_the_whole_is_kept_and_v_is_a_weighted_mean(
    rows: int, columns: int, seed: int, beta2: float, steps: int
) -> None:
    updates, v = [matrix(seed + t, rows, columns) for t in range(steps)], np.zeros((rows, 1))
    for x in updates:
        y, v = normalize_rows(x, v, beta2, eps=1e-8)
        assert_same(np.sum(y * y), np.sum(x * x))
    weights = (1 - beta2) * beta2 ** np.arange(steps)[::-1]
    assert_same(v[:, 0], sum(w * np.mean(x * x, axis=1) for w, x in zip(weights, updates, strict=True)))


def test_directions_of_rows_stay() -> None:
    x = matrix(0, 4, 6)
    y, _ = normalize_rows(x, np.abs(matrix(1, 4, 1)), 0.9, 1e-8)
    assert_same(y / lengths(y)[:, np.newaxis], x / lengths(x)[:, np.newaxis])


@given(rows=sides, extra=st.integers(0, 5), seed=seeds)
def test_the_rows_of_a_wide_polar_factor_are_equally_long_already(rows: int, extra: int, seed: int) -> None:
    left, _, right = np.linalg.svd(matrix(seed, rows, rows + extra), full_matrices=False)
    y, _ = normalize_rows(left @ right, np.zeros((rows, 1)), 0.95, 1e-8)
    assert_same(y, left @ right, scale=1.0, operations=1 << 10)


def test_the_rows_of_a_tall_one_are_not() -> None:
    x = polar_factor(matrix(0, 9, 3), coefficients(8), 0.02, 1e-8)
    y, _ = normalize_rows(x, np.zeros((9, 1)), 0.95, 1e-8)
    assert np.max(np.abs(y - x)) > 0.1


def test_a_zero_row_stays_and_its_neighbours_are_even() -> None:
    x = matrix(0, 3, 4) * np.array([[1.0], [0.0], [5.0]])
    y, v = normalize_rows(x, np.zeros((3, 1)), 0.95, 1e-8)
    assert v[1, 0] == 0
    assert np.all(y[1] == 0)
    assert_same(lengths(y)[0], lengths(y)[2])


@pytest.mark.parametrize("size", [0.0, -0.0])
def test_a_zero_update_stays_zero(size: float) -> None:
    y, v = normalize_rows(np.full((2, 3), size), np.zeros((2, 1)), 0.95, 1e-8)
    assert np.all(y == 0)
    assert np.all(v == 0)


def test_eps_stands_inside_of_the_root_and_bounds_v_from_below() -> None:
    x = np.array([[1e-3, 0.0], [2.0, 0.0]])
    y, _ = normalize_rows(x, np.zeros((2, 1)), 0.5, eps=1e-2)  # the first row's mean square is 2.5e-7
    assert_same(lengths(y)[0] / lengths(y)[1], 1e-3 / np.sqrt(1e-2) / (2 / np.sqrt(0.5 * 2)))


def test_a_batch_is_its_slices() -> None:
    x, v = matrix(0, 2, 3, 4, 5), np.abs(matrix(1, 2, 3, 4, 1))
    together = normalize_rows(x, v, 0.9, 1e-8)
    for index in np.ndindex(2, 3):
        for whole, alone in zip(together, normalize_rows(x[index], v[index], 0.9, 1e-8), strict=True):
            assert np.array_equal(whole[index], alone)
