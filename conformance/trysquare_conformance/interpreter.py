"""Triton's interpreter, spared what it repeats: its language is replaced once for all that runs.

The interpreter replaces every function of `triton.language` by its own when a kernel is launched, puts back all of them
after it, and replaces them again whenever the kernel calls a function: thousands of attributes looked through.
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
    """While it lasts, a kernel finds the language as the first one has left it; only kernels may use it so long."""
    import triton.language as tl
    from triton.runtime import interpreter

    replace = interpreter._patch_lang  # noqa: SLF001  # there is no other way
    done: set[bool] = set()  # which of the language's two modules have been replaced
    scopes: list[Any] = []  # what puts them back

    def replaced(function: Any) -> _Nothing:
        modules = {value is tl for value in function.__globals__.values() if value is tl or value is tl.core}
        if not modules <= done:
            done.update(modules)
            scopes.append(replace(function))
        return _Nothing()

    try:
        with patch.object(interpreter, "_patch_lang", replaced):
            yield
    finally:
        for scope in reversed(scopes):
            if scope is not None:  # Triton 3.2 leaves its language replaced
                scope.restore()
