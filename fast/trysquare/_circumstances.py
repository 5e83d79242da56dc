"""What a step is captured under: whether it can be, what it would be captured for good, and what has changed since.

Nothing here touches a GPU: what `CapturedStep` decides can be looked at, and tested, without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import optimizer as torchs

from trysquare import _parameters
from trysquare._optimizer import BatchedOptimizer, Group

NUMBERS = ("lr", "weight_decay")
"""The hyperparameters that a captured step reads from the device; all others are constants in it."""

UNREAD = frozenset({"fingerprints"})
"""What a group carries for checkpoints alone."""

Place = tuple[int, torch.Size, tuple[int, ...]]


class Member(NamedTuple):
    """Where a captured step finds a parameter, its gradient (None: it has none) and its state."""

    parameter: Place
    gradient: Place | None
    state: Mapping[str, tuple[int, int]]


class Circumstances(NamedTuple):
    """All that a captured step takes for granted."""

    execution: Mapping[str, Any]
    settings: list[Mapping[str, Any]]
    members: list[list[Member]]


def refusal(optimizer: BatchedOptimizer) -> str | None:
    """Why a step cannot be captured as the optimizer is set up, and what to do; None: it can."""
    if optimizer.nonfinite == "raise":
        return "nonfinite='raise' reads the gradients in every step: use 'skip' or 'propagate'"
    if optimizer.param_groups[0].get("loss_aware_schedule"):
        return "loss_aware_schedule=True reads the loss in every step: use a scheduler instead"
    if _hooked(optimizer):
        return "it has hooks around step(), which a replay would leave out: remove them"
    chosen = {optimizer._chosen(p.device) for group in optimizer.param_groups for p in group["params"]}  # noqa: SLF001
    unknown = sorted(chosen - {"eager", "triton"})
    if unknown:
        return f"backend={unknown[0]!r} runs, which is not captured: use 'auto', 'eager' or 'triton'"
    return None


def _hooked(optimizer: BatchedOptimizer) -> bool:
    own = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks  # noqa: SLF001
    return any([*own, torchs._global_optimizer_pre_hooks, torchs._global_optimizer_post_hooks])  # noqa: SLF001


def misplaced(optimizer: BatchedOptimizer) -> str | None:
    """Why a step cannot be captured where the parameters are; None: it can."""
    devices = {p.device for group in optimizer.param_groups for p in group["params"]}
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        return f"its parameters are on {names}, and a graph is of one GPU: use an optimizer for each"
    (device,) = devices
    if device.type != "cuda":
        return f"its parameters are on {device}: it needs an NVIDIA or AMD GPU"
    if torch.cuda.is_current_stream_capturing():
        return "another graph is being captured: call it outside of that"
    return None


def device_of(optimizer: BatchedOptimizer) -> torch.device:
    """Where the parameters are."""
    found: torch.device = next(p.device for group in optimizer.param_groups for p in group["params"])
    return found


def check(optimizer: BatchedOptimizer) -> None:
    """Raise what `step` would raise, and where a step cannot be captured: what can change between two steps.

    Raises:
        RuntimeError: says why a step cannot be captured.
        TypeError, ValueError: as `step` does.
    """
    optimizer._check_groups(optimizer.param_groups)  # noqa: SLF001
    _raise(optimizer, refusal(optimizer))
    optimizer._before_step(None)  # noqa: SLF001
    optimizer._check_gradients()  # noqa: SLF001
    _raise(optimizer, misplaced(optimizer))


def _raise(optimizer: BatchedOptimizer, reason: str | None) -> None:
    if reason is not None:
        raise RuntimeError(
            f"{type(optimizer).__name__} cannot be captured into a CUDA graph: {reason}; nothing was changed. "
            "optimizer.step() does the same without a graph"
        )


def with_gradient(optimizer: BatchedOptimizer) -> list[Tensor]:
    """The parameters that a step would move."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def circumstances(optimizer: BatchedOptimizer, *, copied: bool) -> Circumstances:
    """What holds now; ``copied`` gradients are at places of their own, whatever those are that a caller computes."""
    execution = {name: getattr(optimizer, name) for name in ("nonfinite", "workspace_bytes", "backend")}
    execution["the backend that runs"] = optimizer._chosen(device_of(optimizer))  # noqa: SLF001
    execution["the counter of skipped steps"] = optimizer._skipped.data_ptr()  # noqa: SLF001
    groups = optimizer.param_groups
    members = [[_member(optimizer, p, copied=copied) for p in group["params"]] for group in groups]
    return Circumstances(execution, [_settings(optimizer, group) for group in groups], members)


def _settings(optimizer: BatchedOptimizer, group: Group) -> dict[str, Any]:
    """The constants of a group, and of what is no constant the dtype."""
    names = (optimizer._constraints.keys() | optimizer._carried.keys()) - UNREAD  # noqa: SLF001
    return {name: dtype_of(group[name]) if name in NUMBERS else _frozen(group[name]) for name in sorted(names)}


def _frozen(value: Any) -> Any:
    """A value that nobody can edit in place."""
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def dtype_of(value: float | Tensor) -> torch.dtype:
    """What a number is kept in on the device, so that nothing is lost or gained."""
    return value.dtype if isinstance(value, Tensor) else torch.float64


def _member(optimizer: BatchedOptimizer, parameter: Tensor, *, copied: bool) -> Member:
    gradient, constant = parameter.grad, optimizer._constant_entries  # noqa: SLF001
    state = {
        name: (tensor.data_ptr(), tensor._version if name in constant else 0)  # noqa: SLF001 (torch's own count)
        for name, tensor in optimizer.state.get(parameter, {}).items()
    }
    if gradient is None:
        return Member(_place(parameter), None, state)
    return Member(_place(parameter), (0, gradient.shape, ()) if copied else _place(gradient), state)


def _place(tensor: Tensor) -> Place:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def difference(before: Circumstances, now: Circumstances, groups: list[Group]) -> str | None:
    """The first thing that has changed, in words; None: nothing."""
    return None if before == now else next(_differences(before, now, groups), None)


def _differences(before: Circumstances, now: Circumstances, groups: list[Group]) -> Iterator[str]:
    yield from _changed(before.execution, now.execution)
    if len(before.members) != len(now.members):
        yield f"there were {len(before.members)} groups, and are {len(now.members)}"
    for index, (old, new) in enumerate(zip(before.settings, now.settings, strict=False)):
        yield from (f"group {index}: {words}" for words in _changed(old, new))
    for index, (olds, news) in enumerate(zip(before.members, now.members, strict=False)):
        if len(olds) != len(news):
            yield f"group {index} had {len(olds)} parameters, and has {len(news)}"
        for position, (a, b) in enumerate(zip(olds, news, strict=False)):
            if a != b:
                yield _moved(a, b, _parameters.name_of(groups[index], index, position))


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    return (f"{name} was {old[name]!r}, and is {new[name]!r}" for name in old if old[name] != new[name])


def _moved(old: Member, new: Member, name: str) -> str:
    if old.parameter != new.parameter:
        return f"{name} is elsewhere in memory"
    if (old.gradient is None) != (new.gradient is None):
        return f"{name} had {'no gradient, and has one' if new.gradient else 'a gradient, and has none'}"
    if old.gradient != new.gradient:
        return f"the gradient of {name} is elsewhere in memory"
    return f"the state of {name} is elsewhere in memory, or another one"
