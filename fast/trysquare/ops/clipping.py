"""One norm over all gradients, and the factor that brings it down to a maximum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MARGIN = 1e-6

SUMMED = 512
"""Squares that are added up in float32 before the sums are in float64: their errors are independent and small."""


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it (Apple's GPUs do not)."""
    return torch.float32 if device.type == "mps" else torch.float64


def sum_of_squares(gradient: Tensor) -> Tensor:
    """Σ g² as a 0-dim tensor, accumulated in float64: a float32 sum is off by 3.6e-4 at 10⁷ elements on a CPU."""
    return gradient.to(wide_dtype(gradient.device)).square().sum()


def chunked_sum_of_squares(gradient: Tensor, elements: int) -> Tensor:
    """The same without a float64 copy of the whole gradient: one chunk of so many elements after another."""
    dtype, flat = wide_dtype(gradient.device), gradient.flatten()
    chunks = [flat] if flat.numel() <= elements else torch.split(flat, max(1, elements))
    sums = []
    for chunk in chunks:
        wide = chunk.to(dtype)
        sums.append(torch.dot(wide, wide))
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


def summed_in_parts(gradient: Tensor) -> Tensor:
    """The same of a long float32 CPU tensor, faster: the length of each 512 elements in float32, the rest in float64.

    Not finite where a square leaves the range of float32.
    """
    flat = gradient.flatten()
    whole = flat.numel() // SUMMED * SUMMED
    lengths = torch.linalg.vector_norm(flat[:whole].view(-1, SUMMED), dim=-1)
    rest = torch.linalg.vector_norm(flat[whole:]).view(1)
    return torch.cat([lengths, rest]).double().square_().sum()


def total_norm(sums: Sequence[Tensor]) -> Tensor:
    """‖all gradients‖₂ from the sum of squares of each, on the device of the first; NaN and inf propagate."""
    return torch.stack([s.to(sums[0].device) for s in sums]).sum().sqrt()


def clip_scale(norm: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)); NaN for a norm that is not finite, so that no step is silently zero."""
    scale = (max_norm / (norm + MARGIN)).clamp(max=1.0)
    return torch.where(norm.isfinite(), scale, float("nan"))
