"""The command line: exit codes, sentences, lanes that crash, hang or cannot run, and everything typed wrong."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from trysquare_conformance import __main__, cli, lanes, machine, registry, report, run
from trysquare_conformance.compare import row
from trysquare_conformance.process import LaneProcess
from trysquare_conformance.report.schema import Lane, Result, Row
from trysquare_conformance.verdict import EXIT_CODES, verdict

ONE_CASE = "dolphinflow/*/zero-rows/steps=1"
CASES = registry.select("quick")[:3]


def lane_row(name: str = "eager-cpu", reason: str | None = None) -> Lane:
    return run._lane_row(lanes.LANES[name], reason)


def rows(*statuses: str, margin: float | None = 0.5) -> list[Row]:
    return [row(case, "eager-cpu", status=s, margin=margin) for case, s in zip(CASES * 2, statuses, strict=False)]


def command(*arguments: str) -> Any:
    """What the command answers, in this process."""
    return CliRunner().invoke(cli.app, arguments)


def lane_run(code: str, silence: float = 60.0) -> tuple[Lane, list[Row]]:
    """A lane whose process is this Python program."""
    program = [sys.executable, "-c", f"import json, os, sys, time\n{code}"]
    lane = lanes.LANES["eager-cpu"]
    process = LaneProcess(lane.name, lane, CASES, program, lambda *_: None, silence)
    found = process.run()
    return run._lane_row(lane, None, [process]), found


def says(event: str, **fields: Any) -> str:
    return f"print({json.dumps({'event': event, **fields})!r}, flush=True)\n"


# Verdicts


def test_right_tells_how_many_where_and_the_worst_margin() -> None:
    word, sentence = verdict([lane_row()], rows("right", "expected failure"))
    assert word == "right"
    assert sentence == f"Right: 2 cases on eager-cpu; the worst margin is 0.5 in {CASES[0].id} on eager-cpu."


def test_one_wrong_case_makes_it_wrong() -> None:
    word, sentence = verdict([lane_row()], [*rows("error", "right"), *rows("wrong", margin=7.25)])
    assert word == "wrong"
    assert sentence.startswith("Wrong: 1 of 3 cases ")
    assert "7.25" in sentence


@pytest.mark.parametrize("status", ["error", "could not tell"])
def test_a_case_without_an_answer_leaves_the_verdict_open(status: str) -> None:
    found = [{**r, "error": "RuntimeError: boom"} for r in rows("right", status)]
    word, sentence = verdict([lane_row()], found)
    assert word == "could not tell"
    assert "1 of 2 cases" in sentence
    assert "boom" in sentence


def test_no_case_is_never_right() -> None:
    assert verdict([lane_row()], [])[0] == "not run here"
    assert verdict([], []) == ("not run here", "Not run here: no case was selected.")


def test_a_lane_that_was_asked_for_must_run() -> None:
    told = [lane_row(), lane_row("eager-cuda", "no GPU")]
    assert verdict(told, rows("right"))[0] == "right"
    word, sentence = verdict(told, rows("right"), ["eager-cpu", "eager-cuda"])
    assert word == "not run here"
    assert sentence == "Not run here: eager-cuda: no GPU (1 case on other lanes are right)."


def test_a_missed_fault_leaves_the_verdict_open() -> None:
    score: Any = {"caught": 1, "planted": 2, "indistinguishable": [], "missed": [{"name": "a/b"}]}
    word, sentence = verdict([lane_row()], rows("right"), faults=score)
    assert word == "could not tell"
    assert "a/b" in sentence


def test_a_margin_that_is_not_a_number_is_the_worst() -> None:
    found = [*rows("wrong", margin=3.0), *rows("wrong", margin=float("nan"))]
    assert "the worst margin is inf" in verdict([lane_row()], found)[1]


# Lanes that go wrong


def test_a_lane_that_crashes_leaves_an_error_for_every_case_that_it_owes() -> None:
    done = row(CASES[0], "eager-cpu", status="right", margin=0.1)
    code = says("result", result=done) + says("case", case=CASES[1].id)
    lane, found = lane_run(code + "print('out of memory', file=sys.stderr)\nos._exit(9)")
    assert [r["status"] for r in found] == ["right", "error", "error"]
    assert "exit code 9 in this case" in str(found[1]["error"])
    assert "exit code 9 before this case" in str(found[2]["error"])
    assert "out of memory" in str(found[2]["error"])
    assert lane["witness"] is None
    assert verdict([lane], found)[0] == "could not tell"


def test_a_lane_that_ends_early_and_well_still_owes_its_cases() -> None:
    _, found = lane_run(says("end", witness="0 eager calls"))
    assert [r["status"] for r in found] == ["error"] * 3


def test_a_lane_that_hangs_is_stopped() -> None:
    _, found = lane_run(says("case", case=CASES[0].id) + "time.sleep(600)", silence=0.5)
    assert "stopped after 0.5 s of silence in this case" in str(found[0]["error"])


def test_a_lane_that_says_nonsense_is_an_error_and_not_a_traceback() -> None:
    _, found = lane_run("print('Segmentation fault (not really)', flush=True)\ntime.sleep(600)")
    assert {r["status"] for r in found} == {"error"}
    assert "Segmentation fault" in str(found[0]["error"])


# Real runs


@pytest.fixture(scope="module")
def one_case() -> Result:
    return run.run("quick", ["eager-cpu"], [ONE_CASE], command="a test")


def test_a_real_run_is_right_and_says_who_did_the_work(one_case: Result) -> None:
    assert one_case["verdict"] == "right"
    assert [lane["cases"] for lane in one_case["lanes"]] == [1]
    assert str(one_case["lanes"][0]["witness"]).endswith("eager calls")
    assert one_case["results"][0]["reproduce"] == (
        f"trysquare verify --lane eager-cpu --case '{one_case['results'][0]['case']}'"
    )


def test_a_result_can_be_written_in_every_format(one_case: Result, tmp_path: Path) -> None:
    for suffix in ("json", "html", "markdown", "junit"):
        report.write(one_case, tmp_path / f"report.{suffix}", suffix)  # type: ignore[arg-type]
        assert (tmp_path / f"report.{suffix}").stat().st_size > 500
    assert report.load(tmp_path / "report.json")["verdict"] == "right"


def test_the_command_runs_as_a_module_and_draws_by_lot(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    lot = ["--case", "stablemax/*", "--sample", "2", "--seed", "5"]
    arguments = ["verify", "--lane", "eager-cpu", *lot, "--json", str(file)]
    program = [sys.executable, "-m", "trysquare_conformance", *arguments]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Right: 2 cases on eager-cpu" in " ".join(done.stdout.split())
    result = report.load(file)
    assert result["command"].startswith("trysquare verify --lane eager-cpu")
    assert result["tier"] == "quick, 2 of each algorithm by lot 5"
    drawn = registry.select("quick", ["stablemax/*"], "eager-cpu", registry.Lot(2, seed=5))
    assert [row["case"] for row in result["results"]] == [case.id for case in drawn]


# Arguments


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch, one_case: Result) -> Any:
    """Has `verify` find this verdict, and tells what it was asked."""
    asked: list[tuple[Any, ...]] = []

    def answer(word: str) -> list[tuple[Any, ...]]:
        def fake(*arguments: Any) -> Any:
            asked.append(arguments)
            return {**one_case, "verdict": word}

        monkeypatch.setattr(run, "run", fake)
        return asked

    return answer


@pytest.mark.parametrize("word", EXIT_CODES)
def test_only_right_exits_with_0(answers: Any, word: str) -> None:
    answers(word)
    assert command("verify").exit_code == EXIT_CODES[word]  # type: ignore[index]
    assert (EXIT_CODES[word] == 0) == (word == "right")  # type: ignore[index]


@pytest.mark.parametrize(
    ("arguments", "tier"),
    [
        ([], "quick"),
        (["--tier", "exhaustive"], "exhaustive"),
        (["--case", ONE_CASE], "quick"),
        (["--case", registry.select("standard")[-1].id], "standard"),
    ],
)
def test_the_tier_is_the_one_asked_for_or_the_smallest_that_has_the_case(
    answers: Any, arguments: Sequence[str], tier: str
) -> None:
    asked = answers("right")
    command("verify", *arguments)
    assert asked[0][0] == tier


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "--lane", "eager-abacus"], "the lanes are eager-cpu"),
        (["verify", "--tier", "slow"], "slow"),
        (["compare", "no.json", "such.json"], "no.json"),
        (["faults", "--lane", "nowhere"], "the lanes are"),
        (["verify", "--colour"], "--colour"),
    ],
)
def test_what_is_typed_wrong_is_named(arguments: Sequence[str], message: str) -> None:
    done = command(*arguments)
    assert done.exit_code == 2
    assert message in done.output


def test_an_unknown_case_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "smallest_tier", lambda _: None)
    done = command("verify", "--case", "dolphinflow/no/such")
    assert done.exit_code == 2
    assert "no case matches" in done.output


def test_a_lane_that_was_asked_for_and_is_not_here_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = lanes.Lane("eager-mps", "mps", "eager", lambda: "no such device")
    monkeypatch.setitem(lanes.LANES, "eager-mps", absent)
    done = command("verify", "--lane", "eager-mps")
    assert done.exit_code == EXIT_CODES["not run here"]
    assert "Not run here: eager-mps: no such device" in " ".join(done.output.split())


def test_compare_shows_what_changed(one_case: Result, tmp_path: Path) -> None:
    worse = {**one_case, "verdict": "wrong", "results": [{**r, "status": "wrong"} for r in one_case["results"]]}
    for name, result in (("a", one_case), ("b", worse)):
        report.write(result, tmp_path / f"{name}.json", "json")
    a, b = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    assert command("compare", a, a).exit_code == 0
    changed = command("compare", a, b, "--markdown", str(tmp_path / "c.md"))
    assert changed.exit_code == 1
    assert "1 verdict changed" in " ".join(changed.output.split())
    assert "zero-rows" in (tmp_path / "c.md").read_text(encoding="utf-8")


def test_doctor_tells_every_lane_and_which_dolphinflow_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_version", lambda _: "9.9")
    done = command("doctor")
    assert done.exit_code == 0
    assert all(name in done.output for name in lanes.LANES)
    assert "the alias of trysquare" in done.output


def test_an_installed_original_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "dolphinflow").mkdir()
    (tmp_path / "dolphinflow" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "dolphinflow", raising=False)
    assert "wins over the alias" in str(machine.dolphinflow_module())


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(__main__, "NEEDED", ("torch", "no_such_package"))
    with pytest.raises(SystemExit) as left:
        __main__.main()
    assert left.value.code == 2
    assert "no_such_package not found" in (said := capsys.readouterr().err)
    assert 'pip install "trysquare[verify]"' in said


def test_without_a_compiler_the_compiled_lane_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler is not on the PATH" in str(lanes.LANES["compiled-cpu"].available())
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert "cannot compile against Python's headers" in str(lanes.LANES["compiled-cpu"].available())
