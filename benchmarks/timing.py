"""How things are timed: interleaved rounds (A B C A B C …), so that a machine that slows down slows all of them."""

import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich.progress import track

Action = Callable[[], object]
WARM_UP = 2


@dataclass(frozen=True)
class Times:
    """Seconds of one action, one entry a round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The middle half of the rounds lies between them."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return low, high

    def over(self, other: "Times") -> float:
        """How many times as long as `other`: the median over the rounds of the ratio within a round."""
        return statistics.median(mine / its for mine, its in zip(self.seconds, other.seconds, strict=True))


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """A collection in the middle of a measured step would be counted as part of it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def no_earlier_compilations() -> Iterator[None]:
    """A cold start that finds on the disk what an earlier process compiled is none."""
    variable = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(variable)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[variable] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[variable]
            else:
                os.environ[variable] = before


def seconds(action: Action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def interleaved(actions: Mapping[str, Action], rounds: int, label: str) -> dict[str, Times]:
    """Every action once a round; the first rounds warm up and are not counted."""
    taken: dict[str, list[float]] = {name: [] for name in actions}
    with no_garbage_collection():
        for _ in track(range(WARM_UP + rounds), description=label):
            for name, action in actions.items():
                taken[name].append(seconds(action))
    return {name: Times(tuple(list_of[WARM_UP:])) for name, list_of in taken.items()}


def bandwidths(mebibytes: int = 256) -> tuple[dict[str, Action], float]:
    """A copy and a scaling in place, far larger than any cache, and the bytes that each moves: one read and one write.

    A CPU reads what a copy is about to overwrite, unasked; an update in place is spared that, and can be faster.
    """
    source, target = torch.randn(mebibytes << 18), torch.zeros(mebibytes << 18)
    return {"copy": lambda: target.copy_(source), "in_place": lambda: source.mul_(-1.0)}, 2.0 * source.nbytes


def matmul_rate(size: int = 2048) -> tuple[Action, float]:
    """A square float32 product, and its floating-point operations."""
    left, right, out = (torch.randn(size, size) for _ in range(3))
    return lambda: torch.mm(left, right, out=out), 2.0 * size**3


IMPORT = """
import time
start = time.perf_counter()
import torch
between = time.perf_counter()
import trysquare
print(between - start, time.perf_counter() - between)
"""


def import_seconds(runs: int) -> tuple[float, float]:
    """Median seconds of `import torch`, and of `import trysquare` after it, each time in a new process."""
    command = [sys.executable, "-c", IMPORT]
    said = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(runs)]
    torches, ours = zip(*(map(float, line.split()) for line in said), strict=True)
    return statistics.median(torches), statistics.median(ours)
