"""What the optimizers do on tasks that anyone can run: modular addition, the standard library's sources, digits."""

from trysquare_conformance.demo.addition import (
    RUNS,
    DemoResult,
    Run,
    RunResult,
    draw,
    initial_weights,
    logits,
    modular_addition,
    percent,
    run_demo,
)

__all__ = [
    "RUNS",
    "DemoResult",
    "Run",
    "RunResult",
    "draw",
    "initial_weights",
    "logits",
    "modular_addition",
    "percent",
    "run_demo",
]
