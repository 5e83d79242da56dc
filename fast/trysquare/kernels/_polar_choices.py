"""Which product of the iterations runs by which kernel: a table, rules for the rest, and how it is measured.

No entry has been measured yet: each follows from counting, and says so.

- Half work leaves (T + 1)/2T of a product, T = n/tile. At n = 512 that is 0.63 with tiles of 128 and 0.56 with tiles of
  64, which however read each factor twice as often; below it a product is over before its launch is.
- βX + QX has no symmetry to use: cuBLAS.
- Products of float32 numbers run without tensor cores here, in cuBLAS by what `torch.backends` allows: cuBLAS. So does
  float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trysquare import _backend

BY_RULE = "by rule, not measured"
HALF = (torch.bfloat16, torch.float16)


class Tile(NamedTuple):
    """What a program computes, and how."""

    side: int
    """Rows and columns of the result."""
    inner: int
    """Terms of a sum that are loaded at a time."""
    warps: int
    stages: int


class Choice(NamedTuple):
    """From so many rows on this tile."""

    rows: int
    tile: Tile
    source: str


TABLE: dict[tuple[int, int], tuple[Choice, ...]] = {
    (8, 0): (
        Choice(512, Tile(64, 64, 4, 3), BY_RULE),
        Choice(1024, Tile(128, 32, 8, 3), BY_RULE),
    ),
    (9, 0): (
        Choice(512, Tile(64, 64, 4, 3), BY_RULE),
        Choice(1024, Tile(128, 64, 8, 3), BY_RULE),
    ),
}
"""The symmetric kernel on half-precision operands, for each compute capability; the last entry that fits counts."""

OTHERWISE = TABLE[8, 0]
"""Elsewhere: the tiles that take less on-chip memory."""

INTERPRETED_ROWS = 24
INTERPRETED, INTERPRETED_WIDE = Tile(16, 64, 4, 1), Tile(32, 64, 4, 1)
"""In Triton's interpreter nothing is fast. So that kernels are tested there, by the same choice, both products run by
them from a few rows on, in float32 too, and on tiles so small that there are several."""


def of_symmetric(rows: int, dtype: torch.dtype, device: torch.device) -> Choice | None:
    """How n × n symmetric products run: the entry for the symmetric kernel, or None for cuBLAS."""
    if _backend.interpreted():
        runs = rows >= INTERPRETED_ROWS and dtype != torch.float64
        return Choice(INTERPRETED_ROWS, INTERPRETED, "interpreted") if runs else None
    if dtype not in HALF:
        return None
    fitting = [choice for choice in _table(device) if choice.rows <= rows]
    return fitting[-1] if fitting else None


def of_wide(rows: int, dtype: torch.dtype) -> Tile | None:
    """How βX + QX runs: the tile of the kernel, or None for cuBLAS."""
    runs = _backend.interpreted() and rows >= INTERPRETED_ROWS and dtype != torch.float64
    return INTERPRETED_WIDE if runs else None


def _table(device: torch.device) -> tuple[Choice, ...]:
    if device.type != "cuda" or torch.version.hip is not None:
        return OTHERWISE
    return TABLE.get(torch.cuda.get_device_capability(device), OTHERWISE)


def in_words(rows: int, dtype: torch.dtype, device: torch.device) -> str:
    """For `explain`."""
    choice = of_symmetric(rows, dtype, device)
    if choice is None:
        return "by cuBLAS"
    return f"by the symmetric kernel, tiles of {choice.tile.side} ({choice.source})"


# Measuring, on a GPU and only when asked for

CANDIDATES = (Tile(64, 32, 4, 3), Tile(64, 64, 4, 3), Tile(128, 32, 4, 3), Tile(128, 32, 8, 3), Tile(128, 64, 8, 3))
ROUNDS = 20


class Measurement(NamedTuple):
    """Of one size and candidate: median milliseconds of XXᵀ and of bA + cA²."""

    rows: int
    columns: int
    candidate: str
    gram: float
    square: float


def measure(
    shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype, device: torch.device
) -> list[Measurement]:
    """Time every tile and cuBLAS on batches (B, n, m); where one cannot be compiled it is left out.

    Raises:
        ValueError: The device is no GPU.
    """
    if device.type != "cuda":
        raise ValueError(f"device={device}: products are measured on an NVIDIA or AMD GPU")
    return [found for shape in shapes for found in _measured(torch.randn(shape, device=device, dtype=dtype))]


def _measured(x: Tensor) -> list[Measurement]:
    from trysquare.kernels.polar import symmetric_product  # which reads the table that is measured here

    _, n, m = x.shape
    a = x @ x.mT / m
    by_torch = _time(lambda: x @ x.mT), _time(lambda: torch.baddbmm(a, a, a, beta=2.0, alpha=3.0))
    found = [Measurement(n, m, "cuBLAS", *by_torch)]
    for tile in CANDIDATES:
        try:
            times = _timed(symmetric_product, x, a, tile)
        except RuntimeError:  # more on-chip memory than there is
            continue
        found.append(Measurement(n, m, str(tuple(tile)), *times))
    return found


def _timed(product: Callable[..., Tensor], x: Tensor, a: Tensor, tile: Tile) -> tuple[float, float]:
    return _time(lambda: product(x, x, tile)), _time(lambda: product(a, a, tile, a, 2.0, 3.0))


def _time(run: Callable[[], Tensor]) -> float:
    run()
    event: Callable[..., Any] = torch.cuda.Event
    starts, ends = ([event(enable_timing=True) for _ in range(ROUNDS)] for _ in range(2))
    for start, end in zip(starts, ends, strict=True):
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) for start, end in zip(starts, ends, strict=True))
    return float(times[ROUNDS // 2])


def table_of(measurements: Sequence[Measurement]) -> str:
    """Measurements as lines, the fastest of a size marked: what `TABLE` is written from."""
    lines = [f"{'n':>6} {'m':>6} {'candidate':20} {'XXᵀ ms':>9} {'bA+cA² ms':>9}"]
    for one in measurements:
        rivals = [m.gram + m.square for m in measurements if (m.rows, m.columns) == (one.rows, one.columns)]
        mark = " *" if one.gram + one.square == min(rivals) else ""
        lines.append(f"{one.rows:6} {one.columns:6} {one.candidate:20} {one.gram:9.4f} {one.square:9.4f}{mark}")
    return "\n".join(lines)
