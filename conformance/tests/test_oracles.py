"""Two optimizers that nobody here wrote must agree with us step by step: `dolphinflow` 0.2.0 and `torch.optim.SGD`.

Teacher-forced: before each of 100 steps ours is given the oracle's parameters and state. After it both must lie within
the budget that the reference makes for itself in float32, so the oracle holds the reference and the fast code at once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

import numpy as np
import pytest
import torch

from trysquare import DolphinFlow
from trysquare_conformance import originals
from trysquare_conformance.budget import STORED, Budget, Wrap, assert_same, judge, measure
from trysquare_conformance.case import Array, Outputs
from trysquare_conformance.noise import FLOAT32
from trysquare_conformance.snapshots import Snapshot, rounded, to_array, to_tensor
from trysquare_reference import dolphinflow as reference

STEPS = 100
DRAWS = 8  # a hundred budgets a test: fewer draws make each of them wider, not falser
Hyperparameters = reference.Hyperparameters
Original = Callable[..., torch.optim.Optimizer]
Advance = Callable[[torch.optim.Optimizer], None]


def as_published(mode: Literal["vector", "matrix"] | None, adaptive: bool) -> Hyperparameters:
    """What makes ours the package: its order of projection, no bias correction, no clipping (it never clips)."""
    return Hyperparameters(
        lr=1e-3,
        ortho_mode=mode,
        adaptive_lr=adaptive,
        project="update",
        bias_correction=False,
        gradient_clipping=None,
    )


def as_sgd(weight_decay: float) -> Hyperparameters:
    return Hyperparameters(
        lr=1e-2, ortho_mode=None, adaptive_lr=False, gradient_clipping=None, weight_decay=weight_decay
    )


def shapes_for(hp: Hyperparameters) -> list[tuple[int, ...]]:
    """The package's matrix mode refuses convolutions."""
    return [(6, 10), (9, 4), (12,)] if hp.ortho_mode == "matrix" else [(6, 10), (5, 3, 2, 2), (12,)]


def draw(hp: Hyperparameters, dtype: str) -> tuple[list[Array], list[list[Array]]]:
    """Weights, and for every step gradients that in half of the steps are nearly parallel to those weights."""
    rng = np.random.default_rng(0)
    weights = [rounded(rng.standard_normal(shape), dtype) for shape in shapes_for(hp)]
    along = [3.0 * (step % 2) for step in range(STEPS)]
    gradients = [[rounded(a * w + rng.standard_normal(w.shape), dtype) for w in weights] for a in along]
    return weights, gradients


def parameters(weights: Sequence[Array], dtype: str) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(to_tensor(w, dtype)) for w in weights]


def ours(weights: Sequence[Array], dtype: str, hp: Hyperparameters) -> torch.optim.Optimizer:
    return DolphinFlow(parameters(weights, dtype), **asdict(hp))


def all_parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def step(optimizer: torch.optim.Optimizer, gradients: Sequence[Array]) -> None:
    """The package writes into the gradients that it is given: every optimizer gets its own."""
    for p, g in zip(all_parameters(optimizer), gradients, strict=True):
        p.grad = torch.from_numpy(g).to(p.dtype)
    optimizer.step()


def snapshot(optimizer: torch.optim.Optimizer, hp: Hyperparameters, steps: int) -> Snapshot:
    """Parameters and state; before its first step an oracle has no state, which is zero."""
    states = []
    for p in all_parameters(optimizer):
        state = reference.init(np.zeros(p.shape), hp)
        held = {name: to_array(x) for name, x in optimizer.state[p].items() if isinstance(x, torch.Tensor)}
        states.append({**state, **held, "step": steps})
    return Snapshot(tuple(to_array(p) for p in all_parameters(optimizer)), tuple(states))


def load(optimizer: torch.optim.Optimizer, before: Snapshot) -> None:
    """Put a snapshot into ours."""
    for p, weights, state in zip(all_parameters(optimizer), before.parameters, before.states, strict=True):
        p.data.copy_(to_tensor(weights, "float32"))
        tensors = {name: to_tensor(x, "float32") for name, x in state.items() if name != "step"}
        optimizer.state[p] = {"step": torch.tensor(state["step"], dtype=torch.float64), **tensors}


def named(after: Snapshot) -> Outputs:
    """Parameters and state tensors by name."""
    parts = [{"parameter": p, **state} for p, state in zip(after.parameters, after.states, strict=True)]
    return {f"{name}/{i}": np.asarray(x) for i, part in enumerate(parts) for name, x in part.items() if name != "step"}


def budgets(before: Snapshot, gradients: Sequence[Array], hp: Hyperparameters) -> dict[str, Budget]:
    """What honest arithmetic may do in this step."""

    def run(wrap: Wrap) -> Outputs:
        wrapped = before.wrapped(wrap)
        stepped, states = reference.step(wrapped.parameters, [wrap(g) for g in gradients], wrapped.states, hp)
        return named(Snapshot(tuple(stepped), tuple(states)))

    stored = dict.fromkeys(named(before), STORED["float32"])
    return measure(run, FLOAT32, stored, seed=0, draws=DRAWS)


def teacher_forced(
    oracle: torch.optim.Optimizer, hp: Hyperparameters, before_step: Advance | None = None
) -> Iterator[tuple[str, float, float]]:
    """The margin of the oracle and ours, of every output of every step. `before_step` does what an oracle lacks."""
    weights, gradients = draw(hp, "float32")
    follower = ours(weights, "float32", hp)
    for t, gradient in enumerate(gradients):
        before = snapshot(oracle, hp, t)
        load(follower, before)
        if before_step is not None:
            before_step(oracle)
        step(oracle, gradient)
        step(follower, gradient)
        led, followed = (named(snapshot(each, hp, t + 1)) for each in (oracle, follower))
        for name, budget in budgets(before, gradient, hp).items():
            yield f"{name} in step {t + 1}", judge(budget, led[name]).worst, judge(budget, followed[name]).worst


def drift(oracle: torch.optim.Optimizer, hp: Hyperparameters) -> float:
    """Both run free for all steps from the same start: their distance over the way that they went."""
    weights, gradients = draw(hp, "float32")
    follower = ours(weights, "float32", hp)
    for gradient in gradients:
        step(oracle, gradient)
        step(follower, gradient)
    ends = zip(all_parameters(oracle), all_parameters(follower), weights, strict=True)
    gaps, ways = zip(*((to_array(a) - to_array(b), to_array(a) - w) for a, b, w in ends), strict=True)
    return norm(gaps) / norm(ways)


def norm(arrays: Sequence[Array]) -> float:
    return float(np.sqrt(sum(np.sum(np.square(array)) for array in arrays)))


@pytest.fixture(scope="module")
def original() -> Original:
    """The class of the published package."""
    reason = originals.missing()
    if reason:
        pytest.skip(reason)
    return originals.dolphinflow()


@pytest.mark.parametrize("adaptive", [True, False], ids=["adaptive", "plain"])
@pytest.mark.parametrize("mode", ["vector", "matrix", None])
def test_the_published_package_is_reproduced_step_by_step(
    original: Original,
    mode: Literal["vector", "matrix"] | None,
    adaptive: bool,
    record_property: Callable[[str, object], None],
) -> None:
    hp = as_published(mode, adaptive)
    settings: dict[str, Any] = {"lr": hp.lr, "ortho_mode": mode, "adaptive_lr": adaptive}

    def fresh() -> torch.optim.Optimizer:
        return original(parameters(draw(hp, "float32")[0], "float32"), **settings)

    margins = list(teacher_forced(fresh(), hp))
    name, led, followed = max(margins, key=lambda margin: max(margin[1:]))
    apart = drift(fresh(), hp)
    figures = {"worst output": name, "margin of the package": led, "margin of ours": followed, "drift": apart}
    for key, value in figures.items():
        record_property(key, value)
    print(f"{settings}: {figures}")
    assert max(led, followed) <= 1


def nesterov_sgd(hp: Hyperparameters, dtype: str) -> torch.optim.Optimizer:
    weights = parameters(draw(hp, dtype)[0], dtype)
    return torch.optim.SGD(weights, lr=hp.lr, momentum=hp.momentum, nesterov=True)


def decay_by_hand(hp: Hyperparameters) -> Advance:
    """SGD's own weight decay is not decoupled."""

    def decay(optimizer: torch.optim.Optimizer) -> None:
        for p in all_parameters(optimizer):
            p.data.mul_(1 - hp.lr * hp.weight_decay)

    return decay


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_mode_and_adaptivity_it_is_sgd_with_nesterov_momentum(weight_decay: float) -> None:
    hp = as_sgd(weight_decay)
    margins = list(teacher_forced(nesterov_sgd(hp, "float32"), hp, decay_by_hand(hp)))
    assert len(margins) == STEPS * 2 * len(shapes_for(hp))
    assert max(max(margin[1:]) for margin in margins) <= 1


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_in_float64_they_end_at_the_same_place(weight_decay: float) -> None:
    hp = as_sgd(weight_decay)
    weights, gradients = draw(hp, "float64")
    sgd, follower, decay = nesterov_sgd(hp, "float64"), ours(weights, "float64", hp), decay_by_hand(hp)
    for gradient in gradients:
        decay(sgd)
        step(sgd, gradient)
        step(follower, gradient)
    for p, q in zip(all_parameters(sgd), all_parameters(follower), strict=True):
        largest = np.abs(to_array(p)).max()
        assert_same(to_array(q), to_array(p), scale=largest, operations=4 * STEPS)


def test_the_oracle_would_notice_the_other_order_of_projection(original: Original) -> None:
    """What the package does is not what its README says: with the README's order the margins are far off."""
    hp = as_published("vector", adaptive=True)
    package = original(parameters(draw(hp, "float32")[0], "float32"), lr=hp.lr)
    margins = teacher_forced(package, replace(hp, project="gradient"))
    assert any(led > 1 for _, led, _ in margins)
