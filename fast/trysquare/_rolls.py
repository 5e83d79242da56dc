"""Who of a group steps together: found out in one step, and kept as long as all that it follows from stays as it is.

To look through a model's parameters, gradients and states one by one takes longer than to launch what steps them. That
they are what they were is seen at a glance: whole lists of what decides are equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trysquare._batches import Batch

CHOICES = (bool, int, str, torch.dtype, type(None))
"""What of a group selects a formula."""

SETTINGS = (*CHOICES, tuple)
"""What of it decides who has which state: of a pair of betas, which of them are zero. Floats and tensors are only
numbers to compute with."""


class Roll:
    """The batches of a group, without their gradients, which it does not keep alive."""

    def __init__(
        self, group: Mapping[str, Any], states: Mapping[Tensor, Mapping[str, Any]], batches: list[Batch]
    ) -> None:
        self._found = _look(group, states)
        self._batches = [batch._replace(gradients=[]) for batch in batches]

    def holds(self, group: Mapping[str, Any], states: Mapping[Tensor, Mapping[str, Any]]) -> bool:
        """Whether the group would be found to be the same, and needs no second look."""
        return _look(group, states, self._found) == self._found

    def batches(self) -> list[Batch]:
        """With the gradients that the parameters have now."""
        return [
            batch._replace(gradients=[p.grad for p in batch.parameters if p.grad is not None])
            for batch in self._batches
        ]


class Look(NamedTuple):
    """All that the batches of a group, their state and whether they may be stepped follow from.

    Tensors are known by their addresses in Python, which last: a `Roll` holds those that it needs.
    """

    settings: list[tuple[str, Any]]
    parameters: list[int]
    with_gradient: list[bool]
    entries: list[int]
    names: list[str]
    layouts: list[torch.layout]
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]
    devices: list[torch.device]
    dense: list[bool]


def _look(
    group: Mapping[str, Any], states: Mapping[Tensor, Mapping[str, Any]], before: Look | None = None
) -> Look | None:
    """What a group looks like now; None if it is not as it was ``before``, as far as one sees without a tensor's
    properties, which one that is not dense might not have.
    """
    parameters: Sequence[Tensor] = group["params"]
    gradients = [parameter.grad for parameter in parameters]
    stepped = [parameter for parameter, gradient in zip(parameters, gradients, strict=True) if gradient is not None]
    own = [states.get(parameter) or {} for parameter in stepped]
    given = [gradient for gradient in gradients if gradient is not None]
    entries = list(chain.from_iterable(state.values() for state in own))
    whose = (
        [(name, value) for name, value in group.items() if isinstance(value, SETTINGS)],
        list(map(id, parameters)),
        [gradient is not None for gradient in gradients],
        list(map(id, entries)),
        list(chain.from_iterable(own)),
        [gradient.layout for gradient in given],
    )
    if before is not None and whose != before[: len(whose)]:
        return None
    tensors = [*stepped, *given, *(entry for entry in entries if isinstance(entry, Tensor))]
    return Look(
        *whose,
        [tensor.shape for tensor in tensors],
        [tensor.dtype for tensor in tensors],
        [tensor.device for tensor in tensors],
        [tensor.is_contiguous() for tensor in tensors],
    )
