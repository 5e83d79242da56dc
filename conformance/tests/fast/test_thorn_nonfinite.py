"""A gradient with NaN or infinity does to THORN what `nonfinite` says, to the bit."""

import copy
import itertools

import pytest
import torch
from torch import Tensor

from trysquare import THORN
from trysquare_conformance.behaviour import all_parameters, give_gradients, nothing_changes, progress, run
from trysquare_conformance.behaviour_thorn import KINDS, thorn

NAN, INF = float("nan"), float("inf")
BAD = {"nan": NAN, "inf": INF, "-inf": -INF}
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
kinds = pytest.mark.parametrize("kind", KINDS)


def full(optimizer: THORN) -> list[Tensor]:
    return [p for p in all_parameters(optimizer) if p.numel()]


def spoil(p: Tensor, value: float) -> None:
    """One bad entry in the gradient, the last."""
    assert p.grad is not None
    p.grad.view(-1)[-1] = value


@pytest.mark.parametrize("value", BAD.values(), ids=list(BAD))
@kinds
def test_it_propagates_to_its_parameter_and_no_further(kind: str, value: float) -> None:
    optimizer = thorn((kind,), rectify=False)
    optimizer.param_groups[0]["rectify"] = False
    first, *rest = full(optimizer)
    spoil(first, value)
    optimizer.step()
    assert not first.isfinite().all()
    assert all(p.isfinite().all() for p in rest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("value", "kind"), [*itertools.product(BAD.values(), KINDS)])
def test_a_skipped_step_leaves_every_bit(kind: str, value: float, dtype: torch.dtype) -> None:
    """Negative zeros and counters of the mean included; gradients are let go as after any step."""
    optimizer = thorn((kind, "matrices"), dtype, nonfinite="skip")
    run(optimizer, 2)
    for p in full(optimizer):
        p.data.view(-1)[0] = -0.0
        for name in ("momentum_buffer", "z", "y", "exp_avg"):
            if name in optimizer.state[p]:
                optimizer.state[p][name].view(-1)[0] = -0.0
    for count, p in enumerate(full(optimizer)[:3], start=1):
        give_gradients(all_parameters(optimizer), seed=3)
        spoil(p, value)
        before = progress(optimizer)
        optimizer.step()
        assert progress(optimizer) == before
        assert optimizer.skipped_steps == count


def test_a_skipped_step_is_as_if_it_had_never_been() -> None:
    optimizer = thorn(nonfinite="skip")
    straight = copy.deepcopy(optimizer)
    for step in range(3):
        run(optimizer, 1, first=step)
        give_gradients(all_parameters(optimizer), seed=9)
        spoil(full(optimizer)[1], NAN)
        optimizer.step()
    run(straight, 3)
    assert progress(optimizer) == progress(straight)
    assert (optimizer.skipped_steps, straight.skipped_steps) == (3, 0)


def test_a_first_step_that_is_skipped_leaves_a_state_of_nothing() -> None:
    optimizer, fresh = thorn(nonfinite="skip"), thorn()
    spoil(full(optimizer)[0], NAN)
    optimizer.step()
    assert {int(state["step"]) for state in optimizer.state.values()} == {0}
    run(optimizer, 2)
    run(fresh, 2)
    assert progress(optimizer) == progress(fresh)


@pytest.mark.parametrize("value", BAD.values(), ids=list(BAD))
def test_raising_changes_nothing(value: float) -> None:
    optimizer = thorn(nonfinite="raise")
    run(optimizer, 1)
    give_gradients(all_parameters(optimizer), seed=3)
    spoil(optimizer.param_groups[3]["params"][2], value)
    says = "the gradient of parameter 2 of group 3 is not finite and nonfinite='raise'; nothing was changed"
    with nothing_changes(optimizer), pytest.raises(RuntimeError, match=says):
        optimizer.step()
    run(optimizer, 1)


@pytest.mark.parametrize("policy", ["propagate", "skip", "raise"])
def test_a_scaler_unscales_and_passes_over(policy: str) -> None:
    plain, scaled = (thorn(nonfinite=policy) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.zeros(()))
    run(plain, 1)
    give_gradients(all_parameters(scaled), seed=1, scale=2.0**10)
    scaler.step(scaled)
    scaler.update()
    assert progress(scaled) == progress(plain)
    give_gradients(all_parameters(scaled), seed=2, scale=2.0**10)
    spoil(full(scaled)[0], NAN)
    before = progress(scaled)
    scaler.step(scaled)
    assert progress(scaled) == before
