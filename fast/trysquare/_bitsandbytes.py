"""State dicts of `bitsandbytes.optim.AdamW8bit`, and an update that decodes with the kernel of that package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from trysquare import _parameters
from trysquare.ops import blockwise8bit
from trysquare.ops import dolphinflow8bit as ops

NESTED = "__bnb_optimizer_quant_state__"
"""Under this key bitsandbytes (since 0.49.2) keeps what FSDP must not gather."""

MOMENTS = ("state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2")
HINT = (
    "load_bitsandbytes_state_dict() reads what bitsandbytes.optim.AdamW8bit.state_dict() wrote, and "
    "bitsandbytes_state_dict() writes it"
)


def require() -> None:
    """Import bitsandbytes, or raise an ImportError that says how to get it."""
    try:
        import bitsandbytes  # noqa: F401  # registers its operators
    except ImportError as error:
        raise ImportError(
            "backend='bitsandbytes' needs the package bitsandbytes: pip install 'trysquare[bnb]'. "
            "The backends 'auto', 'eager' and 'compiled' do without it and write the same format"
        ) from error


def check_device(device: torch.device, name: str) -> None:
    """Its kernels are used where they were measured to be exact: the decoder on a CPU."""
    if device.type != "cpu":
        raise ValueError(
            f"{name} is on {device}: backend='bitsandbytes' decodes on a CPU only, other kernels of that "
            "package were not measured or compute another step; use 'auto', 'eager' or 'compiled'"
        )


def update_coded_(
    theta: Tensor,
    gradient: Tensor,
    codes1: Tensor,
    absmax1: Tensor,
    qmap1: Tensor,
    bounds1: Tensor,
    codes2: Tensor | None,
    absmax2: Tensor | None,
    qmap2: Tensor | None,
    bounds2: Tensor | None,
    *rest: Any,
) -> None:
    """`ops.dolphinflow8bit.update_coded_` with bitsandbytes' decoder.

    Not with its encoder: on a CPU that goes through a table of 65,536 bins, from which an exact 0 comes back as about
    2e-5 of its block's scale.
    """
    m = decoded(codes1, absmax1, qmap1)
    v = None if codes2 is None or absmax2 is None or qmap2 is None else decoded(codes2, absmax2, qmap2)
    ops.update_decoded_(theta, gradient, m, v, codes1, absmax1, bounds1, codes2, absmax2, bounds2, *rest)


def decoded(codes: Tensor, absmax: Tensor, qmap: Tensor) -> Tensor:
    """What codes stand for, by the kernel of that package."""
    decode = torch.ops.bitsandbytes.dequantize_blockwise
    values: Tensor = decode(codes, absmax, qmap, blockwise8bit.BLOCK, torch.float32)
    return values


# State dicts


def is_foreign(state_dict: Mapping[str, Any]) -> bool:
    """Whether bitsandbytes wrote it."""
    states = [state for state in state_dict["state"].values() if isinstance(state, Mapping)]
    betas = any("betas" in group for group in state_dict["param_groups"])
    return any(NESTED in state or (betas and "state1" in state) for state in states)


def written(optimizer: Optimizer) -> dict[str, Any]:
    """The state of a DolphinFlow8bit as `AdamW8bit.state_dict` returns it."""
    own = optimizer.state_dict()
    _check_adaptive(own["param_groups"])
    return {
        "state": {key: _nested(key, state) for key, state in own["state"].items()},
        "param_groups": [_group_of_adamw(group) for group in own["param_groups"]],
    }


def _check_adaptive(groups: Sequence[Mapping[str, Any]]) -> None:
    for index, group in enumerate(groups):
        if not group["adaptive_lr"]:
            raise ValueError(
                f"group {index} has adaptive_lr=False and no second moment, but AdamW8bit always has one: its state "
                "cannot be exchanged"
            )


def _nested(key: Any, state: Mapping[str, Tensor]) -> dict[str, Any]:
    if state["state1"].dtype == torch.float64:
        raise ValueError(f"parameter {key} is float64, which bitsandbytes does not know")
    return {"step": int(state["step"]), NESTED: {name: state[name] for name in MOMENTS if name in state}}


def _group_of_adamw(group: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: group[name] for name in _parameters.ADDED_LATER if name in group}
    return {
        "lr": float(group["lr"]),
        "betas": (group["momentum"], group["beta2"]),
        "eps": group["eps"],
        "weight_decay": float(group["weight_decay"]),
        "alpha": 0.0,
        "t_alpha": None,
        "t_beta3": None,
        **kept,
        "params": list(group["params"]),
    }


def read(state_dict: Any, own_groups: Sequence[Mapping[str, Any]], wide: torch.dtype) -> dict[str, Any]:
    """What `written` makes, and bitsandbytes, as a state dict of ours; arguments that AdamW8bit lacks stay our own."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError("state_dict: give what bitsandbytes.optim.AdamW8bit.state_dict() returned")
    if not is_foreign(state_dict) and state_dict["state"]:
        raise ValueError("state_dict: not written by bitsandbytes.optim.AdamW8bit; load_state_dict() reads our own")
    theirs = state_dict["param_groups"]
    _check_adaptive(own_groups)
    if len(theirs) != len(own_groups):
        raise ValueError(f"state_dict: {len(theirs)} groups, but this optimizer has {len(own_groups)}")
    pairs = zip(theirs, own_groups, strict=True)
    return {
        "state": {key: _flat(key, state, wide) for key, state in state_dict["state"].items()},
        "param_groups": [_own_group(index, group, own) for index, (group, own) in enumerate(pairs)],
    }


def _flat(key: Any, state: Mapping[str, Any], wide: torch.dtype) -> dict[str, Any]:
    entries = {**{name: value for name, value in state.items() if name != NESTED}, **state.get(NESTED, {})}
    if "step" not in entries:
        raise ValueError(f"state_dict: state of {key} has no step")
    for name in MOMENTS:
        if name in entries and not entries[name].is_contiguous():
            raise ValueError(
                f"state_dict: {name} of {key} is not contiguous, and in which order bitsandbytes cut it into blocks "
                "cannot be told: make the model contiguous and save it again from there"
            )
    step = torch.as_tensor(entries.pop("step")).to("cpu", wide)
    order = [name for i in "12" for name in (f"state{i}", f"qmap{i}", f"absmax{i}") if name in entries]
    return {"step": step, **{name: entries.pop(name) for name in order}, **entries}


def _own_group(index: int, theirs: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    missing = {"lr", "betas", "eps", "weight_decay", "params"} - theirs.keys()
    if missing:
        raise ValueError(f"state_dict: group {index} has no {min(missing)!r}; is it AdamW8bit's?")
    betas = theirs["betas"]
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise ValueError(f"state_dict: group {index}: betas={betas!r} must be two numbers")
    kept = {name: theirs[name] for name in _parameters.ADDED_LATER if name in theirs}
    arguments = {name: theirs[name] for name in ("lr", "eps", "weight_decay", "params")}
    return {**own, **arguments, "momentum": betas[0], "beta2": betas[1], **kept}
