"""DolphinFlow's page: what a step is made of, what it must not touch, and special cases that are known otherwise."""

from dataclasses import asdict, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trysquare_conformance.budget import Array, assert_same
from trysquare_reference.dolphinflow import Hyperparameters, State, init, step

MODES = ("vector", "matrix", None)
RULES = [
    {"ortho_mode": mode, "project": project, "adaptive_lr": adaptive, "bias_correction": corrected}
    for mode, project, adaptive, corrected in product(MODES, ("gradient", "update"), (True, False), (True, False))
]
SHAPES = ((), (5,), (4, 3), (3, 4), (2, 3, 2, 2))
rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(map(str, rule.values())))
seeds = st.integers(0, 2**32 - 1)


def hyperparameters(**changes: Any) -> Hyperparameters:
    return replace(Hyperparameters(lr=0.01, weight_decay=0.1), **changes)


def gaussian(seed: int, *shapes: tuple[int, ...]) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


def run(parameters: list[Array], hp: Hyperparameters, steps: int = 3, seed: int = 0) -> tuple[list[Array], list[State]]:
    states = [init(theta, hp) for theta in parameters]
    for t in range(steps):
        gradients = gaussian(seed + t + 1, *(theta.shape for theta in parameters))
        parameters, states = step(parameters, gradients, states, hp)
    return parameters, states


def test_the_defaults_are_those_of_the_specification() -> None:
    assert Hyperparameters() == Hyperparameters(
        lr=1e-4,
        weight_decay=1e-2,
        momentum=0.9,
        ortho_mode="vector",
        adaptive_lr=True,
        beta2=0.99,
        eps=1e-8,
        ns_steps=2,
        gradient_clipping=1.0,
        loss_aware_schedule=False,
        loss_ema_beta=0.98,
        project="gradient",
        bias_correction=True,
    )


@given(seed=seeds, steps=st.integers(1, 6), momentum=st.floats(0, 0.99), weight_decay=st.floats(0, 1))
def test_without_mode_and_adaptivity_it_is_nesterov_sgd_with_decoupled_decay(
    seed: int, steps: int, momentum: float, weight_decay: float
) -> None:
    hp = hyperparameters(
        ortho_mode=None, adaptive_lr=False, gradient_clipping=None, momentum=momentum, weight_decay=weight_decay
    )
    start = gaussian(seed, *SHAPES)
    stepped, _ = run(start, hp, steps, seed)
    for i, theta in enumerate(start):
        buffer = np.zeros_like(theta)
        for t in range(steps):
            g = gaussian(seed + t + 1, *SHAPES)[i]
            buffer = momentum * buffer + g
            theta = theta * (1 - hp.lr * weight_decay) - hp.lr * (g + momentum * buffer)  # noqa: PLW2901  # a recurrence
        assert_same(stepped[i], theta, scale=1 + np.abs(theta) + steps)


@rules
@given(seed=seeds)
@settings(max_examples=10)
def test_a_permutation_of_rows_commutes_with_steps(rule: dict[str, Any], seed: int) -> None:
    hp = hyperparameters(**rule)
    (theta,), gradients = gaussian(seed, (5, 4)), gaussian(seed + 1, (5, 4), (5, 4))
    order = np.random.default_rng(seed).permutation(5)
    plain, permuted, states, permuted_states = theta, theta[order], [init(theta, hp)], [init(theta, hp)]
    for g in gradients:
        (plain,), states = step([plain], [g], states, hp)
        (permuted,), permuted_states = step([permuted], [g[order]], permuted_states, hp)
    size = np.max(np.abs(theta)) + np.max(np.abs(plain))
    assert_same(permuted, plain[order], scale=size, operations=1 << 14)


@rules
def test_parameters_meet_only_in_the_norm(rule: dict[str, Any]) -> None:
    hp = hyperparameters(**rule, gradient_clipping=None)
    together, states = run(gaussian(3, *SHAPES), hp)
    for i, theta in enumerate(gaussian(3, *SHAPES)):
        alone, state = theta, init(theta, hp)
        for t in range(3):
            (alone,), (state,) = step([alone], [gaussian(t + 1, *SHAPES)[i]], [state], hp)
        assert np.array_equal(alone, together[i])
        assert state.keys() == states[i].keys()
        assert all(np.array_equal(state[name], states[i][name]) for name in state)


@pytest.mark.parametrize(("bias_correction", "size"), [(True, 1.9), (False, 19.0)])
@pytest.mark.parametrize("mode", MODES)
def test_the_first_step_of_a_vector(bias_correction: bool, size: float, mode: Any) -> None:
    hp = hyperparameters(
        lr=1e-3, weight_decay=0.0, eps=1e-300, bias_correction=bias_correction, ortho_mode=mode, gradient_clipping=1e-3
    )
    theta, g = np.zeros(3), np.array([2.0, -3.0, 1e-6])
    (moved,), _ = step([theta], [g], [init(theta, hp)], hp)
    assert_same(moved, -size * 1e-3 * np.sign(g))


@given(seed=seeds, max_norm=st.floats(0.01, 10))
def test_clipping_scales_all_gradients_alike_and_touches_none(seed: int, max_norm: float) -> None:
    hp = hyperparameters(ortho_mode=None, adaptive_lr=False, momentum=0.0, gradient_clipping=max_norm)
    parameters, gradients = gaussian(seed, *SHAPES), gaussian(seed + 1, *SHAPES)
    before = [g.copy() for g in gradients]
    _, states = step(parameters, gradients, [init(theta, hp) for theta in parameters], hp)
    norm = np.sqrt(sum(np.sum(g * g) for g in gradients))
    for g, original, state in zip(gradients, before, states, strict=True):
        assert np.array_equal(g, original)
        assert_same(state["momentum_buffer"], min(1, max_norm / (norm + 1e-6)) * g)


def test_the_vector_mode_moves_rows_at_right_angles_whatever_the_gradient() -> None:
    hp = hyperparameters(adaptive_lr=False, weight_decay=0.0, gradient_clipping=None)
    for project in ("gradient", "update"):
        theta, g = gaussian(4, (6, 5), (6, 5))
        (moved,), _ = step([theta], [g], [init(theta, hp)], replace(hp, project=project))
        assert_same(np.sum((moved - theta) * theta, axis=1), np.zeros(6), scale=np.sum(theta * theta, axis=1))


def test_projecting_the_gradient_reaches_the_second_moment_and_projecting_the_update_does_not() -> None:
    theta, g = np.array([[1.0, 0.0]]), np.array([[4.0, 3.0]])
    hp = hyperparameters(gradient_clipping=None, beta2=0.75)
    for project, square in (("gradient", [[0.0, 9 / 4]]), ("update", [[4.0, 9 / 4]])):
        _, (state,) = step([theta], [g], [init(theta, hp)], hyperparameters(**asdict(hp) | {"project": project}))
        assert_same(state["exp_avg_sq"], square, scale=16.0)
        assert_same(state["momentum_buffer"], g if project == "update" else [[0.0, 3.0]], scale=4.0)


def test_projection_has_no_effect_outside_of_its_mode() -> None:
    for mode in ("matrix", None):
        one, other = (
            run(gaussian(5, *SHAPES), hyperparameters(ortho_mode=mode, project=p)) for p in ("gradient", "update")
        )
        assert all(np.array_equal(a, b) for a, b in zip(one[0], other[0], strict=True))


def test_vectors_and_scalars_have_no_rows() -> None:
    shapes = ((5,), ())
    for mode in ("vector", "matrix"):
        one, other = (run(gaussian(6, *shapes), hyperparameters(ortho_mode=m)) for m in (mode, None))
        assert all(np.array_equal(a, b) for a, b in zip(one[0], other[0], strict=True))


def test_convolutions_step_as_their_matrices_do() -> None:
    for mode in MODES:
        hp = hyperparameters(ortho_mode=mode)
        (kernel,) = gaussian(7, (4, 3, 2, 2))
        (whole,), _ = run([kernel], hp)
        flat, state = kernel.reshape(4, 12), init(kernel.reshape(4, 12), hp)
        for t in range(3):
            (flat,), (state,) = step([flat], [gaussian(t + 1, (4, 3, 2, 2))[0].reshape(4, 12)], [state], hp)
        assert np.array_equal(flat, whole.reshape(4, 12))


def test_the_schedule_scales_the_rate_in_both_terms() -> None:
    parameters, gradients = gaussian(8, *SHAPES), gaussian(9, *SHAPES)
    hp = hyperparameters()
    states = [init(theta, hp) for theta in parameters]
    scaled, _ = step(parameters, gradients, states, hp, lr_scale=0.5)
    slower, _ = step(parameters, gradients, states, replace(hp, lr=hp.lr * 0.5))
    assert all(np.array_equal(a, b) for a, b in zip(scaled, slower, strict=True))


def test_a_rate_of_zero_moves_the_state_alone() -> None:
    parameters = gaussian(10, *SHAPES)
    moved, states = run(parameters, hyperparameters(lr=0.0))
    assert all(np.array_equal(a, b) for a, b in zip(moved, parameters, strict=True))
    assert all(state["step"] == 3 and np.any(state["momentum_buffer"]) for state in states)


def test_arguments_stay_as_they_are() -> None:
    hp = hyperparameters()
    parameters, gradients = gaussian(11, *SHAPES), gaussian(12, *SHAPES)
    states = [init(theta, hp) for theta in parameters]
    copies = [x.copy() for x in parameters + gradients]
    step(parameters, gradients, states, hp)
    assert all(np.array_equal(a, b) for a, b in zip(parameters + gradients, copies, strict=True))
    assert all(state["step"] == 0 and not np.any(state["exp_avg_sq"]) for state in states)


@rules
def test_empty_parameters_count_their_steps_and_disturb_nobody(rule: dict[str, Any]) -> None:
    hp = hyperparameters(**rule)
    empty = [np.zeros((0, 3)), np.zeros((5, 0)), np.zeros(0)]
    parameters, states = run([*gaussian(13, (4, 3)), *empty], hp)
    alone, _ = run(gaussian(13, (4, 3)), hp)
    assert np.array_equal(parameters[0], alone[0])
    for theta, state, start in zip(parameters[1:], states[1:], empty, strict=True):
        assert theta.shape == state["momentum_buffer"].shape == start.shape
        assert state["step"] == 3
        assert ("exp_avg_sq" in state) == hp.adaptive_lr


@pytest.mark.parametrize("clipping", [1.0, None])
def test_nan_in_a_gradient_spreads_as_far_as_the_norm_or_the_row(clipping: float | None) -> None:
    hp = hyperparameters(gradient_clipping=clipping)
    theta, g = gaussian(14, (3, 4), (3, 4))
    g[1, 2] = np.nan
    (moved, other), _ = step([theta, theta], [g, theta], [init(theta, hp)] * 2, hp)
    rows = np.isnan(moved).all(axis=1)
    assert rows.tolist() == ([True] * 3 if clipping else [False, True, False])
    assert np.isnan(other).all() == bool(clipping)


def test_an_infinite_gradient_gives_nan_and_no_silent_step_of_zero() -> None:
    hp = hyperparameters()
    theta = np.ones((2, 2))
    (moved,), _ = step([theta], [np.array([[np.inf, 1.0], [1.0, 1.0]])], [init(theta, hp)], hp)
    assert np.isnan(moved).all()


@pytest.mark.parametrize("lists", [(1, 2, 1), (2, 1, 2), (2, 2, 1)])
def test_lists_of_different_lengths_are_refused(lists: tuple[int, int, int]) -> None:
    hp = hyperparameters()
    parameters, gradients, states = (
        [x] * n for x, n in zip((np.ones(2), np.ones(2), init(np.ones(2), hp)), lists, strict=True)
    )
    with pytest.raises(ValueError, match="zip"):
        step(parameters, gradients, states, hp)  # type: ignore[arg-type]
