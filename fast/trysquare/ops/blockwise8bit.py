"""Blockwise 8-bit numbers in the format of bitsandbytes: codes, maps, and one float32 scale for each block of 256.

Codes and values are (K, 256) here, K blocks; scales are (K,).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

BLOCK = 256
CODES = 256
DECADES = 7
SIGNED_ZERO, UNSIGNED_ZERO = 127, 0
"""The codes of 0, which a block of nothing but zeros is written with."""

BELOW = 0.2 + 2e-3
"""How far under its place on the lines an entry is looked up, in codes.

The boundary between two decades lies 0.2 codes beyond the end of the lower one's line; the rest covers the rounding of
the lines, and of a map that was loaded.
"""


@functools.cache
def dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """The 256 values of a code, ascending, float32: one tensor for all states on a device."""
    decades = [_decade(i, 2**i if signed else 2 ** (i + 1)) for i in range(DECADES)]
    mirrored = [-values for values in decades] if signed else []
    values, _ = torch.cat([*decades, *mirrored, torch.tensor([0.0, 1.0])]).sort()
    return values.to(device)


def _decade(i: int, n: int) -> Tensor:
    """The midpoints of n cells of [0.1, 1], times 10^(i-6), in float32; edges are counted from the nearer end."""
    low = torch.tensor(0.1)
    h = ((1.0 - low) / n).double()
    k = torch.arange(n + 1, dtype=torch.float64)
    edges = torch.where(k < (n + 1) // 2, low.double() + h * k, 1.0 - h * (n - k)).float()
    return torch.tensor(10.0 ** (i - DECADES + 1)) * ((edges[:-1] + edges[1:]) / 2)


def boundaries(qmap: Tensor) -> Tensor:
    """For each code the largest float32 that still takes it, and not the next; infinite for the last.

    That is the midpoint to the next value, rounded down: a float32 lies above the one if and only if above the other.
    """
    values = qmap.double() if qmap.device.type != "mps" else qmap.cpu().double()
    midpoint = (values[:-1] + values[1:]) / 2
    nearest = midpoint.float()
    below = torch.nextafter(nearest, torch.full_like(nearest, -float("inf")))
    down = torch.where(nearest.double() > midpoint, below, nearest)
    return torch.cat([down, down.new_full((1,), float("inf"))]).to(qmap.device)


def dequantize(codes: Tensor, absmax: Tensor, qmap: Tensor) -> Tensor:
    """What codes stand for, float32."""
    return lookup(qmap, codes).mul_(absmax.unsqueeze(-1))


def lookup(table: Tensor, codes: Tensor) -> Tensor:
    """The entry of a table of 256 for each code. Selecting takes an eighth of the time of indexing on a CPU.

    What inductor makes of that asks of every index whether it is inside, which takes longer than the reading. So in a
    trace the codes are brought inside, and nothing is asked.
    """
    if torch.compiler.is_compiling():
        inside = codes.to(torch.int32).clamp(0, CODES - 1)
        found: Tensor = torch.ops.aten._unsafe_index.Tensor(table.view(CODES), [inside])  # noqa: SLF001
        return found
    return table.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)


def block_absmax(x: Tensor) -> Tensor:
    """The largest magnitude in each block; NaN where it has one."""
    return x.abs().amax(dim=-1)


def scaled(x: Tensor, absmax: Tensor) -> Tensor:
    """x over the scale of its block; 0 where that is 0 or not finite.

    There x is divided by infinity, which leaves NaN of NaN and infinities alone. (A choice for each entry would take
    forty times as long on a CPU; compiled, where NaN is looked for entry by entry, it is the other way round.)
    """
    usable = is_usable(absmax).unsqueeze(-1)
    if torch.compiler.is_compiling():
        return torch.where(usable, x / absmax.unsqueeze(-1), 0.0)
    return (x / torch.where(usable, absmax.unsqueeze(-1), float("inf"))).nan_to_num_(0.0)


def is_usable(absmax: Tensor) -> Tensor:
    """Whether a block can be divided by its scale."""
    return (absmax > 0) & (absmax < float("inf"))


def quantize_signed(x: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of values of either sign."""
    absmax = block_absmax(x)
    s = scaled(x, absmax)
    place = place_on_lines(s.abs(), 1)
    first = torch.copysign(place.add_(1.5), s).add_(SIGNED_ZERO - 0.5)  # 128 + place, or 125 - place where s < 0
    return step_up(s, first, bounds), absmax


def quantize_unsigned(x: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of values that are not negative; a positive one never takes code 0."""
    absmax = block_absmax(x)
    s = scaled(x, absmax)
    positive = x.sign().mul_(is_usable(absmax).unsqueeze(-1))
    first = torch.maximum(place_on_lines(s, 2).add_(UNSIGNED_ZERO + 1), positive)
    return step_up(s, first, bounds), absmax


def place_on_lines(s: Tensor, cells: int) -> Tensor:
    """How many positive codes lie below a magnitude, less one: right, or one too few; -1 below all.

    Within a decade the codes are evenly spaced; seven lines, each flatter than the one before, of which the lowest
    counts. ``cells`` are those of the lowest decade.
    """
    lowest = _line(s, 0, cells)
    for i in range(1, DECADES):
        lowest = lowest.clamp_(max=_line(s, i, cells))
    return lowest.floor_().clamp_(min=-1)


def _line(s: Tensor, i: int, cells: int) -> Tensor:
    """The codes below 10^(i-6)·[0.1, 1], and of these the part up to s."""
    n: int = cells * 2**i
    slope, offset = 10.0 ** (DECADES - 1 - i) * n / 0.9, n - cells - 0.1 * n / 0.9 - BELOW
    if torch.compiler.is_compiling():
        return s * slope + offset  # BELOW is a number of the graph's there, beside which torch 2.13 loses an alpha
    return torch.rsub(s, offset, alpha=-slope)  # one pass


def step_up(s: Tensor, first: Tensor, bounds: Tensor) -> Tensor:
    """The code of s, which is ``first`` or the next: one comparison with the boundary between them decides.

    Both are used up. What is compared stays float32: neither eager nor compiled code takes vectors for bytes.
    """
    code = first.clamp_(0, CODES - 1)
    return code.add_(s.gt_(lookup(bounds, code))).to(torch.uint8)
