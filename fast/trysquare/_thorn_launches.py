"""How a batch of THORN goes to Triton kernels: which launcher, on which tensors, with which numbers.

Every parameter, state and gradient is written by kernels alone, so that a rehearsal changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trysquare import _batches
from trysquare._batches import Batch, Members
from trysquare.kernels import schedule_free
from trysquare.kernels import thorn as kernels
from trysquare.kernels.polar import Products
from trysquare.ops import polar
from trysquare.ops import thorn as ops

# Matrices


class Bucket(NamedTuple):
    """What one launch of matrices gets, and what is written back after it."""

    matrices: kernels.Matrices
    part: Members
    rows: list[tuple[Tensor, Tensor]]

    def store(self) -> None:
        """Write back what was copied in."""
        self.part.store()
        for row_state, copy in self.rows:
            row_state.copy_(copy)


def step_matrices(
    batch: Batch, shape: tuple[int, ...], rule: ops.Rule, finite: Tensor | None, workspace: int
) -> None:
    """The whole step of an orthogonalized batch; ``shape`` is that of its matrices, (…, R, C)."""
    group, first = batch.group, batch.parameters[0]
    *batched, rows, columns = shape
    own = kernels.Shape(math.prod(batched), rows, columns)
    scale = ops.scale(rows, columns, group["target_rms"])
    numbers = kernels.numbers_of(first.device, **_named(group), scale=scale, safety_factor=rule.safety_factor)
    finite = _on(batch, finite)
    products = Products(min(rows, columns), rule.matmul_dtype, first.device)
    scratch = own.each * polar.scratch(rule.form, rows, columns) * rule.matmul_dtype.itemsize
    most = products.at_once(len(batch.parameters), max(1, workspace // max(1, scratch)), own.each)
    for bucket in _matrices(batch, workspace, most):
        kernels.step_(bucket.matrices, own, numbers, finite, rule, products, rectifies=group["rectify"])
        bucket.store()


def accumulate(batch: Batch, workspace: int) -> None:
    """m ← β₁m + g, of gradient release between two updates."""
    own = kernels.Shape(1, 1, batch.parameters[0].numel())
    numbers = kernels.numbers_of(batch.parameters[0].device, **_named(batch.group))
    for bucket in _matrices(batch, workspace, len(batch.parameters)):
        kernels.accumulate_(bucket.matrices, own, numbers, None)
        bucket.store()


def _matrices(batch: Batch, workspace: int, most: int) -> Iterator[Bucket]:
    operands = [batch.gradients, batch.parameters, batch.state["momentum_buffer"]]
    row_states = batch.state.get("row_exp_avg_sq")
    for part in _batches.contiguous(operands, workspace, "whole", most, known=batch.dense):
        gradients, parameters, momentum_buffers = part.operands
        steps = [batch.state["step"][i] for i in part.members]
        given = None if row_states is None else [row_states[i] for i in part.members]
        dense = None if given is None else [rows.contiguous() for rows in given]
        copied = [(old, new) for old, new in zip(given or (), dense or (), strict=True) if old is not new]
        yield Bucket(kernels.Matrices(parameters, gradients, momentum_buffers, dense, steps), part, copied)


# Everything else


def step_others(batch: Batch, phase: schedule_free.Phase, finite: Tensor | None, workspace: int) -> None:
    """A step of schedule-free Adam or of Adam, or a phase of it."""
    group, state = batch.group, batch.state
    numbers = kernels.numbers_of(batch.parameters[0].device, **_named(group))
    finite = _on(batch, finite)
    counters = schedule_free.Counters(state["step"], state.get("lr_max"), state.get("weight_sum"))
    moves = phase != "collect"
    found = schedule_free.weigh_(counters, numbers, finite, moves=moves, rectifies=group["rectify"])
    names = [name for name in ("z", "exp_avg", "exp_avg_sq", "y", "x", "update_sum") if name in state]
    operands = [batch.gradients, batch.parameters, *(state[name] for name in names)]
    most = len(batch.parameters)
    for part in _batches.contiguous(operands, workspace, "elements", most, known=batch.dense):
        gradients, parameters, *rest = part.operands
        held = dict(zip(names, rest, strict=True))
        optional = (held.get(name) for name in ("z", "exp_avg", "y", "x", "update_sum"))
        bucket = schedule_free.Bucket(parameters, gradients, held["exp_avg_sq"], *optional)
        schedule_free.step_(bucket, _of(found, part.members), numbers, finite, phase)
        part.store()


def _of(found: Tensor, members: list[int]) -> Tensor:
    """The numbers of some members; an index of a device's tensor by a list would wait for the device."""
    if len(members) == found.shape[1]:
        return found
    return torch.stack([found[:, member] for member in members], dim=1)


def _named(group: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a group, as `numbers_of` calls them."""
    return {name: group[name] for name in ("lr", "betas", "weight_decay", "eps", "update_rate")}


def _on(batch: Batch, finite: Tensor | None) -> Tensor | None:
    return None if finite is None else finite.to(batch.parameters[0].device, non_blocking=True)
