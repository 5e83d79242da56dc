"""The terminal rendering. It ends in the sentence; commands are printed unbroken, to be copied."""

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from trysquare_conformance.report import kernels, summary
from trysquare_conformance.report.console import STYLE, command, hanging, mark, printed, remark, simple_table
from trysquare_conformance.report.schema import Result, Row
from trysquare_conformance.report.text import clean, count, duration, exact, figure, roundoff

SHOWN = 10
HEAD = "worst margin"

Column = tuple[str, list[Text]]


def render(result: Result, console: Console) -> None:
    """Print machine, matrix, failures, what was not run, faults and, last, the verdict."""
    printed(lambda target: _render(result, target), console)


def _render(result: Result, console: Console) -> None:
    console.print(Text(summary.machine_line(result["machine"]), style="dim"))
    _matrix(result, console)
    _failures(result, console)
    _remarks(result, console)
    _verdict(result, console)


def _matrix(result: Result, console: Console) -> None:
    """The matrix of the lanes that ran, in as many tables as the width asks for."""
    lines = summary.matrix(result)
    heads = [(Text(clean(line.algorithm)), Text(clean(line.dtype))) for line in lines]
    names, dtypes = max([len(HEAD), *(a.cell_len for a, _ in heads)]), max([5, *(b.cell_len for _, b in heads)])
    room = console.width - names - dtypes - 4
    columns = [
        (lane["name"], [_cell(line.cells[index]) for line in lines])
        for index, lane in enumerate(result["lanes"])
        if lines and lane["status"] == "ran"
    ]
    for part in _fitting(columns, max(room, 20)):
        table = simple_table(HEAD, "dtype", *(name for name, _ in part), numbers=len(part))
        for head, *cells in zip(heads, *(cells for _, cells in part), strict=True):
            table.add_row(*head, *cells)
        console.print()
        console.print(table)


def _fitting(columns: list[Column], room: int) -> Iterator[list[Column]]:
    """The columns in groups that are no wider than the room, or of one column."""
    group: list[Column] = []
    left = room
    for column in columns:
        width = max(len(column[0]), *(cell.cell_len for cell in column[1])) + 3
        if group and width > left:
            yield group
            group, left = [], room
        group.append(column)
        left -= width
    if group:
        yield group


def _cell(cell: summary.Cell | None) -> Text:
    if cell is None or not cell.cases:
        return Text("–", "dim")
    amount = f"{cell.bad} of {cell.cases}" if cell.bad else str(cell.cases)
    return Text.assemble(
        (f"{amount}  ", "dim"), mark(cell.status), " ", (f"{summary.headline(cell):>6}", STYLE[cell.status])
    )


def _failures(result: Result, console: Console) -> None:
    rows = summary.failures(result)
    for row in rows[:SHOWN]:
        _card(row, console)
    if len(rows) > SHOWN:
        console.print(f"\nand {count(len(rows) - SHOWN, 'more failure')}: see the HTML or JSON report", highlight=False)


def _card(row: Row, console: Console) -> None:
    console.print()
    title = Text.assemble(mark(row["status"]), " ", (clean(row["case"]), "bold"))
    margin = "" if row["margin"] is None else f"  margin {figure(row['margin'])}"
    console.print(title.append(clean(f"  {row['lane']}{margin}")), soft_wrap=True)
    for label, text in _facts(row):
        hanging(Text(f"  {label:<8}", "dim"), text, console)
    command(row["reproduce"], console)


def _facts(row: Row) -> Iterator[tuple[str, str]]:
    if row["error"]:
        yield "error", row["error"]
    if row["stage"]:
        yield "stage", row["stage"]
    if row["worst"]:
        worst = row["worst"]
        yield "worst", summary.worst_place(row) or ""
        yield "", "  ".join(f"{key} {exact(worst[key])}" for key in ("fast", "reference", "baseline"))
    budget = row["budget"]
    if budget:
        yield "budget", summary.arithmetic(row) or ""
        yield "", f"spread of {count(budget['draws'], 'draw')} at u = {roundoff(budget['unit_roundoff'])}"


def _remarks(result: Result, console: Console) -> None:
    """One line each for what could not be told or was expected to fail, the lanes that did not run, and the faults."""
    console.print()
    for status in ("could not tell", "expected failure"):
        rows = summary.of_status(result, status)
        for row in rows[:SHOWN]:
            reason = row["error"] or row["stage"] or "no reason given"
            remark(status, status, f"{row['case']} in {row['lane']}: {reason}", console)
        if len(rows) > SHOWN:
            remark(status, status, f"and {count(len(rows) - SHOWN, 'more case')}", console)
    for lane in summary.not_run(result):
        remark("not run here", "not run here", f"{lane['name']}: {lane['reason'] or 'no reason given'}", console)
    faults = result.get("faults")
    if faults:
        remark("wrong" if faults["missed"] else "right", "faults", summary.fault_sentence(faults), console)
    compiled = result.get("kernels")
    if compiled is not None:
        kernels.draw(compiled, console)


def _verdict(result: Result, console: Console) -> None:
    console.print()
    console.print(Text(f"{summary.tally(result)} · {duration(result['seconds'])}", "dim"))
    verdict = result["verdict"]
    console.print(Text.assemble(mark(verdict), " ", (clean(result["sentence"]), STYLE[verdict])))
