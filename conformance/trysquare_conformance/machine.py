"""The machine a result was made on: versions, processors, and the switches that change arithmetic."""

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

import trysquare
from trysquare_conformance.report.schema import Machine

ALIAS = "the alias of trysquare"
VARIABLES = ("OMP_NUM_THREADS", "TRITON_INTERPRET", "TRITON_DEFAULT_FP_FUSION", "TORCH_COMPILE_DISABLE", "CXX")


def describe_machine() -> Machine:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "triton": _version("triton"),
        "gpu": gpu,
        "driver": _driver() if gpu else None,
        "flags": _flags(),
        "trysquare": _version("trysquare") or "not installed",
        "dolphinflow_module": dolphinflow_module(),
    }


def dolphinflow_module() -> str | None:
    """Which module `import dolphinflow` finds: our alias, or the published package, which then wins, or another."""
    found = importlib.util.find_spec("dolphinflow")
    if found is None or found.origin is None:
        return None
    if Path(found.origin) == Path(trysquare.__file__).parents[1] / "dolphinflow.py":
        return ALIAS
    published = _version("dolphinflow") or _version("dolphinflow-optimizer")
    name = f"dolphinflow {published}" if published else "another module of that name"
    return f"{name}, which wins over the alias of trysquare: what it gives is not what is verified here"


def _cpu() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str | None:
    """Of NVIDIA's GPUs; other vendors' tools do not say it in one line."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.splitlines()[0].strip() if told.stdout else None


def _flags() -> dict[str, Any]:
    return {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        **{name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
