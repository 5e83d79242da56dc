"""Every argument that no step could honour is refused, by name, with its value and what is allowed; nothing changes.

The values come from `bad_values`. What is wrong with parameters is in `test_bad_tensors`, with gradients and closures
in `test_bad_steps`, with checkpoints in `test_bad_state_dicts`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from trysquare import THORN, DolphinFlow
from trysquare._optimizer import BatchedOptimizer
from trysquare_conformance.bad_values import EXECUTION, Argument, from_constraints, read_only_once
from trysquare_conformance.behaviour import all_parameters, bits, held, nothing_changes, parameters, run


@dataclass(frozen=True)
class Subject:
    """An optimizer, and what its groups must say beside their parameters."""

    make: type[BatchedOptimizer]
    said: dict[str, Any]

    def of(self, params: Any, **settings: Any) -> Any:
        """One group."""
        return self.make([{"params": params, **self.said}], **settings)  # type: ignore[call-arg]

    def stepped(self, **settings: Any) -> Any:
        """An optimizer of two groups after two steps."""
        first, *rest = parameters()
        groups = [{"params": rest, **self.said}, {"params": [first], "lr": 1e-3, **self.said}]
        optimizer = self.make(groups, **settings)  # type: ignore[call-arg]
        run(optimizer, 2)
        return optimizer


SUBJECTS = {"DolphinFlow": Subject(DolphinFlow, {}), "THORN": Subject(THORN, {"orthogonalize": False})}
IN_STEP = {name: from_constraints(subject.make._constraints) for name, subject in SUBJECTS.items()}
HYPERPARAMETERS = {
    name: [*IN_STEP[name], *read_only_once(subject.make._constraints)] for name, subject in SUBJECTS.items()
}
GLOBAL = sorted(DolphinFlow._global)


def each(arguments: dict[str, list[Argument]]) -> list[Any]:
    """Parameters of a test: an optimizer's name, and an argument that it refuses."""
    return [pytest.param(name, a, id=f"{name}-{a}") for name, own in arguments.items() for a in own]


def stepped(**settings: Any) -> DolphinFlow:
    optimizer: DolphinFlow = SUBJECTS["DolphinFlow"].stepped(**settings)
    return optimizer


@pytest.mark.parametrize("name", SUBJECTS)
def test_there_are_at_least_sixty(name: str) -> None:
    assert len({str(argument) for argument in [*HYPERPARAMETERS[name], *EXECUTION]}) >= 60
    assert {a.name for a in HYPERPARAMETERS[name]} == set(SUBJECTS[name].make._constraints)


@pytest.fixture(scope="module")
def shared() -> Iterator[dict[str, Any]]:
    """One of each for all refusals: a test says so if its own changed it; and it still works at the end."""
    optimizers = {name: subject.stepped() for name, subject in SUBJECTS.items()}
    yield optimizers
    for optimizer in optimizers.values():
        still_works(optimizer)


@pytest.fixture
def optimizer(shared: dict[str, Any]) -> Any:
    return shared["DolphinFlow"]


def still_works(optimizer: torch.optim.Optimizer) -> None:
    full = [p for p in all_parameters(optimizer) if p.numel()]
    before = [bits(p) for p in full]
    run(optimizer, 1, first=2)
    assert all(old != bits(p) for old, p in zip(before, full, strict=True))


def given_to_the_constructor(name: str) -> list[Argument]:
    required = SUBJECTS[name].make._required
    return [a for a in [*HYPERPARAMETERS[name], *EXECUTION] if a.name not in required]


@pytest.mark.parametrize(("name", "argument"), each({name: given_to_the_constructor(name) for name in SUBJECTS}))
def test_a_bad_argument_is_refused(name: str, argument: Argument) -> None:
    params = parameters()
    before = held(params)
    with pytest.raises(ValueError, match=argument.name) as error:
        SUBJECTS[name].of(params, **{argument.name: argument.value})
    assert argument.is_named_in(str(error.value))
    assert held(params) == before
    still_works(SUBJECTS[name].of(params))


@pytest.mark.parametrize(("name", "argument"), each(HYPERPARAMETERS))
def test_a_bad_group_is_refused(shared: dict[str, Any], name: str, argument: Argument) -> None:
    params, optimizer = parameters([(2, 2)]), shared[name]
    group = {"params": params, **SUBJECTS[name].said, argument.name: argument.value}
    keys, before = list(group), held(params)
    with nothing_changes(optimizer), pytest.raises(ValueError, match="group 2") as error:
        optimizer.add_param_group(group)
    assert argument.is_named_in(str(error.value))
    assert held(params) == before
    assert list(group) == keys


@pytest.mark.parametrize(("name", "argument"), each(IN_STEP))
@pytest.mark.parametrize("index", [0, 1])
def test_a_bad_edit_is_refused_by_the_next_step(
    shared: dict[str, Any], name: str, argument: Argument, index: int
) -> None:
    group = shared[name].param_groups[index]
    good = group[argument.name]
    group[argument.name] = argument.value
    try:
        with nothing_changes(shared[name]), pytest.raises(ValueError, match=f"group {index}") as error:
            shared[name].step()
    finally:
        group[argument.name] = good
    assert argument.is_named_in(str(error.value))


@pytest.mark.parametrize(("name", "argument"), each(HYPERPARAMETERS))
def test_a_bad_value_in_a_checkpoint_is_refused(shared: dict[str, Any], name: str, argument: Argument) -> None:
    saved = shared[name].state_dict()
    saved["param_groups"][1][argument.name] = argument.value
    with nothing_changes(shared[name]), pytest.raises(ValueError, match="state_dict: group 1") as error:
        shared[name].load_state_dict(saved)
    assert argument.is_named_in(str(error.value))


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
