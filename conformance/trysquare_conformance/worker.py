"""A lane in a process of its own: reads what to run from its arguments, writes one JSON object a line as it goes.

`python -m trysquare_conformance.worker --lane eager-cpu --tier quick --budgets DIR [--case GLOB …]`
With `--fault GLOB` it plants faults.
"""

import argparse
import gc
import json
import os
import sys
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

import torch

from trysquare_conformance import faults, registry
from trysquare_conformance.compare import BudgetStore, run_case
from trysquare_conformance.interpreter import without_repetition
from trysquare_conformance.lanes import INTERPRETED, LANES, Lane
from trysquare_conformance.report.schema import plain
from trysquare_conformance.verdict import EXIT_CODES, GOOD
from trysquare_conformance.witness import Witness

SELDOM = 50_000, 20, 20
"""When to collect garbage: with a compiler loaded Python looks half a second through all objects and finds little."""


def arguments() -> argparse.Namespace:
    """What the parent asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lane", required=True, choices=list(LANES))
    parser.add_argument("--tier", required=True, choices=registry.TIERS)
    parser.add_argument("--budgets", required=True, type=Path, help="folder that the lanes of one run share")
    parser.add_argument("--case", action="append", default=[], metavar="GLOB")
    parser.add_argument("--sample", type=int, help="so many of each algorithm's cases, by lot")
    parser.add_argument("--seed", type=int, default=0, help="of the lot")
    parser.add_argument("--fault", action="append", default=[], metavar="GLOB", help="plant faults instead")
    parser.add_argument("--strict", action="store_true", help="fail after the first case that is not right")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", type=int, default=0, help="which of the parts of the lane's cases")
    parser.add_argument("--parts", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Run the lane."""
    options = arguments()
    lines = _take_stdout()
    gc.set_threshold(*SELDOM)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # of torch's own code; the suite judges numbers
    lane = LANES[options.lane]
    with without_repetition() if lane.environment == INTERPRETED else nullcontext():
        if options.fault:
            _plant(lane, options, lines)
        else:
            _run(lane, options, lines)


def _run(lane: Lane, options: argparse.Namespace, lines: TextIO) -> None:
    witness, budgets = Witness(lane), BudgetStore(options.budgets)
    lot = None if options.sample is None else registry.Lot(options.sample, options.seed)
    cases = registry.select(options.tier, options.case, lane.name, lot)
    for case in registry.part(cases, options.part, options.parts):
        _write(lines, {"event": "case", "case": case.id})
        result = run_case(registry.ALGORITHMS[case.algorithm], case, lane, budgets, witness)
        _write(lines, {"event": "result", "result": result})
        if options.strict and result["status"] not in GOOD:
            sys.exit(EXIT_CODES["wrong"])
    _write(lines, {"event": "end", "witness": witness.summary()})


def _plant(lane: Lane, options: argparse.Namespace, lines: TextIO) -> None:
    chosen = registry.part(faults.planted_in(lane, options.fault), options.part, options.parts)
    for outcome in faults.plant(lane, chosen, options.budgets):
        _write(lines, {"event": "fault", "fault": outcome.fault.id, "caught": outcome.caught})
    _write(lines, {"event": "end", "witness": ""})


def _take_stdout() -> TextIO:
    """Keep standard output for the lines of the protocol; whatever else prints goes to standard error."""
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return lines


def _write(lines: TextIO, message: Mapping[str, Any]) -> None:
    lines.write(json.dumps(plain(message)) + "\n")
    lines.flush()


if __name__ == "__main__":
    main()
