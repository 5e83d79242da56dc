"""`trysquare compare` finds what changed between two results, and nothing else."""

import copy
import json
import math
import re
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from trysquare_conformance import report
from trysquare_conformance.report import schema
from trysquare_conformance.report.sample import hostile, lane, many, result, row


@pytest.fixture(scope="module")
def wrong() -> dict[str, Any]:
    return many(400, bad=0.1)


@pytest.fixture
def before_and_after() -> tuple[dict[str, Any], dict[str, Any]]:
    before = result([row(f"dolphinflow/{index}", "eager-cpu", margin=0.3) for index in range(6)])
    after = copy.deepcopy(before) | {"verdict": "wrong", "tier": "quick"}
    after["machine"] |= {"torch": "2.14.0", "gpu": "NVIDIA H100"}
    after["lanes"][2] = lane("eager-cuda")
    rows = after["results"]
    rows[0] |= {"status": "wrong", "margin": 4.2}
    rows[1] |= {"margin": 0.9}
    rows[2] |= {"margin": 0.1}
    rows[3] |= {"margin": 0.31}
    rows[5] = row("dolphinflow/9", "eager-cuda")
    return before, after


def test_a_comparison_sorts_out_what_changed(before_and_after: tuple[dict[str, Any], dict[str, Any]]) -> None:
    found = report.compare(*before_and_after)
    assert [change.case for change in found.changed] == ["dolphinflow/0"] == [c.case for c in found.regressions]
    assert [change.case for change in found.moved] == ["dolphinflow/1", "dolphinflow/2"]
    assert [row["case"] for row in found.new] == ["dolphinflow/9"]
    assert [row["case"] for row in found.missing] == ["dolphinflow/5"]
    assert found.same == 2
    assert found.machine == [
        ("GPU", "none", "NVIDIA H100"),
        ("torch", "2.13.0+cpu", "2.14.0"),
        ("Tier", "standard", "quick"),
    ]
    assert [name for name, *_ in found.lanes] == ["eager-cuda"]
    assert found.sentence == (
        "right → wrong: 2 cases as before; 1 verdict changed, 1 of them from right; "
        "2 margins moved by more than a factor of 2; 1 new case; 1 missing case"
    )


def test_a_comparison_is_shown_and_ends_in_its_sentence(
    before_and_after: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    stream = StringIO()
    found = report.compare(*before_and_after)
    report.show_comparison(found, Console(file=stream, width=80))
    output = " ".join(stream.getvalue().split())
    assert output.endswith(found.sentence)
    for said in ("right → wrong (0.300 → 4.20) dolphinflow/0 in eager-cpu", "missing dolphinflow/5", "NVIDIA H100"):
        assert said in output
    assert "\x1b" not in output


def test_a_comparison_as_markdown(before_and_after: tuple[dict[str, Any], dict[str, Any]]) -> None:
    source = report.comparison_markdown(report.compare(*before_and_after))
    assert "| `dolphinflow/0` | eager-cpu | right → wrong (0.300 → 4.20) |" in source
    assert "| torch | 2.13.0+cpu | 2.14.0 |" in source
    nasty = report.compare(hostile(before_and_after[0]), hostile(before_and_after[1]))
    assert set(re.findall(r"<[^>]*>", report.comparison_markdown(nasty))) == {"<code>", "</code>"}


def test_a_result_equals_itself(wrong: dict[str, Any]) -> None:
    nan = copy.deepcopy(wrong)
    nan["results"][0]["margin"] = math.nan
    found = report.compare(nan, json.loads(json.dumps(schema.plain(nan))))
    assert not any((found.changed, found.moved, found.new, found.missing, found.machine, found.lanes))
    assert found.sentence == "still wrong: 400 cases as before"


@pytest.mark.parametrize(
    ("old", "new", "moved"),
    [(0.0, 0.0, False), (0.0, 0.1, True), (0.1, 0.0, True), (0.2, 0.4, False), (0.2, 0.41, True), (None, 0.1, True)],
)
def test_a_margin_that_moved_is_told_from_one_that_did_not(old: float | None, new: float | None, moved: bool) -> None:
    results = [result([row("a", "eager-cpu", margin=margin)]) for margin in (old, new)]
    assert bool(report.compare(*results).moved) is moved
    report.show_comparison(report.compare(*results), Console(file=StringIO()))


def test_a_case_that_became_right_is_no_regression() -> None:
    results = [result([row("a", "eager-cpu", status=status, margin=2.0)]) for status in ("wrong", "right")]
    found = report.compare(*results)
    assert (len(found.changed), found.regressions) == (1, [])


def test_a_comparison_names_the_side_that_does_not_fit() -> None:
    with pytest.raises(report.SchemaError, match="after: not a report"):
        report.compare(result(), {})
