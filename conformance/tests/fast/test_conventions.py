"""What users of `torch.optim` expect of any optimizer: closures, scalers, missing gradients, names, no waiting."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from trysquare import DolphinFlow
from trysquare_conformance.behaviour import (
    Result,
    all_parameters,
    assert_honest,
    bits,
    budgets,
    everything,
    give_gradients,
    normal,
    nothing_changes,
    parameters,
    progress,
    run,
)

MODES = ("vector", "matrix", None)
NAN = float("nan")


# Closures


def test_a_closure_is_called_once_with_gradients_enabled() -> None:
    """As `torch.optim.LBFGS` calls it, also where the caller turned gradients off."""
    model, data = torch.nn.Linear(3, 1), normal((8, 3), 0)
    optimizer, seen = DolphinFlow(model.parameters(), lr=0.01), []

    def closure() -> Tensor:
        seen.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model(data).square().mean()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert seen == [True]
    assert isinstance(loss, Tensor)
    assert loss.requires_grad


def test_a_closure_gives_the_step_of_its_gradients() -> None:
    with_closure, without = DolphinFlow(parameters()), DolphinFlow(parameters())
    for p in all_parameters(with_closure):
        p.grad = None

    def closure() -> float:
        give_gradients(all_parameters(with_closure))
        return 0.5

    assert with_closure.step(closure) == 0.5
    assert without.step() is None
    assert progress(with_closure) == progress(without)


def test_it_minimises() -> None:
    optimizer = DolphinFlow([torch.nn.Parameter(normal((5,), 0))], lr=0.05, weight_decay=0.0)
    (p,) = all_parameters(optimizer)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (p - 1).square().sum()
        loss.backward()
        return loss.item()

    losses = [optimizer.step(closure) for _ in range(200)]
    assert losses[-1] < 0.01 * losses[0]


# Scalers


@pytest.mark.parametrize("policy", ["propagate", "skip", "raise"])
def test_a_scaler_unscales_and_passes_over(policy: str) -> None:
    """GradScaler's default path: it unscales the gradients, and calls `step` only if all are finite."""
    plain, scaled = (DolphinFlow(parameters(), lr=0.01, nonfinite=policy) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.zeros(()))
    run(plain, 1)
    give_gradients(all_parameters(scaled), seed=1, scale=2.0**10)
    scaler.step(scaled)
    scaler.update()
    assert progress(scaled) == progress(plain)
    give_gradients(all_parameters(scaled), seed=2, scale=2.0**10)
    all_parameters(scaled)[0].grad[0, 0] = NAN
    before = progress(scaled)
    scaler.step(scaled)
    scaler.update()
    assert progress(scaled) == before
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_training_as_in_torchs_recipe(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    data = torch.randn(64, 8)
    optimizer = DolphinFlow(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = (model(data) - data.sum(1, keepdim=True)).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# Kinds of parameters


def test_dtypes_live_side_by_side() -> None:
    """One optimizer of every dtype steps each as an optimizer of its own would."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    together = DolphinFlow(
        [p for dtype in dtypes for p in parameters([(4, 3), (4, 3)], dtype)], lr=0.01, gradient_clipping=None
    )
    alone = [DolphinFlow(parameters([(4, 3), (4, 3)], d), lr=0.01, gradient_clipping=None) for d in dtypes]
    for seed in range(3):
        for i in range(len(dtypes)):
            give_gradients(all_parameters(together)[2 * i : 2 * i + 2], seed=seed)
            give_gradients(all_parameters(alone[i]), seed=seed)
            alone[i].step()
        together.step()
    assert progress(together)["parameters"] == [bits for o in alone for bits in progress(o)["parameters"]]
    assert progress(together)["state"] == [state for o in alone for state in progress(o)["state"]]


def test_empty_parameters_only_count() -> None:
    empty = [(0,), (0, 3), (3, 0), (2, 0, 3)]
    for mode, policy in itertools.product(MODES, ("propagate", "skip", "raise")):
        optimizer = DolphinFlow(parameters(empty), ortho_mode=mode, nonfinite=policy)
        run(optimizer, 2)
        for p in all_parameters(optimizer):
            state = optimizer.state[p]
            assert state["step"] == 2
            assert state["momentum_buffer"].shape == state["exp_avg_sq"].shape == p.shape


@pytest.mark.parametrize("mode", MODES)
def test_numbers_are_parameters_too(mode: str | None) -> None:
    shapes = [(), (1,), (1, 1, 1), ()]
    settings: dict[str, Any] = {"lr": 0.01, "ortho_mode": mode, "project": "update"}
    optimizer = DolphinFlow(parameters(shapes), **settings)
    start = [p.detach().clone() for p in all_parameters(optimizer)]
    optimizer.step()
    assert_honest(Result.of(optimizer), budgets(start, [[p.grad for p in parameters(shapes)]], **settings))


def test_tied_weights_are_stepped_once() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(6, 4), torch.nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    tied = DolphinFlow(model.named_parameters(), lr=0.01)
    (p,) = all_parameters(tied)
    assert p is model[0].weight is model[1].weight
    alone = DolphinFlow([torch.nn.Parameter(p.detach().clone())], lr=0.01)
    model(torch.tensor([1, 2])).sum().backward()
    all_parameters(alone)[0].grad = p.grad.clone()
    tied.step()
    alone.step()
    assert progress(tied)["parameters"] == progress(alone)["parameters"]


def test_frozen_parameters_stay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))
    model[0].requires_grad_(False)
    optimizer = DolphinFlow(model.parameters(), lr=0.01)
    before = bits(model[0].weight)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert bits(model[0].weight) == before
    assert len(optimizer.state) == 2


# Groups


def test_groups_have_hyperparameters_of_their_own() -> None:
    """Each as an optimizer of its own would, as long as there is no common norm."""
    own: list[dict[str, Any]] = [
        {"lr": 0.1, "ortho_mode": None, "beta2": 0.9},
        {"weight_decay": 0.5, "ortho_mode": "matrix", "ns_steps": 3, "momentum": 0.5},
        {"adaptive_lr": False, "project": "update"},
        {"bias_correction": False, "eps": 1e-3, "lr": torch.tensor(0.2)},
    ]
    together = DolphinFlow(
        [{"params": parameters([(4, 3), (4, 3), (3,)]), **settings} for settings in own], gradient_clipping=None
    )
    alone = [DolphinFlow(parameters([(4, 3), (4, 3), (3,)]), gradient_clipping=None, **settings) for settings in own]
    for seed in range(3):
        for group, single in zip(together.param_groups, alone, strict=True):
            give_gradients(group["params"], seed=seed)
            give_gradients(all_parameters(single), seed=seed)
            single.step()
        together.step()
    assert progress(together)["parameters"] == [bits for o in alone for bits in progress(o)["parameters"]]
    assert progress(together)["state"] == [state for o in alone for state in progress(o)["state"]]


def test_a_single_tensor_may_be_a_group() -> None:
    (p,) = parameters([(4, 3)])
    assert all_parameters(DolphinFlow([{"params": p}])) == [p]


def test_groups_may_be_generators_and_named() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = DolphinFlow([{"params": model.named_parameters(), "name": "layer", "initial_lr": 1.0}])
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert optimizer.param_groups[0]["name"] == "layer"


# What a user can ask


def test_explain_says_what_each_parameter_gets() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.Linear(5, 2))
    first, second = ([(f"{i}.{name}", p) for name, p in layer.named_parameters()] for i, layer in enumerate(model))
    optimizer = DolphinFlow([{"params": first}, {"params": second, "ortho_mode": "matrix", "adaptive_lr": False}])
    plans = optimizer.explain()
    assert [(plan.name, plan.group, plan.shape) for plan in plans] == [
        ("0.weight", 0, (4, 3, 2, 2)),
        ("0.bias", 0, (4,)),
        ("1.weight", 1, (2, 5)),
        ("1.bias", 1, (2,)),
    ]
    assert [plan.rule for plan in plans] == [
        "gradient projected in 4 rows of 12",
        "fewer than two dimensions: not projected",
        "update orthogonalized as 2 x 5",
        "fewer than two dimensions: not projected",
    ]
    assert {plan.backend for plan in plans} == {"eager"}
    assert str(plans).splitlines()[0].split() == ["name", "group", "shape", "rule", "backend", "state_bytes"]
    assert len(str(plans).splitlines()) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("adaptive", [True, False])
def test_explain_counts_the_bytes_that_there_are(adaptive: bool, dtype: torch.dtype) -> None:
    optimizer = DolphinFlow(parameters(dtype=dtype), adaptive_lr=adaptive)
    with nothing_changes(optimizer):
        promised = [plan.state_bytes for plan in optimizer.explain()]
    run(optimizer, 1)
    kept = [optimizer.state[p].values() for p in all_parameters(optimizer)]
    assert promised == [sum(x.numel() * x.element_size() for x in state) for state in kept]


def test_without_names_places_are_told() -> None:
    optimizer = DolphinFlow([{"params": [p]} for p in parameters([(2, 2), (3,)])])
    assert [plan.name for plan in optimizer.explain()] == ["parameter 0 of group 0", "parameter 0 of group 1"]


def test_asking_changes_nothing() -> None:
    optimizer = DolphinFlow(parameters())
    run(optimizer, 1)
    with nothing_changes(optimizer):
        str(optimizer)
        str(optimizer.explain())
        optimizer.state_dict()
        everything(optimizer)


# Repetition


@pytest.mark.parametrize("mode", MODES)
def test_repeated_runs_give_the_same_bits(mode: str | None) -> None:
    first, second = (DolphinFlow(parameters([(64, 33)] * 3 + [(700, 50)]), ortho_mode=mode) for _ in range(2))
    run(first, 3)
    run(second, 3)
    assert progress(first) == progress(second)
