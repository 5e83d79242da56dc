"""The entries of a state that hold 8-bit codes: which there are, and whether those of a checkpoint are ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trysquare._bitsandbytes import HINT
from trysquare._optimizer import Entry
from trysquare.ops.blockwise8bit import BLOCK, dynamic_map

SMALLEST_CODED = 4096
"""A parameter with fewer elements keeps its moments as they are, as with bitsandbytes."""


def is_coded(parameter: Tensor) -> bool:
    """Whether a parameter's moments are kept as codes; float64 would lose all that it is there for."""
    return parameter.numel() >= SMALLEST_CODED and parameter.dtype != torch.float64


def entries(parameter: Tensor, moments: int) -> dict[str, Entry]:
    """The state of so many moments."""
    shape = tuple(parameter.shape)
    if not is_coded(parameter):
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        return {f"state{i}": Entry(shape, dtype) for i in range(1, moments + 1)}
    blocks = -(-parameter.numel() // BLOCK)
    return {
        name: entry
        for i in range(1, moments + 1)
        for name, entry in (
            (f"state{i}", Entry(shape, torch.uint8)),
            (f"qmap{i}", Entry((2**8,), torch.float32)),
            (f"absmax{i}", Entry((blocks,), torch.float32)),
        )
    }


def check_format(state: Mapping[Any, Any]) -> None:
    """Raise if a state's codes are in another format; whatever else is wrong with it is found elsewhere."""
    for key, held in state.items():
        if not isinstance(held, Mapping):
            continue
        for i in (1, 2):
            _check_moment(held.get(f"state{i}"), held.get(f"qmap{i}"), held.get(f"absmax{i}"), i, f"parameter {key}")


def _check_moment(codes: Any, qmap: Any, absmax: Any, i: int, name: str) -> None:
    if not isinstance(codes, Tensor):
        return
    count = codes.numel()
    if codes.dtype in {torch.float32, torch.float16, torch.bfloat16} and count >= SMALLEST_CODED:
        raise ValueError(
            f"state_dict: state{i} of {name} is {codes.dtype} for {count} elements: from {SMALLEST_CODED} elements on "
            f"it must be 8-bit codes (uint8) with a map and scales. {HINT}"
        )
    if isinstance(absmax, Tensor) and absmax.numel() != -(-count // BLOCK):
        raise ValueError(
            f"state_dict: absmax{i} of {name} has {absmax.numel()} scales for {count} elements: blocks of {BLOCK} "
            f"elements are expected, which makes {-(-count // BLOCK)}. {HINT}"
        )
    if isinstance(absmax, Tensor) and bool((absmax < 0).any()):
        raise ValueError(f"state_dict: absmax{i} of {name} has negative scales: the state is damaged")
    if isinstance(qmap, Tensor) and not is_dynamic(qmap, signed=i == 1):
        kind = "signed" if i == 1 else "unsigned"
        raise ValueError(f"state_dict: qmap{i} of {name} is not the {kind} dynamic map of 256 values. {HINT}")


def is_dynamic(qmap: Tensor, signed: bool) -> bool:
    """Whether a map is the dynamic one; each value may be off by one unit in its last place, as torch versions are."""
    own = dynamic_map(signed, torch.device("cpu"))
    if qmap.shape != own.shape or qmap.dtype != own.dtype or qmap.is_meta:
        return False
    steps = qmap.detach().cpu().contiguous().view(torch.int32) - own.view(torch.int32)
    return bool((steps.abs() <= 1).all())
