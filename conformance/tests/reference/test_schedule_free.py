"""Schedule-free averaging: three sequences of which two determine the third, over many steps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trysquare_conformance.budget import Array, assert_same
from trysquare_reference.schedule_free import average, averaged, explicit_step, step, weigh

STEPS = 2000
seeds = st.integers(0, 2**32 - 1)
betas = pytest.mark.parametrize("beta1", [0.0, 0.1, 0.5, 0.9, 0.99])


def rates(kind: str, seed: int = 0) -> Array:
    t = np.arange(STEPS)
    return {
        "constant": np.full(STEPS, 0.25),
        "warm-up": 0.1 * np.minimum(1, (t + 1) / 100),
        "silent start": np.where(t < 7, 0.0, 0.1),
        "cosine": 0.05 * (1 + np.cos(np.pi * t / STEPS)),
        "random": np.random.default_rng(seed).uniform(0, 1, STEPS),
    }[kind]


KINDS = ("constant", "warm-up", "silent start", "cosine", "random")


@betas
@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_to_write_a_step_agree_over_two_thousand(beta1: float, kind: str) -> None:
    rng, theta = np.random.default_rng(1), np.array([1.0, -2.0, 0.0])
    x, y, z, u_y, u_z, lr_max, total = theta, theta, theta, theta, theta, 0.0, 0.0
    for lr in rates(kind):
        u = rng.standard_normal(3) + y
        lr_max, total, c = weigh(lr, lr_max, total)
        x, y, z = explicit_step(x, z, u, lr, c, beta1)
        u_y, u_z = step(u_y, u_z, u, lr, c, beta1)
    assert np.array_equal(u_z, z)
    assert_same(u_y, y, scale=4.0, operations=16 * STEPS)
    if beta1 > 0:
        assert_same(averaged(u_y, u_z, beta1), x, scale=4.0 / beta1, operations=16 * STEPS)


@betas
def test_under_a_constant_rate_x_is_the_mean_of_z(beta1: float) -> None:
    rng, theta = np.random.default_rng(2), np.array([1.0, -1.0])
    x, z, lr_max, total, visited = theta, theta, 0.0, 0.0, []
    for t in range(1, STEPS + 1):
        lr_max, total, c = weigh(0.25, lr_max, total)
        assert_same(c, 1 / t, operations=STEPS)
        x, _, z = explicit_step(x, z, rng.standard_normal(2), 0.25, c, beta1)
        visited.append(z)
    assert_same(x, np.mean(visited, axis=0), scale=np.max(np.abs(visited)), operations=STEPS)


@given(seed=seeds, steps=st.integers(1, 30))
@settings(max_examples=30)
def test_x_is_the_mean_of_z_weighted_by_the_largest_rate_so_far(seed: int, steps: int) -> None:
    rng, x, z, lr_max, total = np.random.default_rng(seed), np.zeros(2), np.zeros(2), 0.0, 0.0
    visited, weights = [], []
    for lr in rates("random", seed)[:steps]:
        lr_max, total, c = weigh(lr, lr_max, total)
        x, _, z = explicit_step(x, z, rng.standard_normal(2), lr, c, 0.9)
        visited.append(z)
        weights.append(lr_max**2)
    expected = sum(w * z for w, z in zip(weights, visited, strict=True)) / sum(weights)
    assert_same(x, expected, scale=np.max(np.abs(visited)) + 1, operations=1024)


def test_the_rate_that_counts_is_the_largest_so_far() -> None:
    assert weigh(0.5, 2.0, 4.0) == (2.0, 8.0, 0.5)
    assert weigh(2.0, 0.5, 4.0) == (2.0, 8.0, 0.5)


def test_rates_of_zero_before_the_first_step_weigh_nothing() -> None:
    assert weigh(0.0, 0.0, 0.0) == (0.0, 0.0, 0.0)
    theta = np.ones(2)
    for moved in (*explicit_step(theta, theta, np.ones(2), 0.0, 0.0, 0.9), *step(theta, theta, theta, 0.0, 0.0, 0.9)):
        assert_same(moved, theta)


def test_between_polyak_and_primal_averaging() -> None:
    theta, z, u = np.array([1.0]), np.array([3.0]), np.array([2.0])
    x_new, y_new, z_new = explicit_step(theta, z, u, 0.5, 0.25, beta1=0.0)
    assert np.array_equal(y_new, z_new)
    x_new, y_new, z_new = explicit_step(theta, z, u, 0.5, 0.25, beta1=1.0)
    assert np.array_equal(y_new, x_new)
    assert np.array_equal(x_new, average(theta, z_new, 0.25))


def test_a_zero_update_still_draws_y_to_z() -> None:
    y, z = step(np.array([1.0]), np.array([3.0]), np.array([0.0]), 0.5, 0.25, 0.9)
    assert (y, z) == (1.5, 3.0)


def test_stepping_z_first_moves_y_too_far() -> None:
    """The published order: from x = y = z it steps z, then y with the new z."""
    theta, u, lr, c, beta1 = np.array([1.0]), np.array([1.0]), 0.5, 1.0, 0.9
    z = theta - lr * u
    wrong = theta + c * (z - theta) + lr * (beta1 * (1 - c) - 1) * u
    right, _ = step(theta, theta, u, lr, c, beta1)
    assert_same(wrong - theta, 2 * (right - theta))
