"""Proof that a lane's own backend did the work, so that a silent fallback is never green."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar
from unittest.mock import patch

import torch

from trysquare import _backend
from trysquare_conformance.lanes import Lane

Result = TypeVar("Result")

GRAPH_RUN = "compiled graph"


class Witness:
    """Watches what the fast code runs: the calls that each backend counts, and the graphs that torch.compile made."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.seen: Counter[str] = Counter()
        if lane.backend == "compiled":
            # a function that gives up on compiling would run eagerly and say nothing: make that an error
            torch._dynamo.config.fail_on_cache_limit_hit = True  # noqa: SLF001

    def watch(self, run: Callable[[], Result]) -> tuple[Result, Counter[str]]:
        """Run, and return beside the result how often each backend was called and a compiled graph was run."""
        before, made = Counter(_backend.calls), Counter[str]()
        with _graph_runs(made) if self.lane.backend == "compiled" else nullcontext():
            result = run()
        for (backend, _), count in (Counter(_backend.calls) - before).items():
            made[backend] += count
        self.seen += made
        return result, made

    def objection(self, made: Counter[str], computes: bool) -> str | None:
        """Why these calls do not prove that the lane's backend ran, or None."""
        own = self.lane.backend
        others = sorted(backend for backend in made if backend not in {own, GRAPH_RUN})
        if others:
            return f"backend {own!r} was asked for and {', '.join(others)} ran"
        if not computes:
            return None
        if not made[own]:
            return f"no call of backend {own!r} was counted: something else produced this result"
        if own == "compiled" and not made[GRAPH_RUN]:
            return "backend 'compiled' counted calls, but no compiled graph was run"
        return None

    def summary(self) -> str:
        """`312 eager calls`, `88 compiled calls, 88 runs of 14 graphs`."""
        own = self.lane.backend
        text = f"{self.seen[own]} {own} calls"
        if own == "compiled":
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]  # noqa: SLF001
            text += f", {self.seen[GRAPH_RUN]} runs of {graphs} graphs"
        return text


@contextmanager
def _graph_runs(made: Counter[str]) -> Iterator[None]:
    """Counts how often the compiled graphs of inductor, which takes seconds to import, are called while it lasts."""
    from torch._inductor.output_code import CompiledFxGraph

    original = CompiledFxGraph.__call__

    def counted(graph: CompiledFxGraph, inputs: Sequence[Any]) -> Any:
        made[GRAPH_RUN] += 1
        return original(graph, inputs)

    with patch.object(CompiledFxGraph, "__call__", counted):
        yield
