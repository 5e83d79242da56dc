"""`python -m benchmarks thorn`: THORN's two kinds of groups beside those who do the same work.

Matrices: the 14 million of two GPT-2 blocks, against `torch.optim.Muon`, with the polar error of each on them. Others:
all 21 million parameters of GPT-2 shape without orthogonalisation, against schedule-free AdamW. In interleaved rounds.
"""

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import gpt2, results, timing
from benchmarks.cpu import Bar, bar_row, spread
from trysquare import THORN
from trysquare.ops import _scratch, polar, polar_express
from trysquare_conformance.machine import describe_machine
from trysquare_conformance.report.console import simple_table

SCHEMA = 1
MATRICES = tuple(shape for shape in gpt2.BLOCK if len(shape) == 2) * 2
SAFETY, EPS = 0.02, 1e-8
MUON, ORTHOGONALISED, FACTORS = "torch.optim.Muon", "THORN, orthogonalised", "its polar factors alone"
SCHEDULEFREE, OTHERS = "AdamWScheduleFree(foreach=True)", "THORN, schedule-free"
OTHERS_COMPILED = "THORN, schedule-free, compiled"
BARS = (
    Bar(ORTHOGONALISED, MUON, at_most=True, value=0.6),
    Bar(FACTORS, MUON, at_most=True, value=0.6),
    Bar(OTHERS, SCHEDULEFREE, at_most=True, value=1.2),
    Bar(OTHERS_COMPILED, SCHEDULEFREE, at_most=True, value=1.2),
)
Factor = Callable[[torch.Tensor], torch.Tensor]


def stepping(optimizer: torch.optim.Optimizer) -> timing.Action:
    """A step with the gradients that hang on its parameters, which nobody takes off."""
    return optimizer.step


def given(shapes: Sequence[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    parameters = gpt2.weights(shapes)
    gpt2.give(parameters, gpt2.gradients(shapes, 0))
    return parameters


def thorn(shapes: Sequence[tuple[int, ...]], orthogonalize: bool, backend: str = "eager") -> torch.optim.Optimizer:
    return over(given(shapes), orthogonalize, backend)


def over(parameters: list[torch.nn.Parameter], orthogonalize: bool, backend: str) -> torch.optim.Optimizer:
    """THORN on parameters that keep their gradients."""
    groups = [{"params": parameters, "orthogonalize": orthogonalize}]
    return THORN(groups, lr=1e-3, betas=(0.95, 0.95), none_grad=False, backend=backend)


def factor(u: torch.Tensor) -> torch.Tensor:
    """THORN's, of a batch (B, R, C)."""
    return polar.polar_factor(u, polar_express.DEFAULT_COEFFICIENTS, SAFETY, EPS)


def factors(stacked: Sequence[torch.Tensor]) -> None:
    """Of one batch after the other, in the same memory as in a step."""
    with _scratch.kept():
        for u in stacked:
            factor(u)


def muons(u: torch.Tensor) -> torch.Tensor:
    """What Muon takes for the polar factor, seen in what it does to a parameter of zeros, whose first step it is."""
    found = torch.zeros_like(u)
    for parameter, matrix in zip(found, u, strict=True):
        one = torch.nn.Parameter(parameter)
        one.grad = matrix.clone()
        torch.optim.Muon([one], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
        parameter.copy_(-one.detach() / max(1.0, u.shape[-2] / u.shape[-1]) ** 0.5)
    return found


def polar_errors() -> list[dict[str, Any]]:
    """Relative Frobenius distance to the SVD's polar factor, on Gaussian matrices."""
    rows = []
    for shape in dict.fromkeys(MATRICES):
        u = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        left, _, right = torch.linalg.svd(u, full_matrices=False)
        exact = left @ right
        errors = [float(torch.linalg.norm(f(u) - exact) / torch.linalg.norm(exact)) for f in (factor, muons)]
        rows.append({"shape": shape, "thorn": errors[0], "muon": errors[1], "form": chosen_form(shape)})
    return rows


def chosen_form(shape: tuple[int, int]) -> str:
    dtype = polar.choose_matmul_dtype(torch.float32, torch.device("cpu"))
    return polar.choose_form(*shape, torch.device("cpu"), dtype, len(polar_express.DEFAULT_COEFFICIENTS))


def batches() -> list[torch.Tensor]:
    """The matrices as THORN steps them: so large ones each in a batch of its own."""
    return [torch.randn(1, *shape) for shape in MATRICES]


def matrix_actions() -> dict[str, timing.Action]:
    stacked = batches()
    muon = torch.optim.Muon(given(MATRICES), lr=1e-3)
    return {
        MUON: stepping(muon),
        ORTHOGONALISED: stepping(thorn(MATRICES, True)),
        FACTORS: lambda: factors(stacked),
    }


def other_actions() -> dict[str, timing.Action]:
    """Without schedulefree, THORN's alone."""
    actions = {
        OTHERS: stepping(thorn(gpt2.SHAPES, False)),
        OTHERS_COMPILED: stepping(thorn(gpt2.SHAPES, False, "compiled")),
    }
    if importlib.util.find_spec("schedulefree"):
        from schedulefree import AdamWScheduleFree

        theirs = AdamWScheduleFree(given(gpt2.SHAPES), lr=1e-3, weight_decay=0.1, foreach=True)
        theirs.train()
        actions = {SCHEDULEFREE: stepping(theirs), **actions}
    return actions


def run(rounds: int) -> dict[str, Any]:
    """Everything, as the JSON that is committed."""
    measured = [
        timing.interleaved(f(), rounds, label) for f, label in ((matrix_actions, MUON), (other_actions, OTHERS))
    ]
    times = measured[0] | measured[1]
    rows = [{"name": name, **spread(taken)} for name, taken in times.items()]
    return {
        "schema": SCHEMA,
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "matrix_parameters": sum(rows * columns for rows, columns in MATRICES),
        "parameters": gpt2.PARAMETERS,
        "rows": rows,
        "bars": [bar_row(bar, times) for bar in BARS if bar.faster in times],
        "polar_errors": polar_errors(),
    }


def show(result: dict[str, Any], console: Console) -> None:
    """The tables on the terminal."""
    for row in result["rows"]:
        console.print(f"{row['name']}: {row['median_ms']:.1f} ms ({row['low_ms']:.1f}–{row['high_ms']:.1f})")
    for row in result["bars"]:
        met = "met" if row["met"] else "NOT met"
        console.print(f"{row['slower']} / {row['faster']} = {row['ratio']:.3f} (wanted {row['bar']}: {met})")
    table = simple_table("matrix", "form", "THORN's polar error", "Muon's", numbers=2)
    for row in result["polar_errors"]:
        table.add_row("{} × {}".format(*row["shape"]), row["form"], f"{row['thorn']:.4f}", f"{row['muon']:.4f}")
    console.print(table)


def main(arguments: Sequence[str]) -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks thorn", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="how often each step is timed")
    parser.add_argument("--json", type=Path, default=results.path("thorn"), help="where to write it (%(default)s)")
    chosen = parser.parse_args(arguments)
    with timing.no_earlier_compilations():
        result = run(chosen.rounds)
    show(result, Console(width=120))
    results.write(chosen.json, result)
