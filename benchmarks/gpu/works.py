"""A work that several do, and how each of its rows is measured: once for what does not vary, in rounds for times."""

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from benchmarks import timing
from benchmarks.cpu import spread
from trysquare import _backend
from trysquare_conformance.memory import state_bytes

FAILED = "failed: "


@dataclass(frozen=True)
class Accuracy:
    """How right a row is: `error` as its work says, `margin` of the conformance budget, right up to 1."""

    error: float
    margin: float | None = None


@dataclass(frozen=True)
class Entry:
    """Someone who does a work.

    Attributes:
        name: Stable: bars and tables refer to it.
        make: Of the work's inputs, what is timed, and the optimizer behind it if there is one.
        accuracy: Found on inputs of its own.
        missing: Why it cannot run here.
        bytes_moved: The least that it has to move, where that is what bounds it.
        ours: Whether a failure is ours.
    """

    name: str
    make: Callable[[Any], "Subject"]
    accuracy: Callable[[], Accuracy]
    missing: str | None = None
    bytes_moved: float | None = None
    ours: bool = False


@dataclass(frozen=True)
class Subject:
    """What is timed."""

    step: timing.Action
    optimizer: torch.optim.Optimizer | None = None


@dataclass(frozen=True)
class Work:
    """What is done.

    Attributes:
        name: In commands and bars.
        title: In tables.
        error: What a row's error is.
        inputs: Makes what each entry works on.
        entries: Who does it.
    """

    name: str
    title: str
    error: str
    inputs: Callable[[], Any]
    entries: tuple[Entry, ...]


def measure(work: Work, clock: timing.Clock, rounds: int, gb_per_s: float) -> dict[str, Any]:
    """Every entry of a work: its row, or why there is none."""
    rows: dict[str, dict[str, Any]] = {}
    actions: dict[str, timing.Action] = {}
    for entry in work.entries:
        print(f"preparing {work.name}: {entry.name}", flush=True)
        rows[entry.name] = _prepared(work, entry, clock, actions)
    whole, host = _rounds(work, clock, rounds, actions)
    for entry in work.entries:
        if entry.name in actions:
            rows[entry.name] |= _timed(entry, whole, host[entry.name], gb_per_s)
        else:
            rows[entry.name].setdefault("missing", f"{FAILED}no memory beside the others")
    return {"work": work.name, "title": work.title, "error": work.error, "rows": list(rows.values())}


def _rounds(
    work: Work, clock: timing.Clock, rounds: int, actions: dict[str, timing.Action]
) -> tuple[dict[str, timing.Times], dict[str, timing.Times]]:
    """Times of the device and of the host. Whoever came last goes if memory does not suffice for all."""
    while actions:
        try:
            whole = timing.interleaved(actions, rounds, work.name, clock.whole)
            return whole, timing.interleaved(actions, rounds, f"{work.name}, host", clock.host)
        except torch.OutOfMemoryError:
            actions.popitem()
        _release()
    return {}, {}


def _timed(entry: Entry, whole: dict[str, timing.Times], host: timing.Times, gb_per_s: float) -> dict[str, Any]:
    mine = whole[entry.name]
    moved = entry.bytes_moved
    return {
        **spread(mine),
        "host_ms": 1e3 * host.median,
        "over": {other: mine.over(times) for other, times in whole.items()},
        "of_bandwidth": None if moved is None else moved / mine.median / 1e9 / gb_per_s,
    }


def _prepared(work: Work, entry: Entry, clock: timing.Clock, actions: dict[str, timing.Action]) -> dict[str, Any]:
    """What is measured once; into `actions` goes what is timed."""
    named = {"name": entry.name, "ours": entry.ours}
    if entry.missing is not None:
        return {**named, "missing": entry.missing}
    try:
        facts, actions[entry.name] = _once(work, entry, clock)
    except Exception as error:  # noqa: BLE001  # hours on a rented machine are not lost for one row, which says it
        said = str(error).strip().partition("\n")[0]
        Console().print_exception()
        _release()
        return {**named, "missing": f"{FAILED}{type(error).__name__}: {said}"}
    return {**named, **facts}


def _once(work: Work, entry: Entry, clock: timing.Clock) -> tuple[dict[str, Any], timing.Action]:
    _release()
    inputs = work.inputs()
    built: list[Subject] = []

    def first() -> None:
        built.append(entry.make(inputs))
        built[0].step()

    before = _backend.calls.copy()
    cold = clock.cold(first)
    ran = sorted({backend for backend, _ in _backend.calls - before}) or ["eager"]
    subject = built[0]
    subject.step()
    busy = [taken for taken in (clock.busy(subject.step) for _ in range(3)) if taken is not None]
    state = None if subject.optimizer is None else state_bytes(subject.optimizer)
    scratch = clock.peak_bytes(subject.step)
    accuracy = entry.accuracy()  # last: what it compiles would make the first step warmer
    return {
        "backend": "+".join(ran) if entry.ours else None,
        "cold_start_ms": 1e3 * cold,
        "busy_ms": 1e3 * statistics.median(busy) if busy else None,
        "scratch_bytes": scratch,
        "state_bytes": state,
        "step_over_state": (state + scratch) / state if state else None,
        "error": accuracy.error,
        "margin": accuracy.margin,
    }, subject.step


def _release() -> None:
    """The GPU's memory of what is no longer needed, so that the next one finds all of it."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
