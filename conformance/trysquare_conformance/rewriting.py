"""Modules with a line changed: how a mistake is planted inside a kernel, which Triton compiles from its source."""

import itertools
import linecache
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

_number = itertools.count()


def rewritten(*changes: tuple[str, str]) -> Callable[[Any], ModuleType]:
    """Makes of a module another one, in whose source each text is replaced by the one beside it.

    Raises:
        ValueError: A text is not in the source any more.
    """

    def change(module: ModuleType) -> ModuleType:
        source = Path(module.__file__ or "").read_text(encoding="utf-8")
        for old, new in changes:
            if old not in source:
                raise ValueError(f"{module.__name__} has no {old!r}")
            source = source.replace(old, new)
        return _module(module.__name__, source)

    return change


def _module(name: str, source: str) -> ModuleType:
    """A module of that source, which the compiler finds where it looks for lines."""
    file = f"<{name} {next(_number)}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    made = ModuleType(name)
    made.__file__, made.__source__ = file, source  # type: ignore[attr-defined]
    exec(compile(source, file, "exec"), made.__dict__)  # noqa: S102  # our own source, but for the planted line
    return made
