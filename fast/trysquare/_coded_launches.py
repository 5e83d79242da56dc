"""DolphinFlow8bit's parameters stepped by Triton kernels: all of one shape in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trysquare import _batches, _coded_state, _coded_windows
from trysquare._batches import Batch
from trysquare._coded_windows import CodedWindows
from trysquare._loss_aware import rate
from trysquare._windows import Span, Window, spans
from trysquare.ops import blockwise8bit
from trysquare.ops import dolphinflow8bit as ops

if TYPE_CHECKING:  # importing them takes Triton
    from trysquare.kernels import dolphinflow8bit as kernels


class CodedLaunches(CodedWindows):
    """The part of DolphinFlow8bit that launches kernels. They write to what is in place, and take no scratch."""

    def _launch_batch(self, batch: Batch, scale: Tensor | None, finite: Tensor | None) -> None:
        from trysquare.kernels import dolphinflow8bit as kernels

        first, group = batch.parameters[0], batch.group
        scale = None if scale is None else scale.to(first.device, non_blocking=True)
        finite = None if finite is None else finite.to(first.device, non_blocking=True)
        if not first.numel():
            return
        floats = rate(group), *(group[name] for name in ("weight_decay", "momentum", "eps", "beta2"))
        numbers = kernels.numbers_of(first.device, *floats)
        rule = kernels.Rule(_coded_windows.mode_of(group, first), group["ns_steps"], group["eps"])
        launch = self._launch_coded if _coded_state.is_coded(first) else self._launch_plain
        launch(batch, numbers, scale, finite, rule)

    def _together(self, batch: Batch, rule: kernels.Rule) -> int:
        """How many members one launch takes; the matrix mode has scratch for each."""
        first = batch.parameters[0]
        matrix = 8 * _batches.SCRATCH * first.numel()
        return max(1, self._workspace(first.device) // matrix) if rule.ortho_mode == "matrix" else len(batch.parameters)

    def _launch_plain(
        self, batch: Batch, numbers: Tensor, scale: Tensor | None, finite: Tensor | None, rule: kernels.Rule
    ) -> None:
        """Parameters whose moments are not coded."""
        from trysquare.kernels import dolphinflow8bit as kernels

        held = [batch.state[f"state{i}"] for i in _coded_windows.numbered(batch.group)]
        operands = [batch.gradients, batch.parameters, *held]
        workspace, split = self._workspace(numbers.device), _coded_windows.SPLITS[rule.ortho_mode]
        together = self._together(batch, rule)
        for part in _batches.contiguous(operands, workspace, split, together, known=batch.dense):
            gradients, parameters, *states = part.operands
            steps = [batch.state["step"][i] for i in part.members]
            bucket = kernels.Bucket(parameters, gradients, steps, [kernels.Moment(own) for own in states])
            kernels.step_(bucket, part.shape, numbers, scale, finite, rule)
            part.store()

    def _launch_coded(
        self, batch: Batch, numbers: Tensor, scale: Tensor | None, finite: Tensor | None, rule: kernels.Rule
    ) -> None:
        """Parameters whose moments are coded: together where they are contiguous, else each in windows."""
        from trysquare.kernels import dolphinflow8bit as kernels

        shape, count = _batches.rows_and_columns(batch.parameters[0].shape), self._together(batch, rule)
        dense, loose = (list(range(len(batch.parameters))), []) if batch.dense else _parted(batch)
        for start in range(0, len(dense), count):
            bucket = self._bucket(batch, dense[start : start + count])
            kernels.step_(bucket, shape, numbers, scale, finite, rule)
        for i in loose:
            self._launch_windows(self._bucket(batch, [i]), numbers, scale, finite, rule)

    def _bucket(self, batch: Batch, members: Sequence[int]) -> kernels.Bucket:
        from trysquare.kernels import dolphinflow8bit as kernels

        def chosen(name: str) -> list[Tensor]:
            return [batch.state[name][i] for i in members]

        moments = []
        for i in _coded_windows.numbered(batch.group):
            qmaps = chosen(f"qmap{i}")
            distinct = {id(qmap): self._boundaries(qmap) for qmap in {id(qmap): qmap for qmap in qmaps}.values()}
            bounds = [distinct[id(qmap)] for qmap in qmaps]
            moments.append(kernels.Moment(chosen(f"state{i}"), chosen(f"absmax{i}"), qmaps, bounds))
        parameters, gradients = ([tensors[i] for i in members] for tensors in (batch.parameters, batch.gradients))
        return kernels.Bucket(parameters, gradients, chosen("step"), moments)

    def _launch_windows(
        self, member: kernels.Bucket, numbers: Tensor, scale: Tensor | None, finite: Tensor | None, rule: kernels.Rule
    ) -> None:
        """One parameter, of which spans of whole blocks are copied."""
        from trysquare.kernels import dolphinflow8bit as kernels

        theta, gradient, given = member.parameters[0], member.gradients[0], None
        rows, columns = _batches.rows_and_columns(theta.shape)
        if rule.ortho_mode == "matrix":
            matrix = gradient.reshape(1, rows, columns)
            gradient = ops.orthogonalized(matrix, scale, rule.ns_steps, rule.eps, torch.float32).reshape(theta.shape)
            scale = None
        if rule.ortho_mode == "vector":
            parts = _batches.contiguous([[gradient], [theta]], self._workspace(theta.device), "rows", 1)
            found = [kernels.row_coefficients(p.operands[1], p.operands[0], p.shape, scale) for p in parts]
            given = kernels.Given(torch.cat(found, 1), columns)
        for span in spans(theta.numel(), self._window_elements(theta), blockwise8bit.BLOCK):
            windows, bucket = _window(member, gradient, span)
            own = None if given is None else given._replace(start=span.start)
            kernels.update_blocks_(bucket, (1, span.stop - span.start), numbers, scale, finite, False, own)
            for window in windows:
                window.store()


def _parted(batch: Batch) -> tuple[list[int], list[int]]:
    """The members that are contiguous, with all that belongs to them, and the others."""
    tensors = batch.parameters, batch.gradients, *batch.state.values()
    parts: tuple[list[int], list[int]] = [], []
    for i, own in enumerate(zip(*tensors, strict=True)):
        parts[not all(tensor.is_contiguous() for tensor in own)].append(i)
    return parts


def _window(member: kernels.Bucket, gradient: Tensor, span: Span) -> tuple[list[Window], kernels.Bucket]:
    """A span of a parameter, its gradient and its codes, contiguous; and what of it is written back."""
    size = blockwise8bit.BLOCK
    blocks = Span(span.start // size, -(-span.stop // size))
    theta = Window(member.parameters[0], span, size)
    codes = [Window(moment.states[0], span, size) for moment in member.moments]
    scales = [Window(moment.absmaxes[0], blocks, 1) for moment in member.moments]
    moments = [
        moment._replace(states=[own.values], absmaxes=[scale.values])
        for moment, own, scale in zip(member.moments, codes, scales, strict=True)
    ]
    parameters, gradients = [theta.values], [Window(gradient, span, size).values]
    return [theta, *codes, *scales], member._replace(parameters=parameters, gradients=gradients, moments=moments)
