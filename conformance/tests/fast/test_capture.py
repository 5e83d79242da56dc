"""What a captured step decides, and what it puts in place for a capture: all that can be seen without a GPU.

The capture itself is in `test_capture_cuda`, that no step reads or copies from the host in `test_capture_safety`.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import optimizer as torchs

import trysquare
from trysquare import THORN, CapturedStep, DolphinFlow, DolphinFlow8bit
from trysquare._capture import Gradients, Numbers
from trysquare._circumstances import Circumstances, check, circumstances, difference, misplaced, refusal
from trysquare_conformance.behaviour import (
    all_parameters,
    bits,
    everything,
    give_gradients,
    normal,
    parameters,
    progress,
    run,
)
from trysquare_conformance.behaviour_thorn import thorn

CPU = torch.device("cpu")
Make = Callable[..., Any]
OPTIMIZERS: dict[str, Make] = {
    "DolphinFlow": lambda **settings: DolphinFlow(parameters(), **settings),
    "DolphinFlow8bit": lambda **settings: DolphinFlow8bit([*parameters(), *parameters([(80, 60)])], **settings),
    "THORN": thorn,
}


# What cannot be captured


def with_hook(optimizer: Any) -> Any:
    optimizer.register_step_pre_hook(lambda *_: None)
    return optimizer


def with_post_hook(optimizer: Any) -> Any:
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "raise": (lambda: DolphinFlow(parameters(), nonfinite="raise"), "nonfinite='raise' reads the gradients"),
    "loss": (lambda: DolphinFlow(parameters(), loss_aware_schedule=True), "loss_aware_schedule=True reads the loss"),
    "compiled": (lambda: DolphinFlow8bit(parameters(), backend="compiled"), "backend='compiled' runs"),
    "pre-hook": (lambda: with_hook(thorn()), "hooks around step()"),
    "post-hook": (lambda: with_post_hook(thorn()), "hooks around step()"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_captured_is_refused_with_its_reason(name: str) -> None:
    make, reason = REFUSED[name]
    optimizer = make()
    found = refusal(optimizer)
    assert found is not None
    assert found.startswith(reason) or reason in found
    before = everything(optimizer)
    for refused in (lambda: CapturedStep(optimizer), lambda: check(optimizer)):
        with pytest.raises(RuntimeError, match="cannot be captured into a CUDA graph") as error:
            refused()
        assert reason in str(error.value)
    assert everything(optimizer) == before


def test_hooks_of_all_optimizers_count_too() -> None:
    handle = torchs.register_optimizer_step_post_hook(lambda *_: None)
    try:
        assert "hooks around step()" in str(refusal(DolphinFlow(parameters())))
    finally:
        handle.remove()
    assert refusal(DolphinFlow(parameters())) is None


def test_a_compiled_backend_that_the_environment_asks_for_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THORN_COMPILE", "1")
    assert "backend='compiled' runs" in str(refusal(thorn()))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_without_a_gpu_the_place_is_the_reason(name: str, nonfinite: str) -> None:
    optimizer = OPTIMIZERS[name](nonfinite=nonfinite)
    assert refusal(optimizer) is None
    with pytest.raises(RuntimeError, match=r"its parameters are on cpu: it needs an NVIDIA or AMD GPU"):
        CapturedStep(optimizer)


def test_parameters_on_two_devices_are_refused() -> None:
    optimizer = DolphinFlow(parameters())
    optimizer.param_groups[0]["params"].append(torch.nn.Parameter(torch.zeros(2, device="meta")))
    assert "its parameters are on cpu and meta, and a graph is of one GPU" in str(misplaced(optimizer))


@pytest.mark.parametrize("given", [torch.optim.SGD([torch.zeros(1)]), None, [torch.zeros(1)]], ids=type)
def test_other_optimizers_are_refused(given: Any) -> None:
    with pytest.raises(TypeError, match=r"optimizer is a .*: give one of trysquare's"):
        CapturedStep(given)


def test_copy_gradients_is_a_flag() -> None:
    with pytest.raises(TypeError, match="copy_gradients=1 must be True or False"):
        CapturedStep(DolphinFlow(parameters()), copy_gradients=1)  # type: ignore[arg-type]


def test_what_a_step_refuses_a_captured_one_does_too() -> None:
    """Before it looks for a GPU: eval mode, gradient release, bad numbers, bad gradients."""
    optimizer = thorn()
    run(optimizer, 1)
    optimizer.eval()
    with pytest.raises(RuntimeError, match="in eval mode would train on"):
        check(optimizer)
    model = torch.nn.Linear(3, 2)
    released = THORN(model)
    released.setup_gradient_release(model)
    with pytest.raises(RuntimeError, match="stepped in the backward pass"):
        check(released)
    plain = DolphinFlow(parameters())
    plain.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"group 0: lr=-1\.0 must be"):
        check(plain)
    sparse = DolphinFlow(parameters([(4, 3)]))
    all_parameters(sparse)[0].grad = normal((4, 3), 0).to_sparse()
    with pytest.raises(ValueError, match="make it dense"):
        check(sparse)


# What is looked at between two steps


def now(optimizer: Any, *, copied: bool = True) -> Circumstances:
    return circumstances(optimizer, copied=copied)


def change_of(optimizer: Any, change: Callable[[Any], Any], *, copied: bool = True) -> str | None:
    """What is said to be different after a change, from an optimizer that has stepped."""
    run(optimizer, 1)
    give_gradients(all_parameters(optimizer))
    before = now(optimizer, copied=copied)
    change(optimizer)
    return difference(before, now(optimizer, copied=copied), optimizer.param_groups)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_change_nothing(name: str) -> None:
    """Nor do numbers that the device holds, values written in place, new gradients, or a checkpoint that is taken."""
    optimizer = OPTIMIZERS[name]()

    def everyday(_: Any) -> None:
        optimizer.state_dict()
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"], group["initial_lr"] = group["lr"] / 2, 0.25, 1.0
        with torch.no_grad():
            for p in all_parameters(optimizer):
                p.mul_(0.5)
                next(x for x in optimizer.state[p].values() if x.is_floating_point()).mul_(1)
        run(optimizer, 2)
        give_gradients(all_parameters(optimizer), seed=9)

    assert change_of(optimizer, everyday) is None


def set_in_group(name: str, value: Any) -> Callable[[Any], None]:
    return lambda optimizer: optimizer.param_groups[0].update({name: value})


def swap_data(optimizer: Any) -> None:
    p = all_parameters(optimizer)[0]
    p.data = p.data.clone()


def transpose_in_place(optimizer: Any) -> None:
    p = all_parameters(optimizer)[0]
    p.data = p.data.t()
    p.grad = p.grad.t() if p.grad is not None else None


def drop_gradient(optimizer: Any) -> None:
    all_parameters(optimizer)[1].grad = None


def replace_state(optimizer: Any) -> None:
    state = optimizer.state[all_parameters(optimizer)[0]]
    state["momentum_buffer"] = state["momentum_buffer"].clone()


def load(optimizer: Any) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def add_group(optimizer: Any) -> None:
    optimizer.add_param_group({"params": parameters([(2, 2)])})


def add_parameter(optimizer: Any) -> None:
    optimizer.param_groups[0]["params"] += parameters([(2, 2)])


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "hyperparameter": (set_in_group("momentum", 0.5), "group 0: momentum was 0.9, and is 0.5"),
    "mode": (set_in_group("ortho_mode", None), "group 0: ortho_mode was 'vector', and is None"),
    "what a schedule left": (set_in_group("loss_lr_scale", 0.99), "group 0: loss_lr_scale was 1.0, and is 0.99"),
    "kind of number": (set_in_group("lr", torch.tensor(0.1)), "group 0: lr was torch.float64, and is torch.float32"),
    "policy": (lambda o: setattr(o, "nonfinite", "skip"), "nonfinite was 'propagate', and is 'skip'"),
    "workspace": (lambda o: setattr(o, "workspace_bytes", 9), "workspace_bytes was None, and is 9"),
    "place": (swap_data, "parameter 0 of group 0 is elsewhere in memory"),
    "layout": (transpose_in_place, "parameter 0 of group 0 is elsewhere in memory"),
    "missing gradient": (drop_gradient, "parameter 1 of group 0 had a gradient, and has none"),
    "state": (replace_state, "the state of parameter 0 of group 0 is elsewhere in memory, or another one"),
    "checkpoint": (load, "the state of parameter 0 of group 0 is elsewhere in memory, or another one"),
    "group": (add_group, "there were 1 groups, and are 2"),
    "parameter": (add_parameter, "group 0 had 5 parameters, and has 6"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_graph_takes_for_granted_is_seen_to_change(name: str) -> None:
    change, words = CHANGES[name]
    assert change_of(DolphinFlow(parameters()), change) == words


def test_a_gradient_that_appears_is_seen() -> None:
    optimizer = DolphinFlow(parameters())
    run(optimizer, 1)
    drop_gradient(optimizer)
    before = now(optimizer)
    give_gradients(all_parameters(optimizer))
    words = "parameter 1 of group 0 had no gradient, and has one"
    assert difference(before, now(optimizer), optimizer.param_groups) == words


def test_only_gradients_that_are_read_where_they_are_have_to_stay() -> None:
    def renew(optimizer: Any) -> None:
        held.extend(p.grad for p in all_parameters(optimizer))  # their memory is not used again
        give_gradients(all_parameters(optimizer))

    held: list[Any] = []
    assert change_of(DolphinFlow(parameters()), renew) is None
    words = "the gradient of parameter 0 of group 0 is elsewhere in memory"
    assert change_of(DolphinFlow(parameters()), renew, copied=False) == words


def test_an_edit_of_the_map_of_8bit_codes_is_seen() -> None:
    """The boundaries between its values, which a step reads, were computed from it."""
    optimizer = DolphinFlow8bit(parameters([(80, 60)]))

    def edit(_: Any) -> None:
        optimizer.state[all_parameters(optimizer)[0]]["qmap1"].mul_(1)

    assert change_of(optimizer, edit) == "the state of parameter 0 of group 0 is elsewhere in memory, or another one"


def test_a_list_that_is_edited_in_place_is_seen() -> None:
    optimizer = thorn(("adam",), betas=[0.9, 0.9])

    def edit(_: Any) -> None:
        optimizer.param_groups[0]["betas"][1] = 0.5

    assert change_of(optimizer, edit) == "group 0: betas was (0.9, 0.9), and is (0.9, 0.5)"


def test_evaluating_in_between_changes_nothing() -> None:
    def evaluate(optimizer: Any) -> None:
        with optimizer.averaged():
            pass

    assert change_of(thorn(), evaluate) is None


def test_names_of_parameters_are_used() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = DolphinFlow(model.named_parameters())
    assert change_of(optimizer, swap_data) == "weight is elsewhere in memory"


# What is put in place


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("given", ["floats", "float32 tensors"])
def test_a_step_on_what_a_graph_reads_is_the_step_with_tensors(name: str, given: str) -> None:
    """The step that is captured, bit for bit, under a schedule; and the groups hold again what they held."""
    dtype = torch.float64 if given == "floats" else torch.float32
    plain, other = OPTIMIZERS[name](), OPTIMIZERS[name]()
    numbers, gradients = Numbers(), Gradients(copied=True)
    for step in range(4):
        decay, rate = 0.3 / (step + 1), 0.01 / (step + 1)
        for group, theirs in zip(plain.param_groups, other.param_groups, strict=True):
            group.update(lr=torch.tensor(rate, dtype=dtype), weight_decay=torch.tensor(decay, dtype=dtype))
            theirs.update(lr=rate, weight_decay=decay)
            if given != "floats":
                theirs.update(lr=torch.tensor(rate), weight_decay=torch.tensor(decay))
        run(plain, 1, first=step)
        give_gradients(all_parameters(other), seed=step + 1)
        own = [(p, p.grad) for p in all_parameters(other)]
        said = [(group["lr"], group["weight_decay"]) for group in other.param_groups]
        numbers.load(other.param_groups, CPU)
        gradients.load(all_parameters(other))
        with numbers.in_place(other.param_groups), gradients.in_place(all_parameters(other)):
            other.step()
        assert all(p.grad is gradient for p, gradient in own)
        assert [(group["lr"], group["weight_decay"]) for group in other.param_groups] == said
    mine, theirs = (progress(optimizer) for optimizer in (plain, other))
    assert mine["parameters"] == theirs["parameters"]
    assert mine["state"] == theirs["state"]


def test_numbers_stay_where_they_are_and_follow_the_groups() -> None:
    optimizer, numbers = DolphinFlow(parameters()), Numbers()
    (group,) = optimizer.param_groups
    places = set()
    for rate in (0.5, 0.25, 0.25, torch.tensor(0.125, dtype=torch.float64), 0.125, 0.5):
        group["lr"] = rate
        numbers.load(optimizer.param_groups, CPU)
        with numbers.in_place(optimizer.param_groups):
            held = group["lr"]
            assert held.item() == float(rate)
            places.add(held.data_ptr())
        assert group["lr"] is rate
    assert len(places) == 1


def test_gradients_are_copied_to_where_they_stay() -> None:
    """Whatever their layout; nobody else's memory is written, not even where two parameters share a gradient."""
    first, second, third = parameters([(4, 3), (4, 3), (4, 3)])
    shared = normal((4, 3), 5)
    gradients, places = Gradients(copied=True), []
    for row in (1.0, 2.0):
        first.grad, second.grad, third.grad = shared, shared, torch.full((3,), row).expand(4, 3)
        before = bits(shared)
        gradients.load([first, second, third])
        with gradients.in_place([first, second, third]):
            found = [p.grad for p in (first, second, third) if p.grad is not None]
            assert [bits(gradient) for gradient in found] == [before, before, bits(torch.full((4, 3), row))]
            places.append([gradient.data_ptr() for gradient in found])
        assert bits(shared) == before
    assert places[0] == places[1]
    assert len(set(places[0])) == 3


def test_without_copies_a_step_sees_the_gradients_themselves() -> None:
    (p,) = parameters([(4, 3)])
    own, gradients = p.grad, Gradients(copied=False)
    gradients.load([p])
    with gradients.in_place([p]):
        assert p.grad is own


def test_an_error_within_puts_everything_back() -> None:
    optimizer, numbers, gradients = DolphinFlow(parameters()), Numbers(), Gradients(copied=True)
    before = everything(optimizer)
    numbers.load(optimizer.param_groups, CPU)
    gradients.load(all_parameters(optimizer))
    with (
        pytest.raises(KeyError),
        numbers.in_place(optimizer.param_groups),
        gradients.in_place(all_parameters(optimizer)),
    ):
        raise KeyError
    assert everything(optimizer) == before


def test_the_name_is_public_and_imported_when_it_is_asked_for() -> None:
    assert trysquare.CapturedStep is CapturedStep
    assert CapturedStep.__module__ == "trysquare._capture"


# The addresses that Triton's kernels read


@pytest.mark.parametrize("make", [DolphinFlow, DolphinFlow8bit])
@pytest.mark.parametrize("mode", ["vector", "matrix"])
def test_tables_get_places_and_are_filled_afterwards(make: Make, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All launches of a step, written down and not run: no number of the host is on the device before `fill`."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from trysquare.kernels import _launch, recording

    kept: dict[Any, torch.Tensor] = {}
    monkeypatch.setattr(_launch, "_kept", kept)
    optimizer = make(parameters([(4, 3), (4, 3), (3,), (80, 60)]), ortho_mode=mode, backend="eager")
    run(optimizer, 1)
    optimizer.backend = "triton"
    with recording():
        optimizer.step()  # compiles first
    kept.clear()
    with recording() as ordinary:
        optimizer.step()
        launched, shapes = len(ordinary), sorted(tuple(table.shape) for table in kept.values())
    kept.clear()
    with recording() as again, _launch.reserving() as places:
        optimizer.step()
        assert len(again) == launched > 0
        read = {id(x) for launch in again for x in launch.arguments if isinstance(x, torch.Tensor)}
    assert not kept
    assert sorted(tuple(place.shape) for place in places.values()) == shapes
    assert {id(place) for place in places.values() if place.dtype == torch.int64} <= read
    _launch.fill(places)
    for (_, values, dtype, _), place in places.items():
        assert torch.equal(place, torch.tensor(values, dtype=dtype))
