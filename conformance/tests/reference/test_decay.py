"""Decoupled decay: a factor, whatever the gradient."""

import numpy as np
import pytest

from trysquare_conformance.budget import assert_same
from trysquare_reference.decay import decoupled_decay


@pytest.mark.parametrize(
    ("lr", "weight_decay", "factor"), [(0.1, 0.0, 1.0), (0.0, 0.5, 1.0), (0.1, 0.5, 0.95), (2, 0.5, 0)]
)
def test_the_factor_is_one_minus_rate_times_decay(lr: float, weight_decay: float, factor: float) -> None:
    theta = np.array([[4.0, -1.0], [0.0, 1e-300]])
    assert_same(decoupled_decay(theta, lr, weight_decay), factor * theta)
