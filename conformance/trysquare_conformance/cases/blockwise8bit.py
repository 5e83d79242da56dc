"""Every kind of block that is coded and decoded: codes at their boundaries, blocks without a scale, without an end."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch

from trysquare import _backend, _bitsandbytes
from trysquare._windows import Span, Window
from trysquare.ops import blockwise8bit as ops
from trysquare_conformance import inputs, originals
from trysquare_conformance.budget import STORED
from trysquare_conformance.case import Array, Case, Outputs, Stage, Wrap
from trysquare_conformance.codes import nearest_point
from trysquare_conformance.lanes import Lane
from trysquare_conformance.noise import FLOAT32
from trysquare_conformance.snapshots import rounded, to_array, to_tensor
from trysquare_reference import blockwise8bit as reference

BLOCK = reference.BLOCK
COMPILED_LATER = ("compiled-*", "standard")


@dataclass(frozen=True)
class Kind:
    """Values to code, and why. `exact`: every quotient by a block's scale is exact, so that there is one right code."""

    reason: str
    make: Callable[[np.random.Generator, bool], Array]
    exact: bool = False


def _gaussian(rng: np.random.Generator, signed: bool, blocks: float = 4) -> Array:
    values = rng.normal(size=int(blocks * BLOCK))
    return values if signed else values**2


def _every_code(_: np.random.Generator, signed: bool) -> Array:
    return np.array(reference.dynamic_map(signed))


def _boundaries(_: np.random.Generator, signed: bool) -> Array:
    """Midpoints as float32 holds them and both neighbours, in blocks whose scale is 1."""
    middle = reference.midpoints(reference.dynamic_map(signed)).astype(np.float32)
    beside = [np.nextafter(middle, np.float32(end)) for end in (-2, 2)]
    return np.concatenate([[*part, 1.0] for part in (middle, *beside)])


def _many_magnitudes(rng: np.random.Generator, signed: bool) -> Array:
    """From far below the smallest code to the scale, in blocks whose scale is 1."""
    values = 10.0 ** rng.uniform(-12, 0, 8 * BLOCK)
    values[::BLOCK] = 1.0
    return values * rng.choice([-1.0, 1.0], values.size) if signed else values


def _scaled(scale: float) -> Callable[[np.random.Generator, bool], Array]:
    return lambda rng, signed: _gaussian(rng, signed) * scale


def _zero_blocks(rng: np.random.Generator, signed: bool) -> Array:
    values = _gaussian(rng, signed)
    values[BLOCK : 2 * BLOCK] = 0.0
    return values


def _each_its_scale(rng: np.random.Generator, signed: bool) -> Array:
    return _gaussian(rng, signed, 12) * np.repeat(10.0 ** np.arange(-30.0, 30.0, 5.0), BLOCK)


def _one_value(value: float) -> Callable[[np.random.Generator, bool], Array]:
    def make(rng: np.random.Generator, signed: bool) -> Array:
        values = _gaussian(rng, signed)
        values[300] = value if signed else abs(value)
        return values

    return make


def _outlier(rng: np.random.Generator, signed: bool) -> Array:
    values = _gaussian(rng, signed) * 1e-9
    values[::BLOCK] = 1.0
    return values


KINDS: dict[str, Kind] = {
    "gaussian": Kind("the ordinary case", _gaussian),
    "every-code": Kind("each value of the map must come back as its own code", _every_code, exact=True),
    "boundaries": Kind("midpoints and their neighbours: ties, and the smallest step beside", _boundaries, exact=True),
    "magnitudes": Kind("every decade of the map, and what lies below all of them", _many_magnitudes, exact=True),
    "outlier": Kind("one entry a billion times the rest: a positive one must not become 0", _outlier, exact=True),
    "zero-block": Kind("0/0 in a block between others", _zero_blocks),
    "zeros": Kind("nothing but zeros", lambda _, __: np.zeros(2 * BLOCK), exact=True),
    "negative-zeros": Kind("-0.0 is zero", lambda _, __: np.full(BLOCK, -0.0), exact=True),
    "constant": Kind("every entry is its block's scale", lambda _, __: np.full(3 * BLOCK, 0.3)),
    "short-block": Kind("the last block ends early", partial(_gaussian, blocks=3.3)),
    "one-entry": Kind("a block of one", lambda _, __: np.array([0.7])),
    "short-by-one": Kind("the last block lacks one entry", lambda rng, signed: _gaussian(rng, signed, 2)[:-1]),
    "many-scales": Kind("each block has a scale of its own: a stale or shared one shows", _each_its_scale),
    "subnormal": Kind("a scale whose reciprocal overflows", _scaled(1e-40)),
    "1e-30": Kind("scales far below 1", _scaled(1e-30)),
    "1e30": Kind("scales far above 1", _scaled(1e30)),
    "nan": Kind("a block with a NaN must show it, and no other block", _one_value(float("nan"))),
    "inf": Kind("a block with an infinity has no scale", _one_value(float("inf"))),
    "-inf": Kind("of either sign", _one_value(-float("inf"))),
}


def case(tier: str, *late: tuple[str, str], kind: str, signed: bool) -> Case:
    """Coding and decoding one kind of values."""
    name = f"blockwise8bit/{'signed' if signed else 'unsigned'}/{kind}"
    settings = (("signed", signed),)
    return Case("blockwise8bit", name, settings, (), "contiguous", "float32", kind, 1, tier, late)


def draw(case: Case) -> Array:
    """The values of a case, as float32 holds them."""
    rng = np.random.default_rng(inputs.seed(case.id))
    return rounded(KINDS[case.inputs].make(rng, case.hyperparameters["signed"]), "float32")


class Blockwise8bitSubject:
    """Blockwise 8-bit numbers: their reference page and their tensor functions."""

    algorithm = "blockwise8bit"

    def cases(self) -> Iterable[Case]:
        """All of them are quick but where they have to be compiled."""
        for kind, signed in product(KINDS, (True, False)):
            yield case("quick", COMPILED_LATER, kind=kind, signed=signed)

    def stages(self, case: Case, lane: Lane) -> Iterator[Stage]:
        """Coding, and decoding all codes by the scales that are right."""
        x, signed = draw(case), case.hyperparameters["signed"]
        stored = dict.fromkeys(("scaled", "absmax", "values"), STORED["float32"]) | {"codes": STORED["float64"]}
        yield Stage("coded", partial(_coded, case, x), partial(_coded_fast, case, x, lane), stored, FLOAT32)
        codes, absmax = reference.quantize(x, reference.dynamic_map(signed))
        decoded = partial(_decoded, codes, absmax, signed), partial(_decoded_fast, codes, absmax, signed, lane)
        yield Stage("decoded", *decoded, stored, FLOAT32)

    def drift(self, case: Case, lane: Lane) -> None:
        """A function has no second step."""


def _coded(case: Case, x: Array, wrap: Wrap) -> Outputs:
    """Scales and scaled values; the codes themselves where there is only one right one."""
    wrapped = wrap(x)
    absmax = reference.block_absmax(wrapped)
    outputs = {"scaled": reference.scaled(wrapped, absmax), "absmax": absmax}
    if KINDS[case.inputs].exact:
        codes, _ = reference.quantize(wrapped, reference.dynamic_map(case.hyperparameters["signed"]))
        outputs["codes"] = codes.astype(np.float64)
    return outputs


def _coded_fast(case: Case, x: Array, lane: Lane) -> Outputs:
    """The same by the fast code."""
    signed = case.hyperparameters["signed"]
    window = Window(to_tensor(x, "float32").to(lane.device), Span(0, x.size), BLOCK)
    bounds = ops.boundaries(ops.dynamic_map(signed, torch.device(lane.device)))
    codes, absmax = _run(lane, "quantize_signed" if signed else "quantize_unsigned", window.values, bounds)
    found = to_array(codes).reshape(-1)[: x.size]
    s = reference.scaled(x, reference.block_absmax(x))
    outputs = {
        "scaled": nearest_point(found, s, reference.dynamic_map(signed)),
        "absmax": to_array(absmax)[: -(-x.size // BLOCK)],
    }
    return outputs | ({"codes": found} if KINDS[case.inputs].exact else {})


def _decoded(codes: reference.Codes, absmax: Array, signed: bool, wrap: Wrap) -> Outputs:
    return {"values": reference.dequantize(codes, wrap(absmax), reference.dynamic_map(signed))}


def _decoded_fast(codes: reference.Codes, absmax: Array, signed: bool, lane: Lane) -> Outputs:
    """By the fast code, or by bitsandbytes' own decoder in its lane."""
    window = Window(torch.from_numpy(codes).to(lane.device), Span(0, codes.size), BLOCK)
    scales = Window(to_tensor(absmax, "float32").to(lane.device), Span(0, absmax.size), 1)
    qmap = ops.dynamic_map(signed, torch.device(lane.device))
    values = _run(lane, "dequantize", window.values, scales.values, qmap)
    return {"values": to_array(values).reshape(-1)[: codes.size]}


def _run(lane: Lane, name: str, *arguments: torch.Tensor) -> Any:
    """A function of the format by the lane's backend; kernels count their launches themselves."""
    if lane.backend == "triton":
        from trysquare.kernels import blockwise8bit as kernels

        return getattr(kernels, name)(*arguments)
    function = getattr(ops, name)
    if lane.backend == "bitsandbytes" and name == "dequantize":
        originals.bitsandbytes()
        function = _bitsandbytes.decoded
    return _backend.run(lane.backend, function, *arguments)


SUBJECT = Blockwise8bitSubject()
