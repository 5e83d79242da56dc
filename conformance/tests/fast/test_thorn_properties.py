"""What must hold of THORN whatever the numbers are: equivariance, invariance, and what may not move.

In float64, so that a relation that holds but for rounding holds to many digits.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from trysquare import THORN
from trysquare.ops import polar, polar_express
from trysquare_conformance import inputs
from trysquare_conformance.behaviour import normal
from trysquare_conformance.budget import assert_same
from trysquare_conformance.case import Array
from trysquare_conformance.snapshots import to_array

ROUNDINGS = 1 << 24  # products, and quintics that multiply what is left of a small singular value by a thousand
KINDS: dict[str, dict[str, Any]] = {
    "ortho": {"orthogonalize": True},
    "free": {"orthogonalize": False},
    "adam": {"orthogonalize": False, "schedule_free": False},
}
BOUNDS = (1e-3, 0.02, 0.02)
kinds = pytest.mark.parametrize("kind", KINDS)
seeds, sides, batches = st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 3)
powers = st.integers(-20, 20)
quickly = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
Gradients = Sequence[Sequence[Tensor]]
Grouping = Callable[[list[Tensor]], list[dict[str, Any]]]


def draw(seed: int, steps: int, *shapes: tuple[int, ...]) -> tuple[list[Tensor], Gradients]:
    """Weights of these shapes, and gradients for some steps."""
    weights = [normal(shape, seed, i, torch.float64) for i, shape in enumerate(shapes)]
    return weights, [[normal(s, seed + 1 + t, i, torch.float64) for i, s in enumerate(shapes)] for t in range(steps)]


def one_group(kind: str) -> Grouping:
    return lambda parameters: [{"params": parameters, **KINDS[kind]}]


def run(
    weights: Sequence[Tensor], gradients: Gradients, group: Grouping, **hyperparameters: Any
) -> tuple[list[Tensor], THORN]:
    """The parameters after a step for each of the gradients, and the optimizer."""
    parameters: list[Tensor] = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = THORN(group(parameters), **{"lr": 0.01, **hyperparameters})
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return [p.detach() for p in parameters], optimizer


def arrays(tensors: Sequence[Tensor]) -> list[Array]:
    return [to_array(t) for t in tensors]


def rotation(seed: int, n: int) -> Tensor:
    return torch.linalg.qr(normal((n, n), seed, 9, torch.float64))[0]


# Orthogonalised


@quickly
@given(rows=sides, columns=sides, seed=seeds, momentum=st.floats(0, 0.99), steps=st.integers(1, 3))
def test_rotations_of_either_side_commute_with_steps(
    rows: int, columns: int, seed: int, momentum: float, steps: int
) -> None:
    q, p = rotation(seed, rows), rotation(seed + 1, columns)
    weights, gradients = draw(seed, steps, (rows, columns))
    plain = {"betas": (momentum, 0.0), "weight_decay": 0.0}
    (moved,), _ = run(weights, gradients, one_group("ortho"), **plain)
    (turned,), _ = run([q @ weights[0] @ p], [[q @ g @ p] for (g,) in gradients], one_group("ortho"), **plain)
    assert_same(to_array(turned), to_array(q @ moved @ p), scale=10.0, operations=ROUNDINGS)


@quickly
@given(rows=sides, columns=sides, seed=seeds, power=powers, beta2=st.sampled_from([0.0, 0.95]), decay=st.floats(0, 1))
def test_the_size_of_the_gradients_does_not_matter(
    rows: int, columns: int, seed: int, power: int, beta2: float, decay: float
) -> None:
    weights, gradients = draw(seed, 2, (rows, columns))
    scaled = [[g * 2.0**power for g in step] for step in gradients]
    both = [run(weights, g, one_group("ortho"), betas=(0.9, beta2), weight_decay=decay)[0] for g in (gradients, scaled)]
    assert torch.equal(*(moved[0] for moved in both))


@quickly
@given(batch=batches, rows=sides, columns=sides, seed=seeds, beta2=st.sampled_from([0.0, 0.95]))
def test_a_batch_is_its_slices(batch: int, rows: int, columns: int, seed: int, beta2: float) -> None:
    weights, gradients = draw(seed, 2, (batch, 2, rows, columns))
    flat = [list(step[0].flatten(0, 1)) for step in gradients]
    together: Grouping = lambda parameters: [{"params": parameters, "orthogonalize": True, "batched": True}]  # noqa: E731
    (moved,), optimizer = run(weights, gradients, together, betas=(0.9, beta2))
    alone, _ = run(list(weights[0].flatten(0, 1)), flat, one_group("ortho"), betas=(0.9, beta2))
    assert_same(to_array(moved.flatten(0, 1)), np.stack(arrays(alone)), scale=10.0, operations=ROUNDINGS)
    (state,) = optimizer.state.values()
    assert ("row_exp_avg_sq" in state) == (beta2 > 0)
    assert beta2 == 0 or state["row_exp_avg_sq"].shape == (batch, 2, rows, 1)


@quickly
@given(rows=sides, columns=sides, seed=seeds, beta2=st.floats(0.01, 0.99))
def test_after_the_first_step_all_rows_are_equally_long_and_the_whole_is_as_without(
    rows: int, columns: int, seed: int, beta2: float
) -> None:
    weights, gradients = [torch.zeros(rows, columns, dtype=torch.float64)], draw(seed, 1, (rows, columns))[1]
    even, plain = (
        to_array(run(weights, gradients, one_group("ortho"), betas=(0.9, b), weight_decay=0.0, eps=1e-30)[0][0])
        for b in (beta2, 0.0)
    )
    whole = np.sqrt(np.sum(plain**2))
    assert_same(np.sqrt(np.sum(even**2, axis=1)), np.full(rows, whole / np.sqrt(rows)), operations=ROUNDINGS)


@quickly
@given(rows=sides, extra=st.integers(0, 6), seed=seeds)
def test_rows_of_an_exact_wide_polar_factor_are_even_already(rows: int, extra: int, seed: int) -> None:
    columns = rows + extra
    weights = [torch.zeros(rows, columns, dtype=torch.float64)]
    well_conditioned = rotation(seed, rows) @ torch.diag(torch.linspace(1, 2, rows, dtype=torch.float64))
    gradient = well_conditioned @ rotation(seed + 1, columns)[:rows]
    both = [
        run(weights, [[gradient]], one_group("ortho"), betas=(0.9, beta2), weight_decay=0.0, iters=10)[0][0]
        for beta2 in (0.0, 0.95)
    ]
    assert_same(*arrays(both), scale=0.01, operations=ROUNDINGS)


@quickly
@given(rows=sides, columns=sides, seed=seeds, target_rms=st.floats(0.01, 1), lr=st.floats(1e-4, 1), wide=st.booleans())
def test_the_root_mean_square_of_an_exact_update_is_the_target_times_the_rate(
    rows: int, columns: int, seed: int, target_rms: float, lr: float, wide: bool
) -> None:
    n = min(rows, columns)
    shape = (n, rows + columns) if wide else (rows + columns, n)
    left, _, right = torch.linalg.svd(normal(shape, seed, dtype=torch.float64), full_matrices=False)
    weights = [torch.zeros(shape, dtype=torch.float64)]
    (moved,), _ = run(
        weights, [[left @ right]], one_group("ortho"), lr=lr, target_rms=target_rms, weight_decay=0.0, iters=10
    )
    assert_same(np.sqrt(np.mean(to_array(moved) ** 2)), target_rms * lr, operations=ROUNDINGS)


@quickly
@given(rows=sides, columns=sides, batch=batches, seed=seeds, iters=st.integers(1, 12))
def test_both_forms_are_the_same_polynomial(rows: int, columns: int, batch: int, seed: int, iters: int) -> None:
    u = normal((batch, rows, columns), seed, dtype=torch.float64)
    table = polar_express.coefficients(iters, *BOUNDS)
    both = [polar.polar_factor(u, table, 0.02, 1e-8, torch.float64, form) for form in ("standard", "gram")]
    assert_same(*arrays(both), scale=1.0, operations=1 << 28)


@quickly
@given(rows=sides, columns=sides, seed=seeds)
def test_a_transposed_matrix_gets_the_transposed_update(rows: int, columns: int, seed: int) -> None:
    weights, gradients = draw(seed, 2, (rows, columns))
    (moved,), _ = run(weights, gradients, one_group("ortho"), betas=(0.9, 0.0))
    turned_gradients = [[g.mT for g in step] for step in gradients]
    (turned,), _ = run([weights[0].mT], turned_gradients, one_group("ortho"), betas=(0.9, 0.0))
    assert_same(to_array(turned.mT), to_array(moved), scale=10.0, operations=ROUNDINGS)


# Every kind


@kinds
@quickly
@given(seed=seeds, decay=st.floats(0.01, 2), shape=st.sampled_from([(4, 3), (3, 5), (2, 3, 2, 2)]))
def test_misaligned_entries_move_as_without_decay(kind: str, seed: int, decay: float, shape: tuple[int, ...]) -> None:
    weights, gradients = draw(seed, 1, shape)
    (plain,), _ = run(weights, gradients, one_group(kind), weight_decay=0.0)
    (decayed,), _ = run(weights, gradients, one_group(kind), weight_decay=decay)
    outward = (plain - weights[0]).sign() == weights[0].sign()
    assert torch.equal(decayed[outward], plain[outward])
    assert not (decayed == plain)[~outward].any()


@kinds
@quickly
@given(seed=seeds, decay=st.floats(0, 1), beta2=st.sampled_from([0.0, 0.95]), steps=st.integers(1, 3))
def test_zero_gradients_leave_the_decay_alone(kind: str, seed: int, decay: float, beta2: float, steps: int) -> None:
    weights, _ = draw(seed, 0, (4, 3))
    gradients = [[torch.zeros(4, 3, dtype=torch.float64)]] * steps
    (moved,), _ = run(weights, gradients, one_group(kind), betas=(0.9, beta2), weight_decay=decay)
    if decay == 0:
        assert torch.equal(moved, weights[0])
    elif kind != "free" or steps == 1:  # y of a schedule-free parameter also goes to z
        rate = 0.01 * (0.2 * 2 if kind == "ortho" else 1) * decay
        assert_same(to_array(moved), to_array(weights[0]) * (1 - rate) ** steps)
    assert bool((moved.abs() <= weights[0].abs()).all())


@quickly
@given(seed=seeds, beta1=st.floats(0.1, 0.99), steps=st.integers(1, 4))
def test_a_zero_gradient_draws_y_to_z(seed: int, beta1: float, steps: int) -> None:
    weights, gradients = draw(seed, steps, (6,))
    _, optimizer = run(weights, gradients, one_group("free"), betas=(beta1, 0.0), weight_decay=0.0)
    (state,) = optimizer.state.values()
    z, share = state["z"].clone(), 1 / (steps + 1)
    parameter = optimizer.param_groups[0]["params"][0]
    parameter.grad = torch.zeros(6, dtype=torch.float64)
    before = parameter.detach().clone()
    optimizer.step()
    assert torch.equal(state["z"], z)
    assert_same(to_array(parameter), to_array(before + share * (z - before)), scale=10.0)


@kinds
@quickly
@given(seed=seeds, shapes=st.lists(st.sampled_from([(4, 3), (3, 4), (2, 2, 2), (1, 5)]), min_size=2, max_size=5))
def test_how_parameters_are_grouped_does_not_matter(kind: str, seed: int, shapes: list[tuple[int, ...]]) -> None:
    weights, gradients = draw(seed, 2, *shapes)
    together, _ = run(weights, gradients, one_group(kind))
    alone, _ = run(weights, gradients, lambda parameters: [{"params": [p], **KINDS[kind]} for p in parameters])
    for one, other in zip(*map(arrays, (together, alone)), strict=True):
        assert_same(one, other, scale=10.0, operations=ROUNDINGS)


@kinds
@pytest.mark.parametrize("layout", [name for name in inputs.LAYOUTS if name not in {"contiguous", "expanded"}])
def test_the_layout_of_parameters_and_gradients_does_not_matter(kind: str, layout: str) -> None:
    weights, gradients = draw(0, 2, (4, 6), (6, 4), (4, 3, 2, 2))
    moved, _ = run(weights, gradients, one_group(kind))
    laid = [torch.nn.Parameter(inputs.lay_out(w.clone(), layout)) for w in weights]
    optimizer = THORN(one_group(kind)([*laid]), lr=0.01)
    for step in gradients:
        for parameter, gradient in zip(laid, step, strict=True):
            parameter.grad = inputs.lay_out(gradient, layout)
        optimizer.step()
    for one, other in zip(moved, laid, strict=True):
        assert_same(to_array(other), to_array(one), scale=10.0, operations=ROUNDINGS)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_run_twice_gives_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    weights, gradients = draw(3, 3, (12, 20), (12, 20), (20, 12))
    narrow = [w.to(dtype) for w in weights], [[g.to(dtype) for g in step] for step in gradients]
    first, second = (run(*narrow, one_group(kind))[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Gradient release


@kinds
@quickly
@given(seed=seeds, steps=st.integers(1, 3))
def test_gradient_release_with_every_backward_an_update_is_the_ordinary_step(kind: str, seed: int, steps: int) -> None:
    weights, gradients = draw(seed, steps, (4, 3), (4, 3))
    moved, _ = run(weights, gradients, one_group(kind))
    model = torch.nn.ParameterList([torch.nn.Parameter(w.clone()) for w in weights])
    optimizer = THORN(one_group(kind)(list(model)), lr=0.01)
    optimizer.setup_gradient_release(model)
    for step in gradients:
        torch.autograd.backward(list(model), step)
    for one, other in zip(moved, model, strict=True):
        assert_same(to_array(other), to_array(one), scale=10.0, operations=ROUNDINGS)


@pytest.mark.parametrize("kind", ["free", "adam"])
@quickly
@given(seed=seeds, rate=st.integers(2, 5))
def test_a_window_of_equal_gradients_is_one_step_with_it(kind: str, seed: int, rate: int) -> None:
    """In the first window every u of equal gradients is the sign, and so is their mean."""
    weights, gradients = draw(seed, 1, (5,))
    moved, _ = run(weights, gradients, one_group(kind), eps=1e-300)
    model = torch.nn.ParameterList([torch.nn.Parameter(w.clone()) for w in weights])
    optimizer = THORN(one_group(kind)(list(model)), lr=0.01, eps=1e-300)
    optimizer.setup_gradient_release(model, update_rate=rate)
    for _ in range(rate):
        torch.autograd.backward(list(model), gradients[0])
    assert_same(to_array(model[0]), to_array(moved[0]), scale=10.0, operations=1 << 10)
