"""The pieces of a step, timed one by one: `python -m pytest benchmarks`. Nothing here asserts a time.

To compare with an earlier commit, keep its run with `--benchmark-autosave` and look back with `--benchmark-compare`.
"""

from collections.abc import Iterator
from itertools import cycle
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch.nn import functional as F

import trysquare
from trysquare.ops import clipping, moments, polar, polar_express, projection

ROWS, COLUMNS = 3072, 768
ROTATED = 8  # together larger than a cache
LOGITS = (512, 8192)


def rotated(shape: tuple[int, ...], seed: int) -> Iterator[torch.Tensor]:
    """Random tensors by turns, so that no call finds its data where the last one left it."""
    generator = torch.Generator().manual_seed(seed)
    return cycle([torch.randn(shape, generator=generator) for _ in range(ROTATED)])


@pytest.fixture
def matrices() -> list[Iterator[torch.Tensor]]:
    return [rotated((1, ROWS, COLUMNS), seed) for seed in range(4)]


def test_projection(benchmark: BenchmarkFixture, matrices: list[Iterator[torch.Tensor]]) -> None:
    gradients, weights, *_ = matrices
    projected = benchmark(lambda: projection.project_rows_(next(gradients), next(weights)))
    assert bool(projected.isfinite().all())


def test_momentum(benchmark: BenchmarkFixture, matrices: list[Iterator[torch.Tensor]]) -> None:
    buffers, gradients, *_ = matrices
    update = benchmark(lambda: moments.nesterov_(next(buffers), next(gradients), 0.9))
    assert update.shape == (1, ROWS, COLUMNS)


def test_second_moment(benchmark: BenchmarkFixture, matrices: list[Iterator[torch.Tensor]]) -> None:
    squares, gradients, *_ = matrices
    second = benchmark(lambda: moments.second_moment_(next(squares), next(gradients), 0.99))
    assert second.shape == (1, ROWS, COLUMNS)


def test_norm(benchmark: BenchmarkFixture, matrices: list[Iterator[torch.Tensor]]) -> None:
    norm = benchmark(lambda: clipping.sum_of_squares(next(matrices[0])))
    assert norm > 0


def test_newton_schulz(benchmark: BenchmarkFixture) -> None:
    updates = rotated((1, COLUMNS, COLUMNS), 0)
    factor = benchmark(lambda: polar.newton_schulz(next(updates), 2, 1e-8))
    assert bool(factor.isfinite().all())


@pytest.mark.parametrize("rows", [COLUMNS, ROWS])
def test_polar_factor(benchmark: BenchmarkFixture, rows: int) -> None:
    updates, table = rotated((1, rows, COLUMNS), 0), polar_express.DEFAULT_COEFFICIENTS
    factor = benchmark(lambda: polar.polar_factor(next(updates), table, 0.02, 1e-8))
    assert bool(factor.isfinite().all())


@pytest.mark.parametrize("loss", [F.cross_entropy, trysquare.stablemax_cross_entropy], ids=["softmax", "stablemax"])
def test_cross_entropy_and_its_gradient(benchmark: BenchmarkFixture, loss: Any) -> None:
    logits, targets = rotated(LOGITS, 0), torch.randint(LOGITS[1], LOGITS[:1])

    def forward_and_backward() -> torch.Tensor:
        x = next(logits).requires_grad_()
        value: torch.Tensor = loss(x, targets)
        value.backward()  # type: ignore[no-untyped-call]
        x.grad = None
        return value

    assert bool(benchmark(forward_and_backward).isfinite())


@pytest.mark.parametrize("ortho_mode", ["vector", None])
def test_step_of_one_matrix(benchmark: BenchmarkFixture, ortho_mode: str | None) -> None:
    weights = torch.nn.Parameter(torch.randn(ROWS, COLUMNS))
    weights.grad = torch.randn(ROWS, COLUMNS)
    optimizer = trysquare.DolphinFlow([weights], ortho_mode=ortho_mode)
    benchmark(optimizer.step)
    assert optimizer.state[weights]["step"] > 0
