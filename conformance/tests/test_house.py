"""The house stands as its plan says: who imports whom, what an import costs, and that papers and code say the same."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

import trysquare

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
REFERENCE = sorted((ROOT / "reference" / "trysquare_reference").glob("*.py"))


def fresh_python(code: str) -> list[str]:
    """What a new interpreter prints, by word."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()


def imported_modules(path: Path) -> set[str]:
    """Top-level names of everything that a file imports, wherever in the file."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.split(".")[0] for name in names}


def nox_sessions() -> set[str]:
    """The functions that the noxfile decorates as sessions."""
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {f.name for f in functions if any("nox.session" in ast.unparse(d) for d in f.decorator_list)}


def readme_command(name: str) -> str:
    """The fenced block that follows a marker line."""
    found = re.search(rf"<!-- command: {name} -->\n```bash\n(.*?)```", README, re.DOTALL)
    assert found, f"README.md has no fenced block after <!-- command: {name} -->"
    return found[1]


def test_the_import_contracts_hold(capsys: pytest.CaptureFixture[str]) -> None:
    broken = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert broken == 0, capsys.readouterr().out


@pytest.mark.parametrize("page", REFERENCE, ids=lambda page: page.stem)
def test_the_reference_imports_numpy_and_nothing_else(page: Path) -> None:
    assert imported_modules(page) <= {"numpy", "trysquare_reference", *sys.stdlib_module_names}


def test_importing_trysquare_brings_in_nothing_but_itself() -> None:
    """Beyond a bare `import torch`: no numpy, no Triton, no command line, and nothing that starts the compiler."""
    code = "import sys, torch; before = set(sys.modules); import trysquare; print(*set(sys.modules) - before)"
    added = {name.split(".")[0] for name in fresh_python(code)}
    assert added - set(sys.stdlib_module_names) == {"trysquare"}


def test_the_command_line_imports_only_the_standard_library_until_it_is_used() -> None:
    code = "import sys; import trysquare_conformance.__main__; print(*sys.modules)"
    assert not set(fresh_python(code)) & {"torch", "numpy", "typer", "rich", "jinja2", "matplotlib"}


@pytest.mark.parametrize("statement", ["from dolphinflow import DolphinFlow", "from dolphinflow import *"])
def test_the_alias_module_gives_our_class(statement: str) -> None:
    assert fresh_python(f"{statement}\nimport trysquare; print(DolphinFlow is trysquare.DolphinFlow)") == ["True"]


@pytest.mark.parametrize(("command", "sessions"), [("main", {"verify"}), ("tests", {"lint", "types", "tests"})])
def test_the_commands_of_the_readme_name_sessions_that_exist(command: str, sessions: set[str]) -> None:
    named = set(readme_command(command).split(" -s ")[1].split())
    assert named == sessions
    assert named <= nox_sessions()


def test_the_workflow_names_sessions_that_exist() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    named = re.search(r"session: \[(.*)\]", workflow)
    assert named
    assert set(named[1].split(", ")) <= nox_sessions()


@pytest.mark.parametrize("table", ["demo", "cpu"])
def test_the_readme_has_a_place_for_each_generated_table(table: str) -> None:
    assert re.search(rf"^<!-- table: {table} -->\n(.*\n)*?<!-- /table -->$", README, re.MULTILINE)


def test_the_version_is_the_same_everywhere() -> None:
    version = PROJECT["project"]["version"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert trysquare.__version__ == version
    assert importlib.metadata.version("trysquare") == version
    assert f"\nversion: {version}\n" in citation
    assert re.search(rf"^## {re.escape(version)}\b", changes, re.MULTILINE)


def test_the_tested_torch_versions_are_the_promised_ones() -> None:
    torch = PROJECT["tool"]["trysquare"]["torch"]
    triton = PROJECT["tool"]["trysquare"]["triton"]
    (promised,) = PROJECT["project"]["dependencies"]
    assert f"{torch['oldest']}.".startswith(f"{promised.removeprefix('torch>=')}.")
    assert {torch["oldest"], *torch["between"], torch["default"]} <= set(triton)
    assert triton[torch["oldest"]].startswith(re.findall(r"triton>=([\d.]+)", str(PROJECT["project"]))[0])


def test_every_exception_to_the_rules_carries_its_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = re.findall(r"^(?:ignore|filterwarnings) = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    entries = [line.strip() for block in lists for line in block.splitlines()]
    assert entries
    assert [entry for entry in entries if "#" not in entry and entry != '"error",'] == []
