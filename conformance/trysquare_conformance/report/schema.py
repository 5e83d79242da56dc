"""The versioned JSON of a verification: its types, how it is written, and how a file is checked when it is read.

The JSON is the truth and every other report renders it. A number that JSON cannot write is "nan", "inf" or "-inf".
Keys that this version does not know are kept and ignored, so that an addition need not be a new schema.
"""

import json
import math
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, Union, cast, get_args, get_origin, get_type_hints

SCHEMA = 1
SHOWN_PROBLEMS = 10

Number = float | Literal["nan", "inf", "-inf"]
Verdict = Literal["right", "wrong", "could not tell", "not run here"]
Status = Literal["right", "wrong", "error", "could not tell", "expected failure"]


Problem = tuple[str, str]  # where, what
Checker = Callable[[Any], list[Problem]]


class Machine(TypedDict):
    """Where it ran. `flags` are the switches that change arithmetic, by their name in torch or in the environment."""

    python: str
    platform: str
    cpu: str
    cores: int
    torch: str
    numpy: str
    triton: str | None
    gpu: str | None
    driver: str | None
    flags: dict[str, Any]
    trysquare: str
    dolphinflow_module: str | None


class Lane(TypedDict):
    """One implementation on one device; `witness` says how its kernel was seen to run, `reason` why it did not."""

    name: str
    device: str
    backend: str
    status: Literal["ran", "not run here"]
    reason: str | None
    witness: str | None
    seconds: Number
    cases: int


class Worst(TypedDict):
    """The entry that is worst in units of its own budget. `baseline` is eager in the same dtype."""

    index: list[int]
    fast: Number
    reference: Number
    baseline: Number | None


class Budget(TypedDict):
    """What the worst entry is held against: allowed = spread x multiple + floor."""

    draws: int
    unit_roundoff: Number
    spread: Number
    multiple: Number
    floor: Number
    allowed: Number


class Row(TypedDict):
    """One case in one lane. `margin` is observed / allowed, the larger of the norm-wise and the element-wise one."""

    case: str
    algorithm: str
    lane: str
    dtype: str
    status: Status
    margin: Number | None
    norm_margin: Number | None
    element_margin: Number | None
    drift_margin: Number | None
    yardstick: Number | None
    stage: str | None
    output: str | None
    worst: Worst | None
    budget: Budget | None
    error: str | None
    seconds: Number
    reproduce: str


class Faults(TypedDict):
    """Planted faults: how many the suite caught. Entries are a name, or a mapping that also gives lane and reason."""

    caught: int
    planted: int
    indistinguishable: list[Any]
    missed: list[Any]


class Kernel(TypedDict):
    """One compilation of a kernel ahead of time, of a main configuration, for one kind of GPU.

    `registers`, `local` and `stack` are of a thread (the last two in bytes), `shared` is bytes of a program, `spills`
    counts registers that the compiler could not keep. "fits" says that there is nothing in local memory.
    """

    algorithm: str
    configuration: str
    kernel: str
    constants: str
    target: str
    status: Literal["fits", "spills", "error"]
    registers: int | None
    shared: int | None
    local: int | None
    stack: int | None
    spills: int | None
    error: str | None


class Result(TypedDict):
    """One run of `trysquare verify`."""

    schema: int
    verdict: Verdict
    sentence: str
    tier: str
    started: str
    seconds: Number
    command: str
    machine: Machine
    lanes: list[Lane]
    results: list[Row]
    faults: NotRequired[Faults | None]
    kernels: NotRequired[list[Kernel] | None]


class KernelReport(TypedDict):
    """One run of `trysquare kernels`."""

    schema: int
    started: str
    seconds: Number
    command: str
    machine: Machine
    kernels: list[Kernel]


class SchemaError(ValueError):
    """A file that is no result of this schema. The message names the file, the place and what was expected."""


def load(path: Path) -> Result:
    """Read and check a JSON report.

    Raises SchemaError if the file is not JSON, is of another schema or lacks something; OSError if it cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SchemaError(f"{path}: not a JSON report of trysquare ({error})") from error
    return validate(found, str(path))


def validate(found: Any, source: str = "result") -> Result:
    """Check a result against the schema; `source` stands at the head of the error."""
    if not isinstance(found, Mapping) or "schema" not in found:
        raise SchemaError(f"{source}: not a report of trysquare: it has no 'schema'")
    version = found["schema"]
    if type(version) is not int or version < 1:
        raise SchemaError(f"{source}: 'schema' is {version!r}, expected a whole number from 1 to {SCHEMA}")
    if version > SCHEMA:
        raise SchemaError(
            f"{source}: written by a newer trysquare (schema {version}, this one reads {SCHEMA}): upgrade trysquare"
        )
    problems = _check_result(found)
    if problems:
        raise SchemaError(_list_problems(source, [f"{path.lstrip('.')}: {words}" for path, words in problems]))
    return cast(Result, found)


def _list_problems(source: str, problems: list[str]) -> str:
    shown = problems[:SHOWN_PROBLEMS]
    left = len(problems) - len(shown)
    return "\n  ".join([f"{source}: does not fit schema {SCHEMA}:", *shown, *([f"and {left} more"] if left else [])])


def dumps(result: Mapping[str, Any]) -> str:
    """The result as JSON text: every entry of a list on a line of its own, so that two files can be diffed."""
    lines = ",\n".join(f"{json.dumps(key)}: {_value(value)}" for key, value in result.items())
    return "{\n" + lines + "\n}\n"


def _value(value: Any) -> str:
    if not isinstance(value, list) or not value:
        return json.dumps(value, allow_nan=False)
    return "[\n" + ",\n".join(json.dumps(entry, allow_nan=False) for entry in value) + "\n]"


def plain(value: Any) -> Any:
    """The value in JSON's own types: tuples and NumPy scalars converted, NaN and infinities spelled out."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if hasattr(value, "item"):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def _checker(hint: Any) -> Checker:
    """The check of a type. Paths are put together only where there is a problem: most values have none."""
    origin = get_origin(hint)
    if isinstance(hint, type) and issubclass(hint, dict) and origin is None:
        return _record_checker(hint)
    if origin is list:
        return _list_checker(_checker(get_args(hint)[0]))
    if origin in (Union, types.UnionType):
        return _union_checker(get_args(hint))
    if origin is Literal:
        return _kind_checker(get_args(hint).__contains__, hint)
    return _kind_checker(_KINDS[origin or hint], hint)


def _kind_checker(fits: Callable[[Any], bool], hint: Any) -> Checker:
    return lambda value: [] if fits(value) else [("", f"expected {_name(hint)}, found {_short(value)}")]


def _record_checker(record: type) -> Checker:
    required = cast(frozenset[str], getattr(record, "__required_keys__", frozenset()))
    fields = [(key, _checker(_unwrapped(hint)), key in required) for key, hint in get_type_hints(record).items()]

    def check(value: Any) -> list[Problem]:
        if not isinstance(value, Mapping):
            return [("", f"expected an object, found {_short(value)}")]
        found: list[Problem] = []
        for key, checked, needed in fields:
            if key in value:
                found.extend((f".{key}{path}", words) for path, words in checked(value[key]))
            elif needed:
                found.append((f".{key}", "missing"))
        return found

    return check


def _list_checker(entry: Checker) -> Checker:
    def check(value: Any) -> list[Problem]:
        if not isinstance(value, list):
            return [("", f"expected a list, found {_short(value)}")]
        return [(f"[{index}]{path}", words) for index, item in enumerate(value) for path, words in entry(item)]

    return check


def _union_checker(choices: tuple[Any, ...]) -> Checker:
    """One choice must fit; where none does, the problems inside the one of the right kind say more than the union."""
    checkers = [_checker(choice) for choice in choices]
    names = " or ".join(map(_name, choices))

    def check(value: Any) -> list[Problem]:
        found = []
        for checked in checkers:
            problems = checked(value)
            if not problems:
                return []
            found.append(problems)
        inner = [problems for problems in found if problems[0][0]]
        return inner[0] if inner else [("", f"expected {names}, found {_short(value)}")]

    return check


def _unwrapped(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is NotRequired else hint


def _name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(json.dumps(choice) for choice in get_args(hint))
    words = {float: "a number", int: "a whole number", str: "a string", types.NoneType: "null"}
    return words.get(hint, "an object")


def _short(value: Any) -> str:
    text = json.dumps(plain(value), default=repr)
    return text if len(text) <= 40 else text[:39] + "…"


_KINDS: dict[Any, Callable[[Any], bool]] = {
    Any: lambda _: True,
    types.NoneType: lambda value: value is None,
    str: lambda value: isinstance(value, str),
    int: lambda value: isinstance(value, int) and not isinstance(value, bool),
    float: lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    dict: lambda value: isinstance(value, Mapping),
}
_check_result = _checker(Result)
