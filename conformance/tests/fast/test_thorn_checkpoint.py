"""A run of THORN that is saved, copied or moved goes on to the very bits of one that was never interrupted.

What weights of one mode beside a state of the other do is in `test_thorn_mismatch`.
"""

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from trysquare import THORN, DolphinFlow
from trysquare_conformance.behaviour import (
    all_parameters,
    everything,
    nothing_changes,
    parameters,
    progress,
    run,
    written,
)
from trysquare_conformance.behaviour_thorn import KINDS, clones, resumed, thorn

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
COUNTERS = {"step", "lr_max", "weight_sum"}
CYCLING = torch.optim.lr_scheduler.OneCycleLR


# Saving and loading


@pytest.mark.parametrize("mode", ["train", "eval"])
@dtypes
def test_a_run_resumes_bit_for_bit_after_any_step(dtype: torch.dtype, mode: str) -> None:
    optimizer = thorn(dtype=dtype)
    stations = []
    for step in range(4):
        getattr(optimizer, mode)()
        stations.append(resumed(optimizer))
        optimizer.train()
        run(optimizer, 1, first=step)
    for step, station in enumerate(stations):
        assert station._training == (mode == "train")
        station.train()
        run(station, 4 - step, first=step)
        assert progress(station)["parameters"] == progress(optimizer)["parameters"]
        assert progress(station)["state"] == progress(optimizer)["state"]


@dtypes
def test_state_is_wide_and_counters_are_float64(dtype: torch.dtype) -> None:
    """torch.optim's loading would cast all but `step` to the dtype of the parameter."""
    optimizer = thorn(dtype=dtype)
    run(optimizer, 2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for held in (optimizer, resumed(optimizer)):
        for state in held.state.values():
            assert {name: x.dtype for name, x in state.items()} == {
                name: torch.float64 if name in COUNTERS else wide for name in state
            }
            assert all(state[name].shape == () for name in COUNTERS & state.keys())


def test_counters_keep_what_float32_would_round() -> None:
    optimizer = thorn(("averaged",), torch.bfloat16)
    run(optimizer, 1)
    fine = 1 + 2.0**-40
    for p in all_parameters(optimizer):
        optimizer.state[p]["weight_sum"].fill_(fine)
        optimizer.state[p]["step"].fill_(2.0**24)
    again = resumed(optimizer)
    assert {again.state[p]["weight_sum"].item() for p in all_parameters(again)} == {fine}
    run(again, 1)
    assert {again.state[p]["step"].item() for p in all_parameters(again)} == {2.0**24 + 1}


def test_everything_about_the_groups_is_restored() -> None:
    optimizer = thorn(lr=torch.tensor(0.5), iters=3, coefficients=[(3.0, -4.0, 2.0)] * 3, matmul_dtype=torch.float32)
    run(optimizer, 1)
    again = resumed(optimizer)
    for group, other in zip(optimizer.param_groups, again.param_groups, strict=True):
        assert {name: repr(x) for name, x in group.items() if name != "params"} == {
            name: repr(x) for name, x in other.items() if name != "params"
        }
    assert again.explain() is not None
    assert {p.rule for p in again.explain()} == {p.rule for p in optimizer.explain()}


def test_parameters_that_were_never_stepped_have_no_entry() -> None:
    optimizer = thorn(("averaged",))
    optimizer.param_groups[0]["params"][1].grad = None
    optimizer.step()
    again = resumed(optimizer)
    assert [p in again.state for p in all_parameters(again)] == [True, False, True, True]
    run(optimizer, 1)
    run(again, 1)
    assert progress(again)["state"] == progress(optimizer)["state"]


def test_a_fresh_optimizer_can_be_saved() -> None:
    for mode in ("train", "eval"):
        optimizer = thorn()
        getattr(optimizer, mode)()
        again = resumed(optimizer)
        again.train()
        optimizer.train()
        run(optimizer, 1)
        run(again, 1)
        assert progress(again)["parameters"] == progress(optimizer)["parameters"]


def test_saving_changes_nothing_but_the_fingerprint() -> None:
    optimizer = thorn()
    run(optimizer, 1)
    with nothing_changes(optimizer, but=("groups",)):
        optimizer.state_dict()


def test_what_is_loaded_shares_nothing_with_what_was_saved() -> None:
    optimizer = thorn()
    run(optimizer, 2)
    again = THORN(clones(optimizer))
    again.load_state_dict(optimizer.state_dict())
    with nothing_changes(optimizer):
        run(again, 2)


# Copies and moves


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_copy_goes_its_own_way_to_the_same_place(how: str, steps: int) -> None:
    optimizer = thorn(nonfinite="skip", workspace_bytes=1 << 16, backend="eager")
    run(optimizer, steps)
    twin = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))  # noqa: S301
    with nothing_changes(optimizer):
        run(twin, 2, first=steps)
    run(optimizer, 2, first=steps)
    assert progress(twin) == progress(optimizer)
    assert (twin.nonfinite, twin.workspace_bytes, twin.backend) == ("skip", 1 << 16, "eager")
    twin.eval()
    with pytest.raises(RuntimeError, match="in eval mode"):
        twin.step()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("before", "after"), [*itertools.permutations(DTYPES, 2)], ids=str)
def test_a_model_that_changes_its_dtype_goes_on(before: torch.dtype, after: torch.dtype, mode: str) -> None:
    """Wider or narrower, with the state moved along; in eval mode the weights that come back are y."""
    optimizer = thorn(dtype=before)
    run(optimizer, 2)
    getattr(optimizer, mode)()
    for p in all_parameters(optimizer):
        p.data, p.grad = p.data.to(after), None
    optimizer.train()
    run(optimizer, 1, first=2)
    wide = torch.float64 if after == torch.float64 else torch.float32
    for p in all_parameters(optimizer):
        assert p.dtype == after
        assert p.isfinite().all()
        held = {x.dtype for name, x in optimizer.state[p].items() if name not in COUNTERS}
        assert held == {wide}
    assert progress(resumed(optimizer))["state"] == progress(optimizer)["state"]


def test_model_and_optimizer_are_copied_together() -> None:
    model = nn.Linear(3, 2)
    optimizer = THORN(model)
    run(optimizer, 1)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    assert all_parameters(twin_optimizer)[0] is twin.weight
    assert twin_optimizer.export_state_dict(twin).keys() == model.state_dict().keys()


@pytest.mark.parametrize("how", ["load", "deepcopy", "pickle"])
def test_a_group_can_be_added_and_saved_after(how: str) -> None:
    optimizer = thorn(("averaged",))
    run(optimizer, 1)
    copies: dict[str, Callable[[], THORN]] = {
        "load": lambda: resumed(optimizer),
        "deepcopy": lambda: copy.deepcopy(optimizer),
        "pickle": lambda: pickle.loads(pickle.dumps(optimizer)),  # noqa: S301
    }
    again = copies[how]()
    again.add_param_group({"params": parameters([(2, 5)]), "orthogonalize": True, "lr": 0.5})
    run(again, 1)
    assert again.param_groups[1].keys() == again.param_groups[0].keys()
    assert progress(resumed(again))["state"] == progress(again)["state"]


# Foreign checkpoints


FOREIGN: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "AdamW": (
        lambda: torch.optim.AdamW(parameters(KINDS["adam"].shapes)).state_dict(),
        "no 'averaged_with'; is it the state_dict of",
    ),
    "DolphinFlow": (lambda: DolphinFlow(parameters(KINDS["adam"].shapes)).state_dict(), "group 0: no 'averaged_with'"),
    "another kind": (
        lambda: stepped("averaged only").state_dict(),
        "state of parameter 0 of group 0: has step, exp_avg",
    ),
    "other groups": (
        lambda: thorn(("adam", "averaged")).state_dict(),
        "groups of [4, 4] parameters, but this optimizer",
    ),
}


def stepped(kind: str) -> THORN:
    optimizer = thorn((kind,))
    run(optimizer, 1)
    return optimizer


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_checkpoint_is_refused_whole(name: str) -> None:
    make, says = FOREIGN[name]
    optimizer = stepped("adam")
    saved = make()
    if name == "another kind":
        saved["state"] = stepped("adam").state_dict()["state"]
    with nothing_changes(optimizer), pytest.raises(ValueError, match="state_dict") as error:
        optimizer.load_state_dict(saved)
    assert says in str(error.value)
    run(optimizer, 1)


DAMAGES: dict[str, tuple[str, Any, str]] = {
    "counter dtype": ("weight_sum", torch.tensor(1.0), "weight_sum has shape () and dtype torch.float32; expected ()"),
    "counter shape": ("lr_max", torch.ones(1, dtype=torch.float64), "lr_max has shape (1,)"),
    "z half": ("z", torch.zeros(3).bfloat16(), "z has shape (3,) and dtype torch.bfloat16; expected (3,)"),
    "count negative": ("step", torch.tensor(-1.0, dtype=torch.float64), "step=-1.0 must be finite and >= 0"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_state_is_refused(name: str) -> None:
    entry, value, says = DAMAGES[name]
    optimizer = stepped("averaged")
    saved = optimizer.state_dict()
    saved["state"][0][entry] = value
    with nothing_changes(optimizer), pytest.raises(ValueError, match="state of parameter 0 of group 0") as error:
        optimizer.load_state_dict(saved)
    assert says in str(error.value)


CARRIED = {
    "train_mode": (None, 1, "train"),
    "averaged_with": ("0.9", 1.0, -0.5, 0.5),
    "fingerprints": (3, (1,), (1.0, 2.0), (True, False), [None, None]),
    "update_rate": (0, 1.0, None, True),
}


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, bad in CARRIED.items() for v in bad])
def test_what_a_group_carries_is_checked(name: str, value: Any) -> None:
    optimizer = stepped("averaged")
    saved = written(optimizer.state_dict())
    saved["param_groups"][0][name] = value
    with nothing_changes(optimizer), pytest.raises(ValueError, match="state_dict: group 0"):
        optimizer.load_state_dict(saved)


# With a scheduler


def test_a_run_with_a_scheduler_resumes() -> None:
    optimizer = thorn()
    scheduler = CYCLING(optimizer, 0.1, total_steps=20, cycle_momentum=False)
    run(optimizer, 1)
    scheduler.step()
    again = THORN(clones(optimizer))
    again_scheduler = CYCLING(again, 0.1, total_steps=20, cycle_momentum=False)
    again.load_state_dict(written(optimizer.state_dict()))
    again_scheduler.load_state_dict(scheduler.state_dict())
    for step in range(1, 3):
        for each, its in ((optimizer, scheduler), (again, again_scheduler)):
            run(each, 1, first=step)
            its.step()
    assert everything(again)["state"] == everything(optimizer)["state"]
    assert progress(again)["parameters"] == progress(optimizer)["parameters"]
