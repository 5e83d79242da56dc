r"""DolphinFlow: gradients orthogonal to the weights, Nesterov momentum, entry-wise adaptive steps, decoupled decay.

It trains towards solutions that generalise by taking away the cheap way to a lower loss, longer weights. `"vector"`
projects each row, `"matrix"` evens the singular values out instead, None does neither.

## Equations

At step $t = 1, 2, \dots$, for every parameter $\theta$ with gradient $g$ and state $m, v$:

1. $g \leftarrow s\,g$ with $s$ from the global norm of all gradients ([clipping][trysquare_reference.clipping])
2. $\tilde g$ = $g$ with its rows projected off those of $\theta$ if `ortho_mode="vector"` and `project="gradient"`
   ([projection][trysquare_reference.projection]), else $\tilde g = g$
3. $m \leftarrow \mu m + \tilde g$, $\; u = \tilde g + \mu m$ ([moments][trysquare_reference.moments]);
   $u$ with its rows projected off those of $\theta$ if `ortho_mode="vector"` and `project="update"`
4. $u \leftarrow$ Newton–Schulz of $u$ if `ortho_mode="matrix"` ([polar][trysquare_reference.polar])
5. $v \leftarrow \beta_2 v + (1 - \beta_2)\tilde g^2$, $\; u \leftarrow u / (\sqrt{\hat v} + \varepsilon)$
   if `adaptive_lr` ([moments][trysquare_reference.moments])
6. $\theta \leftarrow \theta(1 - \eta\lambda) - \eta u$ ([decay][trysquare_reference.decay])

Items 2 to 4 touch only parameters with two or more dimensions.

## Symbols

| symbol | argument | meaning |
|---|---|---|
| $\eta$ | `lr` | learning rate, times `lr_scale` of the [loss schedule][trysquare_reference.loss_schedule] |
| $\lambda$ | `weight_decay` | decoupled decay |
| $\mu$ | `momentum` | Nesterov momentum |
| $\beta_2$ | `beta2` | decay of the second moment |
| $\varepsilon$ | `eps` | in the denominator, and the bound of items 3 and 4 |
| $T$ | `ns_steps` | Newton–Schulz iterations |
| $G$ | `gradient_clipping` | largest global norm; 0 or None: off |
| $m$ | `momentum_buffer` | in the state |
| $v$ | `exp_avg_sq` | in the state, only with `adaptive_lr` |
| $t$ | `step` | in the state, a Python int |

## Departures

- The published package projects the update and feeds the raw gradient into $v$. Late in training the gradient is almost
  parallel to $w$, so $\sqrt v$ swamps the projected update and nothing generalises; its documentation promises the
  projected *gradient*, which is what `project="gradient"` does.
- $v$ is corrected for its bias. `project="update"`, `bias_correction=False` and no clipping together give
  `dolphinflow` 0.2.0 step for step.
- Clipping happens, the loss schedule runs, and convolution weights have a matrix form; see
  [clipping][trysquare_reference.clipping], [loss_schedule][trysquare_reference.loss_schedule] and
  [polar][trysquare_reference.polar].

## References

- Hartford. DolphinFlow: a robust orthogonalizing optimizer for PyTorch. 2024.
- Prieto, Barsbey, Mediano, Birdal. Grokking at the Edge of Numerical Stability. 2025. arXiv:2501.04697.
- Jordan et al. Muon: an optimizer for hidden layers in neural networks. 2024.

Examples:
    The gradient's first entry lies along the weights and is projected away; the second gets the first step of
    $1.9\,\eta$ against its sign:

    >>> hp = Hyperparameters(lr=0.1, weight_decay=0.0)
    >>> theta, g = np.array([[1.0, 0.0]]), np.array([[0.5, 0.5]])
    >>> (theta,), (state,) = step([theta], [g], [init(theta, hp)], hp)
    >>> np.round(theta, 6)
    array([[ 1.  , -0.19]])
    >>> state["step"], state["momentum_buffer"]
    (1, array([[0. , 0.5]]))
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from trysquare_reference._array import Array, quiet
from trysquare_reference.clipping import clip_scale
from trysquare_reference.decay import decoupled_decay
from trysquare_reference.moments import adapt, nesterov, second_moment
from trysquare_reference.polar import newton_schulz
from trysquare_reference.projection import project_rows, project_update_rows

State = dict[str, Any]
"""Of one parameter: `step`, `momentum_buffer`, and `exp_avg_sq` with `adaptive_lr`."""


@dataclass(frozen=True)
class Hyperparameters:
    """The algorithmic arguments; the Symbols table of this page says what each one means.

    `loss_aware_schedule` and `loss_ema_beta` act outside of `step`, through `lr_scale`.
    """

    lr: float = 1e-4
    weight_decay: float = 1e-2
    momentum: float = 0.9
    ortho_mode: Literal["vector", "matrix"] | None = "vector"
    adaptive_lr: bool = True
    beta2: float = 0.99
    eps: float = 1e-8
    ns_steps: int = 2
    gradient_clipping: float | None = 1.0
    loss_aware_schedule: bool = False
    loss_ema_beta: float = 0.98
    project: Literal["gradient", "update"] = "gradient"
    bias_correction: bool = True


def init(theta: Array, hp: Hyperparameters) -> State:
    """Return the state of a parameter before its first step.

    Examples:
        >>> init(np.ones(2), Hyperparameters(adaptive_lr=False))
        {'step': 0, 'momentum_buffer': array([0., 0.])}
    """
    state: State = {"step": 0, "momentum_buffer": np.zeros_like(theta)}
    if hp.adaptive_lr:
        state["exp_avg_sq"] = np.zeros_like(theta)
    return state


@quiet
def step(
    parameters: Sequence[Array],
    gradients: Sequence[Array],
    states: Sequence[State],
    hp: Hyperparameters,
    lr_scale: float = 1.0,
) -> tuple[list[Array], list[State]]:
    """Return all parameters and states after one step; the arguments stay as they are.

    Args:
        parameters: Arrays of any shapes.
        gradients: One for each parameter, of its shape.
        states: One for each parameter, from `init` or the step before.
        hp: Hyperparameters, the same for all.
        lr_scale: The loss schedule's factor of the learning rate.

    Examples:
        >>> hp = Hyperparameters(lr=0.5, momentum=0.0, adaptive_lr=False, weight_decay=0.0, gradient_clipping=None)
        >>> step([np.array([1.0])], [np.array([4.0])], [init(np.ones(1), hp)], hp)
        ([array([-1.])], [{'step': 1, 'momentum_buffer': array([4.])}])
    """
    s = clip_scale(gradients, hp.gradient_clipping)
    lr = hp.lr * lr_scale
    stepped = [
        _step_one(theta, s * g, state, hp, lr) for theta, g, state in zip(parameters, gradients, states, strict=True)
    ]
    return [theta for theta, _ in stepped], [state for _, state in stepped]


def _step_one(theta: Array, g: Array, state: State, hp: Hyperparameters, lr: float) -> tuple[Array, State]:
    """Items 2 to 6 for one parameter; an empty one only counts the step."""
    t = state["step"] + 1
    if theta.size == 0:
        return theta.copy(), {**state, "step": t}
    mode = hp.ortho_mode if theta.ndim >= 2 else None
    if mode == "vector" and hp.project == "gradient":
        g = project_rows(g, theta)
    m, u = nesterov(state["momentum_buffer"], g, hp.momentum)
    new: State = {"step": t, "momentum_buffer": m}
    if mode == "vector" and hp.project == "update":
        u = project_update_rows(u, theta, hp.eps)
    if mode == "matrix":
        u = newton_schulz(u, hp.ns_steps, hp.eps)
    if hp.adaptive_lr:
        v = second_moment(state["exp_avg_sq"], g, hp.beta2)
        new["exp_avg_sq"] = v
        u = adapt(u, v, t, hp.beta2, hp.eps, hp.bias_correction)
    return decoupled_decay(theta, lr, hp.weight_decay) - lr * u, new
