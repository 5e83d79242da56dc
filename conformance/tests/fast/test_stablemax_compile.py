"""StableMax under `torch.compile`: one graph, no break, one compilation for many sizes, and results within budget."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from trysquare import DolphinFlow, log_stablemax, stablemax, stablemax_cross_entropy
from trysquare_conformance.budget import judge, measure
from trysquare_conformance.cases.stablemax import SUBJECT, case
from trysquare_conformance.lanes import LANES
from trysquare_conformance.logits import draw
from trysquare_conformance.snapshots import to_array, to_tensor

pytestmark = [
    pytest.mark.skipif(LANES["compiled-cpu"].available() is not None, reason=str(LANES["compiled-cpu"].available())),
    # torch.compile itself makes one of every autograd.Function that it traces
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]
Compiled = tuple[Callable[..., Tensor], CompileCounterWithBackend]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def compiled(function: Callable[..., Tensor], backend: str = "inductor") -> Compiled:
    """The function compiled whole, and the counter of its compilations."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter), counter


def test_the_loss_is_one_graph_for_all_batches_and_within_the_budget() -> None:
    """Of an infinite logit too: inductor folds 0 · x to 0, with which a first version lost its NaN."""
    loss_of, counter = compiled(stablemax_cross_entropy)
    for number, kind in ((12, "gaussian"), (20, "huge"), (33, "inf"), (40, "masked")):
        one = case("quick", shape=(number, 10), inputs=kind, ignored="some")
        feed = draw(one)
        x, target = to_tensor(feed.x, "float32").requires_grad_(), torch.from_numpy(feed.target)
        loss = loss_of(x, target)
        (g,) = torch.autograd.grad(loss, x, to_tensor(feed.g, "float32"))
        (stage,) = SUBJECT.stages(one, LANES["eager-cpu"])
        allowed = measure(stage.reference, stage.arithmetic, stage.stored, seed=number)
        assert judge(allowed["loss"], to_array(loss)).right
        assert judge(allowed["gradient"], to_array(g)).right
    assert counter.frame_count <= 2, "the first size, then all sizes"


@pytest.mark.parametrize(
    "call",
    [
        lambda x: stablemax(x, 1),
        lambda x: log_stablemax(x, -1),
        lambda x: stablemax_cross_entropy(x, x.detach().abs(), torch.ones(x.shape[1]), reduction="none"),
        lambda x: stablemax_cross_entropy(x[0], torch.tensor(1)),
        lambda x: stablemax_cross_entropy(x.unflatten(1, (3, 2)), torch.zeros(4, 2, dtype=torch.int64)),
    ],
    ids=["stablemax", "log_stablemax", "probabilities", "unbatched", "further dimension"],
)
def test_everything_traces_forwards_and_backwards_without_a_break(call: Callable[[Tensor], Tensor]) -> None:
    traced, counter = compiled(call, "aot_eager")
    x = torch.randn(4, 6, requires_grad=True)
    found, expected = traced(x), call(x)
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(result.sum(), x)[0] for result in (found, expected)))
    assert counter.frame_count == 1


class InPlace(TorchDispatchMode):
    """Keeps every tensor that an operation writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for every operation."""
        if func._schema.is_mutable:
            self.written.append(args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: stablemax(x, 1),
        lambda x: log_stablemax(x, 1),
        lambda x: stablemax_cross_entropy(x, torch.arange(4), reduction="none"),
        lambda x: stablemax_cross_entropy(x, torch.arange(4), x[0].exp(), reduction="none", label_smoothing=0.1),
        lambda x: stablemax_cross_entropy(x, x.exp(), reduction="none"),
        lambda x: stablemax_cross_entropy(x, x.exp(), x[0].exp(), reduction="none", label_smoothing=0.1),
    ],
    ids=["stablemax", "log_stablemax", "index", "index, everything", "probabilities", "probabilities, everything"],
)
def test_a_compiler_gets_no_output_that_was_written_in_place(
    call: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch 2.11 makes the gradient of one 0."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with InPlace() as seen:
        output = call(torch.randn(4, 6))
    assert seen.written
    assert output.data_ptr() not in {tensor.data_ptr() for tensor in seen.written}


def test_autocast_is_seen_by_the_compiler() -> None:
    loss_of, _ = compiled(stablemax_cross_entropy, "aot_eager")
    x, target = torch.randn(4, 6, dtype=torch.bfloat16, requires_grad=True), torch.arange(4)
    assert loss_of(x, target).dtype is torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(x, target)
    assert loss.dtype is torch.float32
    assert torch.autograd.grad(loss, x)[0].dtype is torch.bfloat16


def test_a_whole_training_step_compiles_with_it() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4)
    optimizer = DolphinFlow(model.parameters(), lr=torch.tensor(1e-2))
    data, target = torch.randn(16, 8), torch.arange(16) % 4

    def step(data: Tensor, target: Tensor) -> Any:
        optimizer.zero_grad()
        loss = stablemax_cross_entropy(model(data), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    compiled_step = torch.compile(step, backend="aot_eager")
    losses = [float(compiled_step(data, target)) for _ in range(20)]
    assert losses[-1] < losses[0]
