"""Newton–Schulz and the polar factor: a polynomial of the singular values that leaves everything else alone."""

from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trysquare_conformance.budget import Array, assert_same
from trysquare_reference.polar import MUON_COEFFICIENTS, newton_schulz, polar_factor
from trysquare_reference.polar_express import coefficients

sides, seeds, steps = st.integers(1, 8), st.integers(0, 2**32 - 1), st.integers(1, 5)
ROUNDINGS = 4096  # five iterations of products, whose intermediate terms are up to ten times their sum


def matrix(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def rotation(seed: int, n: int) -> Array:
    return np.linalg.qr(matrix(seed, n, n))[0]


def length(u: Array) -> float:
    return float(np.linalg.norm(u))


def by_singular_values(u: Array, iterations: int) -> Array:
    """Written down from the definition: every σ/n goes through the polynomial, the singular vectors stay."""
    a, b, c = MUON_COEFFICIENTS
    left, sigma, right = np.linalg.svd(u, full_matrices=False)
    n = np.sqrt(np.sum(sigma**2))
    x = sigma / n
    for _ in range(iterations):
        x = a * x + b * x**3 + c * x**5
    return np.asarray(n * (left * x) @ right)


@given(rows=sides, columns=sides, seed=seeds, iterations=steps)
def test_singular_values_go_through_the_polynomial(rows: int, columns: int, seed: int, iterations: int) -> None:
    u = matrix(seed, rows, columns)
    expected = by_singular_values(u, iterations)
    assert_same(newton_schulz(u, iterations, 1e-8), expected, scale=length(u), operations=ROUNDINGS)


@given(rows=sides, columns=sides, seed=seeds, iterations=steps)
def test_the_transposed_matrix_gives_the_transposed_result(rows: int, columns: int, seed: int, iterations: int) -> None:
    u = matrix(seed, rows, columns)
    both = newton_schulz(u, iterations, 1e-8), newton_schulz(u.T, iterations, 1e-8).T
    assert_same(*both, scale=length(u), operations=ROUNDINGS)


@given(rows=sides, columns=sides, seed=seeds)
def test_rotations_of_either_side_commute_with_it(rows: int, columns: int, seed: int) -> None:
    u, q, p = matrix(seed, rows, columns), rotation(seed + 1, rows), rotation(seed + 2, columns)
    expected = q @ newton_schulz(u, 2, 1e-8) @ p
    assert_same(newton_schulz(q @ u @ p, 2, 1e-8), expected, scale=length(u), operations=ROUNDINGS)


@given(seed=seeds, power=st.integers(-20, 20))
def test_the_length_passes_through(seed: int, power: int) -> None:
    u = matrix(seed, 5, 3)
    assert_same(newton_schulz(u * 2.0**power, 2, 1e-8), newton_schulz(u, 2, 1e-8) * 2.0**power)


def test_more_dimensions_are_rows_and_rest() -> None:
    u = matrix(0, 4, 3, 2, 2)
    assert np.array_equal(newton_schulz(u, 2, 1e-8), newton_schulz(u.reshape(4, 12), 2, 1e-8).reshape(u.shape))


def test_the_side_of_the_gram_matrix_does_not_show() -> None:
    a, b, c = MUON_COEFFICIENTS
    u = matrix(1, 7, 3)
    x = u / np.linalg.norm(u)
    for _ in range(2):
        gram = x @ x.T  # 7 × 7, which the page avoids
        x = a * x + b * gram @ x + c * gram @ gram @ x
    assert_same(newton_schulz(u, 2, 1e-8), x * np.linalg.norm(u), scale=length(u), operations=ROUNDINGS)


def test_five_iterations_bring_the_singular_values_near_one() -> None:
    sigma = np.linalg.svd(newton_schulz(matrix(2, 40, 20), 5, 1e-8) / np.linalg.norm(matrix(2, 40, 20)))[1]
    assert np.all((sigma > 0.6) & (sigma < 1.3))


@pytest.mark.parametrize(("size", "changed"), [(0.0, False), (0.99e-8, False), (1.01e-8, True)])
def test_an_update_shorter_than_eps_stays_as_it_is(size: float, changed: bool) -> None:
    u = np.array([[size, 0.0], [0.0, 0.0]])
    assert (newton_schulz(u, 2, 1e-8)[0, 0] != size) == changed


def test_nan_spreads_over_the_matrix() -> None:
    assert np.all(np.isnan(newton_schulz(np.array([[np.nan, 1.0], [1.0, 1.0]]), 2, 1e-8)))


FORMS: tuple[Literal["standard", "gram"], ...] = ("standard", "gram")
forms = pytest.mark.parametrize("form", FORMS)
EXPRESS = coefficients(8)


def exact(u: Array) -> Array:
    left, _, right = np.linalg.svd(u, full_matrices=False)
    return np.asarray(left @ right)


def short_of_exact(rows: int, columns: int) -> float:
    """Eight iterations bring singular values above 1e-3 of the norm to 1 within 2e-14, but for rounding."""
    return ROUNDINGS * 16 * max(rows, columns)


@forms
@given(rows=sides, columns=sides, seed=seeds)
def test_of_a_well_conditioned_matrix_it_is_the_factor_of_the_svd(
    form: Literal["standard", "gram"], rows: int, columns: int, seed: int
) -> None:
    left, _, right = np.linalg.svd(matrix(seed, rows, columns), full_matrices=False)
    sigma = np.linspace(0.1, 2, min(rows, columns))
    factor = polar_factor((left * sigma) @ right, EXPRESS, 0.02, 1e-8, form, restarts=(2, 4))
    assert_same(factor, left @ right, scale=1.0, operations=int(short_of_exact(rows, columns)))


@given(rows=sides, columns=sides, seed=seeds, restarts=st.sets(st.integers(0, 6)))
def test_the_gram_form_is_the_standard_form_for_every_restart_set(
    rows: int, columns: int, seed: int, restarts: set[int]
) -> None:
    u = matrix(seed, rows, columns)
    both = [polar_factor(u, coefficients(), 0.02, 1e-8, form, restarts) for form in FORMS]
    assert_same(*both, scale=1.0, operations=1 << 28)  # without a restart 8e-9 times what a restart leaves


@forms
@given(seed=seeds, power=st.integers(-20, 20))
def test_the_polar_factor_of_a_multiple_is_the_same(form: Literal["standard", "gram"], seed: int, power: int) -> None:
    u = matrix(seed, 5, 3)
    assert_same(*(polar_factor(k * u, EXPRESS, 0.02, 1e-8, form) for k in (1.0, 2.0**power)), scale=1.0)


@forms
def test_above_the_largest_square_of_the_format_it_is_the_same_too(form: Literal["standard", "gram"]) -> None:
    u = matrix(0, 4, 6)
    large, plain = (polar_factor(k * u, EXPRESS, 0.02, 1e-8, form) for k in (2.0**500, 1.0))
    assert_same(large, plain, scale=1.0)


@forms
@given(rows=sides, columns=sides, seed=seeds)
def test_rotations_of_either_side_commute_with_the_polar_factor(
    form: Literal["standard", "gram"], rows: int, columns: int, seed: int
) -> None:
    u, q, p = matrix(seed, rows, columns), rotation(seed + 1, rows), rotation(seed + 2, columns)
    expected = q @ polar_factor(u, coefficients(), 0.02, 1e-8, form) @ p
    assert_same(polar_factor(q @ u @ p, coefficients(), 0.02, 1e-8, form), expected, scale=1.0, operations=1 << 20)


@forms
def test_a_batch_is_its_slices_and_a_transposed_matrix_gives_the_transposed_factor(
    form: Literal["standard", "gram"],
) -> None:
    u = matrix(0, 2, 3, 7, 4)
    together = polar_factor(u, coefficients(), 0.02, 1e-8, form)
    for index in np.ndindex(2, 3):
        alone = polar_factor(u[index], coefficients(), 0.02, 1e-8, form)
        assert_same(together[index], alone, scale=1.0, operations=ROUNDINGS)
        turned = polar_factor(u[index].T, coefficients(), 0.02, 1e-8, form)
        assert_same(turned.T, alone, scale=1.0, operations=ROUNDINGS)


@forms
def test_zero_stays_zero_and_small_updates_are_divided_by_eps(form: Literal["standard", "gram"]) -> None:
    assert np.array_equal(polar_factor(np.zeros((3, 2)), EXPRESS, 0.02, 1e-8, form), np.zeros((3, 2)))
    linear = ((1.0, 0.0, 0.0),)
    assert_same(polar_factor(np.full((1, 1), 2e-9), linear, 1.0, 1e-8, form), [[0.1]])


@forms
def test_a_singular_value_of_zero_stays_zero(form: Literal["standard", "gram"]) -> None:
    u = matrix(1, 6, 1) @ matrix(2, 1, 9)
    expected = u / length(u)
    assert_same(polar_factor(u, EXPRESS, 0.02, 1e-8, form, (2, 4)), expected, scale=1.0, operations=1 << 28)


def test_the_coefficients_are_taken_in_order() -> None:
    x, (a, b, c) = 0.6, coefficients()[0]
    first = a * x + b * x**3 + c * x**5
    a, b, c = coefficients()[1]
    u = np.diag([0.6, 0.8])
    factor = polar_factor(u, coefficients()[:2], 0.0, 1e-8)
    assert_same(factor[0, 0], a * first + b * first**3 + c * first**5, scale=1.0, operations=ROUNDINGS)
