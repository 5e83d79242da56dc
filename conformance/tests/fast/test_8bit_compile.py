"""DolphinFlow8bit under `torch.compile`: one graph around the user's step, and the backend that compiles the update."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from trysquare import DolphinFlow8bit, _backend
from trysquare_conformance.behaviour import all_parameters, give_gradients, nothing_changes, parameters, run
from trysquare_conformance.lanes import LANES

SHAPES = ((64, 64), (24,), (17, 256))
MISSING = LANES["compiled-cpu"].available()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"nothing can be compiled here: {MISSING}")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Counters that start at zero, and no function that silently runs uncompiled."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_cache_limit_hit=True):
        yield
    torch._dynamo.reset()


def apart(first: DolphinFlow8bit, second: DolphinFlow8bit) -> float:
    """The largest distance of two parameters, in learning rates."""
    pairs = zip(all_parameters(first), all_parameters(second), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs) / float(first.param_groups[0]["lr"])


def test_steps_of_a_schedule_are_one_graph() -> None:
    """With a tensor as learning rate and a step that is skipped; what is traced is near to what eager does.

    What inductor makes of such a graph is compared in the test of the seed's compiled train step.
    """
    optimizer = DolphinFlow8bit(parameters(SHAPES), lr=torch.tensor(0.01), nonfinite="skip")
    eager = copy.deepcopy(optimizer)

    def take() -> None:
        optimizer.step()

    step = torch.compile(take, fullgraph=True, backend="eager")
    for t in range(20):
        for each in (optimizer, eager):
            each.param_groups[0]["lr"].fill_(0.01 * 0.99**t)
            give_gradients(all_parameters(each), seed=t)
        if t == 10:
            all_parameters(optimizer)[0].grad[0, 0] = float("nan")
            with nothing_changes(optimizer, but=("skipped",)):
                step()
            continue
        step()
        eager.step()
    assert counters["stats"]["unique_graphs"] <= 2
    assert dict(counters["graph_break"]) == {}
    assert apart(optimizer, eager) < 0.01


def test_the_compiled_backend_is_near_to_eager_and_compiled_for_all_rates() -> None:
    before = copy.copy(_backend.calls)
    eager = DolphinFlow8bit(parameters(SHAPES), lr=0.01)
    compiled = DolphinFlow8bit(parameters(SHAPES), lr=0.01, backend="compiled")
    for optimizer in (eager, compiled):
        run(optimizer, 3)
    assert (_backend.calls - before)["compiled", "update_coded_"] > 0
    assert apart(eager, compiled) < 0.01
    graphs = counters["stats"]["unique_graphs"]
    for t in range(5):
        compiled.param_groups[0]["lr"] = 0.01 / (t + 1)
        run(compiled, 1, first=t + 3)
    assert counters["stats"]["unique_graphs"] == graphs
