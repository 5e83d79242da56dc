"""StableMax's derivatives: right where autograd of its formulas would fail, and differentiable again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from trysquare import _blocks, log_stablemax, stablemax, stablemax_cross_entropy
from trysquare_conformance.budget import assert_same
from trysquare_conformance.snapshots import to_array
from trysquare_reference import stablemax as reference

INF, NAN = float("inf"), float("nan")
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "stablemax": lambda x: stablemax(x, 1),
    "log_stablemax": lambda x: log_stablemax(x, 1),
    "index": lambda x: stablemax_cross_entropy(x, torch.zeros(len(x), dtype=torch.int64)),
    "smoothed": lambda x: stablemax_cross_entropy(x, torch.zeros(len(x), dtype=torch.int64), label_smoothing=0.1),
    "probabilities": lambda x: stablemax_cross_entropy(x, torch.eye(x.shape[1], dtype=x.dtype)[: len(x)]),
}
each = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x).square().sum(), x)[0]


@each
@pytest.mark.parametrize("block", [1, 1 << 17])
def test_first_and_second_derivatives_are_those_of_the_values(
    function: Callable[[Tensor], Tensor], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_blocks, "CPU_ELEMENTS", block)
    assert gradcheck(function, normal(3, 4))
    assert gradgradcheck(function, normal(3, 4))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_probabilities_and_class_weights_get_gradients_too(reduction: str, label_smoothing: float) -> None:
    def loss(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return stablemax_cross_entropy(x, target, weight, -100, reduction, label_smoothing)

    x, target, weight = normal(2, 4, 3), normal(2, 4, 3, seed=1), normal(4, seed=2)
    assert gradcheck(loss, (x, target, weight))
    assert gradgradcheck(loss, (x, target, weight))


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.3}, {"ignore_index": 1}])
def test_a_weighted_loss_of_indices_can_be_differentiated_twice(settings: dict[str, Any]) -> None:
    target, weight = torch.tensor([[0, 1], [3, 2]]), torch.tensor([1.0, 2.0, 0.0, 0.5], dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return stablemax_cross_entropy(x, target, weight, **settings)

    assert gradcheck(loss, normal(2, 4, 2))
    assert gradgradcheck(loss, normal(2, 4, 2))


def test_an_incoming_gradient_of_a_strange_layout_is_taken() -> None:
    x, target = normal(6, 5), torch.arange(6) % 5
    for g in (torch.ones((), dtype=torch.float64).expand(6), torch.ones(12, dtype=torch.float64)[::2]):
        losses = stablemax_cross_entropy(x, target, reduction="none")
        (found,) = torch.autograd.grad(losses, x, g)
        expected = reference.cross_entropy_gradient(to_array(x), target.numpy(), reduction="sum")
        assert_same(to_array(found), expected, scale=1.0)


# Where autograd of the formulas fails


@each
def test_a_zero_initialised_head_gets_a_gradient(function: Callable[[Tensor], Tensor]) -> None:
    """Autograd of sign(x)·log(1 + |x|) gives 0 at 0: nothing would ever train."""
    x = torch.zeros(3, 4, dtype=torch.float64).requires_grad_()
    g = normal(*function(x).shape, seed=1)
    (found,) = torch.autograd.grad(function(x), x, g)
    assert found.all()
    assert gradcheck(function, x)


@each
@pytest.mark.parametrize("value", [1.0, -1.0, -0.0])
def test_the_gradient_is_finite_where_a_branch_is_not(function: Callable[[Tensor], Tensor], value: float) -> None:
    """Autograd of a piecewise s gives NaN at 1, from the branch 1/(1 − x) that is not taken."""
    x = torch.full((3, 4), value).requires_grad_()
    found = gradient(function, x)
    assert found.isfinite().all()
    assert_same(to_array(found), to_array(gradient(function, x.double())), scale=1e9)


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_masked_logit_has_gradient_zero(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, -INF, 2.0], [0.0, 3.0, -INF]], dtype=dtype)
    x.requires_grad_()
    (found,) = torch.autograd.grad(function(x).clamp(max=100).sum(), x)
    assert found.isfinite().all()
    assert not found[x == -INF].any()


def test_the_loss_of_a_masked_target_is_infinite_and_its_gradient_zero_there() -> None:
    x = torch.tensor([[1.0, -INF, 2.0]], requires_grad=True)
    loss = stablemax_cross_entropy(x, torch.tensor([1]))
    (found,) = torch.autograd.grad(loss, x)
    assert loss == INF
    assert found[0, 1] == 0
    assert found.isfinite().all()


@pytest.mark.parametrize("row", [[1.0, INF, 0.0], [-INF, -INF, -INF], [NAN, 0.0, 0.0]])
def test_what_has_no_answer_shows_in_its_own_position_only(row: list[float]) -> None:
    x = torch.tensor([row, [1.0, 2.0, 3.0]], requires_grad=True)
    losses = stablemax_cross_entropy(x, torch.tensor([0, 0]), reduction="none")
    (found,) = torch.autograd.grad(losses, x, torch.ones(2))
    assert losses.isnan().tolist() == [True, False]
    assert found.isnan().all(dim=1).tolist() == [True, False]


@each
def test_huge_logits_lose_no_gradient(function: Callable[[Tensor], Tensor]) -> None:
    """Softmax of them is one-hot, so its gradient is exactly zero."""
    x = torch.tensor([[1e4, -1e4, 0.0, 5.0], [-1e4, 1e4, 3.0, 0.0], [1e30, -1e30, 1.0, 0.0]], requires_grad=True)
    (found,) = torch.autograd.grad(function(x)[..., 0].sum() if function(x).ndim else function(x), x)
    assert found[:2].all()
    assert found.isfinite().all()


def test_the_loss_is_not_capped_and_its_gradient_does_not_end() -> None:
    """log(p + 1e-12) would end both at 27.6."""
    x = torch.tensor([[-1e30, 1e30], [-1e15, 1e15]], requires_grad=True)
    losses = stablemax_cross_entropy(x, torch.tensor([0, 0]), reduction="none")
    (found,) = torch.autograd.grad(losses, x, torch.ones(2))
    assert (losses > 60).all()
    assert found.all()


def test_what_is_ignored_may_be_anything() -> None:
    x = torch.tensor([[NAN, 1.0], [INF, -INF], [-INF, -INF], [1.0, 2.0]], requires_grad=True)
    loss = stablemax_cross_entropy(x, torch.tensor([-100, -100, -100, 0]), label_smoothing=0.1)
    (found,) = torch.autograd.grad(loss, x)
    alone = x.detach()[3:].requires_grad_()
    expected = stablemax_cross_entropy(alone, torch.tensor([0]), label_smoothing=0.1)
    assert torch.equal(loss, expected)
    assert not found[:3].any()
    assert torch.equal(found[3:], torch.autograd.grad(expected, alone)[0])


def test_the_gradient_has_the_layout_of_the_logits() -> None:
    """So that it can be accumulated without a copy."""
    x = normal(4, 6, 5).detach().transpose(1, 2).requires_grad_()
    loss = stablemax_cross_entropy(x, torch.zeros(4, 6, dtype=torch.int64))
    assert torch.autograd.grad(loss, x)[0].stride() == x.stride()


def test_functorch_is_refused_and_never_silently_wrong() -> None:
    x, target = normal(3, 4).detach(), torch.tensor([0, 1, 2])
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda logits: stablemax_cross_entropy(logits, target))(x)
    with pytest.raises(RuntimeError):
        torch.func.vmap(lambda logits: stablemax_cross_entropy(logits, target))(x.expand(2, 3, 4))
