"""Every configuration of DolphinFlow8bit that is checked. Codes are judged by their intervals (see `codes`).

There is no free run here: one code that rounding turned changes what follows by a whole code, elsewhere in each draw.
How far 8-bit state strays from 32-bit state is told by a test over a thousand steps instead.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np
import torch

from trysquare import DolphinFlow8bit
from trysquare._optimizer import BatchedOptimizer
from trysquare_conformance import inputs, originals
from trysquare_conformance.case import SHORT_DTYPES, Array, Case, Outputs, Stage, Wrap, shape_name
from trysquare_conformance.cases.dolphinflow import DolphinFlowSubject
from trysquare_conformance.codes import nearest_point
from trysquare_conformance.lanes import Lane
from trysquare_conformance.pairwise import Choice, pairwise
from trysquare_conformance.snapshots import Feed, Snapshot, rounded
from trysquare_reference import blockwise8bit, clipping, dolphinflow8bit

Shapes = tuple[tuple[int, ...], ...]

DEFAULTS: dict[str, Any] = {
    **{field.name: field.default for field in fields(dolphinflow8bit.Hyperparameters)},
    "lr": 1e-3,
    "nonfinite": "propagate",
    "workspace_bytes": None,
    "tensor_lr": False,
    "second_group": (),
}
"""What a case sets where it says nothing: the constructor's arguments, lr as a float, and no second group."""

PLACE: dict[str, Any] = {
    "shapes": ((64, 64), (24,)),
    "layout": "contiguous",
    "dtype": "float32",
    "inputs": "gaussian",
    "steps": 1,
}
"""And what it runs on: a matrix that is coded beside a vector that is not."""

SECOND_GROUP = (("lr", 1e-2), ("weight_decay", 0.1), ("momentum", 0.5), ("ortho_mode", None), ("adaptive_lr", False))
SMALL_WORKSPACE = 1 << 15
CODED: Shapes = ((64, 64),)
RAGGED: Shapes = ((67, 71), (4097,))
WHOLE_BLOCKS: Shapes = ((10, 768),)
LONG_ROWS: Shapes = ((3, 1280), (2, 2048))
ROW: Shapes = ((1, 5000),)
COLUMN: Shapes = ((5000, 1),)
SEVERAL: Shapes = ((64, 64), (12, 10), (64, 64), (7,), (4100,), (0, 3), (12, 10))
SHAPES: tuple[Shapes, ...] = (
    PLACE["shapes"],
    RAGGED,
    WHOLE_BLOCKS,
    LONG_ROWS,
    ROW,
    ((7, 3, 41, 9),),
    ((63, 65), (64, 64)),
    ((40, 24), (), (0, 5)),
    SEVERAL,
)
"""Rows shorter than a block, primes and a short last block, rows of whole blocks, few or many, one row, a convolution,
either side of 4,096 elements, nothing that is coded, many. Not one column: what its projection leaves is nothing but
rounding, and codes of it, relative to the largest of these errors, say nothing."""

DTYPES, LAYOUTS = tuple(SHORT_DTYPES), tuple(inputs.LAYOUTS)
POLICIES = ("propagate", "skip", "raise")
ORDINARY = ("gaussian", "parallel", "rank-one", "sparse", "missing")
FORMULAS: dict[str, tuple[Any, ...]] = {
    "ortho_mode": ("vector", "matrix", None),
    "adaptive_lr": (True, False),
    "gradient_clipping": (1.0, None, 0, 0.05),
    "ns_steps": (2, 5),
    "dtype": DTYPES,
}
"""What selects another formula: each combination is compiled for itself, and then carries every shape and number."""

NUMBERS: dict[str, tuple[Any, ...]] = {
    "shapes": SHAPES,
    "layout": LAYOUTS,
    "weight_decay": (1e-2, 0.0),
    "momentum": (0.9, 0.0),
    "beta2": (0.99, 0.0),
    "eps": (1e-8, 1e-3),
    "lr": (1e-3, 1e-6, 0.5),
    "tensor_lr": (False, True),
    "loss_aware_schedule": (False, True),
    "loss_ema_beta": (0.98, 0.5),
    "nonfinite": POLICIES,
    "workspace_bytes": (None, SMALL_WORKSPACE),
    "second_group": ((), SECOND_GROUP),
    "inputs": ORDINARY,
    "steps": (1, 3),
}
HOSTILE: dict[str, tuple[Any, ...]] = {
    "ortho_mode": FORMULAS["ortho_mode"],
    "adaptive_lr": (True, False),
    "gradient_clipping": (1.0, None),
    "dtype": DTYPES,
    "nonfinite": POLICIES,
    "shapes": (PLACE["shapes"], RAGGED),
    "lr": (1e-3, 1e6, 1e-12),
    "inputs": tuple(kind for kind in inputs.KINDS if kind not in ORDINARY),
    "steps": (2,),
}
COMPILED = (
    *((0, shapes) for shapes in (PLACE["shapes"], RAGGED, WHOLE_BLOCKS)),
    *((1, shapes) for shapes in (PLACE["shapes"], WHOLE_BLOCKS)),
    (2, RAGGED),
)
"""Which formulas are compiled for which shapes: every form that the coefficients of a projection's rows take among the
blocks (one for each element, none, one for each block), and each formula. A compilation takes several times as long as
one of a 32-bit update."""

COMPILED_LAST = ("compiled-*", "exhaustive")
COMPILED_LATER = ("compiled-*", "standard")
INTERPRETED_LATER = ("triton-interpreter", "standard")
INTERPRETED_LAST = ("triton-interpreter", "exhaustive")


def case(tier: str, *late: tuple[str, str], **choice: Any) -> Case:
    """A case from what it does not take from `DEFAULTS` and `PLACE`."""
    place = {**PLACE, **{name: choice.pop(name) for name in list(choice) if name in PLACE}}
    settings = {**DEFAULTS, **choice}
    return Case("dolphinflow8bit", _name(settings, place), tuple(settings.items()), tier=tier, late=late, **place)


def _name(settings: Choice, place: Choice) -> str:
    """`dolphinflow8bit/vector/adaptive/clip=1/decay=0.01/fp32/64x64+24/contiguous/gaussian/steps=1`."""
    parts = ["dolphinflow8bit", settings["ortho_mode"] or "none", "adaptive" if settings["adaptive_lr"] else "plain"]
    clip = settings["gradient_clipping"]
    parts += ["clip=off" if clip is None else f"clip={clip:g}", f"decay={settings['weight_decay']:g}"]
    named = {"ortho_mode", "adaptive_lr", "gradient_clipping", "weight_decay", "second_group"}
    others = {k: v for k, v in settings.items() if k not in named and v != DEFAULTS[k]}
    parts += [f"{name}={value:g}" if type(value) is float else f"{name}={value}" for name, value in others.items()]
    parts += ["two-groups"] if settings["second_group"] else []
    parts += [SHORT_DTYPES[place["dtype"]], shape_name(place["shapes"]), place["layout"], place["inputs"]]
    return "/".join([*parts, f"steps={place['steps']}"])


def quick() -> Iterator[Case]:
    """A chosen handful: every rule where it matters most, every dtype, and the inputs that bite."""
    core = {"steps": 2, "lr": 1e-2}
    yield case("quick", **core)
    for kind in ("zero-gradient", "sparse", "many-scales", "gradient-1e30", "nan"):
        yield case("quick", inputs=kind, shapes=CODED, weight_decay=0.1, lr=1e-2)
    for kind, policy in product(("nan", "inf"), ("skip", "raise")):
        yield case("quick", COMPILED_LATER, inputs=kind, nonfinite=policy, shapes=CODED, steps=2)
    yield from (case("quick", COMPILED_LAST, **choice) for choice in _quick_interpreted(core))
    yield from (case("quick", COMPILED_LAST, INTERPRETED_LATER, **choice) for choice in _quick_eager(core))


def _quick_interpreted(core: Choice) -> Iterator[Choice]:
    """The rest of the rules and dtypes, each of which would be a compilation of its own, and of the kernels' paths."""
    yield {**core, "ortho_mode": "matrix"}
    yield {**core, "ortho_mode": None}
    yield {**core, "adaptive_lr": False}
    yield from ({**core, "dtype": dtype} for dtype in ("bfloat16", "float64"))
    yield {**core, "shapes": RAGGED, "workspace_bytes": SMALL_WORKSPACE, "weight_decay": 0.5}
    yield {**core, "shapes": WHOLE_BLOCKS, "workspace_bytes": SMALL_WORKSPACE}
    yield {**core, "shapes": LONG_ROWS}
    yield {**core, "shapes": ((7, 3, 41, 9),), "layout": "transposed", "workspace_bytes": SMALL_WORKSPACE}
    yield {"shapes": SEVERAL, "second_group": SECOND_GROUP, "gradient_clipping": 0.05, "steps": 2}


def _quick_eager(core: Choice) -> Iterator[Choice]:
    """What takes longer interpreted than it tells of a kernel."""
    yield {**core, "ortho_mode": "matrix", "adaptive_lr": False, "ns_steps": 5}
    yield {**core, "dtype": "float16"}
    yield {**core, "shapes": ROW, "workspace_bytes": SMALL_WORKSPACE}
    yield {**core, "shapes": COLUMN, "ortho_mode": None}
    yield {"shapes": SEVERAL, "inputs": "missing", "steps": 3}
    yield {"loss_aware_schedule": True, "tensor_lr": True, "weight_decay": 0.5, "steps": 6}
    plain = {"gradient_clipping": None, "momentum": 0.0, "beta2": 0.5, "eps": 1e-3, "layout": "strided"}
    yield {**core, **plain}
    for kind in ("parallel", "zero-rows", "outlier", "subnormal", "gradient-1e-30", "infinite-weight"):
        yield {"inputs": kind, "shapes": CODED, "lr": 1e-2, "steps": 2}


def allowed(choice: Choice) -> bool:
    """Whether a layout exists for the shapes, and the format can hold the inputs."""
    shapes, layout = choice.get("shapes"), choice.get("layout", "contiguous")
    dtypes = inputs.KINDS[choice.get("inputs", "gaussian")].dtypes
    dtype = choice.get("dtype") or choice.get("formula", {}).get("dtype", dtypes[0])
    return dtype in dtypes and (shapes is None or any(inputs.fits(layout, shape) for shape in shapes))


@cache
def standard() -> tuple[Case, ...]:
    """Every pair of levels once: of all arguments on ordinary inputs, and of the rules with every hostile input."""
    formulas = pairwise(FORMULAS)
    ordinary: list[Choice] = [{"formula": formula, "shapes": CODED} for formula in formulas]
    ordinary += pairwise({"formula": formulas[:5], **NUMBERS}, allowed)
    compiled = [case("standard", **formulas[which], shapes=shapes) for which, shapes in COMPILED]
    return (
        *compiled,
        *(case("standard", *_last(choice), **choice.pop("formula"), **choice) for choice in ordinary),
        *(case("standard", *_last(choice), **choice) for choice in pairwise(HOSTILE, allowed)),
    )


def _last(choice: Choice) -> tuple[tuple[str, str], ...]:
    """Lanes that run a case among the exhaustive ones: an interpreter has time for one dtype and few steps."""
    interpreted = choice.get("dtype", "float32") == "float32" and choice.get("steps") != 3
    return (COMPILED_LAST,) if interpreted else (COMPILED_LAST, INTERPRETED_LAST)


PRODUCTS: tuple[dict[str, tuple[Any, ...]], ...] = (
    {**FORMULAS, "shapes": SHAPES, "layout": LAYOUTS, "workspace_bytes": (None, SMALL_WORKSPACE), "steps": (1, 10)},
    {**HOSTILE, "inputs": tuple(inputs.KINDS)},
)


def exhaustive() -> Iterator[Case]:
    """The full products: of formulas, shapes, layouts, windows and steps; of rules, dtypes and every kind of input."""
    for factors in PRODUCTS:
        for levels in product(*factors.values()):
            choice = dict(zip(factors, levels, strict=True))
            if allowed(choice):
                yield case("exhaustive", **choice)


class DolphinFlow8bitSubject(DolphinFlowSubject):
    """DolphinFlow8bit: its reference page and its class."""

    algorithm = "dolphinflow8bit"
    page = dolphinflow8bit
    optimizer = DolphinFlow8bit

    def cases(self) -> Iterable[Case]:
        seen: set[str] = set()
        for tier in (quick, standard, exhaustive):
            for one in tier():
                if one.id not in seen:
                    seen.add(one.id)
                    yield one

    def build(self, case: Case, parameters: Sequence[torch.nn.Parameter], lane: Lane) -> BatchedOptimizer:
        if lane.backend == "bitsandbytes":
            originals.bitsandbytes()
        return super().build(case, parameters, lane)

    def begin(self, case: Case, parameters: Sequence[Array]) -> Snapshot:
        """The moments of float64 parameters are not coded, which the page, where all is float64, cannot know."""
        snapshot = super().begin(case, parameters)
        if case.dtype != "float64":
            return snapshot
        pairs = zip(parameters, snapshot.states, strict=True)
        plain = ("state1", "state2")
        states = ({"step": 0} | {n: np.zeros_like(p) for n in plain if n in s} for p, s in pairs)
        return replace(snapshot, states=tuple(states))

    def as_stored(self, case: Case, exact: Snapshot) -> Snapshot:
        """Codes are integers already."""

        def stored(array: Array, name: str | None) -> Array:
            if array.dtype == np.uint8:
                return array
            return rounded(array, case.dtype if name is None else self.stored_as(case, name))

        return exact.mapped(stored)

    def stages(self, case: Case, lane: Lane) -> Iterator[Stage]:
        """As of any optimizer, with scaled values in the place of codes."""
        for stage, (_, before, feed) in zip(super().stages(case, lane), self.looked_at(case), strict=True):
            yield replace(stage, fast=partial(self._observed, case, before, feed, stage.fast))

    def drift(self, case: Case, lane: Lane) -> None:
        """See the module."""

    def _step_outputs(self, case: Case, before: Snapshot, feed: Feed, wrap: Wrap) -> Outputs:
        return super()._step_outputs(case, before, feed, wrap) | self._scaled(case, before, feed, wrap)

    def _observed(self, case: Case, before: Snapshot, feed: Feed, fast: Any) -> Outputs:
        """What the fast code did, with the point of each code's interval that is nearest to the reference."""
        seen: Outputs = fast()
        for name, s in self._scaled(case, before, feed, np.asarray).items():
            moment, _, index = name.partition("/")
            seen[name] = nearest_point(seen[name], s, before.states[int(index)][f"qmap{moment[-1]}"])
        return seen

    def _scaled(self, case: Case, before: Snapshot, feed: Feed, wrap: Wrap) -> Outputs:
        """The scaled moments of every coded parameter that this step moves, before they are coded."""
        if case.hyperparameters["nonfinite"] != "propagate" and not self.is_finite(feed):
            return {}
        rules = self.hyperparameters(case)
        given = [None if g is None else wrap(g) for g in feed.gradients]
        with np.errstate(all="ignore"):
            s = clipping.clip_scale([g for g in given if g is not None], rules[0].gradient_clipping)
            found = {}
            for i, g in enumerate(given):
                if g is None or "qmap1" not in before.states[i]:
                    continue
                state = before.wrapped(wrap).states[i]
                hp = rules[i % len(rules)]
                moved = dolphinflow8bit.update_moments(wrap(before.parameters[i]), s * g, state, hp)
                for k, moment in enumerate(moved, 1):
                    scaled = blockwise8bit.scaled(moment, blockwise8bit.block_absmax(moment))
                    found[f"state{k}/{i}"] = np.asarray(scaled)
        return found


SUBJECT = DolphinFlow8bitSubject()
