"""Runs a case in a lane: every stage against its budget, the drift, the yardstick, and who computed it."""

import math
import pickle
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from trysquare_conformance.budget import DOUBTFUL, DRAWS, Budget, Margin, draws_of_second_look, judge, measure
from trysquare_conformance.case import Array, Case, Outputs, Stage, Subject
from trysquare_conformance.inputs import seed
from trysquare_conformance.lanes import Lane
from trysquare_conformance.noise import Arithmetic
from trysquare_conformance.report.schema import Row
from trysquare_conformance.witness import Witness


class BudgetStore:
    """Budgets of a run, on disk: the reference's spread depends on the case and not on the lane, so one lane measures.

    The folder lives as long as the run: a budget never outlives the code that made it. A process that has filled its
    share of it keeps nothing more: the exhaustive tier would fill a disk.
    """

    def __init__(self, folder: Path, share: int = 1 << 30) -> None:
        self.folder, self.left = folder, share

    def get(self, case: Case, stage: Stage) -> dict[str, Budget]:
        """The budget of each output of a stage, measured now if no lane has yet."""
        return self._measured(case, stage, seed(case.id, stage.label, stage.arithmetic.name), DRAWS)

    def again(self, case: Case, stage: Stage, entries: int) -> dict[str, Budget]:
        """The same for a second look, at outputs with so many entries together."""
        key = seed("again", case.id, stage.label, stage.arithmetic.name)
        return self._measured(case, stage, key, draws_of_second_look(entries))

    def _measured(self, case: Case, stage: Stage, key: int, draws: int) -> dict[str, Budget]:
        file = self.folder / f"{key:08x}-{seed(stage.label, case.id):08x}.budget"
        if file.exists():
            loaded: dict[str, Budget] = pickle.loads(file.read_bytes())  # noqa: S301  # this run wrote it
            return loaded
        budgets = measure(stage.reference, stage.arithmetic, stage.stored, seed=key, draws=draws)
        self._keep(file, pickle.dumps(budgets))
        return budgets

    def _keep(self, file: Path, content: bytes) -> None:
        """Whole or not at all: another process may be looking."""
        self.left -= len(content)
        if self.left > 0:
            unfinished = file.with_suffix(f".{time.monotonic_ns()}")
            unfinished.write_bytes(content)
            unfinished.replace(file)


@dataclass(frozen=True)
class Finding:
    """The worst output of one stage."""

    stage: str
    output: str
    margin: Margin
    budget: Budget
    observed: Array
    baseline: Array | None
    arithmetic: Arithmetic

    @property
    def size(self) -> float:
        return self.margin.worst

    @property
    def yardstick(self) -> float | None:
        """Error of this lane over the error of eager in the same dtype, both as 2-norms of what is finite."""
        if self.baseline is None:
            return None
        own, eager = (_error(values, self.budget.reference) for values in (self.observed, self.baseline))
        return 1.0 if own == eager else own / eager if eager else math.inf

    def fields(self) -> dict[str, Any]:
        """As the report names them."""
        index, margin = self.margin.worst_index, self.margin
        baseline = None if self.baseline is None or not self.baseline.size else float(self.baseline[index])
        worst = {"index": list(index), "fast": margin.worst_observed, "reference": margin.worst_reference}
        has_entry = bool(self.observed.size)
        arithmetic = {**self.budget.at(index), "unit_roundoff": self.arithmetic.elementwise} if has_entry else None
        return {
            "margin": self.size,
            "norm_margin": margin.norm,
            "element_margin": margin.element,
            "yardstick": self.yardstick,
            "stage": self.stage,
            "output": self.output,
            "worst": {**worst, "baseline": baseline} if has_entry else None,
            "budget": arithmetic,
        }


class WitnessError(AssertionError):
    """The result may be right, but the lane's backend did not produce it."""


def run_case(
    subject: Subject, case: Case, lane: Lane, budgets: BudgetStore, witness: Witness, *, briefly: bool = False
) -> Row:
    """One row of the report. Whatever a case raises becomes its error, so that the next case can run.

    Briefly: without the eager lane's result beside its own, and with nothing after the first stage that diverges.
    """
    started = time.perf_counter()
    try:
        fields = _judged(subject, case, lane, budgets, witness, briefly)
    except Exception as error:  # noqa: BLE001  # the report shows it; a verdict must not depend on its type
        fields = {"status": "wrong" if isinstance(error, WitnessError) else "error", "error": describe(error)}
    return row(case, lane.name, seconds=time.perf_counter() - started, **fields)


def row(case: Case, lane: str, **fields: Any) -> Row:
    """A row of the report with everything that is not given empty."""
    empty = dict.fromkeys(
        (
            "margin",
            "norm_margin",
            "element_margin",
            "drift_margin",
            "yardstick",
            "stage",
            "output",
            "worst",
            "budget",
            "error",
        )
    )
    named = {"case": case.id, "algorithm": case.algorithm, "lane": lane, "dtype": case.dtype}
    reproduce = f"trysquare verify --lane {lane} --case '{case.id}'"
    result: Row = {**empty, **named, "seconds": 0.0, "reproduce": reproduce, **fields}  # type: ignore[typeddict-item]
    return result


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _judged(
    subject: Subject, case: Case, lane: Lane, budgets: BudgetStore, witness: Witness, briefly: bool
) -> dict[str, Any]:
    """The first stage that diverges, or else the worst one; with the drift beside it."""
    worst: Finding | None = None
    for found in _findings(subject, case, lane, budgets, witness, None if briefly else lane.baseline):
        worst = found if worst is None or found.size > worst.size else worst
        if worst.size > 1:
            break
    drift = None if briefly and worst is not None and worst.size > 1 else subject.drift(case, lane)
    drifted = None if drift is None else _examine(case, drift, None, budgets, witness)
    if worst is None:
        return {"status": "error", "error": "the case has no stage: nothing was compared"}
    shown = drifted if worst.size <= 1 and drifted is not None and drifted.size > 1 else worst
    drift_margin = None if drifted is None else drifted.size
    return {"status": _status(shown), **shown.fields(), "drift_margin": drift_margin}


def _status(finding: Finding) -> str:
    if finding.size > 1 or math.isnan(finding.size):
        return "wrong"
    judged = finding.budget.undetermined.size - int(finding.budget.undetermined.sum())
    return "could not tell" if finding.budget.undetermined.size and not judged else "right"


def _findings(
    subject: Subject, case: Case, lane: Lane, budgets: BudgetStore, witness: Witness, baseline: Lane | None
) -> Iterator[Finding]:
    eager = repeat(None) if baseline is None else subject.stages(case, baseline)
    for stage, beside in zip(subject.stages(case, lane), eager, strict=False):
        yield _examine(case, stage, beside, budgets, witness)


def _examine(case: Case, stage: Stage, beside: Stage | None, budgets: BudgetStore, witness: Witness) -> Finding:
    """Runs one stage and judges every output of it; the worst is the stage's finding.

    One that is little wrong by the usual draws is judged by many more, which know the spread better.
    """
    observed, made = witness.watch(stage.fast)
    objection = witness.objection(made, stage.computes)
    if objection:
        raise WitnessError(f"{stage.label}: {objection}")
    allowed = budgets.get(case, stage)
    if observed.keys() != allowed.keys():
        raise ValueError(f"{stage.label}: outputs {sorted(observed)}, the reference has {sorted(allowed)}")
    baseline = {} if beside is None else beside.fast()
    finding = _worst(stage, allowed, observed, baseline)
    if not 1 < finding.size <= DOUBTFUL:
        return finding
    entries = sum(output.size for output in observed.values())
    return _worst(stage, budgets.again(case, stage, entries), observed, baseline)


def _worst(stage: Stage, allowed: Mapping[str, Budget], observed: Outputs, baseline: Mapping[str, Array]) -> Finding:
    found = [_judge(stage, name, budget, observed, baseline) for name, budget in allowed.items()]
    return max(found, key=lambda finding: (finding.size, -finding.budget.undetermined.sum()))


def _judge(stage: Stage, name: str, budget: Budget, observed: Outputs, baseline: Mapping[str, Array]) -> Finding:
    margin = judge(budget, observed[name])
    return Finding(stage.label, name, margin, budget, observed[name], baseline.get(name), stage.arithmetic)


def _error(values: Array, reference: Array) -> float:
    with np.errstate(all="ignore"):
        difference = values - reference
    return float(np.sqrt(np.sum(np.square(np.where(np.isfinite(difference), difference, 0.0)))))
