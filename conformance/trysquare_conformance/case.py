"""What a case, a stage of it and an algorithm's subject are. Cases pages import this; `registry` collects the pages."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol, TypeAlias

import numpy as np

from trysquare_conformance.budget import Stored
from trysquare_conformance.lanes import Lane
from trysquare_conformance.noise import Arithmetic

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Outputs: TypeAlias = dict[str, Array]
Wrap: TypeAlias = Callable[[Array], Array]

TIERS = ("quick", "standard", "exhaustive")
SHORT_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


@dataclass(frozen=True)
class Case:
    """One configuration, declared once.

    `id` is stable and readable: it stands in reports and on the command line. `tier` is the smallest that runs the
    case; `late` names lanes (as globs) for which that is a larger one, because compiling it would take too long.
    `lanes` are globs of the lanes where it exists: a part of an algorithm may lack a backend.
    """

    algorithm: str
    id: str
    settings: tuple[tuple[str, Any], ...]
    shapes: tuple[tuple[int, ...], ...]
    layout: str
    dtype: str
    inputs: str
    steps: int
    tier: str
    late: tuple[tuple[str, str], ...] = ()
    lanes: tuple[str, ...] = ("*",)

    def runs_in(self, lane: str | None) -> bool:
        """Whether the case exists in a lane; None: in any."""
        return lane is None or any(fnmatchcase(lane, glob) for glob in self.lanes)

    def tier_in(self, lane: str | None) -> str:
        """The smallest tier that runs the case in a lane; None: in the lane that runs it first."""
        later = [tier for glob, tier in self.late if lane is not None and fnmatchcase(lane, glob)]
        return max([self.tier, *later], key=TIERS.index)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        return dict(self.settings)


@dataclass
class Stage:
    """A comparison: the same inputs through the reference (under any arithmetic) and through the fast code.

    Both return the same output names, float64. `stored` says how each output is kept by the fast code, `arithmetic`
    how it computes. `computes` is False where there is nothing to compute (empty tensors), so that no kernel need run.
    """

    label: str
    reference: Callable[[Wrap], Outputs]
    fast: Callable[[], Outputs]
    stored: Mapping[str, Stored]
    arithmetic: Arithmetic
    computes: bool = True


class Subject(Protocol):
    """One algorithm, as its cases page declares it."""

    algorithm: str

    def cases(self) -> Iterable[Case]:
        """Every case once, those of the smaller tiers first (so that a quick selection need not count the rest)."""

    def stages(self, case: Case, lane: Lane) -> Iterator[Stage]:
        """The teacher-forced comparisons of a case, step by step."""

    def drift(self, case: Case, lane: Lane) -> Stage | None:
        """The free-running comparison over all steps of a case, or None where one step says it all."""


def shape_name(shapes: Iterable[tuple[int, ...]]) -> str:
    """`96x40`, `7`, `scalar`; several tensors are joined by `+`."""
    return "+".join("x".join(map(str, shape)) if shape else "scalar" for shape in shapes)
