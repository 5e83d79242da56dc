"""JUnit and the terminal show what the JSON says and are safe against hostile text."""

import math
import re
from io import BytesIO, StringIO, TextIOWrapper
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from rich.console import Console

from trysquare_conformance import report
from trysquare_conformance.report import html, junit, markdown, summary, text
from trysquare_conformance.report.sample import HOSTILE, checked, hostile, lane, many, result, row


def bad_rows(value: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in value["results"] if row["status"] in summary.BAD]


@pytest.fixture(scope="module")
def wrong() -> dict[str, Any]:
    return many(400, bad=0.1)


def printed(value: dict[str, Any], width: int = 80, **options: Any) -> str:
    stream = StringIO()
    report.terminal(value, Console(file=stream, width=width, **options))
    return stream.getvalue()


CHILDREN = {
    "testsuites": {"testsuite"},
    "testsuite": {"properties", "testcase", "system-out", "system-err"},
    "properties": {"property"},
    "testcase": {"skipped", "failure", "error"},
}
REQUIRED = {
    "testsuite": {"name", "tests", "failures", "errors", "skipped", "time", "timestamp", "hostname", "id", "package"},
    "testcase": {"name", "classname", "time"},
    "property": {"name", "value"},
    "failure": {"type", "message"},
    "error": {"type", "message"},
    "skipped": {"type", "message"},
}


def test_junit_has_the_elements_and_attributes_of_its_schema(wrong: dict[str, Any]) -> None:
    root = ET.fromstring(junit.render(checked(wrong)))  # noqa: S314 - written a line ago
    for element in root.iter():
        assert {child.tag for child in element} <= CHILDREN.get(element.tag, set())
        assert REQUIRED.get(element.tag, set()) <= set(element.attrib)
        if element.tag == "testcase":
            assert len(element) <= 1
        if element.tag == "testsuite":
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", element.get("timestamp", ""))
            order = [child.tag for child in element]
            assert order == sorted(order, key=["properties", "testcase", "system-out", "system-err"].index)


def test_junit_counts_what_it_contains(wrong: dict[str, Any]) -> None:
    root = ET.fromstring(junit.render(checked(wrong)))  # noqa: S314
    for suite in root:
        for attribute, tag in (
            ("tests", "testcase"),
            ("failures", "failure"),
            ("errors", "error"),
            ("skipped", "skipped"),
        ):
            assert int(suite.get(attribute, "")) == len(list(suite.iter(tag)))
    assert len(list(root.iter("testcase"))) == len(wrong["results"]) + 2 + len(wrong["kernels"])


def test_junit_maps_each_status_and_gives_the_reason(wrong: dict[str, Any]) -> None:
    suites = {suite.get("name"): suite for suite in ET.fromstring(junit.render(checked(wrong)))}  # noqa: S314
    assert list(suites) == [*(lane["name"] for lane in wrong["lanes"]), "kernels"]
    outcome = {"wrong": "failure", "error": "error", "could not tell": "error", "expected failure": "skipped"}
    for entry in wrong["results"]:
        case = next(case for case in suites[entry["lane"]].iter("testcase") if case.get("name") == entry["case"])
        assert [child.tag for child in case] == ([outcome[entry["status"]]] if entry["status"] != "right" else [])
        if entry["status"] != "right":
            assert case[0].get("type") == entry["status"]
            assert f"reproduce: {entry['reproduce']}" in (case[0].text or "")
    (absent,) = suites["eager-cuda"].iter("skipped")
    assert absent.get("message") == "torch sees no CUDA or ROCm device"
    compiled = [case[0].tag if len(case) else "" for case in suites["kernels"].iter("testcase")]
    assert compiled == ["", "failure", "", "error"]


def test_junit_survives_a_lane_that_was_not_declared_and_a_strange_date() -> None:
    odd = result([row("a", "other-lane")]) | {"started": "yesterday", "kernels": None}
    suites = ET.fromstring(junit.render(checked(odd)))  # noqa: S314
    assert suites[-1].get("name") == "other-lane"
    assert suites[-1].get("timestamp") == "1970-01-01T00:00:00"


def test_hostile_text_stays_text_in_junit() -> None:
    nasty = checked(hostile(many(40, bad=0.5)))
    suites = ET.fromstring(junit.render(nasty).encode())  # noqa: S314
    assert next(suites.iter("testcase")).get("name", "").endswith(text.clean(HOSTILE))


# Terminal


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_fits_its_width_but_for_what_is_copied(wrong: dict[str, Any], width: int) -> None:
    lines = printed(wrong, width).splitlines()
    copied = ("  $ trysquare verify", "✗ dolphinflow", "! dolphinflow", "✗ stablemax", "! stablemax")
    assert [line for line in lines if len(line) > width and not line.startswith(copied)] == []
    assert "\x1b" not in "".join(lines)


def test_the_terminal_ends_in_the_sentence_and_shows_the_worst_with_their_commands(wrong: dict[str, Any]) -> None:
    output = printed(wrong)
    assert " ".join(output.split()).endswith(wrong["sentence"])
    worst = summary.failures(checked(wrong))[:10]
    assert [line for line in output.splitlines() if line.startswith("  $ ")] == [
        f"  $ {row['reproduce']}" for row in worst
    ]
    assert f"and {len(bad_rows(wrong)) - 10} more failures" in output
    assert "not run here  eager-cuda: torch sees no CUDA or ROCm device" in output
    assert "41 of 44 planted faults caught" in output
    assert "3 kernels compiled for sm_90, gfx942: 2 spill or do not compile" in output


def test_the_terminal_has_colour_only_where_it_is_one(wrong: dict[str, Any]) -> None:
    assert "\x1b[1;31m" in printed(wrong, force_terminal=True, color_system="standard")


def test_many_lanes_are_shown_below_each_other() -> None:
    names = [f"backend{index}-cpu" for index in range(8)]
    found = result([row("dolphinflow/a", name) for name in names]) | {"lanes": [lane(name) for name in names]}
    lines = printed(found).splitlines()
    assert all(any(name in line for line in lines) for name in names)
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_the_terminal_prints_in_any_encoding(encoding: str) -> None:
    buffer = BytesIO()
    stream = TextIOWrapper(buffer, encoding=encoding, errors="strict")
    rows = [row("a/ℓ", "eager-cpu", status="wrong", margin=math.inf)]
    report.terminal(result(rows, "wrong"), Console(file=stream, width=80))
    stream.flush()
    output = buffer.getvalue().decode(encoding)
    assert ("u = 2⁻²⁴" if encoding == "utf-8" else "u = 2^-24") in output
    assert ("✗ a/ℓ" if encoding == "utf-8" else "x a/?") in output


@pytest.mark.parametrize("width", [40, 80])
def test_hostile_text_does_not_reach_the_terminal_as_a_command(width: int) -> None:
    output = printed(hostile(many(40, bad=0.5)), width)
    assert not set(output) & set("\x1b\x00\x85\u202e\ud800\r")


def test_lines_of_an_error_stay_lines() -> None:
    found = result([row("a/b", "eager-cpu", status="error", margin=None)], "could not tell")
    assert "expected scalar type Float\nbut found BFloat16</p>" in html.render(checked(found))
    assert "expected scalar type Float\n          but found BFloat16\n" in printed(found)
    assert "expected scalar type Float\nbut found BFloat16\n" in markdown.render(checked(found))
    assert "expected scalar type Float\nbut found BFloat16\n" in junit.render(checked(found))
