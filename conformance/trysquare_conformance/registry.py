"""The registry: every case of every algorithm, collected from the pages in `cases/` and selected by tier and name."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from operator import itemgetter
from typing import Protocol, TypeVar

from trysquare_conformance import cases as pages
from trysquare_conformance.case import SHORT_DTYPES, TIERS, Array, Case, Outputs, Stage, Subject, Wrap, shape_name
from trysquare_conformance.lanes import LANES

__all__ = [
    "ALGORITHMS",
    "SHORT_DTYPES",
    "TIERS",
    "Array",
    "Case",
    "Lot",
    "Outputs",
    "Stage",
    "Subject",
    "Wrap",
    "all_cases",
    "part",
    "select",
    "shape_name",
    "smallest_tier",
]


def _collect() -> dict[str, Subject]:
    """Each page in `cases/` is an algorithm and declares its `SUBJECT`; pages of faults reach deeper and wait."""
    names = [page.name for page in pkgutil.iter_modules(pages.__path__) if not page.name.endswith("_faults")]
    subjects: list[Subject] = [importlib.import_module(f"{pages.__name__}.{name}").SUBJECT for name in names]
    return {subject.algorithm: subject for subject in subjects}


ALGORITHMS: dict[str, Subject] = _collect()
WILD = re.compile(r"[*?\[]")
"""What makes a glob of an id."""


def all_cases() -> Iterator[Case]:
    """Every case of every tier."""
    return itertools.chain.from_iterable(subject.cases() for subject in ALGORITHMS.values())


@dataclass(frozen=True)
class Lot:
    """How many cases of each algorithm are drawn at random, and the seed: the same draws the same ones."""

    count: int
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.count} of each algorithm by lot {self.seed}"

    def draw(self, cases: Iterable[Case]) -> list[Case]:
        """All of few, in their order; of many each is as likely as any other, and no more than are drawn are kept."""
        rng, kept = random.Random(self.seed), list[tuple[int, Case]]()  # noqa: S311  # nothing to guess here
        for number, case in enumerate(cases):
            place = number if number < self.count else rng.randrange(number + 1)
            if place < self.count:
                kept[place : place + 1] = [(number, case)]
        return [case for _, case in sorted(kept, key=itemgetter(0))]


def select(tier: str, patterns: Iterable[str] = (), lane: str | None = None, lot: Lot | None = None) -> list[Case]:
    """The cases of a tier (which includes the smaller ones) whose id matches one of the patterns, or all of them.

    With a lane, less those that come in a later tier there, that lack its backend, or its device the dtype. With a lot,
    only those that it draws.
    """
    if tier not in TIERS:
        raise ValueError(f"tier={tier!r}: must be one of {', '.join(TIERS)}")
    if lot is None:
        return list(_matching(tier, list(patterns), lane))
    found = itertools.groupby(_matching(tier, list(patterns), lane), lambda case: case.algorithm)
    return [case for _, cases in found for case in lot.draw(cases)]


def _matching(tier: str, patterns: Sequence[str], lane: str | None = None) -> Iterator[Case]:
    """Of one algorithm after the other; no further than ids go that are written out, of which each is one case."""
    wanted, globs = TIERS[: TIERS.index(tier) + 1], set(patterns) or {"*"}
    written_out = None if any(WILD.search(glob) for glob in globs) else len(globs)
    found = itertools.chain.from_iterable(_of(subject, wanted, globs, lane) for subject in ALGORITHMS.values())
    return itertools.islice(found, written_out)


def _of(subject: Subject, wanted: Sequence[str], globs: Iterable[str], lane: str | None) -> Iterator[Case]:
    """An algorithm's cases of these tiers that match and that the lane, if there is one, can run."""
    if lane is not None and not LANES[lane].runs(subject.algorithm):
        return
    if not any(_may_match(subject.algorithm, glob) for glob in globs):
        return
    for case in itertools.takewhile(lambda case: case.tier in wanted, subject.cases()):
        here = case.runs_in(lane) and case.tier_in(lane) in wanted
        if here and (lane is None or LANES[lane].holds(case.dtype)) and _matches(case.id, globs):
            yield case


class OfAlgorithm(Protocol):
    """A case or a fault."""

    @property
    def algorithm(self) -> str: ...


Item = TypeVar("Item", bound=OfAlgorithm)
NEAR = 8
"""A part may be longer by one of so many parts of it, to end where an algorithm does."""


def part(items: Sequence[Item], index: int, parts: int) -> list[Item]:
    """One of so many parts of cases or faults: neighbours, which are likely to share a compilation or a budget."""
    return list(items[_cut(items, index, parts) : _cut(items, index + 1, parts)])


def _cut(items: Sequence[Item], index: int, parts: int) -> int:
    """Where a part begins: after an even share, or near by, where the algorithm changes and nothing is shared."""
    even = len(items) * index // parts
    reach = range(max(1, even - len(items) // (NEAR * parts)), even + len(items) // (NEAR * parts) + 1)
    changes = [i for i in reach if i < len(items) and items[i - 1].algorithm != items[i].algorithm]
    return even if index in {0, parts} else min(changes, key=lambda i: abs(i - even), default=even)


def smallest_tier(patterns: Iterable[str]) -> str | None:
    """The first tier in which some case matches, so that an id copied from a report needs no tier beside it."""
    globs = list(patterns)
    return next((tier for tier in TIERS if any(True for _ in _matching(tier, globs))), None)


def _may_match(algorithm: str, glob: str) -> bool:
    """Whether some id of the algorithm may match: the exhaustive tiers of all others need not be counted through."""
    literal, ids = WILD.split(glob, maxsplit=1)[0], f"{algorithm}/"
    return literal.startswith(ids) or ids.startswith(literal)


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)
