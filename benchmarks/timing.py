"""How things are timed: interleaved rounds (A B C A B C …), so that a machine that slows down slows all of them."""

import gc
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from rich.progress import track

from trysquare_conformance.memory import peak_bytes

Action = Callable[[], object]
WARM_UP = 2
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


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
    before = {name: os.environ.get(name) for name in CACHES}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update({name: str(Path(folder) / name.lower()) for name in CACHES})
        try:
            yield
        finally:
            for name, value in before.items():
                del os.environ[name]
                os.environ.update({} if value is None else {name: value})


def seconds(action: Action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def interleaved(
    actions: Mapping[str, Action], rounds: int, label: str, measure: Callable[[Action], float] = seconds
) -> dict[str, Times]:
    """Every action once a round; the first rounds warm up and are not counted."""
    taken: dict[str, list[float]] = {name: [] for name in actions}
    with no_garbage_collection():
        for _ in track(range(WARM_UP + rounds), description=label):
            for name, action in actions.items():
                taken[name].append(measure(action))
    return {name: Times(tuple(list_of[WARM_UP:])) for name, list_of in taken.items()}


@dataclass(frozen=True)
class Clock:
    """Times actions on a device. On a CPU an action is over when its call is, so that only `whole` says something new.

    Attributes:
        device: Where actions work, on its current stream.
    """

    device: torch.device

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def whole(self, action: Action) -> float:
        """Seconds from the start to the end as the device sees them, gaps between its kernels included."""
        if self.device.type != "cuda":
            return seconds(action)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.synchronize()
        start.record()
        action()
        end.record()
        self.synchronize()
        return start.elapsed_time(end) / 1e3

    def host(self, action: Action) -> float:
        """Seconds until the call returns; an idle device takes what it is given meanwhile."""
        self.synchronize()
        taken = seconds(action)
        self.synchronize()
        return taken

    def cold(self, action: Action) -> float:
        """Seconds of the host until everything is done, which a first call is measured by: it compiles, too."""
        self.synchronize()
        return seconds(lambda: self._through(action))

    def _through(self, action: Action) -> None:
        action()
        self.synchronize()

    def busy(self, action: Action) -> float | None:
        """Seconds of the device's kernels alone, by the profiler; None on a CPU and where the profiler sees none."""
        if self.device.type != "cuda":
            return None
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            action()
            self.synchronize()
        on_device = [e for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
        kernels = [event for event in on_device if not getattr(event, "is_user_annotation", False)]
        return sum(event.self_device_time_total for event in kernels) / 1e6 if kernels else None

    def peak_bytes(self, action: Action) -> int:
        """The most memory that an action holds at once beyond what was there before."""
        if self.device.type != "cuda":
            return peak_bytes(action)
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        action()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before


Input = TypeVar("Input")


def rotated(function: Callable[[Input], object], inputs: Sequence[Input]) -> Action:
    """The function of one input after the other, so that none is found in a cache."""
    turn = itertools.cycle(inputs)
    return lambda: function(next(turn))


CPU = torch.device("cpu")


def bandwidths(mebibytes: int = 256, device: torch.device = CPU) -> tuple[dict[str, Action], float]:
    """A copy and a scaling in place, far larger than any cache, and the bytes that each moves: one read and one write.

    A CPU reads what a copy is about to overwrite, unasked; an update in place is spared that, and can be faster.
    """
    source, target = (make(mebibytes << 18, device=device) for make in (torch.randn, torch.zeros))
    return {"copy": lambda: target.copy_(source), "in_place": lambda: source.mul_(-1.0)}, 2.0 * source.nbytes


def matmul_rate(
    size: int = 2048, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> tuple[Action, float]:
    """A square product, and its floating-point operations."""
    left, right, out = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(3))
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
