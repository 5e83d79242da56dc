"""DolphinFlow8bit beside DolphinFlow: what they learn, and what memory they take for it.

Two tasks, modular addition and the language model, without weight decay. DolphinFlow's momentum is a sum, ten times as
long under a steady gradient as the mean that DolphinFlow8bit keeps; so DolphinFlow8bit is trained at DolphinFlow's own
learning rate, as by somebody who only replaces the name, and at ten times it, where both move equally far. There it is
trained once more with its moments left in float32, which tells what the codes cost from what the momentum does.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from torch import nn

from trysquare import DolphinFlow, DolphinFlow8bit, _coded_state
from trysquare_conformance.demo.addition import Addition, percent
from trysquare_conformance.demo.pictures import drawing
from trysquare_conformance.demo.text import SHORT
from trysquare_conformance.demo.training import (
    Contender,
    Curve,
    Optimizers,
    Task,
    backward,
    capital,
    facts,
    quality,
    rounded,
    several,
    summaries,
    train_all,
    write_json,
)
from trysquare_conformance.machine import describe_machine
from trysquare_conformance.memory import peak_bytes, state_bytes
from trysquare_conformance.report.console import printed, simple_table

SCHEMA = 1
ADDITION_LR, TEXT_LR = 1e-3, 1e-4
HEAD = ("task", "optimizer", "lr", "held-out loss", "accuracy, %", "state, bytes", "a parameter", "scratch, MiB")
FIGURES = len(HEAD) - 2


@dataclass(frozen=True)
class Rival:
    """An optimizer, and its learning rate as a multiple of DolphinFlow's."""

    name: str
    optimizer: type[torch.optim.Optimizer]
    factor: int
    colour: str

    def contender(self, lr: float) -> Contender:
        """At a multiple of that learning rate."""
        return Contender(self.name, lambda model: self.build(model, lr))

    def build(self, model: nn.Module, lr: float) -> Optimizers:
        return [self.optimizer(model.parameters(), lr=self.factor * lr, weight_decay=0.0)]  # type: ignore[call-arg]


class Uncoded(DolphinFlow8bit):
    """DolphinFlow8bit with moments in float32, as if every parameter were too small for codes."""

    def step(self, closure: Any = None) -> Any:
        """Take one step."""
        with patch.object(_coded_state, "SMALLEST_CODED", sys.maxsize):
            return super().step(closure)


RIVALS = (
    Rival("DolphinFlow", DolphinFlow, 1, "#0072b2"),
    Rival("DolphinFlow8bit", DolphinFlow8bit, 1, "#e69f00"),
    Rival("DolphinFlow8bit, 10 × lr", DolphinFlow8bit, 10, "#d55e00"),
    Rival("DolphinFlow8bit not coded, 10 × lr", Uncoded, 10, "#009e73"),
)


@dataclass(frozen=True)
class Experiment:
    """A task, for how many steps it is trained, and DolphinFlow's learning rate for it: a tenth of AdamW's."""

    task: Task
    steps: int
    lr: float


def experiments(epochs: int, steps: int) -> tuple[Experiment, ...]:
    """Modular addition for so many epochs, the language model for so many steps."""
    return Experiment(Addition(), epochs, ADDITION_LR), Experiment(SHORT, steps, TEXT_LR)


def compare(
    chosen: Sequence[Experiment],
    seeds: int,
    command: str,
    picture: Path | None = None,
    json: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train every rival on every task from every seed, print the table, and write picture and numbers if asked to."""
    console = console or Console()
    result = {
        "schema": SCHEMA,
        "command": command,
        "machine": describe_machine(),
        "seeds": seeds,
        "experiments": [run(one, seeds, console) for one in chosen],
    }
    printed(lambda aside: show(result, aside), console)
    if picture is not None:
        draw(result, picture)
    if json is not None:
        write_json(result, json)
    return result


def run(experiment: Experiment, seeds: int, console: Console) -> dict[str, Any]:
    """One task: how it is learnt, and what it takes."""
    task, steps = experiment.task, experiment.steps
    console.print(capital(task.title))
    curves = train_all(task, [rival.contender(experiment.lr) for rival in RIVALS], seeds, steps, console)
    return {
        **facts(task, steps),
        "rows": list(rows(experiment, curves)),
        "curves": [rounded(curve) for curve in curves],
    }


def rows(experiment: Experiment, curves: Sequence[Curve]) -> Iterator[dict[str, Any]]:
    """What each has learnt, at which learning rate, with which memory."""
    for rival, summary in zip(RIVALS, summaries(curves, experiment.steps), strict=True):
        learnt = {name: summary[name] for name in ("contender", "loss", "accuracy")}
        yield {**learnt, "lr": rival.factor * experiment.lr, **memory(experiment.task, rival, experiment.lr)}


def memory(task: Task, rival: Rival, lr: float) -> dict[str, int]:
    """Bytes of the state, and the most that a step takes beyond parameters, gradients and state."""
    model = task.model(0)
    (optimizer,) = rival.build(model, lr)
    backward(model, task.training_batch(torch.Generator().manual_seed(0)))
    optimizer.step()
    return {"state_bytes": state_bytes(optimizer), "peak_bytes": peak_bytes(optimizer.step)}


def cells(result: dict[str, Any]) -> Iterator[list[str]]:
    """The lines of the table, as the terminal and the documentation show them."""
    for experiment in result["experiments"]:
        whole = experiment["rows"][0]["state_bytes"]
        for row in experiment["rows"]:
            held = row["state_bytes"]
            share = "" if held == whole else f" ({percent(held / whole, 1)})"
            memory = f"{held:,}{share}", f"{held / experiment['parameters']:.2f}", f"{row['peak_bytes'] / 2**20:.2f}"
            yield [experiment["task"], row["contender"].split(",")[0], f"{row['lr']:g}", *quality(row), *memory]


def note(result: dict[str, Any]) -> str:
    """What was trained, and what was counted."""
    trained = "; ".join(
        f"{one['task']}: {one['title']}, {one['parameters']:,} parameters, {one['steps']:,} steps"
        for one in result["experiments"]
    )
    return (
        f"{capital(trained)}; {several(result['seeds'])}; no weight decay. State is counted from its tensors; scratch "
        "is the most that a step takes beyond parameters, gradients and state."
    )


def show(result: dict[str, Any], console: Console) -> None:
    table = simple_table(*HEAD, numbers=FIGURES)
    for line in cells(result):
        table.add_row(*line)
    console.print(table)
    console.print(note(result))


def draw(result: dict[str, Any], path: Path) -> None:
    """Accuracies over the steps, a panel a task, a line a seed."""
    colours = {rival.name: rival.colour for rival in RIVALS}
    with drawing(path, *(one["title"] for one in result["experiments"])) as panels:
        for axes, one in zip(panels, result["experiments"], strict=True):
            for curve in one["curves"]:
                name, first = curve["contender"], curve["seed"] == 0 and axes is panels[0]
                label = name if first else None
                axes.plot(curve["steps"], curve["accuracy"], color=colours[name], linewidth=1.5, label=label)
            axes.set(xlim=(0, one["steps"]), xlabel="step", ylabel="held-out accuracy")
            axes.yaxis.set_major_formatter(lambda value, _: percent(value))
