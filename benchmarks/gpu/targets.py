"""What is to be reached on a GPU, as data, and whether a run reached it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.contenders import FUSED
from benchmarks.cpu import STABLEMAX, Bar
from benchmarks.gpu import matrices, steps
from benchmarks.gpu.losses import COMPILED

NOT_MEASURED = "not measured"
IMPORTED = "import trysquare"
QUANTITIES = {
    "median_ms": "",
    "of_bandwidth": ", share of copy bandwidth",
    "state_bytes": ", state",
    "scratch_bytes": ", peak memory",
    "step_over_state": ", state and scratch over state",
}


@dataclass(frozen=True)
class Target(Bar):
    """A bar of a work: a ratio of times, or of another quantity; with no `faster`, the quantity itself."""

    work: str = ""
    quantity: str = "median_ms"

    @property
    def title(self) -> str:
        unit = ", ms" if self.quantity == "median_ms" and not self.faster else QUANTITIES[self.quantity]
        over = f" / {self.faster}" if self.faster else ""
        place = {"thorn-gpt2": "GPT-2 124M: ", "thorn-qwen3": "Qwen3-1.7B: "}.get(self.work, "")
        return f"{place}{self.slower}{over}{unit}"


TARGETS = (
    Target(steps.OURS, FUSED, at_most=True, value=1.15, work="dolphinflow"),
    Target(steps.OURS, "", at_most=False, value=0.85, work="dolphinflow", quantity="of_bandwidth"),
    Target(steps.OURS_8BIT, steps.BITSANDBYTES, at_most=True, value=1.0, work="eightbit"),
    Target(steps.OURS_8BIT, steps.TORCHAO, at_most=True, value=1.0, work="eightbit"),
    Target(steps.OURS_8BIT, steps.OURS, at_most=True, value=0.255, work="eightbit", quantity="state_bytes"),
    Target(steps.OURS_8BIT, "", at_most=True, value=1.02, work="eightbit", quantity="step_over_state"),
    Target(matrices.OURS, matrices.MUON, at_most=True, value=0.25, work="thorn-gpt2"),
    Target(matrices.OURS, matrices.MUON, at_most=True, value=0.45, work="thorn-qwen3"),
    Target(matrices.OURS, matrices.GRAM, at_most=True, value=1.0, work="thorn-qwen3"),
    Target(matrices.OURS, "", at_most=True, value=75.0, work="thorn-qwen3"),
    Target(matrices.TRANSPOSED, matrices.OUR_TRANSPOSED, at_most=False, value=1.3, work="products"),
    Target(matrices.SQUARED, matrices.OUR_SQUARED, at_most=False, value=1.3, work="products"),
    Target(STABLEMAX, COMPILED, at_most=True, value=1.1, work="losses"),
    Target(STABLEMAX, COMPILED, at_most=True, value=1.0, work="losses", quantity="scratch_bytes"),
    Target(IMPORTED, "", at_most=True, value=50.0, work="imports"),
)


def verdicts(works: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One for each target, measured or not."""
    rows = {(work["work"], row["name"]): row for work in works for row in work["rows"]}
    return [verdict(target, rows) for target in TARGETS]


def verdict(target: Target, rows: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    said = {"work": target.work, "title": target.title, "bar": target.wanted}
    wanted = [name for name in (target.slower, target.faster) if name]
    found = [rows.get((target.work, name), {"missing": NOT_MEASURED}) for name in wanted]
    missing = [row["missing"] for row in found if "missing" in row]
    value = None if missing else _value(target, *found)
    if value is None:
        return {**said, "measured": None, "met": None, "why": missing[0] if missing else NOT_MEASURED}
    return {**said, "measured": value, "met": target.met(value), "why": None}


def _value(target: Target, row: dict[str, Any], other: dict[str, Any] | None = None) -> float | None:
    """Times are compared within rounds."""
    if other is not None and target.quantity == "median_ms":
        return float(row["over"][other["name"]])
    mine, its = row[target.quantity], 1 if other is None else other[target.quantity]
    return mine / its if mine is not None and its else None


def in_words(verdict: dict[str, Any]) -> str:
    """Met, NOT met or not measured."""
    if verdict["met"] is None:
        return NOT_MEASURED if verdict["why"] == NOT_MEASURED else f"{NOT_MEASURED} ({verdict['why']})"
    return "met" if verdict["met"] else "NOT met"
