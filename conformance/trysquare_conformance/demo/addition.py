"""`trysquare demo`: networks that memorise modular addition, and networks that understand it.

The task is a + b mod 113. A perceptron 226-200-200-113 (ReLU, no biases) sees 40 % of the 12,769 pairs, all at once in
every epoch, without weight decay; the rest tests whether it has learnt to add. AdamW and DolphinFlow start from the
same weights and see the same pairs, each once with the softmax and once with the StableMax cross-entropy.

The input is the one-hot code of a beside that of b. The product of a weight matrix with such a vector is the sum of two
of its columns, which is how the first layer is computed here: the same numbers, without the multiplications by zero.

References: Power et al. 2022, arXiv 2201.02177 (the task); Prieto et al. 2025, arXiv 2501.04697 (why it takes ⊥Grad).
"""

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn import functional as F

from trysquare import DolphinFlow, stablemax_cross_entropy
from trysquare_conformance.demo.pictures import drawing
from trysquare_conformance.demo.training import Batch
from trysquare_conformance.machine import describe_machine
from trysquare_conformance.report.console import printed, simple_table

SCHEMA = 1
MODULUS = 113
WIDTHS = (2 * MODULUS, 200, 200, MODULUS)
TRAINED_SHARE = 0.4
LEARNT = 0.99
EPOCHS_PER_TEST = 5
SPLIT_SEED = 4

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
LOSSES: dict[str, Loss] = {"softmax": F.cross_entropy, "StableMax": stablemax_cross_entropy}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"AdamW": torch.optim.AdamW, "DolphinFlow": DolphinFlow}


@dataclass(frozen=True)
class Run:
    """What is trained: an optimizer at its learning rate, on a loss."""

    optimizer: str
    loss: str
    lr: float

    @property
    def label(self) -> str:
        """`AdamW, softmax`."""
        return f"{self.optimizer}, {self.loss}"


RUNS = (
    Run("AdamW", "softmax", 1e-2),
    Run("AdamW", "StableMax", 1e-2),
    Run("DolphinFlow", "softmax", 1e-3),
    Run("DolphinFlow", "StableMax", 1e-3),
)


@dataclass(frozen=True)
class RunResult:
    """How it went: accuracies between 0 and 1 at the given epochs, and the time of training and testing."""

    run: Run
    epochs: tuple[int, ...]
    train_accuracy: tuple[float, ...]
    test_accuracy: tuple[float, ...]
    seconds: float

    @property
    def final(self) -> float:
        """The test accuracy after the last epoch."""
        return self.test_accuracy[-1]

    @property
    def best(self) -> float:
        """The highest test accuracy."""
        return max(self.test_accuracy)

    @property
    def learnt_at(self) -> int | None:
        """The first tested epoch with at least 99 % of the test pairs right."""
        reached = (epoch for epoch, accuracy in zip(self.epochs, self.test_accuracy, strict=True) if accuracy >= LEARNT)
        return next(reached, None)


@dataclass(frozen=True)
class DemoResult:
    """All runs of one demo, in the order in which they were trained."""

    epochs: int
    seed: int
    runs: tuple[RunResult, ...]

    @property
    def command(self) -> str:
        """What trains all runs again."""
        return f"trysquare demo --epochs {self.epochs} --seed {self.seed}"


@dataclass(frozen=True)
class Task:
    """All pairs (a, b) as the two columns of the first layer that they select, their sums, and who is trained on."""

    columns: torch.Tensor
    sums: torch.Tensor
    trained: torch.Tensor
    tested: torch.Tensor


def modular_addition(generator: torch.Generator) -> Task:
    """The task with a random split."""
    pairs = torch.cartesian_prod(torch.arange(MODULUS), torch.arange(MODULUS))
    order = torch.randperm(len(pairs), generator=generator)
    trained = int(TRAINED_SHARE * len(pairs))
    columns = pairs + torch.tensor([0, MODULUS])
    return Task(columns, pairs.sum(1) % MODULUS, order[:trained], order[trained:])


def initial_weights(generator: torch.Generator) -> list[torch.nn.Parameter]:
    """Matrices of shape (out, in), Gaussian with variance 1/in, so that no layer amplifies what it gets."""
    shapes = zip(WIDTHS[1:], WIDTHS[:-1], strict=True)
    draws = [torch.randn(shape, generator=generator) / math.sqrt(shape[1]) for shape in shapes]
    return [torch.nn.Parameter(draw) for draw in draws]


def logits(weights: list[torch.nn.Parameter], columns: torch.Tensor) -> torch.Tensor:
    """The network's output for pairs of one-hot inputs, given as the two columns of the first matrix each selects."""
    first, second, third = weights
    hidden = F.embedding_bag(columns, first.t().contiguous(), mode="sum").relu()
    return F.linear(F.linear(hidden, second).relu(), third)


class Perceptron(torch.nn.Module):
    """The network as a module."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(initial_weights(torch.Generator().manual_seed(seed)))

    def forward(self, columns: torch.Tensor) -> torch.Tensor:
        """(pairs, 2) to (pairs, sums)."""
        return logits(list(self.weights), columns)


class Addition:
    """The task as the comparisons take it: one split, and all trained pairs in every step."""

    name, title, device = "addition", "a + b mod 113", "cpu"

    @cached_property
    def task(self) -> Task:
        return modular_addition(torch.Generator().manual_seed(SPLIT_SEED))

    def model(self, seed: int) -> torch.nn.Module:
        return Perceptron(seed)

    def training_batch(self, _: torch.Generator) -> Batch:
        return self.task.columns[self.task.trained], self.task.sums[self.task.trained]

    @cached_property
    def held_out(self) -> list[Batch]:
        """All pairs that are not trained on, at once."""
        return [(self.task.columns[self.task.tested], self.task.sums[self.task.tested])]


def accuracy(output: torch.Tensor, sums: torch.Tensor) -> float:
    """The share of pairs whose largest logit is their sum."""
    return (output.argmax(1) == sums).float().mean().item()


def train(run: Run, epochs: int, seed: int, advance: Callable[[], None]) -> RunResult:
    """Train one network from scratch and test it every few epochs; `advance` is called after each epoch."""
    generator = torch.Generator().manual_seed(seed)
    task, weights = modular_addition(generator), initial_weights(generator)
    optimizer, loss = OPTIMIZERS[run.optimizer](weights, lr=run.lr, weight_decay=0.0), LOSSES[run.loss]
    inputs, targets = task.columns[task.trained], task.sums[task.trained]
    tests = []
    start = time.perf_counter()
    for epoch in range(1, epochs + 1):
        optimizer.zero_grad()
        output = logits(weights, inputs)
        loss(output, targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if epoch % EPOCHS_PER_TEST == 0 or epoch == epochs:
            with torch.no_grad():
                tested = accuracy(logits(weights, task.columns[task.tested]), task.sums[task.tested])
            tests.append((epoch, accuracy(output, targets), tested))
        advance()
    reached, trained, held_out = zip(*tests, strict=True)
    return RunResult(run, reached, trained, held_out, time.perf_counter() - start)


def run_demo(
    epochs: int = 400,
    seed: int = 0,
    picture: Path | None = None,
    json: Path | None = None,
    runs: Iterable[Run] = RUNS,
    console: Console | None = None,
) -> DemoResult:
    """Train all runs with a progress bar, print the table, and write the picture and the numbers if asked to.

    Args:
        epochs: Full-batch steps of each run, at least 1.
        seed: Of the split and of the initial weights, the same for every run.
        picture: Where to draw the accuracies; the suffix decides the format (.png, .svg).
        json: Where to write the result.
        runs: What to train.
        console: Where to print; the standard output by default.

    Raises:
        ValueError: `epochs` is less than 1.
    """
    if epochs < 1:
        raise ValueError(f"epochs={epochs}: must be at least 1")
    console = console or Console()
    chosen = tuple(runs)
    with _progress(console) as bar:
        result = DemoResult(epochs, seed, tuple(_with_bar(bar, run, epochs, seed) for run in chosen))
    printed(lambda aside: _print_table(result, aside), console)
    if picture is not None:
        draw(result, picture)
    if json is not None:
        write_json(result, json)
    return result


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"))
    return Progress(*columns, TimeRemainingColumn(), console=console)


def _with_bar(bar: Progress, run: Run, epochs: int, seed: int) -> RunResult:
    row = bar.add_task(run.label, total=epochs)
    return train(run, epochs, seed, lambda: bar.advance(row))


def percent(share: float, digits: int = 0) -> str:
    """`99.2 %`."""
    return f"{100 * share:.{digits}f} %"


def _print_table(result: DemoResult, console: Console) -> None:
    table = simple_table("optimizer", "loss", "lr", "final", "best", f"first ≥ {percent(LEARNT)}", "seconds", numbers=5)
    for one in result.runs:
        learnt = "–" if one.learnt_at is None else str(one.learnt_at)
        figures = (f"{one.run.lr:g}", percent(one.final, 1), percent(one.best, 1), learnt, f"{one.seconds:.1f}")
        table.add_row(one.run.optimizer, one.run.loss, *figures)
    console.print(table)
    console.print(f"Accuracy on the pairs not trained on, tested every {EPOCHS_PER_TEST} of {result.epochs} epochs.")


def draw(result: DemoResult, path: Path) -> None:
    """Draw the accuracies over the epochs."""
    title = "a + b mod 113, trained on 40 % of the pairs, no weight decay"
    with drawing(path, title) as (axes,):
        for one in result.runs:
            _plot(axes, one)
        axes.set(xlim=(0, result.epochs), ylim=(-0.02, 1.02), xlabel="epoch", ylabel="accuracy")
        axes.yaxis.set_major_formatter(lambda value, _: percent(value))
        axes.plot([], [], color="0.5", linewidth=1, linestyle=":", label="on the trained pairs")


def _plot(axes: Axes, one: RunResult) -> None:
    """A colour an optimizer, a dash a loss; the accuracy on the trained pairs stays in the background."""
    colour = {"AdamW": "#d55e00", "DolphinFlow": "#0072b2"}[one.run.optimizer]
    dash = "-" if one.run.loss == "softmax" else "--"
    axes.plot(one.epochs, one.train_accuracy, color=colour, linewidth=1, linestyle=":", alpha=0.5)
    axes.plot(one.epochs, one.test_accuracy, color=colour, linewidth=2, linestyle=dash, label=one.run.label)


def write_json(result: DemoResult, path: Path) -> None:
    """Write the result with the machine it was made on and the command that makes it again."""
    content = {
        "schema": SCHEMA,
        "command": result.command,
        "machine": describe_machine(),
        "epochs": result.epochs,
        "seed": result.seed,
        "runs": [_as_row(one) for one in result.runs],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _as_row(one: RunResult) -> dict[str, Any]:
    return {
        "optimizer": one.run.optimizer,
        "loss": one.run.loss,
        "lr": one.run.lr,
        "final": one.final,
        "best": one.best,
        "learnt_at": one.learnt_at,
        "seconds": round(one.seconds, 1),
        "epochs": one.epochs,
        "train_accuracy": [round(x, 4) for x in one.train_accuracy],
        "test_accuracy": [round(x, 4) for x in one.test_accuracy],
    }
