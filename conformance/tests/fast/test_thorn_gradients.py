"""Gradients are read and then let go, may be missing, and come from closures as everywhere."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trysquare import THORN
from trysquare.ops import polar
from trysquare_conformance.behaviour import (
    all_parameters,
    bits,
    give_gradients,
    normal,
    nothing_changes,
    parameters,
    progress,
    run,
)
from trysquare_conformance.behaviour_thorn import KINDS, thorn

NAN = float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
kinds = pytest.mark.parametrize("kind", KINDS)


# none_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_let_go_after_the_step(dtype: torch.dtype) -> None:
    optimizer = thorn(dtype=dtype)
    optimizer.step()
    assert all(p.grad is None for p in all_parameters(optimizer))
    with nothing_changes(optimizer):
        optimizer.step()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_may_be_kept_and_are_only_read(dtype: torch.dtype) -> None:
    optimizer = thorn(dtype=dtype, none_grad=False)
    gradients = [p.grad for p in all_parameters(optimizer)]
    before = [bits(g) for g in gradients]
    optimizer.step()
    assert all(p.grad is g for p, g in zip(all_parameters(optimizer), gradients, strict=True))
    assert [bits(g) for g in gradients] == before


def test_what_holds_a_gradient_still_holds_it() -> None:
    """It is let go, not written to."""
    optimizer = thorn()
    gradients = [p.grad for p in all_parameters(optimizer)]
    before = [bits(g) for g in gradients]
    optimizer.step()
    assert [bits(g) for g in gradients] == before


def test_each_group_says_for_itself() -> None:
    kept, gone = ({"params": parameters([(4, 3)]), "orthogonalize": True, "none_grad": none} for none in (False, True))
    THORN([kept, gone]).step()
    assert [g["params"][0].grad is None for g in (kept, gone)] == [False, True]


def test_letting_go_changes_no_number() -> None:
    one, other = thorn(none_grad=True), thorn(none_grad=False)
    run(one, 3)
    run(other, 3)
    assert progress(one)["state"] == progress(other)["state"]
    assert progress(one)["parameters"] == progress(other)["parameters"]


def test_a_refused_step_lets_nothing_go() -> None:
    optimizer = thorn()
    optimizer.param_groups[0]["lr"] = NAN
    with nothing_changes(optimizer), pytest.raises(ValueError, match="lr=nan"):
        optimizer.step()


# Missing gradients


@kinds
def test_a_missing_gradient_changes_no_other_step(kind: str) -> None:
    optimizer, whole = thorn((kind,)), thorn((kind,))
    for step in range(3):
        give_gradients(all_parameters(optimizer), seed=step)
        give_gradients(all_parameters(whole), seed=step)
        if step == 1:
            all_parameters(optimizer)[0].grad = None
        optimizer.step()
        whole.step()
    later = slice(1, None)
    assert progress(optimizer)["parameters"][later] == progress(whole)["parameters"][later]
    assert progress(optimizer)["state"][later] == progress(whole)["state"][later]
    assert optimizer.state[all_parameters(optimizer)[0]]["step"] == 2


@kinds
def test_a_zero_gradient_gives_no_nan(kind: str) -> None:
    optimizer = thorn((kind,))
    for p in all_parameters(optimizer):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(p.isfinite().all() for p in all_parameters(optimizer))


# Closures


def test_a_closure_is_called_once_with_gradients_enabled() -> None:
    model, data = nn.Linear(3, 1), normal((8, 3), 0)
    optimizer, seen = THORN(model, lr=0.01), []

    def closure() -> Tensor:
        seen.append(torch.is_grad_enabled())
        loss = model(data).square().mean()
        loss.backward()
        return loss

    with torch.no_grad():
        loss: Any = optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert seen == [True]
    assert loss.requires_grad
    assert model.weight.grad is None


def test_a_closure_gives_the_step_of_its_gradients() -> None:
    with_closure, without = thorn(), thorn()
    with_closure.zero_grad()

    def closure() -> float:
        give_gradients(all_parameters(with_closure))
        return 0.5

    for group in without.param_groups:
        assert group["params"]
    give_gradients(all_parameters(without))
    assert with_closure.step(closure) == 0.5
    assert without.step() is None
    assert progress(with_closure) == progress(without)


def test_a_closure_that_raises_leaves_everything() -> None:
    optimizer = thorn()
    run(optimizer, 1)

    def closure() -> float:
        raise ZeroDivisionError

    with nothing_changes(optimizer), pytest.raises(ZeroDivisionError):
        optimizer.step(closure)


# Waiting for the device


class Waits(TorchDispatchMode):
    """Raises where a result has to be read before the program can go on, as on a GPU it would have to wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", ["propagate", "skip"])
@kinds
def test_no_step_waits_for_the_device(kind: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even with a tensor as learning rate. On a CPU, where there is nothing to wait for, norms are looked at."""
    monkeypatch.setattr(polar, "_may_look", lambda device: device.type != "cpu")
    optimizer = thorn((kind,), lr=torch.tensor(0.01), nonfinite=policy)
    with Waits():
        run(optimizer, 2)


# Together and again


def test_dtypes_live_side_by_side() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    shapes = ((4, 3), (4, 3))
    for said in ({"orthogonalize": True}, {"orthogonalize": False}):
        together = THORN([{"params": [p for d in dtypes for p in parameters(shapes, d)], **said}], lr=0.01)
        alone = [THORN([{"params": parameters(shapes, d), **said}], lr=0.01) for d in dtypes]
        for seed in range(3):
            for i in range(len(dtypes)):
                give_gradients(all_parameters(together)[2 * i : 2 * i + 2], seed=seed)
                give_gradients(all_parameters(alone[i]), seed=seed)
                alone[i].step()
            together.step()
        assert progress(together)["state"] == [state for o in alone for state in progress(o)["state"]]
        assert progress(together)["parameters"] == [value for o in alone for value in progress(o)["parameters"]]


def test_repeated_runs_give_the_same_bits() -> None:
    def made() -> THORN:
        matrices, vectors = parameters([(64, 33)] * 3 + [(300, 50)]), parameters([(700,), (64, 33)])
        return THORN(
            [{"params": matrices, "orthogonalize": True}, {"params": vectors, "orthogonalize": False}], lr=0.01
        )

    first, second = made(), made()
    run(first, 3)
    run(second, 3)
    assert progress(first) == progress(second)
