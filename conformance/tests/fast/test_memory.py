"""A step takes the workspace and the largest tensor in float32, beyond parameters, gradients and state.

Where nothing smaller than a row can be stepped, one row's scratch stands in for a workspace that is too small for it.
The matrix mode cannot be cut at all: it takes a fixed number of tensors of the matrix's size and two Gram matrices.
"""

from typing import Any

import pytest
import torch

from trysquare import DolphinFlow, _batches
from trysquare_conformance.behaviour import Shapes, all_parameters
from trysquare_conformance.memory import peak_bytes

FLOAT32 = 4
SMALL = 1 << 10
"""Bytes of what does not grow with anything: norms, counts, corrections."""

SHAPES: dict[str, Shapes] = {
    "tall": [(5_000, 20)],
    "wide": [(20, 5_000)],
    "long rows": [(8, 10_000)],
    "one dimension": [(80_000,)],
    "convolution": [(64, 32, 3, 3)],
    "many alike": [(32, 32)] * 100,
    "many vectors": [(250,)] * 200,
    "mixed": [(250, 150), (150,), (150, 250), (150,), (1, 1, 9)],
}
RULES: dict[str, dict[str, Any]] = {
    "vector": {},
    "update": {"project": "update"},
    "none": {"ortho_mode": None},
    "skip": {"nonfinite": "skip"},
    "plain": {"adaptive_lr": False, "gradient_clipping": None},
}


def peak(shapes: Shapes, dtype: torch.dtype, **settings: Any) -> int:
    """What the second step of an optimizer takes at most."""
    optimizer = DolphinFlow([torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes], **settings)
    for p in all_parameters(optimizer):
        p.grad = torch.ones_like(p)
    optimizer.step()
    return peak_bytes(optimizer.step)


def largest(shapes: Shapes) -> int:
    """Elements of the largest tensor."""
    return max(torch.Size(shape).numel() for shape in shapes)


@pytest.mark.parametrize(("dtype", "workspace"), [(torch.float32, 1 << 18), (torch.bfloat16, 1 << 15)], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SHAPES)
def test_a_step_stays_within_its_workspace(name: str, rule: str, dtype: torch.dtype, workspace: int) -> None:
    found = peak(SHAPES[name], dtype, workspace_bytes=workspace, **RULES[rule])
    assert found <= workspace + FLOAT32 * largest(SHAPES[name]) + SMALL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(1, 80_000), (2, 30_000), (3, 1, 20_000)])
def test_one_row_is_the_least(shape: tuple[int, ...], rule: str, dtype: torch.dtype) -> None:
    """A row that outgrows the workspace is stepped whole; without a projection it is cut too."""
    row = torch.Size(shape[1:]).numel() * FLOAT32
    snapshots = len(("parameter", "momentum_buffer", "exp_avg_sq")) if rule == "skip" else 0
    scratch = 0 if rule == "none" else row * (_batches.SCRATCH + snapshots)
    found = peak([shape], dtype, workspace_bytes=1 << 15, **RULES[rule])
    assert found <= max(1 << 15, scratch) + FLOAT32 * largest([shape]) + SMALL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_workspace_that_was_measured_is_the_default(dtype: torch.dtype) -> None:
    assert peak([(2000, 500)], dtype) <= _batches.WORKSPACE_BYTES["cpu"] + FLOAT32 * 1_000_000 + SMALL


def test_a_larger_workspace_is_used() -> None:
    """Else the bound would say nothing."""
    small, large = (peak([(5_000, 20)], torch.float32, workspace_bytes=workspace) for workspace in (1 << 14, 1 << 22))
    assert small < 1 << 16 < 1 << 20 < large


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(120, 60), (60, 120), (80, 80), (16, 8, 3, 3)])
def test_matrix_mode_takes_five_tensors_and_two_gram_matrices(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Clipped gradient, update, X, the next X and its return to the update's norm; a half parameter in float32 too."""
    rows, columns = _batches.rows_and_columns(torch.Size(shape))
    tensors = 5 + (dtype != torch.float32)
    found = peak([shape], dtype, ortho_mode="matrix", workspace_bytes=SMALL)
    assert found <= FLOAT32 * (tensors * rows * columns + 2 * min(rows, columns) ** 2) + SMALL


def test_matrix_mode_batches_small_matrices_within_the_workspace() -> None:
    """But for their Gram matrices, which are no larger than they are."""
    workspace = 1 << 20
    found = peak([(32, 32)] * 100, torch.float32, ortho_mode="matrix", workspace_bytes=workspace)
    assert found <= workspace * (1 + 2 / _batches.SCRATCH)
