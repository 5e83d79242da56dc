"""A run that is saved, copied or moved goes on to the very bits of one that was never interrupted."""

import copy
import itertools
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

from trysquare import DolphinFlow
from trysquare_conformance.behaviour import (
    all_parameters,
    bits,
    clones,
    everything,
    give_gradients,
    nothing_changes,
    parameters,
    progress,
    resumed,
    run,
    written,
)

MODES = ("vector", "matrix", None)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STATE = ("momentum_buffer", "exp_avg_sq")


# Saving and loading


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mode", "adaptive"), [*itertools.product(MODES, (True, False))])
def test_a_run_resumes_bit_for_bit_after_any_step(mode: str | None, adaptive: bool, dtype: torch.dtype) -> None:
    settings: dict[str, Any] = {"ortho_mode": mode, "adaptive_lr": adaptive, "lr": 0.01}
    optimizer = DolphinFlow(parameters(dtype=dtype), **settings)
    stations = []
    for step in range(5):
        stations.append(resumed(optimizer))
        run(optimizer, 1, first=step)
    for step, station in enumerate(stations):
        run(station, 5 - step, first=step)
        assert progress(station) == progress(optimizer)


@pytest.mark.parametrize("settings", [{"project": "update"}, {"bias_correction": False}, {"gradient_clipping": None}])
def test_every_rule_resumes(settings: dict[str, Any]) -> None:
    optimizer = DolphinFlow(parameters(), **settings)
    run(optimizer, 2)
    again = resumed(optimizer)
    run(optimizer, 2, first=2)
    run(again, 2, first=2)
    assert progress(again) == progress(optimizer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_is_wide_and_stays_so(dtype: torch.dtype) -> None:
    """Half parameters have float32 state, which torch.optim's loading would round; steps are counted in float64."""
    optimizer = DolphinFlow(parameters(dtype=dtype))
    run(optimizer, 1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for held in (optimizer, resumed(optimizer)):
        for state in held.state.values():
            assert {name: x.dtype for name, x in state.items()} == {"step": torch.float64, **dict.fromkeys(STATE, wide)}
    state = optimizer.state[all_parameters(optimizer)[0]]
    if dtype in {torch.bfloat16, torch.float16}:
        assert not torch.equal(state["exp_avg_sq"].to(dtype).float(), state["exp_avg_sq"])


def test_large_step_counts_survive() -> None:
    """Beyond 2²⁴ a float32 count would stand still."""
    optimizer = DolphinFlow(parameters([(2, 2)]))
    run(optimizer, 1)
    optimizer.state[all_parameters(optimizer)[0]]["step"].fill_(2**24)
    again = resumed(optimizer)
    run(again, 1)
    assert again.state[all_parameters(again)[0]]["step"] == 2**24 + 1


def test_parameters_that_were_never_stepped_have_no_entry() -> None:
    params = parameters([(2, 2), (3,)])
    optimizer = DolphinFlow(params)
    params[1].grad = None
    optimizer.step()
    saved = written(optimizer.state_dict())
    assert list(saved["state"]) == [0]
    again = resumed(optimizer)
    run(optimizer, 1)
    run(again, 1)
    assert progress(again) == progress(optimizer)


def test_execution_is_not_saved() -> None:
    """A checkpoint loads under any backend, policy and workspace, and changes none of them."""
    optimizer = DolphinFlow(parameters(), backend="eager", nonfinite="raise", workspace_bytes=1 << 20)
    run(optimizer, 1)
    assert not {"backend", "nonfinite", "workspace_bytes"} & optimizer.state_dict()["param_groups"][0].keys()
    again = resumed(optimizer, backend="auto", nonfinite="skip", workspace_bytes=1 << 10)
    assert (again.backend, again.nonfinite, again.workspace_bytes) == ("auto", "skip", 1 << 10)


def test_loaded_hyperparameters_win() -> None:
    optimizer = DolphinFlow(parameters(), lr=0.5, ortho_mode="matrix", ns_steps=5)
    run(optimizer, 1)
    again = resumed(optimizer, lr=0.1, ortho_mode=None)
    assert [again.param_groups[0][name] for name in ("lr", "ortho_mode", "ns_steps")] == [0.5, "matrix", 5]


def test_a_tensor_learning_rate_is_saved() -> None:
    optimizer = DolphinFlow(parameters(), lr=torch.tensor(0.5))
    run(optimizer, 1)
    again = resumed(optimizer)
    assert bits(again.param_groups[0]["lr"]) == bits(torch.tensor(0.5))
    again.param_groups[0]["lr"].fill_(0.25)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_what_is_loaded_shares_nothing_with_what_was_saved() -> None:
    optimizer = DolphinFlow(parameters())
    run(optimizer, 2)
    again = DolphinFlow(clones(optimizer))
    again.load_state_dict(optimizer.state_dict())
    with nothing_changes(optimizer):
        run(again, 2)


def test_half_parameters_take_over_the_state_of_single_ones() -> None:
    optimizer = DolphinFlow(parameters())
    run(optimizer, 2)
    half = DolphinFlow([torch.nn.Parameter(p.detach().bfloat16()) for p in all_parameters(optimizer)])
    half.load_state_dict(optimizer.state_dict())
    assert progress(half)["state"] == progress(optimizer)["state"]
    run(half, 1)


def test_names_are_kept() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = DolphinFlow(model.named_parameters())
    names = [name for name, _ in model.named_parameters()]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
    assert resumed(optimizer).param_groups[0]["param_names"] == names
    named = DolphinFlow(model.named_parameters())
    unnamed = DolphinFlow(model.parameters()).state_dict()
    named.load_state_dict(unnamed)
    assert named.param_groups[0]["param_names"] == names


@pytest.mark.parametrize("after", range(1, 7))
def test_the_loss_schedule_resumes(after: int) -> None:
    losses = [1.0, 2.0, 0.5, 2.0, float("nan"), 2.1, 2.2, 2.3, 2.4, 0.1]
    optimizer = DolphinFlow(parameters(), lr=0.01, loss_aware_schedule=True)
    step_by_losses(optimizer, losses[:after])
    again = resumed(optimizer)
    step_by_losses(optimizer, losses[after:])
    step_by_losses(again, losses[after:])
    assert progress(again) == progress(optimizer)
    assert optimizer.param_groups[0]["loss_lr_scale"] == 0.99


def step_by_losses(optimizer: DolphinFlow, losses: Sequence[float]) -> None:
    for loss in losses:
        give_gradients(all_parameters(optimizer), seed=0 if math.isnan(loss) else round(100 * loss))
        optimizer.step(lambda loss=loss: loss)


# Copies


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_copy_goes_its_own_way_to_the_same_place(how: str, steps: int) -> None:
    optimizer = DolphinFlow(parameters(), nonfinite="skip", workspace_bytes=1 << 16, backend="eager")
    run(optimizer, steps)
    twin = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))  # noqa: S301
    with nothing_changes(optimizer):
        run(twin, 2, first=steps)
    run(optimizer, 2, first=steps)
    assert progress(twin) == progress(optimizer)
    assert (twin.nonfinite, twin.workspace_bytes, twin.backend) == ("skip", 1 << 16, "eager")


def test_model_and_optimizer_are_copied_together() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = DolphinFlow(model.parameters())
    run(optimizer, 1)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    assert all_parameters(twin_optimizer)[0] is twin.weight
    before = bits(twin.weight)
    run(twin_optimizer, 1)
    assert bits(twin.weight) != before


def test_skipped_steps_belong_to_copies_and_not_to_checkpoints() -> None:
    optimizer = DolphinFlow(parameters(), nonfinite="skip")
    all_parameters(optimizer)[0].grad.fill_(float("nan"))
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert copy.deepcopy(optimizer).skipped_steps == 1
    assert resumed(optimizer, nonfinite="skip").skipped_steps == 0


# After loading


@pytest.mark.parametrize("how", ["load", "deepcopy", "pickle"])
def test_a_group_can_be_added_and_saved_after(how: str) -> None:
    """torch adds a default of its own when it restores an optimizer; it must not become a key of the next group."""
    optimizer = DolphinFlow(parameters())
    run(optimizer, 1)
    copies: dict[str, Callable[[], DolphinFlow]] = {
        "load": lambda: resumed(optimizer),
        "deepcopy": lambda: copy.deepcopy(optimizer),
        "pickle": lambda: pickle.loads(pickle.dumps(optimizer)),  # noqa: S301
    }
    again = copies[how]()
    again.add_param_group({"params": parameters([(2, 5)]), "lr": 0.5})
    run(again, 1)
    assert again.param_groups[1].keys() == again.param_groups[0].keys()
    third = DolphinFlow([{"params": clones(again)[:-1]}, {"params": clones(again)[-1:]}])
    third.load_state_dict(written(again.state_dict()))
    assert progress(third)["state"] == progress(again)["state"]


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1),
    "averaging": lambda o: swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=3),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, min_lr=1e-6),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_run_with_a_scheduler_resumes(name: str) -> None:
    """Schedulers leave keys of their own in the groups; they are saved and loaded like the rest."""
    optimizer = DolphinFlow(parameters(), lr=0.01)
    scheduler = SCHEDULERS[name](optimizer)
    advance(optimizer, scheduler, 3)
    again = DolphinFlow(clones(optimizer), lr=0.01)
    again_scheduler = SCHEDULERS[name](again)
    again.load_state_dict(written(optimizer.state_dict()))
    again_scheduler.load_state_dict(scheduler.state_dict())
    assert again.param_groups[0].keys() == optimizer.param_groups[0].keys()
    advance(optimizer, scheduler, 3, first=3)
    advance(again, again_scheduler, 3, first=3)
    assert progress(again) == progress(optimizer)


def advance(optimizer: DolphinFlow, scheduler: Any, steps: int, *, first: int = 0) -> None:
    for step in range(first, first + steps):
        run(optimizer, 1, first=step)
        scheduler.step(*[1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else [])


# Checkpoints by name


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without distributed")
@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoints_name_the_state(flat: bool) -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, other = (torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)) for _ in range(2))
    optimizer, again = (DolphinFlow(m.parameters(), lr=0.01) for m in (model, other))
    run(optimizer, 2)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    assert any("0.weight" in key for key in (saved if flat else saved["state"]))
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, again, saved, options=options)
    assert progress(again)["state"] == progress(optimizer)["state"]
    run(optimizer, 2, first=2)
    run(again, 2, first=2)
    assert everything(again)["parameters"] == everything(optimizer)["parameters"]
