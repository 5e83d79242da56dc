"""Large matrices worked through a few rows at a time, so that a pass finds in a core's cache what the last one left."""

from __future__ import annotations

import torch
from torch import Tensor

ELEMENTS = 1 << 17
"""Of a block at most, for each thread: half a megabyte in float32."""

Block = tuple[slice, slice]


def row_blocks(x: Tensor) -> list[Block]:
    """Slices of the batch and of the rows of x, (B, R, C): of one matrix, or of several whole ones.

    One block is all where more would gain nothing: elsewhere than on a CPU, and under torch.compile, which fuses the
    passes.
    """
    batch, rows, columns = x.shape
    everything = [(slice(None), slice(None))]
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return everything
    elements = ELEMENTS * torch.get_num_threads()
    if x.numel() <= elements:
        return everything
    if rows * columns <= elements:
        together = elements // (rows * columns)
        return [(slice(b, b + together), slice(None)) for b in range(0, batch, together)]
    step = max(1, elements // columns)
    return [(slice(b, b + 1), slice(r, r + step)) for b in range(batch) for r in range(0, rows, step)]
