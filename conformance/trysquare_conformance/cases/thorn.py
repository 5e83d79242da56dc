"""Every configuration of THORN that is checked; `thorn_steps` says how each takes a step."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

from trysquare_conformance import inputs
from trysquare_conformance.case import SHORT_DTYPES, Case, shape_name
from trysquare_conformance.pairwise import Choice, pairwise
from trysquare_conformance.thorn_steps import ALGORITHMIC, KINDS, SCHEDULES, SECOND_GROUPS, ThornSteps

Shapes = tuple[tuple[int, ...], ...]

DEFAULTS: dict[str, Any] = {
    **ALGORITHMIC,
    "coefficients": "",
    "kind": "ortho",
    "matmul_dtype": "float32",
    "none_grad": False,
    "exclude": (),
    "nonfinite": "propagate",
    "workspace_bytes": None,
    "tensor_lr": False,
    "schedule": "constant",
    "second_group": "",
    "release": 0,
    "view": False,
}
"""What a case sets where it says nothing. `release` is the update rate of gradient release, 0 without; `view` looks at
the averaged weights too; `schedule` is that of the learning rate."""

PLACE: dict[str, Any] = {
    "shapes": ((24, 40), (40, 24)),
    "layout": "contiguous",
    "dtype": "float32",
    "inputs": "gaussian",
    "steps": 1,
}

FAMILIES: dict[str, tuple[Shapes, Shapes, Shapes]] = {
    "pair": (((40, 24), (24,)), ((24, 40), (40, 24)), ((3, 8, 5), (2, 5, 8))),
    "wide": (((12, 20),), ((12, 20),), ((2, 6, 10),)),
    "tall": (((20, 12),), ((20, 12),), ((2, 10, 6),)),
    "square": (((16, 16),), ((16, 16),), ((2, 6, 6),)),
    "prime": (((31,),), ((31, 37),), ((3, 5, 7),)),
    "long": (((12, 48), (48, 12)), ((12, 48), (48, 12)), ((2, 4, 16), (2, 16, 4))),
    "thin": (((1, 40), (1,)), ((1, 40), (40, 1)), ((2, 1, 9), (2, 9, 1))),
    "small": (((7,), ()), ((12, 10), (12, 10)), ((2, 2, 4, 3),)),
    "filters": (((8, 4, 3),), ((8, 4, 3),), ((8, 4, 3),)),
    "images": (((8, 4, 3, 3),), ((8, 4, 3, 3), (24, 2, 2, 2)), ((2, 3, 4, 3),)),
    "volumes": (((4, 3, 2, 2, 2),), ((4, 3, 2, 2, 2),), ((2, 2, 2, 4, 3),)),
    "empty": (((0, 5), (5,)), ((0, 5), (5, 0), (5, 3)), ((0, 4, 3), (2, 4, 3))),
    "several": (
        ((12, 10), (7,), (12, 10), (7,), (0, 3), (9, 9)),
        ((12, 10), (6, 4, 3, 3), (12, 10), (10, 12), (12, 10), (0, 3), (9, 9)),
        ((2, 6, 5), (3, 4, 4), (2, 6, 5), (2, 5, 6)),
    ),
}
"""Shapes for groups of any parameters, of matrices, and of batches."""

SMALL_WORKSPACE = 1 << 10
MANY_STEPS = 50
DTYPES, LAYOUTS = tuple(SHORT_DTYPES), tuple(inputs.LAYOUTS)
POLICIES = ("propagate", "skip", "raise")
ORDINARY = ("gaussian", "parallel", "rank-one", "sparse", "missing")
BEYOND = ("gradient-1e200",)  # its norm is infinite even in float64, where the specification says nothing
COMPILED_LAST = ("compiled-*", "exhaustive")
COMPILED_LATER = ("compiled-*", "standard")
INTERPRETED_LATER, INTERPRETED_LAST = ("triton-interpreter", "standard"), ("triton-interpreter", "exhaustive")

FORMULAS: dict[str, tuple[Any, ...]] = {
    "kind": tuple(KINDS),
    "dtype": DTYPES,
    "betas": ((0.95, 0.95), (0.9, 0.0), (0.0, 0.99), (0.0, 0.0)),
    "rectify": (False, True),
    "target_rms": (0.2, 0.0),
    "iters": (5, 1, 8, 12),
    "matmul_dtype": ("float32", None, "bfloat16", "float16"),
    "release": (0, 1, 2, 16),
    "view": (True, False),
}
"""What selects another formula: combined in pairs among themselves, for compiled lanes too."""

NUMBERS: dict[str, tuple[Any, ...]] = {
    "family": tuple(FAMILIES),
    "layout": LAYOUTS,
    "lr": (1e-3, 1e-6, 0.5),
    "weight_decay": (0.1, 0.0, 1.0),
    "eps": (1e-8, 1e-3),
    "lower_bound": (1e-3, 0.05),
    "safety_factor": (0.02, 0.0),
    "cushion": (0.02, 0.3),
    "coefficients": ("", "muon"),
    "tensor_lr": (False, True),
    "schedule": tuple(SCHEDULES),
    "none_grad": (False, True),
    "exclude": ((), ("p0",)),
    "nonfinite": POLICIES,
    "workspace_bytes": (None, SMALL_WORKSPACE),
    "second_group": tuple(SECOND_GROUPS),
    "inputs": ORDINARY,
    "steps": (1, 2),
}
HOSTILE: dict[str, tuple[Any, ...]] = {
    "kind": tuple(KINDS),
    "dtype": DTYPES,
    "betas": FORMULAS["betas"],
    "family": ("small", "images"),
    "weight_decay": (0.1, 1.0),
    "target_rms": (0.2, 0.0),
    "eps": (1e-8, 1e-3),
    "lr": (1e-3, 1e6, 1e-12),
    "nonfinite": POLICIES,
    "matmul_dtype": ("float32", "bfloat16"),
    "inputs": tuple(kind for kind in inputs.KINDS if kind not in (*ORDINARY, *BEYOND)),
    "release": (0, 2),
    "steps": (2,),
}


def case(tier: str, *late: tuple[str, str], **choice: Any) -> Case:
    """A case from what it does not take from `DEFAULTS` and `PLACE`; a `family` stands for shapes that fit the kind."""
    family = choice.pop("family", None)
    if family is not None:
        choice["shapes"] = FAMILIES[family][{"ortho": 1, "batched": 2}.get(choice.get("kind", "ortho"), 0)]
        if choice.get("second_group") == "ortho" and choice.get("kind") in {"free", "adam", "model"}:
            choice["shapes"] = FAMILIES[family][1]
    place = {**PLACE, **{name: choice.pop(name) for name in list(choice) if name in PLACE}}
    settings = {**DEFAULTS, **choice}
    return Case("thorn", _name(settings, place), tuple(settings.items()), tier=tier, late=late, **place)


def _name(settings: Choice, place: Choice) -> str:
    """`thorn/ortho/beta1=0.95/beta2=0/decay=0.1/target_rms=0/fp32/24x40+40x24/contiguous/gaussian/steps=1`."""
    beta1, beta2 = settings["betas"]
    parts = ["thorn", settings["kind"], f"beta1={beta1:g}", f"beta2={beta2:g}", f"decay={settings['weight_decay']:g}"]
    named = {"kind", "betas", "weight_decay"}
    others = {k: v for k, v in settings.items() if k not in named and v != DEFAULTS[k]}
    parts += [f"{name}={_word(value)}" for name, value in others.items()]
    parts += [SHORT_DTYPES[place["dtype"]], shape_name(place["shapes"]), place["layout"], place["inputs"]]
    return "/".join([*parts, f"steps={place['steps']}"])


def _word(value: Any) -> str:
    return f"{value:g}" if type(value) is float else "+".join(value) if isinstance(value, tuple) else str(value)


def quick() -> Iterator[Case]:
    """A chosen handful: every rule where it matters most, every dtype, and the inputs that bite."""
    ortho = {"kind": "ortho", "family": "tall", "steps": 2, "lr": 1e-2}
    free = {"kind": "free", "family": "pair", "steps": 3, "lr": 1e-2, "view": True}
    yield case("quick", **ortho)
    yield case("quick", COMPILED_LATER, **{**ortho, "family": "wide", "dtype": "bfloat16", "matmul_dtype": None})
    yield case("quick", **{**ortho, "family": "square", "weight_decay": 0.5})
    yield case("quick", **free, schedule="falling")
    yield case("quick", COMPILED_LATER, **{**free, "kind": "adam"})
    for kind in ("rank-one", "zero-gradient", "zero-rows", "both-tiny", "nan"):
        yield case("quick", **{**ortho, "inputs": kind, "steps": 1})
        yield case("quick", **{**free, "inputs": kind, "eps": 1e-3, "weight_decay": 1.0, "steps": 2})
    yield case("quick", COMPILED_LATER, **{**free, "betas": (0.0, 0.9), "schedule": "falling"})
    yield case("quick", COMPILED_LATER, **{**free, "dtype": "bfloat16"})
    for kind in ("ortho", "free", "adam"):
        late = [COMPILED_LATER] * (kind != "ortho")
        yield case("quick", *late, **{**(ortho if kind == "ortho" else free), "kind": kind, "release": 2, "steps": 5})
    for kind in ("free", "adam"):
        yield case("quick", COMPILED_LATER, **{**free, "kind": kind, "release": 2, "inputs": "nan", "steps": 2})
    for choice in _rules(ortho, free):
        late = [COMPILED_LAST] * _recompiles(choice) + [INTERPRETED_LATER] * _takes_long(choice)
        late += [COMPILED_LATER] * _combines(choice)
        yield case("quick", *late, **choice)


def _recompiles(choice: Choice) -> bool:
    """Whether a case would be a compilation of its own; other settings are numbers that a compiled update is given."""
    static = {"matmul_dtype", "iters", "lower_bound", "safety_factor", "coefficients", "layout", "workspace_bytes"}
    return (
        not static.isdisjoint(choice) or choice.get("dtype", "float32") != "float32" or 0.0 in choice.get("betas", ())
    )


def _combines(choice: Choice) -> bool:
    """Whether a case is compiled for a combination of rules that are quick by themselves; the standard tier has it."""
    groups = choice["kind"] in {"adam", "batched", "model"} or "second_group" in choice
    return groups or "release" in choice or choice.get("family") in {"several", "small"}


def _takes_long(choice: Choice) -> bool:
    """Whether Triton's interpreter takes seconds: for every launch of every bucket it takes milliseconds."""
    if choice["kind"] == "free" and choice.get("inputs") == "missing":
        return False  # the only one whose members are at different steps
    buckets = choice.get("family") == "several" or choice["kind"] == "model"
    products = choice["kind"] == "ortho" and choice.get("family") == "pair" and choice["steps"] > 1
    return buckets or products or choice["steps"] > 6


def _rules(ortho: Choice, free: Choice) -> Iterator[Choice]:
    """The rest of the rules and dtypes."""
    yield from _quick_matrices(ortho)
    for changes in (
        {"dtype": "float16", "betas": (0.0, 0.9)},
        {"dtype": "float64"},
        {"betas": (0.9, 0.99), "rectify": True, "steps": 7},
        {"schedule": "from-zero", "weight_decay": 1.0},
        {"betas": (0.9, 0.0), "eps": 1e-3},
        {"inputs": "missing", "family": "several"},
        {"family": "prime", "steps": 20},
        {"inputs": "inf", "nonfinite": "skip"},
        {"inputs": "inf", "nonfinite": "raise"},
    ):
        yield {**free, **changes}
    for rules in (
        {"dtype": "bfloat16", "steps": 2},
        {"dtype": "float64", "betas": (0.0, 0.0)},
        {"rectify": True, "steps": 7, "view": False},
    ):
        yield {**free, "kind": "adam", **rules}
    for kind, (rate, steps) in product(("ortho", "free", "adam"), ((1, 2), (16, 17))):
        family = "tall" if kind == "ortho" else "small"
        yield {"kind": kind, "family": family, "lr": 1e-2, "release": rate, "steps": steps, "view": kind == "free"}
    yield {"kind": "ortho", "family": "tall", "release": 2, "rectify": True, "betas": (0.95, 0.99), "steps": 10}
    yield {"kind": "free", "family": "small", "release": 4, "rectify": True, "betas": (0.9, 0.99), "steps": 8}
    yield {"kind": "free", "family": "small", "rectify": True, "betas": (0.9, 0.99), "steps": 2}
    yield {"kind": "free", "family": "small", "release": 2, "dtype": "bfloat16", "steps": 4, "view": True}
    model = {"kind": "model", "lr": 1e-2, "steps": 2, "shapes": ((12, 10), (7,), (6, 4, 3, 3), (12, 10), ())}
    yield {**model, "view": True}
    yield {**model, "exclude": ("p0",), "none_grad": True, "tensor_lr": True}
    yield {**ortho, "family": "several", "second_group": "free", "view": True}
    yield {**free, "family": "several", "second_group": "adam"}


def _quick_matrices(ortho: Choice) -> Iterator[Choice]:
    yield {**ortho, "family": "pair", "betas": (0.95, 0.0)}
    yield {**ortho, "family": "images"}
    yield {**ortho, "family": "images", "target_rms": 0.0, "layout": "channels_last"}
    yield {**ortho, "family": "pair", "target_rms": 0.0, "steps": 1}
    yield {**ortho, "layout": "transposed", "steps": 1}
    yield {**ortho, "kind": "batched", "family": "pair"}
    yield {**ortho, "kind": "batched", "family": "tall", "target_rms": 0.0, "betas": (0.9, 0.0)}
    yield {**ortho, "family": "wide", "dtype": "float64"}
    yield {**ortho, "dtype": "float16", "matmul_dtype": "bfloat16"}
    yield {**ortho, "dtype": "float16", "lr": 1e5, "steps": 1}
    yield {**ortho, "family": "prime", "matmul_dtype": None, "betas": (0.9, 0.0), "steps": 1}
    yield {**ortho, "family": "square", "iters": 8, "steps": 1}
    yield {**ortho, "family": "wide", "iters": 12, "steps": 1}
    yield {**ortho, "iters": 2, "lower_bound": 0.05, "safety_factor": 0.1, "cushion": 0.3}
    yield {**ortho, "family": "square", "coefficients": "muon", "safety_factor": 0.0, "weight_decay": 0.0, "steps": 1}
    yield {**ortho, "eps": 1e-2}
    yield {**ortho, "rectify": True, "betas": (0.95, 0.99), "steps": 6}
    yield {**ortho, "steps": 12, "lr": 1e-3}
    yield {**ortho, "family": "several", "inputs": "missing", "workspace_bytes": SMALL_WORKSPACE}
    yield {**ortho, "none_grad": True, "schedule": "falling", "tensor_lr": True}
    for kind in ("condition-1e12", "gradient-1e30", "negative-zero", "sparse"):
        yield {**ortho, "inputs": kind, "steps": 1}
    yield {**ortho, "family": "pair", "inputs": "gradient-1e30", "steps": 1}  # products of what is not divided yet
    yield {**ortho, "inputs": "subnormal", "dtype": "float64", "matmul_dtype": None, "betas": (0.9, 0.0), "steps": 1}
    for policy in ("skip", "raise"):
        yield {**ortho, "family": "small", "inputs": "inf", "nonfinite": policy}


def allowed(choice: Choice) -> bool:
    """Whether the format can hold the inputs, names are there to exclude, and a policy has a norm of all gradients.

    Three more are left out, in which nothing but rounding decides whether a weight decays: see below.
    """
    kind = inputs.KINDS[choice.get("inputs", "gaussian")]
    named = not choice.get("exclude") or choice.get("kind", "model") == "model"
    judged = not choice.get("release") or choice.get("nonfinite", "propagate") == "propagate"
    held = choice.get("dtype", kind.dtypes[0]) in kind.dtypes
    return held and named and judged and not (_underflows(choice) or _cancels(choice) or _leaps(choice))


def _underflows(choice: Choice) -> bool:
    """X is zero or nearly so: far below eps as a row norm's product, float64's subnormals in a shorter format."""
    orthogonalizes, subnormal = choice.get("kind") in {"ortho", "batched", "model"}, choice.get("inputs") == "subnormal"
    normalizes = choice.get("betas", (0, 0))[1] > 0
    below = choice.get("inputs") in {"gradient-1e-30", "both-tiny"} and choice.get("eps", 1e-8) > 1e-8
    shorter = choice.get("dtype") == "float64" and choice.get("matmul_dtype") is not None
    return orthogonalizes and ((normalizes and (below or subnormal)) or (shorter and subnormal))


def _cancels(choice: Choice) -> bool:
    """Without second moment every update of a window is a sign, and their sum is zero or nearly so."""
    signs = choice.get("kind") in {"free", "adam", "model"} and choice.get("betas", (0, 0.9))[1] == 0
    return signs and choice.get("release", 0) > 1


def _leaps(choice: Choice) -> bool:
    """In half precision many signs of X are uncertain; what decays with them must be small beside the error of X.

    Sixteen draws miss some of the entries whose sign can flip, and an answer on the other side must not be far away.
    """
    half = choice.get("kind") in {"ortho", "batched", "model"} and choice.get("matmul_dtype", "float32") != "float32"
    large = choice.get("inputs") in {"weights-1e30", "many-scales"} or choice.get("lr", 0.0) > 1
    return half and (large or choice.get("weight_decay", 0.0) > 0.1)


@cache
def standard() -> tuple[Case, ...]:
    """Every pair of levels once: of formulas, of all arguments on ordinary inputs, and with every hostile input."""
    formulas = pairwise(FORMULAS, allowed)
    everything = pairwise({**FORMULAS, **NUMBERS}, allowed)
    hostile = pairwise(HOSTILE, allowed)
    return (
        large("standard", (512, 640)),
        *(case("standard", *_by_kind(choice), **choice, family="pair", steps=2) for choice in formulas),
        *(case("standard", COMPILED_LAST, INTERPRETED_LAST, **choice) for choice in everything),
        *(case("standard", COMPILED_LAST, *_by_kind(choice), **choice) for choice in hostile),
        *(case("standard", COMPILED_LAST, INTERPRETED_LAST, **choice) for choice in _long(formulas)),
    )


def large(tier: str, shape: tuple[int, int]) -> Case:
    """A matrix with as many rows as GPUs have kernels of their own for; without decay, which a sign decides on.

    Of a million entries some are so near zero that a step decays them and no draw does.
    """
    plain = {"kind": "ortho", "weight_decay": 0.0, "matmul_dtype": "bfloat16", "steps": 1}
    found = case(tier, ("eager-*", "exhaustive"), **plain, shapes=(shape,))
    return replace(found, lanes=("eager-*", "triton-cuda"))


def _by_kind(choice: Choice) -> list[tuple[str, str]]:
    """Which cases Triton's interpreter leaves out.

    It is given half of those without products, and of those with products the hostile inputs in float32 that are
    stepped in one piece.
    """
    if choice["kind"] in {"free", "adam"}:
        return [INTERPRETED_LAST] * bool(choice["rectify"] if "rectify" in choice else choice["release"])
    hostile = "inputs" in choice and choice["dtype"] == "float32" and not choice["release"]
    return [] if hostile else [INTERPRETED_LAST]


def _long(formulas: Sequence[Choice]) -> Iterator[Choice]:
    """Every formula freely over many steps."""
    return ({**choice, "family": "small", "steps": MANY_STEPS} for choice in formulas if choice["release"] < 2)


PRODUCTS: tuple[dict[str, tuple[Any, ...]], ...] = (
    {**{name: FORMULAS[name] for name in FORMULAS if name != "view"}, "family": tuple(FAMILIES), "steps": (1, 2)},
    {
        **{name: FORMULAS[name] for name in ("kind", "dtype", "betas", "rectify", "target_rms")},
        "weight_decay": NUMBERS["weight_decay"],
        "layout": LAYOUTS,
        "schedule": tuple(SCHEDULES),
        "steps": (2,),
    },
    {**HOSTILE, "inputs": tuple(kind for kind in inputs.KINDS if kind not in BEYOND)},
)


def exhaustive() -> Iterator[Case]:
    """The full products: of formulas and shapes; of layouts and schedules; of every kind of input. And large ones."""
    for factors in PRODUCTS:
        for levels in product(*factors.values()):
            choice = dict(zip(factors, levels, strict=True))
            if allowed(choice):
                yield case("exhaustive", **{"family": "pair", **choice})
    yield from (large("exhaustive", shape) for shape in ((1920, 640), (1536, 1792)))


class ThornSubject(ThornSteps):
    """THORN: its reference page and its class."""

    def cases(self) -> Iterable[Case]:
        seen: set[str] = set()
        for one in (*quick(), *standard()):
            if one.id not in seen:
                seen.add(one.id)
                yield one
        yield from (one for one in exhaustive() if one.id not in seen)


SUBJECT = ThornSubject()
