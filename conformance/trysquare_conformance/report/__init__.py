"""Reports: the versioned JSON of a verification and its renderings.

`write` makes a file (json, markdown, html, junit), `terminal` prints, `load` reads a JSON report back and checks it,
`compare` sets two of them side by side; `show_comparison` prints that and `comparison_markdown` writes it as Markdown.
The same result always gives the same bytes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from trysquare_conformance.report import comparison as _comparison
from trysquare_conformance.report import html, junit, markdown
from trysquare_conformance.report import terminal as _terminal
from trysquare_conformance.report.comparison import Comparison
from trysquare_conformance.report.comparison import markdown as comparison_markdown
from trysquare_conformance.report.comparison import show as show_comparison
from trysquare_conformance.report.kernels import show as show_kernels
from trysquare_conformance.report.schema import SCHEMA, KernelReport, Result, SchemaError, dumps, load, plain, validate

__all__ = [
    "SCHEMA",
    "Comparison",
    "Format",
    "Result",
    "SchemaError",
    "compare",
    "comparison_markdown",
    "load",
    "show_comparison",
    "show_kernels",
    "terminal",
    "write",
    "write_kernels",
]

Format = Literal["json", "markdown", "html", "junit"]
_RENDER = {"json": dumps, "markdown": markdown.render, "html": html.render, "junit": junit.render}


def write(result: Mapping[str, Any], path: Path, format: Format) -> None:  # noqa: A002 - it is what the argument is
    """Write one rendering of a result to `path`, whose folder is made if it is not there.

    Raises SchemaError if the result does not fit the schema, before anything is written.
    """
    text = _RENDER[format](validate(plain(result)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def write_kernels(result: KernelReport, path: Path) -> None:
    """Write what `trysquare kernels` found as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dumps(plain(result)), encoding="utf-8", newline="\n")


def terminal(result: Mapping[str, Any], console: Console) -> None:
    """Print a result, the verdict last. Raises SchemaError as `write` does."""
    _terminal.render(validate(plain(result)), console)


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> Comparison:
    """What changed from one result to the other. Raises SchemaError as `write` does."""
    return _comparison.compare(validate(plain(before), "before"), validate(plain(after), "after"))
