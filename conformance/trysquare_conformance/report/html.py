"""The HTML report: one file that needs no network, is whole without scripts and prints."""

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from trysquare_conformance.report import kernels, strip, summary, text
from trysquare_conformance.report.schema import Result

HERE = Path(__file__).parent
CARDS = 60  # failures that get a card; the rest get a line each, so that a run in which all is wrong can still be read
FILL = {"wrong": "bad", "error": "bad", "could not tell": "unsure", "not run here": "off"}
LINES = 2000  # of a list, after which the reader is sent to the table of budgets, which has every case
LEVELS = ((0.1, "m1"), (0.3, "m2"), (0.7, "m3"), (1.0, "m4"))


def render(result: Result) -> str:
    """The report as text, the same for the same result."""
    failures = summary.failures(result)
    cards = {(row["lane"], row["case"]): f"f{rank}" for rank, row in enumerate(failures[:CARDS], 1)}
    style, script = _source("report.css"), _source("report.js")
    template = _environment().get_template("report.html.j2")
    return template.render(
        result=result,
        style=style,
        script=script,
        policy=_policy(style, script),
        failures=failures[:CARDS],
        rest=failures[CARDS:],
        plot=strip.plot(result, cards),
        box=strip,
        LINES=LINES,
        summary=summary,
        kernels=kernels,
    )


def _source(name: str) -> Markup:
    return Markup((HERE / name).read_text(encoding="utf-8"))  # noqa: S704 - the package's own file, not the result's text


def _environment() -> Environment:
    """Everything is escaped, and what is printed is first made printable."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    environment.filters |= {
        "figure": text.figure,
        "typeset": text.typeset,
        "exact": text.exact,
        "roundoff": text.roundoff,
        "duration": text.duration,
        "count": text.count,
        "lines": _lines,
        "breaks": _breaks,
        "digits": text.digits,
        "level": level,
        "headline": summary.headline,
    }
    return environment


def _printable(value: Any) -> Any:
    return text.clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _lines(value: str) -> Markup:
    """Text whose lines stay lines, each made printable and escaped."""
    return Markup("\n").join(text.clean_lines(value).split("\n"))


def _breaks(value: str) -> Markup:
    """Text that may be broken after a slash: the names of cases are long."""
    return Markup("/<wbr>").join(text.clean(value).split("/"))


def _policy(style: str, script: str) -> str:
    """Nothing may be loaded, and only this style and this script may act: a text that slipped through stays a text."""
    return f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src {_digest(script)}"


def _digest(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def level(cell: summary.Cell) -> str:
    """The class that colours a cell of the matrix; its number and its mark say the same in text."""
    if cell.status in FILL or cell.margin is None:
        return FILL.get(cell.status, "m1")
    return next((name for bound, name in LEVELS if cell.margin <= bound), "bad")
