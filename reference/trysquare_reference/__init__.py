"""What is right: every algorithm of trysquare as pure NumPy functions in float64, one page each, to be read.

An algorithm's page has `Hyperparameters`, `init` and `step`; its ingredients have pages of their own.
"""

from trysquare_reference import (
    blockwise8bit,
    clipping,
    decay,
    dolphinflow,
    dolphinflow8bit,
    loss_schedule,
    moments,
    polar,
    polar_express,
    projection,
    rectification,
    row_norm,
    schedule_free,
    stablemax,
    thorn,
)
from trysquare_reference._array import Array

__all__ = [
    "Array",
    "blockwise8bit",
    "clipping",
    "decay",
    "dolphinflow",
    "dolphinflow8bit",
    "loss_schedule",
    "moments",
    "polar",
    "polar_express",
    "projection",
    "rectification",
    "row_norm",
    "schedule_free",
    "stablemax",
    "thorn",
]
