"""What a step of an optimizer reads and writes, as float64 arrays, and how a step's outputs are named."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch

from trysquare_conformance.case import Array, Outputs, Wrap
from trysquare_conformance.noisy import exactly

State: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """Parameters, their states, and numbers that belong to no parameter (a loss schedule, a count)."""

    parameters: tuple[Array, ...]
    states: tuple[State, ...]
    shared: dict[str, float] = field(default_factory=dict)

    def mapped(self, change: Callable[[Array, str | None], Array]) -> "Snapshot":
        """The same with every array changed; `change` gets an array and its state's name, None for a parameter."""
        states = tuple(
            {name: change(value, name) if isinstance(value, np.ndarray) else value for name, value in state.items()}
            for state in self.states
        )
        return replace(self, parameters=tuple(change(p, None) for p in self.parameters), states=states)

    def wrapped(self, wrap: Wrap) -> "Snapshot":
        """Codes and their maps are data and stay as they are."""
        return self.mapped(lambda array, name: array if _is_data(array, name) else wrap(array))


@dataclass(frozen=True)
class Feed:
    """What arrives from outside at a step: a gradient a parameter (None: it has none) and the closure's loss."""

    gradients: tuple[Array | None, ...]
    loss: float | None = None

    @property
    def computes(self) -> bool:
        """Whether there is anything to compute: some gradient with entries."""
        return any(g is not None and g.size for g in self.gradients)

    def wrapped(self, wrap: Wrap) -> "Feed":
        return replace(self, gradients=tuple(None if g is None else wrap(g) for g in self.gradients))


def _is_data(array: Array, name: str | None) -> bool:
    return array.dtype == np.uint8 or (name or "").startswith("qmap")


def outputs(before: Snapshot, after: Snapshot) -> Outputs:
    """What a step did: every update Δθ, every entry of the states, every shared number."""
    pairs = zip(before.parameters, after.parameters, strict=True)
    with np.errstate(invalid="ignore"):  # where a weight was infinite and stays so
        result = {f"update/{i}": plain(new) - plain(old) for i, (old, new) in enumerate(pairs)}
    for i, state in enumerate(after.states):
        result |= {f"{name}/{i}": plain(value) for name, value in state.items()}
    return result | {name: plain(value) for name, value in after.shared.items()}


def plain(value: Any) -> Array:
    """The values in float64; of a noisy array those of every draw, along the first axis."""
    return np.array(value, dtype=np.float64, subok=False)


def to_tensor(array: Array, dtype: str) -> torch.Tensor:
    """A CPU tensor of that dtype, rounded from float64."""
    return torch.from_numpy(plain(array)).to(getattr(torch, dtype))


def to_array(tensor: torch.Tensor) -> Array:
    """The values of a tensor in float64, which holds all of them exactly."""
    return plain(tensor.detach().cpu().to(torch.float64).numpy())


def rounded(array: Array, dtype: str) -> Array:
    """The nearest values that the dtype holds; what is noisy stays so."""
    return exactly(lambda values: to_array(to_tensor(values, dtype)), array)  # type: ignore[no-any-return]
