"""How the comparisons train: every contender on one task, from the same weights, on the same batches, seed by seed."""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

from trysquare import THORN

EVALUATIONS = 20
Batch: TypeAlias = tuple[Tensor, Tensor]
Optimizers = list[torch.optim.Optimizer]


class Task(Protocol):
    """What is learnt. The generator decides the batches, so that all optimizers see the same ones."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def held_out(self) -> list[Batch]: ...
    def model(self, seed: int) -> nn.Module: ...
    def training_batch(self, generator: torch.Generator) -> Batch: ...


@dataclass(frozen=True)
class Contender:
    """How a model is trained; `missing` is why not here."""

    name: str
    build: Callable[[nn.Module], Optimizers]
    missing: str | None = None


@dataclass
class Curve:
    """One run: held-out loss and accuracy at the given steps, of the training weights and of the averaged ones."""

    contender: str
    seed: int
    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    averaged_loss: list[float] = field(default_factory=list)
    averaged_accuracy: list[float] = field(default_factory=list)
    seconds: float = 0.0


def train_all(task: Task, contenders: Sequence[Contender], seeds: int, steps: int, console: Console) -> list[Curve]:
    """Train everyone from every seed, a bar for each."""
    _ = task.held_out  # data that is missing is said before anything is drawn
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        rows = {one.name: bar.add_task(one.name, total=steps * seeds) for one in contenders}
        return [
            train(task, one, seed, steps, lambda row=rows[one.name]: bar.advance(row))  # type: ignore[misc]
            for seed in range(seeds)
            for one in contenders
        ]


def train(task: Task, contender: Contender, seed: int, steps: int, advance: Callable[[], None]) -> Curve:
    """Train from scratch, and evaluate now and then; the time is that of the training steps alone."""
    model, generator = task.model(seed), torch.Generator().manual_seed(seed)
    optimizers, curve = contender.build(model), Curve(contender.name, seed)
    every = max(1, steps // EVALUATIONS)
    for step in range(1, steps + 1):
        batch = task.training_batch(generator)
        start = time.perf_counter()
        for optimizer in optimizers:
            optimizer.zero_grad()
        backward(model, batch)
        for optimizer in optimizers:
            optimizer.step()
        curve.seconds += time.perf_counter() - start
        if step % every == 0 or step == steps:
            curve.steps.append(step)
            record(curve, model, task.held_out, averaged(optimizers))
        advance()
    return curve


def backward(model: nn.Module, batch: Batch) -> None:
    """The gradients of the mean cross-entropy."""
    x, y = batch
    F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()  # type: ignore[no-untyped-call]


def record(curve: Curve, model: nn.Module, batches: Sequence[Batch], mean: AbstractContextManager[Any] | None) -> None:
    """Evaluate both kinds of weights."""
    ways = ((nullcontext(), curve.loss, curve.accuracy), (mean, curve.averaged_loss, curve.averaged_accuracy))
    for context, losses, accuracies in ways:
        if context is not None:
            with context:
                loss, accuracy = evaluate(model, batches)
            losses.append(loss)
            accuracies.append(accuracy)


def averaged(optimizers: Optimizers) -> AbstractContextManager[Any] | None:
    """With the averaged weights in the model; None where there are none."""
    found = [one for one in optimizers if isinstance(one, THORN)]
    return found[0].averaged() if found and found[0].defaults["schedule_free"] else None


def evaluate(model: nn.Module, batches: Sequence[Batch]) -> tuple[float, float]:
    """Mean cross-entropy and share of right answers."""
    with torch.no_grad():
        outputs = [(model(x).flatten(0, -2), y.flatten()) for x, y in batches]
        losses = [F.cross_entropy(logits, y).item() for logits, y in outputs]
        right = [(logits.argmax(-1) == y).float().mean().item() for logits, y in outputs]
    return statistics.mean(losses), statistics.mean(right)


def facts(task: Task, steps: int) -> dict[str, Any]:
    """What is learnt, how large the model is, and for how long it is trained."""
    size = sum(p.numel() for p in task.model(0).parameters())
    return {"task": task.name, "title": task.title, "parameters": size, "steps": steps}


def summaries(curves: Sequence[Curve], steps: int) -> Iterator[dict[str, Any]]:
    """One for each contender and kind of weights: the last evaluation of every seed."""
    for name in dict.fromkeys(curve.contender for curve in curves):
        mine = [curve for curve in curves if curve.contender == name]
        step_ms = 1e3 * statistics.median(curve.seconds for curve in mine) / steps
        for weights, prefix in (("training", ""), ("averaged", "averaged_")):
            losses = [getattr(curve, f"{prefix}loss")[-1] for curve in mine if getattr(curve, f"{prefix}loss")]
            if losses:
                right = [getattr(curve, f"{prefix}accuracy")[-1] for curve in mine]
                figures = {"loss": losses, "accuracy": right, "step_ms": step_ms}
                yield {"contender": name, "weights": weights, **figures}


def rounded(curve: Curve) -> dict[str, Any]:
    values = vars(curve).items()
    return {k: [round(x, 4) for x in v] if isinstance(v, list) else v for k, v in values} | {
        "seconds": round(curve.seconds, 1)
    }


def spread(values: Sequence[float], digits: int) -> str:
    """The mean, and the range where there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def quality(row: dict[str, Any]) -> list[str]:
    """Held-out loss, and accuracy in percent."""
    return [spread(row["loss"], 3), spread([100 * share for share in row["accuracy"]], 1)]


def capital(title: str) -> str:
    """As a sentence begins."""
    return title[0].upper() + title[1:]


def several(seeds: int) -> str:
    """What the figures are of."""
    return "1 seed" if seeds == 1 else f"{seeds} seeds, mean (range)"


def write_json(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
