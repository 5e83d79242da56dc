"""What the package `dolphinflow` 0.2.0 does, what ours does instead: one test for each row of docs/differences.md.

Both sides are run, so that a row is neither invented nor outlived by the package. Where the package is not at hand (see
`originals`) the tests are skipped.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import trysquare
from trysquare_conformance import originals

Maker = Callable[..., torch.optim.Optimizer]
Values = torch.Tensor | Sequence[Any]
OURS: Maker = trysquare.DolphinFlow
PLAIN = {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.0, "ortho_mode": None, "adaptive_lr": False}


@pytest.fixture(scope="module")
def package() -> Maker:
    """The class of the published package."""
    reason = originals.missing()
    if reason:
        pytest.skip(reason)
    return originals.dolphinflow()


@pytest.fixture(scope="module")
def package_8bit() -> Maker:
    """Its 8-bit class, with the bitsandbytes that it needs."""
    reason = originals.missing() or originals.without_bitsandbytes()
    if reason:
        pytest.skip(reason)
    return originals.dolphinflow8bit()


def stepped(
    make: Maker, weights: Values, gradients: Values, **settings: Any
) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    """A parameter and its optimizer after one step."""
    p = torch.nn.Parameter(torch.as_tensor(weights).clone())
    p.grad = torch.as_tensor(gradients).clone()
    optimizer = make([p], **settings)
    optimizer.step()
    return p, optimizer


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # as torch wrote it
    """Counts what reaches the device, and how large the largest result is."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.synchronisations, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for every operation."""
        result = func(*args, **(kwargs or {}))
        self.synchronisations += func is torch.ops.aten._local_scalar_dense.default
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def operations(make: Maker, rows: int, columns: int, **settings: Any) -> Operations:
    """What one step does on a matrix of this size."""
    seen = Operations()
    with seen:
        stepped(make, torch.ones(rows, columns), torch.ones(rows, columns), **settings)
    return seen


def test_the_gradient_is_projected_not_the_update(package: Maker) -> None:
    """The momentum buffer tells: theirs keeps what lies along the weights."""
    weights, gradients = [[2.0, 0.0]], [[0.5, 0.25]]
    _, theirs = stepped(package, weights, gradients)
    _, ours = stepped(OURS, weights, gradients, gradient_clipping=None)
    (their_state,), (our_state,) = theirs.state.values(), ours.state.values()
    assert their_state["momentum_buffer"].tolist() == gradients
    assert our_state["momentum_buffer"].tolist() == [[0.0, 0.25]]


def test_the_second_moment_is_bias_corrected(package: Maker) -> None:
    """The first step is 19 learning rates there and 1.9 here."""
    settings = {"lr": 1.0, "weight_decay": 0.0, "ortho_mode": None}
    theirs, _ = stepped(package, [0.0], [1.0], **settings)
    ours, _ = stepped(OURS, [0.0], [1.0], gradient_clipping=None, **settings)
    assert [round(-p.item(), 1) for p in (theirs, ours)] == [19.0, 1.9]


def test_gradients_are_clipped(package: Maker) -> None:
    theirs, _ = stepped(package, [0.0, 0.0], [300.0, 400.0], gradient_clipping=1.0, **PLAIN)
    ours, _ = stepped(OURS, [0.0, 0.0], [300.0, 400.0], gradient_clipping=1.0, **PLAIN)
    assert [round(p.norm().item(), 3) for p in (theirs, ours)] == [500.0, 1.0]


def test_clipping_leaves_the_gradients_as_they_are() -> None:
    p, _ = stepped(OURS, [0.0, 0.0], [300.0, 400.0], gradient_clipping=1.0, **PLAIN)
    assert p.grad is not None
    assert p.grad.tolist() == [300.0, 400.0]


def test_short_rows_are_projected_too(package: Maker) -> None:
    """Theirs leaves a row with a squared norm below eps as it is; ours has no use for eps there."""
    settings = {**PLAIN, "ortho_mode": "vector"}
    theirs, _ = stepped(package, [[2.0**-17, 0.0]], [[1.0, 0.0]], **settings)
    ours, _ = stepped(OURS, [[2.0**-17, 0.0]], [[1.0, 0.0]], **settings)
    assert theirs[0, 0] < -0.5
    assert ours[0, 0] == 2.0**-17


def test_a_step_waits_for_the_device_no_more(package: Maker) -> None:
    """Theirs asks the device once for every row; ours never."""
    assert operations(package, 16, 4).synchronisations >= 16
    assert operations(OURS, 16, 4).synchronisations == 0


def test_matrix_mode_takes_convolutions(package: Maker) -> None:
    weights, gradients = torch.ones(4, 2, 3, 3), torch.ones(4, 2, 3, 3)
    with pytest.raises(ValueError, match="2D"):
        stepped(package, weights, gradients, ortho_mode="matrix")
    ours, _ = stepped(OURS, weights, gradients, ortho_mode="matrix")
    assert not torch.equal(ours, weights)


def test_matrix_mode_forms_the_smaller_gram_matrix(package: Maker) -> None:
    assert operations(package, 300, 4, ortho_mode="matrix").largest == 300 * 300
    assert operations(OURS, 300, 4, ortho_mode="matrix").largest <= 2 * 300 * 4


def test_the_loss_aware_schedule_runs(package: Maker) -> None:
    with pytest.raises(KeyError):
        schedule_of(package)
    assert schedule_of(OURS)["loss_lr_scale"] == 0.99


def test_a_scheduler_does_not_undo_the_loss_aware_schedule(package: Maker) -> None:
    """Theirs, whose steps crash, is called directly: it writes `lr`. Ours keeps a factor beside it."""
    theirs: Any = package([torch.nn.Parameter(torch.ones(2))], lr=1.0)
    constant = torch.optim.lr_scheduler.LambdaLR(theirs, lambda _: 1.0)
    for _ in range(5):
        theirs._update_lr_from_loss(1.0)
    assert theirs.param_groups[0]["lr"] == 0.99
    theirs.step()
    constant.step()
    assert theirs.param_groups[0]["lr"] == 1.0
    group = schedule_of(OURS)
    assert (group["lr"], group["loss_lr_scale"]) == (1.0, 0.99)


def schedule_of(make: Maker) -> dict[str, Any]:
    """The parameter group after five steps whose loss does not fall."""
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = make([p], lr=1.0, loss_aware_schedule=True)
    for _ in range(5):
        optimizer.step(lambda: 1.0)
    return optimizer.param_groups[0]


def test_half_parameters_have_float32_state(package: Maker) -> None:
    weights = torch.ones(2, 2, dtype=torch.bfloat16)
    dtypes = []
    for make in (package, OURS):
        _, optimizer = stepped(make, weights, weights)
        (state,) = optimizer.state.values()
        dtypes.append({state[name].dtype for name in ("momentum_buffer", "exp_avg_sq")})
    assert dtypes == [{torch.bfloat16}, {torch.float32}]


def test_half_state_survives_a_checkpoint_in_float32(package: Maker) -> None:
    """The package leaves loading to `torch.optim`, which rounds state to the dtype of its parameter."""
    weights = torch.ones(2, 2, dtype=torch.bfloat16)
    _, theirs = stepped(package, weights, weights)
    checkpoint = theirs.state_dict()
    checkpoint["state"][0]["momentum_buffer"] = torch.full((2, 2), 1 / 3)
    theirs.load_state_dict(checkpoint)
    (rounded,) = theirs.state.values()
    assert rounded["momentum_buffer"].dtype is torch.bfloat16
    _, optimizer = stepped(OURS, weights, weights / 3)
    _, other = stepped(OURS, weights, weights)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    (saved,), (loaded,) = optimizer.state.values(), other.state.values()
    assert all(torch.equal(saved[name], loaded[name]) and saved[name].dtype == loaded[name].dtype for name in saved)


@pytest.mark.parametrize("argument", [{"lr": float("nan")}, {"beta2": 2.0}, {"eps": -1.0}, {"gradient_clipping": -1.0}])
def test_senseless_hyperparameters_are_rejected(package: Maker, argument: dict[str, float]) -> None:
    package([torch.nn.Parameter(torch.ones(2))], **argument)
    with pytest.raises(ValueError, match=next(iter(argument))):
        OURS([torch.nn.Parameter(torch.ones(2))], **argument)


def test_importing_everything_needs_no_other_package(package: Maker) -> None:
    """Theirs lists `DolphinFlow8bit` among its names whether or not bitsandbytes is there."""
    assert package is not OURS
    code = "from dolphinflow import *; print(DolphinFlow.__module__)"
    ours = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ours.stdout.strip() == "trysquare.dolphinflow"
    without = f"import sys; sys.modules['bitsandbytes'] = None; {code}"
    path = {**os.environ, "PYTHONPATH": os.environ[originals.VARIABLE]}
    theirs = subprocess.run([sys.executable, "-c", without], check=False, capture_output=True, text=True, env=path)
    assert "has no attribute 'DolphinFlow8bit'" in theirs.stderr


@pytest.mark.parametrize("adaptive_lr", [True, False])
def test_the_8bit_version_takes_a_step(package_8bit: Maker, adaptive_lr: bool) -> None:
    """Theirs calls functions that bitsandbytes does not have."""
    weights = torch.ones(64, 64)
    with pytest.raises(AttributeError, match=r"adamw_8bit|sgd_8bit"):
        stepped(package_8bit, weights, weights.tril(), adaptive_lr=adaptive_lr)
    ours, _ = stepped(trysquare.DolphinFlow8bit, weights, weights.tril(), adaptive_lr=adaptive_lr)
    assert not torch.equal(ours, weights)


def test_the_8bit_state_has_8_bits(package_8bit: Maker) -> None:
    """What theirs makes before it fails is as large as the parameter."""
    p = torch.nn.Parameter(torch.ones(64, 64))
    p.grad = torch.ones(64, 64)
    theirs = package_8bit([p])
    with pytest.raises(AttributeError):
        theirs.step()
    (their_state,) = theirs.state.values()
    assert {their_state[name].dtype for name in ("exp_avg", "exp_avg_sq")} == {torch.float32}
    _, optimizer = stepped(trysquare.DolphinFlow8bit, torch.ones(64, 64), torch.ones(64, 64))
    (our_state,) = optimizer.state.values()
    assert {our_state[name].dtype for name in ("state1", "state2")} == {torch.uint8}
