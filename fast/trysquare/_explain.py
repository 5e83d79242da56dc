"""What an optimizer does with each parameter, as data that prints as a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from typing import Self


@dataclass(frozen=True)
class ParameterPlan:
    """What one parameter gets.

    Attributes:
        name: its name if the optimizer was given ``named_parameters()``, else its place.
        group: index of its group.
        shape: its shape.
        rule: what is done to it and why.
        backend: the implementation that runs.
        state_bytes: bytes of optimizer state, allocated or to be.
    """

    name: str
    group: int
    shape: tuple[int, ...]
    rule: str
    backend: str
    state_bytes: int


class Explanation(tuple[ParameterPlan, ...]):
    """One `ParameterPlan` a parameter, in the order of the groups; ``print`` shows a table."""

    __slots__ = ()

    def __new__(cls, plans: Iterable[ParameterPlan]) -> Self:
        return super().__new__(cls, plans)

    def __str__(self) -> str:
        head = tuple(field.name for field in fields(ParameterPlan))
        table = [head, *(tuple(map(str, astuple(plan))) for plan in self)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table)
        return "\n".join(line.rstrip() for line in lines)
