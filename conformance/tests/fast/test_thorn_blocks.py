"""Large matrices go by blocks of rows, and in memory that is used again: neither is seen in what comes out."""

from typing import Any

import pytest
import torch
from torch import Tensor

from trysquare import THORN
from trysquare.ops import _row_blocks, _scratch
from trysquare_conformance.behaviour import Shapes, all_parameters, bits, normal, run
from trysquare_conformance.memory import peak_bytes

MATRICES: Shapes = [(30, 12), (12, 30), (9, 9), (30, 12), (4, 3, 2, 2)]
EXPERTS: Shapes = [(5, 6, 4), (3, 20, 8)]
SMALL = 1 << 14
"""Bytes of what does not grow with a matrix of these tests: norms of rows, rates."""


def stepped(shapes: Shapes, **settings: Any) -> list[Tensor]:
    """Parameters and states after three steps."""
    params = [torch.nn.Parameter(normal(shape, 1, i)) for i, shape in enumerate(shapes)]
    optimizer = THORN([{"params": params, "orthogonalize": True, **settings}], weight_decay=0.1, betas=(0.9, 0.9))
    run(optimizer, 3)
    return [*params, *(value for state in optimizer.state.values() for value in state.values())]


@pytest.mark.parametrize(("shapes", "settings"), [(MATRICES, {}), (EXPERTS, {"batched": True})], ids=["one", "batched"])
@pytest.mark.parametrize("elements", [1, 16, 100])
def test_blocks_of_rows_change_no_bit(
    shapes: Shapes, settings: dict[str, Any], elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row is summed for itself, and the rows of a matrix after that."""
    whole = stepped(shapes, **settings)
    monkeypatch.setattr(_row_blocks, "ELEMENTS", elements)
    assert [bits(x) for x in stepped(shapes, **settings)] == [bits(x) for x in whole]


@pytest.mark.parametrize("shape", [(1, 7, 5), (3, 4, 5), (6, 1, 3), (2, 9, 1)], ids=str)
@pytest.mark.parametrize("elements", [1, 6, 20, 50, 1000])
def test_blocks_cover_every_row_once(shape: tuple[int, ...], elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_row_blocks, "ELEMENTS", elements)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    seen = torch.zeros(shape)
    for block in _row_blocks.row_blocks(seen):
        part = seen[block]
        part += 1
        assert part.numel() <= max(elements, shape[-1])
    assert bool((seen == 1).all())


def test_memory_of_a_name_is_used_again_only_while_it_is_kept() -> None:
    cpu = torch.device("cpu")
    with _scratch.kept():
        first = _scratch.empty("a", (4, 5), torch.float32, cpu)
        assert _scratch.empty("a", (10, 2), torch.bfloat16, cpu).data_ptr() == first.data_ptr()
        assert _scratch.empty("b", (4, 5), torch.float32, cpu).data_ptr() != first.data_ptr()
        assert _scratch.empty("a", (5, 5), torch.float32, cpu).shape == (5, 5)
    assert _scratch.empty("a", (4, 5), torch.float32, cpu).data_ptr() != first.data_ptr()


def test_a_product_is_never_written_over_what_it_is_of() -> None:
    with _scratch.kept():
        x = _scratch.empty(_scratch.X, (2, 3), torch.float32, torch.device("cpu"))
        for _ in range(3):
            product = _scratch.beside(x, (2, 3))
            assert product.data_ptr() != x.data_ptr()
            x = product


def test_several_large_matrices_take_what_the_largest_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_row_blocks, "ELEMENTS", 1000)

    def peak(shapes: Shapes) -> int:
        params = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
        optimizer = THORN([{"params": params, "orthogonalize": True}], workspace_bytes=1, none_grad=False)
        for p in all_parameters(optimizer):
            p.grad = torch.ones_like(p)
        optimizer.step()
        return peak_bytes(optimizer.step)

    one, several = peak([(200, 150)]), peak([(200, 150), (100, 90), (200, 150), (60, 250)])
    assert several <= one + SMALL
