"""How the terminal renderings print: signs, tables, lines to be copied, and consoles that are not UTF-8."""

from collections.abc import Callable
from io import StringIO

from rich.box import SIMPLE_HEAD
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from trysquare_conformance.report import summary
from trysquare_conformance.report.text import clean, clean_lines

STYLE = {
    "right": "bold green",
    "wrong": "bold red",
    "error": "bold red",
    "could not tell": "bold magenta",
    "expected failure": "dim",
    "not run here": "dim",
}
_PLAIN = str.maketrans(
    {"✓": "+", "✗": "x", "×": "x", "–": "-", "−": "-", "·": "|", "∞": "inf", "→": "->", "─": "-", "…": "...", "⁻": "^-"}
    | dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789", strict=True))
)


def printed(draw: Callable[[Console], None], console: Console) -> None:
    """Draw on the console; where it cannot encode the signs (a pipe on Windows), print them in their plain forms."""
    if console.encoding.lower().startswith("utf"):
        draw(console)
        return
    aside = Console(file=StringIO(), width=console.width, color_system=None, force_terminal=False, legacy_windows=False)
    with aside.capture() as capture:
        draw(aside)
    plain = capture.get().translate(_PLAIN).encode(console.encoding, "replace").decode(console.encoding)
    console.out(plain, end="", highlight=False)


def mark(status: str) -> Text:
    """The sign of a status in its colour."""
    return Text(summary.MARK[status], STYLE[status])


def simple_table(*heads: str, numbers: int = 0) -> Table:
    """A table without sides; the last `numbers` columns are set flush right."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
    for rank, head in enumerate(heads):
        side: JustifyMethod = "right" if rank >= len(heads) - numbers else "left"
        table.add_column(Text(clean(head)), justify=side, overflow="fold")
    return table


def command(text: str, console: Console) -> None:
    """Print a line to be copied: never folded, cut or styled."""
    console.print(Text("  $ " + clean(text)), soft_wrap=True)


def hanging(head: Text, text: str, console: Console) -> None:
    """Print text after a head, its further lines beginning where the first one does."""
    lines = Text(clean_lines(text)).wrap(console, max(20, console.width - head.cell_len), overflow="fold")
    for line in lines or [Text()]:
        line.rstrip()
        console.print(head + line)
        head = Text(" " * head.cell_len)


def remark(status: str, label: str, text: str, console: Console) -> None:
    """A sign and a label in the colour of the status, and what there is to say."""
    hanging(Text.assemble(mark(status), " ", (label, STYLE[status]), "  "), text, console)
