"""Packages that nobody here wrote must agree with THORN: schedulefree, torch's RAdam and Muon, and the SVD.

In float64 both run free to the same place. Where the other computes in float32 or bfloat16 only, or approximates, the
budgets of the reference decide.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import schedulefree
import torch
from torch import Tensor, nn

from trysquare import THORN
from trysquare.ops import polar, polar_express
from trysquare_conformance.behaviour import normal
from trysquare_conformance.behaviour_thorn import budgets
from trysquare_conformance.budget import assert_same, judge
from trysquare_conformance.case import Array
from trysquare_conformance.snapshots import to_array

STEPS = 60
SHAPES = [(6, 10), (9, 4), (12,)]
ROUNDINGS = 64 * STEPS
EPS = 1e-30
"""Adam's, where another divides by √v + ε before the correction and not after it."""

MUON = getattr(torch.optim, "Muon", None)
without_muon = pytest.mark.skipif(MUON is None, reason=f"torch {torch.__version__} has no torch.optim.Muon")


def parameters(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[nn.Parameter]:
    return [nn.Parameter(normal(shape, 0, i, dtype)) for i, shape in enumerate(shapes)]


def step(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], number: int) -> None:
    for i, p in enumerate(params):
        p.grad = normal(tuple(p.shape), number + 1, i, p.dtype)
    optimizer.step()


def largest(params: Sequence[Tensor]) -> float:
    return max(float(p.detach().abs().max()) for p in params)


# schedulefree


def averaged(dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[list[nn.Parameter], THORN]:
    params = parameters(SHAPES, dtype)
    optimizer = THORN([{"params": params, "orthogonalize": False}], weight_decay=0.0, **settings)
    return params, optimizer


ORACLES: dict[str, tuple[Callable[..., Any], bool]] = {
    "AdamWScheduleFree": (schedulefree.AdamWScheduleFree, False),
    "RAdamScheduleFree": (schedulefree.RAdamScheduleFree, True),
}


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.95, 0.95), (0.5, 0.999)])
@pytest.mark.parametrize("name", ORACLES)
def test_what_is_not_orthogonalized_is_schedulefree(name: str, betas: tuple[float, float], foreach: bool) -> None:
    """Trained and averaged weights, z and v, with a learning rate that rises and falls.

    RAdamScheduleFree in its silent phase: the first steps move nothing there too.
    """
    make, rectify = ORACLES[name]
    theirs, ours = parameters(SHAPES, torch.float64), averaged(lr=0.01, betas=betas, rectify=rectify, eps=1e-8)
    silent = {"silent_sgd_phase": True} if rectify else {}
    oracle = make(theirs, lr=0.01, betas=betas, eps=1e-8, weight_decay=0.0, foreach=foreach, **silent)
    oracle.train()
    params, optimizer = ours
    for number in range(STEPS):
        rate = 0.01 * (1 + np.sin(number / 5))
        oracle.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] = float(rate)
        step(oracle, theirs, number)
        step(optimizer, params, number)
        for p, q in zip(params, theirs, strict=True):
            assert_same(to_array(p), to_array(q), scale=largest(theirs), operations=ROUNDINGS)
    for p, q in zip(params, theirs, strict=True):
        mine, other = optimizer.state[p], oracle.state[q]
        assert_same(to_array(mine["z"]), to_array(other["z"]), scale=largest([other["z"]]), operations=ROUNDINGS)
        assert_same(to_array(mine["exp_avg_sq"]), to_array(other["exp_avg_sq"]), operations=ROUNDINGS)
    oracle.eval()
    optimizer.eval()
    for p, q in zip(params, theirs, strict=True):
        assert_same(to_array(p), to_array(q), scale=4 * largest(theirs), operations=ROUNDINGS)


def test_schedulefree_would_be_noticed_elsewhere() -> None:
    """Not an agreement of things that do not move: another β₁ goes elsewhere."""
    (p, *_), optimizer = averaged(lr=0.01, betas=(0.9, 0.99))
    theirs = parameters(SHAPES, torch.float64)
    oracle = schedulefree.AdamWScheduleFree(theirs, lr=0.01, betas=(0.8, 0.99), weight_decay=0.0)
    oracle.train()
    for number in range(3):
        step(oracle, theirs, number)
        step(optimizer, optimizer.param_groups[0]["params"], number)
    with pytest.raises(AssertionError):
        assert_same(to_array(p), to_array(theirs[0]), scale=largest(theirs), operations=ROUNDINGS)


# torch.optim.RAdam


@pytest.mark.parametrize("beta2", [0.95, 0.99, 0.999])
def test_rectification_is_radams(beta2: float) -> None:
    """torch waits until ρ > 5, and until then takes steps of SGD; the paper's 4, and ours, is reached in step 5."""
    theirs, ours = parameters(SHAPES, torch.float64), parameters(SHAPES, torch.float64)
    oracle = torch.optim.RAdam(theirs, lr=0.01, betas=(0.9, beta2), eps=EPS)
    group = {"params": ours, "orthogonalize": False, "schedule_free": False}
    optimizer = THORN([group], lr=0.01, betas=(0.9, beta2), eps=EPS, weight_decay=0.0, rectify=True)
    moves = []
    for number in range(STEPS):
        before = [to_array(p) for p in theirs], [to_array(p) for p in ours]
        step(oracle, theirs, number)
        step(optimizer, ours, number)
        for p, q, old, own in zip(ours, theirs, before[1], before[0], strict=True):
            moved = to_array(p) - old
            moves.append(bool(moved.any()))
            if number >= 5:
                assert_same(moved, to_array(q) - own, scale=4.0 * largest(theirs), operations=ROUNDINGS)
    silent = 4 * len(SHAPES)
    assert moves == [False] * silent + [True] * (len(moves) - silent)


# The singular value decomposition


def conditioned(u: Tensor) -> Tensor:
    """With the same singular vectors, and singular values from 0.1 to 1."""
    left, values, right = torch.linalg.svd(u, full_matrices=False)
    return left * torch.linspace(1.0, 0.1, values.shape[-1], dtype=u.dtype) @ right


def exact_polar(u: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(u, full_matrices=False)
    return left @ right


@pytest.mark.parametrize("form", ["standard", "gram"])
@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (30, 20)])
def test_the_polar_factor_is_the_svds(form: str, shape: tuple[int, int]) -> None:
    """Eight quintics bring every singular value from 1e-3 on to 1 within 2e-14: to rounding."""
    table = polar_express.coefficients(8, 1e-3, 0.02, 0.02)
    u = conditioned(normal((3, *shape), 0, dtype=torch.float64))
    found = polar.polar_factor(u, table, 0.02, 1e-8, torch.float64, form)
    assert_same(to_array(found), to_array(exact_polar(u)), scale=1.0, operations=1 << 16)


@pytest.mark.parametrize("target_rms", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (6, 3, 2, 2)])
def test_a_step_of_a_matrix_is_along_the_svds_polar_factor(shape: tuple[int, ...], target_rms: float) -> None:
    (p,) = parameters([shape], torch.float64)
    optimizer = THORN(
        [{"params": [p], "orthogonalize": True}], betas=(0.0, 0.0), weight_decay=0.0, iters=8, target_rms=target_rms
    )
    before = to_array(p)
    step(optimizer, [p], 0)
    u = normal(shape, 1, 0, torch.float64).flatten(1)
    rows, columns = u.shape
    scale = target_rms * max(rows, columns) ** 0.5 if target_rms else max(1.0, rows / columns) ** 0.5
    expected = before.reshape(rows, columns) - 1e-3 * scale * to_array(exact_polar(u))
    assert_same(to_array(p).reshape(rows, columns), expected, scale=1.0 + np.abs(before).max(), operations=1 << 14)


# torch.optim.Muon


COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""Muon's own, for all of its five iterations; `ns_coefficients` says the same."""


def muon_like(params: Sequence[nn.Parameter], **settings: Any) -> THORN:
    group = {"params": params, "orthogonalize": True, "coefficients": [COEFFICIENTS] * 5}
    fixed = {"weight_decay": 0.0, "safety_factor": 0.0, "eps": 1e-7, "matmul_dtype": torch.bfloat16}
    return THORN([group], **{**fixed, **settings})


ADJUSTMENTS = {"original": 0.0, "match_rms_adamw": 0.2}


@without_muon
@pytest.mark.parametrize("adjustment", ADJUSTMENTS)
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.95])
def test_without_rows_a_matrix_is_muons(momentum: float, adjustment: str) -> None:
    """Momentum, Nesterov and scale: what Muon moves by is within what honest bfloat16 products may make of ours.

    Its momentum is a mean, ours a sum: 1 − β₁ times as large, which the normalisation takes away.
    """
    shapes, count = [(24, 40), (40, 24), (32, 32)], 4
    theirs, ours = parameters(shapes, torch.float32), parameters(shapes, torch.float32)
    oracle = MUON(  # type: ignore[misc]
        theirs, lr=0.01, weight_decay=0.0, momentum=momentum, nesterov=True, adjust_lr_fn=adjustment
    )
    assert oracle.defaults["ns_coefficients"] == COEFFICIENTS
    settings = {"betas": (momentum, 0.0), "target_rms": ADJUSTMENTS[adjustment], "lr": 0.01}
    optimizer = muon_like(ours, **settings)
    gradients: list[list[Array]] = [[] for _ in shapes]
    for number in range(count):
        step(oracle, theirs, number)
        step(optimizer, ours, number)
        for i, shape in enumerate(shapes):
            gradients[i].append(to_array(normal(shape, number + 1, i)))
    (group,) = optimizer.param_groups
    start = parameters(shapes, torch.float32)
    for p, q, begun, given in zip(ours, theirs, start, gradients, strict=True):
        allowed = budgets(group, p, to_array(begun), given, draws=16)["parameter"]
        assert judge(allowed, to_array(p)).worst <= 1
        assert judge(allowed, to_array(q)).worst <= 1


@without_muon
def test_another_momentum_than_muons_would_be_noticed() -> None:
    theirs, ours = parameters([(24, 40)], torch.float32), parameters([(24, 40)], torch.float32)
    start = to_array(ours[0])
    oracle = MUON(theirs, lr=0.01, weight_decay=0.0, momentum=0.5, adjust_lr_fn="original")  # type: ignore[misc]
    optimizer = muon_like(ours, betas=(0.95, 0.0), target_rms=0.0, lr=0.01)
    for number in range(4):
        step(oracle, theirs, number)
    gradients = [to_array(normal((24, 40), number + 1, 0)) for number in range(4)]
    (group,) = optimizer.param_groups
    assert judge(budgets(group, ours[0], start, gradients, draws=16)["parameter"], to_array(theirs[0])).worst > 1
