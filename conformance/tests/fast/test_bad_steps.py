"""Gradients, closures and hand-edited state that no step could honour are refused before anything moves."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from trysquare import DolphinFlow, _parameters
from trysquare_conformance.behaviour import all_parameters, bits, normal, nothing_changes, parameters, run


@pytest.fixture
def optimizer() -> DolphinFlow:
    """After two steps: a matrix called weight, and a group of a vector, a convolution, a number and nothing."""
    weight, *rest = parameters()
    named = [("weight", weight)], [(f"other.{i}", p) for i, p in enumerate(rest)]
    made = DolphinFlow([{"params": group} for group in named])
    run(made, 2)
    return made


def still_works(optimizer: DolphinFlow, **arguments: Any) -> None:
    full = [p for p in all_parameters(optimizer) if p.numel()]
    before = [bits(p) for p in full]
    for p in full:
        p.grad = normal(tuple(p.shape), 7, dtype=p.dtype)
    optimizer.step(**arguments)
    assert all(old != bits(p) for old, p in zip(before, full, strict=True))


# Gradients


def wrong_shape(p: Tensor) -> None:
    p.data = p.data[:2].clone()


def wrong_dtype(p: Tensor) -> None:
    p.data = p.data.double()


def half_parameter(p: Tensor) -> None:
    p.data = p.data.to(torch.bfloat16)


def sparse(p: Tensor) -> None:
    p.grad = torch.eye(4, 3).to_sparse()


def coalesced(p: Tensor) -> None:
    p.grad = torch.eye(4, 3).to_sparse().coalesce()


GRADIENTS: dict[str, tuple[Callable[[Tensor], None], str]] = {
    "shape": (wrong_shape, "has shape (4, 3), the parameter (2, 3): set .grad to None and compute it anew"),
    "dtype": (wrong_dtype, "has dtype torch.float32, the parameter torch.float64: set .grad to None"),
    "half": (half_parameter, "has dtype torch.float32, the parameter torch.bfloat16: set .grad to None"),
    "sparse": (sparse, "has layout torch.sparse_coo: make it dense with .to_dense()"),
    "coalesced": (coalesced, "has layout torch.sparse_coo: make it dense with .to_dense()"),
}


@pytest.mark.parametrize("case", GRADIENTS)
def test_a_bad_gradient_is_refused(optimizer: DolphinFlow, case: str) -> None:
    damage, says = GRADIENTS[case]
    weight = optimizer.param_groups[0]["params"][0]
    values, gradient = weight.data, weight.grad
    damage(weight)
    with nothing_changes(optimizer), pytest.raises(ValueError, match="the gradient of weight has") as error:
        optimizer.step()
    assert says in str(error.value)
    weight.data, weight.grad = values, gradient
    still_works(optimizer)


@pytest.mark.parametrize("case", GRADIENTS)
def test_a_bad_gradient_leaves_no_state_behind(case: str) -> None:
    params = parameters([(4, 3), (4, 3)])
    optimizer = DolphinFlow(params)
    GRADIENTS[case][0](params[1])
    with nothing_changes(optimizer), pytest.raises(ValueError, match="the gradient of parameter 1 of group 0"):
        optimizer.step()
    assert not optimizer.state


def test_a_gradient_on_another_device_is_refused() -> None:
    """On a CPU alone torch lets no parameter get there, so the check is asked directly."""
    parameter = SimpleNamespace(shape=(2,), dtype=torch.float32, device=torch.device("cuda:0"), grad=torch.zeros(2))
    with pytest.raises(ValueError, match=r"weight has device cpu, the parameter cuda:0: set \.grad to None"):
        _parameters.check_gradient(parameter, "weight")


def test_an_embeddings_sparse_gradient_is_refused_by_name() -> None:
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = DolphinFlow(embedding.named_parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with nothing_changes(optimizer), pytest.raises(ValueError, match=r"weight has layout .* make it dense"):
        optimizer.step()


# Closures


def returns(value: Any) -> Callable[[], Any]:
    return lambda: value


CLOSURES: dict[str, tuple[Any, type[Exception], str]] = {
    "none at all": (None, ValueError, "loss_aware_schedule=True needs the loss: call step(closure)"),
    "a loss, not a function": (torch.tensor(0.5), TypeError, "closure=tensor(0.5000) must be a function"),
    "a number": (0.5, TypeError, "closure=0.5 must be a function"),
    "returns None": (returns(None), ValueError, "needs the loss as one number, but the closure returned None"),
    "returns text": (returns("low"), ValueError, "needs the loss as one number, but the closure returned 'low'"),
    "returns two": (returns(torch.ones(2)), ValueError, "but the closure returned tensor([1., 1.])"),
    "returns a pair": (returns((0.5, 0.5)), ValueError, "but the closure returned (0.5, 0.5)"),
    "returns complex": (returns(1j), ValueError, "but the closure returned 1j"),
}


@pytest.mark.parametrize("case", CLOSURES)
def test_a_bad_closure_is_refused(case: str) -> None:
    closure, kind, says = CLOSURES[case]
    optimizer = DolphinFlow(parameters(), loss_aware_schedule=True)
    optimizer.step(lambda: 1.0)
    with nothing_changes(optimizer), pytest.raises(kind) as error:
        optimizer.step(closure)
    assert says in str(error.value)
    still_works(optimizer, closure=lambda: 0.5)


@pytest.mark.parametrize("closure", [torch.tensor(0.5), 0.5, "closure"])
def test_what_is_no_closure_is_refused_without_a_schedule_too(optimizer: DolphinFlow, closure: Any) -> None:
    with nothing_changes(optimizer), pytest.raises(TypeError, match="must be a function"):
        optimizer.step(closure)


def test_a_closure_that_raises_leaves_everything(optimizer: DolphinFlow) -> None:
    def closure() -> float:
        raise ZeroDivisionError

    with nothing_changes(optimizer), pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    still_works(optimizer)


def test_what_a_closure_computed_is_checked_and_kept(optimizer: DolphinFlow) -> None:
    """Its gradients are its own doing and stay; nothing else moves, not even the loss schedule."""
    weight = optimizer.param_groups[0]["params"][0]
    for group in optimizer.param_groups:
        group["loss_aware_schedule"] = True

    def closure() -> float:
        weight.grad = torch.eye(4, 3).to_sparse()
        return 1.0

    groups = [dict(group) for group in optimizer.param_groups]
    before = [bits(p) for p in all_parameters(optimizer)]
    with pytest.raises(ValueError, match="weight has layout"):
        optimizer.step(closure)
    assert [dict(group) for group in optimizer.param_groups] == groups
    assert [bits(p) for p in all_parameters(optimizer)] == before
    assert weight.grad is not None
    assert weight.grad.layout == torch.sparse_coo


# State that was edited by hand


def removed(state: dict[str, Any]) -> None:
    del state["momentum_buffer"]


def reshaped(state: dict[str, Any]) -> None:
    state["exp_avg_sq"] = state["exp_avg_sq"].flatten()


def stripped(state: dict[str, Any]) -> None:
    state["step"] = 3


def transposed(state: dict[str, Any]) -> None:
    state["momentum_buffer"] = state["momentum_buffer"].mT


EDITS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "removed": (removed, "no 'momentum_buffer'"),
    "reshaped": (reshaped, "'exp_avg_sq' of shape (12,), expected (4, 3)"),
    "stripped": (stripped, "'step' of shape int, expected ()"),
    "transposed": (transposed, "'momentum_buffer' of shape (3, 4), expected (4, 3)"),
}


@pytest.mark.parametrize("case", EDITS)
def test_a_damaged_state_is_refused(optimizer: DolphinFlow, case: str) -> None:
    damage, says = EDITS[case]
    weight = optimizer.param_groups[0]["params"][0]
    damage(optimizer.state[weight])
    with nothing_changes(optimizer), pytest.raises(ValueError, match="the state of weight has") as error:
        optimizer.step()
    assert says in str(error.value)
    del optimizer.state[weight]
    still_works(optimizer)


def test_turning_the_second_moment_on_later_is_refused() -> None:
    optimizer = DolphinFlow(parameters(), adaptive_lr=False)
    run(optimizer, 1)
    optimizer.param_groups[0]["adaptive_lr"] = True
    with nothing_changes(optimizer), pytest.raises(ValueError, match=r"has no 'exp_avg_sq'.*delete the state"):
        optimizer.step()
    optimizer.state.clear()
    still_works(optimizer)
