"""How the demos draw: white, without a box, and the same file byte for byte from the same numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

TITLE = 80
"""Characters of a title across the whole picture."""


@contextmanager
def drawing(path: Path, *titles: str) -> Iterator[list[Axes]]:
    """Axes beside each other, one for each title, and saved at the end with a legend of everything that has a label.

    The suffix of the path decides the format.
    """
    undated: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    with rc_context({"svg.hashsalt": "trysquare", "font.size": 10}):
        figure = Figure(figsize=(8, 4.2), dpi=150, layout="constrained", facecolor="white")
        panels = [figure.add_subplot(1, len(titles), place) for place in range(1, len(titles) + 1)]
        for axes, title in zip(panels, titles, strict=True):
            axes.set_title(fill(title, TITLE // len(titles)), loc="left", fontsize=11)
            axes.grid(color="0.92", which="both")
            axes.spines[["top", "right"]].set_visible(False)
        yield panels
        legend(figure, panels)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata=undated)


def legend(figure: Figure, panels: list[Axes]) -> None:
    """On the right of one panel, below several."""
    figure.legend(loc="outside right center" if len(panels) == 1 else "outside lower center", frameon=False)
