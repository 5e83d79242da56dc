"""The three rooms hold the same things: what the reference defines is what the fast code does and what is checked."""

import ast
import inspect
import pkgutil
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import trysquare
import trysquare.ops
import trysquare_conformance
import trysquare_reference
from trysquare_conformance import faults, registry
from trysquare_conformance.lanes import LANES
from trysquare_reference import dolphinflow as reference
from trysquare_reference import dolphinflow8bit, thorn

EXECUTION = ["nonfinite", "workspace_bytes", "backend"]
INGREDIENTS = {"blockwise8bit"}
"""What has cases of its own without being an algorithm."""

WRAPPERS = {"_capture"}
"""What serves every algorithm, and is public without being one."""

TOLERANCES = {"atol", "rtol", "abs", "rel", "rel_tol", "abs_tol", "decimal", "significant"}


def public(package: ModuleType) -> set[str]:
    """The modules of a package that are pages, not machinery."""
    return {module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")} - {
        "ops",
        "kernels",
    }


def test_reference_fast_and_cases_hold_the_same_algorithms() -> None:
    algorithms = set(registry.ALGORITHMS) - INGREDIENTS
    assert algorithms == public(trysquare)
    assert set(registry.ALGORITHMS) <= public(trysquare_reference)
    assert {fault.algorithm for fault in faults.all_faults()} == set(registry.ALGORITHMS)


def test_every_reference_page_has_its_tensor_functions_under_the_same_name() -> None:
    assert public(trysquare_reference) == public(trysquare.ops)


def test_every_public_name_belongs_to_an_algorithm() -> None:
    owners = {getattr(trysquare, name).__module__.removeprefix("trysquare.") for name in trysquare.__all__}
    assert owners - WRAPPERS == set(registry.ALGORITHMS) - INGREDIENTS


def test_hyperparameters_agree_in_name_order_and_default() -> None:
    signature = inspect.signature(trysquare.DolphinFlow).parameters
    given = {name: parameter.default for name, parameter in signature.items() if name not in {"params", *EXECUTION}}
    declared = {field.name: field.default for field in fields(reference.Hyperparameters)}
    assert list(given.items()) == list(declared.items())
    assert list(signature)[-len(EXECUTION) :] == EXECUTION
    keyword_only = [name for name, p in signature.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert keyword_only == ["project", "bias_correction", *EXECUTION]


def test_the_8bit_version_has_the_same_arguments_but_two() -> None:
    whole = inspect.signature(trysquare.DolphinFlow).parameters
    signature = inspect.signature(trysquare.DolphinFlow8bit).parameters
    assert list(signature) == [name for name in whole if name not in {"project", "bias_correction"}]
    assert [p.default for p in signature.values()] == [whole[name].default for name in signature]
    declared = {field.name: field.default for field in fields(dolphinflow8bit.Hyperparameters)}
    assert declared == {name: signature[name].default for name in declared}
    assert list(declared) == [name for name in signature if name not in {"params", *EXECUTION}]


@pytest.mark.parametrize("size", [2, 64])
@pytest.mark.parametrize("adaptive_lr", [True, False])
def test_states_of_the_8bit_version_have_the_same_names_shapes_and_values(adaptive_lr: bool, size: int) -> None:
    parameter = torch.nn.Parameter(torch.ones(size, size))
    optimizer = trysquare.DolphinFlow8bit([parameter], adaptive_lr=adaptive_lr)
    parameter.grad = torch.zeros(size, size)
    optimizer.step()
    declared = dolphinflow8bit.init(np.ones((size, size)), dolphinflow8bit.Hyperparameters(adaptive_lr=adaptive_lr))
    state = optimizer.state[parameter]
    assert list(state) == list(declared)
    for name in list(declared)[1:]:
        assert np.array_equal(state[name].numpy(), declared[name])


@pytest.mark.parametrize("adaptive_lr", [True, False])
def test_states_have_the_same_names(adaptive_lr: bool) -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones(2, 2)
    optimizer = trysquare.DolphinFlow([parameter], adaptive_lr=adaptive_lr)
    optimizer.step()
    declared = reference.init(np.ones((2, 2)), reference.Hyperparameters(adaptive_lr=adaptive_lr))
    assert list(optimizer.state[parameter]) == list(declared)


THORN_STATES: dict[str, dict[str, object]] = {
    "rows": {"orthogonalize": True},
    "no rows": {"orthogonalize": True, "betas": (0.9, 0.0)},
    "averaged": {"orthogonalize": False},
    "mean only": {"orthogonalize": False, "betas": (0.0, 0.9)},
    "adam": {"orthogonalize": False, "schedule_free": False},
}


def test_thorns_hyperparameters_agree_in_name_and_default() -> None:
    """Form, restarts and update rate say how the reference is to compute, not what."""
    signature = inspect.signature(trysquare.THORN).parameters
    declared = {field.name: field.default for field in fields(thorn.Hyperparameters)}
    shared = {name: declared[name] for name in signature if name in declared}
    assert declared.keys() - shared.keys() == {"orthogonalize", "form", "restarts", "update_rate"}
    assert {name: signature[name].default for name in shared} == shared
    own = ["params", "none_grad", "matmul_dtype", "exclude", *EXECUTION]
    assert sorted(signature.keys() - shared.keys()) == sorted(own)
    keyword_only = [name for name, p in signature.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert list(signature)[: -len(keyword_only)] == ["params", "lr", "betas", "weight_decay"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", THORN_STATES)
def test_thorns_states_have_the_same_names(kind: str, dtype: torch.dtype) -> None:
    said = THORN_STATES[kind]
    parameter = torch.nn.Parameter(torch.ones(2, 2, dtype=dtype))
    parameter.grad = torch.ones(2, 2, dtype=dtype)
    optimizer = trysquare.THORN([{"params": [parameter], **said}])
    optimizer.step()
    hp = replace(thorn.Hyperparameters(), **said)
    assert optimizer.state[parameter].keys() == thorn.init(np.ones((2, 2)), hp, half=dtype == torch.bfloat16).keys()


def test_every_backend_has_a_lane_and_every_lane_a_baseline() -> None:
    assert {"eager", "compiled", "triton", "bitsandbytes"} == {lane.backend for lane in LANES.values()}
    assert [lane.name for lane in LANES.values()] == list(LANES)
    assert {lane.baseline.name for lane in LANES.values() if lane.baseline} == {"eager-cpu", "eager-cuda"}


def test_no_tolerance_is_written_anywhere_but_in_the_budget() -> None:
    root = Path(trysquare_conformance.__file__).parents[1]
    found = [
        f"{path.relative_to(root)}:{call.lineno}: {keyword.arg}"
        for path in root.rglob("*.py")
        if path.name != "budget.py"
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg in TOLERANCES
    ]
    assert found == []
