"""StableMax's kernels beside the eager loss, with awkward layouts and bad logits; `test_interpreted` runs this."""

from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from trysquare import StableMaxCrossEntropyLoss, _backend, stablemax_cross_entropy
from trysquare.kernels import stablemax, stablemax_gradient, stablemax_problem
from trysquare.kernels.stablemax_problem import problem_of
from trysquare_conformance.budget import assert_same
from trysquare_conformance.snapshots import to_array

Shape = tuple[int, ...]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what `tl.where` does not choose


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


def test_long_rows_and_all_layouts_are_the_same_as_eager_in_float64() -> None:
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


def test_rows_that_begin_anywhere_are_read_in_whole_chunks_and_nothing_beside_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of 131 classes that begin anywhere, between numbers that would make NaN of every sum."""
    monkeypatch.setattr(stablemax_problem, "TILE", 128)
    ordinary = property(lambda _: 1)
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


def test_a_class_out_of_range_makes_its_position_nan_and_no_other() -> None:
    torch.manual_seed(0)
    x, target = torch.randn(4, 6), torch.tensor([0, 6, 5, -1])
    problem = problem_of(x, target, None, -100, 0.1, torch.float32)
    losses, normalizer = stablemax.losses(problem)
    gradient = stablemax_gradient.gradient(problem, normalizer, torch.ones(4))
    wrong = torch.tensor([False, True, False, True])
    assert torch.equal(losses.isnan(), wrong)
    assert torch.equal(gradient.isnan().all(1), wrong)
    assert torch.equal(gradient.isnan().any(1), wrong)


def test_one_logit_that_is_not_finite_spreads_as_far_as_in_eager() -> None:
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


def test_a_weight_of_zero_counts_nothing_even_where_the_loss_would_be_infinite() -> None:
    x, weight = torch.tensor([[0.0, -torch.inf, 1.0]] * 2, dtype=torch.float64), torch.tensor([1.0, 0.0, 1.0]).double()
    for smoothing in (0.0, 0.1):
        options: dict[str, Any] = {"reduction": "none", "label_smoothing": smoothing}
        mine, eager = (
            stablemax_cross_entropy(x, torch.tensor([1, 0]), weight, **options, backend=backend)
            for backend in ("triton", "eager")
        )
        assert_same(to_array(mine), to_array(eager))


def test_first_and_second_derivatives_are_those_of_the_loss() -> None:
    torch.manual_seed(0)
    x, target = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.tensor([0, -100, 4])

    def loss(x: Tensor) -> Tensor:
        return stablemax_cross_entropy(x, target, label_smoothing=0.1, backend="triton")

    assert torch.autograd.gradcheck(loss, x)
    assert torch.autograd.gradgradcheck(loss, x)


def test_nothing_is_kept_for_backward_but_a_number_a_position() -> None:
    x, target = torch.randn(64, 1000, requires_grad=True), torch.zeros(64, dtype=torch.int64)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        stablemax_cross_entropy(x, target, label_smoothing=0.1, backend="triton")
    rest = [t for t in kept if t.data_ptr() not in {x.data_ptr(), target.data_ptr()}]
    assert sum(t.numel() for t in rest) <= 64 + 2


def test_the_module_runs_what_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "calls", Counter())
    x = torch.randn(3, 5, requires_grad=True)
    StableMaxCrossEntropyLoss(backend="triton")(x, torch.tensor([0, 1, 2])).backward()
    assert _backend.calls["triton", "_gradient"] == 1
    assert not any(backend == "eager" for backend, _ in _backend.calls)


def test_logits_more_than_two_billion_apart_are_found() -> None:
    """Of the four gigabytes only the pages with these logits are ever touched."""
    memory = torch.empty((1 << 31) + 64, dtype=torch.bfloat16)
    values = torch.arange(24, dtype=torch.bfloat16).view(3, 8) % 7
    for view in (memory.as_strided((3, 8), (1 << 30, 1)), memory.as_strided((8, 3), (1, 1 << 30)).t()):
        view.copy_(values)
        for x, near in ((view, values), (view.t(), values.t())):
            target = torch.arange(x.shape[0]) % 3
            losses, _ = stablemax.losses(problem_of(x, target, None, -100, 0.0, torch.float64))
            assert_same(to_array(losses), to_array(stablemax_cross_entropy(near.double(), target, reduction="none")))
