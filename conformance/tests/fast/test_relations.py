"""Relations that hold whatever the numbers are: how parameters are grouped, batched, cut and laid out does not matter.

Where a relation holds up to rounding, both sides are held to the budget that the reference sets for the plain side.
Matrices of one column are left out: their projected gradient is nothing but rounding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from trysquare import DolphinFlow
from trysquare_conformance import inputs
from trysquare_conformance.behaviour import (
    Result,
    all_parameters,
    assert_honest,
    bits,
    budgets,
    normal,
    parameters,
    progress,
)
from trysquare_conformance.budget import STORED, Wrap, judge, measure
from trysquare_conformance.noise import FLOAT32
from trysquare_conformance.snapshots import to_array
from trysquare_reference.projection import project_rows

SHAPES = [(5, 7), (5, 7), (3,), (5, 7), (2, 3, 2, 2), (5, 7), (5, 7), (5, 7), (3,), (1, 9)]
STEPS = 2
MODES = ("vector", "matrix", None)
quickly = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Trial:
    """A start, gradients for a few steps, and what the reference allows after them."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], *, seed: int = 0, **hyperparameters: Any) -> None:
        self.hyperparameters = {"lr": 0.01, **hyperparameters}
        self.start = [p.detach() for p in parameters(shapes, seed=seed)]
        steps = range(seed + 1, seed + 1 + STEPS)
        self.gradients = [[normal(tuple(w.shape), s, i) for i, w in enumerate(self.start)] for s in steps]
        self.allowed = budgets(self.start, self.gradients, **self.hyperparameters)

    def run(
        self,
        group: Callable[[list[Tensor]], Any] = lambda params: params,
        lay_out: Callable[[Tensor], Tensor] = torch.clone,
        **execution: Any,
    ) -> None:
        """Step copies of the start, grouped and laid out in some way; the results must be honest."""
        params = [torch.nn.Parameter(lay_out(w)) for w in self.start]
        optimizer = DolphinFlow(group(params), **self.hyperparameters, **execution)
        for gradients in self.gradients:
            for p, g in zip(params, gradients, strict=True):
                p.grad = lay_out(g)
            before = [bits(p.grad) for p in params]
            optimizer.step()
            assert [bits(p.grad) for p in params] == before
        assert_honest(Result.of(optimizer, params), self.allowed)


@pytest.fixture(scope="module", params=MODES, ids=str)
def trial(request: pytest.FixtureRequest) -> Trial:
    """One start for each mode."""
    return Trial(SHAPES, ortho_mode=request.param)


GROUPINGS: dict[str, Callable[[list[Tensor]], Any]] = {
    "one group": lambda params: params,
    "a group each": lambda params: [{"params": [p]} for p in params],
    "two groups": lambda params: [{"params": params[::2]}, {"params": params[1::2]}],
    "reversed": lambda params: params[::-1],
}


@pytest.mark.parametrize("name", GROUPINGS)
def test_grouping_changes_nothing_but_rounding(trial: Trial, name: str) -> None:
    trial.run(GROUPINGS[name])


@pytest.mark.parametrize("workspace", [1, 1 << 8, 1 << 12, 1 << 14, 1 << 30])
def test_the_workspace_changes_nothing_but_rounding(trial: Trial, workspace: int) -> None:
    """From row by row to all in one batch."""
    trial.run(workspace_bytes=workspace)


@pytest.mark.parametrize("layout", [name for name in inputs.LAYOUTS if name not in {"contiguous", "expanded"}])
@pytest.mark.parametrize("workspace", [1, None])
def test_the_layout_changes_nothing_but_rounding(trial: Trial, layout: str, workspace: int | None) -> None:
    trial.run(lay_out=lambda x: inputs.lay_out(x.clone(), layout), workspace_bytes=workspace)


@pytest.mark.parametrize("layout", [name for name in inputs.LAYOUTS if name != "contiguous"])
def test_the_layout_of_the_gradient_alone_changes_nothing(layout: str) -> None:
    plain, odd = (DolphinFlow(parameters(SHAPES), lr=0.01, ortho_mode=None) for _ in range(2))
    for p, q in zip(all_parameters(plain), all_parameters(odd), strict=True):
        q.grad = inputs.lay_out(p.grad, layout)
        p.grad = q.grad.contiguous()
    plain.step()
    odd.step()
    assert progress(odd) == progress(plain)


def test_rows_of_a_wider_tensor_leave_its_other_columns_alone() -> None:
    wide = normal((6, 10), 0)
    kept = bits(wide[:, 5:])
    p = torch.nn.Parameter(wide[:, :5])
    p.grad = normal((6, 5), 1)
    before = bits(p)
    DolphinFlow([p], lr=0.1).step()
    assert bits(p) != before
    assert bits(wide[:, :5]) == bits(p)
    assert bits(wide[:, 5:]) == kept


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("project", ["gradient", "update"])
def test_permuting_rows_commutes_with_a_step(mode: str | None, project: str) -> None:
    trial = Trial([(9, 6), (4, 3, 2)], ortho_mode=mode, project=project)
    orders = [torch.from_numpy(np.random.default_rng(i).permutation(len(w))) for i, w in enumerate(trial.start)]
    params = [torch.nn.Parameter(w[order]) for w, order in zip(trial.start, orders, strict=True)]
    optimizer = DolphinFlow(params, **trial.hyperparameters)
    for gradients in trial.gradients:
        for p, g, order in zip(params, gradients, orders, strict=True):
            p.grad = g[order]
        optimizer.step()
    outputs = Result.of(optimizer).outputs
    for name, values in outputs.items():
        if not name.startswith("step"):
            outputs[name] = values[np.argsort(orders[int(name.partition("/")[2])].numpy())]
    assert_honest(Result(outputs), trial.allowed)


# The projection, as the state shows it


def projected(w: Tensor, g: Tensor) -> Tensor:
    """g̃: without momentum the buffer holds it after one step."""
    p = torch.nn.Parameter(w.clone())
    p.grad = g
    optimizer = DolphinFlow([p], momentum=0.0, gradient_clipping=None)
    optimizer.step()
    buffer: Tensor = optimizer.state[p]["momentum_buffer"]
    return buffer


shapes = st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple).filter(lambda s: np.prod(s[1:]) > 1)
seeds = st.integers(0, 2**20)


@quickly
@given(shape=shapes, seed=seeds, along=st.sampled_from([0.0, 1.0, 1e3]))
def test_what_is_left_of_a_gradient_is_orthogonal_to_the_weights(
    shape: tuple[int, ...], seed: int, along: float
) -> None:
    """⟨w, g̃⟩ = 0 for every row, however parallel they were."""
    w = normal(shape, seed)
    g = along * w + normal(shape, seed, 1)

    def products(wrap: Wrap) -> dict[str, Any]:
        rows = tuple(range(1 - len(shape), 0))  # from the end: the draws are in front
        return {"product": np.sum(to_array(w) * np.asarray(project_rows(wrap(to_array(g)), wrap(to_array(w)))), rows)}

    left = np.sum(to_array(w) * to_array(projected(w, g)), tuple(range(1, len(shape))))
    budget = measure(products, FLOAT32, {"product": STORED["float32"]}, seed=0)
    assert judge(budget["product"], left).right


@quickly
@given(shape=shapes, seed=seeds)
def test_projecting_twice_is_projecting_once(shape: tuple[int, ...], seed: int) -> None:
    """Both are P(g) to the reference: what rounding has left along the weights is nothing but rounding."""
    w, g = normal(shape, seed), normal(shape, seed, 1)
    once = projected(w, g)
    hyperparameters: dict[str, Any] = {"momentum": 0.0, "gradient_clipping": None}
    allowed = budgets([w], [[g]], **hyperparameters)["momentum_buffer/0"]
    assert judge(allowed, to_array(once)).right
    assert judge(allowed, to_array(projected(w, once))).right


# Everything at once

hyperparameters = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-6, 1.0),
        "weight_decay": st.floats(0.0, 0.5),
        "momentum": st.floats(0.0, 0.99),
        "beta2": st.floats(0.0, 0.999),
        "eps": st.floats(1e-10, 1e-2),
        "ns_steps": st.integers(1, 5),
        "ortho_mode": st.sampled_from(MODES),
        "adaptive_lr": st.booleans(),
        "project": st.sampled_from(["gradient", "update"]),
        "bias_correction": st.booleans(),
        "gradient_clipping": st.none() | st.floats(1e-3, 10.0),
    }
)
sometimes_equal = st.lists(shapes | st.just((2, 5)) | st.just((3,)) | st.just(()), min_size=1, max_size=6)


@quickly
@given(
    shapes=sometimes_equal,
    seed=seeds,
    hyperparameters=hyperparameters,
    grouping=st.sampled_from([*GROUPINGS]),
    layout=st.sampled_from([name for name in inputs.LAYOUTS if name != "expanded"]),
    workspace=st.none() | st.integers(1, 1 << 12),
)
def test_any_way_to_run_it_is_honest(
    shapes: list[tuple[int, ...]],
    seed: int,
    hyperparameters: dict[str, Any],
    grouping: str,
    layout: str,
    workspace: int | None,
) -> None:
    trial = Trial(shapes, seed=seed, **hyperparameters)
    trial.run(GROUPINGS[grouping], lambda x: inputs.lay_out(x.clone(), layout), workspace_bytes=workspace)
