"""Every argument that no step could honour is refused, by name, with its value and what is allowed; nothing changes.

The values are made from the declared constraints, so a new hyperparameter or a wider interval brings its own. What is
wrong with parameters is in `test_bad_tensors`, with gradients and closures in `test_bad_steps`, with checkpoints in
`test_bad_state_dicts`.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from trysquare import DolphinFlow, _constraints
from trysquare._constraints import Choice, Constraint, Flag, Integer, Number
from trysquare_conformance.behaviour import all_parameters, bits, held, nothing_changes, parameters, run

NAN, INF = math.nan, math.inf


def bad_numbers(number: Number) -> Iterator[Any]:
    """Outside the interval, not finite, and what only looks like a float."""
    yield from (NAN, INF, -INF, -0.5, -1e-300, True, False, "0.1", [0.1], (0.1,), 0.1j, torch.tensor([0.1]))
    yield from [] if number.none else [None]
    yield from [number.low] if number.low_open else []
    yield from [] if number.high == INF else [number.high, int(number.high), number.high + 0.5]
    yield from bad_tensors() if number.tensor else [torch.tensor(0.1)]


def bad_tensors() -> Iterator[torch.Tensor]:
    """For a hyperparameter that may be a tensor: those whose shape, dtype or device say that they cannot be one."""
    yield from (torch.tensor([[0.1]]), torch.tensor(1), torch.tensor(True), torch.tensor(0.1j))
    yield torch.tensor(0.1, device="meta")


def bad_integers(integer: Integer) -> Iterator[Any]:
    yield from (integer.low - 1, -integer.low - 1, True, float(integer.low), NAN, INF, str(integer.low), None)
    yield torch.tensor(integer.low)


def bad_flags(_: Flag) -> Iterator[Any]:
    yield from (0, 1, None, "True", 1.0, [], torch.tensor(True))


def bad_choices(choice: Choice) -> Iterator[Any]:
    yield from ("nonsense", "", 0, True, 1.5, choice.options, {"vector"}, torch.tensor(0))
    yield from [str(option).upper() for option in choice.options]
    yield from [] if None in choice.options else [None]


BAD: dict[type, Callable[[Any], Iterator[Any]]] = {
    Number: bad_numbers,
    Integer: bad_integers,
    Flag: bad_flags,
    Choice: bad_choices,
}


@dataclass(frozen=True)
class Argument:
    """A value that an argument must not have, and what the message must say is allowed."""

    name: str
    value: Any
    words: str

    def __str__(self) -> str:
        shown = f"{type(self.value).__name__}-{self.value}" if self.value != "" else "empty"
        return re.sub(r"\s+", " ", f"{self.name}={shown}")

    def is_named_by(self, error: pytest.ExceptionInfo[Exception]) -> None:
        """Assert that a message tells argument, value and what is allowed."""
        said = str(error.value)
        assert f"{self.name}={self.value!r}" in said
        assert self.words in said


def from_constraints(constraints: Any) -> list[Argument]:
    def values(constraint: Constraint) -> Iterator[Any]:
        return BAD[type(constraint)](constraint)

    return [Argument(name, value, c.words) for name, c in constraints.items() for value in values(c)]


def read_only_once() -> list[Argument]:
    """Tensors whose shape, dtype and device are right: their value is read at construction and load, not in a step."""
    tensors = {name: c for name, c in DolphinFlow._constraints.items() if isinstance(c, Number) and c.tensor}
    return [
        Argument(name, torch.tensor(value), c.words) for name, c in tensors.items() for value in (-0.1, NAN, INF, -INF)
    ]


WORKSPACE = [Argument("workspace_bytes", v, "None or an int >= 1") for v in (0, -1, True, 1.5, "1", NAN, [1], 1e6)]
EXECUTION = [*from_constraints(_constraints.EXECUTION), *WORKSPACE]
IN_STEP = from_constraints(DolphinFlow._constraints)
HYPERPARAMETERS = [*IN_STEP, *read_only_once()]
GLOBAL = sorted(DolphinFlow._global)


def test_there_are_at_least_sixty() -> None:
    assert len({str(argument) for argument in [*HYPERPARAMETERS, *EXECUTION]}) >= 60
    assert {a.name for a in HYPERPARAMETERS} == set(DolphinFlow._constraints)


def stepped(**settings: Any) -> DolphinFlow:
    """An optimizer of two groups after two steps."""
    first, *rest = parameters()
    optimizer = DolphinFlow([{"params": rest}, {"params": [first], "lr": 1e-3}], **settings)
    run(optimizer, 2)
    return optimizer


@pytest.fixture(scope="module")
def optimizer() -> Iterator[DolphinFlow]:
    """One for all refusals: if any of them changed it, the test of that one says so; and it still works at the end."""
    shared = stepped()
    yield shared
    still_works(shared)


def still_works(optimizer: DolphinFlow) -> None:
    before = [bits(p) for p in all_parameters(optimizer) if p.numel()]
    run(optimizer, 1, first=2)
    after = [bits(p) for p in all_parameters(optimizer) if p.numel()]
    assert all(old != new for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("argument", [*HYPERPARAMETERS, *EXECUTION], ids=str)
def test_a_bad_argument_is_refused(argument: Argument) -> None:
    params = parameters()
    before = held(params)
    with pytest.raises(ValueError, match=argument.name) as error:
        DolphinFlow(params, **{argument.name: argument.value})
    argument.is_named_by(error)
    assert held(params) == before
    still_works(DolphinFlow(params))


@pytest.mark.parametrize("argument", HYPERPARAMETERS, ids=str)
def test_a_bad_group_is_refused(optimizer: DolphinFlow, argument: Argument) -> None:
    params = parameters([(2, 2)])
    group = {"params": params, argument.name: argument.value}
    before = held(params)
    with nothing_changes(optimizer), pytest.raises(ValueError, match="group 2") as error:
        optimizer.add_param_group(group)
    argument.is_named_by(error)
    assert held(params) == before
    assert list(group) == ["params", argument.name]


@pytest.mark.parametrize("argument", IN_STEP, ids=str)
@pytest.mark.parametrize("index", [0, 1])
def test_a_bad_edit_is_refused_by_the_next_step(optimizer: DolphinFlow, argument: Argument, index: int) -> None:
    group = optimizer.param_groups[index]
    good = group[argument.name]
    group[argument.name] = argument.value
    try:
        with nothing_changes(optimizer), pytest.raises(ValueError, match=f"group {index}") as error:
            optimizer.step()
    finally:
        group[argument.name] = good
    argument.is_named_by(error)


@pytest.mark.parametrize("argument", HYPERPARAMETERS, ids=str)
def test_a_bad_value_in_a_checkpoint_is_refused(optimizer: DolphinFlow, argument: Argument) -> None:
    saved = optimizer.state_dict()
    saved["param_groups"][1][argument.name] = argument.value
    with nothing_changes(optimizer), pytest.raises(ValueError, match="state_dict: group 1") as error:
        optimizer.load_state_dict(saved)
    argument.is_named_by(error)


# Keys of groups


@pytest.mark.parametrize("key", ["learning_rate", "betas", "maximize", "foreach", "nonfinite", "backend", "step", 3])
def test_an_unknown_key_is_refused(optimizer: DolphinFlow, key: Any) -> None:
    with nothing_changes(optimizer), pytest.raises(ValueError, match="group 2: unknown key") as error:
        optimizer.add_param_group({"params": parameters([(2, 2)]), key: 1})
    assert repr(key) in str(error.value)
    assert "weight_decay" in str(error.value)


@pytest.mark.parametrize("key", ["learning_rate", "differentiable", "fused", "capturable"])
def test_an_unknown_key_is_refused_at_construction(key: str) -> None:
    with pytest.raises(ValueError, match=f"group 0: unknown key '{key}'"):
        DolphinFlow([{"params": parameters(), key: True}])


@pytest.mark.parametrize(("name", "value"), [("gradient_clipping", 2.0), ("gradient_clipping", None)])
@pytest.mark.parametrize("place", ["constructor", "added", "edited"])
def test_a_group_cannot_have_its_own_clipping(name: str, value: Any, place: str) -> None:
    refuse_own(name, value, place)


@pytest.mark.parametrize(("name", "value"), [("loss_aware_schedule", True), ("loss_ema_beta", 0.5)])
@pytest.mark.parametrize("place", ["constructor", "added", "edited"])
def test_a_group_cannot_have_its_own_loss_schedule(name: str, value: Any, place: str) -> None:
    refuse_own(name, value, place)


def refuse_own(name: str, value: Any, place: str) -> None:
    assert name in GLOBAL
    optimizer = stepped()
    group = {"params": parameters([(2, 2)]), name: value}
    attempts: dict[str, Callable[[], object]] = {
        "constructor": lambda: DolphinFlow([{"params": parameters()}, group]),
        "added": lambda: optimizer.add_param_group(group),
        "edited": optimizer.step,
    }
    if place == "edited":
        optimizer.param_groups[1][name] = value
    with nothing_changes(optimizer), pytest.raises(ValueError, match="concerns all groups at once") as error:
        attempts[place]()
    assert f"{name}={value!r}" in str(error.value)
    optimizer.param_groups[1][name] = optimizer.param_groups[0][name]
    still_works(optimizer)


@pytest.mark.parametrize("name", GLOBAL)
def test_a_group_may_repeat_what_holds_for_all(name: str) -> None:
    optimizer = stepped()
    optimizer.add_param_group({"params": parameters([(2, 2)], seed=9), name: optimizer.param_groups[0][name]})
    still_works(optimizer)


@pytest.mark.parametrize("name", GLOBAL)
def test_what_holds_for_all_may_change_in_all(name: str) -> None:
    changed = {"gradient_clipping": 0.5, "loss_aware_schedule": True, "loss_ema_beta": 0.5}
    optimizer = stepped()
    for group in optimizer.param_groups:
        group[name] = changed[name]
    before = [bits(p) for p in all_parameters(optimizer) if p.numel()]
    optimizer.step(lambda: 1.0)
    assert all(
        old != bits(p) for old, p in zip(before, [p for p in all_parameters(optimizer) if p.numel()], strict=True)
    )


# What no hyperparameter may be called


@pytest.mark.parametrize("name", ["maximize", "foreach", "fused", "capturable", "differentiable", "betas", "amsgrad"])
def test_arguments_of_other_optimizers_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        DolphinFlow(parameters(), **{name: True})


def test_execution_arguments_are_keyword_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        DolphinFlow(parameters(), 1e-4, 0.0, 0.9, "vector", True, 0.99, 1e-8, 2, 1.0, False, 0.98, "update")


def test_triton_is_refused_and_not_replaced() -> None:
    with pytest.raises(ValueError, match=r"backend='triton'.*use 'auto', 'eager' or 'compiled'"):
        DolphinFlow(parameters(), backend="triton")
