"""A gradient with NaN or infinity, or a norm that overflows, does what `nonfinite` says, to the bit."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from trysquare import DolphinFlow
from trysquare_conformance.behaviour import (
    all_parameters,
    bits,
    give_gradients,
    nothing_changes,
    parameters,
    progress,
    run,
)

NAN, INF = float("nan"), float("inf")
CLIPPING = (1.0, None)
MODES = ("vector", "matrix", None)
BAD = {"nan": NAN, "inf": INF, "-inf": -INF}
HUGE = 1e200
"""Finite in float64, and its square is not."""


def spoil(p: Tensor, value: float) -> None:
    """One bad entry in the gradient, the last."""
    assert p.grad is not None
    p.grad.view(-1)[-1] = value


def with_negative_zeros(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    made = parameters(shapes, dtype)
    for p in made:
        p.data.view(-1)[0] = -0.0
        p.grad.view(-1)[0] = -0.0
    return made


# propagate


@pytest.mark.parametrize(("value", "mode"), [*itertools.product(BAD.values(), MODES)])
def test_with_clipping_it_reaches_every_parameter(value: float, mode: str | None) -> None:
    """The norm is common to all, and never turns a step into one of zero length."""
    params = parameters([(4, 3), (3,)])
    spoil(params[1], value)
    DolphinFlow(params, ortho_mode=mode).step()
    assert all(p.isnan().all() for p in params)


@pytest.mark.parametrize("value", BAD.values(), ids=list(BAD))
def test_without_clipping_it_stays_in_its_row(value: float) -> None:
    params = parameters([(4, 3), (3,)])
    before = bits(params[0][:3])
    spoil(params[0], value)
    DolphinFlow(params, gradient_clipping=None).step()
    assert params[0][3].isnan().all()
    assert params[0][:3].isfinite().all()
    assert bits(params[0][:3]) != before
    assert params[1].isfinite().all()


@pytest.mark.parametrize("value", BAD.values(), ids=list(BAD))
def test_without_projection_and_clipping_it_stays_in_its_entry(value: float) -> None:
    (p,) = parameters([(4, 3)])
    spoil(p, value)
    DolphinFlow([p], ortho_mode=None, gradient_clipping=None).step()
    assert p.isfinite().sum() == 11
    assert not p[3, 2].isfinite()


def test_a_norm_beyond_float64_makes_no_silent_step_of_zero() -> None:
    params = parameters([(4, 3), (3,)], torch.float64)
    params[0].grad.fill_(HUGE)
    DolphinFlow(params).step()
    assert all(p.isnan().all() for p in params)


def test_squares_beyond_float32_are_clipped_as_usual() -> None:
    (p,) = parameters([(4, 3)])
    p.grad.fill_(1e30)
    optimizer = DolphinFlow([p], ortho_mode=None)
    optimizer.step()
    assert round(optimizer.state[p]["momentum_buffer"].norm().item(), 6) == 1.0


# skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("clipping", "mode"), [*itertools.product(CLIPPING, MODES)])
def test_a_skipped_step_leaves_every_bit(clipping: float | None, mode: str | None, dtype: torch.dtype) -> None:
    optimizer = DolphinFlow(
        with_negative_zeros([(4, 3), (3,), (4, 3), (4, 3), (2, 3, 2, 2), (4, 3), (4, 3)], dtype),
        ortho_mode=mode,
        gradient_clipping=clipping,
        nonfinite="skip",
    )
    run(optimizer, 2)
    for p in all_parameters(optimizer):
        p.data.view(-1)[0] = -0.0
        optimizer.state[p]["momentum_buffer"].view(-1)[0] = -0.0
    for count, (value, p) in enumerate(zip(BAD.values(), all_parameters(optimizer), strict=False), start=1):
        give_gradients(all_parameters(optimizer), seed=3)
        spoil(p, value)
        before = progress(optimizer)
        optimizer.step()
        assert progress(optimizer) == before
        assert optimizer.skipped_steps == count


@pytest.mark.parametrize(("clipping", "adaptive"), [*itertools.product(CLIPPING, (True, False))])
def test_a_skipped_step_is_as_if_it_had_never_been(clipping: float | None, adaptive: bool) -> None:
    optimizer = DolphinFlow(parameters(), lr=0.01, gradient_clipping=clipping, adaptive_lr=adaptive, nonfinite="skip")
    straight = copy.deepcopy(optimizer)
    for step in range(3):
        run(optimizer, 1, first=step)
        give_gradients(all_parameters(optimizer), seed=9)
        spoil(all_parameters(optimizer)[1], NAN)
        optimizer.step()
    run(straight, 3)
    assert progress(optimizer) == progress(straight)
    assert (optimizer.skipped_steps, straight.skipped_steps) == (3, 0)


def test_a_first_step_that_is_skipped_makes_zero_state() -> None:
    optimizer = DolphinFlow(parameters([(4, 3)]), nonfinite="skip")
    (p,) = all_parameters(optimizer)
    before = bits(p)
    spoil(p, INF)
    optimizer.step()
    assert bits(p) == before
    assert all(not x.any() for x in optimizer.state[p].values())


def test_skipping_writes_nothing_into_strided_parameters() -> None:
    optimizer = DolphinFlow(parameters([(4, 3)]), nonfinite="skip")
    (p,) = all_parameters(optimizer)
    run(optimizer, 1)
    p.data = p.data.mT.contiguous().mT
    spoil(p, NAN)
    before = progress(optimizer)
    optimizer.step()
    assert progress(optimizer) == before


@pytest.mark.parametrize("workspace", [1, 1 << 10, None])
def test_skipping_holds_in_pieces(workspace: int | None) -> None:
    optimizer = DolphinFlow(parameters([(64, 8)] * 3), nonfinite="skip", workspace_bytes=workspace)
    run(optimizer, 1)
    spoil(all_parameters(optimizer)[2], INF)
    before = progress(optimizer)
    optimizer.step()
    assert progress(optimizer) == before


def test_every_group_is_skipped_for_one() -> None:
    first, second = parameters([(4, 3), (2, 2)])
    optimizer = DolphinFlow([{"params": [first]}, {"params": [second], "ortho_mode": None}], nonfinite="skip")
    spoil(second, NAN)
    before = bits(first), bits(second)
    optimizer.step()
    assert (bits(first), bits(second)) == before
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("clipping", CLIPPING)
def test_a_norm_beyond_float64_is_skipped(clipping: float | None) -> None:
    optimizer = DolphinFlow(parameters([(4, 3)], torch.float64), gradient_clipping=clipping, nonfinite="skip")
    (p,) = all_parameters(optimizer)
    p.grad.fill_(HUGE)
    before = bits(p)
    optimizer.step()
    assert bits(p) == before
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("clipping", CLIPPING)
def test_skip_and_propagate_agree_where_all_is_finite(clipping: float | None) -> None:
    skipping, propagating = (
        DolphinFlow(parameters(), lr=0.01, gradient_clipping=clipping, nonfinite=policy)
        for policy in ("skip", "propagate")
    )
    run(skipping, 3)
    run(propagating, 3)
    assert progress(skipping) == progress(propagating)
    assert skipping.skipped_steps == 0


def test_the_count_is_a_copy_on_the_device() -> None:
    optimizer = DolphinFlow(parameters([(4, 3)]), nonfinite="skip")
    spoil(all_parameters(optimizer)[0], NAN)
    seen = optimizer.skipped_steps
    optimizer.step()
    assert (seen, optimizer.skipped_steps) == (0, 1)
    assert (seen.dtype, seen.shape) == (torch.int64, ())


# raise


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(("value", "clipping"), [*itertools.product(BAD.values(), CLIPPING)])
def test_raising_names_the_parameter_and_changes_nothing(value: float, clipping: float | None, steps: int) -> None:
    named = [(f"layer.{i}", p) for i, p in enumerate(parameters([(4, 3), (3,), (4, 3)]))]
    optimizer = DolphinFlow(named, gradient_clipping=clipping, nonfinite="raise")
    run(optimizer, steps)
    spoil(named[1][1], value)
    with nothing_changes(optimizer), pytest.raises(RuntimeError, match=r"gradient of layer\.1 is not finite") as error:
        optimizer.step()
    assert "nonfinite='skip'" in str(error.value)
    assert len(optimizer.state) == (3 if steps else 0)
    before = progress(optimizer)
    run(optimizer, 1)
    assert progress(optimizer) != before


def test_raising_names_a_place_where_there_is_no_name() -> None:
    optimizer = DolphinFlow([{"params": [p]} for p in parameters([(4, 3), (3,)])], nonfinite="raise")
    spoil(all_parameters(optimizer)[1], NAN)
    with pytest.raises(RuntimeError, match="the gradient of parameter 0 of group 1 is not finite"):
        optimizer.step()


@pytest.mark.parametrize("clipping", CLIPPING)
def test_a_norm_beyond_float64_raises(clipping: float | None) -> None:
    optimizer = DolphinFlow(parameters([(4, 3)], torch.float64), gradient_clipping=clipping, nonfinite="raise")
    all_parameters(optimizer)[0].grad.fill_(HUGE)
    with nothing_changes(optimizer), pytest.raises(RuntimeError, match="norm of all gradients is not finite"):
        optimizer.step()


def test_raise_and_propagate_agree_where_all_is_finite() -> None:
    raising, propagating = (DolphinFlow(parameters(), lr=0.01, nonfinite=policy) for policy in ("raise", "propagate"))
    run(raising, 3)
    run(propagating, 3)
    assert progress(raising) == progress(propagating)


def test_raise_without_any_gradient_is_no_error() -> None:
    optimizer = DolphinFlow(parameters(), nonfinite="raise")
    optimizer.zero_grad()
    with nothing_changes(optimizer):
        optimizer.step()


# The loss


@pytest.mark.parametrize("policy", ["propagate", "skip", "raise"])
@pytest.mark.parametrize("loss", [NAN, INF, torch.tensor(NAN)])
def test_a_loss_that_is_not_finite_changes_nothing_in_the_schedule(policy: str, loss: Any) -> None:
    optimizer = DolphinFlow(parameters(), lr=0.01, loss_aware_schedule=True, nonfinite=policy)
    optimizer.step(lambda: 1.0)
    before = progress(optimizer)
    optimizer.step(lambda: loss)
    assert progress(optimizer)["groups"] == before["groups"]
    assert progress(optimizer)["parameters"] != before["parameters"]
