"""Runs lanes side by side, each in processes of its own, and merges what they say into one result."""

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from trysquare_conformance import ahead_of_time, faults, registry
from trysquare_conformance.case import Case
from trysquare_conformance.lanes import LANES, Lane
from trysquare_conformance.machine import describe_machine
from trysquare_conformance.process import LaneProcess, Progress
from trysquare_conformance.registry import Lot
from trysquare_conformance.report.schema import SCHEMA, Result
from trysquare_conformance.report.schema import Lane as LaneRow
from trysquare_conformance.verdict import verdict

CASES_PER_PROCESS = 64
"""Beyond this many cases a lane is given another core."""

LONGEST = {"compiled": 0, "triton": 1}
"""The backends whose cases take longest, in this order."""


def run(
    tier: str,
    lanes: Sequence[str] = (),
    patterns: Sequence[str] = (),
    progress: Progress = lambda *_: None,
    command: str = "",
    fault_lanes: Sequence[str] = (),
    compile_kernels: bool = False,
    lot: Lot | None = None,
) -> Result:
    """Run the cases of a tier and give the result to report: as many processes at once as there are cores.

    Args:
        tier: How much to run.
        lanes: Names; none of them: all that this machine has. What is named must run for a right verdict.
        patterns: Globs of the case ids to run; none: all.
        progress: Is told how far each lane is.
        command: For the report, what was typed.
        fault_lanes: Lanes in which faults are planted when no case waits; a missed one leaves no right verdict.
        compile_kernels: Compile all kernels ahead of time before that; a spill leaves no right verdict.
        lot: Draws some of each lane's cases; None: all.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    wanted = {LANES[name]: registry.select(tier, patterns, name, lot) for name in lanes or LANES}
    reasons = {lane.name: lane.available() or _nothing_to_do(cases) for lane, cases in wanted.items()}
    runs = {lane: cases for lane, cases in wanted.items() if reasons[lane.name] is None}
    options = ["--tier", tier, *(f"--case={pattern}" for pattern in patterns)]
    options += [f"--sample={lot.count}", f"--seed={lot.seed}"] if lot else []
    with tempfile.TemporaryDirectory(prefix="trysquare-") as budgets, _pool() as pool:
        processes = _processes(runs, [*options, "--budgets", budgets], progress)
        running = {process.name: pool.submit(process.run) for process in _in_order(processes)}
        compiled = ahead_of_time.start(pool, progress=progress) if compile_kernels else None
        planted = faults.run(fault_lanes, progress=progress, budgets=Path(budgets), pool=pool) if fault_lanes else []
        rows = [row for process in processes for row in running[process.name].result()]
        kernels = compiled() if compiled else None
    told = [_lane_row(lane, reasons[lane.name], [p for p in processes if p.lane is lane]) for lane in wanted]
    score = faults.score(planted) if planted else None
    word, sentence = verdict(told, rows, lanes, score, kernels)
    return {
        "schema": SCHEMA,
        "verdict": word,
        "sentence": sentence,
        "tier": f"{tier}, {lot}" if lot else tier,
        "started": started.isoformat(timespec="seconds"),
        "seconds": time.perf_counter() - clock,
        "command": command,
        "machine": describe_machine(),
        "lanes": told,
        "results": rows,
        "faults": score,
        "kernels": kernels,
    }


@contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    """A thread for each core; what still waits when it is left early, as by Ctrl-C, never begins."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _nothing_to_do(cases: Sequence[Case]) -> str | None:
    return None if cases else "no case was selected"


def _processes(runs: dict[Lane, list[Case]], options: Sequence[str], progress: Progress) -> list[LaneProcess]:
    """A process or several for each lane, each with its share of the machine's threads."""
    cores = os.cpu_count() or 1
    parts = {lane: min(cores, 1 + len(cases) // CASES_PER_PROCESS) for lane, cases in runs.items()}
    own = f"--threads={max(1, cores // max(1, sum(parts.values())))}"
    return [
        _process(lane, registry.part(cases, part, parts[lane]), part, parts[lane], [*options, own], progress)
        for lane, cases in runs.items()
        for part in range(parts[lane])
    ]


def _process(
    lane: Lane, cases: Sequence[Case], part: int, parts: int, options: Sequence[str], progress: Progress
) -> LaneProcess:
    worker = [sys.executable, "-m", "trysquare_conformance.worker", "--lane", lane.name, *options]
    name = lane.name if parts == 1 else f"{lane.name} {part + 1}/{parts}"
    return LaneProcess(name, lane, cases, [*worker, f"--part={part}", f"--parts={parts}"], progress, part=part)


def _in_order(processes: Sequence[LaneProcess]) -> list[LaneProcess]:
    """The long ones first: short work, then kernels and faults, fills up what those leave free.

    Two parts of a lane do not begin together: what the first finds out for both, such as what a compiler can do, the
    second would wait for.
    """
    long_first = sorted(processes, key=lambda process: (LONGEST.get(process.lane.backend, len(LONGEST)), process.part))
    if [process.part for process in long_first[:2]] == [0, 1]:
        long_first.insert(1, long_first.pop())
    return long_first


def _lane_row(lane: Lane, reason: str | None, processes: Sequence[LaneProcess] = ()) -> LaneRow:
    witnesses = [process.witness for process in processes if process.witness]
    return {
        "name": lane.name,
        "device": lane.device,
        "backend": lane.backend,
        "status": "not run here" if reason else "ran",
        "reason": reason,
        "witness": "; ".join(witnesses) or None,
        "seconds": sum(process.seconds for process in processes),
        "cases": sum(len(process.cases) for process in processes),
    }
