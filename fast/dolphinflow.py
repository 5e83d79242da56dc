"""The import name of the original package: ``from dolphinflow import DolphinFlow`` gives trysquare's.

An installed ``dolphinflow`` package takes precedence over this single file; ``trysquare doctor`` says which is found.
"""

from trysquare import DolphinFlow, DolphinFlow8bit

__all__ = ["DolphinFlow", "DolphinFlow8bit"]
