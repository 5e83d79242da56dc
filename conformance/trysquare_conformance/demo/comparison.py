"""AdamW, Muon beside AdamW, and THORN with AdamW's own lr, betas and decay, on one task from the same weights.

The learning rate is constant for everyone. Muon's is adjusted to AdamW's (`match_rms_adamw`); it steps the matrices of
two dimensions, and AdamW everything else. THORN is evaluated at its training weights y and at the averaged weights x.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from trysquare import THORN
from trysquare_conformance.demo.pictures import drawing
from trysquare_conformance.demo.training import (
    Contender,
    Curve,
    Optimizers,
    Task,
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
from trysquare_conformance.report.console import printed, simple_table

SCHEMA = 1
LR, BETAS, WEIGHT_DECAY = 1e-3, (0.9, 0.99), 0.1


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
    able = [one for one in CONTENDERS if one.missing is None]
    curves = train_all(task, able, seeds, steps, console)
    result = as_result(task, steps, seeds, command, curves)
    printed(lambda aside: show(result, aside), console)
    if picture is not None:
        draw(result, picture)
    if json is not None:
        write_json(result, json)
    return result


def as_result(task: Task, steps: int, seeds: int, command: str, curves: Sequence[Curve]) -> dict[str, Any]:
    settings = {"lr": LR, "betas": BETAS, "weight_decay": WEIGHT_DECAY}
    return {
        "schema": SCHEMA,
        "command": command,
        "machine": describe_machine(),
        **facts(task, steps),
        "seeds": seeds,
        **settings,
        "missing": {one.name: one.missing for one in CONTENDERS if one.missing},
        "rows": list(summaries(curves, steps)),
        "curves": [rounded(curve) for curve in curves],
    }


def cells(row: dict[str, Any]) -> list[str]:
    """Name, weights, loss and accuracy with their range over the seeds, and time of a step."""
    kinds = {"training": "training (y)" if "THORN" in row["contender"] else "", "averaged": "averaged (x)"}
    return [row["contender"], kinds[row["weights"]], *quality(row), f"{row['step_ms']:.0f}"]


HEAD = ("optimizer", "weights", "held-out loss", "accuracy, %", "ms a step")


def note(result: dict[str, Any]) -> str:
    """What was trained, and how."""
    betas = ", ".join(f"{beta:g}" for beta in result["betas"])
    return (
        f"{capital(result['title'])}: {result['parameters']:,} parameters, {result['steps']:,} steps, "
        f"{several(result['seeds'])}; lr {result['lr']:g}, betas ({betas}), decay {result['weight_decay']:g} for all."
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
    """Held-out losses over the steps, a line a seed."""
    with drawing(path, result["title"]) as (axes,):
        for curve in result["curves"]:
            name, first = curve["contender"], curve["seed"] == 0
            style: dict[str, Any] = {"color": COLOURS[name], "linewidth": 1.5}
            axes.plot(curve["steps"], curve["loss"], label=name if first else None, **style)
            if curve["averaged_loss"]:
                label = f"{name}, averaged" if first else None
                axes.plot(curve["steps"], curve["averaged_loss"], label=label, linestyle="--", **style)
        axes.set(xlim=(0, result["steps"]), xlabel="step", ylabel="held-out loss", yscale="log")
