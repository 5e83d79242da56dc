"""Projection of rows: orthogonal, idempotent, the same for every row, and off outside its domain."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trysquare_conformance.budget import Array, assert_same
from trysquare_reference.projection import project_rows, project_update_rows

PROJECTIONS: dict[str, Callable[[Array, Array], Array]] = {
    "gradient": project_rows,
    "update": lambda u, w: project_update_rows(u, w, eps=1e-30),
}
projections = pytest.mark.parametrize("project", PROJECTIONS.values(), ids=PROJECTIONS.keys())
shapes = st.lists(st.integers(1, 7), min_size=2, max_size=5).map(tuple)
seeds = st.integers(0, 2**32 - 1)
sizes = st.sampled_from([1e-9, 1e-3, 1.0, 1e3])


def pair(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape) * scale, rng.standard_normal(shape) / scale


def row_norms(x: Array) -> Array:
    return np.asarray(np.sqrt(np.sum(np.square(x.reshape(len(x), -1)), axis=1)))


@projections
@given(shape=shapes, seed=seeds, scale=sizes)
def test_what_is_left_is_orthogonal_to_the_weights(
    project: Callable[[Array, Array], Array], shape: tuple[int, ...], seed: int, scale: float
) -> None:
    g, w = pair(shape, seed, scale)
    along = np.sum((project(g, w) * w).reshape(len(w), -1), axis=1)
    assert_same(along, np.zeros(len(w)), scale=row_norms(g) * row_norms(w))


@projections
@given(shape=shapes, seed=seeds)
def test_projecting_twice_is_projecting_once(
    project: Callable[[Array, Array], Array], shape: tuple[int, ...], seed: int
) -> None:
    g, w = pair(shape, seed)
    assert_same(project(project(g, w), w), project(g, w), scale=np.max(row_norms(g)))


@projections
@given(shape=shapes, seed=seeds)
def test_the_projection_never_lengthens_and_keeps_what_is_orthogonal(
    project: Callable[[Array, Array], Array], shape: tuple[int, ...], seed: int
) -> None:
    g, w = pair(shape, seed)
    left = project(g, w)
    assert_same(row_norms(left) ** 2 + row_norms(g - left) ** 2, row_norms(g) ** 2, operations=256)
    assert_same(project(g + 3 * w, w), left, scale=np.max(row_norms(g) + 3 * row_norms(w)))


@projections
@given(shape=shapes, seed=seeds)
def test_rows_are_projected_each_by_itself(
    project: Callable[[Array, Array], Array], shape: tuple[int, ...], seed: int
) -> None:
    g, w = pair(shape, seed)
    order = np.random.default_rng(seed).permutation(len(g))
    whole = project(g, w)
    assert_same(project(g[order], w[order]), whole[order], scale=np.max(np.abs(g)))
    for i in range(len(g)):
        assert_same(project(g[i : i + 1], w[i : i + 1])[0], whole[i], scale=np.max(np.abs(g)))


@projections
def test_a_row_is_everything_behind_its_leading_index(project: Callable[[Array, Array], Array]) -> None:
    g, w = pair((4, 3, 2, 5), seed=0)
    flat = project(g.reshape(4, 30), w.reshape(4, 30))
    assert np.array_equal(project(g, w).reshape(4, 30), flat)


@projections
def test_a_gradient_along_the_weights_vanishes(project: Callable[[Array, Array], Array]) -> None:
    w = pair((6, 9), seed=1)[1]
    assert_same(project(-2.5 * w, w), np.zeros_like(w), scale=np.max(row_norms(w)))


@projections
def test_one_column_leaves_nothing_but_where_the_weight_is_zero(project: Callable[[Array, Array], Array]) -> None:
    assert_same(project(np.array([[3.0], [3.0]]), np.array([[2.0], [0.0]])), [[0.0], [3.0]], scale=3.0)


@pytest.mark.parametrize(
    ("square", "inside"),
    [(0.0, False), (0.99e-30, False), (1.01e-30, True), (1.0, True), (0.99e38, True), (1.01e38, False), (1e300, False)],
)
def test_rows_outside_the_domain_stay_as_they_are(square: float, inside: bool) -> None:
    w = np.array([[np.sqrt(square), 0.0], [1.0, 0.0]])
    g = np.array([[3.0, 1.0], [3.0, 1.0]])
    left = project_rows(g, w)
    assert (left[0, 0] != 3.0) == inside
    assert_same(left[1], [0.0, 1.0], scale=3.0)


def test_weights_that_are_not_finite_leave_the_gradient_alone() -> None:
    g = np.ones((3, 2))
    w = np.array([[np.nan, 1.0], [np.inf, 1.0], [1.0, 1.0]])
    with np.errstate(invalid="ignore"):
        assert_same(project_rows(g, w), [[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]], scale=1.0)


@pytest.mark.parametrize(("square", "inside"), [(0.99e-8, False), (1.01e-8, True)])
def test_the_package_leaves_rows_shorter_than_eps_alone(square: float, inside: bool) -> None:
    left = project_update_rows(np.array([[3.0, 1.0]]), np.array([[np.sqrt(square), 0.0]]), eps=1e-8)
    assert_same(left, [[0.0 if inside else 3.0, 1.0]], scale=3.0)
