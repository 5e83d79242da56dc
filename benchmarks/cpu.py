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
from trysquare_conformance.report.console import simple_table

SCHEMA = 1
CHECKED_STEPS = 3
HOST_STEPS = 100
COPY, MATMUL = "copy", "matmul"
SOFTMAX, STABLEMAX = "F.cross_entropy", "stablemax_cross_entropy"
LOGITS = (1024, 32_000)
ROTATED = 3


@dataclass(frozen=True)
class Bar:
    """A ratio that is to be reached: `slower` over `faster`, at most or at least `value`."""

    slower: str
    faster: str
    at_most: bool
    value: float

    def met(self, ratio: float) -> bool:
        return ratio <= self.value if self.at_most else ratio >= self.value


BARS = (
    Bar(VECTOR, FOREACH, at_most=True, value=2.0),
    Bar(VECTOR_COMPILED, FUSED, at_most=True, value=2.0),
    Bar(PUBLISHED, VECTOR, at_most=False, value=30.0),
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
        "peak_bytes": timing.peak_bytes(built[0].step),
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

    def action(loss: Any) -> timing.Action:
        turn = iter(range(10**9))

        def once() -> None:
            x = logits[next(turn) % ROTATED]
            loss(x, targets).backward()
            x.grad = None

        return once

    return {SOFTMAX: action(F.cross_entropy), STABLEMAX: action(stablemax_cross_entropy)}


def run(rounds: int, imports: int) -> dict[str, Any]:
    """Everything, as the JSON that is committed."""
    batches = [gpt2.gradients(gpt2.SHAPES, seed) for seed in range(CHECKED_STEPS)]
    facts, actions = {}, {}
    for contender in contenders():
        print(f"preparing {contender.name}", flush=True)
        facts[contender.name], actions[contender.name] = prepare(contender, batches)
    losses = loss_actions()
    peaks = {name: timing.peak_bytes(action) for name, action in losses.items()}
    copy, moved = timing.copy_bandwidth()
    matmul, operations = timing.matmul_rate()
    times = timing.interleaved({**actions, COPY: copy, MATMUL: matmul}, rounds, "steps")
    times |= timing.interleaved(losses, rounds, "losses")
    bandwidth = moved / times[COPY].median
    least = {c.name: c.bytes_per_parameter for c in contenders()}
    return {
        "schema": SCHEMA,
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "parameters": PARAMETERS,
        "ceilings": {"copy_gb_per_s": bandwidth / 1e9, "matmul_gflop_per_s": operations / times[MATMUL].median / 1e9},
        "rows": [step_row(facts[name], times[name], least[name], bandwidth) for name in facts],
        "losses": [
            {"name": name, "logits": LOGITS, "peak_bytes": peaks[name], **spread(times[name])} for name in losses
        ],
        "ratios": [ratio_row(bar, times) for bar in BARS if bar.slower in times]
        + [{"slower": STABLEMAX, "faster": SOFTMAX, "ratio": times[STABLEMAX].over(times[SOFTMAX])}],
        "import_ms": dict(zip(("torch", "trysquare"), (1e3 * s for s in timing.import_seconds(imports)), strict=True)),
    }


PARAMETERS = sum(torch.Size(shape).numel() for shape in gpt2.SHAPES)


def spread(times: timing.Times) -> dict[str, float]:
    low, high = times.quartiles
    return {"median_ms": 1e3 * times.median, "low_ms": 1e3 * low, "high_ms": 1e3 * high}


def step_row(facts: dict[str, Any], times: timing.Times, least: int | None, bandwidth: float) -> dict[str, Any]:
    """One optimizer. `of_copy` is the bytes that it has to move at least, over what a copy moves in that time."""
    of_copy = None if least is None else least * PARAMETERS / times.median / bandwidth
    return {**facts, **spread(times), "bytes_per_parameter": least, "of_copy": of_copy}


def ratio_row(bar: Bar, times: dict[str, timing.Times]) -> dict[str, Any]:
    ratio = times[bar.slower].over(times[bar.faster])
    wanted = f"{'≤' if bar.at_most else '≥'} {bar.value:g}"
    return {"slower": bar.slower, "faster": bar.faster, "ratio": ratio, "bar": wanted, "met": bar.met(ratio)}


def show(result: dict[str, Any], console: Console) -> None:
    """The tables on the terminal."""
    table = simple_table(
        "one step", "ms", "middle half", "host ms", "of copy", "peak MiB", "cold ms", "error", "margin", numbers=8
    )
    for row in result["rows"]:
        of_copy = "–" if row["of_copy"] is None else f"{row['of_copy']:.0%}"
        margin = "–" if row["margin"] is None else f"{row['margin']:.2f}"
        half = f"{row['low_ms']:.1f}–{row['high_ms']:.1f}"
        memory, cold = f"{row['peak_bytes'] / 2**20:.1f}", f"{row['cold_start_ms']:.0f}"
        figures = (f"{row['median_ms']:.1f}", half, f"{row['host_ms']:.2f}", of_copy, memory, cold)
        table.add_row(row["name"], *figures, f"{row['error']:.1e}", margin)
    console.print(table)
    for row in result["losses"]:
        console.print(f"{row['name']}: {row['median_ms']:.1f} ms, peak {row['peak_bytes'] / 2**20:.1f} MiB")
    for row in result["ratios"]:
        wanted = f" (wanted {row['bar']}: {'met' if row['met'] else 'NOT met'})" if "bar" in row else ""
        console.print(f"{row['slower']} / {row['faster']} = {row['ratio']:.2f}{wanted}")
    ceilings, imports = result["ceilings"], result["import_ms"]
    console.print(f"copy {ceilings['copy_gb_per_s']:.1f} GB/s, matmul {ceilings['matmul_gflop_per_s']:.0f} GFLOP/s")
    console.print(f"import torch {imports['torch']:.0f} ms, trysquare after it {imports['trysquare']:.0f} ms")


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
    show(result, Console(width=140))
    results.write(chosen.json, result)
