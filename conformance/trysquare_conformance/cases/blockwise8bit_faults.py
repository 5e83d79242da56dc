"""Mistakes that could be made in coding and decoding: the cases of the format must see every one.

A function here is given the original and returns what takes its place; its name and docstring are the fault's. In the
compiled lane, where each would be compiled anew, the faults of DolphinFlow8bit stand for them.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from trysquare.ops import blockwise8bit as ops
from trysquare_conformance.planting import Planter

_planter = Planter("blockwise8bit")
FAULTS = _planter.faults
EAGER = ("eager-*", "bitsandbytes-*")
plant = partial(_planter, lanes=EAGER)

# The nearest code


@plant(ops, "step_up")
def code_below(_: Any) -> Any:
    """The first guess is taken, without a look at the boundary above."""
    return lambda _, first, __: first.clamp(0, 255).to(torch.uint8)


@plant(ops, "step_up")
def tie_goes_up(_: Any) -> Any:
    """A value on a boundary takes the upper code."""

    def step_up(s: Tensor, first: Tensor, bounds: Tensor) -> Tensor:
        code = first.clamp(0, 255).to(torch.int32)
        return (code + (s >= ops.lookup(bounds, code))).to(torch.uint8)

    return step_up


@plant(ops, "step_up")
def code_off_by_one(f: Any) -> Any:
    """Every code is one too large."""
    return lambda s, first, bounds: (f(s, first, bounds).int() + 1).clamp(max=255).to(torch.uint8)


@plant(ops, "step_up")
def code_wraps(_: Any) -> Any:
    """What lies below the first code is taken for the last."""

    def step_up(s: Tensor, first: Tensor, bounds: Tensor) -> Tensor:
        code = (first.to(torch.int32) % 256).to(torch.int32)
        return (code + (s > ops.lookup(bounds, code))).to(torch.uint8)

    return step_up


@plant(ops, "boundaries")
def boundary_rounded_up(_: Any) -> Any:
    """The midpoint as the float32 above it."""

    def boundaries(qmap: Tensor) -> Tensor:
        middle = ((qmap[:-1].double() + qmap[1:].double()) / 2).float()
        return torch.cat([torch.nextafter(middle, torch.ones_like(middle)), middle.new_full((1,), float("inf"))])

    return boundaries


@plant(ops, "boundaries")
def boundary_is_the_value(_: Any) -> Any:
    """A value is rounded down to a code instead of to the nearest."""
    return lambda qmap: torch.cat([qmap[1:], qmap.new_full((1,), float("inf"))])


_planter.add("decades-ignored", "no room for the boundary between decades", ops, "BELOW", lambda _: 0.0, lanes=EAGER)
_planter.add("six-decades", "the lowest decade has no line", ops, "DECADES", lambda _: 6, lanes=EAGER)


@plant(ops, "_line")
def linear_between_codes(_: Any) -> Any:
    """Codes evenly spaced over all decades."""
    return lambda s, _, cells: s * (127.0 * cells)


@plant(ops, "dynamic_map")
def map_of_bfloat16(f: Any) -> Any:
    """The map rounded to bfloat16."""
    return lambda *arguments: f(*arguments).bfloat16().float()


@plant(ops, "dynamic_map")
def map_always_signed(f: Any) -> Any:
    """The second moment decoded by the signed map."""
    return lambda _, device: f(True, device)


@plant(ops, "dynamic_map")
def map_of_edges(f: Any) -> Any:
    """The upper edge of each cell instead of its midpoint."""

    def dynamic_map(signed: bool, device: torch.device) -> Tensor:
        q = f(signed, device)
        return torch.cat([(q[:-1] + q[1:]) / 2, q[-1:]])

    return dynamic_map


@plant(ops, "quantize_unsigned")
def positive_becomes_zero(f: Any) -> Any:
    """A positive value may take code 0, as with bitsandbytes."""

    def quantize(x: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
        codes, absmax = f(x, bounds)
        small = ops.scaled(x, absmax) <= bounds[0]
        return torch.where(small, 0, codes).to(torch.uint8), absmax

    return quantize


@plant(ops, "quantize_unsigned")
def zero_becomes_positive(f: Any) -> Any:
    """0 takes code 1 too."""

    def quantize(x: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
        codes, absmax = f(x, bounds)
        return codes.clamp(min=1), absmax

    return quantize


# Blocks and their scales


@plant(ops, "block_absmax")
def absmax_without_abs(_: Any) -> Any:
    """The largest value of a block, not the largest magnitude."""
    return lambda x: x.amax(dim=-1)


@plant(ops, "block_absmax")
def absmax_of_all(f: Any) -> Any:
    """One scale for the whole tensor."""
    return lambda x: f(x).amax().expand(x.shape[0]).clone()


@plant(ops, "block_absmax")
def absmax_of_half(f: Any) -> Any:
    """Of the first 128 entries of a block."""
    return lambda x: f(x[..., :128])


@plant(ops, "block_absmax")
def absmax_of_the_block_before(f: Any) -> Any:
    """Each block has its neighbour's scale."""
    return lambda x: f(x).roll(1)


@plant(ops, "block_absmax")
def absmax_hides_nan(f: Any) -> Any:
    """The scale of the entries that are numbers."""
    return lambda x: f(x.nan_to_num(0.0, 0.0, 0.0))


@plant(ops, "block_absmax")
def absmax_in_bfloat16(f: Any) -> Any:
    """A scale of 8 bits."""
    return lambda x: f(x).bfloat16().float()


@plant(ops, "scaled")
def zero_block_divided(_: Any) -> Any:
    """0/0 is looked up as it comes."""
    return lambda x, absmax: x / absmax.unsqueeze(-1)


@plant(ops, "scaled")
def by_reciprocal(_: Any) -> Any:
    """Multiplied by 1/absmax, which overflows for small scales."""

    def scaled(x: Tensor, absmax: Tensor) -> Tensor:
        usable = ((absmax > 0) & (absmax < float("inf"))).unsqueeze(-1)
        return torch.where(usable, x * (1.0 / absmax.unsqueeze(-1)), 0.0)

    return scaled


@plant(ops, "scaled")
def scale_kept_from_zero(_: Any) -> Any:
    """Divided by absmax + 1e-8."""
    return lambda x, absmax: torch.where((absmax < float("inf")).unsqueeze(-1), x / (absmax.unsqueeze(-1) + 1e-8), 0.0)


# Decoding

DECODING = {"lanes": ("eager-*",)}


@_planter(ops, "dequantize", **DECODING)
def decoded_without_scale(_: Any) -> Any:
    """The values of the map as they are."""
    return lambda codes, absmax, qmap: ops.lookup(qmap, codes) * (absmax.unsqueeze(-1) > 0)


@_planter(ops, "dequantize", **DECODING)
def decoded_by_the_next_scale(f: Any) -> Any:
    """Each block by the scale of its neighbour."""
    return lambda codes, absmax, qmap: f(codes, absmax.roll(1), qmap)


@_planter(ops, "lookup", **DECODING)
def codes_read_as_signed(_: Any) -> Any:
    """Codes from 128 on count as negative numbers, and those as 0."""
    return lambda table, codes: table[codes.to(torch.int8).long().clamp(min=0)]
