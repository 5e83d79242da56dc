"""Values that no hyperparameter must have, made from the declared constraints: a wider interval brings its own."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from trysquare import _constraints
from trysquare._constraints import Choice, Constraint, DType, Flag, Integer, Number, Pair, Triples

NAN, INF = math.nan, math.inf


def bad_numbers(number: Number) -> Iterator[Any]:
    """Outside the interval, not finite, and what only looks like a float."""
    yield from (NAN, INF, -INF, -0.5, -1e-300, True, False, "0.1", [0.1], (0.1,), 0.1j, torch.tensor([0.1]))
    yield from [] if number.none else [None]
    yield from [number.low] if number.low_open else []
    yield from [] if number.high == INF else [number.high + 0.5]
    yield from [] if number.high == INF or number.high_closed else [number.high, int(number.high)]
    yield from bad_tensors() if number.tensor else [torch.tensor(0.1)]


def bad_tensors() -> Iterator[torch.Tensor]:
    """For a hyperparameter that may be a tensor: those whose shape, dtype or device say that they cannot be one."""
    yield from (torch.tensor([[0.1]]), torch.tensor(1), torch.tensor(True), torch.tensor(0.1j))
    yield torch.tensor(0.1, device="meta")


def bad_integers(integer: Integer) -> Iterator[Any]:
    yield from (integer.low - 1, -integer.low - 1, True, float(integer.low), NAN, INF, str(integer.low), None)
    yield torch.tensor(integer.low)


def bad_flags(_: Flag) -> Iterator[Any]:
    yield from (0, 1, None, "True", 1.0, [], torch.tensor(True))


def bad_choices(choice: Choice) -> Iterator[Any]:
    yield from ("nonsense", "", 0, True, 1.5, choice.options, {"vector"}, torch.tensor(0))
    yield from [str(option).upper() for option in choice.options]
    yield from [] if None in choice.options else [None]


def bad_pairs(pair: Pair) -> Iterator[Any]:
    """Not two, and two of which either is bad."""
    yield from ((), (0.5,), (0.5, 0.5, 0.5), None, 0.5, True, "ab", {0.1, 0.2}, {0.1: 0.2}, torch.tensor([0.5, 0.5]))
    for number in bad_numbers(pair.each):
        yield (number, 0.5)
        yield [0.5, number]


def bad_triples(_: Triples) -> Iterator[Any]:
    good = (3.4445, -4.7750, 2.0315)
    yield from ((), good, "Muon", 5, True, torch.ones(5, 3), {0: good})
    for triple in ((), good[:2], (*good, 0.0), None, 3.0, (3.0, NAN, 1.0), (INF, 1.0, 1.0), (3.0, None, 1.0), "abc"):
        yield [good, good, triple, good, good]


def bad_dtypes(dtype: DType) -> Iterator[Any]:
    yield from ("bfloat16", "torch.float32", float, 32, True, torch.int64, torch.complex64, torch.bool, dtype.options)
    yield from (torch.float8_e4m3fn, torch.zeros(1))


BAD: dict[type, Callable[[Any], Iterator[Any]]] = {
    Number: bad_numbers,
    Integer: bad_integers,
    Flag: bad_flags,
    Choice: bad_choices,
    Pair: bad_pairs,
    Triples: bad_triples,
    DType: bad_dtypes,
}


@dataclass(frozen=True)
class Argument:
    """A value that an argument must not have, and what the message must say is allowed."""

    name: str
    value: Any
    words: str

    def __str__(self) -> str:
        shown = f"{type(self.value).__name__}-{self.value}" if self.value != "" else "empty"
        return re.sub(r"\s+", " ", f"{self.name}={shown}")

    def is_named_in(self, message: str) -> bool:
        """Whether a message tells argument, value and what is allowed."""
        return f"{self.name}={self.value!r}" in message and self.words in message


def from_constraints(constraints: Mapping[str, Constraint]) -> list[Argument]:
    """All bad values of all hyperparameters."""

    def values(constraint: Constraint) -> Iterator[Any]:
        return BAD[type(constraint)](constraint)

    return [Argument(name, value, c.words) for name, c in constraints.items() for value in values(c)]


def read_only_once(constraints: Mapping[str, Constraint]) -> list[Argument]:
    """Tensors whose shape, dtype and device are right: their value is read at construction and load, not in a step."""
    tensors = {name: c for name, c in constraints.items() if isinstance(c, Number) and c.tensor}
    return [
        Argument(name, torch.tensor(value), c.words) for name, c in tensors.items() for value in (-0.1, NAN, INF, -INF)
    ]


WORKSPACE = [Argument("workspace_bytes", v, "None or an int >= 1") for v in (0, -1, True, 1.5, "1", NAN, [1], 1e6)]
EXECUTION = [*from_constraints(_constraints.EXECUTION), *WORKSPACE]
