"""Orthogonalizing optimizers for PyTorch, each with a float64 reference and a suite that checks it on your machine."""

from trysquare.dolphinflow import DolphinFlow
from trysquare.dolphinflow8bit import DolphinFlow8bit
from trysquare.stablemax import StableMaxCrossEntropyLoss, log_stablemax, stablemax, stablemax_cross_entropy
from trysquare.thorn import THORN

__version__ = "0.1.0"

__all__ = [
    "THORN",
    "DolphinFlow",
    "DolphinFlow8bit",
    "StableMaxCrossEntropyLoss",
    "log_stablemax",
    "stablemax",
    "stablemax_cross_entropy",
]
