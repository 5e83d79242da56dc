"""Which parameters of a model THORN orthogonalizes, and why."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn


class Choice(NamedTuple):
    """Whether a parameter is orthogonalized, and the reason in words."""

    orthogonalize: bool
    reason: str


def groups_of(model: nn.Module, exclude: Sequence[str]) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Groups over the named parameters of a model, and the reason for each parameter by its id."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)}
    members: dict[bool, list[tuple[str, Tensor]]] = {True: [], False: []}
    reasons: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        choice = choose(name, parameter, embeddings, exclude)
        members[choice.orthogonalize].append((name, parameter))
        reasons[id(parameter)] = choice.reason
    groups: list[dict[str, Any]] = [
        {"params": params, "orthogonalize": orthogonalize} for orthogonalize, params in members.items() if params
    ]
    return groups, reasons


def choose(name: str, parameter: Tensor, embeddings: set[int], exclude: Sequence[str]) -> Choice:
    """A matrix is orthogonalized unless it looks vectors up, or makes the logits, or a pattern names it."""
    if parameter.ndim < 2:
        return Choice(False, "fewer than two dimensions")
    if id(parameter) in embeddings:
        return Choice(False, "weight of an embedding")
    if "lm_head" in name:
        return Choice(False, "lm_head in its name")
    pattern = next((pattern for pattern in exclude if fnmatchcase(name, pattern)), None)
    if pattern is not None:
        return Choice(False, f"excluded by {pattern!r}")
    return Choice(True, "a matrix")


def check_exclude(exclude: Any, from_model: bool) -> None:
    """``exclude`` is a sequence of patterns and needs the names that a model gives."""
    if isinstance(exclude, str) or not isinstance(exclude, Sequence) or not all(isinstance(p, str) for p in exclude):
        raise TypeError(f"exclude={exclude!r} must be a sequence of patterns such as ('output.*',)")
    if exclude and not from_model:
        raise ValueError(
            f"exclude={tuple(exclude)!r} needs a model: groups say themselves with 'orthogonalize' which they are"
        )
