"""One process of a lane: listens to what it says, notices if it crashes or hangs, and owes a row for every case."""

import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, TypeAlias

from trysquare_conformance.case import Case
from trysquare_conformance.compare import row
from trysquare_conformance.lanes import Lane
from trysquare_conformance.report.schema import Row

SILENCE_SECONDS = 600.0
"""A lane that says nothing for so long is stopped. A cold compilation takes 16 s; no case takes a tenth of this."""

LAST_CHARACTERS = 2000

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with a lane's name, how many of its cases are done, and how many there are."""


@dataclass
class LaneProcess:
    """What to run in the process, and what it has said so far: `ended` how it did, `said` to standard error.

    `name` is the lane's, or that of a part of it, the `part`th.
    """

    name: str
    lane: Lane
    cases: Sequence[Case]
    command: Sequence[str]
    progress: Progress
    silence: float = SILENCE_SECONDS
    part: int = 0
    rows: dict[str, Row] = field(default_factory=dict)
    current: str | None = None
    witness: str | None = None
    seconds: float = 0.0
    ended: str = ""
    said: str = ""

    def run(self) -> list[Row]:
        """Runs to the end, whatever that is; every case gets a row."""
        started = time.perf_counter()
        self.progress(self.name, 0, len(self.cases))
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
            self.ended = self._listen(errors)
            errors.seek(0)
            self.said = errors.read()[-LAST_CHARACTERS:].strip()
        self.seconds = time.perf_counter() - started
        return [self.rows.get(case.id) or self._unfinished(case) for case in self.cases]

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
            except (KeyError, TypeError, ValueError):
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
            self.progress(self.name, len(self.rows), len(self.cases))
        else:
            self.witness = message["witness"]

    def _unfinished(self, case: Case) -> Row:
        where = "in this case" if case.id == self.current else "before this case"
        said = f"\n{self.said}" if self.said else ""
        return row(case, self.lane.name, status="error", error=f"{self.ended} {where}{said}")


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
