"""AdamW, Muon beside AdamW, and THORN with AdamW's own lr, betas and decay, on one task from the same weights.

The learning rate is constant for everyone. Muon's is adjusted to AdamW's (`match_rms_adamw`); it steps the matrices of
two dimensions, and AdamW everything else. THORN is evaluated at its training weights y and at the averaged weights x.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

from trysquare import THORN
from trysquare_conformance.machine import describe_machine
from trysquare_conformance.report.console import printed, simple_table

SCHEMA = 1
LR, BETAS, WEIGHT_DECAY = 1e-3, (0.9, 0.99), 0.1
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


def adamw(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)


def muon(model: nn.Module) -> Optimizers:
    """Muon for the matrices that THORN would orthogonalise and that have two dimensions, AdamW for the rest."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    named = {name: p for name, p in model.named_parameters() if id(p) not in embeddings and "lm_head" not in name}
    matrices = [p for p in named.values() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    adjusted = torch.optim.Muon(matrices, lr=LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    return [adjusted, adamw(rest)]


def thorn(model: nn.Module, *, schedule_free: bool = True) -> Optimizers:
    return [THORN(model, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, schedule_free=schedule_free)]


NO_MUON = None if hasattr(torch.optim, "Muon") else f"torch {torch.__version__} has no torch.optim.Muon"
CONTENDERS = (
    Contender("AdamW", lambda model: [adamw(model.parameters())]),
    Contender("Muon + AdamW", muon, NO_MUON),
    Contender("THORN", thorn),
    Contender("THORN, schedule_free=False", lambda model: thorn(model, schedule_free=False)),
)


def evaluate(model: nn.Module, batches: Sequence[Batch]) -> tuple[float, float]:
    """Mean cross-entropy and share of right answers."""
    with torch.no_grad():
        outputs = [(model(x).flatten(0, -2), y.flatten()) for x, y in batches]
        losses = [F.cross_entropy(logits, y).item() for logits, y in outputs]
        right = [(logits.argmax(-1) == y).float().mean().item() for logits, y in outputs]
    return statistics.mean(losses), statistics.mean(right)


def averaged(optimizers: Optimizers) -> AbstractContextManager[Any] | None:
    """With the averaged weights in the model; None where there are none."""
    found = [one for one in optimizers if isinstance(one, THORN)]
    return found[0].averaged() if found and found[0].defaults["schedule_free"] else None


def train(task: Task, contender: Contender, seed: int, steps: int, advance: Callable[[], None]) -> Curve:
    """Train from scratch, and evaluate now and then; the time is that of the training steps alone."""
    model, generator = task.model(seed), torch.Generator().manual_seed(seed)
    optimizers, curve = contender.build(model), Curve(contender.name, seed)
    every = max(1, steps // EVALUATIONS)
    for step in range(1, steps + 1):
        x, y = task.training_batch(generator)
        start = time.perf_counter()
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
        curve.seconds += time.perf_counter() - start
        if step % every == 0 or step == steps:
            curve.steps.append(step)
            record(curve, model, task.held_out, averaged(optimizers))
        advance()
    return curve


def record(curve: Curve, model: nn.Module, batches: Sequence[Batch], mean: AbstractContextManager[Any] | None) -> None:
    """Evaluate both kinds of weights."""
    ways = ((nullcontext(), curve.loss, curve.accuracy), (mean, curve.averaged_loss, curve.averaged_accuracy))
    for context, losses, accuracies in ways:
        if context is not None:
            with context:
                loss, accuracy = evaluate(model, batches)
            losses.append(loss)
            accuracies.append(accuracy)


def compare(
    task: Task,
    steps: int,
    seeds: int,
    command: str,
    picture: Path | None = None,
    json: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train every contender from every seed, print the table, and write the picture and the numbers if asked to."""
    console = console or Console()
    _ = task.held_out  # data that is missing is said before anything is drawn
    able = [one for one in CONTENDERS if one.missing is None]
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        rows = {one.name: bar.add_task(one.name, total=steps * seeds) for one in able}
        curves = [
            train(task, one, seed, steps, lambda row=rows[one.name]: bar.advance(row))  # type: ignore[misc]
            for seed in range(seeds)
            for one in able
        ]
    result = as_result(task, steps, seeds, command, curves)
    printed(lambda aside: show(result, aside), console)
    if picture is not None:
        draw(result, picture)
    if json is not None:
        write_json(result, json)
    return result


def as_result(task: Task, steps: int, seeds: int, command: str, curves: Sequence[Curve]) -> dict[str, Any]:
    size = sum(p.numel() for p in task.model(0).parameters())
    settings = {"lr": LR, "betas": BETAS, "weight_decay": WEIGHT_DECAY}
    return {
        "schema": SCHEMA,
        "command": command,
        "machine": describe_machine(),
        "task": task.name,
        "title": task.title,
        "parameters": size,
        "steps": steps,
        "seeds": seeds,
        **settings,
        "missing": {one.name: one.missing for one in CONTENDERS if one.missing},
        "rows": list(summaries(curves, steps)),
        "curves": [rounded(curve) for curve in curves],
    }


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


def cells(row: dict[str, Any]) -> list[str]:
    """Name, weights, loss and accuracy with their range over the seeds, and time of a step."""
    kinds = {"training": "training (y)" if "THORN" in row["contender"] else "", "averaged": "averaged (x)"}
    accuracy = [100 * share for share in row["accuracy"]]
    return [
        row["contender"],
        kinds[row["weights"]],
        spread(row["loss"], 3),
        spread(accuracy, 1),
        f"{row['step_ms']:.0f}",
    ]


def spread(values: Sequence[float], digits: int) -> str:
    """The mean, and the range where there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f}–{max(values):.{digits}f})"


HEAD = ("optimizer", "weights", "held-out loss", "accuracy, %", "ms a step")


def note(result: dict[str, Any]) -> str:
    """What was trained, and how."""
    seeds = "1 seed" if result["seeds"] == 1 else f"{result['seeds']} seeds, mean (range)"
    betas = ", ".join(f"{beta:g}" for beta in result["betas"])
    return (
        f"{result['title'][0].upper()}{result['title'][1:]}: {result['parameters']:,} parameters, {result['steps']:,} "
        f"steps, {seeds}; lr {result['lr']:g}, betas ({betas}), decay {result['weight_decay']:g} for all."
    )


def show(result: dict[str, Any], console: Console) -> None:
    table = simple_table(*HEAD, numbers=3)
    for row in result["rows"]:
        table.add_row(*cells(row))
    console.print(table)
    console.print(note(result))
    for name, reason in result["missing"].items():
        console.print(f"{name}: not run here, {reason}.")


COLOURS = {"AdamW": "#d55e00", "Muon + AdamW": "#009e73", "THORN": "#0072b2", "THORN, schedule_free=False": "#cc79a7"}


def draw(result: dict[str, Any], path: Path) -> None:
    """Held-out losses over the steps, a line a seed: the same result gives the same file, byte for byte."""
    undated = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    with rc_context({"svg.hashsalt": "trysquare", "font.size": 10}):
        figure = Figure(figsize=(8, 4.2), dpi=150, layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        for curve in result["curves"]:
            name, first = curve["contender"], curve["seed"] == 0
            style: dict[str, Any] = {"color": COLOURS[name], "linewidth": 1.5}
            axes.plot(curve["steps"], curve["loss"], label=name if first else None, **style)
            if curve["averaged_loss"]:
                label = f"{name}, averaged" if first else None
                axes.plot(curve["steps"], curve["averaged_loss"], label=label, linestyle="--", **style)
        axes.set(xlim=(0, result["steps"]), xlabel="step", ylabel="held-out loss", yscale="log")
        axes.set_title(result["title"], loc="left", fontsize=11)
        axes.grid(color="0.92", which="both")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right center", frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata=undated)


def write_json(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
