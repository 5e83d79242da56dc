"""What a graph would replay, replayed on a CPU: the same operations on the same memory, whatever has changed since.

A tape of tensor operations stands in for the graph. It is no proof for a GPU, where `test_capture_cuda` runs; but a
number that a step takes from Python instead of from memory, or memory that does not stay, shows here too.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trysquare import CapturedStep, DolphinFlow, DolphinFlow8bit, _capture, _circumstances
from trysquare_conformance.behaviour import all_parameters, give_gradients, parameters, progress
from trysquare_conformance.behaviour_thorn import KINDS, thorn

STEPS = 6
SHAPES = ((4, 3), (4, 3), (3,), (), (0, 3), (80, 60))
Make = Callable[..., Any]


class Tape(TorchDispatchMode):
    """Records operations with the tensors that they took and made, and does them again in the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for every operation."""
        result = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Do everything again."""
        for func, args, kwargs, result in self.done:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def tensors(optimizer: Any) -> list[Tensor]:
    """All that a step writes."""
    states = [optimizer.state[p] for p in all_parameters(optimizer)]
    held = [x for state in states for name, x in state.items() if name not in optimizer._constant_entries]
    return [*all_parameters(optimizer), *held, optimizer._skipped]


def record(step: CapturedStep) -> None:
    """In place of a capture: the step is written down, and what it did is undone."""
    written = tensors(step.optimizer)
    before, tape = [tensor.detach().clone() for tensor in written], Tape()
    with step._in_place(), tape:
        step.optimizer.step()
    for tensor, old in zip(written, before, strict=True):
        tensor.copy_(old)
    step._graph = tape  # type: ignore[assignment]
    step.captures += 1


@pytest.fixture(autouse=True)
def _tapes(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (_capture, _circumstances):
        monkeypatch.setattr(module, "misplaced", lambda _: None)
    monkeypatch.setattr(CapturedStep, "_capture", record)


OPTIMIZERS: dict[str, Make] = {
    **{
        f"DolphinFlow, {mode}": lambda mode=mode, **settings: DolphinFlow(
            parameters(SHAPES), ortho_mode=mode, **settings
        )
        for mode in ("vector", "matrix", None)
    },
    "DolphinFlow in bfloat16": lambda **settings: DolphinFlow(parameters(SHAPES, torch.bfloat16), **settings),
    "DolphinFlow8bit": lambda **settings: DolphinFlow8bit(parameters(SHAPES), **settings),
    **{f"THORN, {kind}": lambda kind=kind, **settings: thorn((kind,), **settings) for kind in KINDS},
}


def schedule(optimizer: Any, step: int, *, as_tensors: bool) -> None:
    """Both numbers change in every step."""
    for group in optimizer.param_groups:
        for name, number in (("lr", 0.02 / (step + 1)), ("weight_decay", 0.3 / (step + 2))):
            group[name] = torch.tensor(number, dtype=torch.float64) if as_tensors else number


def compared(make: Make, change: Callable[[Any, int], None] = lambda *_: None, **settings: Any) -> CapturedStep:
    """A replayed run beside an ordinary one, with the same thing done to both before each step."""
    plain, other = make(**settings), make(**settings)
    step = CapturedStep(other)
    for i in range(STEPS):
        for optimizer in (plain, other):
            give_gradients(all_parameters(optimizer), seed=i + 1)
            schedule(optimizer, i, as_tensors=optimizer is plain)
            change(optimizer, i)
        plain.step()
        step()
        mine, theirs = progress(plain), progress(other)
        assert (mine["parameters"], mine["state"]) == (theirs["parameters"], theirs["state"])
        assert plain.skipped_steps == other.skipped_steps
        assert [p.grad is None for p in all_parameters(plain)] == [p.grad is None for p in all_parameters(other)]
    return step


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replayed_steps_are_the_steps_themselves(name: str, nonfinite: str) -> None:
    def spoil(optimizer: Any, i: int) -> None:
        if i == 4 and nonfinite == "skip":
            gradient = all_parameters(optimizer)[0].grad
            assert gradient is not None
            gradient.fill_(float("nan"))

    step = compared(OPTIMIZERS[name], spoil, nonfinite=nonfinite)
    assert (step.captures, step.reason) == (1, "nothing was captured yet")


def drop(optimizer: Any) -> None:
    all_parameters(optimizer)[1].grad = None


def load(optimizer: Any) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def swap(optimizer: Any) -> None:
    p = all_parameters(optimizer)[0]
    p.data = p.data.clone()


def write(optimizer: Any) -> None:
    optimizer.state[all_parameters(optimizer)[0]]["momentum_buffer"].mul_(0.5)


def cycle(optimizer: Any) -> None:
    optimizer.param_groups[0]["momentum"] = 0.5


@pytest.mark.parametrize(("change", "captures"), [(drop, 2), (load, 2), (swap, 2), (write, 1), (cycle, 2)])
def test_what_changes_in_between_is_taken_up(change: Callable[[Any], None], captures: int) -> None:
    """A gradient that is missing once means two ordinary steps: one without it, one with it."""
    step = compared(OPTIMIZERS["DolphinFlow, vector"], lambda optimizer, i: change(optimizer) if i == 2 else None)
    assert step.captures == captures
    assert (step.reason == "nothing was captured yet") == (captures == 1)


def test_a_step_without_gradients_is_none() -> None:
    step = compared(OPTIMIZERS["DolphinFlow, vector"], lambda o, i: o.zero_grad() if i == 3 else None)
    assert step.captures == 1


def test_a_number_from_python_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the rate a constant, the tape would replay the first one."""
    monkeypatch.setattr(_capture.Numbers, "in_place", lambda *_: _capture.ExitStack())
    with pytest.raises(AssertionError):
        compared(OPTIMIZERS["DolphinFlow, vector"])
