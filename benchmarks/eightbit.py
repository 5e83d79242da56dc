"""`python -m benchmarks eightbit`: DolphinFlow8bit beside bitsandbytes' AdamW8bit, and beside DolphinFlow.

The same 21 million float32 parameters, stepped in turn in interleaved rounds; what the state takes is counted from its
tensors, shared memory once, and scratch by torch's own account.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import gpt2, results, timing
from benchmarks.cpu import Bar, bar_row, spread
from trysquare import DolphinFlow, DolphinFlow8bit
from trysquare_conformance import originals
from trysquare_conformance.machine import describe_machine
from trysquare_conformance.memory import peak_bytes, state_bytes
from trysquare_conformance.report.console import simple_table

SCHEMA = 1
ADAMW8BIT, WHOLE = "bitsandbytes AdamW8bit", "DolphinFlow"
EAGER, COMPILED, PLAIN = "DolphinFlow8bit", "DolphinFlow8bit, compiled", "DolphinFlow8bit, ortho_mode=None, compiled"
BARS = (
    Bar(COMPILED, ADAMW8BIT, at_most=True, value=1.0),
    Bar(PLAIN, ADAMW8BIT, at_most=True, value=1.0),
)


def contenders() -> dict[str, Any]:
    """Everyone who can run here, by name."""
    made: dict[str, Any] = {
        WHOLE: lambda p: DolphinFlow(p, lr=1e-4),
        EAGER: lambda p: DolphinFlow8bit(p, lr=1e-4),
        COMPILED: lambda p: DolphinFlow8bit(p, lr=1e-4, backend="compiled"),
        PLAIN: lambda p: DolphinFlow8bit(p, lr=1e-4, backend="compiled", ortho_mode=None),
    }
    if originals.without_bitsandbytes():
        return made
    adamw = originals.bitsandbytes().optim.AdamW8bit
    return {ADAMW8BIT: lambda p: adamw(p, lr=1e-4, weight_decay=1e-2), **made}


def prepare(build: Any, batch: Sequence[torch.Tensor]) -> tuple[dict[str, Any], timing.Action]:
    """What is measured once, after the first step, and the step that is timed."""
    parameters = gpt2.weights(gpt2.SHAPES)
    gpt2.give(parameters, batch)
    optimizer = build(parameters)
    cold = timing.seconds(optimizer.step)
    peak = peak_bytes(optimizer.step)
    return {"state_bytes": state_bytes(optimizer), "peak_bytes": peak, "cold_start_ms": 1e3 * cold}, optimizer.step


def run(rounds: int) -> dict[str, Any]:
    """Everything, as the JSON that is committed."""
    batch = gpt2.gradients(gpt2.SHAPES, 0)
    facts, actions = {}, {}
    for name, build in contenders().items():
        print(f"preparing {name}", flush=True)
        facts[name], actions[name] = prepare(build, batch)
    times = timing.interleaved(actions, rounds, "steps")
    whole = facts[WHOLE]["state_bytes"]
    shares = {name: {"of_whole": facts[name]["state_bytes"] / whole} for name in facts}
    rows = [{"name": name, **facts[name], **shares[name], **row(name, times)} for name in times if name in facts]
    return {
        "schema": SCHEMA,
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "parameters": gpt2.PARAMETERS,
        "rows": rows,
        "bars": [bar_row(bar, times) for bar in BARS if bar.faster in times],
    }


def row(name: str, times: dict[str, timing.Times]) -> dict[str, Any]:
    over = times[name].over(times[ADAMW8BIT]) if ADAMW8BIT in times else None
    return {"over": over, **spread(times[name])}


def show(result: dict[str, Any], console: Console) -> None:
    """The table on the terminal."""
    heads = ("ms", f"× {ADAMW8BIT}", "state, bytes a parameter", "of 32 bits", "scratch, MiB")
    table = simple_table("one step", *heads, numbers=len(heads))
    for one in result["rows"]:
        table.add_row(*table_row(one, result["parameters"]))
    console.print(table)
    for bar in result["bars"]:
        met = "met" if bar["met"] else "NOT met"
        console.print(f"{bar['slower']} / {bar['faster']} = {bar['ratio']:.2f} (wanted {bar['bar']}: {met})")


def table_row(row: dict[str, Any], parameters: int) -> list[str]:
    """As the terminal and the documentation show it."""
    over = "–" if row["over"] is None else f"{row['over']:.2f}"
    state = f"{row['state_bytes'] / parameters:.3f}", f"{row['of_whole']:.2%}".replace("%", " %")
    return [row["name"], f"{row['median_ms']:.0f}", over, *state, f"{row['peak_bytes'] / 2**20:.1f}"]


def main(arguments: Sequence[str]) -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks eightbit", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="how often each step is timed")
    parser.add_argument("--json", type=Path, default=results.path("eightbit"), help="where to write it (%(default)s)")
    chosen = parser.parse_args(arguments)
    with timing.no_earlier_compilations():
        result = run(chosen.rounds)
    show(result, Console(width=140))
    results.write(chosen.json, result)
