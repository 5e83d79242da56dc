r"""StableMax: a softmax whose exponential is replaced by a function that grows like $x$ and falls like $1/|x|$.

An exponential swallows every logit that lies far below the largest one, and with it the gradient of an example that
is classified well. StableMax does not: a network can go on learning from what it already gets right.

## Equations

$$ s(x) = \begin{cases} 1 + x & x \ge 0 \\ \dfrac{1}{1 - x} & x < 0 \end{cases} \qquad
   \gamma(x) = \log s(x) = \operatorname{sign}(x)\,\log(1 + |x|) $$

$$ p_k = \frac{s(x_k)}{\sum_j s(x_j)}, \qquad \log p_k = \gamma_k - \log\sum_j e^{\gamma_j} $$

Cross-entropy of one position, over its $C$ classes:

$$ \ell = -\sum_k a_k \log p_k, \qquad
   a_k = \begin{cases}
   w_k\,\bigl((1 - \alpha)\,[k = y] + \alpha / C\bigr) & \text{for a class index } y \\
   w_k\,\bigl((1 - \alpha)\,t_k + \alpha / C\bigr) & \text{for class probabilities } t
   \end{cases} $$

A position whose index is `ignore_index` has $a = 0$. Reduction "none" returns every $\ell_i$ (its factor in the
result is $r_i = 1$), "sum" their sum ($r_i = 1$), and "mean" divides that by $\sum_i w_{y_i}$ over the positions
that are not ignored, or by the number of positions where the target holds probabilities.

Derivatives:

$$ s'(x) = \begin{cases} 1 & x \ge 0 \\ (1 - x)^{-2} & x < 0 \end{cases} \qquad
   \gamma'(x) = \frac{s'(x)}{s(x)} = \frac{1}{1 + |x|} $$

$$ \frac{\partial\ell}{\partial x_k} = \gamma'(x_k)\,\Bigl(p_k \sum_j a_j - a_k\Bigr), \qquad
   \frac{\partial\ell}{\partial t_k} = -(1 - \alpha)\,w_k \log p_k, \qquad
   \frac{\partial\ell}{\partial w_k} = -\bigl((1 - \alpha)\,t_k + \alpha / C\bigr) \log p_k $$

With an incoming gradient $g$ for every class:

$$ \sum_k g_k \frac{\partial p_k}{\partial x_i} = \gamma'(x_i)\,p_i\,\Bigl(g_i - \sum_k g_k p_k\Bigr), \qquad
   \sum_k g_k \frac{\partial \log p_k}{\partial x_i} = \gamma'(x_i)\,\Bigl(g_i - p_i \sum_k g_k\Bigr) $$

## Symbols

| symbol | argument | meaning |
|---|---|---|
| $x$ | `x` | logits of shape (C), (N, C) or (N, C, d₁, …) |
| $y$ or $t$ | `target` | class indices, of the shape of `x` without C; or probabilities, of the shape of `x` |
| $w$ | `weight` | weight of each class, shape (C); None: all 1 |
| | `ignore_index` | positions with this class index do not count |
| | `reduction` | "mean", "sum" or "none" |
| $\alpha$ | `label_smoothing` | from 0 to 1 |
| $g$ | `g` | gradient of what comes after; by default that of the result itself, 1 |

## Departures

- The authors' code takes the logarithm of the quotient, in float64, which Apple's GPUs do not have. Here it is taken of
  $s$ alone, in closed form, and no step needs more precision than the logits have.
- The Axolotl integration computes $\log(p + 10^{-12})$: no loss exceeds 27.6, and there the gradient ends. It builds
  dense one-hot targets, and its "mean" forgets the class weights. Here targets, weights and means are those of
  `torch.nn.functional.cross_entropy`.
- $a_k = 0$ takes a class out of the sum also where $\log p_k = -\infty$; PyTorch gives NaN for probability 0 there.
- $s$ and $\gamma$ are smooth at 0, but their formulas are not: the derivative of $\operatorname{sign}(x)\log(1 + |x|)$,
  taken term by term, is 0 at $x = 0$, and that of $1/(1-x)$ is infinite at $x = 1$, even if that branch is not chosen.
  So the derivatives are equations of their own.

A logit of $-\infty$ has $p = 0$ and gradient 0. A logit of $+\infty$, or a position with no other logit than $-\infty$,
gives NaN, as softmax does. If nothing is left to average, "mean" is NaN and its gradient 0.

## References

- Prieto, Barsbey, Mediano, Birdal. Grokking at the Edge of Numerical Stability. 2025. arXiv:2501.04697.
- The authors' code: <https://github.com/LucasPrietoAl/grokking-at-the-edge-of-numerical-stability>
- `torch.nn.functional.cross_entropy`, for targets, weights, smoothing and reductions.

Examples:
    >>> x = np.array([[0.0, 3.0, -1.0]])
    >>> stablemax(x)
    array([[0.18181818, 0.72727273, 0.09090909]])
    >>> loss = cross_entropy(x, np.array([1]))
    >>> bool(loss == -log_stablemax(x)[0, 1])
    True
    >>> np.round(cross_entropy_gradient(x, np.array([1])), 4)
    array([[ 0.1818, -0.0682,  0.0455]])
"""

import math
from typing import Any

import numpy as np

from trysquare_reference._array import Array, quiet

Target = np.ndarray[Any, np.dtype[Any]]
"""Class indices (any integer type) or class probabilities (float64)."""


def s(x: Array) -> Array:
    """Return $s(x)$.

    Examples:
        >>> s(np.array([-1.0, 0.0, 1.0, -np.inf]))
        array([0.5, 1. , 2. , 0. ])
    """
    return np.where(x >= 0, 1 + np.abs(x), 1 / (1 + np.abs(x)))


def s_slope(x: Array) -> Array:
    """Return $s'(x)$.

    Examples:
        >>> s_slope(np.array([-1.0, 0.0, 1.0]))
        array([0.25, 1.  , 1.  ])
    """
    return np.where(x >= 0, 1.0, np.square(1 / (1 + np.abs(x))))


def log_s(x: Array) -> Array:
    r"""Return $\gamma(x)$.

    Examples:
        >>> log_s(np.array([np.e - 1, 0.0, 1 - np.e]))
        array([ 1.,  0., -1.])
    """
    return np.sign(x) * np.log1p(np.abs(x))


def log_s_slope(x: Array) -> Array:
    r"""Return $\gamma'(x)$.

    Examples:
        >>> log_s_slope(np.array([-1.0, 0.0, 1.0]))
        array([0.5, 1. , 0.5])
    """
    return 1 / (1 + np.abs(x))


@quiet
def stablemax(x: Array, axis: int = -1) -> Array:
    r"""Return $p$.

    Relative to $\max s$ first, so that the sum cannot overflow.

    Args:
        x: Logits of any shape.
        axis: Of the classes.

    Examples:
        >>> stablemax(np.array([1.0, 1.0]))
        array([0.5, 0.5])
    """
    values = s(x) / np.max(s(x), axis=axis, keepdims=True)
    return np.asanyarray(values / np.sum(values, axis=axis, keepdims=True))


@quiet
def log_stablemax(x: Array, axis: int = -1) -> Array:
    r"""Return $\log p$.

    The sum is taken of $e^{\gamma_j - \max\gamma}$, of which none exceeds 1.

    Args:
        x: Logits of any shape.
        axis: Of the classes.

    Examples:
        >>> log_stablemax(np.array([0.0, -np.inf]))
        array([  0., -inf])
    """
    gamma = log_s(x)
    largest = np.max(gamma, axis=axis, keepdims=True)
    total = np.sum(np.exp(gamma - largest), axis=axis, keepdims=True)
    return np.asanyarray(gamma - (largest + np.log(total)))


def stablemax_gradient(x: Array, g: Array, axis: int = -1) -> Array:
    r"""Return $\sum_k g_k\,\partial p_k / \partial x$.

    Args:
        x: Logits.
        g: Gradient with respect to $p$, shaped as `x`.
        axis: Of the classes.

    Examples:
        >>> stablemax_gradient(np.array([1.0, 1.0]), np.array([1.0, 0.0]))
        array([ 0.125, -0.125])
    """
    p = stablemax(x, axis)
    return np.asanyarray(log_s_slope(x) * p * (g - np.sum(g * p, axis=axis, keepdims=True)))


def log_stablemax_gradient(x: Array, g: Array, axis: int = -1) -> Array:
    r"""Return $\sum_k g_k\,\partial \log p_k / \partial x$.

    Args:
        x: Logits.
        g: Gradient with respect to $\log p$, shaped as `x`.
        axis: Of the classes.

    Examples:
        >>> log_stablemax_gradient(np.array([1.0, 1.0]), np.array([1.0, 0.0]))
        array([ 0.25, -0.25])
    """
    return np.asanyarray(log_s_slope(x) * (g - stablemax(x, axis) * np.sum(g, axis=axis, keepdims=True)))


@quiet
def cross_entropy(
    x: Array,
    target: Target,
    weight: Array | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Array:
    r"""Return the loss: 0-dimensional, or every $\ell_i$ for reduction "none".

    Args:
        x: Logits of shape (C), (N, C) or (N, C, d₁, …).
        target: Class indices or probabilities.
        weight: $w$.
        ignore_index: Only for class indices.
        reduction: "mean", "sum" or "none".
        label_smoothing: $\alpha$.

    Examples:
        >>> round(float(cross_entropy(np.array([[0.0, 0.0], [7.0, 0.0]]), np.array([1, -100]))), 4)
        0.6931
        >>> float(cross_entropy(np.zeros((1, 2)), np.array([-100])))
        nan
    """
    a = coefficients(x, target, weight, ignore_index, label_smoothing)
    log_p = log_stablemax(x, class_axis(x))
    losses: Array = np.asanyarray(-np.sum(a * np.where(a == 0, 0.0, log_p), axis=class_axis(x)))
    if reduction == "none":
        return losses
    divisor = denominator(x, target, weight, ignore_index) if reduction == "mean" else 1.0
    return np.asanyarray(np.sum(losses) / divisor)


@quiet
def cross_entropy_gradient(
    x: Array,
    target: Target,
    weight: Array | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    g: Array | float = 1.0,
) -> Array:
    """Return the derivative of `cross_entropy` with respect to `x`.

    Args:
        x: Logits of shape (C), (N, C) or (N, C, d₁, …).
        target: Class indices or probabilities.
        weight: $w$.
        ignore_index: Only for class indices.
        reduction: "mean", "sum" or "none".
        label_smoothing: As for the loss.
        g: Gradient with respect to the loss, shaped as the loss or a scalar.

    Examples:
        >>> cross_entropy_gradient(np.zeros((1, 2)), np.array([0]))
        array([[-0.5,  0.5]])
        >>> cross_entropy_gradient(np.zeros((1, 2)), np.array([-100]))
        array([[0., 0.]])
    """
    axis = class_axis(x)
    a = coefficients(x, target, weight, ignore_index, label_smoothing)
    total = np.sum(a, axis=axis, keepdims=True)
    factor = _factor(x, target, weight, ignore_index, reduction, g)
    p = np.exp(log_stablemax(x, axis))
    gradient = log_s_slope(x) * (p * total - a) * factor
    return np.where(_counted(x, target, ignore_index), gradient, 0.0)


@quiet
def probability_gradients(
    x: Array,
    target: Target,
    weight: Array | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    g: Array | float = 1.0,
) -> tuple[Array, Array]:
    r"""Return the derivatives of `cross_entropy` with respect to class probabilities and to `weight`.

    Args:
        x: Logits of shape (C), (N, C) or (N, C, d₁, …).
        target: $t$.
        weight: $w$; None: all 1.
        reduction: "mean", "sum" or "none".
        label_smoothing: $\alpha$.
        g: Gradient with respect to the loss, shaped as the loss or a scalar.

    Returns:
        $\partial\ell/\partial t$, shaped as `x`, and $\partial\ell/\partial w$, shape (C).

    Examples:
        >>> t, w = probability_gradients(np.zeros((1, 2)), np.array([[1.0, 0.0]]))
        >>> bool(np.all(t == np.log(2))), bool(np.all(w == [np.log(2), 0]))
        (True, True)
    """
    axis = class_axis(x)
    w = _per_class(x, weight)
    smoothed = (1 - label_smoothing) * target + label_smoothing / x.shape[axis]
    surprise = -log_stablemax(x, axis) * _factor(x, target, weight, -100, reduction, g)
    of_weight = smoothed * np.where(smoothed == 0, 0.0, surprise)
    positions = tuple(i for i in range(x.ndim) if i != axis)
    return (1 - label_smoothing) * w * surprise, np.sum(of_weight, axis=positions)


def coefficients(x: Array, target: Target, weight: Array | None, ignore_index: int, label_smoothing: float) -> Array:
    r"""Return $a$, shaped as `x`; the arguments are those of `cross_entropy`.

    Examples:
        >>> coefficients(np.zeros((2, 2)), np.array([1, -100]), None, -100, 0.5)
        array([[0.25, 0.75],
               [0.  , 0.  ]])
    """
    t = _chosen(x, target) if target.dtype.kind in "iu" else target
    a = _per_class(x, weight) * ((1 - label_smoothing) * t + label_smoothing / x.shape[class_axis(x)])
    return np.where(_counted(x, target, ignore_index), a, 0.0)


def denominator(x: Array, target: Target, weight: Array | None, ignore_index: int) -> Array:
    r"""Return what "mean" divides by: $\sum_i w_{y_i}$, or the number of positions.

    Examples:
        >>> float(denominator(np.zeros((2, 2)), np.array([1, -100]), np.array([5.0, 3.0]), -100))
        3.0
    """
    if target.dtype.kind in "iu":
        return np.asanyarray(np.sum(coefficients(x, target, weight, ignore_index, label_smoothing=0.0)))
    return np.asarray(float(math.prod(n for axis, n in enumerate(x.shape) if axis != class_axis(x))))


def class_axis(x: Array) -> int:
    """Return the axis of the classes: the second one, or the only one.

    Examples:
        >>> class_axis(np.zeros((4, 3, 2))), class_axis(np.zeros(3))
        (1, 0)
    """
    return min(1, x.ndim - 1)


def _chosen(x: Array, target: Target) -> Array:
    """[k = y], shaped as `x`."""
    classes = np.arange(x.shape[class_axis(x)]).reshape(-1, *([1] * max(0, x.ndim - 2)))
    return np.asarray(np.expand_dims(target, class_axis(x)) == classes, dtype=np.float64)


def _counted(x: Array, target: Target, ignore_index: int) -> Target:
    """Which positions are not ignored, with an axis of one class."""
    if target.dtype.kind in "iu":
        return np.expand_dims(target != ignore_index, class_axis(x))
    return np.ones([1] * x.ndim, dtype=bool)


def _per_class(x: Array, weight: Array | None) -> Array:
    """The weights, shaped to multiply `x`."""
    if weight is None:
        return np.ones([1] * x.ndim)
    return weight.reshape(-1, *([1] * max(0, x.ndim - 2)))


def _factor(
    x: Array, target: Target, weight: Array | None, ignore_index: int, reduction: str, g: Array | float
) -> Array:
    """g · rᵢ, with an axis of one class."""
    divisor = denominator(x, target, weight, ignore_index) if reduction == "mean" else 1.0
    factor = np.asanyarray(g / divisor)
    return np.expand_dims(factor, class_axis(x)) if factor.ndim else factor
