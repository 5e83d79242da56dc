"""What users do to parameters and state between steps takes effect: `optimizer.state[p]` is the only truth."""

import copy

import pytest
import torch

from trysquare import DolphinFlow
from trysquare_conformance.behaviour import all_parameters, bits, clones, normal, parameters, progress, resumed, run


@pytest.mark.parametrize("count", [1, 8])
def test_edits_of_state_take_effect(count: int) -> None:
    """Also where many parameters of one shape are stepped as one batch."""
    optimizer = DolphinFlow(parameters([(4, 3)] * count), lr=0.01)
    run(optimizer, 3)
    for p in all_parameters(optimizer):
        state = optimizer.state[p]
        state["momentum_buffer"].zero_()
        state["exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])
        state["step"].zero_()
    fresh = DolphinFlow(clones(optimizer), lr=0.01)
    run(optimizer, 2)
    run(fresh, 2)
    assert progress(optimizer) == progress(fresh)


@pytest.mark.parametrize("count", [1, 8])
def test_swapped_data_is_what_moves(count: int) -> None:
    optimizer = DolphinFlow(parameters([(4, 3)] * count), lr=0.01)
    run(optimizer, 2)
    twin = copy.deepcopy(optimizer)
    old = [p.data for p in all_parameters(optimizer)]
    new = [normal((4, 3), 9, i) for i in range(count)]
    kept = [bits(data) for data in old]
    for p, q, data in zip(all_parameters(optimizer), all_parameters(twin), new, strict=True):
        p.data = data
        q.data.copy_(data)
    run(optimizer, 1, first=2)
    run(twin, 1, first=2)
    assert [bits(data) for data in old] == kept
    assert [p.data_ptr() for p in all_parameters(optimizer)] == [data.data_ptr() for data in new]
    assert progress(optimizer) == progress(twin)


@pytest.mark.parametrize("layout", ["transposed", "channels_last"])
def test_a_new_memory_layout_is_taken_up(layout: str) -> None:
    shape = (4, 3) if layout == "transposed" else (4, 3, 2, 2)
    optimizer = DolphinFlow(parameters([shape]), lr=0.01)
    run(optimizer, 2)
    (p,) = all_parameters(optimizer)
    p.data = p.data.mT.contiguous().mT if layout == "transposed" else p.data.to(memory_format=torch.channels_last)
    before = bits(p)
    run(optimizer, 1, first=2)
    assert not p.is_contiguous()
    assert bits(p) != before
    assert progress(resumed(optimizer)) == progress(optimizer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_made_half_keeps_its_state(dtype: torch.dtype) -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = DolphinFlow(model.parameters(), lr=0.01)
    run(optimizer, 2)
    before = progress(optimizer)["state"]
    model.to(dtype)
    assert progress(optimizer)["state"] == before
    run(optimizer, 1, first=2)
    assert model.weight.dtype == dtype
    assert {x.dtype for state in optimizer.state.values() for x in state.values()} == {torch.float32, torch.float64}
    assert progress(resumed(optimizer)) == progress(optimizer)


def test_a_model_made_double_widens_its_state() -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = DolphinFlow(model.parameters(), lr=0.01)
    run(optimizer, 2)
    twin = copy.deepcopy(optimizer)
    model.double()
    for p in all_parameters(twin):
        state = twin.state[p]
        p.data = p.data.double()
        p.grad = None
        twin.state[p] = {name: x.double() for name, x in state.items()}
    run(optimizer, 1, first=2)
    run(twin, 1, first=2)
    assert progress(optimizer) == progress(twin)
    assert progress(resumed(optimizer)) == progress(optimizer)


def test_a_replaced_parameter_begins_anew() -> None:
    """As in torch: state belongs to a tensor, not to a place in a group."""
    optimizer = DolphinFlow(parameters([(4, 3), (4, 3)]), lr=0.01)
    run(optimizer, 2)
    fresh = torch.nn.Parameter(normal((4, 3), 9))
    optimizer.param_groups[0]["params"][1] = fresh
    run(optimizer, 1)
    first, second = (optimizer.state[p]["step"] for p in all_parameters(optimizer))
    assert (first, second) == (3, 1)


def test_a_parameter_appended_by_hand_is_stepped() -> None:
    optimizer = DolphinFlow(parameters([(4, 3)]))
    run(optimizer, 1)
    new = torch.nn.Parameter(normal((4, 3), 9))
    before = bits(new)
    optimizer.param_groups[0]["params"].append(new)
    run(optimizer, 1)
    assert bits(new) != before
