"""Triton's interpreter, spared a third of its time: while a kernel runs, its language is replaced once.

The interpreter replaces every function of `triton.language` by its own when a kernel is launched, and again whenever
the kernel calls a function: thousands of attributes looked through to find that they are replaced already.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch


class _Nothing:
    """What is to be put back after replacing nothing."""

    def restore(self) -> None:
        """Nothing."""


@contextmanager
def without_repetition() -> Iterator[None]:
    """While it lasts, a function that a kernel calls finds the language as the launch has left it."""
    import triton.language as tl
    from triton.runtime import interpreter

    launch, replace = interpreter.GridExecutor.__call__, interpreter._patch_lang  # noqa: SLF001  # there is no other way
    launches: list[set[bool]] = []  # which of the language's two modules each launch in progress has replaced

    def launched(executor: Any, *arguments: Any, **options: Any) -> Any:
        launches.append(set())
        try:
            return launch(executor, *arguments, **options)
        finally:
            launches.pop()

    def replaced(function: Any) -> Any:
        modules = {value is tl for value in function.__globals__.values() if value is tl or value is tl.core}
        if not launches:
            return replace(function)
        if modules <= launches[-1]:
            return _Nothing()
        launches[-1].update(modules)
        return replace(function)

    executes = patch.object(interpreter.GridExecutor, "__call__", launched)
    with executes, patch.object(interpreter, "_patch_lang", replaced):
        yield
