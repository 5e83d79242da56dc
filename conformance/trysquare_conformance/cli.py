"""The command line: trysquare verify, compare, faults, kernels, demo, doctor. Only a right verdict exits with 0."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from trysquare_conformance import report
from trysquare_conformance.case import TIERS

if TYPE_CHECKING:
    from trysquare_conformance.demo.training import Task

app = typer.Typer(
    name="trysquare", no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help=__doc__
)
demos = typer.Typer()
app.add_typer(demos, name="demo")
Tier = StrEnum("Tier", {tier: tier for tier in TIERS})  # type: ignore[misc]  # the tiers are named once, in `case`
Files = Annotated[Path | None, typer.Option(metavar="FILE", dir_okay=False)]
LaneNames = Annotated[list[str] | None, typer.Option("--lane", metavar="NAME", help="a lane; may be given again")]
Device = Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, …: what torch.device takes")]
Globs = Annotated[list[str] | None, typer.Option("--case", metavar="GLOB", help="case ids to run; may be given again")]


@app.command()
def verify(
    tier: Annotated[Tier | None, typer.Option(help="how much to run; by default quick, or what --case needs")] = None,
    lane: LaneNames = None,
    case: Globs = None,
    sample: Annotated[int | None, typer.Option(min=1, help="run so many cases of each algorithm, by lot")] = None,
    seed: Annotated[int, typer.Option(help="of the lot")] = 0,
    json: Files = None,
    html: Files = None,
    markdown: Files = None,
    junit: Files = None,
    faults: Annotated[
        bool, typer.Option("--faults", help="plant faults too, in eager-cpu and triton-interpreter")
    ] = False,
    kernels: Annotated[bool, typer.Option("--kernels", help="compile all kernels too, as `trysquare kernels`")] = False,
) -> None:
    """Check the fast code against the reference on this machine and say in one sentence whether it is right."""
    from trysquare_conformance.machine import ALIAS
    from trysquare_conformance.registry import Lot
    from trysquare_conformance.run import run
    from trysquare_conformance.verdict import EXIT_CODES

    console, command = Console(), shlex.join(["trysquare", *sys.argv[1:]])
    chosen = _tier(tier, case)
    if kernels:
        _check_targets([])
    with _progress() as progress:
        planted, lot = _fault_lanes() if faults else [], None if sample is None else Lot(sample, seed)
        result = run(chosen, _lanes(lane), case or (), progress, command, planted, kernels, lot)
    formats: dict[report.Format, Path | None] = {"json": json, "html": html, "markdown": markdown, "junit": junit}
    for format_, file in formats.items():
        if file is not None:
            report.write(result, file, format_)
    report.terminal(result, console)
    if result["machine"]["dolphinflow_module"] not in {None, ALIAS}:
        console.print(f"`import dolphinflow` finds {result['machine']['dolphinflow_module']}.", highlight=False)
    raise typer.Exit(EXIT_CODES[result["verdict"]])


@app.command()
def compare(before: Path, after: Path, markdown: Files = None) -> None:
    """Show what changed between two JSON reports: verdicts, margins, machines."""
    try:
        comparison = report.compare(report.load(before), report.load(after))
    except (report.SchemaError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    if markdown is not None:
        markdown.write_text(report.comparison_markdown(comparison), encoding="utf-8")
    report.show_comparison(comparison, Console())
    raise typer.Exit(1 if comparison.regressions else 0)


@app.command("faults")
def plant_faults(
    lane: LaneNames = None,
    fault: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="faults to plant; may be given again")] = None,
    catchers: Files = None,
) -> None:
    """Plant faults into the fast code and see whether the suite catches each: the proof that it can fail.

    --catchers writes which case caught each, to be tried first the next time.
    """
    from trysquare_conformance import catchers as memory
    from trysquare_conformance import faults as planted

    console = Console()
    with _progress() as progress:
        outcomes = planted.run(_lanes(lane) or ["eager-cpu"], fault or ["*"], progress)
    planted.show(outcomes, console)
    if catchers is not None:
        memory.write(catchers, [(o.lane, o.fault.id, o.caught["case"]) for o in outcomes if o.caught is not None])
    raise typer.Exit(0 if outcomes and all(outcome.good for outcome in outcomes) else 1)


@app.command("kernels")
def compile_kernels(
    target: Annotated[list[str] | None, typer.Option(metavar="NAME", help="as sm_90; may be given again")] = None,
    json: Files = None,
) -> None:
    """Compile every Triton kernel ahead of time, for GPUs that need not be here, and tell what each takes of them.

    A kernel whose registers spill into memory, or that does not compile, fails.
    """
    from trysquare_conformance import ahead_of_time

    _check_targets(target or [])
    with _progress() as progress:
        result = ahead_of_time.report(target or (), progress, shlex.join(["trysquare", *sys.argv[1:]]))
    if json is not None:
        report.write_kernels(result, json)
    report.show_kernels(result["kernels"], Console())
    fits = [kernel["status"] == "fits" for kernel in result["kernels"]]
    raise typer.Exit(0 if fits and all(fits) else 1)


def _check_targets(names: list[str]) -> None:
    from trysquare_conformance import ahead_of_time

    try:
        ahead_of_time.check(names)
    except RuntimeError as error:
        raise typer.BadParameter(str(error), param_hint="--target" if names else "--kernels") from error


def _fault_lanes() -> list[str]:
    """Where `verify` plants faults: in the kernels where they can be interpreted, which takes longer, and eagerly."""
    from trysquare_conformance.lanes import LANES

    return [name for name in ("triton-interpreter", "eager-cpu") if LANES[name].available() is None]


@demos.callback(invoke_without_command=True)
def demo(
    context: typer.Context,
    epochs: Annotated[int, typer.Option(min=1, help="full-batch steps of each run")] = 400,
    seed: Annotated[int, typer.Option(help="of the split and the initial weights")] = 0,
    picture: Files = None,
    json: Files = None,
) -> None:
    """Train modular addition with AdamW and with DolphinFlow, and see which one generalises.

    --picture draws the accuracies over the epochs, as .png or .svg; --json writes the numbers.
    """
    if context.invoked_subcommand is None:
        from trysquare_conformance.demo import run_demo

        run_demo(epochs, seed, picture, json)


@demos.command()
def thorn(
    steps: Annotated[int | None, typer.Option(min=1, help="of each run [default: 300; long: 5000]")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="runs of each optimizer")] = 1,
    long: Annotated[bool, typer.Option("--long", help="the larger model, for a GPU")] = False,
    device: Device = "cpu",
    picture: Files = None,
    json: Files = None,
) -> None:
    """Train a language model of Python's own library with AdamW, Muon beside AdamW, and THORN.

    All have AdamW's learning rate, betas and decay. --picture draws the held-out losses; --json writes the numbers.
    """
    from trysquare_conformance.demo.text import LONG, SHORT

    task, usual = (LONG, 5000) if long else (SHORT, 300)
    _compare(replace(task, device=device), "thorn --long" if long else "thorn", steps or usual, seeds, picture, json)


@demos.command()
def digits(
    steps: Annotated[int, typer.Option(min=1, help="of each run")] = 400,
    seeds: Annotated[int, typer.Option(min=1, help="runs of each optimizer")] = 3,
    device: Device = "cpu",
    picture: Files = None,
    json: Files = None,
) -> None:
    """Train a convolutional network on scikit-learn's digits with the same optimizers.

    Needs the extra `digits`. --picture draws the held-out losses; --json writes the numbers.
    """
    from trysquare_conformance.demo.digits import Digits

    _compare(Digits(device=device), "digits", steps, seeds, picture, json)


@demos.command()
def eightbit(
    epochs: Annotated[int, typer.Option(min=1, help="of modular addition")] = 400,
    steps: Annotated[int, typer.Option(min=1, help="of the language model")] = 300,
    seeds: Annotated[int, typer.Option(min=1, help="runs of each optimizer")] = 1,
    picture: Files = None,
    json: Files = None,
) -> None:
    """Train modular addition and the language model with DolphinFlow8bit beside DolphinFlow.

    Shows what each learns, and the memory of state and step. --picture draws the held-out accuracies; --json writes
    the numbers.
    """
    from trysquare_conformance.demo import eightbit as trained

    command = f"trysquare demo eightbit --epochs {epochs} --steps {steps} --seeds {seeds}"
    try:
        trained.compare(trained.experiments(epochs, steps), seeds, command, picture, json)
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error)) from error


def _compare(task: "Task", name: str, steps: int, seeds: int, picture: Path | None, json: Path | None) -> None:
    """Run a comparison, or say in one line what it lacks."""
    from trysquare_conformance.demo.comparison import compare as run

    command = f"trysquare demo {name} --steps {steps} --seeds {seeds} --device {task.device}"
    try:
        run(task, steps, seeds, command, picture, json)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error


@app.command()
def doctor() -> None:
    """Tell what this machine can verify, and why not the rest."""
    from trysquare_conformance.doctor import report as tell

    tell(Console())


def _tier(tier: Tier | None, case: list[str] | None) -> str:
    """The tier that was asked for, or the smallest that holds the cases that were."""
    if tier is not None:
        return tier.value
    if not case:
        return TIERS[0]
    from trysquare_conformance.registry import smallest_tier

    found = smallest_tier(case)
    if found is None:
        raise typer.BadParameter(f"no case matches {' or '.join(case)}", param_hint="--case")
    return found


def _lanes(names: list[str] | None) -> list[str]:
    from trysquare_conformance.lanes import LANES

    unknown = [name for name in names or () if name not in LANES]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: the lanes are {', '.join(LANES)}", param_hint="--lane")
    return list(names or ())


@contextmanager
def _progress() -> Iterator["Bars"]:
    """A bar a lane, on standard error so that the report can be piped."""
    columns = TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        yield Bars(bars)


class Bars:
    """Called with a lane's name, its cases done and their number; keeps one bar a lane."""

    def __init__(self, bars: Progress) -> None:
        self.bars, self.tasks = bars, dict[str, TaskID]()

    def __call__(self, name: str, done: int, total: int) -> None:
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(name, total=total)
        self.bars.update(self.tasks[name], completed=done, total=total)
