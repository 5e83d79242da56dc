"""`python -m benchmarks demo | text | digits`: trains a demo, and renews the picture and the numbers of the docs."""

import argparse
from collections.abc import Sequence

from benchmarks import results
from trysquare_conformance.demo import run_demo
from trysquare_conformance.demo.comparison import Task, compare
from trysquare_conformance.demo.digits import Digits
from trysquare_conformance.demo.text import SHORT

ASSETS = results.ROOT / "docs" / "assets"


def main(_: Sequence[str]) -> None:
    run_demo(picture=ASSETS / "demo.png", json=results.path("demo"))


def text(arguments: Sequence[str]) -> None:
    """The short language model of `trysquare demo thorn`."""
    renew(SHORT, "thorn", 300, arguments)


def digits(arguments: Sequence[str]) -> None:
    """The convolutional network of `trysquare demo digits`."""
    renew(Digits(), "digits", 400, arguments)


def renew(task: Task, name: str, steps: int, arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {task.name}", description=__doc__)
    parser.add_argument("--steps", type=int, default=steps, help="of each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each optimizer")
    chosen = parser.parse_args(arguments)
    command = f"trysquare demo {name} --steps {chosen.steps} --seeds {chosen.seeds}"
    compare(task, chosen.steps, chosen.seeds, command, ASSETS / f"{task.name}.png", results.path(task.name))
