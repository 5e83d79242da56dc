"""Runs lanes side by side, each in a process of its own, and merges what they say into one result."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from trysquare_conformance import faults, registry
from trysquare_conformance.case import Case
from trysquare_conformance.compare import row
from trysquare_conformance.lanes import LANES, Lane
from trysquare_conformance.machine import describe_machine
from trysquare_conformance.report.schema import SCHEMA, Result, Row
from trysquare_conformance.report.schema import Lane as LaneRow
from trysquare_conformance.verdict import verdict

SILENCE_SECONDS = 600.0
"""A lane that says nothing for so long is stopped. A cold compilation takes 16 s; no case takes a tenth of this."""

LAST_CHARACTERS = 2000

Progress = Callable[[str, int, int], None]
"""Called with a lane's name, how many of its cases are done, and how many there are."""


@dataclass
class LaneRun:
    """One lane's process: what to run in it, and what it has said so far."""

    lane: Lane
    cases: Sequence[Case]
    command: Sequence[str]
    progress: Progress
    silence: float = SILENCE_SECONDS
    rows: dict[str, Row] = field(default_factory=dict)
    current: str | None = None
    end: dict[str, Any] | None = None

    def run(self) -> tuple[LaneRow, list[Row]]:
        """Runs to the end, whatever that is; every case gets a row."""
        started = time.perf_counter()
        self.progress(self.lane.name, 0, len(self.cases))
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
            reason = self._listen(errors)
            errors.seek(0)
            said = errors.read()[-LAST_CHARACTERS:].strip()
        rows = [self.rows.get(case.id) or self._unfinished(case, reason, said) for case in self.cases]
        return self._lane_row(rows, time.perf_counter() - started), rows

    def _listen(self, errors: IO[str]) -> str:
        """Reads lines until the process ends; returns how it ended."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **dict(self.lane.environment)}
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": errors, "env": environment}
        with subprocess.Popen(self.command, text=True, encoding="utf-8", **options) as process:
            watchdog = _Watchdog(process, self.silence)
            try:
                for line in process.stdout or ():
                    watchdog.heard()
                    self._take(json.loads(line))
                code = process.wait()
            except ValueError:
                return f"the lane was stopped because it said {line.strip()!r}"
            finally:
                watchdog.stop()
                process.kill()
        if watchdog.barked:
            return f"the lane was stopped after {self.silence:g} s of silence"
        return f"the lane's process ended with exit code {code}"

    def _take(self, message: dict[str, Any]) -> None:
        if message["event"] == "case":
            self.current = message["case"]
        elif message["event"] == "result":
            self.rows[message["result"]["case"]] = message["result"]
            self.current = None
            self.progress(self.lane.name, len(self.rows), len(self.cases))
        else:
            self.end = message

    def _unfinished(self, case: Case, reason: str, said: str) -> Row:
        where = "in this case" if case.id == self.current else "before this case"
        return row(case, self.lane.name, status="error", error=f"{reason} {where}" + (f"\n{said}" if said else ""))

    def _lane_row(self, rows: Sequence[Row], seconds: float) -> LaneRow:
        witness = None if self.end is None else self.end["witness"]
        return {**_lane_row(self.lane, None), "witness": witness, "seconds": seconds, "cases": len(rows)}


class _Watchdog:
    """Kills a process that has been silent for too long."""

    def __init__(self, process: subprocess.Popen[str], seconds: float) -> None:
        self.process, self.seconds, self.barked = process, seconds, False
        self._last, self._done = time.monotonic(), threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def heard(self) -> None:
        self._last = time.monotonic()

    def stop(self) -> None:
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self._last > self.seconds:
                self.barked = True
                self.process.kill()
                return


def _lane_row(lane: Lane, reason: str | None) -> LaneRow:
    return {
        "name": lane.name,
        "device": lane.device,
        "backend": lane.backend,
        "status": "not run here" if reason else "ran",
        "reason": reason,
        "witness": None,
        "seconds": 0.0,
        "cases": 0,
    }


def run(
    tier: str,
    lanes: Sequence[str] = (),
    patterns: Sequence[str] = (),
    progress: Progress = lambda *_: None,
    command: str = "",
    fault_lanes: Sequence[str] = (),
) -> Result:
    """Run the cases of a tier and give the result to report.

    Args:
        tier: How much to run.
        lanes: Names; none of them: all that this machine has. What is named must run for a right verdict.
        patterns: Globs of the case ids to run; none: all.
        progress: Is told how far each lane is.
        command: For the report, what was typed.
        fault_lanes: Lanes in which faults are planted after the cases; a missed one leaves no right verdict.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    told: dict[str, LaneRow] = {}
    runs: list[tuple[Lane, list[Case]]] = []
    for lane in (LANES[name] for name in lanes or LANES):
        cases = registry.select(tier, patterns, lane.name)
        reason = lane.available() or (None if cases else "no case was selected")
        told[lane.name] = _lane_row(lane, reason)
        runs += [] if reason else [(lane, cases)]
    options = ["--tier", tier, *(f"--case={pattern}" for pattern in patterns)]
    with tempfile.TemporaryDirectory(prefix="trysquare-") as budgets:
        finished = _run_all(runs, [*options, "--budgets", budgets], progress)
        planted = faults.run(fault_lanes, progress=progress, budgets=Path(budgets)) if fault_lanes else []
    told |= {lane["name"]: lane for lane, _ in finished}
    rows = [row for _, of_lane in finished for row in of_lane]
    score = faults.score(planted) if planted else None
    word, sentence = verdict(list(told.values()), rows, lanes, score)
    return {
        "schema": SCHEMA,
        "verdict": word,
        "sentence": sentence,
        "tier": tier,
        "started": started.isoformat(timespec="seconds"),
        "seconds": time.perf_counter() - clock,
        "command": command,
        "machine": describe_machine(),
        "lanes": list(told.values()),
        "results": rows,
        "faults": score,
    }


def _run_all(
    runs: Sequence[tuple[Lane, list[Case]]], options: Sequence[str], progress: Progress
) -> list[tuple[LaneRow, list[Row]]]:
    """All lanes at once, as many as there are cores; they share the budgets that the first of them measures."""
    if not runs:
        return []
    cores = os.cpu_count() or 1
    threads = max(1, cores // len(runs))
    worker = [sys.executable, "-m", "trysquare_conformance.worker", *options, "--threads", str(threads)]
    lane_runs = [LaneRun(lane, cases, [*worker, "--lane", lane.name], progress) for lane, cases in runs]
    with ThreadPoolExecutor(min(cores, len(runs))) as pool:
        return list(pool.map(LaneRun.run, lane_runs))
