"""Loading a checkpoint: checked whole before anything changes, and kept in the dtypes in which it was saved.

`torch.optim.Optimizer.load_state_dict` casts every state tensor but ``step`` to the dtype of its parameter, which would
round the float32 state of half-precision parameters; and it takes what it is given.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from trysquare import _parameters

Layout = Callable[[dict[str, Any], Tensor], Mapping[str, Any]]


def after_hooks(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """What the pre-hooks make of a shallow copy of the state dict, as in torch."""
    if not isinstance(state_dict, dict):
        raise TypeError(f"state_dict is a {type(state_dict).__name__}: give what an optimizer's state_dict() returned")
    state_dict = state_dict.copy()
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():  # noqa: SLF001 (torch offers no other way)
        result = hook(optimizer, state_dict)
        state_dict = state_dict if result is None else result
    missing = {"state", "param_groups"} - state_dict.keys()
    if missing:
        raise ValueError(f"state_dict has no key {min(missing)!r}: it is no optimizer's state_dict()")
    _check_structure(state_dict["state"], state_dict["param_groups"])
    return state_dict


def _check_structure(state: Any, groups: Any) -> None:
    """Raise unless the parts are there whose contents are checked later."""
    if not isinstance(state, Mapping) or not isinstance(groups, list | tuple):
        kinds = f"{type(state).__name__} and {type(groups).__name__}"
        raise TypeError(f"state_dict: 'state' and 'param_groups' are {kinds}: they must be a dict and a list")
    for index, group in enumerate(groups):
        listed = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(listed, list | tuple) or not all(isinstance(key, Hashable) for key in listed):
            raise TypeError(f"state_dict: group {index} has no list 'params' of its parameters' numbers")
    keys = [key for group in groups for key in group["params"]]
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"state_dict: parameter {twice!r} is listed more than once")


def checked_groups(
    optimizer: Optimizer, state_dict: Mapping[str, Any], hyperparameters: set[str], carried: set[str]
) -> list[dict[str, Any]]:
    """The saved groups over the optimizer's own parameters; ``carried`` are the keys that a step keeps in a group."""
    saved, current = state_dict["param_groups"], optimizer.param_groups
    sizes, wanted = ([len(g["params"]) for g in groups] for groups in (saved, current))
    if sizes != wanted:
        raise ValueError(f"state_dict: groups of {sizes} parameters, but this optimizer has groups of {wanted}")
    groups = []
    for index, (theirs, mine) in enumerate(zip(saved, current, strict=True)):
        where = f"state_dict: group {index}"
        missing = sorted((hyperparameters | carried) - theirs.keys())
        if missing:
            raise ValueError(f"{where}: no {missing[0]!r}; is it the state_dict of another kind of optimizer?")
        _parameters.check_keys(theirs, hyperparameters | carried, where)
        group = {key: deepcopy(value) for key, value in theirs.items() if key != "params"}
        names = theirs.get("param_names", theirs["params"])
        if not isinstance(names, list | tuple) or len(names) != len(theirs["params"]):
            raise ValueError(f"{where}: param_names={names!r} does not name {len(theirs['params'])} parameters")
        if "param_names" in mine:
            group.setdefault("param_names", mine["param_names"])
        groups.append({**group, "params": mine["params"]})
    return groups


def checked_state(
    state_dict: Mapping[str, Any], groups: list[dict[str, Any]], layout: Layout
) -> defaultdict[Tensor, dict[str, Any]]:
    """Copies of the saved state on the parameters' devices. A parameter without state has not been stepped yet."""
    state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
    known = set()
    for key, name, group, parameter in _places(state_dict["param_groups"], groups):
        known.add(key)
        if key in state_dict["state"]:
            entries = state_dict["state"][key]
            _check_entries(entries, layout(group, parameter), f"state_dict: state of {name}")
            state[parameter] = {n: t.detach().to(parameter.device, copy=True) for n, t in entries.items()}
    foreign = state_dict["state"].keys() - known
    if foreign:
        raise ValueError(f"state_dict: state for {min(foreign, key=str)!r}, which no group lists")
    return state


def _places(
    saved: list[dict[str, Any]], groups: list[dict[str, Any]]
) -> Iterator[tuple[Any, str, dict[str, Any], Tensor]]:
    for index, (theirs, group) in enumerate(zip(saved, groups, strict=True)):
        for position, (key, parameter) in enumerate(zip(theirs["params"], group["params"], strict=True)):
            yield key, _parameters.name_of(group, index, position), group, parameter


def _check_entries(entries: Any, layout: Mapping[str, Any], where: str) -> None:
    if not isinstance(entries, dict) or entries.keys() != layout.keys():
        found = ", ".join(map(str, entries)) if isinstance(entries, dict) else type(entries).__name__
        raise ValueError(f"{where}: has {found}; expected {', '.join(layout)}")
    for name, (shape, dtype) in layout.items():
        tensor = entries[name]
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{where}: {name} is a {type(tensor).__name__}; expected a tensor")
        if tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"{where}: {name} is {tensor.layout} on {tensor.device}; expected values, dense")
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
            raise ValueError(
                f"{where}: {name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}; "
                f"expected {tuple(shape)} and {dtype}"
            )
    if "step" in entries and not (torch.isfinite(entries["step"]) and entries["step"] >= 0):
        raise ValueError(f"{where}: step={entries['step'].item()} must be finite and >= 0")
