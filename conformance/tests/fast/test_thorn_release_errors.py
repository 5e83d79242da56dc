"""What gradient release cannot go with is refused with what to do, and nothing is half-registered."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from trysquare import THORN
from trysquare_conformance.behaviour import all_parameters, bits, normal, nothing_changes, parameters, run
from trysquare_conformance.behaviour_thorn import clones, thorn

NAN = float("nan")


def pair(**settings: Any) -> tuple[nn.Module, THORN]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    return model, THORN(model, lr=0.01, **settings)


def backward(model: nn.Module, seed: int = 0) -> None:
    model(normal((3, 4), seed)).square().mean().backward()


def hooks(model: nn.Module) -> int:
    """How many post-accumulate-grad hooks the parameters have."""
    return sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


# Set up


def test_existing_hooks_are_named() -> None:
    model, optimizer = pair()
    other = model[1].weight.register_post_accumulate_grad_hook(lambda _: None)
    with (
        nothing_changes(optimizer),
        pytest.raises(ValueError, match=r"1\.weight has a post-accumulate-grad hook") as error,
    ):
        optimizer.setup_gradient_release(model)
    assert "remove it, or give ignore_existing_hooks=True" in str(error.value)
    assert hooks(model) == 1
    assert not optimizer._released
    other.remove()
    optimizer.setup_gradient_release(model)
    assert hooks(model) == 6


def test_a_second_setup_is_refused() -> None:
    model, optimizer = pair()
    handle = optimizer.setup_gradient_release(model)
    with pytest.raises(RuntimeError, match=r"gradient release is set up already: call remove\(\) on its handle first"):
        optimizer.setup_gradient_release(model, ignore_existing_hooks=True)
    assert hooks(model) == 6
    handle.remove()
    assert hooks(model) == 0
    optimizer.setup_gradient_release(model)


def data_parallel() -> nn.Module:
    """As it looks to whoever asks: made without a process group."""
    wrapped: nn.Module = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = nn.Linear(4, 2)
    return wrapped


REFUSED: dict[str, tuple[Callable[[nn.Module], tuple[Any, ...]], type[Exception], str]] = {
    "no module": (lambda m: ([*m.parameters()],), TypeError, "model is a list: give the module whose parameters are"),
    "None": (lambda _: (None,), TypeError, "model is a NoneType: give the module"),
    "another model": (lambda _: (nn.Linear(4, 2),), ValueError, "0.weight is not a parameter of the model, so no"),
    "a part": (lambda m: (m[0],), ValueError, "2.weight is not a parameter of the model, so no backward pass would"),
    "rate 0": (lambda m: (m, 0), ValueError, "update_rate=0 must be an int >= 1"),
    "rate -1": (lambda m: (m, -1), ValueError, "update_rate=-1 must be an int >= 1"),
    "rate 1.0": (lambda m: (m, 1.0), ValueError, "update_rate=1.0 must be an int >= 1"),
    "rate True": (lambda m: (m, True), ValueError, "update_rate=True must be an int >= 1"),
    "rate None": (lambda m: (m, None), ValueError, "update_rate=None must be an int >= 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_released_is_refused(name: str) -> None:
    arguments, kind, says = REFUSED[name]
    model, optimizer = pair()
    with nothing_changes(optimizer), pytest.raises(kind) as error:
        optimizer.setup_gradient_release(*arguments(model))
    assert says in str(error.value)
    assert hooks(model) == 0
    backward(model)
    optimizer.step()


@pytest.mark.parametrize("where", ["model", "within"])
def test_distributed_data_parallel_is_refused(where: str) -> None:
    """There a hook sees the gradient of its own process, before it is averaged."""
    wrapped = data_parallel()
    model = wrapped if where == "model" else nn.ModuleDict({"ddp": wrapped})
    optimizer = THORN(model)
    with pytest.raises(
        ValueError, match="under DistributedDataParallel a hook sees the gradient before it is averaged"
    ):
        optimizer.setup_gradient_release(model)
    assert hooks(model) == 0


def test_skipping_is_refused() -> None:
    model, optimizer = pair(nonfinite="skip")
    with pytest.raises(ValueError, match="nonfinite='skip' needs all gradients at once"):
        optimizer.setup_gradient_release(model)
    assert hooks(model) == 0


def test_no_group_can_be_added() -> None:
    model, optimizer = pair()
    handle = optimizer.setup_gradient_release(model)
    group = {"params": [("late", *parameters([(3,)]))], "orthogonalize": False}
    with nothing_changes(optimizer), pytest.raises(RuntimeError, match=r"no group can be added: call remove\(\)"):
        optimizer.add_param_group(group)
    handle.remove()
    optimizer.add_param_group(group)


# While released


@pytest.mark.parametrize("closure", [None, lambda: 1.0])
def test_step_is_refused(closure: Callable[[], float] | None) -> None:
    model, optimizer = pair()
    optimizer.setup_gradient_release(model)
    backward(model)
    says = r"stepped in the backward pass, .*: leave out step\(\), zero_grad\(\), gradient clipping and GradScaler"
    with nothing_changes(optimizer), pytest.raises(RuntimeError, match=says):
        optimizer.step(closure)


def test_a_scaler_is_refused_where_it_would_step() -> None:
    model, optimizer = pair()
    optimizer.setup_gradient_release(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(model(normal((3, 4), 0)).sum()).backward()
    with pytest.raises(RuntimeError, match="leave out step"):
        scaler.step(optimizer)


def test_a_scaler_that_unscales_first_is_refused_too() -> None:
    model, optimizer = pair()
    optimizer.setup_gradient_release(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(model(normal((3, 4), 0)).sum()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="leave out step"):
        scaler.step(optimizer)


def test_clipping_finds_nothing_to_clip() -> None:
    """It cannot be noticed, so the documentation says it: there is no gradient left."""
    model, optimizer = pair()
    optimizer.setup_gradient_release(model)
    backward(model)
    assert nn.utils.clip_grad_norm_(model.parameters(), 1.0) == 0
    assert all(p.grad is None for p in model.parameters())


def test_a_backward_pass_in_eval_mode_is_refused() -> None:
    model, optimizer = pair()
    optimizer.setup_gradient_release(model)
    backward(model)
    with optimizer.averaged():
        before = [bits(p) for p in model.parameters()]
        with pytest.raises(
            RuntimeError, match=r"a backward pass under gradient release in eval mode .* call optimizer\.tr"
        ):
            backward(model, 1)
        assert [bits(p) for p in model.parameters()] == before
    for p in model.parameters():
        p.grad = None
    backward(model, 1)


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_what_is_not_finite_raises_where_it_arises(value: float) -> None:
    model, optimizer = pair(nonfinite="raise")
    optimizer.setup_gradient_release(model)
    before = bits(model[2].weight), len(optimizer.state)
    with pytest.raises(
        RuntimeError, match=r"the gradient of 2\.\w+ is not finite and nonfinite='raise'; it was not ch"
    ):
        (model(normal((3, 4), 0)) * value).sum().backward()
    assert (bits(model[2].weight), len(optimizer.state)) == before


def test_what_is_not_finite_propagates_by_default() -> None:
    model, optimizer = pair()
    optimizer.setup_gradient_release(model)
    (model(normal((3, 4), 0)) * NAN).sum().backward()
    assert all(p.isnan().any() for p in model.parameters())


def test_a_bad_setting_is_refused_in_the_backward_pass() -> None:
    model, optimizer = pair()
    optimizer.setup_gradient_release(model)
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"group 0: lr=-1\.0 must be"):
        backward(model)


def test_a_sparse_gradient_is_refused() -> None:
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = THORN(model)
    optimizer.setup_gradient_release(model)
    before = bits(model.weight)
    with pytest.raises(ValueError, match=r"the gradient of weight has layout torch.sparse_coo"):
        model(torch.tensor([1])).sum().backward()
    assert bits(model.weight) == before


def test_beta1_of_an_average_cannot_change_here_either() -> None:
    model, optimizer = pair()
    optimizer.setup_gradient_release(model)
    backward(model)
    for group in optimizer.param_groups:
        group["betas"] = (0.5, 0.95)
    with pytest.raises(ValueError, match="use cycle_momentum=False"):
        backward(model)


# Checkpoints


@pytest.fixture
def within_a_window() -> tuple[nn.Module, THORN]:
    model, optimizer = pair()
    optimizer.setup_gradient_release(model, 2)
    backward(model)
    return model, optimizer


def test_another_rate_is_refused_while_released(within_a_window: tuple[nn.Module, THORN]) -> None:
    _, optimizer = within_a_window
    saved = thorn_like(optimizer).state_dict()
    says = "saved with update_rate=1, gradient release is set up with 2: call remove"
    with nothing_changes(optimizer), pytest.raises(ValueError, match=says):
        optimizer.load_state_dict(saved)


def thorn_like(optimizer: THORN) -> THORN:
    other = THORN(clones(optimizer))
    run(other, 1)
    return other


def test_a_state_from_within_a_window_says_how_to_go_on(within_a_window: tuple[nn.Module, THORN]) -> None:
    _, optimizer = within_a_window
    other = THORN(clones(optimizer))
    other.load_state_dict(optimizer.state_dict())
    for p in all_parameters(other):
        p.grad = torch.ones_like(p)
    says = (
        r"this state collects updates over update_rate=2 backward passes: call setup_gradient_release\(model, update_"
    )
    with nothing_changes(other), pytest.raises(RuntimeError, match=says):
        other.step()


def test_a_handle_of_an_optimizer_that_was_never_used_changes_nothing() -> None:
    optimizer = thorn()
    model = nn.ParameterList(all_parameters(optimizer))
    with nothing_changes(optimizer):
        optimizer.setup_gradient_release(model, 4).remove()
    run(optimizer, 1)
