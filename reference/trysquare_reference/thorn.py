r"""THORN: matrices are orthogonalised (Muon with evened rows), all other parameters take schedule-free Adam.

An orthogonalised update acts on every direction of a layer alike; its size is that of Adam's, so that one learning rate
serves both groups. Where a parameter is no matrix in use, an embedding or a bias, Adam remains the better choice.

## Equations

**Orthogonalised**, $t = 1, 2, \dots$, for each parameter flattened to $R$ rows and $C$ columns:

1. $m \leftarrow \beta_1 m + g$, $\; u = g + \beta_1 m$ ([moments][trysquare_reference.moments])
2. $X$ = polar factor of $u$ ([polar][trysquare_reference.polar]) with the coefficients of
   [polar_express][trysquare_reference.polar_express]
3. if $\beta_2 > 0$: rows of $X$ normalised with $v$ ([row_norm][trysquare_reference.row_norm])
4. $X \leftarrow$ cautious decay of $X$ with $\theta$ and $\lambda$ ([decay][trysquare_reference.decay])
5. $\theta \leftarrow \theta - \eta\, k\, r\, X$ with the scale $k = \rho\sqrt{\max(R, C)}$, or
   $k = \sqrt{\max(1, R/C)}$ if $\rho = 0$; $r$ is [rectification][trysquare_reference.rectification] if `rectify`,
   else 1. If $r = 0$, $\theta$ stays, and $m$ and $v$ are updated all the same.

**Schedule-free**, with $y = \theta$:

1. $v \leftarrow \beta_2 v + (1 - \beta_2) g^2$, $\; u = g/(\sqrt{v/(1 - \beta_2^t)} + \varepsilon)$,
   $\; \eta_t = \eta r$. If $r = 0$, that is all.
2. $u \leftarrow$ cautious decay of $u$ with $y$ and $\lambda$
3. $c$ from $\eta_t$, then $y$ and $z$ step ([schedule_free][trysquare_reference.schedule_free]); if $\beta_1 = 0$, the
   mean $x$ too, which then is not to be had from $y$ and $z$

**Neither** (`schedule_free=False`): $m \leftarrow \beta_1 m + (1 - \beta_1) g$, $v$ as above,
$u = \dfrac{m/(1 - \beta_1^t)}{\sqrt{v/(1 - \beta_2^t)} + \varepsilon}$, cautious decay,
$\theta \leftarrow \theta - \eta r u$.

**Gradient release**: with an update rate $N > 1$ each of $N$ backward passes is a micro-step of its own, and its
gradient is gone after it. With $n$ counting them, parameters move where $N$ divides $n$, at $t = n/N$:

- orthogonalised: $m \leftarrow \beta_1 m + g$ at every micro-step, and all else, from $u = g + \beta_1 m$ with the last
  $g$, once
- otherwise: $v$, and $m$ if there is one, at every micro-step, with $n$ in place of $t$;
  $S \leftarrow S + u_n/N$ collects the updates; then $u = S$, $S \leftarrow 0$, with $r$ at $n$

## Symbols

| symbol | argument | meaning |
|---|---|---|
| $\eta$ | `lr` | learning rate |
| $\beta_1$ | `betas[0]` | orthogonalised: momentum; schedule-free: $y$ between $z$ (0) and $x$ (1); else of $m$ |
| $\beta_2$ | `betas[1]` | of the rows' mean square, 0: rows stay; of the second moment otherwise |
| $\lambda$ | `weight_decay` | cautious decay |
| $\rho$ | `target_rms` | root mean square of an orthogonalised update over $\eta$; 0: Muon's own scale |
| $\varepsilon$ | `eps` | least norm that is divided by, and Adam's |
| $T$ | `iters`, `lower_bound`, `safety_factor`, `cushion` | of the coefficients, unless `coefficients` holds them |
| $N$ | `update_rate` | micro-steps for each update |
| $m$ | `momentum_buffer`, `exp_avg` | in the state |
| $v$ | `row_exp_avg_sq`, `exp_avg_sq` | in the state |
| $x, z$ | `x`, `z` | in the state |
| $y$ | `y` | in the state only where the parameter is kept in half precision, which is then its rounding |
| $\eta_{\max}, W$ | `lr_max`, `weight_sum` | in the state, Python floats |
| $S$ | `update_sum` | in the state, only if $N > 1$ |
| $t$ or $n$ | `step` | in the state, a Python int |

## Departures

- Row, column and scale are those of the flattened matrix; the published package takes the height and width of a
  convolution's kernel. A `batched` group instead has its matrices in the last two dimensions.
- $\lambda\theta$ is added to $X$ and so is scaled by $k$ with it, as in the package: a wide layer decays $k$ times as
  fast as AdamW's $\lambda$ says.
- The package steps $z$ before $y$, which moves $y$ twice as far, and counts gradient release off by one.

## References

- pykeio. THORN. 2025. <https://github.com/pykeio/THORN>
- Jordan et al. Muon: an optimizer for hidden layers in neural networks. 2024.
- Liu, Su, et al. Muon is scalable for LLM training. 2025. arXiv:2502.16982: the scale, equation 4.

Examples:
    A multiple of an orthogonal matrix moves by its polar factor; the root mean square of the step is `target_rms`:

    >>> hp = Hyperparameters(lr=0.5, betas=(0.95, 0.0), weight_decay=0.0, iters=8)
    >>> theta, g = np.zeros((2, 2)), np.array([[0.0, -3.0], [3.0, 0.0]])
    >>> (theta,), (state,) = step([theta], [g], [init(theta, hp)], hp)
    >>> np.round(theta, 6)
    array([[ 0.      ,  0.141421],
           [-0.141421,  0.      ]])
    >>> round(float(np.sqrt(np.mean(theta**2))) / hp.lr, 6)
    0.2

    The first step of schedule-free Adam goes by the learning rate against the sign of the gradient:

    >>> hp = Hyperparameters(lr=0.5, weight_decay=0.0, orthogonalize=False)
    >>> (theta,), (state,) = step([np.ones(2)], [np.array([3.0, -1.0])], [init(np.ones(2), hp)], hp)
    >>> np.round(theta, 6), np.round(state["z"], 6), state["weight_sum"]
    (array([0.5, 1.5]), array([0.5, 1.5]), 0.25)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from trysquare_reference import polar_express, schedule_free
from trysquare_reference._array import Array, as_matrix, quiet
from trysquare_reference.decay import cautious_decay
from trysquare_reference.moments import adapt, bias_corrected, nesterov, second_moment
from trysquare_reference.polar import polar_factor
from trysquare_reference.rectification import rectification
from trysquare_reference.row_norm import normalize_rows

State = dict[str, Any]
"""Of one parameter; the Symbols table of this page has the names."""

_solved = cache(polar_express.coefficients)


@dataclass(frozen=True)
class Hyperparameters:
    """The algorithmic arguments of one group; the Symbols table of this page says what each one means.

    `orthogonalize` says which group it is, `form` and `restarts` how the polar factor is computed, which shows only in
    its rounding, and `update_rate` belongs to gradient release.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.95, 0.95)
    weight_decay: float = 0.1
    rectify: bool = False
    target_rms: float = 0.2
    eps: float = 1e-8
    iters: int = 5
    lower_bound: float = 1e-3
    safety_factor: float = 0.02
    cushion: float = 0.02
    schedule_free: bool = True
    orthogonalize: bool = True
    batched: bool = False
    coefficients: tuple[tuple[float, float, float], ...] | None = None
    form: Literal["standard", "gram"] = "standard"
    restarts: tuple[int, ...] = (2,)
    update_rate: int = 1


def init(theta: Array, hp: Hyperparameters, half: bool = False) -> State:
    """Return the state of a parameter before its first step.

    Args:
        theta: The parameter.
        hp: Hyperparameters of its group.
        half: Whether the parameter is kept in half precision, so that a schedule-free one needs $y$ in the state.

    Examples:
        >>> init(np.ones((2, 3)), Hyperparameters()).keys()
        dict_keys(['step', 'momentum_buffer', 'row_exp_avg_sq'])
        >>> init(np.ones(2), Hyperparameters(orthogonalize=False))
        {'step': 0, 'z': array([1., 1.]), 'exp_avg_sq': array([0., 0.]), 'lr_max': 0.0, 'weight_sum': 0.0}
    """
    state: State = {"step": 0}
    if hp.orthogonalize:
        state["momentum_buffer"] = np.zeros_like(theta)
        if hp.betas[1] > 0:
            state["row_exp_avg_sq"] = np.zeros_like(theta, shape=_row_shape(theta, hp))
        return state
    if hp.schedule_free:
        state |= {"z": theta.copy(), "exp_avg_sq": np.zeros_like(theta), "lr_max": 0.0, "weight_sum": 0.0}
        state |= {"y": theta.copy()} if half else {}
        state |= {"x": theta.copy()} if hp.betas[0] == 0 else {}
    else:
        state |= {"exp_avg": np.zeros_like(theta), "exp_avg_sq": np.zeros_like(theta)}
    return state | ({"update_sum": np.zeros_like(theta)} if hp.update_rate > 1 else {})


@quiet
def step(
    parameters: Sequence[Array], gradients: Sequence[Array], states: Sequence[State], hp: Hyperparameters
) -> tuple[list[Array], list[State]]:
    """Return all parameters and states of a group after one step; the arguments stay as they are.

    Args:
        parameters: Arrays of any shapes, of at least two dimensions if orthogonalised, three if batched.
        gradients: One for each parameter, of its shape.
        states: One for each parameter, from `init` or the step before.
        hp: Hyperparameters, the same for all. With `update_rate` above 1 this is one micro-step.

    Examples:
        >>> hp = Hyperparameters(lr=0.5, weight_decay=0.0, orthogonalize=False, schedule_free=False)
        >>> (theta,), _ = step([np.ones(1)], [np.array([4.0])], [init(np.ones(1), hp)], hp)
        >>> np.round(theta, 6)
        array([0.5])
    """
    stepped = [release_step(*each, hp) for each in zip(parameters, gradients, states, strict=True)]
    return [theta for theta, _ in stepped], [state for _, state in stepped]


@quiet
def release_step(theta: Array, g: Array, state: State, hp: Hyperparameters) -> tuple[Array, State]:
    """Return one parameter and its state after one micro-step, which moves it in every `update_rate`-th call only.

    Args:
        theta: The parameter.
        g: Its gradient.
        state: Its state.
        hp: Hyperparameters.

    Examples:
        >>> hp = Hyperparameters(lr=0.5, weight_decay=0.0, orthogonalize=False, update_rate=2)
        >>> theta, state, g = np.ones(1), init(np.ones(1), hp), np.array([4.0])
        >>> for _ in range(4):
        ...     theta, state = release_step(theta, g, state, hp)
        ...     print(state["step"], np.round(theta, 6), np.round(state["update_sum"], 6))
        1 [1.] [0.5]
        2 [0.5] [0.]
        3 [0.5] [0.5]
        4 [0.2375] [0.]
    """
    if theta.size == 0:
        return theta.copy(), {**state, "step": state["step"] + 1}
    u, state = accumulate(g, state, hp)
    if state["step"] % hp.update_rate != 0:
        return theta, state
    if "update_sum" in state:
        state["update_sum"] = np.zeros_like(u)
    if hp.orthogonalize:
        return _move_orthogonalized(theta, u, state, hp)
    r = rectification(state["step"], hp.betas[1]) if hp.rectify else 1.0
    if r == 0:
        return theta, state
    move = _move_schedule_free if hp.schedule_free else _move_adam
    return move(theta, u, state, hp, hp.lr * r)


@quiet
def accumulate(g: Array, state: State, hp: Hyperparameters) -> tuple[Array, State]:
    r"""Return the update so far and the state with this gradient in it: what happens in every micro-step.

    Args:
        g: The gradient.
        state: The parameter's state.
        hp: Hyperparameters.

    Returns:
        $u = g + \beta_1 m$ of an orthogonalised parameter, Adam's updates of the window of another; and the state.

    Examples:
        >>> hp = Hyperparameters(betas=(0.5, 0.0))
        >>> u, state = accumulate(np.array([[2.0]]), init(np.ones((1, 1)), hp), hp)
        >>> u, state
        (array([[3.]]), {'step': 1, 'momentum_buffer': array([[2.]])})
    """
    n = state["step"] + 1
    beta1, beta2 = hp.betas
    if hp.orthogonalize:
        m, u = nesterov(state["momentum_buffer"], g, beta1)
        return u, {**state, "step": n, "momentum_buffer": m}
    v = second_moment(state["exp_avg_sq"], g, beta2)
    new: State = {**state, "step": n, "exp_avg_sq": v}
    if not hp.schedule_free:
        new["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
        g = bias_corrected(new["exp_avg"], beta1, n)
    u = adapt(g, v, n, beta2, hp.eps, bias_correction=True)
    if hp.update_rate > 1:
        u = new["update_sum"] = state["update_sum"] + u / hp.update_rate
    return u, new


def scale(rows: int, columns: int, target_rms: float) -> float:
    r"""Return the factor of the learning rate of a rows × columns matrix.

    Args:
        rows: $R$.
        columns: $C$.
        target_rms: $\rho$.

    Examples:
        >>> scale(16, 4, target_rms=0.2), scale(16, 4, target_rms=0), scale(4, 16, target_rms=0)
        (0.8, 2.0, 1.0)
    """
    return target_rms * math.sqrt(max(rows, columns)) if target_rms > 0 else math.sqrt(max(1, rows / columns))


def mean(theta: Array, state: State, hp: Hyperparameters) -> Array:
    """Return $x$, the weights to evaluate with; those of an orthogonalised or plain Adam parameter are its own.

    Args:
        theta: The parameter while training.
        state: Its state.
        hp: Hyperparameters.

    Examples:
        >>> hp = Hyperparameters(betas=(0.5, 0.95), orthogonalize=False)
        >>> mean(np.array([1.75]), {"z": np.array([2.0])}, hp)
        array([1.5])
    """
    if hp.orthogonalize or not hp.schedule_free:
        return theta
    x: Array = state["x"] if "x" in state else schedule_free.averaged(state.get("y", theta), state["z"], hp.betas[0])
    return x


def _move_orthogonalized(theta: Array, u: Array, state: State, hp: Hyperparameters) -> tuple[Array, State]:
    """Items 2 to 5."""
    matrix, beta2 = _matrices(theta, hp), hp.betas[1]
    coefficients = hp.coefficients or _solved(hp.iters, hp.lower_bound, hp.safety_factor, hp.cushion)
    X = polar_factor(_matrices(u, hp), coefficients, hp.safety_factor, hp.eps, hp.form, hp.restarts)
    if beta2 > 0:
        X, state["row_exp_avg_sq"] = normalize_rows(X, state["row_exp_avg_sq"], beta2, hp.eps)
    r = rectification(state["step"] // hp.update_rate, beta2) if hp.rectify else 1.0
    if r == 0:
        return theta, state
    X = cautious_decay(X, matrix, hp.weight_decay)
    k = scale(matrix.shape[-2], matrix.shape[-1], hp.target_rms)
    return (matrix - hp.lr * k * r * X).reshape(theta.shape), state


def _move_schedule_free(theta: Array, u: Array, state: State, hp: Hyperparameters, lr: float) -> tuple[Array, State]:
    """Items 2 and 3."""
    y, beta1 = state.get("y", theta), hp.betas[0]
    u = cautious_decay(u, y, hp.weight_decay)
    state["lr_max"], state["weight_sum"], c = schedule_free.weigh(lr, state["lr_max"], state["weight_sum"])
    y, state["z"] = schedule_free.step(y, state["z"], u, lr, c, beta1)
    if "x" in state:
        state["x"] = schedule_free.average(state["x"], state["z"], c)
    if "y" in state:
        state["y"] = y
    return y, state


def _move_adam(theta: Array, u: Array, state: State, hp: Hyperparameters, lr: float) -> tuple[Array, State]:
    return theta - lr * cautious_decay(u, theta, hp.weight_decay), state


def _matrices(x: Array, hp: Hyperparameters) -> Array:
    return x if hp.batched else as_matrix(x)


def _row_shape(theta: Array, hp: Hyperparameters) -> tuple[int, ...]:
    return (*theta.shape[:-1], 1) if hp.batched else (theta.shape[0], 1)
