"""DolphinFlow8bit's page: AdamW where it should be AdamW, codes that follow the moments, nothing changed in place."""

import copy
from typing import Any

import numpy as np
import pytest

from trysquare_conformance.budget import Array, assert_same, rounding_error
from trysquare_reference import blockwise8bit
from trysquare_reference.dolphinflow8bit import SMALLEST_CODED, Hyperparameters, init, load, step, store

SMALL, LARGE = (8, 12), (64, 80)


def gaussian(shape: tuple[int, ...], seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def adamw(theta: Array, gradients: list[Array], hp: Hyperparameters) -> Array:
    """As its paper has it."""
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for t, g in enumerate(gradients, 1):
        m = hp.momentum * m + (1 - hp.momentum) * g
        v = hp.beta2 * v + (1 - hp.beta2) * g**2
        u = (m / (1 - hp.momentum**t)) / (np.sqrt(v / (1 - hp.beta2**t)) + hp.eps)
        theta = theta - hp.lr * (u + hp.weight_decay * theta)
    return theta


def free(theta: Array, gradients: list[Array], hp: Hyperparameters) -> tuple[Array, dict[str, Any]]:
    state = init(theta, hp)
    for g in gradients:
        (theta,), (state,) = step([theta], [g], [state], hp)
    return theta, state


def test_without_codes_it_is_adamw() -> None:
    hp = Hyperparameters(lr=0.01, ortho_mode=None, gradient_clipping=None)
    theta, gradients = gaussian(SMALL, 0), [gaussian(SMALL, i) for i in range(1, 20)]
    assert_same(free(theta, gradients, hp)[0], adamw(theta, gradients, hp), scale=1.0, operations=400)


def test_the_first_step_uses_the_moments_before_they_are_coded() -> None:
    hp = Hyperparameters(lr=0.01, ortho_mode=None, gradient_clipping=None)
    theta, g = gaussian(LARGE, 0), gaussian(LARGE, 1)
    assert_same(free(theta, [g], hp)[0], adamw(theta, [g], hp), scale=1.0)


def test_with_codes_it_stays_near_adamw() -> None:
    hp = Hyperparameters(lr=0.01, ortho_mode=None, gradient_clipping=None, weight_decay=0.0)
    theta, gradients = gaussian(LARGE, 0), [gaussian(LARGE, i) for i in range(1, 50)]
    exact, coded = adamw(theta, gradients, hp), free(theta, gradients, hp)[0]
    apart, way = np.linalg.norm(coded - exact), np.linalg.norm(exact - theta)
    assert 0 < apart < way / 20


def test_a_small_neighbour_of_a_large_entry_takes_no_huge_step() -> None:
    """Were its second moment 0, the step would be thousands of learning rates."""
    hp = Hyperparameters(lr=1.0, ortho_mode=None, gradient_clipping=None, weight_decay=0.0)
    g = np.zeros(SMALLEST_CODED)
    g[:2] = 1.0, 1e-4
    first, state = free(np.zeros(SMALLEST_CODED), [g], hp)
    (second,), _ = step([first], [np.zeros(SMALLEST_CODED)], [state], hp)
    assert 0 < np.abs(second - first)[1] < 1


@pytest.mark.parametrize("size", [SMALLEST_CODED - 1, SMALLEST_CODED])
def test_from_4096_entries_on_moments_are_coded(size: int) -> None:
    hp = Hyperparameters()
    _, state = free(np.ones(size), [np.ones(size)], hp)
    coded = size == SMALLEST_CODED
    assert ("qmap1" in state) == coded
    assert (state["state1"].dtype == np.uint8) == coded
    assert list(state) == list(init(np.ones(size), hp))


def test_a_map_that_came_with_the_state_is_used_and_kept() -> None:
    hp = Hyperparameters(ortho_mode=None)
    theta, g = np.zeros(SMALLEST_CODED), gaussian((SMALLEST_CODED,), 0)
    _, state = free(theta, [g], hp)
    other = np.nextafter(state["qmap1"].astype(np.float32), np.float32(2)).astype(np.float64)
    (_,), (after,) = step([theta], [g], [{**state, "qmap1": other}], hp)
    assert after["qmap1"] is other


@pytest.mark.parametrize("i", [1, 2])
def test_what_is_stored_is_loaded_within_the_bound(i: int) -> None:
    moment = gaussian(LARGE, 0) ** i
    held = store(moment, i)
    bound = blockwise8bit.error_bound(held[f"state{i}"], held[f"absmax{i}"], held[f"qmap{i}"])
    assert np.all(np.abs(load(held, i) - moment) <= bound + rounding_error(moment, 4))


def test_without_the_second_moment_it_is_heavy_ball() -> None:
    hp = Hyperparameters(lr=0.1, adaptive_lr=False, ortho_mode=None, gradient_clipping=None, momentum=0.5)
    theta, state = free(np.ones(2), [np.ones(2), np.ones(2)], hp)
    decay = 1 - hp.lr * hp.weight_decay
    assert_same(theta, np.full(2, (decay - 0.1) * decay - 0.15))
    assert list(state) == ["step", "state1"]


@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_a_step_changes_nothing_in_place(shape: tuple[int, ...]) -> None:
    hp = Hyperparameters()
    theta, g = gaussian(shape, 0), gaussian(shape, 1)
    _, state = free(theta, [g], hp)
    before = copy.deepcopy((theta, g, state))
    step([theta], [g], [state], hp)
    assert np.array_equal(before[0], theta)
    assert np.array_equal(before[1], g)
    assert all(np.array_equal(before[2][name], state[name]) for name in state)


def test_the_projected_gradient_goes_into_both_moments() -> None:
    hp = Hyperparameters(gradient_clipping=None)
    theta = gaussian(SMALL, 0)
    _, state = free(theta, [3 * theta], hp)
    assert_same(state["state1"], np.zeros(SMALL), scale=np.abs(theta).max())
    assert_same(state["state2"], np.zeros(SMALL), scale=1e-9)


def test_an_empty_parameter_counts_its_steps() -> None:
    theta, state = free(np.zeros((0, 3)), [np.zeros((0, 3))] * 2, Hyperparameters())
    assert theta.shape == (0, 3)
    assert state["step"] == 2
