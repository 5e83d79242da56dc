"""What each hyperparameter may be, as data: the check, its message and the tests' bad values come from one place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Constraint(Protocol):
    """Says in words what is allowed, and whether a value is."""

    @property
    def words(self) -> str: ...

    def allows(self, value: Any) -> bool: ...


class Number(NamedTuple):
    """A finite float (or int) in an interval; with ``tensor`` also a 0-dim float tensor, with ``none`` None."""

    low: float = 0.0
    high: float = math.inf
    low_open: bool = False
    high_closed: bool = False
    tensor: bool = False
    none: bool = False

    @property
    def words(self) -> str:
        low = "" if self.low == -math.inf else f", {'>' if self.low_open else '>='} {self.low:g}"
        high = "" if self.high == math.inf else f" and {'<=' if self.high_closed else '<'} {self.high:g}"
        kinds = "a finite float" + (" or 0-dim float tensor" if self.tensor else "") + (" or None" if self.none else "")
        return f"{kinds}{low}{high}"

    def allows(self, value: Any) -> bool:
        if value is None:
            return self.none
        if isinstance(value, Tensor):
            return self.tensor and value.ndim == 0 and value.is_floating_point() and not value.is_meta
        return isinstance(value, (float, int)) and not isinstance(value, bool) and self.contains(value)

    def contains(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value <= self.high if self.high_closed else value < self.high
        return math.isfinite(value) and above and below


class Integer(NamedTuple):
    """An int of at least ``low``."""

    low: int

    @property
    def words(self) -> str:
        return f"an int >= {self.low}"

    def allows(self, value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= self.low


class Flag(NamedTuple):
    """True or False."""

    words: str = "True or False"

    def allows(self, value: Any) -> bool:
        return isinstance(value, bool)


class Choice(NamedTuple):
    """One of a few words."""

    options: tuple[str | None, ...]

    @property
    def words(self) -> str:
        return "one of " + ", ".join(map(repr, self.options))

    def allows(self, value: Any) -> bool:
        return (value is None or isinstance(value, str)) and value in self.options


class Pair(NamedTuple):
    """A tuple or list of two numbers."""

    each: Number

    @property
    def words(self) -> str:
        return f"a pair of numbers, each {self.each.words}"

    def allows(self, value: Any) -> bool:
        return isinstance(value, tuple | list) and len(value) == 2 and all(self.each.allows(v) for v in value)


class Triples(NamedTuple):
    """None, or a sequence of triples of finite floats."""

    words: str = "None or a sequence of triples of finite floats, one for each iteration"

    def allows(self, value: Any) -> bool:
        return value is None or (isinstance(value, tuple | list) and len(value) > 0 and all(map(self._triple, value)))

    @staticmethod
    def _triple(value: Any) -> bool:
        finite = Number(low=-math.inf)
        return isinstance(value, tuple | list) and len(value) == 3 and all(finite.allows(v) for v in value)


class DType(NamedTuple):
    """None or one of a few dtypes."""

    options: tuple[torch.dtype, ...]

    @property
    def words(self) -> str:
        return "None or one of " + ", ".join(map(str, self.options))

    def allows(self, value: Any) -> bool:
        return value is None or (isinstance(value, torch.dtype) and value in self.options)


EXECUTION: Mapping[str, Constraint] = {
    "nonfinite": Choice(("propagate", "skip", "raise")),
    "backend": Choice(("auto", "eager", "compiled", "triton")),
}
"""Arguments that every optimizer has; they say how a step runs, not what it computes."""


def check(constraints: Mapping[str, Constraint], values: Mapping[str, Any], where: str) -> None:
    """Raise a ValueError that names the argument, its value and what is allowed, for the first value that is not."""
    for name, constraint in constraints.items():
        if name not in values:
            raise ValueError(f"{where}: {name!r} is missing: it must be {constraint.words}")
        if not constraint.allows(values[name]):
            raise ValueError(f"{where}: {name}={values[name]!r} must be {constraint.words}")


def check_tensors(constraints: Mapping[str, Constraint], values: Mapping[str, Any], where: str) -> None:
    """Check the value of tensor hyperparameters, which reads them: at construction and load only."""
    for name, constraint in constraints.items():
        value = values[name]
        if not isinstance(value, Tensor) or not isinstance(constraint, Number):
            continue
        if not constraint.contains(float(value)):
            raise ValueError(f"{where}: {name}={value!r} must be {constraint.words}")


def check_workspace(value: Any) -> None:
    """``workspace_bytes`` is an int > 0 or None for the device's measured default."""
    if value is not None and not Integer(1).allows(value):
        raise ValueError(f"workspace_bytes={value!r} must be None or an int >= 1")
