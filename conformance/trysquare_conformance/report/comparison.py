"""`trysquare compare a.json b.json`: what changed between two versions, two machines or two days."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from trysquare_conformance.report import summary
from trysquare_conformance.report.console import STYLE, mark, printed, remark, simple_table
from trysquare_conformance.report.markdown import code, prose, table
from trysquare_conformance.report.schema import Result, Row
from trysquare_conformance.report.text import clean, count, figure, number

SHOWN = 20
NOTABLE = 2.0  # a margin that moved by less than this factor is counted, and not listed


@dataclass(frozen=True)
class Change:
    """One case and lane in both runs."""

    case: str
    lane: str
    before: Row
    after: Row

    @property
    def factor(self) -> float | None:
        """New margin over old margin; None where either has none."""
        old, new = number(self.before["margin"]), number(self.after["margin"])
        if old is None or new is None or math.isnan(old) or math.isnan(new):
            return None
        return 1.0 if old == new else math.inf if old == 0 else new / old

    @property
    def verdict_changed(self) -> bool:
        """Whether the status is another."""
        return self.before["status"] != self.after["status"]

    @property
    def notable(self) -> bool:
        """The margin appeared, vanished or moved by more than `NOTABLE`."""
        if self.factor is None:
            return str(self.before["margin"]) != str(self.after["margin"])
        return not 1 / NOTABLE <= self.factor <= NOTABLE

    @property
    def size(self) -> float:
        """How far the margin moved, in either direction, for sorting."""
        return math.inf if not self.factor else abs(math.log(self.factor))


@dataclass(frozen=True)
class Comparison:
    """What differs between run a and run b. `moved` are margins that moved notably under an unchanged verdict."""

    verdicts: tuple[str, str]
    sentences: tuple[str, str]
    machine: list[tuple[str, str, str]]
    lanes: list[tuple[str, str, str]]
    changed: list[Change]
    moved: list[Change]
    same: int
    new: list[Row]
    missing: list[Row]

    @property
    def regressions(self) -> list[Change]:
        """Cases that were right and no longer are."""
        return [change for change in self.changed if change.before["status"] == "right"]

    @property
    def sentence(self) -> str:
        """What changed, in one sentence."""
        parts = {
            f"{count(len(self.changed), 'verdict')} changed, {len(self.regressions)} of them from right": self.changed,
            f"{count(len(self.moved), 'margin')} moved by more than a factor of {NOTABLE:g}": self.moved,
            count(len(self.new), "new case"): self.new,
            count(len(self.missing), "missing case"): self.missing,
        }
        before, after = self.verdicts
        head = f"still {after}" if before == after else f"{before} → {after}"
        changes = [text for text, found in parts.items() if found]
        return "; ".join([f"{head}: {count(self.same, 'case')} as before", *changes])


def compare(before: Result, after: Result) -> Comparison:
    """Match the rows of two results by lane and case and sort out what differs."""
    old = {(row["lane"], row["case"]): row for row in before["results"]}
    new = {(row["lane"], row["case"]): row for row in after["results"]}
    both = [Change(case, lane, old[lane, case], row) for (lane, case), row in new.items() if (lane, case) in old]
    changed = [change for change in both if change.verdict_changed]
    moved = [change for change in both if change.notable and not change.verdict_changed]
    return Comparison(
        verdicts=(before["verdict"], after["verdict"]),
        sentences=(before["sentence"], after["sentence"]),
        machine=_differences(_circumstances(before), _circumstances(after)),
        lanes=_differences(_lane_states(before), _lane_states(after)),
        changed=sorted(changed, key=_gravity),
        moved=sorted(moved, key=lambda change: (-change.size, change.lane, change.case)),
        same=len(both) - len(changed) - len(moved),
        new=[row for key, row in new.items() if key not in old],
        missing=[row for key, row in old.items() if key not in new],
    )


def _gravity(change: Change) -> tuple[int, str, str]:
    return summary.SEVERITY.index(change.after["status"]), change.lane, change.case


def _differences(before: dict[str, str], after: dict[str, str]) -> list[tuple[str, str, str]]:
    keys = [*before, *(key for key in after if key not in before)]
    pairs = [(key, before.get(key, "–"), after.get(key, "–")) for key in keys]
    return [pair for pair in pairs if pair[1] != pair[2]]


def _circumstances(result: Result) -> dict[str, str]:
    return dict(summary.machine_facts(result["machine"])) | {"Tier": result["tier"]}


def _lane_states(result: Result) -> dict[str, str]:
    return {
        lane["name"]: lane["status"] + (f": {lane['reason']}" if lane["reason"] else "") for lane in result["lanes"]
    }


def show(comparison: Comparison, console: Console) -> None:
    """Print a comparison to a terminal, its sentence last."""
    printed(lambda target: _show(comparison, target), console)


def _show(comparison: Comparison, console: Console) -> None:
    for title, rows in (("machine", comparison.machine), ("lane", comparison.lanes)):
        if rows:
            _show_differences(title, rows, console)
    for heading, changes in _sections(comparison):
        console.print(Text(heading, "bold"))
        for change in changes[:SHOWN]:
            remark(change.after["status"], _step(change), f"{change.case} in {change.lane}", console)
        _show_rest(len(changes), console)
    for word, only in (("new", comparison.new), ("missing", comparison.missing)):
        for row in only[:SHOWN]:
            remark("not run here", word, f"{row['case']} in {row['lane']}", console)
        _show_rest(len(only), console)
    verdict = comparison.verdicts[1]
    console.print(Text.assemble(mark(verdict), " ", (comparison.sentence, STYLE[verdict])))


def _show_differences(title: str, rows: list[tuple[str, str, str]], console: Console) -> None:
    grid = simple_table(title, "before", "after")
    for row in rows:
        grid.add_row(*(Text(clean(cell)) for cell in row))
    console.print(grid, Text())


def _show_rest(amount: int, console: Console) -> None:
    """How many were not listed, and an empty line after what was."""
    if amount > SHOWN:
        console.print(Text(f"and {amount - SHOWN} more", "dim"))
    if amount:
        console.print()


def _sections(comparison: Comparison) -> Iterator[tuple[str, list[Change]]]:
    if comparison.changed:
        yield "Verdicts that changed", comparison.changed
    if comparison.moved:
        yield "Margins that moved", comparison.moved


def _step(change: Change) -> str:
    margins = f"{figure(change.before['margin'])} → {figure(change.after['margin'])}"
    if not change.verdict_changed:
        return margins
    return f"{change.before['status']} → {change.after['status']} ({margins})"


def markdown(comparison: Comparison) -> str:
    """A comparison as Markdown."""
    parts = [f"## {prose(comparison.sentence)}\n"]
    for title, rows in (("Machine", comparison.machine), ("Lane", comparison.lanes)):
        if rows:
            parts.append(table([title, "Before", "After"], [[prose(cell) for cell in row] for row in rows]))
    for heading, changes in _sections(comparison):
        lines = [[code(change.case), prose(change.lane), prose(_step(change))] for change in changes]
        parts.append(f"### {heading}\n\n" + table(["Case", "Lane", "Change"], lines))
    for heading, only in (("New cases", comparison.new), ("Missing cases", comparison.missing)):
        if only:
            lines = [[code(row["case"]), prose(row["lane"]), row["status"]] for row in only]
            parts.append(f"### {heading}\n\n" + table(["Case", "Lane", "Status"], lines))
    return "\n".join(parts)
