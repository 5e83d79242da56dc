"""Polar Express: known coefficients, how near the composition comes to 1, and settings that a naive solver fails on."""

from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trysquare_conformance.budget import Array, assert_same
from trysquare_reference.polar_express import Coefficients, coefficients, quintic

SOLVED = 1 << 16  # a system of four equations, solved some times over
PUBLISHED = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
UNCUSHIONED = 0.02407327424182761


def composed(x: Array, iterations: tuple[Coefficients, ...]) -> Array:
    for a, b, c in iterations:
        x = a * x + b * x**3 + c * x**5
    return x


def farthest_from_one(iterations: tuple[Coefficients, ...], lower: float = 1e-3, divisor: float = 1.0) -> float:
    x = np.geomspace(lower, 1, 200_001) / divisor
    return float(np.max(np.abs(composed(x, iterations) - 1)))


def test_the_defaults_are_the_published_table() -> None:
    assert_same(coefficients(), PUBLISHED, operations=SOLVED)


def test_without_safety_the_first_and_the_eighth_are_known() -> None:
    eight = coefficients(8, safety_factor=0.0, cushion=UNCUSHIONED)
    assert_same(eight[0], (8.28721201814563, -23.595886519098837, 17.300387312530933), operations=SOLVED)
    off = np.abs(np.subtract(eight[7], (1.875, -1.25, 0.375)))  # by the powers of u = 1 + 1e-9, the interval's end
    assert np.all(off < (2e-9, 4e-9, 2e-9))


@pytest.mark.parametrize(("iters", "error", "digits"), [(5, 0.141127, 6), (6, 2.286e-3, 6), (8, 2e-14, 14)])
def test_the_composition_comes_so_near_to_one(iters: int, error: float, digits: int) -> None:
    assert round(farthest_from_one(coefficients(iters)), digits) == round(error, digits)


def test_with_the_safety_factor_divided_out_the_range_is_known() -> None:
    y = composed(np.geomspace(1e-3, 1, 200_001) / 1.02, coefficients())
    assert (round(float(np.min(y)), 5), round(float(np.max(y)), 5)) == (0.84665, 1.14113)


intervals = st.tuples(st.floats(1e-3, 0.9), st.floats(0.5, 2)).map(lambda pair: (pair[0] * pair[1], pair[1]))


@given(interval=intervals)
def test_the_error_of_a_quintic_is_the_same_at_four_points_and_nowhere_larger(interval: tuple[float, float]) -> None:
    lower, upper = interval
    a, b, c = quintic(lower, upper)
    root = np.sqrt(9 * b * b - 20 * a * c)
    inner = np.sqrt((-3 * b + np.array([-root, root])) / (10 * c))
    alternating = np.array([1, -1, 1, -1]) * (1 - composed(np.array([lower, *inner, upper]), ((a, b, c),)))
    assert_same(alternating, np.full(4, alternating[0]), scale=1 + abs(a * lower) + abs(b), operations=SOLVED)
    everywhere = np.abs(composed(np.linspace(lower, upper, 501), ((a, b, c),)) - 1)
    assert np.max(everywhere) <= abs(alternating[0]) + np.max(np.abs(alternating - alternating[0])) + 1e-12


@given(interval=intervals, power=st.integers(-8, 8))
def test_a_quintic_of_a_stretched_interval_is_the_stretched_quintic(interval: tuple[float, float], power: int) -> None:
    k = 2.0**power
    a, b, c = quintic(*interval)
    stretched = quintic(k * interval[0], k * interval[1])
    assert_same(stretched, (a / k, b / k**3, c / k**5), operations=1 << 22)  # where rounding stops the exchange differs


@pytest.mark.parametrize("distance", [1e-4, 1e-5, 6e-6, 5e-6, 1e-9, 0.0, -1e-9])
def test_near_a_point_the_quintic_goes_over_into_its_limit(distance: float) -> None:
    assert np.max(np.abs(np.subtract(quintic(1 - distance, 1.0), (1.875, -1.25, 0.375)))) <= 2 * abs(distance)


SETTINGS: dict[str, tuple[Any, ...]] = {
    "lower_bound": (1.0, 1 - 1e-6, 1 - 1e-5, 0.999, 0.5, 1e-3, 1e-7, 1e-12),
    "safety_factor": (0.0, 1e-9, 0.02, 1.0),
    "cushion": (0.0, 1e-6, 0.02, 0.5, 0.999),
}


@pytest.mark.parametrize("iters", [1, 2, 5, 8, 12, 20])
def test_every_setting_has_finite_coefficients(iters: int) -> None:
    for values in product(*SETTINGS.values()):
        solved = coefficients(iters, **dict(zip(SETTINGS, values, strict=True)))
        assert len(solved) == iters
        assert np.all(np.isfinite(solved)), values


@pytest.mark.parametrize("lower", [0.9, 0.1, 1e-2, 1e-3])
def test_without_safety_every_iteration_comes_nearer(lower: float) -> None:
    errors = [farthest_from_one(coefficients(T, lower, 0.0, 0.0), lower) for T in range(1, 9)]
    assert all(after <= max(before, 1e-12) for before, after in pairwise(errors))
    assert errors[-1] < 1e-11


def test_the_cushion_acts_only_while_the_interval_begins_below_it() -> None:
    assert coefficients(3, 0.5, 0.02, 0.0) == coefficients(3, 0.5, 0.02, 0.4)
    assert coefficients(1, 1e-3, 0.02, 0.0) != coefficients(1, 1e-3, 0.02, 0.4)


def test_a_safety_factor_spares_the_last_iteration() -> None:
    assert coefficients(1, 0.1, 0.5) == coefficients(1, 0.1, 0.0)
