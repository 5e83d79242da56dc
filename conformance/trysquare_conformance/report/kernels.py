"""What kernels compiled ahead of time take of the hardware, as every rendering shows it."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from trysquare_conformance.report.console import STYLE, hanging, mark, printed, remark, simple_table
from trysquare_conformance.report.schema import Kernel
from trysquare_conformance.report.text import clean, count

SHOWN = 10
CAPTION = "registers of a thread, shared bytes of a program (K: 1024): the most of any form"


@dataclass(frozen=True)
class Cell:
    """All compilations of a kernel for a target."""

    status: str
    registers: int | None
    shared: int | None

    @property
    def text(self) -> str:
        """`96 · 4K`."""
        if self.registers is None or self.shared is None:
            return "–"
        return f"{self.registers} · " + (f"{self.shared}" if self.shared < 1024 else f"{self.shared / 1024:.3g}K")


@dataclass(frozen=True)
class Line:
    """A kernel of an algorithm, in how many forms it was compiled, and a cell for each target (None: not for it)."""

    algorithm: str
    kernel: str
    forms: int
    cells: tuple[Cell | None, ...]


def bad(kernels: Sequence[Kernel]) -> list[Kernel]:
    """Those that spill or do not compile."""
    return [kernel for kernel in kernels if kernel["status"] != "fits"]


def targets(kernels: Sequence[Kernel]) -> list[str]:
    """In the order of the run."""
    return list(dict.fromkeys(kernel["target"] for kernel in kernels))


def lines(kernels: Sequence[Kernel]) -> list[Line]:
    """Kernels down, targets across."""
    found: dict[tuple[str, str], dict[str, list[Kernel]]] = {}
    for kernel in kernels:
        found.setdefault((kernel["algorithm"], kernel["kernel"]), {}).setdefault(kernel["target"], []).append(kernel)
    across = targets(kernels)
    return [
        Line(*names, max(map(len, by.values())), tuple(_cell(by.get(target, [])) for target in across))
        for names, by in found.items()
    ]


def _cell(kernels: Sequence[Kernel]) -> Cell | None:
    if not kernels:
        return None
    sizes = [[kernel[name] or 0 for kernel in kernels] for name in ("registers", "shared")]
    known = any(kernel["registers"] is not None for kernel in kernels)
    most = [max(size) if known else None for size in sizes]
    return Cell("wrong" if bad(kernels) else "right", *most)


def sentence(kernels: Sequence[Kernel]) -> str:
    """`144 kernels compiled for sm_80, sm_90: all stay in registers`."""
    failing = bad(kernels)
    done = f"{count(len(kernels) - sum(k['status'] == 'error' for k in kernels), 'kernel')} compiled"
    ending = f"{len(failing)} spill or do not compile" if failing else "all stay in registers"
    return f"{done} for {', '.join(targets(kernels)) or 'no target'}: {ending if kernels else 'there is none'}"


def problem(kernel: Kernel) -> str:
    """One that spills, or what the compiler said."""
    where = f"{kernel['kernel']} ({kernel['constants']}) of {kernel['algorithm']} for {kernel['target']}"
    taken = ", ".join(f"{kernel[name]} {name}" for name in ("registers", "local", "stack", "spills"))
    return clean(f"{where}: {kernel['error'] or f'spills ({taken})'}")


def show(kernels: Sequence[Kernel], console: Console) -> None:
    """Print the table, and what spills or does not compile."""
    printed(lambda target: draw(kernels, target), console)


def draw(kernels: Sequence[Kernel], console: Console) -> None:
    """The same on a console that can encode the signs."""
    across = targets(kernels)
    table = simple_table("kernel", "forms", *across, numbers=1 + len(across))
    for line in lines(kernels):
        cells = [
            Text("–", "dim") if cell is None else Text.assemble(mark(cell.status), " ", (cell.text, STYLE[cell.status]))
            for cell in line.cells
        ]
        table.add_row(Text(clean(line.kernel)), str(line.forms), *cells)
    if kernels:
        console.print()
        console.print(table)
        hanging(Text(), CAPTION, console)
    failing = bad(kernels)
    for kernel in failing[:SHOWN]:
        remark("wrong", kernel["status"], problem(kernel), console)
    if len(failing) > SHOWN:
        remark("wrong", "kernels", f"and {count(len(failing) - SHOWN, 'more kernel')}", console)
    remark("wrong" if failing or not kernels else "right", "kernels", sentence(kernels), console)
