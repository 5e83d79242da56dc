r"""StableMax, a softmax that grows linearly, and its cross-entropy with the conventions of `F.cross_entropy`.

With $s(x) = 1 + x$ for $x \ge 0$, $1 / (1 - x)$ for $x < 0$ and
$\gamma(x) = \log s(x) = \mathrm{sign}(x) \log(1 + |x|)$:

$$ p_k = s(x_k) / \sum_j s(x_j), \qquad \log p_k = \gamma_k - \log \sum_j e^{\gamma_j}. $$
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from trysquare import _cross_entropy, _stablemax_autograd


def stablemax(x: Tensor, dim: int) -> Tensor:
    r"""Probabilities $p_k = s(x_k) / \sum_j s(x_j)$ over a dimension.

    Half-precision logits are computed in float32 and come back in their own dtype, under autocast as float32. A logit
    of $-\infty$ has probability 0 and gradient 0; one of $+\infty$, or nothing but $-\infty$, gives
    NaN, as in softmax. It can be differentiated more than once.

    Args:
        x: logits of any shape.
        dim: dimension of the classes.

    Raises:
        TypeError, NotImplementedError: ``x`` is no tensor of real floating-point numbers.
        IndexError: ``x`` has no such dimension.

    Example:
        >>> stablemax(torch.tensor([0.0, 3.0, -1.0]), dim=0)
        tensor([0.1818, 0.7273, 0.0909])
    """
    _cross_entropy.check_logits(x, "x")
    p = _stablemax_autograd.probabilities(x.to(_arithmetic(x.dtype)), dim)
    return p.to(_result_dtype(x))


def log_stablemax(x: Tensor, dim: int) -> Tensor:
    r"""Logarithm of the probabilities, $\log p_k$, over a dimension; nothing overflows and no loss is capped.

    For precision, autocast, infinities and double differentiation see `stablemax`.

    Args:
        x: logits of any shape.
        dim: dimension of the classes.

    Raises:
        TypeError, NotImplementedError: ``x`` is no tensor of real floating-point numbers.
        IndexError: ``x`` has no such dimension.

    Example:
        >>> log_stablemax(torch.tensor([0.0, 3.0, -1.0]), dim=0)
        tensor([-1.7047, -0.3185, -2.3979])
    """
    _cross_entropy.check_logits(x, "x")
    log_p = _stablemax_autograd.log_probabilities(x.to(_arithmetic(x.dtype)), dim)
    return log_p.to(_result_dtype(x))


def stablemax_cross_entropy(
    input: Tensor,  # noqa: A002  # torch's name for it
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    backend: str = "auto",
) -> Tensor:
    r"""Cross-entropy of StableMax: `torch.nn.functional.cross_entropy` with another softmax.

    $$ \ell = -\sum_k a_k \log p_k, \qquad a_k = w_k \bigl((1 - \alpha)\,t_k + \alpha / C\bigr), $$

    where $t_k = [k = y]$ for a class index $y$. "mean" divides the sum by $\sum_i w_{y_i}$ over the
    targets that are not ignored, or by the number of positions where the target holds probabilities. If every target is
    ignored it is NaN, and the gradient 0. Ignored positions have gradient 0 whatever their logits are.

    The forward pass keeps one number for each position, the backward pass recomputes: beyond the logits and their
    gradient memory grows with N and not with N × C, also where half-precision logits are computed in float32. Half in,
    half out; float32 under autocast; otherwise the dtype to which the floating-point arguments promote.

    Args:
        input: logits of shape (C), (N, C) or (N, C, d₁, …).
        target: class indices of shape (), (N) or (N, d₁, …), int64; or class probabilities of the shape of ``input``.
        weight: weight $w$ of each class, shape (C).
        ignore_index: targets with this index do not count.
        reduction: "mean", "sum" or "none".
        label_smoothing: $\alpha$ in [0, 1].
        backend: "auto" takes Triton kernels for class indices on a GPU that has Triton, else "eager"; "triton" asks for
            them. Inside of a `torch.compile` there is nothing to choose: the eager operations are traced.

    Returns:
        A 0-dim tensor; for reduction "none" one loss for each position. Probabilities, and weights beside them, get
        gradients too. A second derivative takes memory for N × C numbers.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError, IndexError: as `F.cross_entropy`, naming the argument,
            its value and what is allowed. A class index out of range is an IndexError on the CPU. The host does not
            wait for a GPU to look: kernels make the loss and the gradient of that position NaN; torch's operations,
            which are the eager loss and look up weights for "mean", stop with an assertion.
        ImportError, ValueError: ``backend="triton"`` cannot be met: Triton is not installed, there is no GPU for it, or
            the target holds probabilities, for which there are no kernels.

    Example:
        >>> logits = torch.zeros(2, 3, requires_grad=True)
        >>> loss = stablemax_cross_entropy(logits, torch.tensor([0, 2]))
        >>> loss.backward()
        >>> logits.grad
        tensor([[-0.3333,  0.1667,  0.1667],
                [ 0.1667,  0.1667, -0.3333]])

    References:
        Prieto et al. 2025, Grokking at the Edge of Numerical Stability, arXiv 2501.04697.
    """
    _cross_entropy.check_backend(backend)
    _cross_entropy.check(input, target, weight, ignore_index, reduction, label_smoothing)
    chosen = _cross_entropy.chosen_backend(backend, input, target)
    floats = [t for t in (input, target, weight) if t is not None and t.is_floating_point()]
    result = _result_dtype(*floats)
    dtype = _arithmetic(result)
    x = input.unsqueeze(0) if input.ndim == 1 else input
    if _cross_entropy.is_probabilities(input, target):
        losses = _stablemax_autograd.probability_losses(x, target.view(x.shape), weight, label_smoothing, dtype)
        divisor: Tensor | int = losses.numel()
    else:
        y = target.long().view(x.shape[:1] + x.shape[2:])
        losses = _stablemax_autograd.index_losses(x, y, weight, ignore_index, label_smoothing, dtype, chosen)
        divisor = _total_weight(y, weight, ignore_index, dtype) if reduction == "mean" else 1
    if reduction == "none":
        return losses.squeeze(0).to(result) if input.ndim == 1 else losses.to(result)
    total = losses.sum()
    return (total / divisor if reduction == "mean" else total).to(result)


class StableMaxCrossEntropyLoss(torch.nn.Module):
    """`stablemax_cross_entropy` as a module, a drop-in for `torch.nn.CrossEntropyLoss`.

    Args:
        weight: weight of each class, shape (C); a buffer, so it moves and is saved with the module.
        ignore_index: targets with this index do not count.
        reduction: "mean", "sum" or "none".
        label_smoothing: from 0 to 1.
        backend: "auto", "eager" or "triton".

    Raises:
        TypeError, ValueError, RuntimeError, ImportError: one of these settings cannot be meant, or met.

    Example:
        >>> loss = StableMaxCrossEntropyLoss(label_smoothing=0.1)
        >>> loss(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor(1.3863)
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _cross_entropy.check_backend(backend)
        _cross_entropy.check_settings(ignore_index, reduction, label_smoothing)
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.backend = backend

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # noqa: A002  # torch's name for it
        """The loss of these logits; shapes as in `stablemax_cross_entropy`."""
        settings = self.ignore_index, self.reduction, self.label_smoothing
        return stablemax_cross_entropy(input, target, self.weight, *settings, backend=self.backend)

    def extra_repr(self) -> str:
        """What differs from the defaults, for `print`."""
        settings = {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0, "backend": "auto"}
        return ", ".join(f"{k}={getattr(self, k)!r}" for k, default in settings.items() if getattr(self, k) != default)


def _total_weight(target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """Σ w_y over the targets that are not ignored."""
    ignored = target == ignore_index
    if weight is None:
        return (~ignored).sum()
    return weight.to(dtype)[target.masked_fill(ignored, 0)].masked_fill_(ignored, 0).sum()


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The precision in which it is computed: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def _result_dtype(*floats: Tensor) -> torch.dtype:
    """What the arguments promote to; at least float32 under autocast, as `F.cross_entropy` there."""
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in floats))
    return _arithmetic(dtype) if torch.is_autocast_enabled(floats[0].device.type) else dtype
