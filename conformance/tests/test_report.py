"""Reports: the JSON and its schema, what every rendering draws on, and that the same result gives the same bytes."""

import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from trysquare_conformance import report
from trysquare_conformance.report import html, schema, summary, text
from trysquare_conformance.report.sample import checked, hostile, many, result, row

FORMATS: tuple[report.Format, ...] = ("json", "markdown", "html", "junit")


@pytest.fixture(scope="module")
def wrong() -> dict[str, Any]:
    return many(400, bad=0.1)


def printed(value: dict[str, Any], width: int = 80, **options: Any) -> str:
    stream = StringIO()
    report.terminal(value, Console(file=stream, width=width, **options))
    return stream.getvalue()


def test_json_reads_back_as_it_was_written(tmp_path: Path, wrong: dict[str, Any]) -> None:
    report.write(wrong, tmp_path / "new" / "folder" / "a.json", "json")
    assert report.load(tmp_path / "new" / "folder" / "a.json") == schema.plain(wrong)


def test_json_spells_out_what_json_cannot_write(tmp_path: Path) -> None:
    odd = row("a", "eager-cpu", "float32", "wrong", math.inf) | {"norm_margin": math.nan, "drift_margin": -math.inf}
    odd |= {"yardstick": np.float32(2), "element_margin": np.float64(np.inf)}
    report.write(result([odd]), tmp_path / "a.json", "json")
    found = report.load(tmp_path / "a.json")["results"][0]
    assert [found[key] for key in ("margin", "norm_margin", "drift_margin", "yardstick", "element_margin")] == [
        "inf",
        "nan",
        "-inf",
        2.0,
        "inf",
    ]


def test_json_has_a_line_for_every_case(wrong: dict[str, Any]) -> None:
    lines = schema.dumps(schema.plain(wrong)).splitlines()
    assert sum(line.startswith('{"case"') for line in lines) == 400


@pytest.mark.parametrize("format_", FORMATS)
def test_the_same_result_gives_the_same_bytes(tmp_path: Path, format_: report.Format) -> None:
    """Also in another process, whose sets have another order."""
    code = (
        "import sys; from pathlib import Path; from trysquare_conformance import report\n"
        f"report.write(report.load(Path(sys.argv[1])), Path(sys.argv[2]), {format_!r})"
    )
    report.write(many(40, bad=0.5), tmp_path / "a.json", "json")
    report.write(report.load(tmp_path / "a.json"), tmp_path / "here", format_)
    environment = os.environ | {"PYTHONHASHSEED": "4", "TZ": "Asia/Tokyo", "COLUMNS": "40"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.json", tmp_path / "there"], check=True, env=environment)
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()


def test_nothing_is_written_for_a_result_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(report.SchemaError, match="verdict: missing"):
        report.write({"schema": 1}, tmp_path / "a.html", "html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format_", FORMATS)
def test_a_run_of_no_case_is_rendered(tmp_path: Path, format_: report.Format) -> None:
    nothing = result([], "not run here") | {"faults": None, "lanes": []}
    report.write(nothing, tmp_path / "a", format_)
    assert (tmp_path / "a").stat().st_size > 0
    assert "Not run here: 0 cases" in " ".join(printed(nothing).split())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON report"),
        ("[]", "has no 'schema'"),
        ("{}", "has no 'schema'"),
        ('{"schema": 2}', "newer trysquare .schema 2, this one reads 1.: upgrade"),
        ('{"schema": 0}', "'schema' is 0"),
        ('{"schema": "1"}', "'schema' is '1'"),
        ('{"schema": true}', "'schema' is True"),
        ('{"schema": 1}', "sentence: missing"),
    ],
)
def test_a_file_that_is_no_report_is_named_with_the_reason(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(report.SchemaError, match=message) as error:
        report.load(path)
    assert str(path) in str(error.value)


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key of a result, as the way to it; of a list only its first entry."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield (*path, key)
            yield from paths(entry, (*path, key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield from paths(value[0], (*path, 0))


FREE = ("flags", "indistinguishable")
KEYS = [path for path in paths(result()) if not any(part in FREE for part in path[:-1])]


def owner(value: Any, path: tuple[Any, ...]) -> Any:
    for part in path[:-1]:
        value = value[part]
    return value


def name(path: tuple[Any, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


OPTIONAL = {("schema",), ("faults",), ("kernels",)}


@pytest.mark.parametrize("path", [path for path in KEYS if path not in OPTIONAL], ids=name)
def test_a_missing_or_senseless_value_is_named_by_its_place(path: tuple[Any, ...]) -> None:
    lacking = result()
    del owner(lacking, path)[path[-1]]
    with pytest.raises(report.SchemaError, match=re.escape(f"{name(path)}: missing")):
        schema.validate(lacking)
    senseless = result()
    owner(senseless, path)[path[-1]] = {1: ()} if path[-1] != "flags" else 3
    with pytest.raises(report.SchemaError, match=re.escape(name(path))):
        schema.validate(senseless)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("verdict",), "green", 'verdict: expected "right" or "wrong" or "could not tell"'),
        (
            ("results", 0, "margin"),
            "large",
            'margin: expected a number or "nan" or "inf" or "-inf" or null, found "large"',
        ),
        (("results", 0, "margin"), True, "found true"),
        (("results", 0, "budget", "draws"), 1.5, "results[0].budget.draws: expected a whole number, found 1.5"),
        (("results", 0, "budget"), 3, "results[0].budget: expected an object or null, found 3"),
        (("results",), {}, "results: expected a list, found {}"),
        (("machine", "flags"), "x" * 99, "…"),
    ],
)
def test_what_was_expected_and_what_was_found_is_said(path: tuple[Any, ...], value: Any, message: str) -> None:
    broken = result()
    owner(broken, path)[path[-1]] = value
    with pytest.raises(report.SchemaError, match=re.escape(message)):
        schema.validate(broken)


def test_only_the_first_problems_are_listed() -> None:
    with pytest.raises(report.SchemaError, match="and 30 more"):
        schema.validate(result([row("a", "eager-cpu") | {"lane": 3} for _ in range(40)]))


def test_faults_and_kernels_may_be_absent_and_unknown_keys_are_kept() -> None:
    found = result() | {"later": 1}
    del found["faults"], found["kernels"]
    assert schema.validate(found)["later"] == 1  # type: ignore[typeddict-item]
    page = html.render(checked(found)).split("</style>")[1].split("<footer>")[0]
    assert "planted" not in page
    assert "Compiled ahead of time" not in page


def test_a_cell_takes_the_gravest_status_and_the_worst_margin_with_it() -> None:
    rows = [row("a/1", "eager-cpu", margin=0.3), row("a/2", "eager-cpu", margin=0.7)]
    rows += [row("a/3", "eager-cpu", status="expected failure", margin=1e9)]
    (line,) = summary.matrix(checked(result(rows)))
    assert line.cells[0] == summary.Cell("right", 0.7, "a/2", 3, 0)
    assert line.cells[1] is None
    assert line.cells[2] == summary.Cell("not run here", None, None, 0, 0)
    rows += [row("a/4", "eager-cpu", status="wrong", margin=None)]
    (line,) = summary.matrix(checked(result(rows)))
    assert line.cells[0] == summary.Cell("wrong", None, "a/4", 4, 1)
    assert summary.headline(line.cells[0]) == "wrong"


def test_a_cell_that_could_not_be_told_has_no_number() -> None:
    found = result([row("a/1", "eager-cpu", status="could not tell", margin=0.0)], "could not tell")
    (line,) = summary.matrix(checked(found))
    assert line.cells[0] is not None
    assert summary.headline(line.cells[0]) == "could not tell"
    assert "1  ? could not tell" in printed(found)


def test_the_worst_failure_comes_first_and_a_missing_number_is_worst() -> None:
    margins = [2.0, math.nan, 90.0, math.inf, None]
    rows = [row(f"a/{index}", "eager-cpu", status="wrong", margin=margin) for index, margin in enumerate(margins)]
    rows.append(row("a/9", "eager-cpu", status="error", margin=None))
    found = [entry["case"] for entry in summary.failures(checked(result(rows)))]
    assert found == ["a/1", "a/3", "a/4", "a/2", "a/0", "a/9"]


@pytest.mark.parametrize(
    ("value", "figure", "typeset"),
    [
        (None, "–", "–"),
        (0.0, "0", "0"),
        ("nan", "NaN", "NaN"),
        ("inf", "∞", "∞"),
        ("-inf", "−∞", "−∞"),
        (0.012345, "0.0123", "0.0123"),
        (1.0, "1.00", "1.00"),
        (0.9996, "0.9996", "0.9996"),
        (1.0004, "1.0004", "1.0004"),
        (16.84, "16.8", "16.8"),
        (512, "512", "512"),
        (-2.5, "-2.50", "−2.50"),
        (1234.0, "1.23e3", "1.23 × 10³"),
        (1.2e-7, "1.20e-7", "1.20 × 10⁻⁷"),
    ],
)
def test_a_figure_has_three_digits(value: float | str | None, figure: str, typeset: str) -> None:
    assert (text.figure(value), text.typeset(value)) == (figure, typeset)


def test_small_words() -> None:
    assert [text.roundoff(u) for u in (2.0**-24, 2.0**-8, 3e-5)] == ["2⁻²⁴", "2⁻⁸", "3.00e-5"]
    assert [text.duration(s) for s in (0.42, 12.3, 200.4)] == ["0.42 s", "12 s", "3 min 20 s"]
    assert [text.count(n, "case") for n in (0, 1, 9999, 20000)] == ["0 cases", "1 case", "9999 cases", "20,000 cases"]
    assert text.exact(0.12512341) == "0.12512341"
    assert text.clean("a\x1b[31m\n\u202eb") == "a\\x1b[31m\\n\\u202eb"


def test_hostile_text_reads_back_from_json(tmp_path: Path) -> None:
    nasty = hostile(result())
    report.write(nasty, tmp_path / "a.json", "json")
    assert report.load(tmp_path / "a.json") == nasty
