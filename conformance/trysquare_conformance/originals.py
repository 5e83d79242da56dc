"""Loads packages that we are compared with: `dolphinflow` 0.2.0, beside our alias of the same name, and bitsandbytes.

They live in a folder of their own (`pip install --no-deps --target <folder> dolphinflow==0.2.0 bitsandbytes`), which
the environment variable TRYSQUARE_ORACLES names (or several, separated as in PATH). Nobody needs them to use trysquare.
"""

import importlib
import importlib.machinery
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

VARIABLE = "TRYSQUARE_ORACLES"
VERSION = "0.2.0"


def folders() -> list[Path]:
    """Where the packages may be."""
    return [Path(folder) for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder]


def missing() -> str | None:
    """Why the package dolphinflow cannot be loaded, or None."""
    if not folders():
        return f"{VARIABLE} does not name a folder with dolphinflow {VERSION}"
    return None if _home() else f"{VARIABLE}={os.environ[VARIABLE]} holds no dolphinflow {VERSION}"


def _home() -> Path | None:
    found = (folder for folder in folders() if (folder / f"dolphinflow-{VERSION}.dist-info").is_dir())
    return next(found, None)


def dolphinflow() -> Callable[..., torch.optim.Optimizer]:
    """The class `DolphinFlow` of the published package.

    Its file is loaded by path and under another name, so that no import of ours can meet it.

    Raises:
        ModuleNotFoundError: With the reason that `missing` gives.
    """
    return _loaded("dolphinflow", "DolphinFlow")


def dolphinflow8bit() -> Callable[..., torch.optim.Optimizer]:
    """The class `DolphinFlow8bit` of the published package, likewise.

    Raises:
        ImportError: The package or bitsandbytes, which it needs, is nowhere.
    """
    bitsandbytes()
    return _loaded("dolphinflow_8bit", "DolphinFlow8bit")


def _loaded(file: str, name: str) -> Callable[..., torch.optim.Optimizer]:
    home = _home()
    if home is None:
        raise ModuleNotFoundError(missing())
    path = home / "dolphinflow" / f"{file}.py"
    spec = importlib.util.spec_from_file_location(f"original_{file}", path)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    original: Callable[..., torch.optim.Optimizer] = getattr(module, name)
    return original


def without_bitsandbytes() -> str | None:
    """Why there is no bitsandbytes, or None; it is looked for among the installed packages first."""
    found = importlib.machinery.PathFinder.find_spec("bitsandbytes", _search_path())
    return None if found else f"bitsandbytes is neither installed nor in a folder that {VARIABLE} names"


def _search_path() -> list[str]:
    return [*sys.path, *map(str, folders())]


def bitsandbytes() -> Any:
    """The package bitsandbytes.

    Raises:
        ImportError: It is nowhere.
    """
    before = sys.path[:]
    sys.path[:] = _search_path()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # what else it could use is of no interest here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it finds missing
            return importlib.import_module("bitsandbytes")
    finally:
        sys.path[:] = before
