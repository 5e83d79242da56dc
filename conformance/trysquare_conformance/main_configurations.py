"""What is trained with: the configurations whose kernels are compiled ahead of time for every kind of GPU.

Each takes one step, of which only the launches are written down. Columns decide what is compiled: there are few rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

import trysquare
from trysquare.ops import blockwise8bit

Shapes = tuple[tuple[int, ...], ...]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES: Shapes = ((16, 768), (16, 3072), (64, 3, 3, 3), (768,), (16, 50_257))
"""Rows of GPT-2's matrices, short ones of a convolution, a bias, and rows too long for one program."""

MATRICES: Shapes = ((768, 768), (768, 3072), (3072, 768))
VOCABULARY = 50_257


@dataclass(frozen=True)
class Configuration:
    """A way to use an algorithm; `step` launches its kernels."""

    algorithm: str
    name: str
    step: Callable[[], Any]
    chooses: bool = False
    """Whether some GPUs run other kernels than the rest."""


def configurations() -> Iterator[Configuration]:
    """All of them."""
    for (short, dtype), (mode, project) in product(DTYPES.items(), MODES):
        options = {"ortho_mode": mode, "project": project}
        step = partial(_step, trysquare.DolphinFlow, SHAPES, dtype, **options)
        yield Configuration("dolphinflow", f"{mode}/{project}/{short}", step)
    for (short, dtype), mode in product(DTYPES.items(), ("vector", "matrix", None)):
        step = partial(_step, trysquare.DolphinFlow8bit, SHAPES, dtype, ortho_mode=mode)
        yield Configuration("dolphinflow8bit", f"{mode}/{short}", step)
    yield Configuration("blockwise8bit", "codes", _codes)
    for (short, dtype), batched in product(DTYPES.items(), (False, True)):
        yield Configuration("thorn", f"batched={batched}/{short}", partial(_thorn, dtype, batched), chooses=True)
    for short, dtype in DTYPES.items():
        yield Configuration("stablemax", short, partial(_stablemax, dtype, backend="triton"))


MODES = (("vector", "gradient"), ("vector", "update"), ("matrix", "gradient"), (None, "gradient"))


def _step(optimizer: Any, shapes: Shapes, dtype: torch.dtype, **options: Any) -> None:
    parameters = [_parameter(shape, dtype) for shape in shapes]
    optimizer(parameters, backend="triton", **options).step()


def _parameter(shape: tuple[int, ...], dtype: torch.dtype) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
    parameter.grad = torch.zeros_like(parameter)
    return parameter


def _thorn(dtype: torch.dtype, batched: bool) -> None:
    """Two of each matrix, as two parameters or as one, and what is beside them."""
    matrices = tuple((2, *shape) for shape in MATRICES) if batched else (*MATRICES, *MATRICES)
    kinds: dict[bool, Shapes] = {True: matrices, False: ((768,), (3072,), (16, 768))}
    groups = [
        {"params": [_parameter(shape, dtype) for shape in shapes], "orthogonalize": kind, "batched": batched and kind}
        for kind, shapes in kinds.items()
    ]
    trysquare.THORN(groups, backend="triton").step()


def _codes() -> None:
    from trysquare.kernels import blockwise8bit as kernels

    values, qmap = torch.zeros(64, blockwise8bit.BLOCK), blockwise8bit.dynamic_map(True, torch.device("cpu"))
    bounds = blockwise8bit.boundaries(qmap)
    kernels.dequantize(*kernels.quantize_signed(values, bounds), qmap)
    kernels.quantize_unsigned(values, bounds)


def _stablemax(dtype: torch.dtype, **options: Any) -> None:
    logits = torch.zeros(16, VOCABULARY, dtype=dtype, requires_grad=True)
    loss: Any = trysquare.stablemax_cross_entropy(logits, torch.zeros(16, dtype=torch.int64), **options)
    loss.backward()
