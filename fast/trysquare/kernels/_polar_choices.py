"""Which product of the iterations runs by which kernel: a table, rules for the rest, and how it is measured.

- Half work leaves (T + 1)/2T of a product, T = n/tile. At n = 512 that is 0.63 with tiles of 128 and 0.56 with tiles of
  64, which however read each factor twice as often; below it a product is over before its launch is.
- XXᵀ alone is what cuBLAS does best: at 808 TFLOP/s on an H100 where rows are long, bA + cA² at 560. Against that it
  takes the copy engine both ways, and programs that begin a tile while the one before is written.
- Two tiles at once fetch less, but compute more that lies above the diagonal: worth it from 2048 rows on.
- βX + QX has no symmetry to use: cuBLAS.
- Products of float32 numbers run without tensor cores here, in cuBLAS by what `torch.backends` allows: cuBLAS. So does
  float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from trysquare import _backend

Product = Literal["gram", "square"]
"""XXᵀ, or βB + αLR of symmetric matrices."""

BY_RULE = "by rule, not measured"
MEASURED = "measured on an H100"
HALF = (torch.bfloat16, torch.float16)


class Tile(NamedTuple):
    """What a program computes, and how."""

    side: int
    """Rows and columns of the result."""
    inner: int
    """Terms of a sum that are loaded at a time."""
    warps: int
    stages: int
    wide: int = 0
    """Tiles beside each other, one or two, whose operands are described; 0: one, with operands read by pointers."""


class Choice(NamedTuple):
    """From so many rows on this tile."""

    rows: int
    tile: Tile
    source: str


ONE, TWO = Tile(128, 64, 8, 4, wide=1), Tile(128, 64, 8, 3, wide=2)
POINTERS = (Choice(512, Tile(64, 64, 4, 3), BY_RULE), Choice(1024, Tile(128, 32, 8, 3), BY_RULE))

TABLE: dict[tuple[int, int], dict[Product, tuple[Choice, ...]]] = {
    (9, 0): {
        "gram": (Choice(768, ONE, MEASURED), Choice(1536, TWO, BY_RULE), Choice(2048, TWO, MEASURED)),
        "square": (
            *(Choice(512, ONE, BY_RULE), Choice(768, ONE, MEASURED)),
            *(Choice(1536, TWO, BY_RULE), Choice(2048, TWO, MEASURED)),
        ),
    },
}
"""The symmetric kernel on half-precision operands, for each compute capability; the last entry that fits counts.

On an H100, torch 2.11 and Triton 3.6, cuBLAS took so many times as long for XXᵀ and bA + cA²: 1.00 and 1.65 at n = 768
(84 matrices), 1.28 and 1.76 at 1024 × 2048 (28), 1.64 and 1.94 at 2048 (28), 1.55 and 2.06 at 2048 × 6144 (17).
"""

OTHERWISE: dict[Product, tuple[Choice, ...]] = {"gram": POINTERS, "square": POINTERS}
"""Elsewhere: pointers, and tiles that take less on-chip memory."""

INTERPRETED_ROWS = 24
INTERPRETED_PLACES = 4
INTERPRETED: dict[Product, Tile] = {"gram": Tile(16, 32, 4, 1, wide=2), "square": Tile(16, 32, 4, 1, wide=1)}
"""In Triton's interpreter nothing is fast. So that kernels are tested there, by the same choice, both products run by
them from a few rows on, in float32 too, and on tiles so small that there are several."""


def of_symmetric(product: Product, rows: int, dtype: torch.dtype, device: torch.device) -> Choice | None:
    """How n × n symmetric products run: the entry for the symmetric kernel, or None for cuBLAS."""
    if _backend.interpreted():
        runs = rows >= INTERPRETED_ROWS and dtype != torch.float64
        return Choice(INTERPRETED_ROWS, INTERPRETED[product], "interpreted") if runs else None
    if dtype not in HALF:
        return None
    fitting = [choice for choice in _table(device)[product] if choice.rows <= rows]
    return fitting[-1] if fitting else None


def places(device: torch.device, tile: Tile) -> int:
    """How many programs of a tile run at a time: by descriptors one on a multiprocessor, whose memory it fills."""
    if device.type != "cuda":
        return INTERPRETED_PLACES
    each = 1 if tile.wide else 8 // tile.warps
    return each * _multiprocessors(device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def by_pointers(tile: Tile) -> Tile:
    """The tile instead of one whose operands cannot be described."""
    return tile._replace(wide=0) if _backend.interpreted() else POINTERS[-1].tile


def _table(device: torch.device) -> dict[Product, tuple[Choice, ...]]:
    if _backend.only_recorded and _backend.recorded_for is not None:
        return TABLE.get(_backend.recorded_for, OTHERWISE)
    if device.type != "cuda" or torch.version.hip is not None:
        return OTHERWISE
    return TABLE.get(torch.cuda.get_device_capability(device), OTHERWISE)


def in_words(rows: int, dtype: torch.dtype, device: torch.device) -> str:
    """For `explain`: the products of squares, most of all."""
    choice = of_symmetric("square", rows, dtype, device)
    if choice is None:
        return "by cuBLAS"
    return f"by the symmetric kernel, tiles of {choice.tile.side} ({choice.source})"


# Measuring, on a GPU and only when asked for

CANDIDATES = (ONE, TWO, TWO._replace(stages=2), Tile(64, 64, 4, 3), Tile(128, 32, 8, 3), Tile(128, 64, 8, 4))
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
