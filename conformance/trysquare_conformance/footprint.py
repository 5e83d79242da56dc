"""Which functions of the fast code a run executes, so that a mistake in another one need not be looked for there."""

import ast
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, FunctionType, ModuleType
from typing import Any, TypeVar
from unittest.mock import patch

import trysquare
from trysquare import _backend

Result = TypeVar("Result")

PACKAGE = str(Path(trysquare.__file__).parent)


def watched(run: Callable[[], Result]) -> tuple[Result, frozenset[str]]:
    """Run, and return beside the result the names of the fast code's functions that Python executed in this thread.

    Kernels are among them where Triton interprets them; what is compiled leaves no trace.
    """
    seen: set[str] = set()

    def see(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            seen.add(frame.f_code.co_name)

    with _kernels_seen(seen):
        before = sys.getprofile()
        sys.setprofile(see)
        try:
            result = run()
        finally:
            sys.setprofile(before)
    return result, frozenset(seen)


@contextmanager
def _kernels_seen(seen: set[str]) -> Iterator[None]:
    """Adds the names of interpreted kernels and of what they call. Everything else in a launch is the interpreter."""
    if not _backend.interpreted():
        yield
        return
    from triton.runtime import interpreter

    launch, function = interpreter.GridExecutor.__call__, interpreter.InterpretedFunction.rewrite

    def launched(*arguments: Any, **options: Any) -> Any:
        profile = sys.getprofile()
        sys.setprofile(None)
        try:
            return launch(*arguments, **options)
        finally:
            sys.setprofile(profile)

    def named(kernel: Any) -> Any:
        seen.add(kernel.fn.__name__)
        return function(kernel)

    executes = patch.object(interpreter.GridExecutor, "__call__", launched)
    with executes, patch.object(interpreter.InterpretedFunction, "rewrite", named):
        yield


def changed(original: Any, change: Callable[[Any], Any]) -> frozenset[str] | None:
    """The names of the functions that are others after a change of an attribute; None where that cannot be told.

    Of a kernel that of the function from which it is made, of a module those whose source another one has.
    """
    if isinstance(original, ModuleType):
        return _rewritten(original, change(original))
    function = getattr(original, "fn", original)
    own = isinstance(function, FunctionType) and function.__module__.startswith("trysquare.")
    return frozenset({function.__name__}) if own else None


def _rewritten(original: ModuleType, other: ModuleType) -> frozenset[str] | None:
    """None if it is not only functions."""
    source = getattr(other, "__source__", None)
    if source is None or not (original.__file__ or "").startswith(PACKAGE):
        return None
    old, new = (_parts(text) for text in (Path(original.__file__ or "").read_text(encoding="utf-8"), source))
    if old.pop("") != new.pop(""):
        return None
    return frozenset(name for name in old if old[name] != new.get(name))


def _parts(source: str) -> dict[str, str]:
    """The functions of a module by name, and under no name all else."""
    parts = {"": ""}
    for statement in ast.parse(source).body:
        name = statement.name if isinstance(statement, ast.FunctionDef) else ""
        parts[name] = parts.get(name, "") + ast.dump(statement)
    return parts
