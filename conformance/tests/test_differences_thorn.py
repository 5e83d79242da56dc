"""Rows of docs/differences_thorn.md that no test of THORN's behaviour holds already."""

import pytest
import torch
from torch import nn

from trysquare import THORN
from trysquare_conformance.budget import assert_same
from trysquare_conformance.snapshots import to_array


def walked(dtype: torch.dtype, steps: int) -> THORN:
    """A schedule-free parameter that begins at 1 and sees a gradient of 1 in every step of 1e-3."""
    p = nn.Parameter(torch.ones(1, dtype=dtype))
    optimizer = THORN([{"params": [p], "orthogonalize": False}], lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_average_of_half_parameters_goes_the_right_way(dtype: torch.dtype) -> None:
    """z goes from 1 to −1, and its mean to −0.0005; with y in bfloat16 it is 1.22, as y stands still beside z."""
    optimizer = walked(dtype, 2000)
    (p,) = optimizer.param_groups[0]["params"]
    assert round(optimizer.state[p]["z"].item(), 3) == -1.0
    optimizer.eval()
    assert round(p.item(), 3) in {-0.0, -0.001}


@pytest.mark.parametrize("shape", [(768, 8), (8, 768), (64, 4, 8, 8)])
def test_decay_of_a_matrix_is_scaled_with_its_update(shape: tuple[int, ...]) -> None:
    """ρ√max(R, C) times what AdamW's λ says, where the mask lets it: here everywhere, as the update is zero."""
    p = nn.Parameter(torch.ones(shape, dtype=torch.float64))
    p.grad = torch.zeros_like(p)
    THORN([{"params": [p], "orthogonalize": True}], lr=0.01, weight_decay=0.1).step()
    rows, columns = p.detach().flatten(1).shape
    scale = 0.2 * max(rows, columns) ** 0.5
    assert_same(to_array(p), 0 * to_array(p) + 1 - 0.01 * 0.1 * scale)
