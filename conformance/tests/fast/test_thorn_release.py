"""Gradient release: parameters are stepped in the backward pass, in windows of N, and gradients are freed there.

What stands in its way is in `test_thorn_release_errors`, how much memory it saves in `test_thorn_memory`.
"""

import copy
import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from trysquare import THORN
from trysquare_conformance.behaviour import all_parameters, bits, everything, normal, progress, run
from trysquare_conformance.behaviour_thorn import AVERAGED, KINDS, budgets, held, resumed, thorn
from trysquare_conformance.budget import judge
from trysquare_conformance.snapshots import to_array

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
kinds = pytest.mark.parametrize("kind", KINDS)


class Holder(nn.Module):
    """Nothing but the parameters of an optimizer; its loss gives each the gradient that it is told."""

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.held = nn.ParameterList(params)

    def backward(self, step: int) -> None:
        """The gradients of `behaviour.run` in this step."""
        gradients = [normal(tuple(p.shape), step + 1, 2 * i + 1, p.dtype) for i, p in enumerate(self.held)]
        torch.autograd.backward([p * 1 for p in self.held], gradients)


def released(optimizer: THORN, update_rate: int = 1) -> Holder:
    """Gradients are gone before the first backward pass."""
    holder = Holder(all_parameters(optimizer))
    optimizer.zero_grad()
    optimizer.setup_gradient_release(holder, update_rate)
    return holder


# One backward pass, one step


@kinds
@dtypes
def test_with_a_rate_of_one_it_is_step_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    plain, own = (thorn((kind,), dtype) for _ in range(2))
    model = released(own)
    for step in range(3):
        run(plain, 1, first=step)
        model.backward(step)
        assert all(p.grad is None for p in all_parameters(own))
    assert progress(own) == progress(plain)


def test_all_kinds_of_groups_in_one_model() -> None:
    plain, own = thorn(), thorn()
    model = released(own)
    for step in range(3):
        run(plain, 1, first=step)
        model.backward(step)
    assert progress(own) == progress(plain)


def test_a_schedule_is_followed_and_does_not_warn() -> None:
    plain, own = thorn(), thorn()
    model = released(own)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (plain, own)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            run(plain, 1, first=step)
            model.backward(step)
            for scheduler in schedulers:
                scheduler.step()
    assert progress(own)["parameters"] == progress(plain)["parameters"]


# Windows


@pytest.mark.parametrize("rate", [2, 16])
@kinds
@dtypes
def test_a_window_is_the_references(kind: str, rate: int, dtype: torch.dtype) -> None:
    """Two windows and a half: every parameter and state within the budget of the reference that runs free too."""
    optimizer = thorn((kind,), dtype, lr=0.02, matmul_dtype=torch.float32 if dtype != torch.float64 else None)
    start, steps = [to_array(p) for p in all_parameters(optimizer)], 2 * rate + rate // 2
    model = released(optimizer, rate)
    for step in range(steps):
        model.backward(step)
    (group,) = optimizer.param_groups
    for i, (p, begun) in enumerate(zip(group["params"], start, strict=True)):
        gradients = [to_array(normal(tuple(p.shape), step + 1, 2 * i + 1, p.dtype)) for step in range(steps)]
        found = held(optimizer, p)
        for name, budget in budgets(group, p, begun, gradients).items():
            assert judge(budget, found[name]).worst <= 1, (name, i)


@pytest.mark.parametrize("rate", [2, 3])
def test_parameters_move_at_the_end_of_each_window(rate: int) -> None:
    optimizer = thorn()
    model = released(optimizer, rate)
    full = [p for p in all_parameters(optimizer) if p.numel() and not rectified(optimizer, p)]
    for step in range(2 * rate):
        before = [bits(p) for p in full]
        model.backward(step)
        moved = [old != bits(p) for old, p in zip(before, full, strict=True)]
        assert moved == [(step + 1) % rate == 0] * len(full)


def rectified(optimizer: THORN, p: Tensor) -> bool:
    return any(g["rectify"] and any(p is q for q in g["params"]) for g in optimizer.param_groups)


@pytest.mark.parametrize("kind", AVERAGED)
def test_the_average_can_be_seen_within_a_window(kind: str) -> None:
    """y, z and the weights change at its end only, so that the average is that of the last whole window."""
    optimizer = thorn((kind,))
    model = released(optimizer, 3)
    for step in range(3):
        model.backward(step)
    with optimizer.averaged():
        expected = [bits(p) for p in all_parameters(optimizer)]
    model.backward(3)
    with optimizer.averaged():
        assert [bits(p) for p in all_parameters(optimizer)] == expected
    model.backward(4)
    model.backward(5)
    with optimizer.averaged():
        assert [bits(p) for p in all_parameters(optimizer)] != expected


@pytest.mark.parametrize("rate", [1, 3])
@dtypes
def test_a_run_resumes_within_a_window(rate: int, dtype: torch.dtype) -> None:
    optimizer = thorn(dtype=dtype)
    model = released(optimizer, rate)
    for step in range(4):
        model.backward(step)
    again = resumed(optimizer)
    other = released(again, rate)
    for step in range(4, 8):
        model.backward(step)
        other.backward(step)
    assert progress(again)["state"] == progress(optimizer)["state"]
    assert progress(again)["parameters"] == progress(optimizer)["parameters"]


def test_a_checkpoint_may_be_loaded_while_released() -> None:
    """The hooks find the new groups; S is part of the state."""
    optimizer = thorn()
    model = released(optimizer, 2)
    for step in range(3):
        model.backward(step)
    saved = copy.deepcopy(optimizer.state_dict())
    weights = [p.detach().clone() for p in all_parameters(optimizer)]
    model.backward(3)
    expected = progress(optimizer)
    with torch.no_grad():
        for p, w in zip(all_parameters(optimizer), weights, strict=True):
            p.copy_(w)
    optimizer.load_state_dict(saved)
    model.backward(3)
    assert progress(optimizer)["parameters"] == expected["parameters"]
    assert progress(optimizer)["state"] == expected["state"]


def test_the_sum_of_updates_exists_in_windows_only() -> None:
    for rate, expected in ((1, False), (2, True)):
        optimizer = thorn(("averaged", "adam", "matrices"))
        released(optimizer, rate).backward(0)
        for group in optimizer.param_groups:
            has = {"update_sum" in optimizer.state[p] for p in group["params"]}
            assert has == {expected and not group["orthogonalize"]}


# The handle


@pytest.mark.parametrize("rate", [1, 2])
def test_after_remove_step_goes_on(rate: int) -> None:
    """Between two windows: the sums are gone, and so are the hooks."""
    optimizer = thorn()
    model = Holder(all_parameters(optimizer))
    handle = optimizer.setup_gradient_release(model, rate)
    for step in range(rate):
        model.backward(step)
    handle.remove()
    before = everything(optimizer)["parameters"]
    for p in model.held:
        p.grad = None
    model.backward(rate)
    assert all(p.grad is not None for p in model.held)
    assert [value for value, _ in everything(optimizer)["parameters"]] == [value for value, _ in before]
    optimizer.step()
    assert not any("update_sum" in state for state in optimizer.state.values())
    handle.remove()
    assert resumed(optimizer).param_groups[0]["update_rate"] == 1


def test_within_a_window_only_gradient_release_can_go_on() -> None:
    optimizer = thorn()
    model = Holder(all_parameters(optimizer))
    handle = optimizer.setup_gradient_release(model, 2)
    model.backward(0)
    handle.remove()
    with pytest.raises(RuntimeError, match=r"over update_rate=2 backward passes: call setup_gradient_release\(model"):
        optimizer.step()
    with pytest.raises(
        ValueError, match="is in the middle of a window of update_rate=2 backward passes: use that rate"
    ):
        optimizer.setup_gradient_release(model, 3)
    optimizer.setup_gradient_release(model, 2)
    model.backward(1)
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}


def test_the_rate_may_change_between_windows() -> None:
    optimizer = thorn(("averaged",))
    model = Holder(all_parameters(optimizer))
    for rate in (2, 1, 4):
        handle = optimizer.setup_gradient_release(model, rate)
        for step in range(4):
            model.backward(step)
        handle.remove()
    assert {int(state["step"]) for state in optimizer.state.values()} == {12}


# Models as they are


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def test_a_real_backward_pass_is_the_one_of_step() -> None:
    """A layer's weights may only move after all that needs them for its own backward pass."""
    plain, own = layers(), layers()
    ordinary, optimizer = THORN(plain, lr=0.01), THORN(own, lr=0.01)
    optimizer.setup_gradient_release(own)
    for step in range(4):
        data = normal((5, 6), step)
        plain(data).square().mean().backward()
        ordinary.step()
        own(data).square().mean().backward()
    assert [bits(p) for p in own.parameters()] == [bits(p) for p in plain.parameters()]


def test_frozen_and_unused_parameters_stay() -> None:
    model = layers()
    model[0].requires_grad_(requires_grad=False)
    optimizer = THORN(model, lr=0.01)
    optimizer.setup_gradient_release(model)
    before = [bits(p) for p in model[2].parameters()]
    model[4](normal((3, 8), 0)).sum().backward()
    assert [bits(p) for p in model[2].parameters()] == before
    assert len(optimizer.state) == 2


def test_a_weight_that_is_used_twice_is_stepped_once() -> None:
    """Its gradient is complete when the hook is called."""
    plain, own = (nn.Linear(4, 4, bias=False) for _ in range(2))
    own.weight.data.copy_(plain.weight.data)
    ordinary, optimizer = THORN(plain), THORN(own)
    optimizer.setup_gradient_release(own)
    data = normal((3, 4), 0)
    plain(plain(data)).sum().backward()
    ordinary.step()
    own(own(data)).sum().backward()
    assert bits(own.weight) == bits(plain.weight)
    assert optimizer.state[own.weight]["step"] == 1


def test_accumulated_gradients_are_taken_up() -> None:
    """What was there before the hooks is part of the first step."""
    plain, own = thorn(), thorn()
    model, twice = Holder(all_parameters(own)), Holder(all_parameters(plain))
    own.setup_gradient_release(model)
    model.backward(0)
    twice.backward(0)
    plain.step()
    assert progress(own) == progress(plain)


def test_existing_hooks_run_beside_it_if_they_may() -> None:
    model, seen = nn.Linear(3, 2), []
    model.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    optimizer = THORN(model)
    optimizer.setup_gradient_release(model, ignore_existing_hooks=True)
    before = bits(model.weight)
    model(torch.ones(1, 3)).sum().backward()
    assert len(seen) == 1
    assert bits(model.weight) != before
    assert model.weight.grad is None
