"""Tables that nobody types: ``<!-- generated: name -->`` in a page is replaced by what a function here makes of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from mkdocs.exceptions import PluginError

from trysquare_conformance import cli, inputs
from trysquare_conformance.logits import LOGITS
from trysquare_conformance.report import schema, summary, text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

ROOT = Path(__file__).parents[2]
RESULTS = (ROOT / "reports" / "conformance.json", ROOT / "reports" / "quick.json")
MARK = re.compile(r"^<!-- generated: (?P<what>[a-z ]+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: object) -> str:
    """MkDocs calls this with the source of every page."""
    return MARK.sub(lambda found: GENERATORS[found["what"]](), markdown)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; a bar inside a cell would end it."""
    lines = [list(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def budgets() -> str:
    """What the budgets of the latest run resolved to, by algorithm, dtype and lane."""
    found = next((path for path in RESULTS if path.exists()), None)
    if found is None:
        raise PluginError("no result to take the budgets from: run `nox -s verify` first")
    result = schema.load(found)
    grouped = defaultdict(list)
    for row in result["results"]:
        grouped[row["algorithm"], row["dtype"], row["lane"]].append(row)
    order = sorted(grouped, key=lambda key: (key[0], summary.dtype_order(key[1]), key[2]))
    head = ["algorithm", "dtype", "lane", "cases", "$u$", "draws", "multiple of the spread", "allowed", "worst margin"]
    said = f"From the {result['tier']} tier, {summary.machine_line(result['machine'])}."
    return f"{said}\n\n{table(head, (budget_row(key, grouped[key]) for key in order))}"


def budget_row(key: tuple[str, str, str], rows: list[schema.Row]) -> list[str]:
    """One line: the range of each number over the cases of a group."""
    known: list[Mapping[str, Any]] = [row["budget"] for row in rows if row["budget"]]
    shown = ("unit_roundoff", "draws", "multiple", "allowed")
    spans = [span(budget[name] for budget in known) for name in shown]
    peak = summary.worst(rows)
    cells = [*key, str(len(rows)), *spans, text.figure(peak["margin"]) if peak else "–"]
    return [cell.replace("-", "\N{NON-BREAKING HYPHEN}") for cell in cells]


def span(values: Iterable[schema.Number]) -> str:
    """`1.2e-7`, or `1.2e-7 … 3.4e-5` where they differ."""
    shown = [str(v) if isinstance(v, int) else text.figure(v) for v in sorted(set(values), key=float)]
    return " … ".join(dict.fromkeys([shown[0], shown[-1]])) if shown else "–"


def kinds() -> str:
    """Every kind of input that cases are fed with, and why."""
    return table(["input", "why"], ([f"`{name}`", kind.reason] for name, kind in inputs.KINDS.items()))


def logits() -> str:
    """Every kind of logits that the losses' cases are fed with, and why."""
    return table(["logits", "why"], ([f"`{name}`", kind.reason] for name, kind in LOGITS.items()))


def command_line() -> str:
    """The help texts of `trysquare` and of each of its commands, as they print."""
    commands = ["", *command_names(typer.main.get_group(cli.app))]
    return "\n\n".join(f"## trysquare {name}\n\n```text\n{help_text(name)}\n```" for name in commands)


def command_names(group: Any) -> list[str]:
    """The commands of a group, those of its groups after them."""
    names = []
    for name, command in group.commands.items():
        below = command_names(command) if hasattr(command, "commands") else []
        names += [name, *(f"{name} {further}" for further in below)]
    return names


def help_text(command: str) -> str:
    """What `--help` prints, 84 columns wide and without colour."""
    environment = {**os.environ, "COLUMNS": "84", "TERM": "dumb", "NO_COLOR": "1"}
    line = [sys.executable, "-m", "trysquare_conformance", *command.split(), "--help"]
    said = subprocess.run(line, env=environment, check=True, capture_output=True, text=True).stdout
    return "\n".join(row.rstrip() for row in said.strip().splitlines())


def from_readme(name: str) -> Callable[[], str]:
    """The README's table of that name, which the benchmarks generate."""

    def take() -> str:
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        begin, end = f"<!-- table: {name} -->", "<!-- /table -->"
        if begin not in readme:
            raise PluginError(f"README.md has no {begin}")
        return readme.split(begin, 1)[1].split(end, 1)[0].strip()

    return take


GENERATORS: dict[str, Callable[[], str]] = {
    "budgets": budgets,
    "inputs": kinds,
    "logits": logits,
    "command line": command_line,
    "demo": from_readme("demo"),
    "cpu": from_readme("cpu"),
}
