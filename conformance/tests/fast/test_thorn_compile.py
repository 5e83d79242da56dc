"""Both ways to compile THORN, `torch.compile` around the step and the backend, and what the environment may ask for."""

import copy
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch._dynamo.utils import counters

from trysquare import THORN, _backend, _graphs
from trysquare import thorn as module
from trysquare_conformance.behaviour import all_parameters, bits, give_gradients, nothing_changes, progress, run
from trysquare_conformance.behaviour_thorn import KINDS, budgets, held, resumed, stations, thorn
from trysquare_conformance.budget import judge
from trysquare_conformance.lanes import LANES
from trysquare_conformance.snapshots import to_array

FLOAT32 = {"matmul_dtype": torch.float32}
STEPS = 40
WATCHED = (0, 1, 2, 39)

MISSING = LANES["compiled-cpu"].available()
compiles = pytest.mark.skipif(MISSING is not None, reason=f"nothing can be compiled here: {MISSING}")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Counters of the compiler that start at zero, and no function that silently runs uncompiled."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_cache_limit_hit=True):
        yield


def compiled(
    optimizer: torch.optim.Optimizer, *, fullgraph: bool = True, backend: str = "inductor"
) -> Callable[[], None]:
    """`torch.compile(lambda: optimizer.step())`."""

    def step() -> None:
        optimizer.step()

    return torch.compile(step, fullgraph=fullgraph, backend=backend)


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def assert_honest_step(optimizer: THORN, step: Callable[[], None]) -> None:
    """What a step does to every parameter and state is within the budget of one step from where it began."""
    before = [(group, p, found, to_array(p.grad)) for group, p, found in stations(optimizer) if p.grad is not None]
    step()
    assert before
    for group, p, found, gradient in before:
        now = held(optimizer, p)
        for name, budget in budgets(group, p, found, [gradient]).items():
            assert judge(budget, now[name]).worst <= 1, (name, tuple(p.shape))


# torch.compile around the step


@compiles
@pytest.mark.parametrize(
    ("kinds", "backend"),
    [
        (("matrices", "averaged"), "inductor"),
        (("experts", "adam"), "eager"),
        (("plain matrices", "averaged only"), "eager"),
    ],
)
def test_many_steps_are_one_graph(kinds: Sequence[str], backend: str) -> None:
    """With a scheduled tensor as learning rate and steps that are skipped.

    Each iteration of the polar factor is in the graph once more: two are enough here, and soon compiled. One pair of
    kinds goes through inductor; what it makes of each update by itself is compared below, kind by kind.
    """
    lr = torch.tensor(0.01)
    optimizer = thorn(kinds, lr=lr, nonfinite="skip", none_grad=False, iters=2, **FLOAT32)
    step, params = compiled(optimizer, backend=backend), all_parameters(optimizer)
    give_gradients(params, seed=0)
    step()
    for t in range(1, STEPS):
        lr.fill_(0.01 * 0.95**t)
        give_gradients(params, seed=t)
        if t == 20:
            params[0].grad.view(-1)[0] = float("nan")
            with nothing_changes(optimizer, but=("skipped",)):
                step()
        elif t in WATCHED:
            assert_honest_step(optimizer, step)
        else:
            step()
    assert graphs() <= 2
    assert dict(counters["graph_break"]) == {}
    assert optimizer.skipped_steps == 1
    assert all(optimizer.state[p]["step"] == STEPS - 1 for p in params)


@compiles
def test_gradients_are_let_go_in_a_trace_too() -> None:
    optimizer = thorn(("matrices", "averaged"))
    step = compiled(optimizer, backend="eager")
    for t in range(3):
        give_gradients(all_parameters(optimizer), seed=t)
        step()
        assert all(p.grad is None for p in all_parameters(optimizer))
    assert graphs() <= 2


@compiles
def test_eval_mode_is_refused_in_a_trace_too() -> None:
    optimizer = thorn(("averaged",))
    run(optimizer, 1)
    optimizer.eval()
    give_gradients(all_parameters(optimizer), seed=1)
    before = [bits(p) for p in all_parameters(optimizer)]
    with pytest.raises(Exception, match=r"step\(\) in eval mode"):
        compiled(optimizer, fullgraph=False, backend="eager")()
    assert [bits(p) for p in all_parameters(optimizer)] == before


@compiles
def test_modes_may_change_between_compiled_steps() -> None:
    optimizer = thorn(("averaged", "averaged only"), none_grad=False)
    step = compiled(optimizer, backend="eager")
    run(optimizer, 1)
    for t in range(1, 4):
        give_gradients(all_parameters(optimizer), seed=t)
        with optimizer.averaged():
            pass
        assert_honest_step(optimizer, step)
    assert graphs() <= 2


# The backend


@compiles
@pytest.mark.parametrize("kind", KINDS)
def test_the_compiled_backend_is_honest(kind: str) -> None:
    optimizer = thorn((kind,), backend="compiled", **FLOAT32)
    before = copy.copy(_backend.calls)
    run(optimizer, 2)
    give_gradients(all_parameters(optimizer), seed=3)
    assert_honest_step(optimizer, optimizer.step)
    used = {backend for (backend, _), count in (_backend.calls - before).items() if count}
    assert used == {"compiled"}
    assert {plan.backend for plan in optimizer.explain()} == {"compiled"}


@compiles
@pytest.mark.parametrize("schedule_free", [True, False])
def test_vectors_and_matrices_that_are_not_orthogonalized_share_a_compilation(schedule_free: bool) -> None:
    _graphs.forget()
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((5, 7), (9,), (2, 3, 4), (6, 6))]
    optimizer = THORN([{"params": params, "orthogonalize": False}], schedule_free=schedule_free, backend="compiled")
    run(optimizer, 2)
    assert graphs() == 1


@compiles
def test_a_checkpoint_changes_its_backend() -> None:
    eager = thorn(("matrices", "averaged"))
    run(eager, 2)
    other = resumed(eager, backend="compiled")
    assert progress(other)["state"] == progress(eager)["state"]
    run(other, 1, first=2)
    assert progress(resumed(other, backend="eager"))["state"] == progress(other)["state"]


def test_triton_is_refused_and_not_replaced() -> None:
    with pytest.raises((ValueError, ImportError), match=r"backend='triton': THORN needs .*'eager'"):
        thorn(backend="triton")


# The environment


@pytest.mark.parametrize(("value", "expected"), [("1", "compiled"), ("0", "eager"), ("", "eager"), ("true", "eager")])
def test_the_environment_asks_for_compilation(value: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read where the optimizer is made; it counts only where no backend is named."""
    monkeypatch.setenv("THORN_COMPILE", value)
    if expected == "compiled" and module._asked_to_compile() is False:
        pytest.skip("this machine cannot compile")
    optimizer = thorn()
    assert {plan.backend for plan in optimizer.explain()} == {expected}
    assert {plan.backend for plan in thorn(backend="eager").explain()} == {"eager"}
    monkeypatch.delenv("THORN_COMPILE")
    assert {plan.backend for plan in optimizer.explain()} == {expected}
    assert {plan.backend for plan in copy.deepcopy(optimizer).explain()} == {expected}


@pytest.mark.parametrize(
    ("platform", "cuda", "triton", "says"),
    [
        ("win32", False, True, "needs a compiler that it does not find on Windows"),
        ("linux", True, False, "needs Triton on this GPU, which is not installed"),
    ],
)
def test_a_wish_that_cannot_be_met_is_warned_of(
    platform: str, cuda: bool, triton: bool, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THORN_COMPILE", "1")
    monkeypatch.setattr(module.sys, "platform", platform)
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(module, "find_spec", lambda _: triton or None)
    with pytest.warns(UserWarning, match=f"THORN_COMPILE=1 is not followed: torch.compile {says}"):
        optimizer = thorn(("matrices",))
    monkeypatch.undo()
    run(optimizer, 1)
    assert {plan.backend for plan in optimizer.explain()} == {"eager"}


def test_without_the_variable_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THORN_COMPILE", raising=False)
    run(thorn(), 1)
    assert graphs() == 0


@pytest.mark.parametrize(("value", "runs"), [("0", "triton"), ("1", "eager")])
def test_triton_can_be_turned_off(value: str, runs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where "auto" would choose it, which is simulated here, and only there."""
    monkeypatch.setenv("THORN_DISABLE_TRITON", value)
    choose = _backend.choose
    monkeypatch.setattr(_backend, "choose", lambda name, device: "triton" if name == "auto" else choose(name, device))
    cpu = torch.device("cpu")
    assert thorn()._chosen(cpu) == runs
    assert thorn(backend="compiled")._chosen(cpu) == "compiled"


@pytest.mark.parametrize("statement", ["from thorn import THORN", "from thorn import *"])
def test_the_alias_module_gives_our_class(statement: str) -> None:
    code = f"{statement}\nimport trysquare; print(THORN is trysquare.THORN)"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env={**os.environ})
    assert said.stdout.split() == ["True"]
    assert importlib.import_module("thorn").THORN is THORN
