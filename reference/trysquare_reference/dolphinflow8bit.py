r"""DolphinFlow8bit: DolphinFlow's projected gradient under AdamW's moments, which are kept as 8-bit codes.

The state takes 2.03 bytes for a parameter instead of 8. Between two steps each moment is rounded to one of 256 values;
the step itself uses them before that rounding.

## Equations

At step $t = 1, 2, \dots$, for every parameter $\theta$ with gradient $g$ and the codes of $m, v$:

1. $g \leftarrow s\,g$ with $s$ from the global norm of all gradients ([clipping][trysquare_reference.clipping])
2. $\tilde g$ = $g$ with its rows projected off those of $\theta$ if `ortho_mode="vector"`
   ([projection][trysquare_reference.projection]); Newton–Schulz of $g$ if `ortho_mode="matrix"`
   ([polar][trysquare_reference.polar]); else $\tilde g = g$
3. $m, v$ from their codes ([blockwise8bit][trysquare_reference.blockwise8bit]), then with `adaptive_lr`
   $m \leftarrow \beta_1 m + (1 - \beta_1)\tilde g$, $\; v \leftarrow \beta_2 v + (1 - \beta_2)\tilde g^2$,
   $\; u = \dfrac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \varepsilon}$;
   without it $m \leftarrow \beta_1 m + \tilde g$, $\; u = m$
4. $\theta \leftarrow \theta(1 - \eta\lambda) - \eta u$ ([decay][trysquare_reference.decay])
5. the codes of $m$ (signed map) and $v$ (unsigned map)

Item 2 touches only parameters with two or more dimensions, items 3 and 5 code only those of at least 4,096 entries.

## Symbols

| symbol | argument | meaning |
|---|---|---|
| $\eta$ | `lr` | learning rate, times `lr_scale` of the [loss schedule][trysquare_reference.loss_schedule] |
| $\lambda$ | `weight_decay` | decoupled decay |
| $\beta_1$ | `momentum` | decay of the first moment |
| $\beta_2$ | `beta2` | decay of the second moment |
| $\varepsilon$ | `eps` | in the denominator, and the bound of Newton–Schulz |
| $T$ | `ns_steps` | Newton–Schulz iterations |
| $G$ | `gradient_clipping` | largest global norm; 0 or None: off |
| $m$ | `state1`, `qmap1`, `absmax1` | in the state: codes, map, scales; below 4,096 entries `state1` is $m$ itself |
| $v$ | `state2`, `qmap2`, `absmax2` | the same, only with `adaptive_lr` |
| $t$ | `step` | in the state, a Python int |

## Departures

- The momentum is AdamW's, not Nesterov's: the documentation of DolphinFlow names that as the difference between the
  two versions.
- The published package's 8-bit class calls functions that bitsandbytes does not have. What a step computes is taken
  from the documentation; the format of the state is bitsandbytes', so that `AdamW8bit` can read it.
- bitsandbytes' CUDA kernel decays the weights after the update. Here they are decayed before it, as AdamW does.

## References

- Hartford. DolphinFlow: a robust orthogonalizing optimizer for PyTorch. 2024.
- Dettmers, Lewis, Shleifer, Zettlemoyer. 8-bit optimizers via block-wise quantization. 2022. arXiv:2110.02861.
- Loshchilov, Hutter. Decoupled weight decay regularization. 2017. arXiv:1711.05101.

Examples:
    >>> hp = Hyperparameters(lr=0.1, weight_decay=0.0, ortho_mode=None)
    >>> theta, g = np.ones((64, 64)), np.eye(64)
    >>> (theta,), (state,) = step([theta], [g], [init(theta, hp)], hp)
    >>> np.round(theta[:2, :2], 6)
    array([[0.9, 1. ],
           [1. , 0.9]])
    >>> state["state1"][0, :3], state["state2"][0, :3], state["absmax1"].shape
    (array([255, 127, 127], dtype=uint8), array([255,   0,   0], dtype=uint8), (16,))
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from trysquare_reference._array import Array, quiet
from trysquare_reference.blockwise8bit import dequantize, dynamic_map, quantize
from trysquare_reference.clipping import clip_scale
from trysquare_reference.decay import decoupled_decay
from trysquare_reference.moments import adapt, bias_corrected, second_moment
from trysquare_reference.polar import newton_schulz
from trysquare_reference.projection import project_rows

State = dict[str, Any]
"""Of one parameter: `step`, `state1`, `qmap1`, `absmax1`; with `adaptive_lr` also those of 2. No maps if small."""

SMALLEST_CODED = 4096
"""A parameter with fewer entries keeps its moments as they are."""


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


def init(theta: Array, hp: Hyperparameters) -> State:
    """Return the state of a parameter before its first step: moments of 0.

    Examples:
        >>> list(init(np.ones(4096), Hyperparameters(adaptive_lr=False)))
        ['step', 'state1', 'qmap1', 'absmax1']
        >>> init(np.ones(2), Hyperparameters())
        {'step': 0, 'state1': array([0., 0.]), 'state2': array([0., 0.])}
    """
    state: State = {"step": 0}
    for i in (1, 2) if hp.adaptive_lr else (1,):
        state |= store(np.zeros_like(theta), i)
    return state


def store(moment: Array, i: int) -> State:
    """Return the entries of a state that hold the first (`i` = 1) or second moment.

    Examples:
        >>> store(np.zeros(1), 2)
        {'state2': array([0.])}
    """
    if moment.size < SMALLEST_CODED:
        return {f"state{i}": moment}
    qmap = dynamic_map(signed=i == 1)
    codes, absmax = quantize(moment, qmap)
    return {f"state{i}": codes, f"qmap{i}": qmap, f"absmax{i}": absmax}


def load(state: State, i: int) -> Array:
    """Return the first (`i` = 1) or second moment that a state holds.

    Examples:
        >>> load({"state2": np.array([2.0])}, 2)
        array([2.])
    """
    if f"qmap{i}" not in state:
        moment: Array = state[f"state{i}"]
        return moment
    return dequantize(state[f"state{i}"], state[f"absmax{i}"], state[f"qmap{i}"])


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
        ([array([-1.])], [{'step': 1, 'state1': array([4.])}])
    """
    s = clip_scale(gradients, hp.gradient_clipping)
    lr = hp.lr * lr_scale
    stepped = [
        _step_one(theta, s * g, state, hp, lr) for theta, g, state in zip(parameters, gradients, states, strict=True)
    ]
    return [theta for theta, _ in stepped], [state for _, state in stepped]


def _step_one(theta: Array, g: Array, state: State, hp: Hyperparameters, lr: float) -> tuple[Array, State]:
    """Items 2 to 5 for one parameter; an empty one only counts the step."""
    t = state["step"] + 1
    if theta.size == 0:
        return theta.copy(), {**state, "step": t}
    moments = update_moments(theta, g, state, hp)
    u = moments[0]
    if hp.adaptive_lr:
        m, v = moments
        u = adapt(bias_corrected(m, hp.momentum, t), v, t, hp.beta2, hp.eps, bias_correction=True)
    new: State = {**state, "step": t}
    for i, moment in enumerate(moments, 1):
        new |= _stored_as_before(moment, state, i)
    return decoupled_decay(theta, lr, hp.weight_decay) - lr * u, new


def update_moments(theta: Array, g: Array, state: State, hp: Hyperparameters) -> tuple[Array, ...]:
    r"""Return $m$ and, with `adaptive_lr`, $v$ of this step, before they are coded again: item 2 and most of 3.

    Args:
        theta: Parameter.
        g: Its gradient, clipped.
        state: Its state before the step.
        hp: Hyperparameters.

    Examples:
        >>> hp = Hyperparameters(momentum=0.5, beta2=0.75)
        >>> update_moments(np.ones(1), np.array([2.0]), init(np.ones(1), hp), hp)
        (array([1.]), array([1.]))
    """
    mode = hp.ortho_mode if theta.ndim >= 2 else None
    if mode == "vector":
        g = project_rows(g, theta)
    if mode == "matrix":
        g = newton_schulz(g, hp.ns_steps, hp.eps)
    m = load(state, 1)
    if not hp.adaptive_lr:
        return (hp.momentum * m + g,)
    return hp.momentum * m + (1 - hp.momentum) * g, second_moment(load(state, 2), g, hp.beta2)


def _stored_as_before(moment: Array, state: State, i: int) -> State:
    """The new codes belong to the map that the state came with."""
    if f"qmap{i}" not in state:
        return {f"state{i}": moment}
    codes, absmax = quantize(moment, state[f"qmap{i}"])
    return {f"state{i}": codes, f"absmax{i}": absmax}
