"""`python -m benchmarks`: one step of every optimizer over 21 million float32 parameters, side by side on a CPU.

Each optimizer has parameters and state of its own and all are stepped in turn, so that none finds its data in a cache:
a step touches 340 MB. What the machine can do at best (copying, multiplying) is measured in the same rounds.
"""

import argparse
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn import functional as F

from benchmarks import gpt2, results, timing
from benchmarks.contenders import (
    FOREACH,
    FUSED,
    PUBLISHED,
    VECTOR,
    VECTOR_COMPILED,
    Contender,
    contenders,
    relative_error,
)
from trysquare import stablemax_cross_entropy
from trysquare_conformance.machine import describe_machine
from trysquare_conformance.memory import peak_bytes
from trysquare_conformance.report.console import simple_table

SCHEMA = 1
CHECKED_STEPS = 3
HOST_STEPS = 100
MATMUL = "matmul"
SOFTMAX, STABLEMAX = "F.cross_entropy", "stablemax_cross_entropy"
LOGITS = (1024, 32_000)
ROTATED = 3
COMPARED_WITH = (FOREACH, FUSED, PUBLISHED, SOFTMAX)


@dataclass(frozen=True)
class Bar:
    """A ratio that is to be reached: the time of `slower` over that of `faster`, at most or at least `value`."""

    slower: str
    faster: str
    at_most: bool
    value: float

    @property
    def wanted(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.value:g}"

    def met(self, ratio: float) -> bool:
        return ratio <= self.value if self.at_most else ratio >= self.value


BARS = (
    Bar(VECTOR, FOREACH, at_most=True, value=2.0),
    Bar(VECTOR_COMPILED, FUSED, at_most=True, value=2.0),
    Bar(PUBLISHED, VECTOR, at_most=False, value=30.0),
    Bar(PUBLISHED, VECTOR_COMPILED, at_most=False, value=30.0),
)


def prepare(contender: Contender, batches: Sequence[Sequence[torch.Tensor]]) -> tuple[dict[str, Any], timing.Action]:
    """What is measured once of an optimizer at full size, and the step that is timed afterwards."""
    parameters = gpt2.weights(gpt2.SHAPES)
    start = [p.detach().clone() for p in parameters]
    gpt2.give(parameters, batches[0])
    built: list[torch.optim.Optimizer] = []

    def first_step() -> None:
        built.append(contender.build(parameters))
        built[0].step()

    cold = timing.seconds(first_step)
    for batch in batches[1:]:
        gpt2.give(parameters, batch)
        built[0].step()
    error = relative_error(parameters, contender.exact(start, batches), start)
    facts = {
        "name": contender.name,
        "cold_start_ms": 1e3 * cold,
        "peak_bytes": peak_bytes(built[0].step),
        "error": error,
        **small(contender),
    }
    return facts, built[0].step


def small(contender: Contender) -> dict[str, Any]:
    """Over the same tensors 128 times narrower: what the host takes alone, and the margin of the result."""
    parameters = gpt2.weights(gpt2.SMALL_SHAPES)
    start = [p.detach().clone() for p in parameters]
    batches = [gpt2.gradients(gpt2.SMALL_SHAPES, seed) for seed in range(CHECKED_STEPS)]
    optimizer = contender.build(parameters)
    for batch in batches:
        gpt2.give(parameters, batch)
        optimizer.step()
    margin = contender.margin(start, batches, parameters)
    host = statistics.median(timing.seconds(optimizer.step) for _ in range(HOST_STEPS))
    return {"margin": margin, "host_ms": 1e3 * host}


def loss_actions() -> dict[str, timing.Action]:
    """Forward and backward of both cross-entropies, on logits that change from call to call."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(LOGITS, generator=generator).requires_grad_() for _ in range(ROTATED)]
    targets = torch.randint(LOGITS[1], LOGITS[:1], generator=generator)

    return {
        SOFTMAX: there_and_back(F.cross_entropy, logits, targets),
        STABLEMAX: there_and_back(stablemax_cross_entropy, logits, targets),
    }


def there_and_back(loss: Any, logits: Sequence[torch.Tensor], targets: torch.Tensor) -> timing.Action:
    """A loss and the gradient of its logits, which come in turn."""

    def once(x: torch.Tensor) -> None:
        loss(x, targets).backward()
        x.grad = None

    return timing.rotated(once, logits)


def run(rounds: int, imports: int) -> dict[str, Any]:
    """Everything, as the JSON that is committed."""
    torch_ms, ours_ms = (1e3 * seconds for seconds in timing.import_seconds(imports))
    return {
        "schema": SCHEMA,
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "parameters": gpt2.PARAMETERS,
        **steps(rounds),
        **losses(rounds),
        "import_ms": {"torch": torch_ms, "trysquare": ours_ms},
    }


def steps(rounds: int) -> dict[str, Any]:
    """Every optimizer's step, and what the machine can do at best, in the same rounds."""
    batches = [gpt2.gradients(gpt2.SHAPES, seed) for seed in range(CHECKED_STEPS)]
    facts, actions = {}, {}
    for contender in (contenders()[0], *contenders()):  # whoever is first pays for what torch imports late: not counted
        print(f"preparing {contender.name}", flush=True)
        facts[contender.name], actions[contender.name] = prepare(contender, batches)
    streams, moved = timing.bandwidths()
    matmul, operations = timing.matmul_rate()
    times = timing.interleaved({**actions, **streams, MATMUL: matmul}, rounds, "steps")
    ceilings = {f"{name}_gb_per_s": moved / times[name].median / 1e9 for name in streams}
    rows = [step_row(facts[c.name], c, times, max(ceilings.values())) for c in contenders()]
    ceilings["matmul_gflop_per_s"] = operations / times[MATMUL].median / 1e9
    return {"ceilings": ceilings, "rows": rows, "bars": [bar_row(bar, times) for bar in BARS if bar.slower in times]}


def losses(rounds: int) -> dict[str, Any]:
    """Both cross-entropies."""
    actions = loss_actions()
    peaks = {name: peak_bytes(action) for name, action in actions.items()}
    times = timing.interleaved(actions, rounds, "losses")
    rows = [
        {"name": name, "logits": LOGITS, "peak_bytes": peaks[name], "over": ratios(name, times), **spread(times[name])}
        for name in actions
    ]
    return {"losses": rows}


def spread(times: timing.Times) -> dict[str, float]:
    low, high = times.quartiles
    return {"median_ms": 1e3 * times.median, "low_ms": 1e3 * low, "high_ms": 1e3 * high}


def ratios(name: str, times: dict[str, timing.Times]) -> dict[str, float]:
    """How many times as long as those that others are compared with."""
    return {other: times[name].over(times[other]) for other in COMPARED_WITH if other in times}


def step_row(
    facts: dict[str, Any], contender: Contender, times: dict[str, timing.Times], gb_per_s: float
) -> dict[str, Any]:
    """One optimizer. `of_bandwidth` is the bytes that it moves at least, over what the machine moves in that time."""
    mine, least = times[contender.name], contender.bytes_per_parameter
    share = None if least is None else least * gpt2.PARAMETERS / mine.median / 1e9 / gb_per_s
    return {**facts, **spread(mine), "over": ratios(contender.name, times), "of_bandwidth": share}


def bar_row(bar: Bar, times: dict[str, timing.Times]) -> dict[str, Any]:
    ratio = times[bar.slower].over(times[bar.faster])
    return {"slower": bar.slower, "faster": bar.faster, "ratio": ratio, "bar": bar.wanted, "met": bar.met(ratio)}


def show(result: dict[str, Any], console: Console) -> None:
    """The tables on the terminal."""
    show_steps(result["rows"], console)
    for row in result["losses"]:
        over = f", {row['over'][SOFTMAX]:.2f} × {SOFTMAX}"
        console.print(f"{row['name']}: {row['median_ms']:.1f} ms{over}, peak {row['peak_bytes'] / 2**20:.1f} MiB")
    for row in result["bars"]:
        met = "met" if row["met"] else "NOT met"
        console.print(f"{row['slower']} / {row['faster']} = {row['ratio']:.2f} (wanted {row['bar']}: {met})")
    ceilings, imports = result["ceilings"], result["import_ms"]
    streams = f"copy {ceilings['copy_gb_per_s']:.1f} GB/s, in place {ceilings['in_place_gb_per_s']:.1f} GB/s"
    console.print(f"{streams}, matmul {ceilings['matmul_gflop_per_s']:.0f} GFLOP/s")
    console.print(f"import torch {imports['torch']:.0f} ms, trysquare after it {imports['trysquare']:.0f} ms")


def show_steps(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """One line an optimizer."""
    heads = ("ms", "middle half", "× foreach", "× fused", "of bandwidth", "host ms", "peak MiB", "cold ms", "error")
    table = simple_table("one step", *heads, "margin", numbers=len(heads) + 1)
    for row in rows:
        share = "–" if row["of_bandwidth"] is None else f"{row['of_bandwidth']:.0%}"
        margin = "–" if row["margin"] is None else f"{row['margin']:.2f}"
        half = f"{row['low_ms']:.1f}–{row['high_ms']:.1f}"
        over = (f"{row['over'][other]:.2f}" for other in (FOREACH, FUSED))
        memory, cold = f"{row['peak_bytes'] / 2**20:.1f}", f"{row['cold_start_ms']:.0f}"
        figures = (f"{row['median_ms']:.1f}", half, *over, share, f"{row['host_ms']:.2f}", memory, cold)
        table.add_row(row["name"], *figures, f"{row['error']:.1e}", margin)
    console.print(table)


def main(arguments: Sequence[str]) -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks cpu", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="how often each step is timed")
    parser.add_argument("--imports", type=int, default=9, help="how many processes time the imports")
    parser.add_argument(
        "--json", type=Path, default=results.path("cpu"), help="where to write the result (%(default)s)"
    )
    chosen = parser.parse_args(arguments)
    with timing.no_earlier_compilations():
        result = run(chosen.rounds, chosen.imports)
    show(result, Console(width=160))
    results.write(chosen.json, result)
