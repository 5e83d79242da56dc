"""A captured step is the step itself, bit for bit, on a GPU; what changes in between is noticed and taken up."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trysquare import THORN, CapturedStep, DolphinFlow, DolphinFlow8bit, _backend
from trysquare_conformance.behaviour import normal

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA or ROCm device")

SHAPES = ((64, 48), (64, 48), (48,), (), (0, 3), (32, 4, 3, 3), (96, 64))
STEPS = 7
Make = Callable[..., Any]


def parameters(dtype: torch.dtype = torch.float32, least: int = 0) -> list[torch.nn.Parameter]:
    """On the GPU, one of them not contiguous."""
    shapes = [shape for shape in SHAPES if len(shape) >= least]
    made = [torch.nn.Parameter(normal(shape, 0, i, dtype).cuda()) for i, shape in enumerate(shapes)]
    return [*made, torch.nn.Parameter(normal((40, 56), 1, 0, dtype).cuda().mT)]


def dolphinflow(mode: str | None, dtype: torch.dtype = torch.float32) -> Make:
    return lambda **settings: DolphinFlow(parameters(dtype), ortho_mode=mode, **settings)


def thorn(**kind: Any) -> Make:
    return lambda **settings: THORN(
        [{"params": parameters(least=2 if kind["orthogonalize"] else 0), **kind}], **settings
    )


OPTIMIZERS: dict[str, Make] = {
    "DolphinFlow": dolphinflow("vector"),
    "DolphinFlow in bfloat16": dolphinflow("vector", torch.bfloat16),
    "DolphinFlow, matrix": dolphinflow("matrix"),
    "DolphinFlow, plain": dolphinflow(None),
    "DolphinFlow8bit": lambda **settings: DolphinFlow8bit(parameters(), **settings),
    "DolphinFlow8bit, matrix": lambda **settings: DolphinFlow8bit(parameters(), ortho_mode="matrix", **settings),
    "THORN, matrices": thorn(orthogonalize=True, rectify=True, none_grad=False),
    "THORN, averaged": thorn(orthogonalize=False),
    "THORN, adam": thorn(orthogonalize=False, schedule_free=False),
}
BACKENDS = ("eager", "auto")
"""The second is Triton where an algorithm has kernels."""


def give(optimizer: Any, seed: int, *, in_place: bool = False) -> None:
    """Gradients that depend on the seed alone; in new memory, or where the last ones were."""
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            gradient = normal(tuple(p.shape), seed + 100, i, p.dtype).cuda()
            if in_place and p.grad is not None:
                p.grad.copy_(gradient)
            else:
                p.grad = gradient


def set_rate(optimizer: Any, step: int, *, tensors: bool) -> None:
    """A schedule of both numbers."""
    for group in optimizer.param_groups:
        for name, number in (("lr", 0.02 / (step + 1)), ("weight_decay", 0.3 / (step + 2))):
            group[name] = torch.tensor(number, dtype=torch.float64, device="cuda") if tensors else number


def held(optimizer: Any) -> list[Tensor]:
    """Parameters and state, in order, with NaN and the sign of zero as bytes."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [tensor for p in params for tensor in (p, *optimizer.state[p].values())]
    found = [tensor.detach().contiguous().view(-1).view(torch.uint8).cpu() for tensor in tensors]
    return [*found, optimizer.skipped_steps.cpu()]


def assert_same(one: Any, other: Any) -> None:
    for mine, theirs in zip(held(one), held(other), strict=True):
        assert torch.equal(mine, theirs)


def compared(make: Make, change: Callable[[Any, int], None] = lambda *_: None, **settings: Any) -> CapturedStep:
    """A captured run beside an ordinary one with tensors, with the same thing done to both before each step."""
    copied = settings.pop("copy_gradients", True)
    plain, other = make(**settings), make(**settings)
    step = CapturedStep(other, copy_gradients=copied)
    for i in range(STEPS):
        for optimizer in (plain, other):
            give(optimizer, i, in_place=not copied)
            set_rate(optimizer, i, tensors=optimizer is plain)
            change(optimizer, i)
        plain.step()
        step()
        assert_same(plain, other)
    return step


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_step_is_the_uncaptured_one_bit_for_bit(name: str, backend: str, nonfinite: str) -> None:
    step = compared(OPTIMIZERS[name], nonfinite=nonfinite, backend=backend)
    assert step.captures == 1
    assert step.reason == "nothing was captured yet"


@pytest.mark.parametrize("name", ["DolphinFlow", "DolphinFlow8bit", "THORN, matrices"])
def test_gradients_that_stay_are_read_without_a_copy(name: str) -> None:
    assert compared(OPTIMIZERS[name], copy_gradients=False).captures == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_is_passed_over_changes_nothing_in_a_replay(name: str) -> None:
    def spoil(optimizer: Any, i: int) -> None:
        if i in {3, 5}:
            optimizer.param_groups[0]["params"][0].grad[0] = float("nan")

    step = compared(OPTIMIZERS[name], spoil, nonfinite="skip")
    assert step.captures == 1
    assert step.optimizer.skipped_steps == 2


def drop(optimizer: Any, i: int) -> None:
    if i == 3:
        optimizer.param_groups[0]["params"][1].grad = None


def edit_momentum(optimizer: Any, i: int) -> None:
    if i == 3:
        optimizer.param_groups[0]["momentum"] = 0.5


def load(optimizer: Any, i: int) -> None:
    if i == 3:
        optimizer.load_state_dict(optimizer.state_dict())


def swap(optimizer: Any, i: int) -> None:
    if i == 3:
        p = optimizer.param_groups[0]["params"][0]
        p.data = p.data.clone()


def replace_state(optimizer: Any, i: int) -> None:
    if i == 3:
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]
        state["momentum_buffer"] = state["momentum_buffer"] * 0.5


def write_state(optimizer: Any, i: int) -> None:
    if i == 3:
        optimizer.state[optimizer.param_groups[0]["params"][0]]["momentum_buffer"].mul_(0.5)


def add_group(optimizer: Any, i: int) -> None:
    if i == 3:
        made = [torch.nn.Parameter(normal((8, 8), 3).cuda())]
        optimizer.add_param_group({"params": made})
        made[0].grad = normal((8, 8), 4).cuda()


@pytest.mark.parametrize(
    ("change", "captures"),
    [(drop, 2), (edit_momentum, 2), (load, 2), (swap, 2), (replace_state, 2), (write_state, 1), (add_group, 2)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_changes_in_between_is_taken_up(change: Callable[[Any, int], None], captures: int, backend: str) -> None:
    step = compared(OPTIMIZERS["DolphinFlow"], change, backend=backend)
    assert step.captures == captures
    assert (step.reason != "nothing was captured yet") == (captures > 1)


def test_an_ordinary_step_in_between_is_one_step() -> None:
    plain, other = (OPTIMIZERS["DolphinFlow"](lr=0.01) for _ in range(2))
    step = CapturedStep(other)
    for i in range(STEPS):
        for optimizer in (plain, other):
            give(optimizer, i)
            set_rate(optimizer, i, tensors=optimizer is plain or i == 4)
        plain.step()
        (other.step if i == 4 else step)()
        assert_same(plain, other)


def test_thorn_drops_gradients_and_evaluates_in_between() -> None:
    make = thorn(orthogonalize=False)
    plain, other = make(), make()
    step = CapturedStep(other)
    for i in range(STEPS):
        for optimizer in (plain, other):
            give(optimizer, i)
            set_rate(optimizer, i, tensors=optimizer is plain)
        plain.step()
        step()
        assert all(p.grad is None for p in other.param_groups[0]["params"])
        for optimizer in (plain, other):
            optimizer.eval()
        with pytest.raises(RuntimeError, match="in eval mode would train on"):
            step()
        assert_same(plain, other)
        for optimizer in (plain, other):
            optimizer.train()
    assert step.captures == 1


def test_two_optimizers_and_a_stream_of_ones_own() -> None:
    """Neither graph writes into the other's memory."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    pairs = [(make(), make()) for make in (OPTIMIZERS["DolphinFlow"], OPTIMIZERS["THORN, averaged"])]
    steps = [CapturedStep(other) for _, other in pairs]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for i in range(STEPS):
            for (plain, other), step in zip(pairs, steps, strict=True):
                for optimizer in (plain, other):
                    give(optimizer, i)
                    set_rate(optimizer, i, tensors=optimizer is plain)
                plain.step()
                step()
                assert_same(plain, other)
        assert torch.cuda.current_stream() == stream


def test_a_backward_pass_through_old_values_fails() -> None:
    """As after any step: autograd sees that the parameters were written."""
    p = torch.nn.Parameter(torch.ones(4, 4, device="cuda"))
    optimizer = DolphinFlow([p])
    step = CapturedStep(optimizer)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        loss = (p * p).sum()
        step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_capture_within_a_capture_is_refused() -> None:
    optimizer = OPTIMIZERS["DolphinFlow"]()
    step = CapturedStep(optimizer)
    give(optimizer, 0)
    step()
    with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        torch.zeros(1, device="cuda")  # an empty graph would be warned of
        with pytest.raises(RuntimeError, match="another graph is being captured"):
            step()


def test_a_capture_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next call captures."""
    optimizer = OPTIMIZERS["DolphinFlow"]()
    step, stream = CapturedStep(optimizer), torch.cuda.current_stream()
    give(optimizer, 0)
    step()
    before = held(optimizer)
    with monkeypatch.context() as patched:
        patched.setattr(type(optimizer), "_move", lambda *_: torch.cuda.synchronize())
        with pytest.raises(RuntimeError, match=r"a step of DolphinFlow could not be captured .* nothing was changed"):
            step()
    assert torch.cuda.current_stream() == stream
    assert all(map(torch.equal, held(optimizer), before))
    step()
    assert step.captures == 1


def test_a_step_by_kernels_in_someone_elses_graph_is_refused() -> None:
    optimizer = OPTIMIZERS["DolphinFlow"](backend="auto")
    if _backend.choose("auto", torch.device("cuda")) != "triton":
        pytest.skip("Triton does not run on this GPU")
    give(optimizer, 0)
    optimizer.step()
    give(optimizer, 1)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        torch.zeros(1, device="cuda")  # an empty graph would be warned of
        with pytest.raises(RuntimeError, match=r"use trysquare\.CapturedStep"):
            optimizer.step()
