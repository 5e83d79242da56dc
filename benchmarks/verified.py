"""`python -m benchmarks verified REPORT.json --commit REV`: what a verification said on hardware that is not at hand.

Of the report of `trysquare verify --json` it keeps the counts and the worst margin of every lane and algorithm.
"""

import argparse
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks import results

KEPT = ("schema", "verdict", "tier", "started", "seconds", "command", "machine")


def main(arguments: Sequence[str]) -> None:
    """Write the summary where the machine's results lie."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks verified", description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("--commit", required=True, help="of the code that was verified")
    chosen = parser.parse_args(arguments)
    report = results.read(chosen.report)
    results.write(results.path("verified", report["machine"]), summary(report, chosen.commit))


def summary(report: dict[str, Any], commit: str) -> dict[str, Any]:
    """One row for each lane and algorithm."""

    def kind(row: dict[str, Any]) -> tuple[str, str]:
        return row["lane"], row["algorithm"]

    rows = groupby(sorted(report["results"], key=kind), kind)
    return {
        **{name: report[name] for name in KEPT},
        "commit": commit,
        "rows": [of_one(lane, algorithm, list(found)) for (lane, algorithm), found in rows],
    }


def of_one(lane: str, algorithm: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """A case that answers as expected, with an error or with nothing, has no margin."""
    margins = [row["margin"] for row in found if row["margin"] is not None]
    right = sum(row["status"] == "right" for row in found)
    return {"lane": lane, "algorithm": algorithm, "cases": len(found), "right": right, "margin": max(margins)}
