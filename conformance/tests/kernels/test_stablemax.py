"""StableMax's kernels: launches, tiles and layouts by what is written down; `interpreted` computes with them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from trysquare import stablemax_cross_entropy

pytest.importorskip("triton", reason="Triton is not installed (pip install 'trysquare[triton]')")

from triton.runtime.errors import OutOfResources

from trysquare import kernels
from trysquare.kernels import stablemax
from trysquare.kernels.stablemax_problem import ACROSS, TILE, places_of, problem_of, tile_of


def launches(x: Tensor, target: Tensor, **options: Any) -> list[kernels._launch.Launch]:
    """What forward and backward launch; nothing runs."""
    with kernels.recording() as recorded:
        loss = stablemax_cross_entropy(x.requires_grad_(), target, backend="triton", **options)
        loss.backward()
        return list(recorded)


def test_there_are_two_launches_each_way() -> None:
    made = launches(torch.randn(64, 1000), torch.zeros(64, dtype=torch.int64), label_smoothing=0.1)
    assert [launch.kernel.__name__ for launch in made] == ["_sums", "_finish", "_factors", "_gradient"]


def test_a_kernel_that_cannot_be_compiled_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Uncompilable:
        __name__ = "_sums"

        def __getitem__(self, _: Any) -> Any:
            raise OutOfResources(2, 1, "shared memory")

    monkeypatch.setattr(stablemax, "_sums", Uncompilable())
    problem = problem_of(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), None, -100, 0.0, torch.float32)
    with pytest.raises(RuntimeError, match=r"cannot compile the kernel _sums .*\(2, 3\).*Triton .*backend='eager'"):
        stablemax.losses(problem)


def test_nothing_to_compute_is_no_launch() -> None:
    assert launches(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)) == []
    assert launches(torch.zeros(4, 5, 0), torch.zeros(4, 0, dtype=torch.int64)) == []


@pytest.mark.parametrize("positions", [1, 2, 7, 1000, 8192, 1 << 20])
@pytest.mark.parametrize("classes", [1, 10, 257, 4096, 32000, 128256])
@pytest.mark.parametrize("across", [False, True])
def test_a_tile_is_of_bounded_size(positions: int, classes: int, across: bool) -> None:
    height, width = tile_of(positions, classes, across)
    for size, whole in ((height, positions), (width, classes)):
        assert size & (size - 1) == 0
        assert size < 2 * whole
    assert 1 <= height * width <= TILE
    assert height * width == TILE or positions * classes < TILE * 4 or min(height, width) < ACROSS


@pytest.mark.parametrize(("positions", "parts"), [(8192, 4), (256, 4), (32, 32), (1, 32)])
def test_long_rows_are_cut_where_there_are_few_of_them(positions: int, parts: int) -> None:
    x = torch.zeros(1, 128256).expand(positions, 128256)
    problem = problem_of(x, torch.zeros(positions, dtype=torch.int64), None, -100, 0.0, torch.float32)
    with kernels.recording() as recorded:
        assert stablemax._sums_of(problem).shape == (2, parts, positions)
    assert recorded[0].constants["COLUMNS"] == TILE


@pytest.mark.parametrize(
    ("x", "table", "across"),
    [
        (torch.zeros(6, 8), [6, 8], False),
        (torch.zeros(8, 6).t(), [6, 1], True),
        (torch.zeros(4, 3, 2, 5), [10, 1, 4, 30], True),
        (torch.zeros(4, 3, 2, 5).to(memory_format=torch.channels_last), [40, 3], False),
        (torch.zeros(4, 3, 5, 2).transpose(2, 3), [5, 2, 2, 1, 4, 30], True),
        (torch.zeros(1, 3).expand(7, 3), [7, 0], False),
        (torch.zeros(6, 16)[:, ::2], [6, 16], False),
        (torch.zeros(1, 5), [1, 0], False),
    ],
)
def test_positions_are_found_in_every_layout(x: Tensor, table: list[int], across: bool) -> None:
    places = places_of(x)
    assert places.table.tolist() == table
    assert places.dims == len(table) // 2
    assert places.stride == x.stride(1)
    assert places.across == across


def test_alignment_is_promised_only_where_every_position_has_it() -> None:
    assert places_of(torch.zeros(6, 8)).aligned
    assert not places_of(torch.zeros(6, 9)).aligned
    assert not places_of(torch.zeros(50)[1:49].view(6, 8)).aligned
    assert places_of(torch.zeros(6, 8, dtype=torch.bfloat16)).aligned
    assert not places_of(torch.zeros(6, 4, dtype=torch.bfloat16)).aligned


@pytest.mark.parametrize(
    ("x", "chunk"),
    [
        (torch.zeros(2, 50257), 4),
        (torch.zeros(2, 50257, dtype=torch.bfloat16), 8),
        (torch.zeros(2, 50257, dtype=torch.float64), 2),
        (torch.zeros(2, 50304)[:, :50257], 4),
        (torch.zeros(2, 50304), 1),
        (torch.zeros(50257, 2).t(), 1),
        (torch.zeros(2, 2 * 50257)[:, ::2], 1),
        (torch.zeros(2, 31), 1),
    ],
)
def test_long_rows_of_neighbours_are_read_in_chunks(x: Tensor, chunk: int) -> None:
    assert problem_of(x, torch.zeros(2, dtype=torch.int64), None, -100, 0.0, torch.float32).chunk == chunk
