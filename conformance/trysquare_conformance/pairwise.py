"""All pairs of levels in few combinations: most faults need at most two settings to show (Kuhn et al. 2004).

Greedy and deterministic, after AETG (Cohen et al. 1997): each combination starts from a pair that is not covered yet
and takes, factor by factor, the level that covers most others.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, TypeAlias

Factors: TypeAlias = Mapping[str, Sequence[Any]]
Choice: TypeAlias = dict[str, Any]
Pair: TypeAlias = tuple[tuple[str, int], tuple[str, int]]


Allowed: TypeAlias = Callable[[Choice], bool]


def anything(_: Choice) -> bool:
    """Every combination."""
    return True


def pairwise(factors: Factors, allowed: Allowed = anything, around: str | None = None) -> list[Choice]:
    """Combinations in which every pair of levels that `allowed` admits occurs.

    Args:
        factors: The levels of each factor. One of them must go with all levels of the others.
        allowed: Is asked about partial choices.
        around: Only the pairs of this factor with others.

    Examples:
        >>> chosen = pairwise({"a": (0, 1), "b": (0, 1), "c": (0, 1)})
        >>> len(chosen), uncovered({"a": (0, 1), "b": (0, 1), "c": (0, 1)}, chosen)
        (4, set())
    """
    missing = {pair: None for pair in _pairs(factors, allowed) if around is None or around in dict(pair)}
    chosen: list[Choice] = []
    while missing:
        picked = _complete(factors, allowed, dict(next(iter(missing))), missing)
        for pair in combinations([(name, picked[name]) for name in factors], 2):
            missing.pop(pair, None)
        chosen.append({name: factors[name][level] for name, level in picked.items()})
    return chosen


def uncovered(factors: Factors, chosen: Sequence[Choice], allowed: Allowed = anything) -> set[Pair]:
    """The admissible pairs of levels (as indices) that no combination has."""
    missing = set(_pairs(factors, allowed))
    for choice in chosen:
        missing -= set(combinations([(name, list(factors[name]).index(choice[name])) for name in factors], 2))
    return missing


def _pairs(factors: Factors, allowed: Allowed) -> Iterator[Pair]:
    for (a, levels_a), (b, levels_b) in combinations(factors.items(), 2):
        for i, left in enumerate(levels_a):
            for j, right in enumerate(levels_b):
                if allowed({a: left, b: right}):
                    yield (a, i), (b, j)


def _complete(
    factors: Factors, allowed: Allowed, picked: dict[str, int], missing: Mapping[Pair, None]
) -> dict[str, int]:
    """Fill in the other factors; ties go to the level that was declared first."""
    order = list(factors)
    for name in order:
        if name in picked:
            continue
        so_far = {other: factors[other][level] for other, level in picked.items()}
        levels = [i for i, level in enumerate(factors[name]) if allowed({**so_far, name: level})]
        picked[name] = max(levels, key=lambda i: (_gain(order, picked, name, i, missing), -i))
    return {name: picked[name] for name in order}


def _gain(order: Sequence[str], picked: Mapping[str, int], name: str, level: int, missing: Mapping[Pair, None]) -> int:
    """How many missing pairs this level makes with what is picked."""
    here = order.index(name)
    new = (name, level)
    return sum(
        (((other, at), new) if order.index(other) < here else (new, (other, at))) in missing
        for other, at in picked.items()
    )
