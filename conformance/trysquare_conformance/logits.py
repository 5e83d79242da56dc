"""What the cases of a loss feed in: kinds of logits, each with the reason it is here, and targets that go with them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from trysquare_conformance.case import Array, Case
from trysquare_conformance.inputs import WIDE_RANGE, Draw, Maker, seed
from trysquare_conformance.snapshots import rounded

Picker: TypeAlias = Callable[[np.random.Generator, Array], np.ndarray]

IGNORE_INDEX = {"none": -100, "some": -100, "all": -100, "class": 1}
"""By what is ignored: nothing, every third position, all of them, or a class of its own."""

LARGEST = {"float32": 3e38, "bfloat16": 3e38, "float16": 6e4}
SUBNORMAL = {"float32": 1e-40, "bfloat16": 1e-39, "float16": 1e-6, "float64": 1e-310}


def _gaussian(draw: Draw) -> Array:
    return draw.normal(3.0)


def _scaled(scale: float) -> Maker:
    return lambda draw: draw.normal(scale)


def _signs_of(values: dict[str, float]) -> Maker:
    return lambda draw: np.sign(draw.normal()) * values[draw.dtype]


def _constant(value: float) -> Maker:
    return lambda draw: np.full(draw.shape, value)


def _small_integers(draw: Draw) -> Array:
    return draw.rng.integers(-1, 2, draw.shape).astype(float)


def _negative_zeros(draw: Draw) -> Array:
    return np.where(draw.rng.random(draw.shape) < 0.5, -0.0, draw.normal())


def _many_scales(draw: Draw) -> Array:
    return draw.normal() * 10.0 ** draw.rng.uniform(-4, 4, draw.shape)


def _one_winner(draw: Draw) -> Array:
    """Class 0 far above, or first far below, all others."""
    logits = np.full(draw.shape, -1e4)
    logits[:, :1] = 1e4
    return logits + draw.normal()


def _some(value: float) -> Maker:
    """Every class but the first may be this value."""

    def make(draw: Draw) -> Array:
        chosen = draw.rng.random(draw.shape) < 0.3
        chosen[:, :1] = False
        return np.where(chosen, value, draw.normal(3.0))

    return make


def _first_position(value: float) -> Maker:
    def make(draw: Draw) -> Array:
        logits = draw.normal(3.0)
        logits[:1] = value
        return logits

    return make


def any_class(rng: np.random.Generator, logits: Array) -> np.ndarray:
    """A class for each position."""
    return rng.integers(0, max(1, logits.shape[1]), (logits.shape[0], *logits.shape[2:]))


def first_class(_: np.random.Generator, logits: Array) -> np.ndarray:
    """Class 0 everywhere, whose logit some kinds treat apart."""
    return np.zeros((logits.shape[0], *logits.shape[2:]), dtype=np.int64)


@dataclass(frozen=True)
class LogitKind:
    """Logits (N, C, d₁, …), and why they are worth a case.

    Attributes:
        reason: As the documentation prints it.
        make: Draws them.
        target: Draws class indices for them.
        dtypes: The formats that can hold them.
        certain: Class probabilities are all on the target too, and 0 elsewhere.
    """

    reason: str
    make: Maker = _gaussian
    target: Picker = any_class
    dtypes: tuple[str, ...] = (*WIDE_RANGE, "float16")
    certain: bool = False


LOGITS: dict[str, LogitKind] = {
    "gaussian": LogitKind("the ordinary case"),
    "zeros": LogitKind("a zero-initialised head: sign(x)·log(1 + |x|) has slope 1 there, not 0", _constant(0.0)),
    "ones": LogitKind("1 / (1 − x) is infinite at 1, in the branch that is not taken", _constant(1.0)),
    "signs": LogitKind("-1, 0 and 1 side by side: both branches of s meet", _small_integers),
    "negative-zero": LogitKind("-0.0 must count as zero", _negative_zeros),
    "subnormal": LogitKind("logits below the normal range", _signs_of(SUBNORMAL)),
    "huge": LogitKind("±1e4: softmax would be one-hot, and an exponential infinite", _scaled(1e4)),
    "gaussian-1e30": LogitKind("squares of logits overflow float32", _scaled(1e30), dtypes=WIDE_RANGE),
    "largest": LogitKind(
        "near the largest number: the sum of s overflows, log s does not", _signs_of(LARGEST), dtypes=tuple(LARGEST)
    ),
    "many-scales": LogitKind("eight decades in one position", _many_scales),
    "certain": LogitKind("the target far above the rest: the loss is nearly 0", _one_winner, first_class, certain=True),
    "mistaken": LogitKind("another class far above the target: log(p + 1e-12) would cap the loss", _one_winner),
    "masked": LogitKind(
        "-inf on classes that are not the target: p = 0, gradient 0", _some(-np.inf), first_class, certain=True
    ),
    "masked-target": LogitKind("-inf on classes that may be the target: the loss is inf", _some(-np.inf)),
    "all-masked": LogitKind(
        "one position with nothing but -inf: NaN there, its neighbours unharmed", _first_position(-np.inf)
    ),
    "inf": LogitKind("+inf gives NaN, as in softmax", _first_position(np.inf)),
    "nan": LogitKind(
        "NaN in one position: if it is ignored nothing of it may reach the result", _first_position(np.nan)
    ),
}


@dataclass(frozen=True)
class Feed:
    """Logits, target (integers, or probabilities), class weights, and the gradient that comes from after the result."""

    x: Array
    target: Any
    weight: Array | None
    g: Array


def draw(case: Case) -> Feed:
    """What a case feeds in, the same in every lane, as the dtype holds it."""
    settings, (shape,), kind = case.hyperparameters, case.shapes, LOGITS[case.inputs]
    rng = np.random.default_rng(seed(case.id))
    batched = shape if len(shape) > 1 else (1, *shape)
    logits = kind.make(Draw(rng, batched, case.dtype))
    y = kind.target(rng, logits)
    target = (
        _ignoring(y, settings["ignored"]) if settings["target"] == "index" else _around(y, logits, kind.certain, rng)
    )
    if case.layout == "expanded":
        logits, target = (np.array(np.broadcast_to(array[:1], array.shape)) for array in (logits, target))
    positions = y.shape if len(shape) > 1 else ()
    of_loss = settings["function"] == "cross-entropy"
    g_shape = shape if not of_loss else positions if settings["reduction"] == "none" else ()
    indices = settings["target"] == "index"
    return Feed(
        rounded(logits, case.dtype).reshape(shape),
        target.reshape(positions) if indices else rounded(target, case.dtype).reshape(shape),
        _class_weights(settings["weight"], batched[1], case.dtype, rng),
        rounded(rng.normal(size=g_shape), case.dtype),
    )


def _ignoring(y: Any, ignored: str) -> Any:
    """Class indices of which some are `ignore_index`; "class" ignores those that happen to be that class."""
    if ignored in {"none", "class"}:
        return y
    flat = np.arange(y.size).reshape(y.shape)
    return np.where((flat % 3 == 0) | (ignored == "all"), IGNORE_INDEX[ignored], y)


def _around(y: Any, logits: Array, certain: bool, rng: np.random.Generator) -> Array:
    """Class probabilities: all on the target, or random with some zeros."""
    chosen = np.expand_dims(y, 1) == np.arange(logits.shape[1]).reshape(-1, *[1] * (logits.ndim - 2))
    if certain:
        return np.asarray(chosen, dtype=np.float64)
    weights = rng.random(logits.shape) * (rng.random(logits.shape) < 0.8) + chosen
    return np.asarray(weights / np.sum(weights, axis=1, keepdims=True))


def _class_weights(which: str, classes: int, dtype: str, rng: np.random.Generator) -> Array | None:
    if which == "none":
        return None
    weights = np.abs(rng.normal(size=classes)) + 0.1
    return rounded(np.where(np.arange(classes) % 4 == 2, 0.0, weights) if which == "some-zero" else weights, dtype)
