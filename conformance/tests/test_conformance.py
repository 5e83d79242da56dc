"""The conformance suite as pytest: the quick cases in both CPU lanes, and whether its verdicts can be believed."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from threading import Event, Timer

import numpy as np
import pytest

import trysquare
from trysquare.ops import moments
from trysquare_conformance import budget, compare, registry, report
from trysquare_conformance import run as running
from trysquare_conformance.case import Case, Outputs, Stage, Wrap
from trysquare_conformance.cases.dolphinflow import SUBJECT, case
from trysquare_conformance.compare import BudgetStore, run_case
from trysquare_conformance.inputs import seed
from trysquare_conformance.lanes import LANES, Lane
from trysquare_conformance.noise import FLOAT32
from trysquare_conformance.noisy import wrapper
from trysquare_conformance.optimizers import FastRun
from trysquare_conformance.planting import Planter
from trysquare_conformance.report.schema import Result, Row
from trysquare_conformance.run import run
from trysquare_conformance.witness import Witness

EAGER, COMPILED = LANES["eager-cpu"], LANES["compiled-cpu"]
SMALL = case("quick", shapes=((12, 10), (7,)), lr=1e-2, steps=2)


@pytest.fixture(scope="module")
def result() -> Result:
    """Of the quick cases; or of a verification of this very code, if one was just made."""
    made = os.environ.get("TRYSQUARE_RESULT")
    if made:
        return report.load(Path(made))
    return run("quick", [lane.name for lane in (EAGER, COMPILED) if lane.available() is None])


@pytest.fixture
def budgets(tmp_path: Path) -> BudgetStore:
    return BudgetStore(tmp_path)


def judged(one: Case, budgets: BudgetStore, lane: Lane = EAGER) -> Row:
    return run_case(registry.ALGORITHMS[one.algorithm], one, lane, budgets, Witness(lane))


@pytest.mark.parametrize("lane", [EAGER, COMPILED], ids=lambda lane: lane.name)
def test_every_quick_case_is_right(result: Result, lane: Lane) -> None:
    if reason := lane.available():
        pytest.skip(reason)
    rows = [row for row in result["results"] if row["lane"] == lane.name]
    wrong = [
        f"{row['status']}: {row['case']}: {row['error'] or row['margin']}" for row in rows if row["status"] != "right"
    ]
    assert wrong == []
    assert [row["case"] for row in rows] == [one.id for one in registry.select(result["tier"], (), lane.name)]


def test_every_lane_that_ran_has_a_witness(result: Result) -> None:
    told = {lane["name"]: lane["witness"] for lane in result["lanes"] if lane["status"] == "ran"}
    assert told
    assert all(backend in str(witness) for name, witness in told.items() for backend in [name.partition("-")[0]])


def test_what_waits_when_a_run_is_interrupted_never_begins() -> None:
    ended, began = Event(), list[int]()
    cores = os.cpu_count() or 1
    with pytest.raises(KeyboardInterrupt), running._pool() as pool:  # noqa: PT012
        held = [pool.submit(ended.wait) for _ in range(cores)]
        waiting = [pool.submit(began.append, number) for number in range(3)]
        Timer(0.1, ended.set).start()  # what runs is waited for
        raise KeyboardInterrupt
    assert all(future.done() for future in held)
    assert all(future.cancelled() for future in waiting)
    assert began == []


def test_the_compiled_lane_stands_beside_the_eager_one(result: Result) -> None:
    beside = [row["yardstick"] for row in result["results"] if row["lane"] == COMPILED.name]
    assert None not in beside
    assert {row["yardstick"] for row in result["results"] if row["lane"] == EAGER.name} == {None}


# The budget proves itself


def in_another_dtype(one: Case, dtype: str) -> list[tuple[budget.Margin, str]]:
    """The margins of a float32 case whose fast code runs in another dtype, from the same numbers."""
    fast = FastRun(SUBJECT, replace(one, dtype=dtype), EAGER)
    margins = []
    for step, ((before, feed), stage) in enumerate(
        zip(SUBJECT.trajectory(one), SUBJECT.stages(one, EAGER), strict=True)
    ):
        allowed = budget.measure(stage.reference, FLOAT32, stage.stored, seed=seed(one.id, step))
        seen: Outputs = fast.teacher_forced(before, feed, fresh=step == 0)
        margins += [(budget.judge(allowed[name], seen[name]), name) for name in allowed]
    return margins


@pytest.mark.parametrize("options", [{}, {"ortho_mode": "matrix"}, {"project": "update"}], ids=str)
def test_twice_the_precision_leaves_a_margin_near_0_and_half_of_it_exceeds_the_budget(options: dict[str, str]) -> None:
    one = case("quick", shapes=((12, 10), (7,)), lr=1e-2, steps=2, **options)
    better, worse = in_another_dtype(one, "float64"), in_another_dtype(one, "bfloat16")
    assert max(margin.worst for margin, _ in better) < 0.01
    assert min(margin.worst for margin, name in worse if name.startswith(("update", "momentum"))) > 10


# Verdicts that can be believed


def test_an_exception_of_the_fast_code_is_an_error_of_its_case(
    budgets: BudgetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("trysquare.DolphinFlow.step", fails)
    row = judged(SMALL, budgets)
    assert (row["status"], row["error"]) == ("error", "RuntimeError: no such kernel")


def test_the_first_divergent_stage_is_named_with_its_worst_entry(budgets: BudgetStore) -> None:
    plant = Planter("dolphinflow")
    plant.add("late", "momentum is lost", moments, "nesterov_", lambda f: lambda m, g, mu: f(m.mul_(0.0), g, mu))
    with plant.faults[-1].planted():
        row = judged(SMALL, budgets)
    assert (row["status"], row["stage"]) == ("wrong", "step 2")
    assert row["worst"] is not None
    assert row["budget"] is not None
    worst, allowed = row["worst"], row["budget"]
    distance = abs(float(worst["fast"]) - float(worst["reference"]))
    assert float(allowed["allowed"]) < distance
    assert float(row["element_margin"] or 0) > 1
    assert allowed["unit_roundoff"] == FLOAT32.elementwise


def test_a_changed_gradient_is_an_error(budgets: BudgetStore, monkeypatch: pytest.MonkeyPatch) -> None:
    step = trysquare.DolphinFlow.step

    def stepped(self: trysquare.DolphinFlow) -> None:
        step(self)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.neg_()

    monkeypatch.setattr("trysquare.DolphinFlow.step", stepped)
    assert "changed the gradient of parameter 0" in str(judged(SMALL, budgets)["error"])


def test_a_reference_is_measured_once_a_run(budgets: BudgetStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first = judged(SMALL, budgets)
    monkeypatch.setattr(compare, "measure", lambda *_, **__: pytest.fail("measured again"))
    assert judged(SMALL, budgets)["margin"] == first["margin"]


def test_what_is_little_wrong_is_judged_by_many_more_draws(budgets: BudgetStore) -> None:
    """A jump that one draw in a hundred makes is right where it can happen, and more wrong than before elsewhere."""
    unit, stored = FLOAT32.elementwise, {"y": budget.STORED["float32"]}

    def margin(jumps: float, which: int) -> tuple[float, int]:
        def reference(wrap: Wrap) -> Outputs:
            noise = np.asarray(wrap(np.ones(1)) * 1.1 / 1.1 - 1) / unit
            return {"y": 1.1 + 0.2 * unit * noise + np.where(noise > jumps, 10 * unit, 0.0)}

        stage = Stage(f"{jumps} {which}", reference, lambda: {"y": np.array([1.1 + 10 * unit])}, stored, FLOAT32, False)
        found = compare._examine(SMALL, stage, None, budgets, Witness(EAGER))
        return found.size, found.budget.draws

    for number in range(3):
        size, draws = margin(1.7, number)
        assert size < 1
        assert draws == 1024
        assert margin(9.0, number)[0] > 5


def test_draws_of_a_free_run_are_not_rounded_after_the_last_step() -> None:
    """Sixteen that are rounded to one number would seem to have no error at all."""
    free = SUBJECT.drift(SMALL, EAGER)
    assert free is not None
    momentum = np.asarray(free.reference(wrapper(FLOAT32, np.random.default_rng(0), 4))["momentum_buffer/0"])
    assert not np.any(momentum == momentum.astype(np.float32))


def test_outputs_that_do_not_fit_the_reference_are_an_error(
    budgets: BudgetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FastRun, "teacher_forced", lambda *_, **__: {"update/0": np.zeros(3)})
    monkeypatch.setattr(Witness, "objection", lambda *_: None)
    row = judged(SMALL, budgets)
    assert row["status"] == "error"
    assert "the reference has" in str(row["error"])


@pytest.mark.parametrize(
    ("lane", "made", "computes", "objection"),
    [
        (EAGER, {"eager": 3}, True, None),
        (EAGER, {}, False, None),
        (EAGER, {}, True, "no call of backend 'eager'"),
        (EAGER, {"eager": 3, "compiled": 1}, True, "compiled ran"),
        (COMPILED, {"compiled": 2, "compiled graph": 2}, True, None),
        (COMPILED, {"compiled": 2}, True, "no compiled graph was run"),
        (COMPILED, {"eager": 2}, True, "eager ran"),
    ],
)
def test_a_witness_objects_to_work_that_its_lane_did_not_do(
    lane: Lane, made: dict[str, int], computes: bool, objection: str | None
) -> None:
    found = Witness(lane).objection(Counter(made), computes)
    assert found is objection if objection is None else objection in str(found)
