"""What the cases feed in: kinds of weights and gradients, each with the reason it is here, and layouts in memory."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from trysquare_conformance.case import Array

Shape: TypeAlias = tuple[int, ...]
HALVES = ("bfloat16", "float16")
WIDE_RANGE = ("float32", "bfloat16", "float64")
EDGE = 0.05
"""How far at least an exponent of ten is from a domain's edge; rounding to bfloat16 moves that of ⟨w,w⟩ by 0.002."""
SUBNORMAL = {"float32": 1e-40, "bfloat16": 1e-39, "float16": 1e-6, "float64": 1e-310}


def seed(*names: object) -> int:
    """The same names give the same seed, on every machine and in every process."""
    return zlib.crc32("/".join(map(str, names)).encode())


@dataclass(frozen=True)
class Draw:
    """What a kind knows when it draws: random numbers, the shape, the format, and (for gradients) the weights."""

    rng: np.random.Generator
    shape: Shape
    dtype: str
    weights: Array | None = None

    def normal(self, scale: float = 1.0) -> Array:
        """An array, 0-dimensional where the shape is, and not NumPy's scalar."""
        return np.asarray(self.rng.normal(size=self.shape) * scale)

    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    def per_row(self, values: Array) -> Array:
        """One value a row, shaped to multiply this shape."""
        return values.reshape((-1,) + (1,) * (len(self.shape) - 1)) if self.shape else values.reshape(())

    def current(self) -> Array:
        if self.weights is None:
            raise ValueError("this kind of gradient follows the weights: pass them")
        return self.weights


Maker: TypeAlias = Callable[[Draw], Array]


def _gaussian_weights(draw: Draw) -> Array:
    return draw.normal(0.1)


def _gaussian(draw: Draw) -> Array:
    return draw.normal(0.1)


def _parallel(draw: Draw) -> Array:
    """With a thousandth of the weights' size across them, which no rounding reaches however large they have grown."""
    weights = draw.current()
    size = float(np.linalg.norm(weights)) / math.sqrt(max(1, weights.size))
    return 3.0 * weights + draw.normal(1e-3 * size)


def _rank_one(draw: Draw) -> Array:
    left = draw.per_row(draw.rng.normal(size=draw.rows()))
    right = draw.rng.normal(size=(1, *draw.shape[1:])) if draw.shape else np.ones(())
    return 0.1 * left * right


def _ill_conditioned(draw: Draw) -> Array:
    """Singular values from 1 to 1e-12, spread evenly in the logarithm."""
    if len(draw.shape) < 2 or 0 in draw.shape:
        return draw.normal(0.1)
    matrix = draw.normal().reshape(draw.shape[0], -1)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray((left * np.logspace(0, -12, values.size)) @ right).reshape(draw.shape)


def _zeros(draw: Draw) -> Array:
    return np.zeros(draw.shape)


def _some_zero_rows(draw: Draw) -> Array:
    return draw.normal(0.1) * draw.per_row((np.arange(draw.rows()) % 3 != 1).astype(float))


def _negative_zeros(draw: Draw) -> Array:
    return np.where(draw.rng.random(draw.shape) < 0.5, -0.0, draw.normal(0.1))


def _sparse(draw: Draw) -> Array:
    return np.where(draw.rng.random(draw.shape) < 0.9, 0.0, draw.normal(0.1))


def _subnormal(draw: Draw) -> Array:
    return draw.normal(SUBNORMAL[draw.dtype])


def _scaled(scale: float) -> Maker:
    return lambda draw: draw.normal(scale)


def _rows_of_many_scales(draw: Draw) -> Array:
    return draw.normal() * draw.per_row(np.logspace(-8, 4, draw.rows()))


def _outlier(draw: Draw) -> Array:
    values = draw.normal(1e-3)
    values.reshape(-1)[values.size // 2 : values.size // 2 + 1] = 1e3
    return values


def _edge_of_domain(draw: Draw) -> Array:
    """Rows whose square ⟨w,w⟩ lies a little below and above 1e-30, where the projection begins.

    None lies on it: there rounding decides, and sixteen draws may all miss what one run in twenty finds.
    """
    direction = draw.normal()
    length = np.sqrt(np.sum(direction**2, axis=tuple(range(1, direction.ndim)), keepdims=True))
    exponents = np.linspace(-32, -28, draw.rows())
    exponents = np.where(np.abs(exponents + 30) < EDGE, -30 + EDGE, exponents)
    wanted = draw.per_row(np.sqrt(10.0**exponents))
    return np.asarray(direction / np.where(length == 0, 1.0, length) * wanted)


def _one_infinite(draw: Draw) -> Array:
    weights = draw.normal(0.1)
    weights.reshape(-1)[weights.size // 2 : weights.size // 2 + 1] = np.inf
    return weights


def _one_entry(value: float) -> Maker:
    def make(draw: Draw) -> Array:
        gradient = draw.normal(0.1)
        gradient.reshape(-1)[gradient.size // 3 : gradient.size // 3 + 1] = value
        return gradient

    return make


@dataclass(frozen=True)
class InputKind:
    """Weights, gradients, and why this kind is worth a case. `dtypes` are the formats that can hold its values."""

    reason: str
    weights: Maker = _gaussian_weights
    gradient: Maker = _gaussian
    dtypes: tuple[str, ...] = (*WIDE_RANGE, "float16")
    finite: bool = True
    missing: bool = False

    def has_gradient(self, index: int, step: int) -> bool:
        """Whether parameter `index` has a gradient in step 0, 1, …; where some lack it, by lot two times in three."""
        return not self.missing or seed("lot", index, step) % 3 > 0


KINDS: dict[str, InputKind] = {
    "gaussian": InputKind("the ordinary case: nothing cancels, nothing overflows"),
    "parallel": InputKind(
        "late in training the gradient is almost parallel to the weights: projecting it cancels nearly all digits",
        gradient=_parallel,
    ),
    "rank-one": InputKind(
        "one singular value, the rest exactly zero: a polar factor that is not unique", gradient=_rank_one
    ),
    "condition-1e12": InputKind(
        "singular values that no half precision can resolve beside each other", gradient=_ill_conditioned
    ),
    "sparse": InputKind("nine entries in ten are exactly zero, as in an embedding: 0 / (√0 + ε)", gradient=_sparse),
    "zero-gradient": InputKind("0/0 in every normalisation; only decay may move a parameter", gradient=_zeros),
    "zero-weights": InputKind("a fresh zero-initialised layer has no direction to project away from", weights=_zeros),
    "zero-rows": InputKind(
        "some rows are zero and their neighbours are not: a row must not lend its scale to the next",
        weights=_some_zero_rows,
        gradient=_some_zero_rows,
    ),
    "negative-zero": InputKind("-0.0 must count as zero", weights=_negative_zeros, gradient=_negative_zeros),
    "subnormal": InputKind("gradients below the normal range, whose squares vanish", gradient=_subnormal),
    "gradient-1e30": InputKind(
        "the squares of the gradient overflow float32", gradient=_scaled(1e30), dtypes=WIDE_RANGE
    ),
    "gradient-1e200": InputKind(
        "every entry is finite and their norm is not, even in float64: no step may silently be zero",
        gradient=_scaled(1e200),
        dtypes=("float64",),
    ),
    "gradient-1e-30": InputKind(
        "the squares of the gradient underflow float32", gradient=_scaled(1e-30), dtypes=WIDE_RANGE
    ),
    "weights-1e30": InputKind(
        "⟨w,w⟩ overflows float32: outside the domain of the projection", weights=_scaled(1e30), dtypes=WIDE_RANGE
    ),
    "weights-1e-30": InputKind(
        "⟨w,w⟩ underflows: outside the domain of the projection", weights=_scaled(1e-30), dtypes=WIDE_RANGE
    ),
    "infinite-weight": InputKind(
        "one weight has left the range: its row has no direction to project away from, and 0·∞ is NaN",
        weights=_one_infinite,
    ),
    "both-tiny": InputKind(
        "the product of an update and a weight underflows where its sign is asked for: signs must be compared",
        weights=_scaled(1e-27),
        gradient=_scaled(1e-30),
        dtypes=WIDE_RANGE,
    ),
    "domain-edge": InputKind(
        "⟨w,w⟩ on both sides of 1e-30, where the projection begins", weights=_edge_of_domain, dtypes=WIDE_RANGE
    ),
    "many-scales": InputKind(
        "each row has a scale of its own, over twelve decades: a stale or shared scale shows",
        weights=_rows_of_many_scales,
        gradient=_rows_of_many_scales,
        dtypes=WIDE_RANGE,
    ),
    "outlier": InputKind("one entry a million times the rest decides every norm", gradient=_outlier),
    "missing": InputKind(
        "one gradient in three is None, each step another one: its parameter must not move, nor count the step",
        missing=True,
    ),
    "nan": InputKind("one NaN in the gradient of the first parameter", gradient=_one_entry(float("nan")), finite=False),
    "inf": InputKind(
        "one infinity in the gradient of the first parameter", gradient=_one_entry(float("inf")), finite=False
    ),
}

LAYOUTS: dict[str, str] = {
    "contiguous": "as torch allocates",
    "transposed": "the last two dimensions swapped in memory, as a tied or transposed weight",
    "strided": "every second column of a wider tensor",
    "offset": "a view that begins at an odd place of its storage, as in a flattened parameter buffer",
    "channels_last": "the layout of convolutions on many devices",
    "expanded": "a gradient with stride 0, as autograd makes for a sum",
}


def fits(layout: str, shape: Shape) -> bool:
    """Whether a tensor of this shape can be laid out so."""
    least = {"transposed": 2, "strided": 1, "channels_last": 4, "expanded": 2}.get(layout, 0)
    return len(shape) >= least and not (layout == "channels_last" and len(shape) > 5)


def lay_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another layout. `expanded` keeps the first row and repeats it with stride 0."""
    if layout == "contiguous" or not fits(layout, tuple(tensor.shape)):
        return tensor.contiguous()
    if layout == "transposed":
        return tensor.mT.contiguous().mT
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d)
    if layout == "expanded":
        return tensor[:1].contiguous().expand(tensor.shape)
    return _view_of_larger(tensor, layout)


def _view_of_larger(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """`strided` and `offset`: a view into more memory than it needs, whose rest is NaN so that a stray read shows."""
    if layout == "strided":
        larger = torch.full(
            (*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"), dtype=tensor.dtype, device=tensor.device
        )
        view = larger[..., ::2]
    else:
        larger = torch.full((tensor.numel() + 3,), float("nan"), dtype=tensor.dtype, device=tensor.device)
        view = larger[3:].view(tensor.shape)
    view.copy_(tensor)
    return view
