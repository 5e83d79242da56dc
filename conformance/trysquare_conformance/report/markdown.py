"""The Markdown rendering, for the summary of a job on GitHub (which cuts off at 1 MiB)."""

import re
from collections.abc import Iterable, Iterator, Sequence

from trysquare_conformance.report import kernels, summary
from trysquare_conformance.report.schema import Result, Row
from trysquare_conformance.report.text import clean, clean_lines, count, duration, exact, figure, roundoff, typeset

CARDS = 20
LIMIT = 900_000
SIGN = {"right": "✅", "wrong": "❌", "could not tell": "❔", "not run here": "⚪"}
# What Markdown acts on; an underscore inside a word and a colon in a sentence are left to be read.
_ACTIVE = re.compile(r"[\\`*\[\]<>#|~&@$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//|\w+:)")


def render(result: Result) -> str:
    """The report as text, the same for the same result."""
    head, rest = [*_head(result)], [*_matrix(result), *_reasons(result), *_faults(result)]
    rest += [*_kernels(result), *_budgets(result), *_machine(result)]
    room = LIMIT - sum(len(part.encode()) for part in head + rest)
    return "\n".join([*head, *_failures(result, room), *rest])


def prose(text: object) -> str:
    """Text that Markdown and HTML leave as it is."""
    return _ACTIVE.sub(lambda match: f"&#{ord(match[0])};", clean(text))


def code(text: object) -> str:
    """Text in code type, also in a cell of a table; entities where backticks cannot hold it."""
    words = clean(text)
    return f"<code>{prose(words)}</code>" if not words.strip() or set("`|<\\") & set(words) else f"`{words}`"


def fenced(text: str, language: str) -> str:
    """A block of code, its fence longer than any run of backticks in it."""
    body = clean_lines(text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", body)), default=0))
    return f"{fence}{language}\n{body}\n{fence}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0) -> str:
    """A table; the last `numbers` columns are set flush right."""
    rule = ["---"] * (len(heads) - numbers) + ["--:"] * numbers
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, rule, *rows]) + "\n"


def _head(result: Result) -> Iterator[str]:
    yield f"## {SIGN[result['verdict']]} trysquare: {result['verdict']}\n\n{prose(result['sentence'])}\n"
    times = f"tier {prose(result['tier'])}, {duration(result['seconds'])}"
    yield f"{summary.tally(result)} · {times} · {prose(summary.machine_line(result['machine']))}\n"


def _matrix(result: Result) -> Iterator[str]:
    lanes = [prose(lane["name"]) for lane in result["lanes"]]
    lines = [[prose(line.algorithm), prose(line.dtype), *map(_cell, line.cells)] for line in summary.matrix(result)]
    yield "### Worst margins\n\nObserved error over allowed error; above 1 is wrong.\n"
    yield table(["Algorithm", "Dtype", *lanes], lines, len(lanes))


def _cell(cell: summary.Cell | None) -> str:
    if cell is None:
        return ""
    if not cell.cases:
        return "not run"
    text = f"{summary.MARK[cell.status]} {summary.headline(cell)}"
    return f"**{text}** ({cell.bad} of {cell.cases})" if cell.bad else f"{text} ({cell.cases})"


def _failures(result: Result, room: int) -> Iterator[str]:
    """Cards for the worst, a line for each of the others, and a word on those for which there is no room."""
    rows = summary.failures(result)
    if not rows:
        return
    yield f"### {count(len(rows), 'failure')}\n"
    pieces = [_card(row) for row in rows[:CARDS]] + [_line(row) for row in rows[CARDS:]]
    for rank, piece in enumerate(pieces):
        room -= len(piece.encode()) + 1
        if room < 0:
            yield f"\n{count(len(pieces) - rank, 'more failure')} in the JSON and HTML reports.\n"
            return
        yield piece
    yield ""


def _card(row: Row) -> str:
    parts = [code(row["case"]), prose(row["lane"])]
    parts += [] if row["margin"] is None else [f"margin {figure(row['margin'])}"]
    title = f"{summary.MARK[row['status']]} {' · '.join(parts)}"
    facts = [f"- {label}: {text}" for label, text in _facts(row) if text]
    blocks = [fenced(row["error"], "text")] if row["error"] else []
    body = "\n".join([*facts, "", *blocks, fenced(clean(row["reproduce"]), "sh")])
    return f"<details><summary>{_summary(title)}</summary>\n\n{body}\n\n</details>\n"


def _summary(title: str) -> str:
    """Inside an HTML block Markdown is asleep: backticks become the tags that they stand for."""
    return re.sub(r"`([^`]*)`", lambda match: f"<code>{prose(match[1])}</code>", title)


def _facts(row: Row) -> list[tuple[str, str | None]]:
    worst, entry = row["worst"], summary.worst_place(row)
    values = worst and ", ".join(f"{key} {exact(worst[key])}" for key in ("fast", "reference", "baseline"))
    margins = f"norm-wise {figure(row['norm_margin'])}, element-wise {figure(row['element_margin'])}"
    budget = row["budget"]
    basis = budget and f" (spread of {count(budget['draws'], 'draw')} at u = {roundoff(budget['unit_roundoff'])})"
    return [
        ("first divergent stage", row["stage"] and code(row["stage"])),
        ("worst entry", entry and f"{code(entry)}: {values}"),
        ("margins", margins if row["margin"] is not None else None),
        ("budget", budget and f"{summary.arithmetic(row)}{basis}"),
    ]


def _line(row: Row) -> str:
    return f"- margin {figure(row['margin'])}: {code(row['reproduce'])}"


def _reasons(result: Result) -> Iterator[str]:
    """What was not run, could not be told or was expected to fail, and why."""
    lanes = [[prose(lane["name"]), prose(lane["reason"] or "no reason given")] for lane in summary.not_run(result)]
    if lanes:
        yield "### Not run here\n"
        yield table(["Lane", "Reason"], lanes)
    for title, status in (("Could not tell", "could not tell"), ("Expected failures", "expected failure")):
        rows = summary.of_status(result, status)
        if rows:
            yield f"### {title}\n"
            lines = [[code(r["case"]), prose(r["lane"]), prose(r["error"] or r["stage"] or "")] for r in rows[:100]]
            yield table(["Case", "Lane", "Reason"], lines)
        if len(rows) > 100:
            yield f"{count(len(rows) - 100, 'more case')} in the JSON and HTML reports.\n"


def _faults(result: Result) -> Iterator[str]:
    faults = result.get("faults")
    if not faults:
        return
    yield f"### Planted faults\n\n{summary.fault_sentence(faults)}.\n"
    for kind, entries in (("missed", faults["missed"]), ("indistinguishable", faults["indistinguishable"])):
        for fault in summary.fault_list(entries):
            yield "- " + ", ".join([kind, code(fault.name), *(prose(t) for t in (fault.lane, fault.reason) if t)])
    yield ""


def _kernels(result: Result) -> Iterator[str]:
    found = result.get("kernels")
    if found is None:
        return
    yield f"### Kernels\n\n{prose(kernels.sentence(found))}.\n"
    across = [prose(target) for target in kernels.targets(found)]
    lines = [
        [code(line.kernel), prose(line.algorithm), str(line.forms), *map(_resources, line.cells)]
        for line in kernels.lines(found)
    ]
    if lines:
        yield table(["Kernel", "Algorithm", "Forms", *across], lines, 1 + len(across))
        yield f"In a cell: {kernels.CAPTION}.\n"
    yield from (f"- {prose(kernels.problem(kernel))}" for kernel in kernels.bad(found)[:CARDS])
    yield ""


def _resources(cell: kernels.Cell | None) -> str:
    return "" if cell is None else f"{summary.MARK[cell.status]} {cell.text}"


def _budgets(result: Result) -> Iterator[str]:
    lines = [
        [
            prose(group.lane),
            prose(group.algorithm),
            str(len(group.rows)),
            typeset(group.lowest),
            typeset(group.highest),
            figure(group.worst),
        ]
        for group in summary.groups(result)
    ]
    heads = ["Lane", "Algorithm", "Cases", "Allowed from", "to", "Worst margin"]
    yield f"<details><summary>What the budgets resolve to</summary>\n\n{table(heads, lines, 4)}\n</details>\n"


def _machine(result: Result) -> Iterator[str]:
    facts = [[label, prose(value)] for label, value in summary.machine_facts(result["machine"])]
    lines = table(["", ""], [*facts, ["Command", code(result["command"])], ["Started", prose(result["started"])]])
    yield f"<details><summary>Machine</summary>\n\n{lines}\n</details>\n"
