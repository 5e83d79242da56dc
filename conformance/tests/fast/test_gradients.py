"""Gradients are read and never written, may be missing, and no step waits for the device to see them."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trysquare import DolphinFlow, _backend
from trysquare_conformance.behaviour import (
    Result,
    all_parameters,
    assert_honest,
    bits,
    budgets,
    give_gradients,
    normal,
    nothing_changes,
    parameters,
    progress,
    run,
)

MODES = ("vector", "matrix", None)


def state_of(optimizer: DolphinFlow, p: Tensor) -> dict[str, Any]:
    return {name: bits(x) for name, x in optimizer.state[p].items()}


@pytest.mark.parametrize("clipping", [1e-3, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("mode", "adaptive"), [*itertools.product(MODES, (True, False))])
def test_gradients_are_only_read(mode: str | None, adaptive: bool, dtype: torch.dtype, clipping: float | None) -> None:
    for project in ("gradient", "update"):
        params = [p for count in (1, 6) for p in parameters([(4, 3)] * count + [(3,), ()], dtype)]
        optimizer = DolphinFlow(
            params, ortho_mode=mode, adaptive_lr=adaptive, project=project, gradient_clipping=clipping
        )
        gradients = [p.grad for p in params]
        before = [bits(g) for g in gradients]
        optimizer.step()
        assert [bits(g) for g in gradients] == before
        assert all(p.grad is g for p, g in zip(params, gradients, strict=True))


def test_gradients_of_any_making_are_taken() -> None:
    """Expanded as autograd leaves them after a sum, with a graph behind them, and in another memory layout."""
    plain, odd = (DolphinFlow(parameters([(4, 3), (4, 3), (4, 3)]), lr=0.01) for _ in range(2))
    row = normal((3,), 5).expand(4, 3)
    graph = (normal((4, 3), 6).requires_grad_() * 2).sum(0).expand(4, 3)
    transposed = normal((3, 4), 7).mT
    for p, q, g in zip(all_parameters(plain), all_parameters(odd), (row, graph, transposed), strict=True):
        p.grad, q.grad = g.detach().contiguous(), g
    plain.step()
    odd.step()
    assert progress(odd) == progress(plain)


def test_zero_grad_to_none_and_to_zero() -> None:
    optimizer = DolphinFlow(parameters([(4, 3)]), lr=0.01)
    (p,) = all_parameters(optimizer)
    run(optimizer, 1)
    optimizer.zero_grad()
    assert p.grad is None
    with nothing_changes(optimizer):
        optimizer.step()
    run(optimizer, 1)
    optimizer.zero_grad(set_to_none=False)
    assert p.grad is not None
    assert not p.grad.any()
    before = bits(p)
    optimizer.step()
    assert bits(p) != before
    assert optimizer.state[p]["step"] == 3


def test_a_step_without_any_gradient_does_nothing() -> None:
    optimizer = DolphinFlow(parameters())
    optimizer.zero_grad()
    with nothing_changes(optimizer):
        assert optimizer.step() is None
    assert not optimizer.state


SUBSETS = ((0, 1, 2, 3, 4, 5), (0, 2, 4), (5,), (1, 2, 3, 4), (), (0, 5), (0, 1, 2, 3, 4, 5))


def step_subsets(optimizer: DolphinFlow, subsets: Sequence[Sequence[int]]) -> Iterator[int]:
    """One step for each subset of parameters that have a gradient; yields how often an update ran in it."""
    for seed, subset in enumerate(subsets):
        give_gradients(all_parameters(optimizer), seed=seed)
        for i, p in enumerate(all_parameters(optimizer)):
            p.grad = p.grad if i in subset else None
        before = _backend.calls["eager", "update_"]
        optimizer.step()
        yield _backend.calls["eager", "update_"] - before


def test_only_what_has_a_gradient_is_stepped() -> None:
    optimizer = DolphinFlow(parameters([(4, 3)] * 6), lr=0.01)
    list(step_subsets(optimizer, SUBSETS))
    counts = [int(optimizer.state[p]["step"]) for p in all_parameters(optimizer)]
    assert counts == [sum(i in subset for subset in SUBSETS) for i in range(6)]


def test_what_has_no_gradient_keeps_every_bit() -> None:
    optimizer = DolphinFlow(parameters([(4, 3)] * 6), lr=0.01)
    run(optimizer, 1)
    first, *rest = all_parameters(optimizer)
    before = bits(first), state_of(optimizer, first)
    give_gradients(rest, seed=5)
    first.grad = None
    optimizer.step()
    assert (bits(first), state_of(optimizer, first)) == before


def test_a_missing_gradient_changes_no_other_step() -> None:
    """Each parameter moves as if it were alone with its own gradients, its own count and bias correction."""
    optimizer = DolphinFlow(parameters([(4, 3)] * 6), lr=0.01, gradient_clipping=None)
    start = [p.detach().clone() for p in all_parameters(optimizer)]
    list(step_subsets(optimizer, SUBSETS))
    for i, p in enumerate(all_parameters(optimizer)):
        given = []
        for seed, subset in enumerate(SUBSETS):
            everyone = parameters([(4, 3)] * 6, seed=seed)
            given += [[everyone[i].grad]] if i in subset else []
        allowed = budgets([start[i]], given, lr=0.01, gradient_clipping=None)
        assert_honest(Result.of(optimizer, [p]), allowed)


def test_a_missing_gradient_does_not_split_a_bucket() -> None:
    optimizer = DolphinFlow(parameters([(4, 3)] * 6))
    run(optimizer, 1)
    updates = list(step_subsets(optimizer, SUBSETS))
    assert updates == [1 if subset else 0 for subset in SUBSETS]


def test_who_steps_together_is_found_once_as_long_as_nothing_changes() -> None:
    optimizer = DolphinFlow(parameters([(4, 3)] * 6))
    run(optimizer, 1)
    (roll,) = optimizer._rolls.values()
    run(optimizer, 2)
    assert next(iter(optimizer._rolls.values())) is roll
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    run(optimizer, 1)
    assert next(iter(optimizer._rolls.values())) is roll


def test_a_bucket_is_rebuilt_when_its_members_change() -> None:
    optimizer = DolphinFlow(parameters([(4, 3)] * 6))
    run(optimizer, 1)
    optimizer.param_groups[0]["params"].append(torch.nn.Parameter(normal((4, 3), 9)))
    all_parameters(optimizer)[0].data = normal((2, 2), 9)
    all_parameters(optimizer)[0].grad = None
    optimizer.state.pop(all_parameters(optimizer)[0])
    before = _backend.calls["eager", "update_"]
    run(optimizer, 1)
    assert _backend.calls["eager", "update_"] - before == 2


# Waiting for the device


class Waits(TorchDispatchMode):
    """Raises where a result has to be read before the program can go on, as on a GPU it would have to wait."""

    WAITING = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "item", "allclose", "masked_select", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for every operation."""
        if func.overloadpacket.__name__.strip("_") in {name.strip("_") for name in self.WAITING}:
            raise AssertionError(f"{func} reads a result")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rate", [0.01, torch.tensor(0.01)], ids=["float", "tensor"])
@pytest.mark.parametrize("policy", ["propagate", "skip"])
@pytest.mark.parametrize("clipping", [1.0, None])
@pytest.mark.parametrize("mode", MODES)
def test_no_step_waits(mode: str | None, clipping: float | None, policy: str, rate: Any) -> None:
    settings = {"ortho_mode": mode, "gradient_clipping": clipping, "nonfinite": policy, "lr": rate}
    for dtype, project in [(torch.float32, "gradient"), (torch.float32, "update"), (torch.bfloat16, "gradient")]:
        optimizer = DolphinFlow(parameters([(4, 3)] * 6 + [(3,), (0, 3)], dtype), project=project, **settings)
        for _ in range(2):
            with Waits():
                optimizer.step()


def test_waiting_would_be_seen() -> None:
    optimizer = DolphinFlow(parameters(), nonfinite="raise")
    with Waits(), pytest.raises(AssertionError, match="reads a result"):
        optimizer.step()
