"""The import name of the original: ``from thorn import THORN`` gives trysquare's.

An installed ``thorn`` package takes precedence over this single file; ``trysquare doctor`` says which is found.
"""

from trysquare import THORN

__all__ = ["THORN"]
