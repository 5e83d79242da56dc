"""What every rendering shows: counts, the matrix, the failures, budgets by group, the machine in words."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from trysquare_conformance.report.schema import Faults, Lane, Machine, Result, Row, Status
from trysquare_conformance.report.text import clean, count, digits, figure, joined, number, place

BAD: tuple[Status, ...] = ("wrong", "error")
# A cell of the matrix takes the status that stands furthest left.
SEVERITY: tuple[Status, ...] = ("wrong", "error", "could not tell", "right", "expected failure")
PLURAL = {"error": "errors", "expected failure": "expected failures"}
MARK = {
    "right": "✓",
    "wrong": "✗",
    "error": "!",
    "could not tell": "?",
    "not run here": "–",
    "expected failure": "×",
}
_DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Cell:
    """The cases of one algorithm, dtype and lane: the gravest status, the worst margin with it and whose that is."""

    status: str
    margin: float | None
    case: str | None
    cases: int
    bad: int


@dataclass(frozen=True)
class Line:
    """One line of the matrix: a cell for each lane, None where the lane has no such case."""

    algorithm: str
    dtype: str
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class Group:
    """The rows of one lane and algorithm, with the range of their budgets."""

    lane: str
    algorithm: str
    rows: list[Row]
    lowest: float | None
    highest: float | None
    worst: float | None


@dataclass(frozen=True)
class Fault:
    """A planted fault that was not caught."""

    name: str
    lane: str
    reason: str


def badness(row: Row) -> float:
    """The margin for sorting: what has no number is worse than any number if it is bad, better than any otherwise."""
    margin = number(row["margin"])
    if margin is None or math.isnan(margin):
        return math.inf if row["status"] in BAD else -math.inf
    return margin


def counts(result: Result) -> dict[str, int]:
    """How many rows have each status, without those that do not occur; what is right comes first."""
    found = Counter(row["status"] for row in result["results"])
    return {status: found[status] for status in sorted(found, key=lambda s: (s != "right", SEVERITY.index(s)))}


def tally(result: Result) -> str:
    """`410 right · 3 wrong · 2 errors`."""
    parts = [f"{digits(amount)} {PLURAL.get(s, s) if amount > 1 else s}" for s, amount in counts(result).items()]
    return " · ".join(parts) or "no case was run"


def dtype_order(dtype: str) -> tuple[int, str]:
    """For sorting: from the finest to the coarsest."""
    return (_DTYPES.index(dtype) if dtype in _DTYPES else len(_DTYPES), dtype)


def of_status(result: Result, *statuses: str) -> list[Row]:
    """The rows of these statuses, the worst first; ties by lane and case."""
    rows = [row for row in result["results"] if row["status"] in statuses]
    return sorted(rows, key=lambda row: (SEVERITY.index(row["status"]), -badness(row), row["lane"], row["case"]))


def failures(result: Result) -> list[Row]:
    """What makes a run wrong, the worst first."""
    return of_status(result, *BAD)


def worst(rows: Iterable[Row]) -> Row | None:
    """The row with the largest margin among those that count: an expected failure does not."""
    counted = [row for row in rows if row["status"] != "expected failure" and row["margin"] is not None]
    return max(counted, key=badness, default=None)


def matrix(result: Result) -> list[Line]:
    """Algorithm and dtype down, lanes across, in the order in which the lanes were declared."""
    rows: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in result["results"]:
        rows.setdefault((row["algorithm"], row["dtype"]), {}).setdefault(row["lane"], []).append(row)
    order = sorted(rows, key=lambda key: (key[0], dtype_order(key[1])))
    return [Line(*key, tuple(_cell(rows[key].get(lane["name"]), lane) for lane in result["lanes"])) for key in order]


def _cell(rows: list[Row] | None, lane: Lane) -> Cell | None:
    if not rows:
        return Cell("not run here", None, None, 0, 0) if lane["status"] != "ran" else None
    status = min((row["status"] for row in rows), key=SEVERITY.index)
    peak = max((row for row in rows if row["status"] == status), key=badness)
    bad = sum(row["status"] in BAD for row in rows)
    return Cell(status, None if peak["margin"] is None else badness(peak), peak["case"], len(rows), bad)


def headline(cell: Cell) -> str:
    """What a cell says first: its margin, or its status where there is none to go by."""
    return cell.status if cell.margin is None or cell.status == "could not tell" else figure(cell.margin)


def groups(result: Result) -> list[Group]:
    """The rows by lane and algorithm, in the order of the run."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in result["results"]:
        found.setdefault((row["lane"], row["algorithm"]), []).append(row)
    return [_group(lane, algorithm, rows) for (lane, algorithm), rows in found.items()]


def _group(lane: str, algorithm: str, rows: list[Row]) -> Group:
    allowed = [float(row["budget"]["allowed"]) for row in rows if row["budget"]]
    finite = [amount for amount in allowed if math.isfinite(amount)]
    peak = worst(rows)
    return Group(lane, algorithm, rows, min(finite, default=None), max(finite, default=None), peak and badness(peak))


def observed(row: Row) -> float | None:
    """The error of the worst entry, from its margin and the budget that it is a multiple of."""
    margin = number(row["element_margin"])
    return None if margin is None or row["budget"] is None else margin * float(row["budget"]["allowed"])


def difference(row: Row) -> float | None:
    """Fast minus reference in the worst entry."""
    worst = row["worst"]
    return None if worst is None else float(worst["fast"]) - float(worst["reference"])


def arithmetic(row: Row) -> str | None:
    """The worst entry: `3.20e-7 × 1.50 + 5.96e-8 = 5.40e-7 allowed; 9.07e-6 observed; margin 16.8`."""
    budget = row["budget"]
    if budget is None:
        return None
    total = f"{figure(budget['spread'])} × {figure(budget['multiple'])} + {figure(budget['floor'])}"
    seen = f"{figure(observed(row))} observed; margin {figure(row['element_margin'])}"
    return f"{total} = {figure(budget['allowed'])} allowed; {seen}"


def worst_place(row: Row) -> str | None:
    """The name of the worst entry, or None where none was compared."""
    return row["worst"] and clean(place(row["output"], row["worst"]["index"]))


def not_run(result: Result) -> list[Lane]:
    """The lanes of which nothing is known."""
    return [lane for lane in result["lanes"] if lane["status"] != "ran"]


def machine_facts(machine: Machine) -> list[tuple[str, str]]:
    """The machine as label and value, what changes arithmetic first."""
    facts = {
        "GPU": machine["gpu"] or "none",
        "Driver": machine["driver"] or "none",
        "torch": machine["torch"],
        "Triton": machine["triton"] or "not installed",
        "NumPy": machine["numpy"],
        "Python": machine["python"],
        "CPU": f"{machine['cpu']}, {count(machine['cores'], 'core')}",
        "Platform": machine["platform"],
        "trysquare": machine["trysquare"],
        "dolphinflow module": machine["dolphinflow_module"] or "not importable",
        "Flags": joined(machine["flags"]),
    }
    return [(label, clean(value)) for label, value in facts.items()]


def machine_line(machine: Machine) -> str:
    """The machine in one line."""
    parts = [f"torch {machine['torch']}", f"Python {machine['python']}", machine["gpu"] or machine["cpu"]]
    return clean(" · ".join([*parts, f"trysquare {machine['trysquare']}"]))


def fault_list(entries: list[object]) -> list[Fault]:
    """Planted faults from names or mappings."""
    return [_fault(entry) for entry in entries]


def _fault(entry: object) -> Fault:
    if not isinstance(entry, dict):
        return Fault(clean(entry), "", "")
    name = entry.get("name") or entry.get("fault") or "unnamed"
    return Fault(clean(name), clean(entry.get("lane") or ""), clean(entry.get("reason") or ""))


def fault_sentence(faults: Faults) -> str:
    """`41 of 44 planted faults caught, 2 indistinguishable at this precision, 1 missed`."""
    parts = [f"{faults['caught']} of {count(faults['planted'], 'planted fault')} caught"]
    if faults["indistinguishable"]:
        parts.append(f"{len(faults['indistinguishable'])} indistinguishable at this precision")
    return ", ".join([*parts, f"{len(faults['missed'])} missed" if faults["missed"] else "none missed"])
