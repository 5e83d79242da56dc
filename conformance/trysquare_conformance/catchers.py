"""Which case caught each fault when they were last planted: there a fault is looked for first, to find it sooner.

A fault that is not caught there any more is looked for everywhere else, so that nothing depends on this memory.
"""

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

FILE = Path(__file__).parent / "cases" / "catchers.json"
"""Fault and case, by lane. `trysquare faults --catchers` writes it."""

ELSEWHERE = "eager-cpu"
"""Whose cases are tried in a lane that has none of its own."""


@cache
def remembered(lane: str) -> Mapping[str, str]:
    """Ids of cases by ids of faults."""
    known = read(FILE)
    return known.get(lane, {}) if lane in known else known.get(ELSEWHERE, {})


def read(file: Path) -> dict[str, dict[str, str]]:
    """Of all lanes; none if there is no file."""
    known: dict[str, dict[str, str]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return known


def write(file: Path, caught: Iterable[tuple[str, str, str]]) -> None:
    """Write lane, fault and case of what was caught; what the file says of other faults stays."""
    known = read(file)
    for lane, fault, case in caught:
        known.setdefault(lane, {})[fault] = case
    file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
