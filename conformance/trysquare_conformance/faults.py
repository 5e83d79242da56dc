"""Planted faults: the proof that the suite can fail. Each changes the fast code as a plausible mistake would.

Pages `cases/…_faults.py` declare them. The suite must catch each in every lane where it can exist; one that honest
rounding hides is declared indistinguishable, with the reason, and must then not be caught: neither list can rot.
"""

import importlib
import pkgutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import TypeAlias

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trysquare_conformance import cases as pages
from trysquare_conformance import registry
from trysquare_conformance.case import Case
from trysquare_conformance.compare import BudgetStore, run_case
from trysquare_conformance.lanes import LANES, Lane
from trysquare_conformance.planting import Fault
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


@cache
def all_faults() -> tuple[Fault, ...]:
    """What the pages declare."""
    names = [page.name for page in pkgutil.iter_modules(pages.__path__) if page.name.endswith("_faults")]
    modules = [importlib.import_module(f"{pages.__name__}.{name}") for name in names]
    return tuple(fault for module in modules for fault in module.FAULTS)


def run(lanes: Sequence[str], globs: Sequence[str], progress: Progress = lambda *_: None) -> list[Outcome]:
    """Plant every fault that matches in every lane where it can exist, and let the quick cases look for it."""
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="trysquare-") as folder:
        for lane in (LANES[name] for name in lanes):
            reason = lane.available()
            if reason is not None:
                raise RuntimeError(f"{lane.name} cannot run here: {reason}")
            hunt = Hunt(lane, BudgetStore(Path(folder)))
            here = [fault for fault in all_faults() if _matches(fault.id, globs) and _matches(lane.name, fault.lanes)]
            for done, fault in enumerate(here):
                progress(lane.name, done, len(here))
                outcomes.append(Outcome(fault, lane.name, hunt.catch(fault)))
            progress(lane.name, len(here), len(here))
    return outcomes


class Hunt:
    """Looks for faults in one lane, with cases that are right as long as nothing is planted."""

    def __init__(self, lane: Lane, budgets: BudgetStore, tier: str = "quick") -> None:
        self.lane, self.budgets, self.tier = lane, budgets, tier
        self.witness = Witness(lane)
        self._sound: dict[str, bool] = {}

    def catch(self, fault: Fault) -> Row | None:
        """The first row that is no longer right under the fault."""
        for case in registry.select(self.tier, [f"{fault.algorithm}/*"], self.lane.name):
            if not self._is_sound(case):
                continue
            with fault.planted():
                found = self._run(case)
            if found["status"] != "right":
                return found
        return None

    def _is_sound(self, case: Case) -> bool:
        if case.id not in self._sound:
            self._sound[case.id] = self._run(case)["status"] == "right"
        return self._sound[case.id]

    def _run(self, case: Case) -> Row:
        return run_case(registry.ALGORITHMS[case.algorithm], case, self.lane, self.budgets, self.witness)


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
    """Print what became of each, the score last."""
    table = Table("fault", "what it does", "caught by", "margin", box=None, padding=(0, 2, 0, 0))
    for outcome in outcomes:
        row, hidden = outcome.caught, outcome.fault.indistinguishable
        by = Text("missed", style="bold red") if row is None else Text(f"{row['case']} on {row['lane']}")
        by = Text(f"indistinguishable: {hidden}", style="dim") if hidden and row is None else by
        table.add_row(Text(outcome.fault.id), Text(outcome.fault.what), by, Text(_margin(row)))
    console.print(table)
    told = score(outcomes)
    console.print(
        f"{told['caught']} of {told['planted']} faults caught, {len(told['indistinguishable'])} indistinguishable, "
        f"{len(told['missed'])} missed"
    )


def _margin(row: Row | None) -> str:
    if row is None:
        return ""
    return row["error"] or "" if row["margin"] is None else f"{float(row['margin']):.3g}"


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)
