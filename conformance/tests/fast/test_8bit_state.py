"""The 8-bit state: a quarter of the memory, measured; resumed bit for bit; what is loaded, copied and edited counts."""

import copy
import itertools
import pickle
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from trysquare import DolphinFlow, DolphinFlow8bit
from trysquare_conformance.behaviour import (
    all_parameters,
    bits,
    everything,
    give_gradients,
    nothing_changes,
    parameters,
    progress,
    resumed,
    run,
    written,
)

SHAPES = ((64, 80), (3,), (4100,), (16, 8, 6, 6), (), (0, 3), (5, 7))
"""Coded: a matrix, a vector that ends within a block, a convolution. Not coded: small ones, a number, nothing."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MODES = ("vector", "matrix", None)
CODED = ["step", "state1", "qmap1", "absmax1", "state2", "qmap2", "absmax2"]


def stepped(steps: int = 2, **settings: Any) -> DolphinFlow8bit:
    dtype = settings.pop("dtype", torch.float32)
    optimizer = DolphinFlow8bit(parameters(SHAPES, dtype=dtype), **settings)
    run(optimizer, steps)
    return optimizer


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """What the memory of all of them takes, that which they share counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}.values())


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return bytes_of(x for state in optimizer.state.values() for x in state.values())


# Memory


@pytest.mark.parametrize("adaptive_lr", [True, False])
def test_the_state_takes_a_quarter_of_the_memory(adaptive_lr: bool) -> None:
    """A model with 99.8 % of its parameters in tensors of at least 4,096 elements."""
    shapes = ((512, 256), (256,), *[(256, 256), (256,)] * 3)
    sizes = [torch.Size(shape).numel() for shape in shapes]
    assert sum(size for size in sizes if size >= 4096) > 0.99 * sum(sizes)
    whole, coded = (kind(parameters(shapes), adaptive_lr=adaptive_lr) for kind in (DolphinFlow, DolphinFlow8bit))
    for optimizer in (whole, coded):
        run(optimizer, 2)
    assert state_bytes(coded) <= 0.26 * state_bytes(whole)
    large = [p for p in all_parameters(coded) if p.numel() >= 4096]
    moments = bytes_of(coded.state[p][name] for p in large for name in coded.state[p] if name != "step")
    each = moments / sum(p.numel() for p in large) / (1 + adaptive_lr)
    assert 1 + 4 / 256 <= each < 1 + 4 / 256 + 0.01


def test_a_model_of_large_tensors_reaches_25_5_percent() -> None:
    shapes = ((2048, 512), (512,), (512, 1024), (512,))
    whole, coded = (kind(parameters(shapes)) for kind in (DolphinFlow, DolphinFlow8bit))
    for optimizer in (whole, coded):
        run(optimizer, 1)
    assert state_bytes(coded) <= 0.255 * state_bytes(whole)


def test_explain_tells_what_the_state_takes_and_why() -> None:
    optimizer = stepped()
    plans = optimizer.explain()
    for plan, p in zip(plans, all_parameters(optimizer), strict=True):
        held = {name: x.numel() * x.element_size() for name, x in optimizer.state[p].items()}
        assert plan.state_bytes == sum(held.values())
    rules = [plan.rule for plan in plans]
    assert rules[0] == "gradient projected in 64 rows of 80; 8-bit moments"
    assert rules[1] == "fewer than two dimensions: not projected; fewer than 4096 elements: float32 moments"
    wide = DolphinFlow8bit([torch.nn.Parameter(torch.ones(64, 64, dtype=torch.float64))], ortho_mode=None)
    assert wide.explain()[0].rule == "ortho_mode=None; float64: moments not coded"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_from_4096_elements_on_moments_are_coded(dtype: torch.dtype) -> None:
    optimizer = stepped(dtype=dtype)
    for p in all_parameters(optimizer):
        state = optimizer.state[p]
        coded = p.numel() >= 4096 and dtype != torch.float64
        assert list(state) == (CODED if coded else ["step", "state1", "state2"])
        assert state["step"].dtype == torch.float64
        kind = torch.uint8 if coded else torch.float64 if dtype == torch.float64 else torch.float32
        assert {state[name].dtype for name in ("state1", "state2")} == {kind}
        assert state["state1"].shape == p.shape
        if coded:
            assert state["absmax1"].shape == (-(-p.numel() // 256),)
            assert state["qmap1"].dtype == state["absmax1"].dtype == torch.float32


def test_all_states_share_their_maps() -> None:
    optimizer = stepped()
    for held in (optimizer, resumed(optimizer), copy.deepcopy(optimizer)):
        coded = [state for state in held.state.values() if "qmap1" in state]
        assert len(coded) == 3
        assert len({state["qmap1"].data_ptr() for state in coded}) == 1
        assert len({state["qmap2"].data_ptr() for state in coded}) == 1


# Resuming


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mode", "adaptive"), [*itertools.product(MODES, (True, False))])
def test_a_run_resumes_bit_for_bit_after_any_step(mode: str | None, adaptive: bool, dtype: torch.dtype) -> None:
    """Through a file that is read without running code."""
    optimizer = stepped(0, dtype=dtype, ortho_mode=mode, adaptive_lr=adaptive, lr=0.01)
    stations = []
    for step in range(3):
        stations.append(resumed(optimizer))
        run(optimizer, 1, first=step)
    for step, station in enumerate(stations):
        run(station, 3 - step, first=step)
        assert progress(station) == progress(optimizer)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_goes_its_own_way_to_the_same_place(how: str) -> None:
    optimizer = stepped(nonfinite="skip", workspace_bytes=1 << 15)
    twin = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))  # noqa: S301
    with nothing_changes(optimizer):
        run(twin, 2, first=2)
    run(optimizer, 2, first=2)
    assert progress(twin) == progress(optimizer)


def test_a_map_that_differs_in_the_last_place_is_loaded_used_and_kept() -> None:
    optimizer = stepped()
    saved = written(optimizer.state_dict())
    other = torch.nextafter(saved["state"][0]["qmap1"], torch.tensor(2.0))
    saved["state"][0]["qmap1"] = other
    again = DolphinFlow8bit(parameters(SHAPES))
    again.load_state_dict(saved)
    states = [again.state[p] for p in all_parameters(again)]
    assert torch.equal(states[0]["qmap1"], other)
    assert not torch.equal(states[2]["qmap1"], other)
    run(again, 1)
    assert torch.equal(states[0]["qmap1"], other)
    assert bits(again.state_dict()["state"][0]["qmap1"]) == bits(other)


def test_workspace_and_windows_change_no_bit() -> None:
    """Blocks know nothing of each other: how many are stepped at once is of no consequence."""
    one, many = stepped(3, lr=0.01), stepped(3, lr=0.01, workspace_bytes=1 << 15)
    assert progress(one) == progress(many)


# Edits


def test_what_is_written_into_the_state_counts() -> None:
    optimizer, twin = stepped(), stepped()
    state = optimizer.state[all_parameters(optimizer)[0]]
    state["absmax1"].mul_(2)
    for each in (optimizer, twin):
        run(each, 1, first=2)
    ours, theirs = (bits(all_parameters(each)[0]) for each in (optimizer, twin))
    assert ours != theirs


def test_a_map_that_is_edited_counts() -> None:
    optimizer, twin = stepped(), stepped()
    for each in (optimizer, twin):
        run(each, 1, first=2)
    optimizer.state[all_parameters(optimizer)[0]]["qmap1"].mul_(0.5)
    for each in (optimizer, twin):
        run(each, 1, first=3)
    assert bits(all_parameters(optimizer)[0]) != bits(all_parameters(twin)[0])


@pytest.mark.parametrize("name", ["state1", "state2"])
def test_floats_in_the_place_of_codes_are_refused(name: str) -> None:
    optimizer = stepped()
    state = optimizer.state[all_parameters(optimizer)[0]]
    state[name] = state[name].float()
    give_gradients(all_parameters(optimizer), seed=9)
    with (
        nothing_changes(optimizer),
        pytest.raises(ValueError, match=rf"'{name}' of dtype torch.float32, expected torch.uint8"),
    ):
        optimizer.step()


def test_codes_in_another_layout_are_read_in_the_order_of_the_parameter() -> None:
    optimizer, twin = stepped(), stepped()
    state = optimizer.state[all_parameters(optimizer)[0]]
    state["state1"] = state["state1"].mT.contiguous().mT
    for each in (optimizer, twin):
        run(each, 1, first=2)
    assert progress(optimizer)["parameters"] == progress(twin)["parameters"]


# Parameters


def test_tied_parameters_are_stepped_once() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(80, 64), torch.nn.Linear(64, 80, bias=False))
    model[1].weight = model[0].weight
    optimizer = DolphinFlow8bit(model.parameters(), lr=0.01)
    model(torch.arange(8)).square().mean().backward()
    optimizer.step()
    assert len(optimizer.state) == 1
    assert model[1].weight is model[0].weight


@pytest.mark.parametrize("layout", ["transposed", "every second column", "channels last"])
def test_a_layout_changes_no_bit(layout: str) -> None:
    shape = (16, 8, 6, 6) if layout == "channels last" else (64, 80)
    (plain,) = parameters([shape])
    strange = {
        "transposed": lambda x: x.mT.contiguous().mT,
        "every second column": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
        "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    }[layout]
    other = torch.nn.Parameter(strange(plain.detach()))
    assert not other.is_contiguous()
    for workspace in (None, 1 << 15):
        first, second = (
            DolphinFlow8bit([p], lr=0.01, ortho_mode=None, workspace_bytes=workspace) for p in (plain, other)
        )
        run(first, 2)
        run(second, 2)
        assert bits(plain) == bits(other)
        assert bits(first.state[plain]["state1"]) == bits(second.state[other]["state1"])


def test_parameters_that_were_never_stepped_have_no_entry() -> None:
    params = parameters(SHAPES)
    optimizer = DolphinFlow8bit(params)
    params[0].grad = params[1].grad = None
    optimizer.step()
    assert list(written(optimizer.state_dict())["state"]) == list(range(2, len(SHAPES)))
    again = resumed(optimizer)
    run(optimizer, 1)
    run(again, 1)
    assert progress(again) == progress(optimizer)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_shows(value: float) -> None:
    """It is NaN in the state at once, and in every parameter of the norm with the step."""
    optimizer = stepped(1)
    params = all_parameters(optimizer)
    give_gradients(params, seed=5)
    params[0].grad[3, 3] = value
    optimizer.step()
    assert params[0].isnan().all()
    assert optimizer.state[params[0]]["absmax1"].isnan().all()


def test_a_gradient_that_is_not_finite_stays_in_its_block_without_clipping() -> None:
    optimizer = stepped(1, gradient_clipping=None, ortho_mode=None)
    params = all_parameters(optimizer)
    give_gradients(params, seed=5)
    params[0].grad[3, 3] = float("nan")
    optimizer.step()
    assert params[0].isnan().sum() == 1
    assert optimizer.state[params[0]]["absmax1"].isnan().nonzero().flatten().tolist() == [0]
    assert params[2].isfinite().all()
    run(optimizer, 1, first=2)
    assert params[0].view(-1)[:256].isnan().all()
    assert params[0].view(-1)[256:].isfinite().all()


def test_a_step_that_is_skipped_changes_nothing() -> None:
    optimizer = stepped(2, nonfinite="skip")
    give_gradients(all_parameters(optimizer), seed=5)
    all_parameters(optimizer)[2].grad[0] = float("inf")
    with nothing_changes(optimizer, but=("skipped",)):
        optimizer.step()
    assert optimizer.skipped_steps == 1


def test_a_refused_step_changes_nothing() -> None:
    optimizer = stepped(2, nonfinite="raise")
    give_gradients(all_parameters(optimizer), seed=5)
    all_parameters(optimizer)[2].grad[0] = float("inf")
    with nothing_changes(optimizer), pytest.raises(RuntimeError, match="parameter 2 of group 0 is not finite"):
        optimizer.step()


def test_a_small_second_moment_beside_a_large_one_makes_no_huge_step() -> None:
    """With bitsandbytes' rule it would be thousands of learning rates."""
    p = torch.nn.Parameter(torch.zeros(4096))
    optimizer = DolphinFlow8bit([p], lr=1.0, weight_decay=0.0, gradient_clipping=None)
    for gradient in ((1.0, 1e-4), (0.0, 0.0)):
        p.grad = torch.zeros(4096)
        p.grad[:2] = torch.tensor(gradient)
        before = p.detach().clone()
        optimizer.step()
    assert 0 < (p - before).abs()[1] < 1


def test_everything_that_can_change_is_seen() -> None:
    """The helper that says so knows the new names."""
    optimizer = stepped()
    assert next(sorted(state) for state in everything(optimizer)["state"] if state) == sorted(CODED)
