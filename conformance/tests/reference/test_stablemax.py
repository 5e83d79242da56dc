"""StableMax: what its equations imply, and PyTorch's cross-entropy and autograd as a second opinion on all of them."""

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trysquare_conformance.budget import Array, assert_same
from trysquare_reference import stablemax as reference

SHAPES = [(5,), (3, 5), (2, 5, 3), (2, 5, 3, 2)]
numbers = st.floats(-1e6, 1e6)
logits = st.lists(numbers, min_size=1, max_size=8).map(np.array)


def oracle(
    x: Array, target: Any, weight: Array | None, g: Array, reduction: str, label_smoothing: float
) -> list[Array]:
    """Loss and gradients by torch: its cross-entropy of γ, differentiated by autograd, which is right except at 0."""
    probabilities = target.dtype.kind == "f"
    logits, t = torch.tensor(x, requires_grad=True), torch.tensor(target, requires_grad=probabilities)
    w = None if weight is None else torch.tensor(weight, requires_grad=probabilities)
    gamma = logits.sign() * logits.abs().log1p()
    loss = torch.nn.functional.cross_entropy(gamma, t, w, reduction=reduction, label_smoothing=label_smoothing)
    leaves = [leaf for leaf in (logits, t, w) if leaf is not None and leaf.requires_grad]
    gradients = torch.autograd.grad(loss, leaves, torch.tensor(g))
    return [loss.detach().numpy(), *(gradient.numpy() for gradient in gradients)]


@pytest.mark.parametrize(
    ("shape", "kind", "weighted", "reduction", "label_smoothing"),
    list(product(SHAPES, ["index", "probabilities"], [False, True], ["mean", "sum", "none"], [0.0, 0.3, 1.0])),
)
def test_loss_and_gradients_are_those_of_torch_applied_to_gamma(
    shape: tuple[int, ...], kind: str, weighted: bool, reduction: str, label_smoothing: float
) -> None:
    rng = np.random.default_rng(0)
    positions = shape[:1] + shape[2:] if len(shape) > 1 else ()
    x, weight = 5 * rng.normal(size=shape), rng.random(5) if weighted else None
    target = rng.random(shape) if kind == "probabilities" else rng.integers(5, size=positions)
    if kind == "index" and target.size > 1:
        target.flat[1] = -100
    g = rng.normal(size=positions if reduction == "none" else ())
    expected = oracle(x, target, weight, g, reduction, label_smoothing)
    rule: dict[str, Any] = {"reduction": reduction, "label_smoothing": label_smoothing}
    found = [
        reference.cross_entropy(x, target, weight, **rule),
        reference.cross_entropy_gradient(x, target, weight, **rule, g=g),
    ]
    if kind == "probabilities":
        of_target, of_weight = reference.probability_gradients(x, target, weight, **rule, g=g)
        found += [of_target, of_weight] if weighted else [of_target]
    for mine, theirs in zip(found, expected, strict=True):
        assert_same(mine, theirs, scale=1 + np.max(np.abs(theirs)), operations=256)


@given(x=logits)
def test_gamma_is_odd_and_s_of_minus_x_is_one_over_s(x: Array) -> None:
    assert_same(reference.log_s(-x), -reference.log_s(x))
    assert_same(reference.s(x) * reference.s(-x), np.ones_like(x))
    assert_same(np.exp(reference.log_s(x)), reference.s(x), operations=256)


@given(x=logits)
def test_the_slope_of_gamma_is_that_of_s_over_s(x: Array) -> None:
    assert_same(reference.log_s_slope(x), reference.s_slope(x) / reference.s(x))


@given(x=logits)
def test_probabilities_are_positive_sum_to_one_and_keep_the_order(x: Array) -> None:
    p = reference.stablemax(x)
    assert (p > 0).all()
    assert_same(np.sum(p), 1.0)
    assert (np.diff(p[np.argsort(x, kind="stable")]) >= 0).all()
    assert_same(np.exp(reference.log_stablemax(x)), p, operations=512)


@given(x=logits, index=st.integers(0, 7))
def test_the_gradient_pulls_the_target_up_and_everything_else_down(x: Array, index: int) -> None:
    y = np.array([index % x.size])
    gradient = reference.cross_entropy_gradient(x[np.newaxis], y)[0]
    others = np.arange(x.size) != y
    assert (gradient[others] > 0).all()
    assert gradient[y] <= 0
    assert_same(np.sum(gradient / reference.log_s_slope(x)), 0.0, scale=2.0)


def test_the_formulas_are_smooth_where_their_branches_meet() -> None:
    around = np.array([-1e-12, -0.0, 0.0, 1e-12])
    assert_same(reference.s(around), 1 + around)
    assert_same(reference.s_slope(around), 1 + np.minimum(2 * around, 0))
    assert_same(reference.log_s_slope(around), 1 - np.abs(around))


GRADIENTS: list[Callable[[Array], Array]] = [
    lambda x: reference.cross_entropy_gradient(x, np.array([0])),
    lambda x: reference.stablemax_gradient(x, np.array([[1.0, 0.0, 2.0]])),
    lambda x: reference.log_stablemax_gradient(x, np.array([[1.0, 0.0, 2.0]])),
]


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_masked_logit_has_no_probability_and_no_gradient(gradient: Callable[[Array], Array]) -> None:
    masked, without = np.array([[1.0, -np.inf, -2.0]]), np.array([[1.0, -2.0]])
    assert reference.stablemax(masked)[0, 1] == 0
    assert_same(reference.log_stablemax(masked)[:, ::2], reference.log_stablemax(without))
    assert gradient(masked)[0, 1] == 0
    assert np.isfinite(gradient(masked)).all()


@pytest.mark.parametrize("row", [[1.0, np.inf, 0.0], [-np.inf] * 3, [1.0, np.nan, 0.0]])
def test_a_position_without_an_answer_is_nan_and_leaves_its_neighbours_alone(row: list[float]) -> None:
    x = np.array([row, [1.0, 2.0, 3.0]])
    for values in (reference.stablemax(x), reference.log_stablemax(x)):
        assert np.isnan(values).any(axis=1).tolist() == [True, False]
    losses = reference.cross_entropy(x, np.array([0, 0]), reduction="none")
    assert np.isnan(losses).tolist() == [True, False]


def test_the_loss_is_not_capped() -> None:
    """log(p + 1e-12) would end at 27.6; this is log(2e30) beyond it."""
    loss = reference.cross_entropy(np.array([[-1e30, 1e30]]), np.array([0]))
    assert_same(loss, 2 * np.log(1e30))


def test_what_is_ignored_counts_nowhere() -> None:
    x, y = np.array([[1.0, 2.0], [np.nan, np.nan]]), np.array([0, 7])
    assert_same(reference.cross_entropy(x, y, ignore_index=7), reference.cross_entropy(x[:1], y[:1]))
    assert_same(
        reference.cross_entropy_gradient(x, y, ignore_index=7),
        np.concatenate([reference.cross_entropy_gradient(x[:1], y[:1]), np.zeros((1, 2))]),
    )
    nothing = np.array([7, 7])
    assert np.isnan(reference.cross_entropy(x, nothing, ignore_index=7))
    assert not reference.cross_entropy_gradient(x, nothing, ignore_index=7).any()


def test_a_probability_of_zero_counts_nothing_where_log_p_is_infinite() -> None:
    x, t = np.array([[0.0, -np.inf]]), np.array([[1.0, 0.0]])
    assert reference.cross_entropy(x, t) == 0
    assert reference.cross_entropy(x, t[:, ::-1]) == np.inf
