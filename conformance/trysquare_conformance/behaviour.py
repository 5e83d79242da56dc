"""What the tests of an optimizer's behaviour share: all that it holds, bit for bit, and whether a run was honest."""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from trysquare_conformance.budget import STORED, Budget, Wrap, judge, measure
from trysquare_conformance.noise import FLOAT32, FLOAT64
from trysquare_conformance.snapshots import to_array
from trysquare_reference import dolphinflow as reference

Shapes: TypeAlias = Sequence[tuple[int, ...]]
SHAPES: Shapes = ((4, 3), (3,), (2, 3, 2, 2), (), (0, 3))
"""A matrix, a vector, a convolution, a number, and nothing."""


def parameters(
    shapes: Shapes = SHAPES, dtype: torch.dtype = torch.float32, *, seed: int = 0
) -> list[torch.nn.Parameter]:
    """Gaussian parameters with Gaussian gradients."""
    made = [torch.nn.Parameter(normal(shape, seed, 2 * i, dtype)) for i, shape in enumerate(shapes)]
    give_gradients(made, seed=seed)
    return made


def give_gradients(params: Sequence[Tensor], *, seed: int = 0, scale: float = 1.0) -> None:
    """A new Gaussian gradient for each parameter."""
    for i, p in enumerate(params):
        p.grad = normal(tuple(p.shape), seed, 2 * i + 1, p.dtype) * scale


def normal(shape: tuple[int, ...], seed: int, index: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A Gaussian tensor; each (seed, index) has its own."""
    values = np.random.default_rng((seed, index)).normal(size=shape)
    return torch.as_tensor(values).to(dtype).clone(memory_format=torch.contiguous_format)  # NumPy's empty ones are not


def run(optimizer: Optimizer, steps: int, *, first: int = 0) -> None:
    """Steps number `first` and following, each with gradients of its own."""
    for step in range(first, first + steps):
        give_gradients(all_parameters(optimizer), seed=step + 1)
        optimizer.step()


def all_parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


# Everything, bit for bit


def bits(value: Any) -> Any:
    """A tensor as layout, dtype, shape and bytes, in which NaN equals itself and 0.0 is not -0.0."""
    if not isinstance(value, Tensor):
        return repr(value)
    kind = str(value.layout), str(value.dtype), str(value.device), tuple(value.shape)
    if value.is_meta:
        return kind
    if value.layout != torch.strided:
        whole = value.detach().coalesce()
        return *kind, bits(whole.indices()), bits(whole.values())
    return *kind, value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def held(tensors: Sequence[Tensor]) -> list[Any]:
    """Values and gradients of parameters."""
    return [(bits(p), bits(p.grad) if p.is_leaf else None) for p in tensors]


def everything(optimizer: Optimizer) -> dict[str, Any]:
    """All that an optimizer can change: parameters, gradients, state, groups, counters."""
    params = all_parameters(optimizer)
    states = [optimizer.state.get(p) for p in params]
    return {
        "parameters": held(params),
        "state": [None if state is None else {name: bits(x) for name, x in state.items()} for state in states],
        "states": len(optimizer.state),
        "groups": [_group(group) for group in optimizer.param_groups],
        "defaults": {name: bits(value) for name, value in optimizer.defaults.items()},
        "skipped": bits(getattr(optimizer, "skipped_steps", None)),
    }


def _group(group: dict[str, Any]) -> dict[str, Any]:
    values = {name: bits(value) for name, value in group.items() if name != "params"}
    return {**values, "params": [id(p) for p in group["params"]]}


def progress(optimizer: Optimizer) -> dict[str, Any]:
    """What a resumed run must have in common with one that was never interrupted: all but the identity of tensors."""
    found = everything(optimizer)
    groups = [{name: value for name, value in group.items() if name != "params"} for group in found["groups"]]
    return {"parameters": [bits(p) for p in all_parameters(optimizer)], "state": found["state"], "groups": groups}


@contextlib.contextmanager
def nothing_changes(optimizer: Optimizer, but: Sequence[str] = ()) -> Iterator[None]:
    """Assert that whatever happens inside leaves every bit as it was, but for some parts of `everything`."""
    before = everything(optimizer)
    yield
    after = everything(optimizer)
    changed = [name for name in before.keys() - set(but) if before[name] != after[name]]
    if changed:
        raise AssertionError(f"changed: {', '.join(changed)}\nbefore: {before}\nafter: {after}")


# Resuming


def written(state_dict: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from a file, read without running code."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def clones(optimizer: Optimizer) -> list[Tensor]:
    """New parameters with the values of an optimizer's."""
    return [torch.nn.Parameter(p.detach().clone()) for p in all_parameters(optimizer)]


def resumed(optimizer: Optimizer, **settings: Any) -> Any:
    """What another process makes of files with the model's weights and the optimizer's state dict, in one group."""
    again = type(optimizer)(clones(optimizer), **settings)
    again.load_state_dict(written(optimizer.state_dict()))
    return again


# Honest results


@dataclass(frozen=True)
class Result:
    """Parameters and state tensors, in the order of the parameters."""

    outputs: dict[str, np.ndarray[Any, np.dtype[np.float64]]]

    @classmethod
    def of(cls, optimizer: Optimizer, order: Sequence[Tensor] | None = None) -> "Result":
        """What an optimizer holds now."""
        outputs = {}
        for i, p in enumerate(all_parameters(optimizer) if order is None else order):
            outputs[f"parameter/{i}"] = to_array(p)
            outputs |= {f"{name}/{i}": to_array(x) for name, x in optimizer.state[p].items()}
        return cls(outputs)


def budgets(
    weights: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor]],
    *,
    states: Sequence[Mapping[str, Tensor]] = (),
    draws: int = 8,
    **settings: Any,
) -> dict[str, Budget]:
    """What DolphinFlow may hold after running free over these gradients from these weights, by the reference.

    `states` are those of its state to begin with; without them it has not stepped yet.
    """
    hp = reference.Hyperparameters(**settings)
    dtype = str(weights[0].dtype).removeprefix("torch.")

    def outputs(wrap: Wrap) -> dict[str, Any]:
        thetas = [wrap(to_array(w)) for w in weights]
        now = [_state(state, wrap) for state in states] or [reference.init(theta, hp) for theta in thetas]
        for given in gradients:
            thetas, now = reference.step(thetas, [wrap(to_array(g)) for g in given], now, hp)
        result = {f"parameter/{i}": theta for i, theta in enumerate(thetas)}
        return result | {f"{name}/{i}": np.asarray(x) for i, state in enumerate(now) for name, x in state.items()}

    wide = "float64" if dtype == "float64" else "float32"
    stored = {name: STORED[dtype if name.startswith("parameter") else wide] for name in outputs(np.asarray)}
    return measure(outputs, FLOAT64 if dtype == "float64" else FLOAT32, stored, seed=0, draws=draws)


def _state(state: Mapping[str, Tensor], wrap: Wrap) -> dict[str, Any]:
    """A state as the reference takes it: the count as a number."""
    return {name: int(x) if name == "step" else wrap(to_array(x)) for name, x in state.items()}


def assert_honest(result: Result, allowed: dict[str, Budget]) -> None:
    """Assert that every output lies within its budget."""
    if result.outputs.keys() != allowed.keys():
        raise AssertionError(f"outputs {sorted(result.outputs)}, the reference has {sorted(allowed)}")
    margins = {name: judge(budget, result.outputs[name]).worst for name, budget in allowed.items()}
    worst = max(margins, key=lambda name: margins[name])
    if not margins[worst] <= 1:
        raise AssertionError(f"{worst} has margin {margins[worst]:.3g}; all: {margins}")
