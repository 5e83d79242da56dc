"""THORN's page: what each kind of group does, what must not move, and windows of gradient release."""

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trysquare_conformance.budget import Array, assert_same
from trysquare_reference.rectification import rectification
from trysquare_reference.thorn import Hyperparameters, State, init, mean, release_step, scale, step

KINDS: dict[str, dict[str, Any]] = {
    "orthogonalised": {"orthogonalize": True},
    "schedule-free": {"orthogonalize": False},
    "adam": {"orthogonalize": False, "schedule_free": False},
}
kinds = pytest.mark.parametrize("kind", KINDS)
others = pytest.mark.parametrize("kind", ["schedule-free", "adam"])
seeds = st.integers(0, 2**32 - 1)
PRODUCTS = 1 << 20  # five iterations, whose last amplifies what the singular values have not got


def hyperparameters(kind: str, **changes: Any) -> Hyperparameters:
    return replace(Hyperparameters(lr=0.01), **(KINDS[kind] | changes))


def gaussian(seed: int, *shapes: tuple[int, ...]) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


def run(theta: Array, gradients: list[Array], hp: Hyperparameters) -> tuple[Array, State]:
    state = init(theta, hp)
    for g in gradients:
        (theta,), (state,) = step([theta], [g], [state], hp)
    return theta, state


def same_state(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_the_defaults_are_those_of_the_specification() -> None:
    assert Hyperparameters() == Hyperparameters(
        lr=1e-3,
        betas=(0.95, 0.95),
        weight_decay=0.1,
        rectify=False,
        target_rms=0.2,
        eps=1e-8,
        iters=5,
        lower_bound=1e-3,
        safety_factor=0.02,
        cushion=0.02,
        schedule_free=True,
        orthogonalize=True,
        batched=False,
        coefficients=None,
        form="standard",
        update_rate=1,
    )


@pytest.mark.parametrize(
    ("kind", "changes", "names"),
    [
        ("orthogonalised", {}, "step momentum_buffer row_exp_avg_sq"),
        ("orthogonalised", {"betas": (0.9, 0.0)}, "step momentum_buffer"),
        ("orthogonalised", {"update_rate": 2}, "step momentum_buffer row_exp_avg_sq"),
        ("schedule-free", {}, "step z exp_avg_sq lr_max weight_sum"),
        ("schedule-free", {"betas": (0.0, 0.9)}, "step z exp_avg_sq lr_max weight_sum x"),
        ("schedule-free", {"update_rate": 2}, "step z exp_avg_sq lr_max weight_sum update_sum"),
        ("adam", {}, "step exp_avg exp_avg_sq"),
    ],
)
def test_the_state_holds_what_is_needed(kind: str, changes: dict[str, Any], names: str) -> None:
    hp = hyperparameters(kind, **changes)
    _, state = run(np.ones((3, 2)), gaussian(0, *[(3, 2)] * 4), hp)
    assert " ".join(state) == names == " ".join(init(np.ones((3, 2)), hp))


@kinds
def test_arguments_stay_as_they_are(kind: str) -> None:
    for hp in (hyperparameters(kind, update_rate=n, betas=(b, 0.9)) for n, b in product((1, 2), (0.0, 0.9))):
        theta, g = gaussian(0, (3, 4), (3, 4))
        state = init(theta, hp)
        copies = theta.copy(), g.copy(), {name: np.copy(value) for name, value in state.items()}
        for _ in range(2):
            step([theta], [g], [state], hp)
        assert np.array_equal(theta, copies[0])
        assert np.array_equal(g, copies[1])
        assert same_state(state, copies[2])


@kinds
def test_parameters_do_not_meet(kind: str) -> None:
    hp = hyperparameters(kind)
    thetas, gradients = gaussian(0, (3, 4), (5, 2)), gaussian(1, (3, 4), (5, 2))
    together, states = step(thetas, gradients, [init(theta, hp) for theta in thetas], hp)
    for i, theta in enumerate(thetas):
        (alone,), (state,) = step([theta], [gradients[i]], [init(theta, hp)], hp)
        assert np.array_equal(alone, together[i])
        assert same_state(state, states[i])


@kinds
def test_an_empty_parameter_counts_the_step(kind: str) -> None:
    theta, state = run(np.zeros((0, 3)), [np.zeros((0, 3))] * 2, hyperparameters(kind))
    assert theta.shape == (0, 3)
    assert state["step"] == 2


@kinds
def test_a_zero_gradient_leaves_the_decay_alone(kind: str) -> None:
    hp = hyperparameters(kind, weight_decay=0.5)
    (theta,) = gaussian(0, (4, 3))
    moved, _ = run(theta, [np.zeros((4, 3))], hp)
    rate = hp.lr * (0.2 * 2 if kind == "orthogonalised" else 1)
    assert_same(moved, theta * (1 - rate * 0.5))


@kinds
def test_misaligned_entries_move_as_without_decay(kind: str) -> None:
    theta, *gradients = gaussian(0, (4, 3), (4, 3))
    plain, _ = run(theta, gradients, hyperparameters(kind, weight_decay=0.0))
    decayed, _ = run(theta, gradients, hyperparameters(kind, weight_decay=0.5))
    outward = np.sign(plain - theta) == np.sign(theta)
    assert outward.any()
    assert np.array_equal(decayed[outward], plain[outward])
    assert np.all(np.abs(decayed[~outward]) < np.abs(plain[~outward]) + 1)
    assert not np.any(decayed[~outward] == plain[~outward])


@kinds
@pytest.mark.parametrize("beta2", [0.0, 0.65, 0.95])
def test_while_the_rectification_is_silent_only_the_averages_move(kind: str, beta2: float) -> None:
    hp = hyperparameters(kind, rectify=True, betas=(0.9, beta2))
    (start,), state = gaussian(0, (3, 4)), None
    theta, state = start, init(start, hp)
    for t in range(1, 12):
        before = theta
        (theta,), (new,) = step([theta], gaussian(t, (3, 4)), [state], hp)
        silent = rectification(t, beta2) == 0
        assert np.array_equal(theta, before) == silent
        average = "row_exp_avg_sq" if kind == "orthogonalised" else "exp_avg_sq"
        assert average not in new or not np.array_equal(new[average], state[average])
        if silent and kind == "schedule-free":
            assert (new["lr_max"], new["weight_sum"]) == (0, 0)
            assert np.array_equal(new["z"], start)
        state = new


# Orthogonalised


@given(seed=seeds, momentum=st.floats(0, 0.99))
@settings(max_examples=20)
def test_rotations_commute_with_steps(seed: int, momentum: float) -> None:
    hp = hyperparameters("orthogonalised", betas=(momentum, 0.0), weight_decay=0.0)
    theta, *gradients = gaussian(seed, *[(5, 3)] * 3)
    q, p = (np.linalg.qr(a)[0] for a in gaussian(seed + 1, (5, 5), (3, 3)))
    plain, _ = run(theta, gradients, hp)
    turned, _ = run(q @ theta @ p, [q @ g @ p for g in gradients], hp)
    assert_same(turned, q @ plain @ p, scale=np.max(np.abs(theta)) + 1, operations=PRODUCTS)


@given(seed=seeds, power=st.integers(-20, 20))
@settings(max_examples=20)
def test_the_size_of_the_gradient_does_not_matter(seed: int, power: int) -> None:
    theta, *gradients = gaussian(seed, *[(3, 5)] * 3)
    for beta2 in (0.0, 0.95):
        hp = hyperparameters("orthogonalised", betas=(0.9, beta2))
        plain, _ = run(theta, gradients, hp)
        scaled, _ = run(theta, [2.0**power * g for g in gradients], hp)
        assert_same(scaled, plain, scale=1 + np.abs(theta))


@pytest.mark.parametrize("shape", [(6, 3), (3, 6), (4, 4)])
@pytest.mark.parametrize("beta2", [0.0, 0.95])
def test_the_root_mean_square_of_a_step_is_the_target(shape: tuple[int, int], beta2: float) -> None:
    hp = hyperparameters("orthogonalised", betas=(0.9, beta2), weight_decay=0.0, iters=10)
    moved, _ = run(np.zeros(shape), gaussian(0, shape), hp)
    assert_same(np.sqrt(np.mean(moved**2)), 0.2 * hp.lr, operations=PRODUCTS)


@pytest.mark.parametrize(
    ("rows", "columns", "target_rms", "expected"),
    [(4, 9, 0.2, 0.6), (9, 4, 0.2, 0.6), (9, 4, 0.0, 1.5), (4, 9, 0.0, 1.0), (1, 1, 0.5, 0.5)],
)
def test_scales(rows: int, columns: int, target_rms: float, expected: float) -> None:
    assert_same(scale(rows, columns, target_rms), expected)


@pytest.mark.parametrize("target_rms", [0.0, 0.2])
@pytest.mark.parametrize("beta2", [0.0, 0.95])
def test_a_convolution_is_its_flattened_matrix(target_rms: float, beta2: float) -> None:
    hp = hyperparameters("orthogonalised", target_rms=target_rms, betas=(0.9, beta2))
    theta, *gradients = gaussian(0, *[(5, 3, 2, 2)] * 3)
    moved, state = run(theta, gradients, hp)
    flat, flat_state = run(theta.reshape(5, 12), [g.reshape(5, 12) for g in gradients], hp)
    assert np.array_equal(moved, flat.reshape(theta.shape))
    assert beta2 == 0 or np.array_equal(state["row_exp_avg_sq"], flat_state["row_exp_avg_sq"])


@pytest.mark.parametrize("shape", [(2, 6, 3), (2, 2, 3, 4)])
@pytest.mark.parametrize("target_rms", [0.0, 0.2])
def test_a_batch_is_its_slices(shape: tuple[int, ...], target_rms: float) -> None:
    hp = hyperparameters("orthogonalised", batched=True, target_rms=target_rms)
    theta, *gradients = gaussian(0, *[shape] * 3)
    moved, state = run(theta, gradients, hp)
    for index in np.ndindex(shape[:-2]):
        alone, alone_state = run(theta[index], [g[index] for g in gradients], replace(hp, batched=False))
        assert_same(moved[index], alone, scale=1 + np.abs(alone), operations=PRODUCTS)
        assert_same(state["row_exp_avg_sq"][index], alone_state["row_exp_avg_sq"], operations=PRODUCTS)


def test_both_forms_make_the_same_steps() -> None:
    theta, *gradients = gaussian(0, *[(4, 9)] * 4)
    moved = [run(theta, gradients, hyperparameters("orthogonalised", form=form))[0] for form in ("standard", "gram")]
    assert_same(*moved, scale=1 + np.abs(theta), operations=PRODUCTS)


def test_given_coefficients_take_the_place_of_the_solved_ones() -> None:
    hp = hyperparameters("orthogonalised", coefficients=((1.0, 0.0, 0.0),), betas=(0.0, 0.0), weight_decay=0.0)
    moved, _ = run(np.zeros((2, 2)), [np.array([[3.0, 0.0], [0.0, 4.0]])], hp)
    k = -hp.lr * 0.2 * np.sqrt(2) / 1.02 / 5
    assert_same(moved, [[3 * k, 0.0], [0.0, 4 * k]])


def test_the_momentum_is_nesterovs() -> None:
    hp = hyperparameters("orthogonalised", betas=(0.5, 0.0), weight_decay=0.0, iters=9)
    first, second = np.diag([1.0, 1.0]), np.diag([1.0, -1.0])
    moved, state = run(np.zeros((2, 2)), [first, second], hp)
    assert np.array_equal(state["momentum_buffer"], 0.5 * first + second)
    u = second + 0.5 * (0.5 * first + second)  # (1.75, -1.25): one entry of each sign
    expected = -hp.lr * 0.2 * np.sqrt(2) * (first + np.sign(u))
    assert_same(moved, expected, scale=1.0, operations=PRODUCTS)


# Schedule-free and Adam


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("rectify", [False, True])
def test_x_y_and_z_belong_together(beta1: float, rectify: bool) -> None:
    hp = hyperparameters("schedule-free", betas=(beta1, 0.9), rectify=rectify)
    theta, visited, weights = np.array([1.0, -1.0]), [], []
    state = init(theta, hp)
    for t in range(1, 300):
        rate = hp.lr * min(1.0, t / 20)
        (theta,), (state,) = step([theta], gaussian(t, (2,)), [state], replace(hp, lr=rate))
        visited.append(state["z"])
        weights.append(state["lr_max"] ** 2)
    x = sum(w * z for w, z in zip(weights, visited, strict=True)) / sum(weights)
    assert_same(mean(theta, state, hp), x, scale=4.0, operations=1 << 16)
    assert_same(theta, (1 - beta1) * state["z"] + beta1 * x, scale=4.0, operations=1 << 16)


def test_without_second_moment_decay_and_momentum_it_steps_by_signs() -> None:
    hp = hyperparameters("schedule-free", betas=(0.0, 0.0), weight_decay=0.0, eps=1e-300)
    moved, state = run(np.zeros(2), [np.array([3.0, -1e-5])] * 3, hp)
    assert_same(moved, 3 * hp.lr * np.array([-1.0, 1.0]))
    assert_same(state["x"], 2 * hp.lr * np.array([-1.0, 1.0]))


@given(seed=seeds, steps=st.integers(1, 8))
@settings(max_examples=20)
def test_without_averaging_and_decay_it_is_adam(seed: int, steps: int) -> None:
    hp = hyperparameters("adam", weight_decay=0.0, betas=(0.9, 0.99))
    theta, *gradients = gaussian(seed, *[(3,)] * (steps + 1))
    moved, _ = run(theta, gradients, hp)
    m = v = np.zeros(3)
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        theta = theta - hp.lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + hp.eps)
    assert_same(moved, theta, scale=1 + np.abs(theta), operations=1 << 10)


@others
def test_eps_stands_outside_of_the_root(kind: str) -> None:
    hp = hyperparameters(kind, betas=(0.5, 0.75), eps=0.5, weight_decay=0.0)
    moved, _ = run(np.zeros(1), [np.array([2.0])], hp)
    assert_same(moved, [-hp.lr * 2 / 2.5])


def test_a_half_precision_parameter_steps_from_the_y_of_its_state() -> None:
    hp = hyperparameters("schedule-free")
    theta, *gradients = gaussian(0, *[(4,)] * 4)
    expected, whole = run(theta, gradients, hp)
    state = init(theta, hp, half=True)
    for g in gradients:
        (y,), (state,) = step([np.round(theta, 1)], [g], [state], hp)
    assert np.array_equal(y, expected)
    assert np.array_equal(state["y"], expected)
    assert np.array_equal(mean(np.zeros(4), state, hp), mean(expected, whole, hp))


# Gradient release


@kinds
@pytest.mark.parametrize("rate", [1, 2, 16])
def test_parameters_move_in_every_so_manieth_call_only(kind: str, rate: int) -> None:
    hp = hyperparameters(kind, update_rate=rate)
    (theta,) = gaussian(0, (3, 2))
    state = init(theta, hp)
    for n in range(1, 2 * rate + 2):
        before = theta
        theta, state = release_step(theta, gaussian(n, (3, 2))[0], state, hp)
        assert state["step"] == n
        assert np.array_equal(theta, before) == (n % rate != 0)
        if rate > 1 and kind != "orthogonalised":
            assert np.all(state["update_sum"] == 0) == (n % rate == 0)


@kinds
def test_a_mean_in_mid_window_is_that_of_its_beginning(kind: str) -> None:
    hp = hyperparameters(kind, update_rate=3)
    (theta,) = gaussian(0, (3, 2))
    state = init(theta, hp)
    for n in range(1, 10):
        before = mean(theta, state, hp)
        theta, state = release_step(theta, gaussian(n, (3, 2))[0], state, hp)
        assert np.array_equal(mean(theta, state, hp), before) == (n % 3 != 0)


@others
def test_an_update_of_a_window_is_the_mean_of_its_updates(kind: str) -> None:
    hp = hyperparameters(kind, update_rate=4, weight_decay=0.0, betas=(0.9, 0.95))
    theta, *gradients = gaussian(0, *[(3,)] * 5)
    moved, _ = run(theta, gradients, hp)
    m = v = total = np.zeros(3)
    for n, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        u = m / (1 - 0.9**n) if kind == "adam" else g
        total = total + u / (np.sqrt(v / (1 - 0.95**n)) + hp.eps)
    assert_same(moved, theta - hp.lr * total / 4, scale=1 + np.abs(theta), operations=1 << 10)


def test_an_orthogonalised_window_sums_its_gradients_in_the_momentum() -> None:
    hp = hyperparameters("orthogonalised", update_rate=3, weight_decay=0.3, betas=(0.9, 0.95))
    theta, *gradients = gaussian(0, *[(3, 4)] * 4)
    moved, state = run(theta, gradients, hp)
    m = 0.9 * (0.9 * gradients[0] + gradients[1])
    once, alone = init(theta, hp), replace(hp, update_rate=1)
    (expected,), (after,) = step([theta], [gradients[2]], [once | {"momentum_buffer": m / 0.9}], alone)
    assert_same(moved, expected, scale=1 + np.abs(theta), operations=PRODUCTS)
    assert_same(state["row_exp_avg_sq"], after["row_exp_avg_sq"], operations=PRODUCTS)


@others
def test_a_window_that_ends_in_silence_discards_its_sum(kind: str) -> None:
    hp = hyperparameters(kind, update_rate=4, rectify=True, betas=(0.9, 0.95))
    theta, *gradients = gaussian(0, *[(3,)] * 5)
    moved, state = run(theta, gradients, hp)  # rectification begins at 5
    assert np.array_equal(moved, theta)
    assert np.all(state["update_sum"] == 0)


def test_an_orthogonalised_window_counts_updates_in_its_rectification() -> None:
    hp = hyperparameters("orthogonalised", update_rate=2, rectify=True)
    (start,) = gaussian(0, (3, 4))
    for n, moves in ((8, False), (10, True)):
        theta, _ = run(start, gaussian(1, *[(3, 4)] * n), hp)
        assert np.array_equal(theta, start) != moves
