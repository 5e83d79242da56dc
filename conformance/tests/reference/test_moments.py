"""Moments: momentum and second moment from their sums, and known values of the adapted update."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trysquare_conformance.budget import assert_same
from trysquare_reference.moments import adapt, nesterov, second_moment

probabilities = st.floats(0, 0.999)


def sequence(seed: int, steps: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((steps, 3))


@given(seed=st.integers(0, 2**32 - 1), momentum=probabilities, steps=st.integers(1, 20))
def test_momentum_is_a_sum_of_decaying_gradients(seed: int, momentum: float, steps: int) -> None:
    gradients, m, u = sequence(seed, steps), np.zeros(3), np.zeros(3)
    for g in gradients:
        m, u = nesterov(m, g, momentum)
    decay = momentum ** np.arange(steps)[::-1]
    total = np.sum(decay[:, np.newaxis] * gradients, axis=0)
    scale = np.sum(np.abs(gradients))
    assert_same(m, total, scale=scale)
    assert_same(u, gradients[-1] + momentum * total, scale=scale)


@given(seed=st.integers(0, 2**32 - 1), beta2=probabilities, steps=st.integers(1, 20))
def test_the_second_moment_is_a_weighted_mean_whose_weights_the_correction_completes(
    seed: int, beta2: float, steps: int
) -> None:
    gradients, v = sequence(seed, steps), np.zeros(3)
    for g in gradients:
        v = second_moment(v, g, beta2)
    weights = beta2 ** np.arange(steps)[::-1]
    mean = np.sum(weights[:, np.newaxis] * gradients**2, axis=0) / np.sum(weights)
    corrected = adapt(np.ones(3), v, steps, beta2, eps=1e-300, bias_correction=True)
    assert_same(corrected, 1 / np.sqrt(mean), operations=1 << 14)  # 1 − β₂ᵗ cancels for β₂ near 1


@pytest.mark.parametrize(("bias_correction", "first"), [(True, 1.9), (False, 19.0)])
def test_the_first_update_and_the_steady_one_of_a_constant_gradient(bias_correction: bool, first: float) -> None:
    g, m, v, updates = np.array([4.0, -0.25]), np.zeros(2), np.zeros(2), []
    for t in range(1, 4001):
        m, u = nesterov(m, g, 0.9)
        v = second_moment(v, g, 0.99)
        updates.append(adapt(u, v, t, 0.99, 1e-300, bias_correction))
    assert_same(updates[0], first * np.sign(g))
    assert_same(updates[-1], 10 * np.sign(g), operations=1 << 14)


def test_eps_stands_outside_of_the_root_and_is_not_corrected() -> None:
    assert_same(adapt(np.array([1.0]), np.array([0.04]), 1, 0.96, eps=0.5, bias_correction=True), [1 / (1 + 0.5)])
    assert_same(adapt(np.array([1.0]), np.array([0.04]), 1, 0.96, eps=0.5, bias_correction=False), [1 / (0.2 + 0.5)])


def test_an_entry_that_never_had_a_gradient_does_not_move() -> None:
    assert adapt(np.zeros(1), np.zeros(1), 1, 0.99, 1e-8, bias_correction=True) == 0


def test_without_memory_the_update_is_the_gradient_over_its_size() -> None:
    g = np.array([3.0, -5.0])
    m, u = nesterov(np.ones(2), g, momentum=0.0)
    assert np.array_equal(m, g)
    assert np.array_equal(u, g)
    assert_same(adapt(u, second_moment(np.ones(2), g, 0.0), 7, 0.0, 1e-300, bias_correction=True), np.sign(g))
