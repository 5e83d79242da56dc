"""StableMax's kernels: launches, tiles and layouts by what is written down, numbers in Triton's interpreter.

What is computed with the interpreter runs in a process of its own, which is started with TRITON_INTERPRET=1.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from trysquare import StableMaxCrossEntropyLoss, _backend, stablemax_cross_entropy
from trysquare_conformance.budget import assert_same
from trysquare_conformance.snapshots import to_array

pytest.importorskip("triton", reason="Triton is not installed (pip install 'trysquare[triton]')")

from triton.runtime.errors import OutOfResources

from trysquare import kernels
from trysquare.kernels import stablemax, stablemax_gradient, stablemax_problem
from trysquare.kernels.stablemax_problem import ACROSS, TILE, places_of, problem_of, tile_of

Shape = tuple[int, ...]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def in_interpreter(function: Callable[[], None]) -> None:
    """Run a function of this page where kernels are interpreted."""
    code = f"import runpy; runpy.run_path({__file__!r})[{function.__name__!r}]()"
    command = [sys.executable, "-W", "ignore", "-c", code]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def launches(x: Tensor, target: Tensor, **options: Any) -> list[kernels._launch.Launch]:
    """What forward and backward launch; nothing runs."""
    with kernels.recording() as recorded:
        loss = stablemax_cross_entropy(x.requires_grad_(), target, backend="triton", **options)
        loss.backward()
        return list(recorded)


def together(
    dtype: torch.dtype, shape: Shape, backend: str, lay_out: Callable[[Tensor], Tensor] = lambda x: x, **options: Any
) -> tuple[Tensor, Tensor]:
    """The losses and the gradient of drawn logits, of which every third is ignored."""
    torch.manual_seed(0)
    x = lay_out((torch.randn(shape) * 3).to(dtype)).requires_grad_()
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    target.view(-1)[::3] = -100
    losses = stablemax_cross_entropy(x, target, reduction="none", backend=backend, **options)
    (gradient,) = torch.autograd.grad(losses, x, torch.linspace(-1, 1, losses.numel(), dtype=dtype).view(losses.shape))
    return losses.detach(), gradient


def _the_same_as_eager_in_float64() -> None:
    weight = torch.rand(9000, dtype=torch.float64)
    for shape, lay_out in (
        ((3, 9000), torch.Tensor.contiguous),
        ((5, 300), lambda x: x.t().contiguous().t()),
        ((2, 33, 5, 3), lambda x: x.to(memory_format=torch.channels_last)),
        ((2, 33, 5, 3), lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)),
        ((2, 40, 70), torch.Tensor.contiguous),
    ):
        for options in ({}, {"label_smoothing": 0.1, "weight": weight[: shape[1]]}):
            found = together(torch.float64, shape, "triton", lay_out, **options)
            expected = together(torch.float64, shape, "eager", lay_out, **options)
            for mine, theirs in zip(found, expected, strict=True):
                assert_same(to_array(mine), to_array(theirs), scale=10.0, operations=shape[1])
                assert mine.stride() == theirs.stride()


def test_long_rows_and_all_layouts_are_the_same_as_eager_in_float64() -> None:
    in_interpreter(_the_same_as_eager_in_float64)


def _in_chunks() -> None:
    """Rows of 131 classes that begin anywhere, between numbers that would make NaN of every sum."""
    stablemax_problem.TILE, ordinary = 128, property(lambda _: 1)
    target, g = torch.tensor([0, 130, -100, 1, 129]), torch.linspace(-1, 1, 5, dtype=torch.float64)
    options: dict[str, Any] = {"label_smoothing": 0.1, "reduction": "none"}
    for dtype, (apart, start) in product(DTYPES, ((131, 0), (157, 1))):
        x = torch.full((6 * apart,), float("nan"), dtype=dtype).as_strided((5, 131), (apart, 1), start)
        x.copy_(torch.randn(5, 131))
        problem = problem_of(x, target, None, -100, 0.1, torch.float64)
        assert problem.chunk == 16 // dtype.itemsize
        losses, normalizer = stablemax.losses(problem)
        gradient = stablemax_gradient.gradient(problem, normalizer, g)
        assert_same(to_array(losses), to_array(stablemax_cross_entropy(x.double(), target, **options)), operations=131)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stablemax_problem.Problem, "chunk", ordinary)
            assert torch.equal(gradient, stablemax_gradient.gradient(problem, normalizer, g))


def test_rows_that_begin_anywhere_are_read_in_whole_chunks_and_nothing_beside_them() -> None:
    in_interpreter(_in_chunks)


def _a_class_out_of_range() -> None:
    torch.manual_seed(0)
    x, target = torch.randn(4, 6), torch.tensor([0, 6, 5, -1])
    problem = problem_of(x, target, None, -100, 0.1, torch.float32)
    losses, normalizer = stablemax.losses(problem)
    gradient = stablemax_gradient.gradient(problem, normalizer, torch.ones(4))
    wrong = torch.tensor([False, True, False, True])
    assert torch.equal(losses.isnan(), wrong)
    assert torch.equal(gradient.isnan().all(1), wrong)
    assert torch.equal(gradient.isnan().any(1), wrong)


def test_a_class_out_of_range_makes_its_position_nan_and_no_other() -> None:
    in_interpreter(_a_class_out_of_range)


def _one_bad_logit() -> None:
    """The eager loss is held to the reference for it; of two NaN results either is one."""
    for bad in (float("nan"), float("inf"), -float("inf"), 3.4e38, -3.4e38):
        for dtype in (torch.float32, torch.bfloat16):
            for smoothing in (0.0, 0.1):
                x = torch.tensor([[1.0, -2.0, bad], [bad, bad, bad], [0.5, 0.0, -1.0]], dtype=dtype, requires_grad=True)
                both = []
                for backend in ("triton", "eager"):
                    options = {"label_smoothing": smoothing, "reduction": "none", "backend": backend}
                    losses = stablemax_cross_entropy(x, torch.tensor([0, 1, 2]), **options)
                    (gradient,) = torch.autograd.grad(losses.sum(), x)
                    both.append((losses.isfinite().tolist(), gradient.isfinite().tolist()))
                assert both[0] == both[1], (bad, dtype, smoothing, both)


def test_one_logit_that_is_not_finite_spreads_as_far_as_in_eager() -> None:
    in_interpreter(_one_bad_logit)


def _weight_of_zero() -> None:
    x, weight = torch.tensor([[0.0, -torch.inf, 1.0]] * 2, dtype=torch.float64), torch.tensor([1.0, 0.0, 1.0]).double()
    for smoothing in (0.0, 0.1):
        options: dict[str, Any] = {"reduction": "none", "label_smoothing": smoothing}
        mine, eager = (
            stablemax_cross_entropy(x, torch.tensor([1, 0]), weight, **options, backend=backend)
            for backend in ("triton", "eager")
        )
        assert_same(to_array(mine), to_array(eager))


def test_a_weight_of_zero_counts_nothing_even_where_the_loss_would_be_infinite() -> None:
    in_interpreter(_weight_of_zero)


def _twice_differentiable() -> None:
    torch.manual_seed(0)
    x, target = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.tensor([0, -100, 4])

    def loss(x: Tensor) -> Tensor:
        return stablemax_cross_entropy(x, target, label_smoothing=0.1, backend="triton")

    assert torch.autograd.gradcheck(loss, x)
    assert torch.autograd.gradgradcheck(loss, x)


def test_first_and_second_derivatives_are_those_of_the_loss() -> None:
    in_interpreter(_twice_differentiable)


def _little_is_kept() -> None:
    x, target = torch.randn(64, 1000, requires_grad=True), torch.zeros(64, dtype=torch.int64)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        stablemax_cross_entropy(x, target, label_smoothing=0.1, backend="triton")
    rest = [t for t in kept if t.data_ptr() not in {x.data_ptr(), target.data_ptr()}]
    assert sum(t.numel() for t in rest) <= 64 + 2


def test_nothing_is_kept_for_backward_but_a_number_a_position() -> None:
    in_interpreter(_little_is_kept)


def _the_module_asks() -> None:
    before = _backend.calls["triton", "_gradient"]
    x = torch.randn(3, 5, requires_grad=True)
    StableMaxCrossEntropyLoss(backend="triton")(x, torch.tensor([0, 1, 2])).backward()
    assert _backend.calls["triton", "_gradient"] == before + 1
    assert not any(backend == "eager" for backend, _ in _backend.calls)


def test_the_module_runs_what_it_was_asked_for() -> None:
    in_interpreter(_the_module_asks)


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


def _far_apart() -> None:
    """Of the four gigabytes only the pages with these logits are ever touched."""
    memory = torch.empty((1 << 31) + 64, dtype=torch.bfloat16)
    values = torch.arange(24, dtype=torch.bfloat16).view(3, 8) % 7
    for view in (memory.as_strided((3, 8), (1 << 30, 1)), memory.as_strided((8, 3), (1, 1 << 30)).t()):
        view.copy_(values)
        for x, near in ((view, values), (view.t(), values.t())):
            target = torch.arange(x.shape[0]) % 3
            losses, _ = stablemax.losses(problem_of(x, target, None, -100, 0.0, torch.float64))
            assert_same(to_array(losses), to_array(stablemax_cross_entropy(near.double(), target, reduction="none")))


def test_logits_more_than_two_billion_apart_are_found() -> None:
    in_interpreter(_far_apart)
