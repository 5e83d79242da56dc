"""Every configuration of DolphinFlow that is checked, and how its reference and its fast optimizer take a step."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from functools import cache
from itertools import product
from typing import Any

import torch

from trysquare import DolphinFlow
from trysquare._optimizer import BatchedOptimizer
from trysquare_conformance import inputs
from trysquare_conformance.case import SHORT_DTYPES, Array, Case, Stage, shape_name
from trysquare_conformance.lanes import Lane
from trysquare_conformance.optimizers import OptimizerSubject
from trysquare_conformance.pairwise import Choice, pairwise
from trysquare_conformance.snapshots import Feed, Snapshot
from trysquare_reference import clipping, dolphinflow
from trysquare_reference.loss_schedule import LossSchedule, update

Shapes = tuple[tuple[int, ...], ...]

DEFAULTS: dict[str, Any] = {
    **{field.name: field.default for field in fields(dolphinflow.Hyperparameters)},
    "lr": 1e-3,
    "nonfinite": "propagate",
    "workspace_bytes": None,
    "tensor_lr": False,
    "second_group": (),
}
"""What a case sets where it says nothing: the constructor's arguments, lr as a float, and no second group."""

PLACE: dict[str, Any] = {
    "shapes": ((40, 24), (24,)),
    "layout": "contiguous",
    "dtype": "float32",
    "inputs": "gaussian",
    "steps": 1,
}
"""And what it runs on."""

SECOND_GROUP = (("lr", 1e-2), ("weight_decay", 0.1), ("momentum", 0.5), ("ortho_mode", None), ("adaptive_lr", False))
SMALL_WORKSPACE = 1 << 10
SMALL: Shapes = ((12, 10), (7,))
TALL_AND_BIAS: Shapes = PLACE["shapes"]
WIDE: Shapes = ((24, 40),)
SEVERAL: Shapes = ((12, 10), (12, 10), (7,), (6, 4, 3, 3), (12, 10), (9, 9), (10, 12), (0, 3), (7,))
SHAPES: tuple[Shapes, ...] = (
    TALL_AND_BIAS,
    WIDE,
    ((16, 16),),
    ((31, 37),),
    ((1, 40), (40, 1)),
    ((7,), ()),
    ((8, 4, 3),),
    ((8, 4, 3, 3),),
    ((4, 3, 2, 2, 2),),
    ((0, 5), (5, 0), (5,)),
    SEVERAL,
)
"""Tall beside a bias, wide, square, prime, 1×N and N×1, vector and scalar, convolutions, empty beside not, many."""
LONG_ROWS: Shapes = ((2, 16_500),)
"""Too long for one program, and longer than the part of a row whose products one program forms."""
SHORT_ROWS: Shapes = ((300, 9),)
"""Many of them share a program, and the last of them leave a part of one empty."""

RULES: dict[str, tuple[Any, ...]] = {
    "ortho_mode": ("vector", "matrix", None),
    "project": ("gradient", "update"),
    "adaptive_lr": (True, False),
    "gradient_clipping": (1.0, None),
    "weight_decay": (1e-2, 0.0),
    "bias_correction": (True, False),
}
DTYPES, LAYOUTS = tuple(SHORT_DTYPES), tuple(inputs.LAYOUTS)
POLICIES = ("propagate", "skip", "raise")
ORDINARY = ("gaussian", "parallel", "rank-one", "sparse", "missing")

FORMULAS: dict[str, tuple[Any, ...]] = {
    **{name: RULES[name] for name in ("ortho_mode", "project", "adaptive_lr", "bias_correction", "gradient_clipping")},
    "ns_steps": (2, 5),
    "dtype": DTYPES,
}
"""What selects another formula: each combination is compiled for itself, and then carries every shape and number."""

CLIPPING: dict[float | None, tuple[float | None, float | None]] = {1.0: (1.0, 0.05), None: (None, 0)}
"""Values of `gradient_clipping` for which one compilation serves."""

NUMBERS: dict[str, tuple[Any, ...]] = {
    "shapes": SHAPES,
    "layout": LAYOUTS,
    "weight_decay": RULES["weight_decay"],
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
    "steps": (1, 2),
}
MANY_STEPS = 50
WEIGHTS = 0.1
"""About the size of a weight of most inputs; the first step of an entry is 1.9 lr."""

HOSTILE: dict[str, tuple[Any, ...]] = {
    **RULES,
    "dtype": DTYPES,
    "nonfinite": POLICIES,
    "shapes": (((12, 10), (12, 10), (7,)), ((6, 4, 3, 3),)),
    "lr": (1e-3, 1e6, 1e-12),
    "inputs": tuple(kind for kind in inputs.KINDS if kind not in ORDINARY),
    "steps": (2,),
}
COMPILED_LATER, COMPILED_LAST = ("compiled-*", "standard"), ("compiled-*", "exhaustive")
INTERPRETED_LATER = ("triton-interpreter", "standard")
"""A program of a kernel takes Triton's interpreter about a millisecond."""

INTERPRETED_LAST = ("triton-interpreter", "exhaustive")


def case(tier: str, *late: tuple[str, str], **choice: Any) -> Case:
    """A case from what it does not take from `DEFAULTS` and `PLACE`."""
    place = {**PLACE, **{name: choice.pop(name) for name in list(choice) if name in PLACE}}
    settings = {**DEFAULTS, **choice}
    return Case("dolphinflow", _name(settings, place), tuple(settings.items()), tier=tier, late=late, **place)


def _name(settings: Choice, place: Choice) -> str:
    """`dolphinflow/vector/gradient/adaptive/clip=1/decay=0.01/fp32/40x24+24/contiguous/gaussian/steps=1`."""
    parts = ["dolphinflow", settings["ortho_mode"] or "none", settings["project"]]
    parts += ["adaptive" if settings["adaptive_lr"] else "plain"]
    clip = settings["gradient_clipping"]
    parts += ["clip=off" if clip is None else f"clip={clip:g}", f"decay={settings['weight_decay']:g}"]
    named = {"ortho_mode", "project", "adaptive_lr", "gradient_clipping", "weight_decay", "second_group"}
    others = {k: v for k, v in settings.items() if k not in named and v != DEFAULTS[k]}
    parts += [f"{name}={value:g}" if type(value) is float else f"{name}={value}" for name, value in others.items()]
    parts += ["two-groups"] if settings["second_group"] else []
    parts += [SHORT_DTYPES[place["dtype"]], shape_name(place["shapes"]), place["layout"], place["inputs"]]
    return "/".join([*parts, f"steps={place['steps']}"])


def quick() -> Iterator[Case]:
    """A chosen handful: every rule where it matters most, every dtype, and the inputs that bite.

    Compiled, a dtype or several parameters of one shape are a compilation of their own, and wait for the standard tier.
    """
    core = {"shapes": TALL_AND_BIAS, "steps": 2, "lr": 1e-2}
    yield case("quick", **core)
    yield case("quick", **core, ortho_mode="matrix")
    yield case("quick", COMPILED_LATER, **core, dtype="bfloat16")
    yield case("quick", COMPILED_LATER, shapes=SEVERAL, inputs="missing", steps=3)
    later = {"loss_aware_schedule": True, "tensor_lr": True, "weight_decay": 0.5, "steps": 12}
    yield case("quick", INTERPRETED_LATER, shapes=((31, 37),), **later)
    yield case("quick", INTERPRETED_LAST, shapes=((12, 10),), steps=MANY_STEPS)
    for kind in ("parallel", "zero-rows", "many-scales", "domain-edge", "gradient-1e30", "zero-gradient", "nan", "inf"):
        yield case("quick", inputs=kind, shapes=SMALL, weight_decay=0.1, lr=1e-2)
    yield case("quick", inputs="infinite-weight", shapes=SMALL)
    for kind, policy in product(("nan", "inf"), ("skip", "raise")):
        yield case("quick", inputs=kind, nonfinite=policy, shapes=SMALL, steps=2)
    yield case("quick", COMPILED_LATER, shapes=LONG_ROWS)  # so many elements are compiled for several threads
    yield from (case("quick", COMPILED_LAST, **choice) for choice in _quick_eager(core))
    yield from (case("quick", COMPILED_LAST, INTERPRETED_LATER, **choice) for choice in _quick_rest(core))


def _quick_eager(core: Choice) -> Iterator[Choice]:
    """More rules and shapes, each of which would be a compilation of its own."""
    yield {**core, "project": "update"}
    yield {**core, "ortho_mode": None}
    yield {**core, "adaptive_lr": False}
    yield {"shapes": LONG_ROWS, "project": "update", "adaptive_lr": False}
    yield {"shapes": SHORT_ROWS}
    yield {"shapes": ((31, 37),), "layout": "expanded"}
    yield {"shapes": SEVERAL, "ortho_mode": "matrix", "bias_correction": False, "weight_decay": 0.1, "steps": 2}
    yield {"shapes": SMALL, "ortho_mode": "matrix", "inputs": "zero-gradient"}
    plain = {"gradient_clipping": None, "momentum": 0.0, "beta2": 0.5, "eps": 1e-3, "layout": "transposed"}
    yield {**core, **plain}


def _quick_rest(core: Choice) -> Iterator[Choice]:
    """The rest of the rules and dtypes."""
    yield {**core, "project": "update", "adaptive_lr": False}
    yield {**core, "ortho_mode": "matrix", "adaptive_lr": False, "ns_steps": 5}
    yield {**core, "ortho_mode": None, "adaptive_lr": False}
    yield {**core, "dtype": "float16"}
    yield {**core, "dtype": "float64"}
    yield {**core, "dtype": "float64", "ortho_mode": "matrix"}
    yield {"dtype": "float64", "inputs": "gradient-1e200"}
    yield {"shapes": LONG_ROWS, "inputs": "gradient-1e30"}
    yield {**core, "dtype": "bfloat16", "ortho_mode": "matrix"}
    yield {"shapes": SEVERAL, "inputs": "missing", "workspace_bytes": SMALL_WORKSPACE, "steps": 2}
    yield {"shapes": SEVERAL, "second_group": SECOND_GROUP, "gradient_clipping": 0.05, "steps": 2}


def allowed(choice: Choice) -> bool:
    """Whether a layout exists for the shapes, and the format can hold the inputs."""
    shapes, layout = choice.get("shapes"), choice.get("layout", "contiguous")
    dtypes = inputs.KINDS[choice.get("inputs", "gaussian")].dtypes
    dtype = choice.get("dtype") or choice.get("formula", {}).get("dtype", dtypes[0])
    return dtype in dtypes and (shapes is None or any(inputs.fits(layout, shape) for shape in shapes))


@cache
def standard() -> tuple[Case, ...]:
    """Every pair of levels once: of all arguments on ordinary inputs, and of the rules with every hostile input.

    Formulas are paired among themselves, which takes 12 of them, each with both of its values for clipping; then the
    first five, which have every level of each, are paired with all numbers, and with many steps. Compiled it is the
    first two that are paired with all numbers: a compilation serves many of them, but each layout and each size of 1 is
    one more for every formula.
    """
    formulas, others = _formulas()
    every_level = {"formula": formulas[:5], **NUMBERS}
    compiled = pairwise({**every_level, "formula": formulas[:2]}, allowed)
    ordinary = pairwise(every_level, allowed)
    many_steps = pairwise({**every_level, "steps": (MANY_STEPS,)}, allowed, around="steps")
    hostile = pairwise(HOSTILE, allowed)
    return (
        *(_standard({"formula": formula, "shapes": WIDE}) for formula in formulas),
        *(_standard({"formula": formula, "shapes": WIDE}, INTERPRETED_LAST) for formula in others),
        *(_standard(choice, *[COMPILED_LAST] * (choice not in compiled)) for choice in ordinary),
        *(_standard(choice, INTERPRETED_LAST) for choice in compiled if choice not in ordinary),
        *(_standard(choice, INTERPRETED_LAST) for choice in many_steps),
        *(case("standard", COMPILED_LAST, **choice) for choice in hostile),
        *(case("standard", COMPILED_LAST, shapes=LONG_ROWS, dtype=dtype) for dtype in ("bfloat16", "float64")),
    )


def _formulas() -> tuple[list[Choice], list[Choice]]:
    """All pairs of what selects a formula, with one value for clipping in turn, and with the other."""
    formulas: list[Choice] = []
    others: list[Choice] = []
    for index, formula in enumerate(pairwise(FORMULAS)):
        values = CLIPPING[formula["gradient_clipping"]]
        turn = index // 2 % 2  # so that the first four have all values
        formulas.append({**formula, "gradient_clipping": values[turn]})
        others.append({**formula, "gradient_clipping": values[1 - turn]})
    return formulas, others


def _standard(choice: Choice, *late: tuple[str, str]) -> Case:
    """With the arguments of its formula."""
    return case("standard", *late, **choice["formula"], **{k: v for k, v in choice.items() if k != "formula"})


PRODUCTS: tuple[dict[str, tuple[Any, ...]], ...] = (
    {**RULES, "dtype": DTYPES, "shapes": SHAPES, "layout": LAYOUTS, "steps": (1, 2, MANY_STEPS)},
    {**HOSTILE, "inputs": tuple(inputs.KINDS)},
)


def exhaustive() -> Iterator[Case]:
    """The full products: of rules, dtypes, shapes, layouts and steps; of rules, dtypes and every kind of input."""
    for factors in PRODUCTS:
        for levels in product(*factors.values()):
            choice = dict(zip(factors, levels, strict=True))
            if allowed(choice):
                yield case("exhaustive", **choice)


class DolphinFlowSubject(OptimizerSubject):
    """DolphinFlow: its reference page and its class."""

    algorithm = "dolphinflow"
    page: Any = dolphinflow
    optimizer: Any = DolphinFlow

    def cases(self) -> Iterable[Case]:
        seen: set[str] = set()
        for one in (*quick(), *standard()):
            if one.id not in seen:
                seen.add(one.id)
                yield one
        yield from (one for one in exhaustive() if one.id not in seen)

    def drift(self, case: Case, lane: Lane) -> Stage | None:
        """What projection leaves of a gradient along the weights is rounding, and so is where a step goes.

        Where it goes further than the weights are long, the next gradient meets other weights in every draw, and there
        is nothing to compare; the steps one by one are.
        """
        settings = case.hyperparameters
        lost = settings["ortho_mode"] == "vector" and case.inputs == "parallel" and settings["lr"] > WEIGHTS
        return None if lost else super().drift(case, lane)

    def build(self, case: Case, parameters: Sequence[torch.nn.Parameter], lane: Lane) -> BatchedOptimizer:
        arguments = case.hyperparameters
        overrides = dict(arguments.pop("second_group"))
        if arguments.pop("tensor_lr"):
            arguments["lr"] = torch.tensor(arguments["lr"], device=lane.device)
        groups = [{"params": parameters[::2]}, {"params": parameters[1::2], **overrides}] if overrides else parameters
        made: BatchedOptimizer = self.optimizer(groups, **arguments, backend=lane.backend)
        return made

    def begin(self, case: Case, parameters: Sequence[Array]) -> Snapshot:
        rules = self.hyperparameters(case)
        states = tuple(self.page.init(p, rules[i % len(rules)]) for i, p in enumerate(parameters))
        shared = _to_shared([LossSchedule() for _ in rules]) if rules[0].loss_aware_schedule else {}
        return Snapshot(tuple(parameters), states, shared)

    def advance(self, case: Case, before: Snapshot, feed: Feed) -> Snapshot:
        """Clipping is over all groups at once, so it comes first; a group is then stepped without it."""
        rules = self.hyperparameters(case)
        schedules = _schedules(before, rules, feed)
        present = [i for i, g in enumerate(feed.gradients) if g is not None]
        s = clipping.clip_scale([g for g in feed.gradients if g is not None], rules[0].gradient_clipping)
        parameters, states = list(before.parameters), list(before.states)
        for group, (hp, schedule) in enumerate(zip(rules, schedules, strict=True)):
            members = [i for i in present if i % len(rules) == group]
            gradients = [s * g for i in members if (g := feed.gradients[i]) is not None]
            stepped = self.page.step(
                [parameters[i] for i in members],
                gradients,
                [states[i] for i in members],
                replace(hp, gradient_clipping=None),
                schedule.loss_lr_scale,
            )
            for i, theta, state in zip(members, *stepped, strict=True):
                parameters[i], states[i] = theta, state
        shared = _to_shared(schedules) if rules[0].loss_aware_schedule else {}
        return Snapshot(tuple(parameters), tuple(states), shared)

    def hyperparameters(self, case: Case) -> list[Any]:
        """What the reference is given, a group."""
        kind, settings = self.page.Hyperparameters, case.hyperparameters
        names = {field.name for field in fields(kind)}
        first = kind(**{name: value for name, value in settings.items() if name in names})
        if settings["tensor_lr"]:
            first = replace(first, lr=torch.tensor(first.lr).item())
        return [first, replace(first, **dict(settings["second_group"]))] if settings["second_group"] else [first]

    def stored_as(self, case: Case, name: str) -> str:  # noqa: ARG002  # momentum and second moment alike
        return "float64" if case.dtype == "float64" else "float32"

    def loss(self, case: Case, step: int) -> float | None:
        """Stalls for five steps, improves, is once not a number."""
        if not case.hyperparameters["loss_aware_schedule"]:
            return None
        return float("nan") if step == 8 else (0.5 if step % 7 == 6 else 1.0) + 0.01 * (step // 7)

    def load_shared(self, optimizer: BatchedOptimizer, shared: dict[str, float]) -> None:
        for number, group in enumerate(optimizer.param_groups):
            for name, value in shared.items():
                key, _, owner = name.partition("/")
                if owner == str(number):
                    group[key] = _from_number(key, value)

    def read_shared(self, optimizer: BatchedOptimizer) -> dict[str, float]:
        groups = [group for group in optimizer.param_groups if group["loss_aware_schedule"]]
        return _to_shared([LossSchedule(g["loss_ema"], g["stall_count"], g["loss_lr_scale"]) for g in groups])


def _schedules(before: Snapshot, rules: Sequence[dolphinflow.Hyperparameters], feed: Feed) -> list[LossSchedule]:
    """Each group's loss schedule after this step's loss."""
    if feed.loss is None:
        return [LossSchedule() for _ in rules]
    names = ("loss_ema", "stall_count", "loss_lr_scale")
    held = [LossSchedule(*(_from_number(key, before.shared[f"{key}/{i}"]) for key in names)) for i in range(len(rules))]
    return [update(schedule, feed.loss, hp.loss_ema_beta) for schedule, hp in zip(held, rules, strict=True)]


def _from_number(key: str, value: float) -> Any:
    """A value of the schedule from `_to_shared`'s numbers."""
    if key == "stall_count":
        return int(value)
    return None if math.isnan(value) else value


def _to_shared(schedules: Sequence[LossSchedule]) -> dict[str, float]:
    """As numbers: a mean that is not there yet is NaN."""
    numbers: dict[str, float] = {}
    for i, schedule in enumerate(schedules):
        mean = float("nan") if schedule.loss_ema is None else schedule.loss_ema
        numbers |= {
            f"loss_ema/{i}": mean,
            f"stall_count/{i}": schedule.stall_count,
            f"loss_lr_scale/{i}": schedule.loss_lr_scale,
        }
    return numbers


SUBJECT = DolphinFlowSubject()
