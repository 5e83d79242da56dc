"""Rectification: known values, when it begins, and that it ends at 1."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trysquare_conformance.budget import assert_same
from trysquare_reference.rectification import rectification

NEVER = 10**6


def first_active(beta2: float) -> int:
    return next((t for t in range(1, 2000) if rectification(t, beta2) > 0), NEVER)


@pytest.mark.parametrize(
    ("beta2", "fifth"), [(0.95, 0.1181397), (0.99, 0.0544710), (0.999, 0.0173115), (0.75, 0.0), (0.6, 0.0)]
)
def test_the_fifth_step_is_known(beta2: float, fifth: float) -> None:
    assert round(rectification(5, beta2), 7) == fifth


@pytest.mark.parametrize(
    ("beta2", "first"),
    [(0.999, 5), (0.95, 5), (0.7734, 5), (0.7733, 6), (0.75, 6), (0.65, 8), (0.6, NEVER), (0.3, NEVER), (1e-9, NEVER)],
)
def test_the_first_active_step_is_known(beta2: float, first: int) -> None:
    assert first_active(beta2) == first


@given(beta2=st.floats(1e-6, 0.999999))
def test_the_first_step_is_always_silent(beta2: float) -> None:
    assert rectification(1, beta2) == 0


@given(step=st.integers(1, NEVER))
def test_without_second_moment_there_is_nothing_to_rectify(step: int) -> None:
    assert rectification(step, 0.0) == 1


@given(beta2=st.floats(0.61, 0.9999))
def test_it_rises_and_tends_to_one(beta2: float) -> None:
    values = [rectification(t, beta2) for t in range(1, 200)]
    assert np.all(np.diff(values) >= 0)
    assert_same(rectification(NEVER, beta2), 1.0)
    assert all(value <= 1 for value in values)


def test_the_radam_of_the_paper_written_down_again() -> None:
    beta2 = 0.98
    rho_inf = 2 / (1 - beta2) - 1
    for t in range(5, 50):
        rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
        square = (rho - 4) * (rho - 2) * rho_inf / (rho_inf - 4) / (rho_inf - 2) / rho
        assert_same(rectification(t, beta2), np.sqrt(square))
