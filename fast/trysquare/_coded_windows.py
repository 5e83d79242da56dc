"""Parameters whose moments are coded, stepped in windows of their blocks: what DolphinFlow8bit needs of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from trysquare import _backend, _batches, _bitsandbytes
from trysquare._batches import Batch
from trysquare._loss_aware import LossAware, rate
from trysquare._optimizer import Group
from trysquare._windows import Span, Window, spans, spread
from trysquare.ops import blockwise8bit, moments, projection
from trysquare.ops import dolphinflow as projected
from trysquare.ops import dolphinflow8bit as ops

SCRATCH = 12
"""Float32 tensors that an eager update of coded moments holds at once, an upper bound (a compiled one: four)."""

SNAPSHOT_BYTES = 8
"""What a copy of parameter and codes takes for an element, if a step may have to be taken back."""

ZEROS = (blockwise8bit.SIGNED_ZERO, blockwise8bit.UNSIGNED_ZERO)
"""The code of 0 of each moment, which fills up a block that ends early."""

SPLITS: dict[str | None, _batches.Split] = {"matrix": "whole", "vector": "rows", None: "elements"}
"""How parameters whose moments are not coded may be cut in each mode."""


class Cut(NamedTuple):
    """What is the same for all windows of a parameter."""

    scale: Tensor | None
    coefficient: Tensor | None
    corrections: tuple[Tensor | None, Tensor | None]
    numbers: list[Any]
    finite: Tensor | None


class CodedWindows(LossAware):
    """The part of DolphinFlow8bit that steps coded parameters, and finds the direction of all."""

    def _direction(
        self, group: Group, mode: str | None, theta: Tensor, gradient: Tensor, scale: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradient, clipping factor and row coefficients of a batch (B, R, C) as an update takes them."""
        chosen = self._chosen(theta.device)
        if mode == "matrix":
            arguments = gradient, scale, group["ns_steps"], *_backend.scalars(chosen, [group["eps"]], dtype)
            return _backend.run(chosen, ops.orthogonalized, *arguments, dtype), None, None
        if mode == "vector":
            arguments = theta, gradient, scale, dtype
            return gradient, scale, _backend.run(chosen, ops.row_coefficient, *arguments)
        return gradient, scale, None

    def _move_coded(self, batch: Batch, member: int, scale: Tensor | None, finite: Tensor | None) -> None:
        """One parameter, in windows of its blocks."""
        group, theta, gradient = batch.group, batch.parameters[member], batch.gradients[member]
        mode, coefficient = mode_of(group, theta), None
        if mode == "matrix":
            matrix = gradient.reshape(1, *_batches.rows_and_columns(gradient.shape))
            gradient, scale, _ = self._direction(group, mode, theta, matrix, scale, torch.float32)
            gradient = gradient.reshape(theta.shape)
        elif mode == "vector":
            coefficient = self._row_coefficients(group, theta, gradient, scale)
        corrections = corrections_of(group, batch.state["step"][member].view(1), torch.float32)
        cut = Cut(scale, coefficient, _flat(corrections), self._numbers(group, torch.float32), finite)
        held = [(batch.state[f"state{i}"][member], batch.state[f"absmax{i}"][member]) for i in numbered(group)]
        maps = [(qmap, self._boundaries(qmap)) for qmap in (batch.state[f"qmap{i}"][member] for i in numbered(group))]
        for span in spans(theta.numel(), self._window_elements(theta), blockwise8bit.BLOCK):
            self._move_window(theta, gradient, held, maps, span, cut)

    def _row_coefficients(self, group: Group, theta: Tensor, gradient: Tensor, scale: Tensor | None) -> Tensor:
        """How much of every row of θ the clipped gradient holds, shape (R,)."""
        whole = self._chosen(theta.device) == "compiled" or torch.compiler.is_compiling()  # needs no scratch
        workspace, columns = self._workspace(theta.device), _batches.rows_and_columns(theta.shape)[1]
        most = workspace // (4 * _batches.SCRATCH)
        if columns > most and not whole:
            rows = zip(theta.unbind(), gradient.unbind(), strict=True)
            return torch.stack([self._coefficient_in_parts(*row, scale, max(1, most)) for row in rows])
        found = []
        for piece in _batches.pieces([[gradient], [theta]], workspace, "whole" if whole else "rows"):
            part, weights = piece.operands
            found.append(cast("Tensor", self._direction(group, "vector", weights, part, scale, torch.float32)[2]))
        return torch.cat([coefficient.reshape(-1) for coefficient in found])

    def _coefficient_in_parts(self, w: Tensor, gradient: Tensor, scale: Tensor | None, most: int) -> Tensor:
        """That of a row which alone is larger than the workspace."""
        products = []
        for span in spans(w.numel(), most, 1):
            part, weights = (Window(x, span, 1).values for x in (gradient, w))
            arguments = weights, projected.clipped(part, scale, torch.float32)
            products.append(_backend.run(self._chosen(w.device), ops.products, *arguments))
        return projection.coefficient(*torch.stack(products).sum(0))

    def _sum_of_squares(self, gradient: Tensor) -> Tensor:
        """Of a gradient that is not contiguous row by row, for as a whole it would be copied."""
        if gradient.is_contiguous() or gradient.ndim < 2 or not gradient.numel():
            return super()._sum_of_squares(gradient)
        columns = _batches.rows_and_columns(gradient.shape)[1]
        rows = max(1, self._workspace(gradient.device) // (16 * columns))
        parts = torch.split(gradient, rows)
        return torch.stack([super(CodedWindows, self)._sum_of_squares(part) for part in parts]).sum()

    def _move_window(
        self,
        theta: Tensor,
        gradient: Tensor,
        held: Sequence[tuple[Tensor, Tensor]],
        maps: Sequence[tuple[Tensor, Tensor]],
        span: Span,
        cut: Cut,
    ) -> None:
        """A span of whole blocks: everything of it as rows of 256, then one call of the update."""
        size = blockwise8bit.BLOCK
        blocks = Span(span.start // size, -(-span.stop // size))
        written = [Window(theta, span, size)]
        for (codes, absmax), zero in zip(held, ZEROS[: len(held)], strict=True):
            written += [Window(codes, span, size, zero), Window(absmax, blocks, 1)]
        values = [window.values for window in written]
        before = [] if cut.finite is None else [value.clone() for value in values]
        first = *values[1:3], *maps[0]
        second = (*values[3:5], *maps[1]) if len(maps) > 1 else (None,) * 4
        coefficient = None if cut.coefficient is None else _for_blocks(cut.coefficient, theta, span)
        arguments = Window(gradient, span, size).values, *first, *second, *cut.corrections, cut.scale, coefficient
        chosen = self._chosen(theta.device)
        update = _bitsandbytes.update_coded_ if chosen == "bitsandbytes" else ops.update_coded_
        _backend.run(chosen, update, values[0], *arguments, *cut.numbers)
        for value, old in zip(values[: len(before)], before, strict=True):  # torch 2.6 traces no other zip
            value.copy_(torch.where(cast("Tensor", cut.finite).to(old.device), value, old))
        for window in written:
            window.store()

    def _window_elements(self, theta: Tensor) -> int:
        """How many elements fit into the workspace."""
        scratch = 4 if self._chosen(theta.device) == "compiled" else SCRATCH
        copied = 0 if self.nonfinite != "skip" else SNAPSHOT_BYTES
        return self._workspace(theta.device) // (4 * scratch + copied)

    def _boundaries(self, qmap: Tensor) -> Tensor:
        """Those of a map, kept as long as it does not change."""
        if torch.compiler.is_compiling():
            return blockwise8bit.boundaries(qmap)
        known: dict[int, tuple[Tensor, int, Tensor]] = self.__dict__.setdefault("_known_boundaries", {})
        found = known.get(id(qmap))
        if found is None or found[0] is not qmap or found[1] != qmap._version:  # noqa: SLF001 (torch's own count)
            found = known[id(qmap)] = qmap, qmap._version, blockwise8bit.boundaries(qmap)  # noqa: SLF001
        return found[2]

    def _numbers(self, group: Group, dtype: torch.dtype) -> list[Any]:
        """As the updates take them: η, λ, β₁ and what the gradient adds to m, β₂ and what its square adds to v, ε."""
        beta1, beta2 = group["momentum"], group["beta2"]
        betas = [beta1, 1 - beta1 if group["adaptive_lr"] else 1.0, beta2, 1 - beta2]
        chosen = self._chosen(group["params"][0].device)
        return _backend.scalars(chosen, [rate(group), group["weight_decay"], *betas, group["eps"]], dtype)


def mode_of(group: Group, parameter: Tensor) -> str | None:
    return group["ortho_mode"] if parameter.ndim >= 2 else None


def moments_of(group: Group) -> int:
    """How many moments there are."""
    return 2 if group["adaptive_lr"] else 1


def numbered(group: Group) -> range:
    return range(1, moments_of(group) + 1)


def corrections_of(group: Group, steps: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """1/(1 − β₁ᵗ) and 1/√(1 − β₂ᵗ), each (B, 1, 1), from t of shape (B,)."""
    if not group["adaptive_lr"]:
        return None, None
    first = (1 / (1 - group["momentum"] ** steps)).to(dtype).view(-1, 1, 1)
    return first, moments.correction(steps, group["beta2"], dtype)


def _flat(corrections: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """Of one parameter, for windows of blocks."""
    first, second = corrections
    return None if first is None else first.view(1, 1), None if second is None else second.view(1, 1)


def _for_blocks(coefficient: Tensor, theta: Tensor, span: Span) -> Tensor:
    """The coefficient of every block where rows consist of whole blocks, else that of every element."""
    columns, size = _batches.rows_and_columns(theta.shape)[1], blockwise8bit.BLOCK
    if columns % size == 0 and (span.stop - span.start) // size > 1:
        return spread(coefficient, columns // size, Span(span.start // size, span.stop // size)).unsqueeze(-1)
    flat = spread(coefficient, columns, span).contiguous()
    return Window(flat, Span(0, flat.numel()), size).values
