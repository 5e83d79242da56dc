"""What a planted fault is, and how the fast code is changed as long as it lasts."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from trysquare import _graphs
from trysquare_conformance.footprint import changed

Change: TypeAlias = Callable[[Any], Any]
"""Makes of the original attribute the faulty one."""


WITHOUT_KERNELS = ("eager-*", "compiled-*", "bitsandbytes-*")
"""The lanes in which a fault of torch's operations can exist."""


@dataclass(frozen=True)
class Fault:
    """A mistake that can be made.

    Attributes:
        algorithm: Whose cases must catch it.
        name: Short, with dashes.
        what: The mistake in a phrase.
        owner: A module or class of the fast code.
        attribute: Of the owner, which is replaced.
        change: How.
        lanes: Globs of the lanes where it can exist.
        indistinguishable: Why no case can see it; None for a fault that must be caught.
    """

    algorithm: str
    name: str
    what: str
    owner: Any
    attribute: str
    change: Change
    lanes: tuple[str, ...] = ("*",)
    indistinguishable: str | None = None

    @property
    def id(self) -> str:
        """As it is selected: `dolphinflow/betas-swapped`."""
        return f"{self.algorithm}/{self.name}"

    @property
    def functions(self) -> frozenset[str] | None:
        """The names of those that it changes; None where that cannot be told."""
        return changed(self._original, self.change)

    @property
    def _original(self) -> Any:
        return inspect.getattr_static(self.owner, self.attribute)

    @contextmanager
    def planted(self) -> Iterator[None]:
        """While it lasts, the fast code has the fault."""
        original = self._original
        setattr(self.owner, self.attribute, self.change(original))
        _graphs.ask_again()
        try:
            yield
        finally:
            setattr(self.owner, self.attribute, original)
            _graphs.ask_again()


class Planter:
    """Collects an algorithm's faults. As a decorator it takes a fault's name and description from a function.

    `lanes` is for the faults of this page that do not say where they can exist.
    """

    def __init__(self, algorithm: str, lanes: tuple[str, ...] = ("*",)) -> None:
        self.algorithm, self.lanes = algorithm, lanes
        self.faults: list[Fault] = []

    def add(self, name: str, what: str, owner: Any, attribute: str, change: Change, **options: Any) -> None:
        """One more fault; the arguments are `Fault`'s."""
        told = {"lanes": self.lanes, **options}
        self.faults.append(Fault(self.algorithm, name, what, owner, attribute, change, **told))

    def __call__(self, owner: Any, attribute: str, **options: Any) -> Callable[[Change], Change]:
        """For a function that is given the original and returns what takes its place."""

        def declare(change: Change) -> Change:
            what = (inspect.getdoc(change) or "").rstrip(".")
            self.add(change.__name__.strip("_").replace("_", "-"), what, owner, attribute, change, **options)
            return change

        return declare
