"""Orthogonalizing optimizers for PyTorch, each with a float64 reference and a suite that checks it on your machine."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trysquare.dolphinflow import DolphinFlow
from trysquare.stablemax import StableMaxCrossEntropyLoss, log_stablemax, stablemax, stablemax_cross_entropy

if TYPE_CHECKING:
    from trysquare._capture import CapturedStep
    from trysquare.dolphinflow8bit import DolphinFlow8bit
    from trysquare.thorn import THORN

__version__ = "0.1.0"

__all__ = [
    "THORN",
    "CapturedStep",
    "DolphinFlow",
    "DolphinFlow8bit",
    "StableMaxCrossEntropyLoss",
    "log_stablemax",
    "stablemax",
    "stablemax_cross_entropy",
]

WHEN_ASKED_FOR = {
    "CapturedStep": "trysquare._capture",
    "DolphinFlow8bit": "trysquare.dolphinflow8bit",
    "THORN": "trysquare.thorn",
}
"""What is imported at its first use: together they take longer than the rest of the package."""


def __getattr__(name: str) -> Any:
    if name not in WHEN_ASKED_FOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(WHEN_ASKED_FOR[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
