"""StableMax and its cross-entropy as autograd functions: what is kept, what is recomputed, what has which gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from trysquare import _backend
from trysquare._blocks import Blockwise
from trysquare.ops import stablemax as ops


def probabilities(x: Tensor, dim: int) -> Tensor:
    """p over a dimension, in the dtype of x."""
    return _StableMax.apply(x, dim)  # type: ignore[no-any-return, no-untyped-call]


def log_probabilities(x: Tensor, dim: int) -> Tensor:
    """log p over a dimension, in the dtype of x."""
    return _LogStableMax.apply(x, dim)  # type: ignore[no-any-return, no-untyped-call]


def index_losses(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    dtype: torch.dtype,
    backend: str = "eager",
) -> Tensor:
    """The loss of every position, for class indices, in `dtype`; 0 where they are ignored. By "eager" or "triton"."""
    function = _KernelIndexLosses if backend == "triton" else _IndexLosses
    return function.apply(  # type: ignore[no-any-return, no-untyped-call]
        x, target, weight, ignore_index, label_smoothing, dtype
    )


def probability_losses(
    x: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float, dtype: torch.dtype
) -> Tensor:
    """The loss of every position, for class probabilities, in `dtype`."""
    return _ProbabilityLosses.apply(  # type: ignore[no-any-return, no-untyped-call]
        x, target, weight, label_smoothing, dtype
    )


class _StableMax(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.dim = dim
        return _as_output(_backend.run("eager", ops.stablemax, x, dim))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        p = probabilities(x, ctx.dim)  # through autograd, for second derivatives
        return ops.stablemax_gradient(x, p, g, ctx.dim), None


class _LogStableMax(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.dim = dim
        return _as_output(_backend.run("eager", ops.log_stablemax, x, dim))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        p = probabilities(x, ctx.dim)
        return ops.log_stablemax_gradient(x, p, g, ctx.dim), None


class _IndexLosses(Function):
    """The loss of every position, for class indices."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ignored = target == ignore_index
        y = target.masked_fill(ignored, 0)
        w = None if weight is None else weight.to(dtype)
        normalizer = Blockwise(ops.log_sum, [x], [], [], dtype).per_position()
        losses = ops.index_losses(_pick(x, y).to(dtype), normalizer, None if w is None else w[y])
        if label_smoothing:
            of_all = Blockwise(ops.weighted_surprise, [x], [normalizer], [w], dtype).per_position()
            losses = (1 - label_smoothing) * losses + label_smoothing / x.shape[1] * of_all
        ctx.save_for_backward(x, target, weight, normalizer)
        ctx.settings = ignore_index, label_smoothing, dtype
        return _as_output(losses.masked_fill_(ignored, 0))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, target, weight, normalizer = ctx.saved_tensors
        ignore_index, label_smoothing, dtype = ctx.settings
        if _wants_second_derivative():
            return *_differentiable_gradients(ctx, g, *ctx.settings), None, None, None
        ignored = target == ignore_index
        y = target.masked_fill(ignored, 0)
        factor = g.masked_fill(ignored, 0)
        w = None if weight is None else weight.to(dtype)
        w_y, w_sum = (1.0, float(x.shape[1])) if w is None else (w[y], w.sum())
        uniform = label_smoothing / x.shape[1]
        scale = factor * (-normalizer).exp() * ((1 - label_smoothing) * w_y + uniform * w_sum)
        lift = uniform * factor if label_smoothing else None
        at_y = ops.chosen_gradient(_pick(x, y).to(dtype), normalizer, w_y, w_sum, uniform, label_smoothing) * factor
        gradient = Blockwise(ops.index_gradient, [x], [y, at_y, scale, lift], [w], dtype).per_entry(x)
        return _zero_where(ignored, gradient), None, None, None, None, None


class _KernelIndexLosses(Function):
    """The same by Triton kernels, which read logits once each way."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        dtype: torch.dtype,
    ) -> Tensor:
        from trysquare.kernels import stablemax, stablemax_problem

        problem = stablemax_problem.problem_of(x, target, weight, ignore_index, label_smoothing, dtype)
        losses, normalizer = stablemax.losses(problem)
        ctx.save_for_backward(x, target, weight, normalizer)
        ctx.settings = ignore_index, label_smoothing, dtype
        return losses.view(target.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        from trysquare.kernels import stablemax_gradient, stablemax_problem

        x, target, weight, normalizer = ctx.saved_tensors
        if _wants_second_derivative():
            return *_differentiable_gradients(ctx, g, *ctx.settings), None, None, None
        problem = stablemax_problem.problem_of(x, target, weight, *ctx.settings)
        return stablemax_gradient.gradient(problem, normalizer, g.reshape(-1)), None, None, None, None, None


class _ProbabilityLosses(Function):
    """The loss of every position, for class probabilities."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float, dtype: torch.dtype
    ) -> Tensor:
        w = None if weight is None else weight.to(dtype)
        normalizer = Blockwise(ops.log_sum, [x], [], [], dtype).per_position()
        losses = Blockwise(ops.probability_losses, [x, target], [normalizer], [w, label_smoothing], dtype)
        ctx.save_for_backward(x, target, weight, normalizer)
        ctx.settings = label_smoothing, dtype
        return _as_output(losses.per_position())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, target, weight, normalizer = ctx.saved_tensors
        label_smoothing, dtype = ctx.settings
        needs = ctx.needs_input_grad
        if _wants_second_derivative():
            return *_differentiable_gradients(ctx, g, -100, *ctx.settings), None, None
        w = None if weight is None else weight.to(dtype)
        of_x = Blockwise(ops.probability_gradient, [x, target], [normalizer, g], [w, label_smoothing], dtype)
        of_target = Blockwise(ops.target_gradient, [x], [normalizer, g], [w, label_smoothing], dtype)
        of_weight = Blockwise(ops.weight_gradient, [x, target], [normalizer, g], [label_smoothing], dtype)
        return (
            of_x.per_entry(x) if needs[0] else None,
            of_target.per_entry(target) if needs[1] else None,
            of_weight.per_class().to(weight.dtype) if needs[2] else None,
            None,
            None,
        )


def _as_output(result: Tensor) -> Tensor:
    """What a forward pass returns: under a compiler a tensor that nothing has written to in place.

    torch.compile makes outputs of the tensors between, too. One that was written in place comes out twice then, and
    torch 2.11 hands its gradient to the wrong one: that of the logits became 0 (pytorch/pytorch#180642). The copy is
    fused away.
    """
    return result.clone() if torch.compiler.is_compiling() else result


def _wants_second_derivative() -> bool:
    """Whether autograd records the backward pass (`create_graph=True`). A compiler has no second derivatives."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _differentiable_gradients(
    ctx: Any, g: Tensor, ignore_index: int, label_smoothing: float, dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """The gradients of logits, target and weight as a differentiable function, from log p in full.

    `F.cross_entropy` takes a log-softmax first, which leaves log-probabilities as they are.
    """
    x, target, weight, _ = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    t = target.to(dtype) if target.is_floating_point() else target
    w = None if weight is None else weight.to(dtype)
    losses = F.cross_entropy(
        log_probabilities(x.to(dtype), 1),
        t,
        w,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    wanted = [tensor for tensor, needed in zip((x, target, weight), needs, strict=True) if needed]
    gradients = iter(torch.autograd.grad(losses, wanted, g, create_graph=True))
    return tuple(next(gradients) if needed else None for needed in needs)


def _pick(x: Tensor, y: Tensor) -> Tensor:
    """x_y of every position."""
    return x.gather(1, y.unsqueeze(1)).squeeze(1)


def _zero_where(ignored: Tensor, gradient: Tensor) -> Tensor:
    """Ignored positions have no gradient, not even where their logits are NaN."""
    if gradient.device.type == "cpu" and not torch.compiler.is_compiling():
        if ignored.any():
            gradient.movedim(1, -1)[ignored.nonzero(as_tuple=True)] = 0  # touches nothing else
        return gradient
    return gradient.masked_fill_(ignored.unsqueeze(1), 0)
