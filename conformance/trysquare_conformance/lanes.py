"""Lanes: where and how a case runs. Each has a device, a backend, an environment, and says whether it can run here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from trysquare import _backend
from trysquare_conformance import originals

WITH_KERNELS = ("blockwise8bit", "dolphinflow", "dolphinflow8bit", "stablemax", "thorn")
"""The algorithms that have Triton kernels."""

COMPILER_CHECK_SECONDS = 60

INTERPRETED = (("TRITON_INTERPRET", "1"),)
"""The environment in which Triton interprets kernels."""


def _always() -> str | None:
    return None


def _cuda() -> str | None:
    return None if torch.cuda.is_available() else "torch sees no CUDA or ROCm device"


def _accelerator(kind: str) -> Callable[[], str | None]:
    def available() -> str | None:
        try:
            found = torch.accelerator.current_accelerator()
        except RuntimeError:  # torch 2.6 has no other way to say that there is none
            found = None
        return None if found is not None and found.type == kind else f"torch.accelerator finds no {kind} device"

    return available


def _compiled_cpu() -> str | None:
    """torch.compile on a CPU writes C++ against Python's headers: try both with a file of one line."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    found = shutil.which(compiler)
    if found is None:
        return f"torch.compile needs a C++ compiler and {compiler} is not on the PATH (set CXX to name another)"
    return None if _compiles_against_python(found) else f"{compiler} cannot compile against Python's headers (Python.h)"


@cache
def _compiles_against_python(compiler: str) -> bool:
    """Asked by many, and a compiler takes a tenth of a second to answer."""
    command = [compiler, "-x", "c++", "-fsyntax-only", "-I", sysconfig.get_path("include"), "-"]
    tried = subprocess.run(
        command,
        input="#include <Python.h>\n",
        text=True,
        capture_output=True,
        timeout=COMPILER_CHECK_SECONDS,
        check=False,
    )
    return tried.returncode == 0


def _compiled_cuda() -> str | None:
    without_device = _cuda()
    if without_device:
        return without_device
    return None if importlib.util.find_spec("triton") else "torch.compile on a GPU needs Triton, which is not installed"


def _triton_interpreter() -> str | None:
    if not importlib.util.find_spec("triton"):
        return "Triton is not installed (pip install 'trysquare[triton]')"
    if _version("triton") < (3, 7) and _version("numpy") >= (2, 4):
        return "the interpreter of Triton before 3.7 takes an array of one element for a number: install 'numpy<2.4'"
    return None


def _version(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])


def _triton_cuda() -> str | None:
    without_device = _cuda()
    return without_device or _backend.triton_missing(torch.device("cuda", torch.cuda.current_device()))


@dataclass(frozen=True)
class Lane:
    """One way to run every case. `available()` gives None, or the reason why this machine cannot run it."""

    name: str
    device: str
    backend: str
    available: Callable[[], str | None]
    environment: tuple[tuple[str, str], ...] = ()
    algorithms: tuple[str, ...] | None = None
    """Those that have this backend; None: all."""

    def runs(self, algorithm: str) -> bool:
        return self.algorithms is None or algorithm in self.algorithms

    def holds(self, dtype: str) -> bool:
        """Whether the device has the format: Apple's GPUs have no float64."""
        return not (self.device == "mps" and dtype == "float64")

    @property
    def is_python(self) -> bool:
        """Whether Python executes all of the fast code, in one thread: no compiler's code, no device's threads."""
        return self.device == "cpu" and self.backend != "compiled"

    @property
    def baseline(self) -> Lane | None:
        """The eager lane of the same device, against which the yardstick measures."""
        return None if self.backend == "eager" else LANES.get(f"eager-{self.device}")


LANES: dict[str, Lane] = {
    lane.name: lane
    for lane in (
        Lane("eager-cpu", "cpu", "eager", _always),
        Lane("compiled-cpu", "cpu", "compiled", _compiled_cpu),
        Lane("eager-cuda", "cuda", "eager", _cuda),
        Lane("compiled-cuda", "cuda", "compiled", _compiled_cuda),
        Lane(
            "triton-interpreter",
            "cpu",
            "triton",
            _triton_interpreter,
            environment=INTERPRETED,
            algorithms=WITH_KERNELS,
        ),
        Lane("triton-cuda", "cuda", "triton", _triton_cuda, algorithms=WITH_KERNELS),
        Lane("eager-mps", "mps", "eager", _accelerator("mps")),
        Lane("eager-xpu", "xpu", "eager", _accelerator("xpu")),
        Lane(
            "bitsandbytes-cpu",
            "cpu",
            "bitsandbytes",
            originals.without_bitsandbytes,
            algorithms=("blockwise8bit", "dolphinflow8bit"),
        ),
    )
}
