"""Planted faults: the proof that the suite can fail. Each changes the fast code as a plausible mistake would.

Pages `cases/…_faults.py` declare them. The suite must catch each in every lane where it can exist; one that honest
rounding hides is declared indistinguishable, with the reason, and must then not be caught: neither list can rot.
"""

import importlib
import os
import pkgutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trysquare_conformance import cases as pages
from trysquare_conformance import catchers, registry
from trysquare_conformance.case import Case
from trysquare_conformance.compare import BudgetStore, run_case
from trysquare_conformance.footprint import watched
from trysquare_conformance.lanes import LANES, Lane
from trysquare_conformance.planting import Fault
from trysquare_conformance.process import LaneProcess
from trysquare_conformance.report.schema import Faults, Row
from trysquare_conformance.witness import Witness

Progress: TypeAlias = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Outcome:
    """What became of a fault in a lane: the row that caught it, or None."""

    fault: Fault
    lane: str
    caught: Row | None

    @property
    def good(self) -> bool:
        """Caught, or hidden as declared."""
        return (self.caught is None) == (self.fault.indistinguishable is not None)


AT_ONCE = 100
"""So many faults are planted by one process; more are shared among several, one for each core at most."""


@cache
def all_faults() -> tuple[Fault, ...]:
    """What the pages declare."""
    names = [page.name for page in pkgutil.iter_modules(pages.__path__) if page.name.endswith("_faults")]
    modules = [importlib.import_module(f"{pages.__name__}.{name}") for name in names]
    return tuple(fault for module in modules for fault in module.FAULTS)


def run(
    lanes: Sequence[str],
    globs: Sequence[str] = ("*",),
    progress: Progress = lambda *_: None,
    budgets: Path | None = None,
    pool: Executor | None = None,
) -> list[Outcome]:
    """Plant every fault that matches in every lane where it can exist, and let the quick cases look for it.

    Args:
        lanes: Names of lanes that can run here.
        globs: Of fault ids.
        progress: Is told how far it is.
        budgets: A folder with budgets that this run has measured already.
        pool: Where to run the processes, after what is waiting there; None: as many at once as there are cores.

    Raises:
        RuntimeError: A lane cannot run here, or its process ended early.
    """
    chosen = {LANES[name]: planted_in(LANES[name], globs) for name in lanes}
    for lane in chosen:
        reason = lane.available()
        if reason is not None:
            raise RuntimeError(f"{lane.name} cannot run here: {reason}")
    with tempfile.TemporaryDirectory(prefix="trysquare-") as folder:
        place = budgets or Path(folder)
        apart = [lane for lane, here in chosen.items() if len(here) > AT_ONCE or not _is_at_home(lane)]
        started = {lane: _processes(lane, chosen[lane], place, globs, progress) for lane in apart}
        with nullcontext(pool) if pool else ThreadPoolExecutor(os.cpu_count()) as executor:
            list(executor.map(FaultProcess.run, [process for processes in started.values() for process in processes]))
        return [
            outcome
            for lane, here in chosen.items()
            for outcome in (_told(lane, here, started[lane]) if lane in started else _here(lane, here, place, progress))
        ]


def _here(lane: Lane, chosen: Sequence[Fault], budgets: Path, progress: Progress) -> Iterator[Outcome]:
    for done, outcome in enumerate(plant(lane, chosen, budgets), 1):
        yield outcome
        progress(f"faults, {lane.name}", done, len(chosen))


def planted_in(lane: Lane, globs: Sequence[str]) -> list[Fault]:
    """The faults that match and can exist in a lane."""
    return [
        fault
        for fault in all_faults()
        if lane.runs(fault.algorithm) and _matches(fault.id, globs) and _matches(lane.name, fault.lanes)
    ]


def plant(lane: Lane, chosen: Sequence[Fault], budgets: Path) -> Iterator[Outcome]:
    """Plant one after the other, in this process."""
    hunt = Hunt(lane, BudgetStore(budgets))
    for fault in chosen:
        yield Outcome(fault, lane.name, hunt.catch(fault))


def _is_at_home(lane: Lane) -> bool:
    """Whether this process has the lane's environment, which Triton reads when it is imported."""
    return all(os.environ.get(name) == value for name, value in lane.environment)


def _processes(
    lane: Lane, chosen: Sequence[Fault], budgets: Path, globs: Sequence[str], progress: Progress
) -> "list[FaultProcess]":
    """Processes with the lane's environment, each for a part of the faults."""
    parts = min(os.cpu_count() or 1, -(-len(chosen) // AT_ONCE))
    worker = [sys.executable, "-m", "trysquare_conformance.worker", "--lane", lane.name, "--tier", "quick"]
    command = [*worker, "--budgets", str(budgets), "--parts", str(parts), *(f"--fault={glob}" for glob in globs)]
    processes: list[FaultProcess] = []

    def tell(*_: object) -> None:
        progress(f"faults, {lane.name}", sum(len(process.caught) for process in processes), len(chosen))

    processes += [FaultProcess(lane.name, lane, (), [*command, "--part", str(part)], tell) for part in range(parts)]
    return processes


def _told(lane: Lane, chosen: Sequence[Fault], processes: "Sequence[FaultProcess]") -> Iterator[Outcome]:
    """What the processes of a lane said of each fault."""
    for part, process in enumerate(processes):
        for fault in registry.part(chosen, part, len(processes)):
            if fault.id not in process.caught:
                raise RuntimeError(f"{lane.name}: {process.ended}, and {fault.id} was not looked for\n{process.said}")
            yield Outcome(fault, lane.name, process.caught[fault.id])


@dataclass
class FaultProcess(LaneProcess):
    """A lane's process that plants faults: which row caught each."""

    caught: dict[str, Row | None] = field(default_factory=dict)

    def _take(self, message: dict[str, Any]) -> None:
        if message["event"] == "fault":
            self.caught[message["fault"]] = message["caught"]
            self.progress(self.name, len(self.caught), 0)
        else:
            super()._take(message)


@dataclass(frozen=True)
class Sound:
    """A case without a fault: whether it is right, and the functions that it executes, if that can be told."""

    right: bool
    executed: frozenset[str] | None

    def may_show(self, functions: frozenset[str] | None) -> bool:
        """Whether changing these functions can make it wrong."""
        return self.right and (self.executed is None or functions is None or not functions.isdisjoint(self.executed))


def tried(lane: Lane, tier: str, glob: str = "*") -> list[Case]:
    """In which cases faults are looked for: the tier's; in a compiled lane then those that come later only there."""
    first = registry.select(tier, [glob], lane.name)
    if lane.backend != "compiled":
        return first
    known = {case.id for case in first}
    late = (case for case in registry.select(tier, [glob]) if case.id not in known)
    return first + [case for case in late if case.runs_in(lane.name) and lane.holds(case.dtype)]


class Hunt:
    """Looks for faults in one lane, with cases that are right as long as nothing is planted."""

    def __init__(self, lane: Lane, budgets: BudgetStore, tier: str = "quick") -> None:
        self.lane, self.budgets, self.tier = lane, budgets, tier
        self.witness = Witness(lane)
        self._sound: dict[str, Sound] = {}
        self._catchers: list[str] = []
        self._remembered = catchers.remembered(lane.name)

    def catch(self, fault: Fault) -> Row | None:
        """A row that is no longer right under the fault.

        Cases that execute none of the functions which the fault changes are left out. The one that caught it before is
        tried first, then those that caught another fault of late: faults stand in their pages beside what resembles
        them.
        """
        functions, before = fault.functions, self._remembered.get(fault.id)
        cases = sorted(tried(self.lane, self.tier, f"{fault.algorithm}/*"), key=self._latest)
        for case in sorted(cases, key=lambda case: case.id != before):
            if not self._sound_run(case).may_show(functions):
                continue
            with fault.planted():
                found = self._run(case)
            if found["status"] != "right":
                self._catchers.append(case.id)
                return found
        return None

    def _latest(self, case: Case) -> int:
        """Less for a case that caught something later."""
        times = [time for time, caught in enumerate(self._catchers, 1) if caught == case.id]
        return -max(times, default=0)

    def _sound_run(self, case: Case) -> Sound:
        """What the case is like without a fault; once."""
        if case.id not in self._sound:
            row, executed = watched(lambda: self._run(case))
            self._sound[case.id] = Sound(row["status"] == "right", executed if self.lane.is_python else None)
        return self._sound[case.id]

    def _run(self, case: Case) -> Row:
        """A ninth change of one function torch refuses to compile, which is no answer: begin anew."""
        row = self._run_once(case)
        if "LimitHit" not in str(row["error"]).partition(":")[0]:
            return row
        torch.compiler.reset()
        return self._run_once(case)

    def _run_once(self, case: Case) -> Row:
        subject = registry.ALGORITHMS[case.algorithm]
        return run_case(subject, case, self.lane, self.budgets, self.witness, briefly=True)


def score(outcomes: Sequence[Outcome]) -> Faults:
    """As the report shows it."""
    hidden = [o for o in outcomes if o.fault.indistinguishable]
    return {
        "caught": sum(o.caught is not None for o in outcomes if o not in hidden),
        "planted": len(outcomes),
        "indistinguishable": [_entry(o, o.fault.indistinguishable or "") for o in hidden if o.good],
        "missed": [_entry(o, _why_bad(o)) for o in outcomes if not o.good],
    }


def _entry(outcome: Outcome, reason: str) -> dict[str, str]:
    return {"name": outcome.fault.id, "lane": outcome.lane, "reason": reason}


def _why_bad(outcome: Outcome) -> str:
    if outcome.caught is None:
        return f"not caught: {outcome.fault.what}"
    return f"declared indistinguishable, and {outcome.caught['case']} tells it apart"


def show(outcomes: Sequence[Outcome], console: Console) -> None:
    """Print what became of each, why where that is not as it should be, and the score last."""
    table = Table("", "fault", "margin", "what it does", box=None, padding=(0, 2, 0, 0))
    for column in table.columns[:3]:
        column.no_wrap = True
    for outcome in outcomes:
        mark = Text("✓", "green") if outcome.good else Text("✗", "red")
        table.add_row(mark, Text(outcome.fault.id), Text(_how(outcome)), Text(outcome.fault.what))
    console.print(table)
    told = score(outcomes)
    for entry in [*told["indistinguishable"], *told["missed"]]:
        console.print(Text(f"{entry['name']} in {entry['lane']}: {entry['reason']}"))
    console.print(
        f"{told['caught']} of {told['planted']} planted faults caught, "
        f"{len(told['indistinguishable'])} indistinguishable, {len(told['missed'])} missed"
    )


def _how(outcome: Outcome) -> str:
    """The margin of the case that caught it, or the word for another way out."""
    row = outcome.caught
    if row is None:
        return "hidden" if outcome.fault.indistinguishable else "missed"
    if row["margin"] is None:
        return "witness" if row["status"] == "wrong" else "error"
    return f"{float(row['margin']):.2g}"


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)
