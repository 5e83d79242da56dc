"""The norm of all gradients: what clipping divides by, and what `nonfinite` looks at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from trysquare import _backend, _batches, _parameters
from trysquare._batches import Batch
from trysquare.ops import clipping

LARGE_SUM = 1 << 14
"""Elements from which a sum of squares is compiled, or taken in parts: calls that fewer elements do not repay."""

SMALL_SUM = 1 << 12
"""Elements below which several gradients are joined first: what a call costs is more than to read them twice."""


class Norm(NamedTuple):
    """‖all gradients‖₂ (float64 where there is), the clipping factor (None: 1), and whether it is finite; all 0-dim."""

    value: Tensor
    scale: Tensor | None
    finite: Tensor


class Norms(Optimizer):
    """The part of an optimizer that measures gradients, and the policies for those that are not finite."""

    nonfinite: str
    backend: str
    workspace_bytes: int | None
    _skipped: Tensor

    def _chosen(self, device: torch.device) -> str:
        """The backend that runs on a device."""
        return _backend.choose(self.backend, device)

    def _launches(self, batch: Batch) -> bool:
        """Whether a batch goes to Triton kernels; within a trace there are none."""
        return self._chosen(batch.parameters[0].device) == "triton" and not torch.compiler.is_compiling()

    def _count(self, batches: Sequence[Batch], finite: Tensor | None) -> None:
        """t ← t + 1 of every member that kernels are going to step: one launch a device."""
        steps: dict[torch.device, list[Tensor]] = {}
        for batch in batches:
            if self._launches(batch):
                steps.setdefault(batch.parameters[0].device, []).extend(batch.state["step"])
        for device, own in steps.items():
            from trysquare.kernels import clipping as kernels

            kernels.advance(own, None if finite is None else finite.to(device, non_blocking=True))

    def _workspace(self, device: torch.device) -> int:
        return self.workspace_bytes or _batches.default_workspace(device)

    def _norm(self, batches: Sequence[Batch], max_norm: float | None) -> Norm:
        """That of all gradients of these batches."""
        if all(map(self._launches, batches)) and len({batch.parameters[0].device for batch in batches}) == 1:
            from trysquare.kernels import clipping as kernels

            sums = [kernels.sums_of_squares(part) for b in batches if b.gradients[0].numel() for part in self._dense(b)]
            sums = sums or [torch.zeros(1, dtype=torch.float64, device=batches[0].gradients[0].device)]
            value, scale, finite = kernels.finish(sums, max_norm)
            return Norm(value, scale if max_norm else None, finite)
        return judged(self._length([gradient for batch in batches for gradient in batch.gradients]), max_norm)

    def _dense(self, batch: Batch) -> Iterator[Sequence[Tensor]]:
        """The gradients of a batch as lists of contiguous tensors of one shape."""
        most = len(batch.gradients)
        workspace = self._workspace(batch.gradients[0].device)
        parts = _batches.contiguous([batch.gradients], workspace, "rows", most, known=batch.dense)
        return (part.operands[0] for part in parts)

    def _length(self, gradients: Sequence[Tensor]) -> Tensor:
        return clipping.total_norm(self._sums_of_squares(gradients))

    def _sums_of_squares(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Of each large gradient, and of small ones together; for each in a trace, where calls cost nothing."""
        if torch.compiler.is_compiling():
            return [clipping.sum_of_squares(gradient.flatten()) for gradient in gradients]
        sums = [self._sum_of_squares(gradient) for gradient in gradients if gradient.numel() >= SMALL_SUM]
        small: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for gradient in gradients:
            if gradient.numel() < SMALL_SUM:
                small.setdefault((gradient.dtype, gradient.device), []).append(gradient)
        for (_, device), own in small.items():
            elements = self._workspace(device) // 16
            most = max(1, elements // max(1, *(gradient.numel() for gradient in own)))
            sums += [
                clipping.chunked_sum_of_squares(torch.cat([g.flatten() for g in own[start : start + most]]), elements)
                for start in range(0, len(own), most)
            ]
        return sums

    def _sum_of_squares(self, gradient: Tensor) -> Tensor:
        chosen, large = self._chosen(gradient.device), gradient.numel() >= LARGE_SUM
        if large and gradient.device.type == "cpu" and gradient.dtype == torch.float32:
            total = clipping.summed_in_parts(gradient)
            if total.isfinite():  # nothing waits for a device here
                return total
        if large and chosen == "compiled":
            return cast(Tensor, _backend.run(chosen, clipping.sum_of_squares, gradient.flatten()))
        return clipping.chunked_sum_of_squares(gradient, self._workspace(gradient.device) // 16)

    def _finite(self, norm: Norm | None) -> Tensor | None:
        """Under `nonfinite="skip"`: whether to move at all, as a 0-dim tensor; steps passed over are counted."""
        if self.nonfinite != "skip" or norm is None:
            return None
        if self._skipped.device != norm.finite.device:
            self._skipped = self._skipped.to(norm.finite.device)
        if not _backend.rehearsing:
            self._skipped.add_(~norm.finite)
        return norm.finite

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps `nonfinite="skip"` passed over, a 0-dim tensor on the device; not part of a checkpoint."""
        return self._skipped.clone()

    def _refuse_recording(self, recorded: bool) -> None:
        """What is compiled or captured into a graph runs without Python: nothing is there to raise."""
        if recorded and self.nonfinite == "raise":
            raise RuntimeError(
                "nonfinite='raise' reads the gradients and cannot be compiled or captured: use 'skip' or 'propagate'"
            )

    def _refuse_nonfinite(self) -> None:
        """`nonfinite="raise"`: read the norm of the gradients, which waits for the device."""
        if self.nonfinite != "raise":
            return
        given: list[tuple[str, Any]] = [
            (_parameters.name_of(group, index, position), parameter.grad)
            for index, group in enumerate(self.param_groups)
            for position, parameter in enumerate(group["params"])
            if parameter.grad is not None
        ]
        if not given or bool(self._length([gradient for _, gradient in given]).isfinite()):
            return
        bad = [name for name, gradient in given if not bool(gradient.isfinite().all())]
        what = f"the gradient of {bad[0]} is not finite" if bad else "the norm of all gradients is not finite"
        raise RuntimeError(
            f"{what} and nonfinite='raise'; nothing was changed. Use nonfinite='skip' to pass over such steps"
        )


def judged(value: Tensor, max_norm: float | None) -> Norm:
    """What follows from the length of all gradients."""
    return Norm(value, clipping.clip_scale(value, max_norm) if max_norm else None, value.isfinite())
