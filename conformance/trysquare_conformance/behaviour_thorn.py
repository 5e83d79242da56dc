"""What the tests of THORN's behaviour share: every kind of group, copies of an optimizer, honest steps."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trysquare import THORN
from trysquare._thorn_steps import rule_of
from trysquare_conformance.behaviour import Shapes, parameters, written
from trysquare_conformance.budget import STORED, Budget, Wrap, measure
from trysquare_conformance.noise import BFLOAT16, FLOAT32, FLOAT64, Arithmetic, mixed
from trysquare_conformance.noisy import Noisy
from trysquare_conformance.snapshots import rounded, to_array
from trysquare_reference import thorn as reference

Group = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of group, with shapes that it takes."""

    settings: Mapping[str, Any]
    shapes: Shapes


MATRICES: Shapes = ((4, 3), (2, 3, 2, 2), (4, 3), (0, 3))
OTHERS: Shapes = ((3,), (), (4, 3), (0, 2))
KINDS = {
    "matrices": Kind({"orthogonalize": True}, MATRICES),
    "plain matrices": Kind({"orthogonalize": True, "betas": (0.9, 0.0), "target_rms": 0.0}, MATRICES),
    "experts": Kind({"orthogonalize": True, "batched": True}, ((2, 4, 3), (2, 2, 3, 2))),
    "averaged": Kind({"orthogonalize": False, "betas": (0.9, 0.99)}, OTHERS),
    "averaged only": Kind({"orthogonalize": False, "betas": (0.0, 0.99)}, OTHERS),
    "adam": Kind({"orthogonalize": False, "schedule_free": False, "rectify": True}, OTHERS),
}
AVERAGED = ("averaged", "averaged only")


def groups(kinds: Sequence[str] = tuple(KINDS), dtype: torch.dtype = torch.float32) -> list[Group]:
    """A group of each kind, of Gaussian parameters with Gaussian gradients."""
    return [
        {"params": parameters(KINDS[kind].shapes, dtype, seed=seed), **KINDS[kind].settings}
        for seed, kind in enumerate(kinds)
    ]


def thorn(kinds: Sequence[str] = tuple(KINDS), dtype: torch.dtype = torch.float32, **settings: Any) -> THORN:
    """THORN over a group of each kind."""
    return THORN(groups(kinds, dtype), **{"lr": 0.01, **settings})


def clones(optimizer: THORN, dtype: torch.dtype | None = None) -> list[Group]:
    """Groups of new parameters with the values of an optimizer's, which say no more than they must."""
    return [
        {
            "params": [torch.nn.Parameter(p.detach().clone().to(dtype or p.dtype)) for p in group["params"]],
            "orthogonalize": group["orthogonalize"],
            "batched": group["batched"],
        }
        for group in optimizer.param_groups
    ]


def resumed(optimizer: THORN, **settings: Any) -> THORN:
    """What another process makes of files with the model's weights and the optimizer's state dict."""
    again = THORN(clones(optimizer), **settings)
    again.load_state_dict(written(optimizer.state_dict()))
    return again


def values(optimizer: THORN) -> list[Tensor]:
    """Copies of all parameters."""
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


# Honest steps


def hyperparameters(group: Group, parameter: Tensor) -> reference.Hyperparameters:
    """Those of the reference for one parameter of a group."""
    names = {field.name for field in fields(reference.Hyperparameters)} & group.keys()
    own = {name: group[name] for name in names}
    form = rule_of(group, parameter).form if group["orthogonalize"] and parameter.numel() else "standard"
    return reference.Hyperparameters(**{**own, "lr": float(group["lr"]), "form": form})


def arithmetic(group: Group, parameter: Tensor) -> Arithmetic:
    """How the fast code computes the update of a parameter."""
    wide = FLOAT64 if parameter.dtype == torch.float64 else FLOAT32
    if not (group["orthogonalize"] and parameter.numel()):
        return wide
    return mixed(wide, BFLOAT16) if rule_of(group, parameter).matmul_dtype == torch.bfloat16 else wide


def held(optimizer: THORN, parameter: Tensor) -> dict[str, np.ndarray[Any, Any]]:
    """A parameter and its state as arrays, by name."""
    state = {name: to_array(x) for name, x in optimizer.state[parameter].items()}
    return {"parameter": to_array(parameter), **state}


def stations(optimizer: THORN) -> Iterator[tuple[Group, Tensor, dict[str, np.ndarray[Any, Any]]]]:
    """Every parameter that has state, with its group and all that is held of it now."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in optimizer.state:
                yield group, parameter, held(optimizer, parameter)


def budgets(
    group: Group,
    parameter: Tensor,
    before: Mapping[str, np.ndarray[Any, Any]] | np.ndarray[Any, Any],
    gradients: Sequence[np.ndarray[Any, Any]],
    draws: int = 8,
) -> dict[str, Budget]:
    """What a parameter and its state may be after these gradients, by the reference, from `held` or from weights."""
    hp = hyperparameters(group, parameter)
    own = str(parameter.dtype).removeprefix("torch.")
    half = own in {"bfloat16", "float16"}

    def outputs(wrap: Wrap) -> dict[str, Any]:
        if isinstance(before, Mapping):
            theta, state = wrap(before["parameter"]), _state(before, wrap)
        else:
            theta = wrap(before)
            state = reference.init(theta, hp, half=half)
        for gradient in gradients:
            theta, state = reference.release_step(theta, wrap(gradient), state, hp)
            if half and isinstance(theta, Noisy):  # as in the lane each step ends with a rounding; exact stays exact
                theta = rounded(theta, own)
        return {"parameter": theta, **{name: np.asarray(value) for name, value in state.items()}}

    wide = "float64" if parameter.dtype == torch.float64 else "float32"
    counters = dict.fromkeys(("step", "lr_max", "weight_sum"), "float64")
    names = {"parameter": own, **counters}
    stored = {name: STORED[names.get(name, wide)] for name in outputs(np.asarray)}
    return measure(outputs, arithmetic(group, parameter), stored, seed=0, draws=draws)


def _state(before: Mapping[str, Any], wrap: Wrap) -> dict[str, Any]:
    """As the reference takes it: the count as an int, the other numbers as floats."""
    state: dict[str, Any] = {}
    for name, value in before.items():
        if name in {"step", "lr_max", "weight_sum"}:
            state[name] = int(value) if name == "step" else float(value)
        elif name != "parameter":
            state[name] = wrap(value)
    return state
