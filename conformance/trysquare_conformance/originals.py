"""Loads the published package `dolphinflow` 0.2.0 beside our alias of the same name, to compare against it.

The package lives in a folder of its own (`pip install --no-deps --target <folder> dolphinflow==0.2.0`), which the
environment variable TRYSQUARE_ORACLES names. Nothing here is needed to use trysquare.
"""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import torch

VARIABLE = "TRYSQUARE_ORACLES"
VERSION = "0.2.0"


def missing() -> str | None:
    """Why the package cannot be loaded, or None."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return f"{VARIABLE} does not name a folder with dolphinflow {VERSION}"
    found = (Path(folder) / f"dolphinflow-{VERSION}.dist-info").is_dir()
    return None if found else f"{VARIABLE}={folder} holds no dolphinflow {VERSION}"


def dolphinflow() -> Callable[..., torch.optim.Optimizer]:
    """The class `DolphinFlow` of the published package.

    Its file is loaded by path and under another name, so that no import of ours can meet it.

    Raises:
        ModuleNotFoundError: With the reason that `missing` gives.
    """
    reason = missing()
    if reason:
        raise ModuleNotFoundError(reason)
    path = Path(os.environ[VARIABLE]) / "dolphinflow" / "dolphinflow.py"
    spec = importlib.util.spec_from_file_location("original_dolphinflow", path)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    original: Callable[..., torch.optim.Optimizer] = module.DolphinFlow
    return original
