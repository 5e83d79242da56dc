"""`python -m benchmarks demo | text | digits | training8bit`: trains a demo, renews picture and numbers of the docs."""

import argparse
from collections.abc import Sequence

from benchmarks import results
from trysquare_conformance.demo import eightbit, run_demo
from trysquare_conformance.demo.comparison import compare
from trysquare_conformance.demo.digits import Digits
from trysquare_conformance.demo.text import SHORT
from trysquare_conformance.demo.training import Task

ASSETS = results.ROOT / "docs" / "assets"
EPOCHS = 400


def main(_: Sequence[str]) -> None:
    run_demo(picture=ASSETS / "demo.png", json=results.path("demo"))


def text(arguments: Sequence[str]) -> None:
    """The short language model of `trysquare demo thorn`."""
    renew(SHORT, "thorn", 300, arguments)


def digits(arguments: Sequence[str]) -> None:
    """The convolutional network of `trysquare demo digits`."""
    renew(Digits(), "digits", 400, arguments)


def training8bit(arguments: Sequence[str]) -> None:
    """What `trysquare demo eightbit` trains."""
    chosen = asked("training8bit", 300, arguments)
    command = f"trysquare demo eightbit --epochs {EPOCHS} --steps {chosen.steps} --seeds {chosen.seeds}"
    picture, numbers = ASSETS / "training8bit.png", results.path("training8bit")
    eightbit.compare(eightbit.experiments(EPOCHS, chosen.steps), chosen.seeds, command, picture, numbers)


def renew(task: Task, name: str, steps: int, arguments: Sequence[str]) -> None:
    """Compare the optimizers on a task, and replace its picture and its numbers."""
    chosen = asked(task.name, steps, arguments)
    command = f"trysquare demo {name} --steps {chosen.steps} --seeds {chosen.seeds}"
    compare(task, chosen.steps, chosen.seeds, command, ASSETS / f"{task.name}.png", results.path(task.name))


def asked(name: str, steps: int, arguments: Sequence[str]) -> argparse.Namespace:
    """For how long, and how often."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=__doc__)
    parser.add_argument("--steps", type=int, default=steps, help="of each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each optimizer")
    return parser.parse_args(arguments)
