"""Every configuration of StableMax that is checked: its values, its cross-entropy, and the gradients of all of them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import product
from types import FunctionType
from typing import Any

import numpy as np
import torch

from trysquare_conformance import inputs
from trysquare_conformance.budget import STORED
from trysquare_conformance.case import SHORT_DTYPES, Array, Case, Outputs, Stage, Wrap, shape_name
from trysquare_conformance.lanes import Lane
from trysquare_conformance.logits import IGNORE_INDEX, LOGITS, Feed, draw
from trysquare_conformance.noise import FLOAT32, FLOAT64
from trysquare_conformance.pairwise import Choice, pairwise
from trysquare_conformance.snapshots import to_array, to_tensor
from trysquare_reference import stablemax as reference

Shape = tuple[int, ...]
DEFAULTS: dict[str, Any] = {
    "function": "cross-entropy",
    "target": "index",
    "reduction": "mean",
    "weight": "none",
    "ignored": "none",
    "label_smoothing": 0.0,
    "dim": 1,
    "block": None,
}
"""What a case has where it says nothing. `block` is the number of elements that are worked on at a time."""

MATRIX: Shape = (12, 10)
SMALL_BLOCK = 40
SHAPES: tuple[Shape, ...] = (
    MATRIX,
    (7, 31),
    (5, 7, 4),
    (4, 6, 3, 2),
    (3, 257),
    (10,),
    (6, 1),
    (1, 5),
    (0, 5),
    (4, 5, 0),
)
"""A matrix, primes, one and two further dimensions, many classes, unbatched, one class, one position, none."""

FORMULAS: dict[str, tuple[Any, ...]] = {
    "target": ("index", "probabilities"),
    "weight": ("none", "some-zero", "gaussian"),
    "label_smoothing": (0.0, 0.1, 1.0),
    "reduction": ("mean", "sum", "none"),
    "dtype": tuple(SHORT_DTYPES),
}
NUMBERS: dict[str, tuple[Any, ...]] = {
    "ignored": tuple(IGNORE_INDEX),
    "shape": SHAPES,
    "layout": tuple(inputs.LAYOUTS),
    "block": (None, SMALL_BLOCK),
    "inputs": tuple(LOGITS),
}
VALUES: dict[str, tuple[Any, ...]] = {
    "function": ("stablemax", "log-stablemax"),
    "dtype": tuple(SHORT_DTYPES),
    "shape": SHAPES,
    "dim": (0, 1, -1),
    "layout": tuple(inputs.LAYOUTS),
    "inputs": tuple(LOGITS),
}
NO_KERNEL = ("eager-*", "compiled-*")
"""The lanes of values and of class probabilities, for which there are no Triton kernels."""

COMPILED_LATER = ("compiled-*", "standard")
COMPILED_LAST = ("compiled-*", "exhaustive")


def case(tier: str, *late: tuple[str, str], **choice: Any) -> Case:
    """A case from what it does not take from `DEFAULTS`, gaussian logits, float32 and a small matrix."""
    place = {"layout": "contiguous", "dtype": "float32", "inputs": "gaussian"}
    place |= {name: choice.pop(name) for name in list(choice) if name in place}
    shapes = (choice.pop("shape", MATRIX),)
    settings = {**DEFAULTS, **choice}
    has_kernel = settings["function"] == "cross-entropy" and settings["target"] == "index"
    return Case(
        "stablemax",
        _name(settings, place, shapes),
        tuple(settings.items()),
        shapes,
        steps=1,
        tier=tier,
        late=late,
        lanes=("*",) if has_kernel else NO_KERNEL,
        **place,
    )


def _name(settings: Choice, place: Choice, shapes: tuple[Shape, ...]) -> str:
    """`stablemax/cross-entropy/index/mean/weight=gaussian/label_smoothing=0.1/fp32/12x10/contiguous/gaussian`."""
    of_loss = settings["function"] == "cross-entropy"
    parts = ["stablemax", settings["function"]]
    parts += [settings["target"], settings["reduction"]] if of_loss else [f"dim={settings['dim']}"]
    named = {"function", "target", "reduction", *(() if of_loss else ("dim",))}
    parts += [f"{name}={value}" for name, value in settings.items() if name not in named and value != DEFAULTS[name]]
    return "/".join([*parts, SHORT_DTYPES[place["dtype"]], shape_name(shapes), place["layout"], place["inputs"]])


def allowed(choice: Choice) -> bool:
    """Whether the layout and the dimension exist, the format can hold the logits, and what is ignored is an index."""
    formula = choice.get("formula", choice)
    kind = LOGITS[choice.get("inputs", "gaussian")]
    dtype, shape = formula.get("dtype", kind.dtypes[0]), choice.get("shape")
    fits = shape is None or inputs.fits(choice.get("layout", "contiguous"), shape)
    dim = choice.get("dim")
    has_dim = shape is None or dim is None or (dim < len(shape) and shape[dim] > 0)
    ignores = choice.get("ignored", "none") != "none" and formula.get("target") == "probabilities"
    return dtype in kind.dtypes and fits and has_dim and not ignores


def quick() -> Iterator[Case]:
    """A chosen handful: every rule where it matters, every dtype, every kind of logits."""
    yield case("quick")
    for kind in LOGITS:
        yield case("quick", COMPILED_LATER, inputs=kind)
        yield case("quick", COMPILED_LATER, inputs=kind, target="probabilities", reduction="none")
    for function in ("stablemax", "log-stablemax"):
        yield case("quick", COMPILED_LATER, function=function)
    yield from (case("quick", COMPILED_LAST, **choice) for choice in _quick_eager())


def _quick_eager() -> Iterator[Choice]:
    """Each would be a compilation of its own."""
    every: Choice = {"weight": "gaussian", "ignored": "some", "label_smoothing": 0.1}
    yield {**every, "target": "probabilities", "ignored": "none", "dtype": "bfloat16"}
    yield from ({**every, "dtype": dtype, "inputs": "many-scales"} for dtype in SHORT_DTYPES)
    for reduction in ("sum", "none"):
        yield {**every, "reduction": reduction}
        yield {**every, "reduction": reduction, "ignored": "class"}
    yield {"inputs": "nan", "ignored": "some"}
    yield {"inputs": "all-masked", "ignored": "some", "label_smoothing": 1.0}
    yield {"ignored": "all", "weight": "gaussian"}
    yield {"weight": "some-zero", "inputs": "masked-target", "label_smoothing": 0.1}
    yield {"weight": "some-zero", "inputs": "masked", "target": "probabilities"}
    yield {**every, "block": SMALL_BLOCK, "shape": (5, 7, 4), "layout": "transposed"}
    yield {**every, "block": SMALL_BLOCK, "shape": (7, 31), "reduction": "none"}
    yield {"target": "probabilities", "weight": "gaussian", "block": SMALL_BLOCK, "shape": (4, 6, 3, 2)}
    yield from ({**every, "shape": shape} for shape in SHAPES)
    for function in ("stablemax", "log-stablemax"):
        yield from ({"function": function, "dtype": dtype} for dtype in ("bfloat16", "float64"))
        yield {"function": function, "inputs": "masked", "dim": 0}
    yield from ({"function": "log-stablemax", "inputs": kind} for kind in ("zeros", "ones", "largest", "certain"))
    yield from ({"function": "stablemax", "inputs": kind} for kind in ("zeros", "ones", "huge", "subnormal", "largest"))


@cache
def standard() -> tuple[Case, ...]:
    """Every pair of levels once. Few formulas that cover their pairs are each paired with all numbers."""
    formulas = pairwise(FORMULAS)
    losses = pairwise({"formula": formulas, **NUMBERS}, allowed)
    values = pairwise(VALUES, allowed)
    compiled = {(f["target"], f["label_smoothing"] == 0): f for f in formulas}.values()
    few = [{**f, "shape": s} for f in compiled for s in (MATRIX, (7, 31), (3, 257))]
    return (
        *(case("standard", **choice) for choice in few),
        *(case("standard", COMPILED_LAST, **choice.pop("formula"), **choice) for choice in losses),
        *(case("standard", COMPILED_LAST, **choice) for choice in values),
    )


def exhaustive() -> Iterator[Case]:
    """The full product: of the loss's arguments with shapes and layouts, and with every kind of logits."""
    for factors in (
        {**FORMULAS, **{name: NUMBERS[name] for name in ("ignored", "shape", "layout", "block")}},
        {**FORMULAS, "ignored": NUMBERS["ignored"], "inputs": NUMBERS["inputs"]},
        VALUES,
    ):
        for levels in product(*factors.values()):
            choice = dict(zip(factors, levels, strict=True))
            if allowed(choice):
                yield case("exhaustive", **choice)


class StableMaxSubject:
    """StableMax: its reference page and its functions."""

    algorithm = "stablemax"

    def cases(self) -> Iterable[Case]:
        seen: set[str] = set()
        for tier in (quick, standard, exhaustive):
            for one in tier():
                if one.id not in seen:
                    seen.add(one.id)
                    yield one

    def stages(self, case: Case, lane: Lane) -> Iterator[Stage]:
        """One: the result with all its gradients."""
        feed = draw(case)
        of_loss = case.hyperparameters["function"] == "cross-entropy"
        run = (reference_loss, fast_loss) if of_loss else (reference_values, fast_values)
        names = ("loss", "values", "gradient", "target_gradient", "weight_gradient")
        yield Stage(
            "loss and gradients" if of_loss else "values and gradient",
            partial(run[0], case, feed),
            partial(run[1], case, feed, lane),
            dict.fromkeys(names, STORED[case.dtype]),
            FLOAT64 if case.dtype == "float64" else FLOAT32,
            computes=bool(feed.x.size),
        )

    def drift(self, case: Case, lane: Lane) -> None:
        """A function has no second step."""


def _arguments(case: Case) -> dict[str, Any]:
    """What the loss takes beside its tensors."""
    settings = case.hyperparameters
    given = {name: settings[name] for name in ("reduction", "label_smoothing")}
    return {"ignore_index": IGNORE_INDEX[settings["ignored"]] if settings["target"] == "index" else -100, **given}


def reference_loss(case: Case, feed: Feed, wrap: Wrap) -> Outputs:
    """The loss and its gradients by the reference page."""
    arguments, indices = _arguments(case), case.hyperparameters["target"] == "index"
    x, g, weight = wrap(feed.x), wrap(feed.g), None if feed.weight is None else wrap(feed.weight)
    target = feed.target if indices else wrap(feed.target)
    outputs = {
        "loss": reference.cross_entropy(x, target, weight, **arguments),
        "gradient": reference.cross_entropy_gradient(x, target, weight, **arguments, g=g),
    }
    if not indices:
        del arguments["ignore_index"]
        of_target, of_weight = reference.probability_gradients(x, target, weight, **arguments, g=g)
        outputs |= {"target_gradient": of_target} | ({} if weight is None else {"weight_gradient": of_weight})
    return outputs


def fast_loss(case: Case, feed: Feed, lane: Lane) -> Outputs:
    """The same by the fast code."""
    indices = case.hyperparameters["target"] == "index"
    x = _tensor(feed.x, case, lane).requires_grad_()
    target = (
        torch.from_numpy(feed.target).to(lane.device) if indices else _tensor(feed.target, case, lane).requires_grad_()
    )
    weight = None if feed.weight is None else to_tensor(feed.weight, case.dtype).to(lane.device)
    if weight is not None and not indices:
        weight.requires_grad_()
    leaves = {"gradient": x, **({} if indices else {"target_gradient": target})}
    leaves |= {"weight_gradient": weight} if weight is not None and not indices else {}
    with _blocks_of(case.hyperparameters["block"]), _tiles_of(case.hyperparameters["block"], lane):
        loss = _run(lane, cross_entropy, x, target, weight, *_arguments(case).values())
        g = to_tensor(feed.g, case.dtype).to(lane.device)
        gradients = torch.autograd.grad(loss, list(leaves.values()), g)
    _check_kept(x, feed.x)
    named = dict(zip(leaves, gradients, strict=True))
    return {"loss": to_array(loss)} | {name: to_array(gradient) for name, gradient in named.items()}


def reference_values(case: Case, feed: Feed, wrap: Wrap) -> Outputs:
    """p or log p, and its gradient, by the reference page."""
    x, g, axis = wrap(feed.x), wrap(feed.g), case.hyperparameters["dim"]
    if case.hyperparameters["function"] == "stablemax":
        return {"values": reference.stablemax(x, axis), "gradient": reference.stablemax_gradient(x, g, axis)}
    return {"values": reference.log_stablemax(x, axis), "gradient": reference.log_stablemax_gradient(x, g, axis)}


def fast_values(case: Case, feed: Feed, lane: Lane) -> Outputs:
    """The same by the fast code."""
    x = _tensor(feed.x, case, lane).requires_grad_()
    function = stablemax if case.hyperparameters["function"] == "stablemax" else log_stablemax
    values = _run(lane, function, x, case.hyperparameters["dim"])
    (gradient,) = torch.autograd.grad(values, x, to_tensor(feed.g, case.dtype).to(lane.device))
    _check_kept(x, feed.x)
    return {"values": to_array(values), "gradient": to_array(gradient)}


def cross_entropy(*arguments: Any, backend: str = "auto") -> torch.Tensor:
    """The fast loss, looked up when it is called; also what a compiled lane compiles."""
    import trysquare

    return trysquare.stablemax_cross_entropy(*arguments, backend=backend)


def stablemax(x: torch.Tensor, dim: int) -> torch.Tensor:
    """As `cross_entropy`."""
    import trysquare

    return trysquare.stablemax(x, dim)


def log_stablemax(x: torch.Tensor, dim: int) -> torch.Tensor:
    """As `cross_entropy`."""
    import trysquare

    return trysquare.log_stablemax(x, dim)


def _run(lane: Lane, function: Any, *arguments: Any) -> torch.Tensor:
    """Call as the lane does. Eager functions and kernels count their own calls, a compiled one is counted here."""
    from trysquare import _backend

    if lane.backend in {"eager", "triton"}:
        asked = {"backend": lane.backend} if function is cross_entropy else {}  # values are eager, or traced
        return function(*arguments, **asked)  # type: ignore[no-any-return]
    _backend.calls[lane.backend, function.__name__] += 1
    return _compiled(function, *map(_kind, arguments))(*arguments)  # type: ignore[no-any-return]


def _kind(argument: Any) -> Any:
    """What is compiled for itself: every setting, and of a tensor the dtype and rank."""
    return (argument.dtype, argument.ndim) if isinstance(argument, torch.Tensor) else argument


@cache
def _compiled(function: Any, *kinds: Any) -> Any:
    """The function for all sizes, with a code object of its own, of which torch.compile compiles only a handful."""
    name = f"{function.__name__}_{abs(hash(kinds)):x}"
    own = FunctionType(function.__code__.replace(co_name=name), globals())
    own.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(own, dynamic=True, fullgraph=True)


def _tensor(array: Array, case: Case, lane: Lane) -> torch.Tensor:
    return inputs.lay_out(to_tensor(array, case.dtype).to(lane.device), case.layout)


@contextmanager
def _blocks_of(elements: int | None) -> Iterator[None]:
    """As long as it lasts, large tensors are worked on in blocks of this many elements."""
    from trysquare import _blocks

    before = _blocks.CPU_ELEMENTS, _blocks.DEVICE_ELEMENTS
    _blocks.CPU_ELEMENTS, _blocks.DEVICE_ELEMENTS = (elements, elements) if elements else before
    try:
        yield
    finally:
        _blocks.CPU_ELEMENTS, _blocks.DEVICE_ELEMENTS = before


@contextmanager
def _tiles_of(elements: int | None, lane: Lane) -> Iterator[None]:
    """As long as it lasts, kernels hold about as many logits at a time, and cut rows of a few tiles into parts."""
    if elements is None or lane.backend != "triton":
        yield
        return
    from trysquare.kernels import stablemax, stablemax_problem

    tile, parts = (stablemax_problem.TILE, stablemax_problem.ACROSS), (stablemax.TILES, stablemax.PROGRAMS)
    stablemax_problem.TILE, stablemax_problem.ACROSS = 1 << elements.bit_length() - 3, 4
    stablemax.TILES, stablemax.PROGRAMS = 2, 2
    try:
        yield
    finally:
        stablemax_problem.TILE, stablemax_problem.ACROSS = tile
        stablemax.TILES, stablemax.PROGRAMS = parts


def _check_kept(x: torch.Tensor, before: Array) -> None:
    """A loss reads its logits and must leave them."""
    if not np.array_equal(to_array(x), before, equal_nan=True):
        raise AssertionError("the logits were changed")


SUBJECT = StableMaxSubject()
