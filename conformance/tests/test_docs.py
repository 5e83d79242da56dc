"""What the documentation says is true: its snippets run, its tables name what exists."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import trysquare
import trysquare_reference

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SNIPPETS = [
    pytest.param(snippet, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, snippet in enumerate(FENCE.findall(page.read_text(encoding="utf-8")))
]


def rows(path: Path, heading: str) -> list[list[str]]:
    """The cells of each row of the table whose head begins so."""
    lines = iter(path.read_text(encoding="utf-8").splitlines())
    for line in lines:
        if line.startswith(f"| {heading}"):
            break
    next(lines)
    table = []
    for line in lines:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_every_snippet_runs(snippet: str) -> None:
    exec(compile(snippet, "<snippet>", "exec"), {"__name__": "__main__"})  # noqa: S102 - our own documentation
    assert "import" in snippet, "a snippet must be complete: a reader pastes it as it stands"


DIFFERENCES = [row for page in sorted(DOCS.glob("differences*.md")) for row in rows(page, "what")]


@pytest.mark.parametrize("row", DIFFERENCES, ids=lambda row: row[0][:40])
def test_each_difference_names_a_test_that_exists(row: list[str]) -> None:
    named = re.findall(r"`(\S+\.py)::(test_\w+)`", row[-1])
    assert named, f"no test holds the row {row[0]!r}"
    for file, test in named:
        tree = ast.parse((ROOT / "conformance" / "tests" / file).read_text(encoding="utf-8"))
        assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_reference_module_has_its_page() -> None:
    modules = {name for name in trysquare_reference.__all__ if inspect.ismodule(getattr(trysquare_reference, name))}
    pages = {page.stem for page in (DOCS / "reference").glob("*.md")} - {"index"}
    assert pages == modules
    assert all(f"reference/{page}.md" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8") for page in pages)


def test_the_readme_lists_every_argument_with_its_default() -> None:
    signature = inspect.signature(trysquare.DolphinFlow).parameters
    expected = {name: p.default for name, p in signature.items() if name not in ("self", "params")}
    listed: dict[str, object] = {}
    for names, defaults, *_ in rows(ROOT / "README.md", "argument"):
        found = zip(re.findall(r"`(.*?)`", names), [*re.findall(r"`(.*?)`", defaults), *["None"]], strict=False)
        listed |= {name: ast.literal_eval(default) for name, default in found}
    assert listed == expected
    assert list(listed) == list(expected)
