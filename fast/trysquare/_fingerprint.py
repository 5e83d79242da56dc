"""A number that tells two sets of weights apart by their bits, the same on every device and in every order of sums."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int32}  # 8 bytes as two words: the highest bit of one would be lost
CHUNK = 1 << 20
MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, without pattern: neighbouring places get unlike weights
MASK = (1 << 63) - 1


@dataclass(frozen=True)
class Fingerprints:
    """None, or the fingerprints of the weights in the parameters and of those of the other mode."""

    words: str = "None or a pair of ints"

    def allows(self, value: Any) -> bool:
        pair = isinstance(value, tuple | list) and len(value) == 2
        return value is None or (pair and all(isinstance(v, int) and not isinstance(v, bool) for v in value))


def fingerprint(tensors: Iterable[Tensor]) -> int:
    """Σ bitsᵢ·wᵢ modulo 2⁶⁴ over all entries in order: integers, so that no order of summation matters."""
    total, place = 0, 1
    for tensor in tensors:
        bits = tensor.detach().contiguous().flatten().view(BITS[tensor.element_size()])
        sums = []
        for chunk in torch.split(bits, CHUNK):
            weights = torch.arange(place, place + chunk.numel(), device=chunk.device).mul_(MULTIPLIER).bitwise_or_(1)
            sums.append(weights.mul_(chunk).sum())
            place += chunk.numel()
        if sums:
            total += int(torch.stack(sums).sum())
    return total & MASK
