"""Planted faults: they are caught, nothing of them stays, and a suite that misses one does not pass."""

import inspect
import shutil
from dataclasses import replace
from fnmatch import fnmatchcase
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from trysquare.ops import decay, moments
from trysquare_conformance import catchers, faults, registry
from trysquare_conformance.compare import BudgetStore
from trysquare_conformance.lanes import LANES
from trysquare_conformance.planting import Fault, Planter
from trysquare_conformance.rewriting import rewritten

FAULTS = faults.all_faults()


def planted(change: str, **options: str) -> Fault:
    """A fault that is there (`decay` missing) or none at all (`nothing`)."""
    plant = Planter("dolphinflow")
    what = {"decay": lambda _: lambda theta, *__: theta, "nothing": lambda original: original}[change]
    plant.add(change, f"{change} for a test", decay, "decoupled_decay_", what, **options)
    return plant.faults[0]


def outcomes(monkeypatch: pytest.MonkeyPatch, *those: Fault) -> list[faults.Outcome]:
    """What becomes of these faults in eager-cpu, looked for by one case of one step."""
    monkeypatch.setattr(faults, "all_faults", lambda: those)
    chosen = list(faults.registry.select("quick", ["dolphinflow/*/zero-rows/*"]))
    monkeypatch.setattr(faults.registry, "select", lambda *_: chosen)
    return faults.run(["eager-cpu"])


def test_faults_have_names_of_their_own_and_say_what_they_do() -> None:
    assert len({fault.id for fault in FAULTS}) == len(FAULTS)
    assert [fault.id for fault in FAULTS if not fault.what or " " in fault.name] == []
    assert len([fault for fault in FAULTS if fault.algorithm == "dolphinflow"]) >= 30


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_a_fault_changes_something_that_exists_and_leaves_it_as_it_was(fault: Fault) -> None:
    before = inspect.getattr_static(fault.owner, fault.attribute)
    with fault.planted():
        assert inspect.getattr_static(fault.owner, fault.attribute) is not before
    assert inspect.getattr_static(fault.owner, fault.attribute) is before
    assert any(fnmatchcase(name, glob) for name in LANES for glob in fault.lanes)


def test_a_fault_is_taken_back_when_the_code_raises() -> None:
    before = moments.nesterov_
    with pytest.raises(ZeroDivisionError), planted("decay").planted():
        raise ZeroDivisionError
    assert moments.nesterov_ is before


def test_a_caught_fault_names_the_case_that_caught_it(monkeypatch: pytest.MonkeyPatch) -> None:
    (outcome,) = outcomes(monkeypatch, planted("decay"))
    assert outcome.good
    assert outcome.caught is not None
    assert "zero-rows" in outcome.caught["case"]
    assert faults.score([outcome]) == {"caught": 1, "planted": 1, "indistinguishable": [], "missed": []}


def test_a_missed_fault_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    (outcome,) = outcomes(monkeypatch, planted("nothing"))
    score = faults.score([outcome])
    assert not outcome.good
    assert (score["caught"], [entry["name"] for entry in score["missed"]]) == (0, ["dolphinflow/nothing"])


def test_an_indistinguishable_fault_must_stay_so(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, seen = outcomes(
        monkeypatch,
        planted("nothing", indistinguishable="it does nothing"),
        planted("decay", indistinguishable="nobody would notice"),
    )
    score = faults.score([hidden, seen])
    assert (hidden.good, seen.good) == (True, False)
    assert [entry["reason"] for entry in score["indistinguishable"]] == ["it does nothing"]
    assert "tells it apart" in score["missed"][0]["reason"]


def test_the_score_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    text = StringIO()
    faults.show(outcomes(monkeypatch, planted("decay"), planted("nothing")), Console(file=text, width=200))
    assert "1 of 2 planted faults caught, 0 indistinguishable, 1 missed" in text.getvalue()


def test_a_lane_that_cannot_run_plants_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lane = LANES["compiled-cpu"]
    monkeypatch.setitem(LANES, lane.name, type(lane)(lane.name, lane.device, lane.backend, lambda: "no compiler"))
    with pytest.raises(RuntimeError, match="compiled-cpu cannot run here: no compiler"):
        faults.run(["compiled-cpu"])


def test_a_fault_is_looked_for_first_where_it_was_caught_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chosen = [case for case in registry.select("quick", ["dolphinflow/*"], "eager-cpu") if case.steps == 1][-1]
    fault = planted("decay")
    assert outcomes(monkeypatch, fault)[0].caught["case"] != chosen.id  # type: ignore[index]
    monkeypatch.undo()
    monkeypatch.setattr(catchers, "remembered", lambda _: {fault.id: chosen.id})
    caught = faults.Hunt(LANES["eager-cpu"], BudgetStore(tmp_path)).catch(fault)
    assert caught is not None
    assert caught["case"] == chosen.id


@pytest.mark.parametrize("lane", catchers.read(catchers.FILE))
def test_what_is_remembered_of_faults_and_cases_exists(lane: str) -> None:
    """Else it would be no help: `trysquare faults --catchers` writes it anew."""
    remembered = catchers.remembered(lane)
    assert remembered.keys() <= {fault.id for fault in FAULTS}
    assert set(remembered.values()) <= {case.id for case in faults.tried(LANES[lane], "quick")}


def test_a_lane_without_a_memory_uses_that_of_the_eager_one() -> None:
    assert catchers.remembered("eager-cuda") == catchers.remembered("eager-cpu") != {}


def test_remembering_some_faults_forgets_no_others(tmp_path: Path) -> None:
    file = tmp_path / "catchers.json"
    catchers.write(file, [("eager-cpu", "a", "1"), ("eager-cpu", "b", "2")])
    catchers.write(file, [("eager-cpu", "b", "3"), ("compiled-cpu", "a", "4")])
    assert catchers.read(file) == {"compiled-cpu": {"a": "4"}, "eager-cpu": {"a": "1", "b": "3"}}


def test_a_kernels_fault_is_caught_in_a_process_of_its_lane() -> None:
    if LANES["triton-interpreter"].available():
        pytest.skip("Triton is not installed: it has wheels for Linux only")
    (outcome,) = faults.run(["triton-interpreter"], ["dolphinflow/kernel-no-decay"])
    assert outcome.caught is not None
    assert (outcome.caught["lane"], outcome.caught["status"]) == ("triton-interpreter", "wrong")


def test_a_process_that_plants_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(faults.sys, "executable", shutil.which("false"))
    monkeypatch.setitem(LANES, "eager-cpu", replace(LANES["eager-cpu"], environment=(("TRYSQUARE_NOWHERE", "1"),)))
    with pytest.raises(RuntimeError, match="ended with exit code 1, and dolphinflow/decay-missing was not"):
        faults.run(["eager-cpu"], ["dolphinflow/decay*"], budgets=tmp_path)


def test_a_rewritten_module_has_the_mistake_and_refuses_a_text_that_is_gone() -> None:
    made = rewritten(("theta.mul_(1 - lr * weight_decay)", "theta.zero_()"))(decay)
    assert float(made.decoupled_decay_(torch.ones(()), 0.1, 0.1)) == 0
    assert float(decay.decoupled_decay_(torch.ones(()), 0.0, 0.1)) == 1
    with pytest.raises(ValueError, match=r"trysquare.ops.decay has no 'no such line'"):
        rewritten(("no such line", ""))(decay)
