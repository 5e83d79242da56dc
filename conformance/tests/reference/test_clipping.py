"""Clipping: one scale for all gradients, never more than 1, never a silent zero."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trysquare_conformance.budget import assert_same
from trysquare_reference.clipping import clip_scale, global_norm


def gradients(seed: int, count: int, scale: float = 1.0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [scale * rng.standard_normal(tuple(rng.integers(1, 5, size=rng.integers(0, 4)))) for _ in range(count)]


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 5), max_norm=st.floats(1e-3, 1e3))
def test_clipped_gradients_are_no_longer_than_the_bound_and_short_ones_stay(
    seed: int, count: int, max_norm: float
) -> None:
    g = gradients(seed, count)
    n, s = global_norm(g), clip_scale(g, max_norm)
    assert_same(n, np.linalg.norm(np.concatenate([x.ravel() for x in g])))
    assert global_norm([s * x for x in g]) <= max_norm
    assert s == 1 if n + 1e-6 <= max_norm else s < 1


@given(seed=st.integers(0, 2**32 - 1))
def test_the_norm_does_not_depend_on_how_parameters_are_cut(seed: int) -> None:
    g = gradients(seed, 4)
    whole = [np.concatenate([x.ravel() for x in g])]
    assert_same(clip_scale(whole, 0.5), clip_scale(g, 0.5))
    assert_same(global_norm(g[::-1]), global_norm(g))


@pytest.mark.parametrize(
    ("value", "max_norm", "scale"),
    [
        (3.0, 1.0, 1 / (3 + 1e-6)),
        (0.5, 1.0, 1.0),
        (1.0, 1.0, 1 / (1 + 1e-6)),
        (0.0, 1.0, 1.0),
        (1e-7, 1e-7, 1e-7 / (1e-7 + 1e-6)),
        (1e100, 1.0, 1e-100),
        (3.0, None, 1.0),
        (3.0, 0.0, 1.0),
        (np.inf, None, 1.0),
    ],
)
def test_known_scales(value: float, max_norm: float | None, scale: float) -> None:
    assert_same(clip_scale([np.array([value]), np.zeros((0, 3))], max_norm), scale)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e200])
def test_a_norm_that_is_not_finite_gives_nan_and_no_silent_zero(value: float) -> None:
    with np.errstate(over="ignore"):
        assert np.isnan(clip_scale([np.ones(3), np.array([value])], 1.0))


def test_no_gradients_are_not_clipped() -> None:
    assert clip_scale([], 1.0) == 1
