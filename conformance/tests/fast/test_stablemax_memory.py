"""StableMax's cross-entropy takes memory with N, not with N × C, and reads its logits in blocks that fit a cache."""

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trysquare import _blocks, stablemax_cross_entropy
from trysquare_conformance.memory import peak_bytes

BLOCK = 1 << 11
FLOAT32 = 4
BYTES_A_POSITION = 64
BLOCKS_AT_ONCE = 6
"""Results between two operations on a block: more of them for label smoothing and probabilities than without."""

TARGETS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "indices": lambda n, c: {"target": torch.arange(n) % c},
    "smoothed": lambda n, c: {"target": torch.arange(n) % c, "label_smoothing": 0.1},
    "ignoring": lambda n, c: {"target": torch.where(torch.arange(n) % 2 == 0, -100, c - 1)},
    "weighted": lambda n, c: {"target": torch.arange(n) % c, "weight": torch.rand(c)},
    "probabilities": lambda n, c: {"target": torch.rand(n, c)},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_blocks, "CPU_ELEMENTS", BLOCK)


def extra_bytes(n: int, classes: int, dtype: torch.dtype, **arguments: Any) -> int:
    """The peak of a forward and backward pass beyond the logits and their gradient."""
    x = torch.randn(n, classes).to(dtype).requires_grad_()

    def run() -> None:
        x.grad = None
        stablemax_cross_entropy(x, **arguments).backward()

    run()
    x.grad = None
    return peak_bytes(run) - x.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", TARGETS)
def test_memory_beyond_logits_and_gradient_is_a_few_numbers_a_position(kind: str, dtype: torch.dtype) -> None:
    """No dense one-hot targets, no float32 copy of half-precision logits, no probabilities that are kept."""
    for n, classes in ((128, 300), (512, 300), (128, 1200)):
        arguments = TARGETS[kind](n, classes)
        found = extra_bytes(n, classes, dtype, **arguments)
        scratch = BLOCKS_AT_ONCE * FLOAT32 * BLOCK + FLOAT32 * classes
        assert found <= scratch + BYTES_A_POSITION * n
        assert scratch + BYTES_A_POSITION * n < n * classes * FLOAT32


def test_nothing_is_kept_for_backward_but_a_number_a_position() -> None:
    x, target = torch.randn(64, 1000, requires_grad=True), torch.zeros(64, dtype=torch.int64)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        stablemax_cross_entropy(x, target, label_smoothing=0.1, ignore_index=3)
    own = [t for t in kept if t.data_ptr() not in {x.data_ptr(), target.data_ptr()}]
    assert sum(t.numel() for t in own) <= 64 + 2


# The blocks


@given(
    shape=st.lists(st.integers(1, 7), min_size=2, max_size=5),
    elements=st.integers(1, 60),
)
def test_the_blocks_hold_every_position_once_and_are_small(shape: list[int], elements: int) -> None:
    positions = (shape[0], *shape[2:])
    seen = torch.zeros(positions, dtype=torch.int64)
    for block in _blocks.blocks(shape, elements):
        seen[block] += 1
        assert seen[block].numel() == 1 or seen[block].numel() * shape[1] <= elements
    assert (seen == 1).all()


@given(shape=st.lists(st.integers(1, 7), min_size=2, max_size=5), elements=st.integers(1, 60))
def test_there_are_no_more_blocks_than_one_a_row_of_them(shape: list[int], elements: int) -> None:
    """The block is as large as it may be along the one dimension that it cuts."""
    count = len(list(_blocks.blocks(shape, elements)))
    sizes = [prod(shape[i:]) // shape[i] * (shape[1] if i > 1 else 1) for i in range(len(shape)) if i != 1]
    cut = next((i for i, size in enumerate(sizes) if size <= elements), len(sizes) - 1)
    positions = (shape[0], *shape[2:])
    assert count == prod(positions[:cut]) * -(-positions[cut] // max(1, elements // sizes[cut]))
