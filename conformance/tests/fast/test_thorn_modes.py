"""Train and eval mode: the averaged weights come and go bit for bit, and nothing is trained on from them."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trysquare import THORN
from trysquare_conformance.behaviour import (
    all_parameters,
    bits,
    everything,
    give_gradients,
    nothing_changes,
    parameters,
    progress,
    run,
)
from trysquare_conformance.behaviour_thorn import AVERAGED, KINDS, thorn
from trysquare_conformance.budget import assert_same
from trysquare_conformance.snapshots import to_array

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def others(optimizer: THORN, *, averaged: bool) -> list[Tensor]:
    """The parameters that have an average, or all others."""
    return [p for g in optimizer.param_groups for p in g["params"] if optimizer._averages(g) == averaged]


# What eval puts there


@dtypes
def test_eval_puts_the_averages_there_and_train_takes_them_away_again(dtype: torch.dtype) -> None:
    optimizer = thorn(dtype=dtype, lr=0.1)
    run(optimizer, 3)
    before = everything(optimizer)
    rest = [bits(p) for p in others(optimizer, averaged=False)]
    weights = [bits(p) for p in others(optimizer, averaged=True) if p.numel()]
    optimizer.eval()
    moved = [bits(p) for p in others(optimizer, averaged=True) if p.numel()]
    assert all(old != new for old, new in zip(weights, moved, strict=True))
    assert [bits(p) for p in others(optimizer, averaged=False)] == rest
    optimizer.train()
    assert everything(optimizer) == before


@pytest.mark.parametrize("kind", AVERAGED)
def test_what_is_evaluated_is_the_mean_of_all_z(kind: str) -> None:
    """At a constant rate every z counts the same."""
    optimizer, points = thorn((kind,), torch.float64, lr=0.125), []
    for step in range(6):
        run(optimizer, 1, first=step)
        points.append([to_array(optimizer.state[p]["z"]) for p in all_parameters(optimizer)])
    optimizer.eval()
    for i, p in enumerate(all_parameters(optimizer)):
        assert_same(to_array(p), sum(point[i] for point in points) / 6, scale=4.0)


@dtypes
def test_a_parameter_that_was_never_stepped_stays(dtype: torch.dtype) -> None:
    optimizer = thorn(("averaged",), dtype)
    before = [bits(p) for p in all_parameters(optimizer)]
    optimizer.eval()
    assert [bits(p) for p in all_parameters(optimizer)] == before
    assert not optimizer.state
    optimizer.train()
    rest = all_parameters(optimizer)[1:]
    for p in rest:
        p.grad = None
    optimizer.step()
    with optimizer.averaged():
        assert [bits(p) for p in rest] == before[1:]


def test_after_one_step_the_average_is_the_first_point() -> None:
    """x = z = y then: there is one z to average."""
    optimizer = thorn(AVERAGED, torch.float64)
    run(optimizer, 1)
    optimizer.eval()
    for p in all_parameters(optimizer):
        assert_same(to_array(p), to_array(optimizer.state[p]["z"]), scale=4.0)


# Idempotent, and exact


@dtypes
def test_modes_are_idempotent(dtype: torch.dtype) -> None:
    optimizer = thorn(dtype=dtype)
    run(optimizer, 2)
    with nothing_changes(optimizer):
        optimizer.train()
        optimizer.train()
    optimizer.eval()
    with nothing_changes(optimizer):
        optimizer.eval()
        optimizer.eval()


@pytest.mark.parametrize(
    ("dtype", "cycles"), [(dtype, 10_000 if dtype is torch.bfloat16 else 100) for dtype in DTYPES], ids=str
)
def test_ten_thousand_cycles_drift_by_nothing(dtype: torch.dtype, cycles: int) -> None:
    """Bits that one cycle leaves alone no later one can change: ten thousand of one dtype show that nothing counts."""
    optimizer = thorn(AVERAGED, dtype=dtype)
    run(optimizer, 3)
    before = everything(optimizer)
    optimizer.eval()
    evaluated = everything(optimizer)
    optimizer.train()
    for _ in range(cycles):
        optimizer.eval()
        optimizer.train()
    assert everything(optimizer) == before
    optimizer.eval()
    assert everything(optimizer) == evaluated


@pytest.mark.parametrize("kind", KINDS)
@dtypes
def test_a_look_at_the_averages_changes_no_run(kind: str, dtype: torch.dtype) -> None:
    straight, looked_at = (thorn((kind,), dtype) for _ in range(2))
    run(straight, 5)
    for step in range(5):
        with looked_at.averaged():
            pass
        run(looked_at, 1, first=step)
    assert progress(looked_at) == progress(straight)


def test_frozen_parameters_are_exchanged_too() -> None:
    optimizer = thorn(AVERAGED)
    run(optimizer, 2)
    before = everything(optimizer)
    for p in all_parameters(optimizer):
        p.requires_grad_(requires_grad=False)
    optimizer.eval()
    assert everything(optimizer)["parameters"] != before["parameters"]
    optimizer.train()
    assert everything(optimizer) == before


def test_special_values_come_back() -> None:
    """Negative zero, NaN with its payload, infinities, subnormals: bits are kept, not numbers."""
    optimizer = THORN([{"params": [nn.Parameter(torch.ones(6))], "orthogonalize": False}])
    (p,) = all_parameters(optimizer)
    run(optimizer, 1)
    odd = torch.tensor([-0.0, float("nan"), float("inf"), -float("inf"), 1e-45, 1.0])
    odd.view(torch.int32)[1] = 0x7FC00123
    p.data.copy_(odd)
    before = bits(p)
    optimizer.eval()
    optimizer.train()
    assert bits(p) == before


# Context and export


def test_averaged_goes_back_to_the_mode_that_was() -> None:
    optimizer = thorn()
    run(optimizer, 2)
    before = everything(optimizer)
    with contextlib.suppress(ZeroDivisionError), optimizer.averaged():
        raise ZeroDivisionError
    assert everything(optimizer) == before
    optimizer.eval()
    with nothing_changes(optimizer), optimizer.averaged():
        pass


def model_and_optimizer(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, THORN]:
    """Matrix and vectors, weights that are shared, and a buffer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.LayerNorm(4)).to(dtype)
    model[2].bias = model[0].bias
    return model, THORN(model, lr=0.01)


@pytest.mark.parametrize("mode", ["train", "eval"])
@dtypes
def test_export_gives_the_averages_and_touches_nothing(dtype: torch.dtype, mode: str) -> None:
    model, optimizer = model_and_optimizer(dtype)
    run(optimizer, 3)
    with optimizer.averaged():
        expected = {name: bits(x) for name, x in model.state_dict().items()}
    getattr(optimizer, mode)()
    with nothing_changes(optimizer):
        exported = optimizer.export_state_dict(model)
        assert {name: bits(x) for name, x in exported.items()} == expected
        for x in exported.values():
            x.zero_()
    assert not any(x.requires_grad for x in exported.values())


def test_export_knows_shared_weights_under_both_names() -> None:
    model, optimizer = model_and_optimizer()
    run(optimizer, 2)
    exported = optimizer.export_state_dict(model)
    assert bits(exported["0.bias"]) == bits(exported["2.bias"]) != bits(model[0].bias)


# What eval mode forbids


@pytest.mark.parametrize("closure", [None, lambda: 1.0])
def test_a_step_in_eval_mode_is_refused(closure: Callable[[], float] | None) -> None:
    optimizer = thorn()
    run(optimizer, 2)
    optimizer.eval()
    with (
        nothing_changes(optimizer),
        pytest.raises(RuntimeError, match=r"step\(\) in eval mode .* call optimizer\.train"),
    ):
        optimizer.step(closure)
    optimizer.train()
    run(optimizer, 1, first=2)


def test_a_step_in_eval_mode_is_refused_before_the_first_too() -> None:
    optimizer = thorn(("matrices",))
    optimizer.eval()
    with pytest.raises(RuntimeError, match="in eval mode"):
        optimizer.step()


def test_a_fresh_optimizer_trains() -> None:
    assert all(group["train_mode"] for group in thorn().param_groups)


def test_a_group_that_is_added_takes_up_the_mode() -> None:
    optimizer = thorn(("averaged",))
    run(optimizer, 1)
    optimizer.eval()
    optimizer.add_param_group({"params": parameters([(3,)], seed=9), "orthogonalize": False})
    with pytest.raises(RuntimeError, match="in eval mode"):
        optimizer.step()
    optimizer.train()
    run(optimizer, 2, first=1)
    with optimizer.averaged():
        pass
    assert [optimizer.state[p]["step"].item() for p in all_parameters(optimizer)] == [3, 3, 3, 3, 2]


# β₁


@pytest.mark.parametrize("kind", AVERAGED)
def test_beta1_of_an_average_cannot_change(kind: str) -> None:
    """y = (1 − β₁)z + β₁x would no longer hold, and no mean could be told from y and z."""
    model = nn.Linear(3, 2)
    optimizer = THORN([{"params": model.parameters(), **KINDS[kind].settings}])
    run(optimizer, 1)
    group = optimizer.param_groups[0]
    used, beta2 = group["betas"]
    group["betas"] = (0.5, beta2)
    says = rf"group 0: betas=\(0\.5, .* begun with beta1={used}, which cannot change; .* use cycle_momentum=False"
    actions: list[Callable[[], object]] = [
        optimizer.step,
        optimizer.eval,
        optimizer.state_dict,
        lambda: optimizer.export_state_dict(model),
    ]
    for action in actions:
        with nothing_changes(optimizer), pytest.raises(ValueError, match=says):
            action()
    group["betas"] = (used, 0.5)
    run(optimizer, 1)


@pytest.mark.parametrize("kind", ["matrices", "adam"])
def test_beta1_of_the_others_may(kind: str) -> None:
    optimizer = thorn((kind,))
    run(optimizer, 1)
    optimizer.param_groups[0]["betas"] = (0.5, 0.9)
    run(optimizer, 1)


def test_before_the_first_step_beta1_may_change() -> None:
    optimizer, other = thorn(("averaged",)), thorn(("averaged",), betas=(0.9, 0.99))
    optimizer.param_groups[0]["betas"] = (0.5, 0.99)
    other.param_groups[0]["betas"] = (0.5, 0.99)
    run(optimizer, 2)
    run(other, 2)
    assert progress(optimizer) == progress(other)


def test_a_copy_in_eval_mode_is_in_eval_mode() -> None:
    optimizer = thorn()
    run(optimizer, 2)
    optimizer.eval()
    twin: Any = copy.deepcopy(optimizer)
    with pytest.raises(RuntimeError, match="in eval mode"):
        twin.step()
    twin.train()
    optimizer.train()
    give_gradients(all_parameters(twin))
    run(twin, 1)
    run(optimizer, 1)
    assert progress(twin) == progress(optimizer)
