"""How the reference and the fast optimizer take a step in THORN's cases, in every mode that there is.

A case's settings are the constructor's arguments and a few more: `kind` and `second_group` say of what kind the groups
are, `release` is the update rate of gradient release (0: without), `schedule` that of the learning rate, and `view`
asks for the averaged weights too.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from fnmatch import fnmatchcase
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch

from trysquare import THORN
from trysquare._optimizer import BatchedOptimizer
from trysquare.ops import polar
from trysquare_conformance import inputs
from trysquare_conformance.case import Array, Case, Outputs, Stage
from trysquare_conformance.lanes import Lane
from trysquare_conformance.noise import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, Arithmetic
from trysquare_conformance.noisy import Noisy, computed_in
from trysquare_conformance.optimizers import FastRun, OptimizerSubject
from trysquare_conformance.pairwise import Choice
from trysquare_conformance.snapshots import Feed, Snapshot, plain, rounded, to_array
from trysquare_reference import thorn
from trysquare_reference._array import as_matrix
from trysquare_reference.polar import polar_factor

ALGORITHMIC = {
    field.name: field.default
    for field in fields(thorn.Hyperparameters)
    if field.name not in {"orthogonalize", "batched", "form", "restarts", "update_rate"}
}
"""The arguments that the reference declares and a user gives, with their defaults."""

KINDS: dict[str, dict[str, Any]] = {
    "ortho": {"orthogonalize": True},
    "batched": {"orthogonalize": True, "batched": True},
    "free": {"orthogonalize": False},
    "adam": {"orthogonalize": False, "schedule_free": False},
    "model": {},
}
"""Of groups: what is set for one. A model assigns its parameters itself, by dimensions and `exclude`."""

ARITHMETICS = {"float64": FLOAT64, "float32": FLOAT32, "bfloat16": BFLOAT16, "float16": FLOAT16}

SCHEDULES: dict[str, Callable[[int], float]] = {
    "constant": lambda _: 1.0,
    "falling": lambda t: 1.0 / (1 + t),
    "from-zero": lambda t: t / 4,
}
"""Factor of the learning rate after t steps."""

SECOND_GROUPS: dict[str, dict[str, Any]] = {
    "": {},
    "ortho": {"kind": "ortho", "lr": 3e-2, "weight_decay": 0.3, "betas": (0.5, 0.0), "target_rms": 0.0, "eps": 1e-3},
    "free": {"kind": "free", "lr": 3e-2, "weight_decay": 0.3, "betas": (0.5, 0.9), "eps": 1e-3},
    "adam": {"kind": "adam", "lr": 3e-2, "weight_decay": 0.3, "betas": (0.5, 0.9)},
}


class ThornSteps(OptimizerSubject):
    """All of THORN's subject but its cases."""

    algorithm = "thorn"

    def build(self, case: Case, parameters: Sequence[torch.nn.Parameter], lane: Lane) -> BatchedOptimizer:
        settings = case.hyperparameters
        names = (*ALGORITHMIC, "none_grad", "exclude", "nonfinite", "workspace_bytes")
        arguments = {name: settings[name] for name in names}
        if settings["tensor_lr"]:
            arguments["lr"] = torch.tensor(settings["lr"], device=lane.device)
        arguments["matmul_dtype"] = settings["matmul_dtype"] and getattr(torch, settings["matmul_dtype"])
        arguments["coefficients"] = _coefficients(settings)
        model = _Model(parameters)
        optimizer = THORN(_groups(case, model, parameters), **arguments, backend=lane.backend)
        if settings["release"]:
            optimizer.setup_gradient_release(model, update_rate=settings["release"])
        return optimizer

    def begin(self, case: Case, parameters: Sequence[Array]) -> Snapshot:
        half = case.dtype in inputs.HALVES
        rules = hyperparameters(case)
        return Snapshot(
            tuple(parameters), tuple(thorn.init(p, hp, half) for p, hp in zip(parameters, rules, strict=True))
        )

    def advance(self, case: Case, before: Snapshot, feed: Feed) -> Snapshot:
        parameters, states = list(before.parameters), list(before.states)
        with _products_in(case.hyperparameters["matmul_dtype"]):
            for i, (hp, gradient) in enumerate(zip(hyperparameters(case), feed.gradients, strict=True)):
                if gradient is not None:
                    now = replace(hp, lr=_scheduled(case, hp.lr, before.states[0]["step"]))
                    parameters[i], state = thorn.release_step(parameters[i], gradient, states[i], now)
                    states[i] = {
                        name: np.asanyarray(v) if isinstance(v, np.floating) else v for name, v in state.items()
                    }
        return Snapshot(tuple(np.asanyarray(p) for p in parameters), tuple(states), before.shared)

    def as_stored(self, case: Case, exact: Snapshot) -> Snapshot:
        """A parameter in half precision is the rounding of the `y` in its state."""
        stored = super().as_stored(case, exact)
        pairs = zip(stored.parameters, stored.states, strict=True)
        return replace(stored, parameters=tuple(rounded(state.get("y", p), case.dtype) for p, state in pairs))

    def stored_as(self, case: Case, name: str) -> str:
        """Counters are float64. A rectified rate has differences of large numbers: its last digits are not judged."""
        if name in {"lr_max", "weight_sum"} and not case.hyperparameters["rectify"]:
            return "float64"
        return "float64" if case.dtype == "float64" else "float32"

    def in_lane(self, case: Case, lane: Lane) -> Case:
        """With the dtype of the products and the form of each polar factor, which the lane's device decides."""
        state = torch.float64 if case.dtype == "float64" else torch.float32
        chosen = case.hyperparameters["matmul_dtype"]
        dtype = getattr(torch, chosen) if chosen else polar.choose_matmul_dtype(state, torch.device(lane.device))
        forms = tuple(
            _form(hp, shape, dtype, lane) for hp, shape in zip(hyperparameters(case), case.shapes, strict=True)
        )
        settings = {**case.hyperparameters, "matmul_dtype": str(dtype).removeprefix("torch."), "forms": forms}
        return replace(case, settings=tuple(settings.items()))

    def arithmetic(self, case: Case) -> Arithmetic:
        """That of the state; dtype and form of the products, which `advance` knows of, belong to the budget's name."""
        base, settings = super().arithmetic(case), case.hyperparameters
        if not any(hp.orthogonalize for hp in hyperparameters(case)):
            return base
        gram = settings["forms"].count("gram")
        return replace(base, name=f"{base.name}, products in {settings['matmul_dtype']}, {gram} in Gram form")

    def drift(self, case: Case, lane: Lane) -> Stage | None:
        """Where a step is a million times a weight, one sign that flips in the first is all there is to see later."""
        return None if case.hyperparameters["lr"] >= 1e6 else super().drift(case, lane)

    def computes(self, case: Case, feed: Feed, step: int) -> bool:
        """A micro-step between updates may be too little to be a call."""
        rate = case.hyperparameters["release"]
        moves = rate < 2 or ((step + 1) % rate == 0 and case.inputs != "missing")
        return feed.computes and moves

    def keeps_gradients(self, case: Case) -> bool:
        return not (case.hyperparameters["none_grad"] or case.hyperparameters["release"])

    def take_step(self, run: FastRun, gradients: Sequence[torch.Tensor | None], loss: float | None) -> None:
        """With the learning rate of the schedule; in gradient release by a backward pass that has these gradients."""
        _set_rates(run)
        if not run.case.hyperparameters["release"]:
            super().take_step(run, gradients, loss)
            return
        with torch.enable_grad():
            pairs = zip(run.parameters, gradients, strict=True)
            total = [(p.double() * g.double()).sum() for p, g in pairs if g is not None]
            if total:
                torch.autograd.backward(torch.stack(total).sum())

    def expected_view(self, case: Case, after: Snapshot) -> Outputs:
        if not case.hyperparameters["view"]:
            return {}
        each = zip(after.parameters, after.states, hyperparameters(case), strict=True)
        return {f"mean/{i}": plain(thorn.mean(p, state, hp)) for i, (p, state, hp) in enumerate(each)}

    def observed_view(self, run: FastRun) -> Outputs:
        """The averaged weights, from a look that must leave every bit of parameters and states as it was."""
        if not run.case.hyperparameters["view"]:
            return {}
        optimizer: Any = run.optimizer
        before = _everything(run)
        optimizer.eval()
        seen = {f"mean/{i}": to_array(p) for i, p in enumerate(run.parameters)}
        optimizer.train()
        if not _same(_everything(run), before):
            raise AssertionError("eval() and train() changed parameters or state")
        return seen


class _Model(torch.nn.Module):
    """The parameters of a case under the names p0, p1, …"""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        super().__init__()
        for i, parameter in enumerate(parameters):
            self.register_parameter(f"p{i}", parameter)


def _kinds(case: Case) -> list[tuple[str, dict[str, Any]]]:
    """Kind and overrides of each parameter: every second one is in the second group, if there is one."""
    settings, second = case.hyperparameters, SECOND_GROUPS[case.hyperparameters["second_group"]]
    if settings["kind"] == "model":
        kinds = ["ortho" if _is_matrix(case, i) else "free" for i in range(len(case.shapes))]
        return [(kind, {}) for kind in kinds]
    overrides = {name: value for name, value in second.items() if name != "kind"}
    odd = (second.get("kind", settings["kind"]), overrides)
    return [odd if second and i % 2 else (settings["kind"], {}) for i in range(len(case.shapes))]


def _is_matrix(case: Case, index: int) -> bool:
    excluded = any(fnmatchcase(f"p{index}", pattern) for pattern in case.hyperparameters["exclude"])
    return len(case.shapes[index]) >= 2 and not excluded


def hyperparameters(case: Case) -> list[thorn.Hyperparameters]:
    """What the reference is given, a parameter."""
    settings = case.hyperparameters
    lr = torch.tensor(settings["lr"]).item() if settings["tensor_lr"] else settings["lr"]
    names = {field.name for field in fields(thorn.Hyperparameters)}
    common = {name: value for name, value in settings.items() if name in names} | {"lr": lr}
    common |= {"update_rate": max(1, settings["release"]), "coefficients": _coefficients(settings)}
    forms = settings.get("forms") or ("standard",) * len(case.shapes)
    made = []
    for form, (kind, overrides) in zip(forms, _kinds(case), strict=True):
        changes = {"form": form, **KINDS[kind], **overrides}
        hp = thorn.Hyperparameters(**{**common, **changes})
        made.append(replace(hp, restarts=polar.restarts(hp.iters)))
    return made


def _coefficients(settings: Choice) -> tuple[tuple[float, float, float], ...] | None:
    """Muon's, where they are to be given, else None for the Polar Express's."""
    return (polar.MUON_COEFFICIENTS,) * settings["iters"] if settings["coefficients"] == "muon" else None


def _groups(case: Case, model: torch.nn.Module, parameters: Sequence[torch.nn.Parameter]) -> Any:
    """What the constructor is given: the model, or groups."""
    settings = case.hyperparameters
    if settings["kind"] == "model":
        return model
    first = {"params": list(parameters), **KINDS[settings["kind"]]}
    if not settings["second_group"]:
        return [first]
    second = dict(SECOND_GROUPS[settings["second_group"]])
    odd = {
        "params": list(parameters[1::2]),
        "batched": False,
        "schedule_free": True,
        **KINDS[second.pop("kind")],
        **second,
    }
    return [{**first, "params": list(parameters[::2])}, odd]


def _form(
    hp: thorn.Hyperparameters, shape: tuple[int, ...], dtype: torch.dtype, lane: Lane
) -> Literal["standard", "gram"]:
    """The form that the fast code takes, for the reference to err likewise.

    In half precision the reference's own Gram form diverges in some draws, since R drifts from XXᵀ; there any form has
    to be as good as the standard one.
    """
    if not hp.orthogonalize or 0 in shape or dtype in {torch.bfloat16, torch.float16}:
        return "standard"
    rows, columns = shape[-2:] if hp.batched else as_matrix(np.empty(shape)).shape
    chosen = polar.choose_form(rows, columns, torch.device(lane.device), dtype, hp.iters)
    return "gram" if chosen == "gram" else "standard"


def _products_in(dtype: str | None) -> AbstractContextManager[Any]:
    """While it lasts, the reference takes polar factors of noisy matrices in the arithmetic of their products."""
    if dtype is None:
        return nullcontext()
    arithmetic = ARITHMETICS[dtype]

    def in_dtype(u: Array, *arguments: Any) -> Any:
        same = not isinstance(u, Noisy) or u.source.arithmetic.elementwise == arithmetic.elementwise
        return polar_factor(u, *arguments) if same else computed_in(arithmetic, polar_factor, u, *arguments)

    return patch.object(thorn, "polar_factor", in_dtype)


def _scheduled(case: Case, lr: float, step: int) -> float:
    """The reference's learning rate: what a tensor can hold is one where the case has tensors."""
    tensor = torch.tensor(lr)
    is_tensor = case.hyperparameters["tensor_lr"] and tensor.item() == lr
    return float(_rate(case, tensor if is_tensor else lr, step))


def _rate(case: Case, lr: Any, step: int) -> Any:
    """The learning rate after so many steps of the first parameter."""
    return lr * SCHEDULES[case.hyperparameters["schedule"]](step)


def _set_rates(run: FastRun) -> None:
    """As a scheduler does, before a step."""
    if run.case.hyperparameters["schedule"] == "constant":
        return
    state = run.optimizer.state.get(run.parameters[0]) or {"step": 0}
    for group in run.optimizer.param_groups:
        group["lr"] = _rate(run.case, group.setdefault("initial_lr", group["lr"]), int(state["step"]))


def _everything(run: FastRun) -> list[torch.Tensor]:
    states = [value for p in run.parameters for value in run.optimizer.state.get(p, {}).values()]
    return [tensor.detach().clone() for tensor in (*run.parameters, *states)]


def _same(now: Sequence[torch.Tensor], before: Sequence[torch.Tensor]) -> bool:
    """Bit for bit."""
    return len(now) == len(before) and all(
        a.dtype == b.dtype
        and torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
        for a, b in zip(now, before, strict=True)
    )
