"""What a parameter, its gradient and a group that a caller hands in must look like."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

ADDED_LATER = frozenset(
    {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr", "name", "param_names"}
)
"""Keys of a group that are no hyperparameters: schedulers, averaging and torch itself put them there."""


def arithmetic(parameter: Tensor) -> torch.dtype:
    """What state is kept and an update computed in: float32, and float64 for float64 parameters."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def materialized(param_group: Any) -> dict[str, Any]:
    """A copy of a caller's group with ``params`` as a list and names apart, so that a bad group changes nothing."""
    if not isinstance(param_group, dict):
        raise TypeError(f"param_group must be a dict, but is {type(param_group).__name__}")
    if "params" not in param_group:
        raise ValueError("param_group has no key 'params': give it the parameters to optimize")
    group, params = dict(param_group), param_group["params"]
    if isinstance(params, Tensor):
        return {**group, "params": [params]}
    check_iterable(params)
    return {**group, "params": list(params)}


def check_iterable(params: Any) -> None:
    """Reject what cannot be walked through, or not in the same order in every run."""
    if isinstance(params, set | frozenset):
        raise TypeError("params is a set, whose order differs between runs: give a list instead")
    if not isinstance(params, Iterable) or isinstance(params, str | Mapping | Tensor):
        raise TypeError(f"params is a {type(params).__name__}: give a list of tensors, or of groups to the constructor")


def check_keys(group: Mapping[str, Any], hyperparameters: set[str], where: str) -> None:
    """Reject what is neither a hyperparameter nor on the list of what others add."""
    unknown = sorted(group.keys() - hyperparameters - ADDED_LATER - {"params"}, key=str)
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; a group may have {', '.join(sorted(hyperparameters))}")


def check_parameters(params: Iterable[Any], where: str, taken: set[int]) -> None:
    """Check the parameters of a new group; ``taken`` are the ids of those that other groups have."""
    seen = set(taken)
    for position, entry in enumerate(params):
        name, parameter = _named(entry, f"parameter {position} of {where}")
        check_parameter(parameter, name)
        if id(parameter) in seen:
            raise ValueError(f"{name} appears more than once: a parameter is stepped by one group, once")
        seen.add(id(parameter))


def _named(entry: Any, place: str) -> tuple[str, Any]:
    """Name and parameter of what a caller gave: a tensor, or a pair as of `named_parameters()`."""
    if not isinstance(entry, tuple):
        return place, entry
    if len(entry) != 2 or not isinstance(entry[0], str):
        raise TypeError(f"{place} is a tuple of {len(entry)}: give a tensor or a pair (name, tensor)")
    return entry[0], entry[1]


def names_apart(params: Iterable[Any]) -> dict[str, list[Any]]:
    """Parameters, and their names if they came with names, as torch keeps them in a group."""
    entries = list(params)
    if not entries or not isinstance(entries[0], tuple):
        return {"params": entries}
    return {"params": [parameter for _, parameter in entries], "param_names": [name for name, _ in entries]}


def check_parameter(parameter: Any, name: str) -> None:
    """Raise a TypeError or ValueError that says what is wrong with a parameter and what to do."""
    if not isinstance(parameter, Tensor):
        raise TypeError(f"{name} is a {type(parameter).__name__}: an optimizer takes tensors")
    if parameter.layout != torch.strided:
        raise ValueError(f"{name} has layout {parameter.layout}: only dense (strided) parameters are supported")
    if parameter.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {parameter.dtype}: supported are {', '.join(map(str, DTYPES))}")
    if parameter.is_meta:
        raise ValueError(f"{name} is on the meta device and has no values: materialize the model first")
    if not parameter.is_leaf and not parameter.retains_grad:
        raise ValueError(f"{name} is not a leaf: detach it, or give the tensors that it was computed from")
    if parameter.is_inference():
        raise ValueError(f"{name} was made in torch.inference_mode() and cannot be written: clone it outside of that")
    repeated = [size > 1 and stride == 0 for size, stride in zip(parameter.shape, parameter.stride(), strict=True)]
    if parameter.numel() and any(repeated):
        raise ValueError(f"{name} is expanded, its entries share memory and cannot be written: clone it")
    if hasattr(parameter, "placements"):
        raise ValueError(f"{name} is a DTensor: sharded parameters are not supported by this version of trysquare")


def are_plain(parameter: Tensor, gradient: Tensor, state: Mapping[str, Any], layout: Mapping[str, Any]) -> bool:
    """Whether gradient and state have nothing that `check_gradient` and `check_state` would need a second look at."""
    if gradient.layout is not torch.strided or gradient.dtype is not parameter.dtype:
        return False
    if gradient.shape != parameter.shape or gradient.device != parameter.device:
        return False
    for entry, (shape, dtype) in layout.items() if state else ():
        tensor = state.get(entry)
        if not isinstance(tensor, Tensor) or tensor.dtype is not dtype or tensor.shape != shape:
            return False
    return True


def check_gradient(parameter: Tensor, name: str) -> None:
    """Raise unless the gradient is dense and has the parameter's shape, dtype and device."""
    gradient = parameter.grad
    if gradient is None:
        return
    if gradient.layout != torch.strided:
        raise ValueError(f"the gradient of {name} has layout {gradient.layout}: make it dense with .to_dense()")
    for what in ("shape", "dtype", "device"):
        mine, wanted = getattr(gradient, what), getattr(parameter, what)
        if mine != wanted:
            raise ValueError(
                f"the gradient of {name} has {what} {_plain(mine)}, the parameter {_plain(wanted)}: "
                "set .grad to None and compute it anew"
            )


def check_state(state: Mapping[str, Any], layout: Mapping[str, Any], name: str) -> None:
    """Raise if the state of a parameter, which a caller may edit, lacks an entry of the layout or has another shape."""
    for entry, (shape, dtype) in layout.items() if state else ():
        if entry not in state:
            raise ValueError(
                f"the state of {name} has no {entry!r}: a hyperparameter that needs it was turned on after the first "
                "step; delete the state of the parameter to begin anew"
            )
        if not isinstance(state[entry], Tensor) or state[entry].shape != shape:
            found = getattr(state[entry], "shape", type(state[entry]).__name__)
            raise ValueError(
                f"the state of {name} has {entry!r} of shape {_plain(found)}, expected {shape}: put a tensor of that "
                "shape there, or delete the state of the parameter to begin anew"
            )
        if not dtype.is_floating_point and state[entry].dtype != dtype:
            raise ValueError(f"the state of {name} has {entry!r} of dtype {state[entry].dtype}, expected {dtype}")


def _plain(value: Any) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)


def name_of(group: Mapping[str, Any], index: int, position: int) -> str:
    """The name under which `named_parameters()` gave a parameter, else its place."""
    names = group.get("param_names")
    return f"{names[position]}" if names else f"parameter {position} of group {index}"
