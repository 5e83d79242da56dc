"""Decay: a factor whatever the gradient, or an addition to the update where that shrinks the parameter."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trysquare_conformance.budget import assert_same
from trysquare_reference.decay import cautious_decay, decoupled_decay

numbers = st.floats(-1e300, 1e300)


@pytest.mark.parametrize(
    ("lr", "weight_decay", "factor"), [(0.1, 0.0, 1.0), (0.0, 0.5, 1.0), (0.1, 0.5, 0.95), (2, 0.5, 0)]
)
def test_the_factor_is_one_minus_rate_times_decay(lr: float, weight_decay: float, factor: float) -> None:
    theta = np.array([[4.0, -1.0], [0.0, 1e-300]])
    assert_same(decoupled_decay(theta, lr, weight_decay), factor * theta)


TINY = 5e-324


@pytest.mark.parametrize(
    ("u", "theta", "decays"),
    [
        *((1.0, 2.0, True), (-1.0, -2.0, True), (1.0, -2.0, False), (-1.0, 2.0, False)),
        *((0.0, 2.0, True), (-0.0, 2.0, True), (0.0, -2.0, True), (1.0, 0.0, True), (1.0, -0.0, True)),
        *((TINY, -TINY, False), (1e-200, -1e-200, False), (1e-200, 1e-200, True), (1e200, 1e200, True)),
        *((1e200, -1e200, False), (-TINY, 1e300, False), (np.inf, 1.0, True), (-np.inf, 1.0, False)),
    ],
)
def test_the_mask_is_of_signs(u: float, theta: float, decays: bool) -> None:
    decayed = cautious_decay(np.array([u]), np.array([theta]), 0.5)
    assert decayed[0] == (u + 0.5 * theta if decays else u)


@given(u=numbers, theta=numbers, weight_decay=st.floats(0, 10))
def test_the_decay_never_turns_an_update_nor_lengthens_a_parameter(u: float, theta: float, weight_decay: float) -> None:
    added = cautious_decay(np.array([u]), np.array([theta]), weight_decay)[0] - u
    assert np.sign(added) in (0, np.sign(theta))
    assert added == 0 or np.sign(u) in (0, np.sign(theta))


@given(u=numbers, theta=numbers)
def test_misaligned_entries_are_as_without_decay(u: float, theta: float) -> None:
    if np.sign(u) * np.sign(theta) < 0:
        assert cautious_decay(np.array([u]), np.array([theta]), 3.0)[0] == u


def test_nan_stays_where_it_is() -> None:
    decayed = cautious_decay(np.array([np.nan, 1.0]), np.array([1.0, np.nan]), 0.5)
    assert np.isnan(decayed[0])
    assert decayed[1] == 1
