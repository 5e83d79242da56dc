r"""Clipping by the global norm: one scale for all gradients, so that together they are no longer than a bound.

It keeps the direction of the step and stops a single bad batch from throwing the parameters far away.

## Equations

Over the gradients $g_1, \dots, g_P$ of all parameters of all groups:

$$ n = \sqrt{\sum_{p} \sum_{k} g_{p,k}^2}, \qquad s = \min\Bigl(1, \frac{G}{n + 10^{-6}}\Bigr), \qquad
   g_p \leftarrow s\,g_p $$

If $n$ is not finite, $s$ is NaN.

## Symbols

| symbol | argument | meaning |
|---|---|---|
| $g_p$ | `gradients` | list of gradients, of any shapes |
| $G$ | `max_norm` | largest norm that is let through; 0 or None: no clipping |
| $n$ | | the global norm |
| $s$ | | the scale, returned |

## Departures

- `torch.nn.utils.clip_grad_norm_` writes into the gradients; here they stay as they are and $s$ multiplies a copy.
- An infinite norm would give $s = 0$ and a step that silently does nothing. It gives NaN here, which shows.
- The norm is accumulated in float64 whatever the precision of the gradients (`dtype=np.float64` below says so also
  when this page runs in simulated float32): a float32 sum of $10^7$ squares is off by $4 \cdot 10^{-4}$.
- The published package means to clip, but clips the gradients' own `.grad`, which is None: nothing happens.

## References

- Pascanu, Mikolov, Bengio. On the difficulty of training recurrent neural networks. 2013. arXiv:1211.5063.
- `torch.nn.utils.clip_grad_norm_`, from which the $10^{-6}$ comes.

Examples:
    >>> g = [np.array([3.0]), np.array([[4.0, 0.0]])]
    >>> float(global_norm(g))
    5.0
    >>> round(float(clip_scale(g, max_norm=1.0)), 6)
    0.2
"""

from collections.abc import Sequence

import numpy as np

from trysquare_reference._array import Array


def global_norm(gradients: Sequence[Array]) -> Array:
    """Return $n$, the 2-norm of all gradients together, 0-dimensional.

    Args:
        gradients: Arrays of any shapes; the norm of none is 0.

    Examples:
        >>> float(global_norm([np.ones((2, 2)), np.ones(5)]))
        3.0
    """
    if not gradients:
        return np.asarray(0.0)
    together = np.concatenate([g.reshape(-1) for g in gradients])
    squares = np.square(together, dtype=np.float64)
    return np.asanyarray(np.sqrt(np.sum(squares, dtype=np.float64), dtype=np.float64))


def clip_scale(gradients: Sequence[Array], max_norm: float | None) -> Array:
    """Return $s$, by which every gradient is to be multiplied, 0-dimensional.

    Args:
        gradients: Arrays of any shapes.
        max_norm: $G$; 0 or None: no clipping, the scale is 1.

    Returns:
        A value in (0, 1]; NaN if the norm is not finite.

    Examples:
        >>> float(clip_scale([np.array([0.5])], max_norm=1.0))
        1.0
        >>> float(clip_scale([np.array([50.0])], max_norm=None))
        1.0
        >>> float(clip_scale([np.array([np.inf])], max_norm=1.0))
        nan
    """
    if not max_norm:
        return np.asarray(1.0)
    n = global_norm(gradients)
    s = np.minimum(1.0, max_norm / np.add(n, 1e-6, dtype=np.float64))
    return np.where(np.isfinite(n), s, np.nan)
