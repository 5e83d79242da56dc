"""Triton's interpreter, spared what it repeats: its language is replaced once for all that runs, types are remembered.

The interpreter replaces every function of `triton.language` by its own when a kernel is launched, puts back all of them
after it, and replaces them again whenever the kernel calls a function: thousands of attributes looked through. For
every operation it also finds NumPy's dtype in a table that it makes for this one time, and makes its types anew.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch


class _Nothing:
    """What is to be put back after replacing nothing."""

    def restore(self) -> None:
        """Nothing."""


def _np_dtypes(find: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """NumPy's dtype of each of Triton's types, whose names tell them apart."""
    known: dict[str, Any] = {}

    def found(type_: Any) -> Any:
        if type_.name not in known:
            known[type_.name] = find(type_)
        return known[type_.name]

    return found


def _block_types(make: Callable[..., None]) -> Callable[..., None]:
    """Makes a block's type, which nobody changes, as the first one of its elements and shape was made."""
    known: dict[tuple[str, tuple[Any, ...]], dict[str, Any]] = {}

    def made(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, tuple(getattr(size, "value", size) for size in shape)  # of Triton 3.2 some are constants
        if key not in known:
            make(self, element_ty, shape)
            known[key] = dict(vars(self))
        vars(self).update(known[key])

    return made


def _tensors(make: Callable[..., None]) -> Callable[..., None]:
    """Makes a tensor as the first one of its type was made, but for what it holds."""
    known: dict[str, dict[str, Any]] = {}

    def made(self: Any, handle: Any, type_: Any) -> None:
        if type_.name not in known:
            make(self, handle, type_)
            known[type_.name] = {name: value for name, value in vars(self).items() if name != "handle"}
        vars(self).update(known[type_.name], handle=handle)

    return made


@contextmanager
def without_repetition() -> Iterator[None]:
    """While it lasts, a kernel finds the language as the first one has left it; only kernels may use it so long."""
    import triton.language as tl
    from triton.runtime import interpreter

    replace = interpreter._patch_lang  # noqa: SLF001  # there is no other way
    done: set[bool] = set()  # which of the language's two modules have been replaced
    scopes: list[Any] = []  # what puts them back

    def replaced(function: Any) -> _Nothing:
        if len(done) == 2:
            return _Nothing()
        modules = {value is tl for value in function.__globals__.values() if value is tl or value is tl.core}
        if not modules <= done:
            done.update(modules)
            scopes.append(replace(function))
        return _Nothing()

    try:
        with (
            patch.object(interpreter, "_patch_lang", replaced),
            patch.object(interpreter, "_get_np_dtype", _np_dtypes(interpreter._get_np_dtype)),  # noqa: SLF001
            patch.object(tl.block_type, "__init__", _block_types(tl.block_type.__init__)),
            patch.object(tl.tensor, "__init__", _tensors(tl.tensor.__init__)),
        ):
            yield
    finally:
        for scope in reversed(scopes):
            if scope is not None:  # Triton 3.2 leaves its language replaced
                scope.restore()
