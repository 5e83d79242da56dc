"""Which functions a run executes and a fault changes: enough to leave a case out, and never too little."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trysquare import DolphinFlow
from trysquare.ops import blockwise8bit, decay, moments, polar_express
from trysquare_conformance import faults, registry
from trysquare_conformance.compare import BudgetStore
from trysquare_conformance.faults import Sound
from trysquare_conformance.footprint import changed, watched
from trysquare_conformance.lanes import LANES
from trysquare_conformance.rewriting import rewritten


def step() -> None:
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    parameter.grad = torch.ones(3, 2)
    DolphinFlow([parameter]).step()


def test_functions_of_the_fast_code_are_seen_and_no_others() -> None:
    before = sys.getprofile()
    result, seen = watched(step)
    assert result is None
    assert {"decoupled_decay_", "nesterov_", "step"} <= seen
    assert seen.isdisjoint({"newton_schulz", "ones", "watched"})
    assert sys.getprofile() is before


def test_a_run_that_raises_is_watched_no_longer() -> None:
    before = sys.getprofile()
    with pytest.raises(ZeroDivisionError):
        watched(lambda: 1 // 0)
    assert sys.getprofile() is before


def same(original: Any) -> Any:
    return original


def test_a_function_is_what_a_change_of_it_changes() -> None:
    assert changed(moments.nesterov_, same) == {"nesterov_"}
    assert changed(SimpleNamespace(fn=moments.nesterov_), same) == {"nesterov_"}  # as a kernel has it


@pytest.mark.parametrize("original", [blockwise8bit.DECADES, polar_express.coefficients, torch.add, torch, Sound])
def test_what_else_may_change_anything(original: Any) -> None:
    """A constant, a function that remembers, a stranger's, a module that is not ours, a class."""
    assert changed(original, same) is None


def test_a_rewritten_module_changes_the_functions_that_are_others() -> None:
    change = rewritten(("theta.mul_(1 - lr * weight_decay)", "theta.zero_()"))
    assert changed(decay, change) == {"decoupled_decay_"}
    assert changed(decay, rewritten(("def decoupled_decay_", "def gone"))) == {"decoupled_decay_"}
    assert changed(blockwise8bit, rewritten(("DECADES = 7", "DECADES = 6"))) is None


def test_a_case_is_left_out_only_if_it_executes_none_of_them() -> None:
    ran, other, unknown = frozenset("ab"), frozenset("c"), None
    shown = [Sound(right, *rest).may_show(functions) for right, rest, functions in (
        (True, [ran], frozenset("bc")), (True, [unknown], other), (True, [ran], unknown),
        (True, [ran], other), (False, [ran], ran),
    )]  # fmt: skip
    assert shown == [True, True, True, False, False]


def test_compiled_code_and_devices_leave_no_trace() -> None:
    python = {name for name, lane in LANES.items() if lane.is_python}
    assert python == {"eager-cpu", "triton-interpreter", "bitsandbytes-cpu"}


def test_most_faults_say_what_they_change() -> None:
    told = [fault for fault in faults.all_faults() if fault.functions]
    assert len(told) > 0.9 * len(faults.all_faults())
    assert not any(fault.functions == frozenset() for fault in faults.all_faults())


def test_a_case_that_is_left_out_would_not_have_caught_it(tmp_path: Path) -> None:
    """Each fault in the cases that execute nothing of it, which must be right all the same."""
    lane, left_out = LANES["eager-cpu"], 0
    hunt = faults.Hunt(lane, BudgetStore(tmp_path))
    cases = [case for case in registry.select("quick", ["dolphinflow/*"], lane.name) if case.steps <= 2]
    for fault in faults.planted_in(lane, ["dolphinflow/*"])[::4]:
        for case in cases:
            if hunt._sound_run(case).may_show(fault.functions):
                continue
            left_out += 1
            with fault.planted():
                assert hunt._run(case)["status"] == "right", (fault.id, case.id)
    assert left_out > 100
