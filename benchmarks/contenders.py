"""Who steps the 21 million parameters: each optimizer as one is used to it, and what it computes in float64."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from trysquare import DolphinFlow
from trysquare_conformance import originals
from trysquare_conformance.budget import STORED, Wrap, judge, measure
from trysquare_conformance.case import Array, Outputs
from trysquare_conformance.noise import FLOAT32
from trysquare_conformance.snapshots import to_array
from trysquare_reference import dolphinflow as reference

Parameters = list[torch.nn.Parameter]
Build = Callable[[Parameters], torch.optim.Optimizer]
Gradients = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Contender:
    """An optimizer under its name in the table.

    Attributes:
        name: Stable: ratios and tables refer to it.
        build: Makes it over given parameters.
        bytes_per_parameter: The least that a float32 step has to move; None where memory is not what bounds it.
        hyperparameters: Of the reference that says what it should compute; None for AdamW, whose own float64 says so.
    """

    name: str
    build: Build
    bytes_per_parameter: int | None
    hyperparameters: reference.Hyperparameters | None = None

    def exact(self, parameters: Sequence[torch.Tensor], steps: Sequence[Gradients]) -> list[Array]:
        """The parameters after these steps in float64."""
        if self.hyperparameters is None:
            return self._in_float64(parameters, steps)
        gradients = [[to_array(g) for g in step] for step in steps]
        return _reference([to_array(p) for p in parameters], gradients, self.hyperparameters)

    def _in_float64(self, parameters: Sequence[torch.Tensor], steps: Sequence[Gradients]) -> list[Array]:
        wide = [torch.nn.Parameter(p.detach().double()) for p in parameters]
        optimizer = self.build(wide)
        for step in steps:
            for parameter, gradient in zip(wide, step, strict=True):
                parameter.grad = gradient.double()
            optimizer.step()
        return [to_array(p) for p in wide]

    def margin(self, parameters: Sequence[torch.Tensor], steps: Sequence[Gradients], after: Parameters) -> float | None:
        """The worst observed error over the budget that the reference makes for itself; right up to 1."""
        hp = self.hyperparameters
        if hp is None:
            return None
        starts, gradients = [to_array(p) for p in parameters], [[to_array(g) for g in step] for step in steps]

        def run(wrap: Wrap) -> Outputs:
            wrapped = [[wrap(g) for g in step] for step in gradients]
            return {str(i): p for i, p in enumerate(_reference([wrap(p) for p in starts], wrapped, hp))}

        budgets = measure(run, FLOAT32, {str(i): STORED["float32"] for i in range(len(starts))}, seed=0)
        return max(judge(budgets[str(i)], to_array(p)).worst for i, p in enumerate(after))


def _reference(now: list[Array], steps: list[list[Array]], hp: reference.Hyperparameters) -> list[Array]:
    states = [reference.init(p, hp) for p in now]
    for gradients in steps:
        now, states = reference.step(now, gradients, states, hp)
    return now


def relative_error(observed: Parameters, exact: list[Array], start: Sequence[torch.Tensor]) -> float:
    """‖observed − exact‖ / ‖exact − start‖ over all parameters: the error in units of the way that was gone."""
    gaps = sum(float(np.sum((to_array(o) - e) ** 2)) for o, e in zip(observed, exact, strict=True))
    ways = sum(float(np.sum((e - to_array(s)) ** 2)) for e, s in zip(exact, start, strict=True))
    return float(np.sqrt(gaps / ways))


def ours(name: str, bytes_per_parameter: int | None, backend: str, **settings: Any) -> Contender:
    hp = reference.Hyperparameters(lr=1e-4, **settings)
    return Contender(name, lambda p: DolphinFlow(p, backend=backend, **asdict(hp)), bytes_per_parameter, hp)


def adamw(name: str, *, foreach: bool = False, fused: bool = False) -> Contender:
    def build(parameters: Parameters) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-2, foreach=foreach, fused=fused)

    return Contender(name, build, 28)


def published() -> list[Contender]:
    """The package, if there is a folder with it."""
    if originals.missing():
        return []
    as_is = reference.Hyperparameters(lr=1e-4, project="update", bias_correction=False, gradient_clipping=None)
    return [Contender(PUBLISHED, lambda p: originals.dolphinflow()(p, lr=1e-4), 28, as_is)]


VECTOR, VECTOR_COMPILED = "DolphinFlow", "DolphinFlow, compiled"
FOREACH, FUSED = "AdamW(foreach=True)", "AdamW(fused=True)"
PUBLISHED = f"dolphinflow {originals.VERSION}"


def contenders() -> list[Contender]:
    """Everyone who can run here. DolphinFlow reads each gradient once more than AdamW, for the clipping norm."""
    return [
        adamw(FOREACH, foreach=True),
        adamw(FUSED, fused=True),
        ours(VECTOR, 32, "eager"),
        ours(VECTOR_COMPILED, 32, "compiled"),
        ours("DolphinFlow, ortho_mode=None", 32, "eager", ortho_mode=None),
        ours("DolphinFlow, ortho_mode=None, compiled", 32, "compiled", ortho_mode=None),
        ours('DolphinFlow, ortho_mode="matrix"', None, "eager", ortho_mode="matrix"),
        *published(),
    ]
