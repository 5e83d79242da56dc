"""Both ways to compile: `torch.compile` around the user's step, and the backend that compiles the updates alone."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._functorch import config as functorch
from torch._inductor import config as inductor
from torch._inductor.utils import run_and_get_cpp_code

from trysquare import THORN, DolphinFlow, _backend, _graphs
from trysquare_conformance.behaviour import (
    Result,
    all_parameters,
    assert_honest,
    bits,
    budgets,
    give_gradients,
    nothing_changes,
    parameters,
    progress,
    resumed,
    run,
)
from trysquare_conformance.budget import assert_same
from trysquare_conformance.lanes import LANES

SHAPES = [(4, 3), (2, 3, 2), (3,)]
STEPS = 1000
WATCHED = (0, 1, 2, 10, 500, 999)
RULES: list[dict[str, Any]] = [
    {"ortho_mode": "matrix"},
    {"ortho_mode": None, "adaptive_lr": False, "weight_decay": 0.1},
    {"project": "update", "bias_correction": False, "momentum": 0.5},
]

MISSING = LANES["compiled-cpu"].available()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"nothing can be compiled here: {MISSING}")


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
    """How many graphs were compiled in this test."""
    return int(counters["stats"]["unique_graphs"])


def breaks() -> dict[str, int]:
    return dict(counters["graph_break"])


def before_step(params: Sequence[Tensor], optimizer: DolphinFlow) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Copies of some parameters and their states."""
    states = [{name: x.clone() for name, x in optimizer.state[p].items()} for p in params if p in optimizer.state]
    return [p.detach().clone() for p in params], states


def assert_honest_step(
    optimizer: DolphinFlow,
    params: Sequence[Tensor],
    before: tuple[list[Tensor], list[dict[str, Tensor]]],
    **settings: Any,
) -> None:
    """What the last step did is within the budget of one step from where it began."""
    weights, states = before
    allowed = budgets(weights, [[p.grad for p in params]], states=states, **settings)
    assert_honest(Result.of(optimizer, params), allowed)


# torch.compile around the step


def test_a_thousand_steps_are_one_graph() -> None:
    """With a scheduled tensor as learning rate, a norm over all gradients, and steps that are skipped."""
    lr = torch.tensor(0.01)
    optimizer = DolphinFlow(parameters(SHAPES), lr=lr, nonfinite="skip")
    params = all_parameters(optimizer)
    step = compiled(optimizer)
    for t in range(STEPS):
        lr.fill_(0.01 * 0.995**t)
        give_gradients(params, seed=t)
        if t in {100, 200}:
            params[0].grad[0, 0] = float("nan")
            with nothing_changes(optimizer, but=("skipped",)):
                step()
            continue
        before = before_step(params, optimizer) if t in WATCHED else None
        step()
        if before is not None:
            assert_honest_step(optimizer, params, before, lr=float(lr))
    assert graphs() <= 2
    assert breaks() == {}
    assert optimizer.skipped_steps == 2
    assert all(optimizer.state[p]["step"] == STEPS - 2 for p in params)


def test_every_rule_compiles_and_equals_eager() -> None:
    groups = [{"params": parameters([(4, 3), (3,)]), **rule} for rule in RULES]
    optimizer = DolphinFlow(groups, lr=0.01, gradient_clipping=None)
    step = compiled(optimizer)
    for t in range(3):
        give_gradients(all_parameters(optimizer), seed=t)
        before = [before_step(group["params"], optimizer) for group in groups]
        step()
        for group, was, rule in zip(groups, before, RULES, strict=True):
            assert_honest_step(optimizer, group["params"], was, lr=0.01, gradient_clipping=None, **rule)
    assert graphs() == 1
    assert breaks() == {}


@pytest.mark.parametrize(
    "make",
    [
        lambda params: DolphinFlow(params, lr=0.1),
        lambda params: THORN([{"params": params, "orthogonalize": False, "none_grad": False}], lr=0.1),
    ],
    ids=["DolphinFlow", "THORN"],
)
def test_a_traced_step_along_transposed_gradients_moves_contiguous_parameters(
    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
) -> None:
    """What is copied for one operand must not take the place of another."""
    generator = torch.Generator().manual_seed(0)
    values, gradients = (torch.randn(2, 6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    stepped = []
    for traced in (False, True):
        params = [torch.nn.Parameter(value.clone()) for value in values]
        for parameter, gradient in zip(params, gradients, strict=True):
            parameter.grad = gradient.mT.contiguous().mT
        optimizer = make(params)
        (compiled(optimizer, backend="eager") if traced else optimizer.step)()
        stepped.append([parameter.detach() for parameter in params])
    for eager, through, before in zip(*stepped, values, strict=True):
        assert_same(through, eager, scale=1.0)
        assert not torch.equal(through, before)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_raising_is_refused_under_compile(fullgraph: bool) -> None:
    optimizer = DolphinFlow(parameters(SHAPES), nonfinite="raise")
    says = "cannot be compiled or captured: use 'skip' or 'propagate'"
    with nothing_changes(optimizer), pytest.raises(RuntimeError, match=says):
        compiled(optimizer, fullgraph=fullgraph, backend="eager")()
    assert not optimizer.state


def test_bad_gradients_are_refused_under_compile() -> None:
    """Also of a step that is traced: the check runs while torch.compile prepares the state."""
    optimizer = DolphinFlow(parameters([(4, 3)]))
    all_parameters(optimizer)[0].grad = torch.eye(4, 3).to_sparse()
    with nothing_changes(optimizer), pytest.raises(Exception, match=r"make it dense with \.to_dense\(\)"):
        compiled(optimizer, backend="eager")()


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torch.optim.AdamW": lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.01), capturable=True),
    "DolphinFlow": lambda params: DolphinFlow(params, lr=torch.tensor(0.01)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torch_cannot_trace_a_step_that_a_scheduler_has_wrapped(name: str) -> None:
    """No optimizer's. When this fails torch has learned it: let schedulers be attached in the documentation then."""
    free, attached = (OPTIMIZERS[name](parameters([(4, 3)])) for _ in range(2))
    compiled(free, backend="eager", fullgraph=False)()
    known = breaks().keys()
    torch.optim.lr_scheduler.StepLR(attached, 2)
    compiled(attached, backend="eager", fullgraph=False)()
    assert breaks().keys() - known


# The backend "compiled"


def backends_since(before: Any) -> set[str]:
    """Which backends have run since."""
    return {backend for (backend, _), count in (_backend.calls - before).items() if count}


@pytest.mark.parametrize("rows", [4, 3], ids=["any", "square"])
def test_one_compilation_carries_many_shapes(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever sizes are equal in the first; and many learning rates, also one that equals another hyperparameter.

    One at a time: how many parameters a call takes is the one thing more that is compiled for.
    """
    monkeypatch.setattr(_graphs, "TOGETHER", 1)
    _graphs.forget()
    before = copy.copy(_backend.calls)
    first = DolphinFlow(parameters([(rows, 3), (3,)]), backend="compiled")
    run(first, 1)
    made = graphs()
    assert 0 < made <= 4
    run(first, 2, first=1)
    for lr in (0.02, first.param_groups[0]["weight_decay"], 0.9, 0.0):
        first.param_groups[0]["lr"] = lr
        run(first, 1)
    for shapes in ([(5, 7), (2, 9), (8,)], [(6, 6), (2, 3, 2, 2), (5, 4, 3)], [(100, 64), (1000,)]):
        other = DolphinFlow(parameters(shapes), lr=0.01, backend="compiled")
        start = [p.detach().clone() for p in all_parameters(other)]
        run(other, 1)
        assert_honest(Result.of(other), budgets(start, [[p.grad for p in all_parameters(other)]], lr=0.01))
    assert graphs() == made
    assert breaks() == {}
    assert backends_since(before) == {"compiled"}


def test_vectors_and_matrices_of_mode_none_share_a_compilation() -> None:
    _graphs.forget()
    for shape in ((5, 7), (9,), (2, 3, 4)):
        run(DolphinFlow(parameters([shape]), ortho_mode=None, backend="compiled"), 2)
    assert graphs() == 1


def test_a_checkpoint_changes_its_backend() -> None:
    """From eager to compiled and back; what was loaded is what goes on."""
    eager = DolphinFlow(parameters([(4, 3), (3,)]), lr=0.01)
    run(eager, 2)
    before = copy.copy(_backend.calls)
    other = resumed(eager, backend="compiled")
    assert progress(other) == progress(eager)
    params = all_parameters(other)
    was = before_step(params, other)
    run(other, 1, first=2)
    assert_honest_step(other, params, was, lr=0.01)
    assert backends_since(before) == {"compiled"}
    assert {plan.backend for plan in other.explain()} == {"compiled"}
    assert progress(resumed(other, backend="eager")) == progress(other)


def test_auto_compiles_nothing() -> None:
    before = copy.copy(_backend.calls)
    optimizer = DolphinFlow(parameters(SHAPES))
    run(optimizer, 2)
    assert graphs() == 0
    assert backends_since(before) == {"eager"}


def test_parameters_of_all_shapes_share_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four, two and one at a time give, bit for bit, what one after the other gives."""
    shapes = [(40, 30), (30,), (40, 30), (50, 20), (24, 60), (50, 20), (8, 5, 30), (40, 30), (90,)]
    stepped = []
    for most, made in ((4, 7), (1, 3)):  # measured and updated in fours, twos and ones; vectors in twos, or in ones
        monkeypatch.setattr(_graphs, "TOGETHER", most)
        _graphs.forget()
        counters.clear()
        optimizer = DolphinFlow(parameters(shapes), backend="compiled", workspace_bytes=1000)
        run(optimizer, 3)
        assert graphs() == made
        stepped.append([bits(p) for p in all_parameters(optimizer)])
    assert stepped[0] == stepped[1]


def test_a_compilation_that_fails_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Callable[..., Any]:
        raise NotImplementedError("no compiler")

    _graphs.forget()
    monkeypatch.setattr(torch, "compile", broken)
    optimizer = DolphinFlow(parameters(SHAPES), backend="compiled")
    before = [bits(p) for p in all_parameters(optimizer)]
    with pytest.raises(NotImplementedError, match="no compiler"):
        optimizer.step()
    assert [bits(p) for p in all_parameters(optimizer)] == before


@pytest.mark.parametrize("shape", [(3, 2), (256, 128)])
def test_loops_over_large_tensors_are_shared_among_threads_and_no_others(shape: tuple[int, int]) -> None:
    """Inductor takes the first shapes that it sees for typical: serial loops would stay so for all that follow."""
    optimizer = DolphinFlow(parameters([shape]), backend="compiled")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    _graphs.forget()
    try:
        with inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
            _, code = run_and_get_cpp_code(optimizer.step)
    finally:
        torch.set_num_threads(threads)
        _graphs.forget()
    kernels = code.split('extern "C"')[1:]
    assert kernels
    assert {"#pragma omp parallel" in kernel for kernel in kernels} == {shape == (256, 128)}
