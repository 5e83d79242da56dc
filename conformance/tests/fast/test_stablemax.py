"""StableMax's functions by the conventions of `F.cross_entropy`, which of log-probabilities is an oracle of its own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from trysquare import StableMaxCrossEntropyLoss, _blocks, log_stablemax, stablemax, stablemax_cross_entropy
from trysquare_conformance.budget import STORED, assert_same, judge, measure
from trysquare_conformance.noise import FLOAT32
from trysquare_conformance.snapshots import to_array
from trysquare_reference import stablemax as reference

HALVES = [torch.float16, torch.bfloat16]
quickly = settings(max_examples=60, deadline=None)


def oracle(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """`F.cross_entropy` takes a log-softmax, which leaves log-probabilities as they are."""
    return F.cross_entropy(log_stablemax(x, min(1, x.ndim - 1)), *arguments, **options)


def gradients(loss: Tensor, leaves: list[Tensor], seed: int = 0) -> list[Tensor]:
    g = torch.randn(loss.shape, generator=torch.Generator().manual_seed(seed), dtype=loss.dtype)
    return list(torch.autograd.grad(loss, leaves, g))


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Tensor], dict[str, Any], int]:
    """Logits, target and weight in float64, the settings, and how many elements make a block."""
    further = draw(st.lists(st.integers(1, 4), max_size=2))
    shape = draw(st.sampled_from([[draw(st.integers(1, 9)), draw(st.integers(1, 12)), *further], [5]]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * draw(st.sampled_from([1e-3, 1.0, 1e3]))
    probabilities = draw(st.booleans())
    classes, positions = shape[min(1, len(shape) - 1)], shape[:1] + shape[2:] if len(shape) > 1 else []
    target = torch.rand(shape, generator=generator, dtype=torch.float64)
    if not probabilities:
        target = torch.randint(classes, positions, generator=generator)
        target = target.where(torch.rand(positions, generator=generator) < 0.8, -100)
    weight = torch.rand(classes, generator=generator, dtype=torch.float64) if draw(st.booleans()) else None
    rule = {
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
    }
    tensors = [x, target] if weight is None else [x, target, weight]
    if draw(st.booleans()) and x.ndim > 1:
        tensors[0] = x.transpose(0, -1).contiguous().transpose(0, -1)
    for tensor in tensors[: 3 if probabilities else 1]:
        tensor.requires_grad_()
    return tensors, rule, draw(st.sampled_from([1, 7, 1 << 17]))


@quickly
@given(problem=problems())
def test_loss_and_gradients_are_those_of_torch(problem: tuple[list[Tensor], dict[str, Any], int]) -> None:
    tensors, rule, block = problem
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    expected = oracle(*tensors, **rule)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_blocks, "CPU_ELEMENTS", block)
        loss = stablemax_cross_entropy(*tensors, **rule)
        found = gradients(loss, leaves)
    assert (loss.shape, loss.dtype) == (expected.shape, expected.dtype)
    assert_same(to_array(loss), to_array(expected), scale=1e3, operations=256)
    for mine, theirs in zip(found, gradients(expected, leaves), strict=True):
        assert_same(to_array(mine), to_array(theirs), scale=1e3, operations=256)


@pytest.mark.parametrize("shape", [(0, 4), (2, 4, 0), (0, 4, 3)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("probabilities", [False, True])
def test_an_empty_batch_is_as_in_torch(shape: tuple[int, ...], reduction: str, probabilities: bool) -> None:
    x = torch.zeros(shape, requires_grad=True)
    target = torch.zeros(shape) if probabilities else torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
    loss, expected = (f(x, target, reduction=reduction) for f in (stablemax_cross_entropy, oracle))
    assert loss.shape == expected.shape
    assert torch.equal(loss.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert gradients(loss, [x])[0].shape == shape


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 0.5])])
def test_if_everything_is_ignored_the_mean_is_nan_and_the_gradient_zero(
    label_smoothing: float, weight: Tensor | None
) -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [float("nan"), 0.0, 0.0]], requires_grad=True)
    loss = stablemax_cross_entropy(x, torch.tensor([-100, -100]), weight, label_smoothing=label_smoothing)
    assert loss.isnan()
    assert not gradients(loss, [x])[0].any()
    assert stablemax_cross_entropy(x, torch.tensor([-100, -100]), reduction="sum") == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_unbatched_target_may_have_one_dimension_as_in_newer_torch(reduction: str) -> None:
    x, target = torch.tensor([1.0, 2.0]), torch.tensor([0])
    loss = stablemax_cross_entropy(x, target, reduction=reduction)
    assert torch.equal(loss, stablemax_cross_entropy(x, target[0], reduction=reduction))


def test_byte_targets_are_taken_as_in_torch() -> None:
    x, target = torch.randn(3, 4), torch.tensor([0, 3, 1])
    assert torch.equal(stablemax_cross_entropy(x, target.to(torch.uint8)), stablemax_cross_entropy(x, target))


# Precision


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("function", [lambda x: stablemax(x, 1), lambda x: log_stablemax(x, 1)])
def test_half_in_half_out_with_arithmetic_in_float32(dtype: torch.dtype, function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    wide = x.detach().float().requires_grad_()
    values, expected = function(x), function(wide)
    assert values.dtype is dtype
    assert torch.equal(values, expected.to(dtype))
    (g,) = torch.autograd.grad(values.float().square().sum(), x)
    assert g.dtype is dtype


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_of_half_precision_is_that_of_float32_rounded_once(dtype: torch.dtype, reduction: str) -> None:
    x = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    wide, target = x.detach().float().requires_grad_(), torch.arange(50)
    loss, expected = (stablemax_cross_entropy(t, target, reduction=reduction) for t in (x, wide))
    assert loss.dtype is dtype
    assert torch.equal(loss, expected.to(dtype))
    if reduction == "sum":  # whose incoming gradient no dtype rounds
        (g,), (wide_g,) = torch.autograd.grad(loss, x), torch.autograd.grad(expected, wide)
        assert torch.equal(g, wide_g.to(dtype))


@pytest.mark.parametrize(
    ("logits", "probabilities", "result"),
    [
        (torch.float32, torch.float64, torch.float64),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float64, torch.float32, torch.float64),
    ],
)
def test_dtypes_promote_as_in_torch(logits: torch.dtype, probabilities: torch.dtype, result: torch.dtype) -> None:
    x = torch.randn(3, 4).to(logits).requires_grad_()
    t = torch.rand(3, 4).to(probabilities).requires_grad_()
    loss, expected = stablemax_cross_entropy(x, t), F.cross_entropy(x, t)
    assert loss.dtype is expected.dtype is result
    assert [g.dtype for g in gradients(loss, [x, t])] == [logits, probabilities]


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_under_autocast_the_result_is_at_least_float32_as_in_torch(dtype: torch.dtype) -> None:
    x = torch.randn(3, 4).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = (f(x, torch.tensor([0, 1, 2])) for f in (stablemax_cross_entropy, F.cross_entropy))
        p = stablemax(x, 1)
    assert loss.dtype is expected.dtype
    assert p.dtype is expected.dtype
    loss.backward()
    assert x.grad is not None
    assert x.grad.dtype is dtype


def test_autocast_computes_in_float32_and_a_linear_head_learns_through_it() -> None:
    head = torch.nn.Linear(16, 10)
    torch.nn.init.zeros_(head.weight)
    inputs, target = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 10
    with torch.autocast("cpu", torch.bfloat16):
        loss = stablemax_cross_entropy(head(inputs), target)
    loss.backward()
    assert head.weight.grad is not None
    assert head.weight.grad.any(dim=1).all()


class NoFloat64(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails as a device without float64 does, such as Apple's GPUs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple) else (result,)
        if any(isinstance(t, Tensor) and t.dtype is torch.float64 for t in made):
            raise TypeError(f"{func} made a float64 tensor")
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_float64_is_needed(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 4).to(dtype).requires_grad_(), torch.rand(4).to(dtype)
    with NoFloat64():
        stablemax_cross_entropy(x, torch.tensor([0, 1, -100]), weight, label_smoothing=0.1).backward()
        stablemax_cross_entropy(x, torch.rand(3, 4).to(dtype), weight).backward()
        (stablemax(x, 1) + log_stablemax(x, 1)).sum().backward()


def test_the_loss_near_the_largest_numbers_is_that_of_the_reference() -> None:
    """Σ s overflows there, in float64 too, and log s does not."""
    x = torch.tensor([[1.7e308, 1.7e308, -1.7e308], [-1.7e308, -1e308, -1.7e308]], dtype=torch.float64)
    loss = stablemax_cross_entropy(x, torch.tensor([2, 0]), reduction="none")
    assert_same(to_array(loss), reference.cross_entropy(to_array(x), torch.tensor([2, 0]).numpy(), reduction="none"))
    assert_same(to_array(stablemax(x, 1)), reference.stablemax(to_array(x), 1))


def test_a_loss_is_never_negative() -> None:
    x = torch.full((1000, 3), -1e4) + torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
    x[:, 0] = torch.logspace(0, 38, 1000)
    losses = stablemax_cross_entropy(x, torch.zeros(1000, dtype=torch.int64), reduction="none")
    assert (losses >= 0).all()


# The module


def test_the_module_is_the_function_and_moves_its_weight() -> None:
    x, target, weight = torch.randn(5, 3), torch.tensor([0, 1, 2, 7, 0]), torch.tensor([1.0, 2.0, 3.0])
    module = StableMaxCrossEntropyLoss(weight, ignore_index=7, reduction="sum", label_smoothing=0.1)
    assert torch.equal(module(x, target), stablemax_cross_entropy(x, target, weight, 7, "sum", 0.1))
    assert module.double().weight is not None
    assert module(x.double(), target).dtype is torch.float64
    assert list(module.state_dict()) == ["weight"]
    assert repr(module) == "StableMaxCrossEntropyLoss(ignore_index=7, reduction='sum', label_smoothing=0.1)"
    assert repr(StableMaxCrossEntropyLoss()) == "StableMaxCrossEntropyLoss()"
    assert repr(StableMaxCrossEntropyLoss(backend="eager")) == "StableMaxCrossEntropyLoss(backend='eager')"


def test_the_module_takes_the_place_of_the_one_in_torch() -> None:
    weight = torch.tensor([1.0, 2.0, 3.0])
    theirs = torch.nn.CrossEntropyLoss(weight, ignore_index=1, reduction="none", label_smoothing=0.2)
    mine = StableMaxCrossEntropyLoss(weight, ignore_index=1, reduction="none", label_smoothing=0.2)
    mine.load_state_dict(theirs.state_dict())
    x, target = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    expected = theirs.double()(log_stablemax(x, 1), target)
    assert_same(to_array(mine.double()(x, target)), to_array(expected), scale=10.0)


# Agreement with the reference on data of a real size (the cases of `trysquare verify` are small)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_many_positions_and_classes_are_within_the_budget(dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(40, 5003, generator=generator)).to(getattr(torch, dtype)).requires_grad_()
    target = torch.randint(5003, (40,), generator=generator)
    assert x.numel() > _blocks.CPU_ELEMENTS
    loss = stablemax_cross_entropy(x, target)
    (g,) = torch.autograd.grad(loss, x)

    def run(wrap: Any) -> dict[str, Any]:
        wrapped, y = wrap(to_array(x)), target.numpy()
        return {
            "loss": reference.cross_entropy(wrapped, y),
            "gradient": reference.cross_entropy_gradient(wrapped, y),
        }

    allowed = measure(run, FLOAT32, dict.fromkeys(("loss", "gradient"), STORED[dtype]), seed=0, draws=8)
    assert judge(allowed["loss"], to_array(loss)).right
    assert judge(allowed["gradient"], to_array(g)).right


def test_a_weight_of_zero_counts_nothing_even_where_the_loss_would_be_infinite() -> None:
    x, weight = torch.tensor([[0.0, -torch.inf, 1.0]] * 2, dtype=torch.float64), torch.tensor([1.0, 0.0, 1.0]).double()
    for smoothing in (0.0, 0.1):
        options: dict[str, Any] = {"reduction": "none", "label_smoothing": smoothing}
        found = stablemax_cross_entropy(x, torch.tensor([1, 0]), weight, **options)
        expected = reference.cross_entropy(x.numpy(), torch.tensor([1, 0]).numpy(), weight.numpy(), **options)
        assert_same(to_array(found), expected)
