"""Parameters of one shape are stepped together: which those are, and how a batch is cut to a bounded workspace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Split = Literal["whole", "rows", "elements", "flat"]
"""What an update needs to see at once: a whole parameter, its rows, or nothing but single elements.

Flat are single elements that are not cut: in one row, so that one compilation serves vectors and matrices."""

SCRATCH = 5
"""Scratch tensors of an eager update, an upper bound: clipped gradient, product, update, root, float32 parameter."""

STACKED = 4
"""Parameters are copied into one batch if at least so many fit into the workspace; larger ones are stepped in place."""

WORKSPACE_BYTES = {"cpu": 4 << 20, "cuda": 1 << 30}
"""On two cores with 1 MiB of second-level cache each (benchmarks/results), and on an H100: a step of THORN on the 196
matrices of Qwen3-1.7B took 110 ms with 256 MiB, 94 with 1 GiB and 91 with 4. Other devices: not measured."""

OTHER_WORKSPACE_BYTES = 256 << 20
SHARE = 32
"""A GPU gives one part in so many of its memory, at most."""


def default_workspace(device: torch.device) -> int:
    """What bounds the scratch of a step where nobody says; in a trace nothing is cut by it."""
    measured = WORKSPACE_BYTES.get(device.type, OTHER_WORKSPACE_BYTES)
    if device.type != "cuda" or torch.compiler.is_compiling():
        return measured
    return min(measured, torch.cuda.get_device_properties(device).total_memory // SHARE)


class Batch(NamedTuple):
    """The members of a bucket that have a gradient in this step; all lists are parallel."""

    group: dict[str, Any]
    parameters: list[Tensor]
    gradients: list[Tensor]
    state: dict[str, list[Tensor]]
    dense: bool
    """Whether all of these tensors are known to be contiguous; within a trace nobody asks."""


def batch(
    group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor], state: dict[str, list[Tensor]]
) -> Batch:
    """Members that step together."""
    if torch.compiler.is_compiling():
        return Batch(group, parameters, gradients, state, dense=False)
    tensors = chain(parameters, gradients, *state.values())
    return Batch(group, parameters, gradients, state, dense=all(tensor.is_contiguous() for tensor in tensors))


class Piece(NamedTuple):
    """What one call of an update gets: operands of shape (B, R, C), and where the written ones go if copied."""

    operands: list[Tensor]
    members: slice
    copies: list[tuple[list[Tensor], Tensor]]

    def snapshot(self, finite: Tensor | None) -> list[Tensor]:
        """Copies of what is about to be written, if the step may have to be taken back."""
        return [] if finite is None else [tensor.clone() for tensor in self.operands[1:]]

    def restore(self, before: list[Tensor], finite: Tensor | None) -> None:
        """Put the copies back where ``finite`` is false, without reading it."""
        if finite is not None:
            for tensor, old in zip(self.operands[1:], before, strict=True):
                tensor.copy_(torch.where(finite.to(tensor.device), tensor, old))

    def store(self) -> None:
        """Write back what was copied in."""
        for targets, batch in self.copies:
            torch._foreach_copy_(targets, [b.view(t.shape) for b, t in zip(batch.unbind(), targets, strict=True)])


def rows_and_columns(shape: torch.Size) -> tuple[int, int]:
    """(leading index, rest); one row for fewer than two dimensions."""
    if len(shape) < 2:
        return 1, shape.numel()
    return shape[0], shape.numel() // max(shape[0], 1)


def same_kind(parameter: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    """Parameters that agree in this are stepped together."""
    return parameter.shape, parameter.dtype, parameter.device


def pieces(
    operands: Sequence[list[Tensor]], workspace: int, split: Split, snapshots: int = 0, *, known: bool = False
) -> Iterator[Piece]:
    """Cut a batch so that the scratch of each call stays within ``workspace`` bytes, if the update can be split.

    Each list of ``operands`` holds one tensor a member: gradients first (only read), then everything that is written.
    ``snapshots`` counts the copies that the caller makes of each piece; ``known``: that all are contiguous.
    """
    count, shape = len(operands[0]), operands[0][0].shape
    sizes = [operand[0].element_size() for operand in operands]
    element = max(4, *sizes) * (SCRATCH + snapshots)
    copied = element + sum(sizes)
    if count == 1 or STACKED * copied * shape.numel() > workspace or torch.compiler.is_compiling():
        for member in range(count):
            tensors = [operand[member] for operand in operands]
            dense = known or all(map(_in_place, tensors))
            if dense and split in {"whole", "flat"} and not torch.compiler.is_compiling():
                rows, columns = (1, shape.numel()) if split == "flat" else rows_and_columns(shape)
                yield Piece([tensor.view(1, rows, columns) for tensor in tensors], slice(member, member + 1), [])
                continue
            yield from _blocks(tensors, member, workspace // (element if dense else copied), split, dense)
        return
    together = workspace // (copied * shape.numel())
    for start in range(0, count, together):
        members = slice(start, min(start + together, count))
        yield _stack([operand[members] for operand in operands], members, split)


class Members(NamedTuple):
    """What one launch gets: parallel lists of contiguous tensors, of some members or of a piece of one, and which."""

    operands: list[list[Tensor]]
    members: list[int]
    shape: tuple[int, int]
    copies: list[tuple[Tensor, Tensor]]
    piece: Piece | None

    def store(self) -> None:
        """Write back what was copied in."""
        for target, copy in self.copies:
            target.copy_(copy)
        if self.piece is not None:
            self.piece.store()


def contiguous(
    operands: Sequence[list[Tensor]], workspace: int, split: Split, most: int, *, known: bool = False
) -> Iterator[Members]:
    """A batch as launches take it: ``most`` contiguous members at once; of others copies, cut to the workspace.

    ``known``: that all are contiguous.
    """
    dense = [known or all(operand[i].is_contiguous() for operand in operands) for i in range(len(operands[0]))]
    chosen = [i for i, is_dense in enumerate(dense) if is_dense]
    for start in range(0, len(chosen), most):
        part = chosen[start : start + most]
        own = [[operand[i] for i in part] for operand in operands]
        yield Members(own, part, rows_and_columns(own[0][0].shape), [], None)
    for i, is_dense in enumerate(dense):
        for piece in () if is_dense else pieces([[operand[i]] for operand in operands], workspace, split):
            yield _copied(piece, i)


def _copied(piece: Piece, member: int) -> Members:
    views = [operand[0] for operand in piece.operands]
    copies = [view.contiguous() for view in views]
    written = [(old, new) for old, new in zip(views[1:], copies[1:], strict=True) if old is not new]
    rows, columns = views[0].shape
    return Members([[copy] for copy in copies], [member], (rows, columns), written, piece)


def together(pieces: Iterable[Piece], most: int) -> Iterator[list[Piece]]:
    """Pieces that one call may take: views of parameters, up to ``most``; a copy is by itself, to be gone after it."""
    views: list[Piece] = []
    for piece in pieces:
        if piece.copies or len(views) == most:
            if views:
                yield views
            views = []
        if piece.copies:
            yield [piece]
        else:
            views.append(piece)
    if views:
        yield views


def _stack(operands: list[list[Tensor]], members: slice, split: Split) -> Piece:
    shape = operands[0][0].shape
    rows, columns = (1, shape.numel()) if split == "flat" else rows_and_columns(shape)
    batches = [torch.stack(operand).reshape(-1, rows, columns).contiguous() for operand in operands]
    return Piece(batches, members, list(zip(operands[1:], batches[1:], strict=True)))


def _blocks(tensors: list[Tensor], member: int, elements: int, split: Split, dense: bool) -> Iterator[Piece]:
    """One parameter, in blocks of its leading index; flattened first where single elements are enough."""
    if split in {"elements", "flat"} and dense:
        tensors = [tensor.view(-1) for tensor in tensors]
    rows, columns = rows_and_columns(tensors[0].shape)
    length, width = (columns, 1) if tensors[0].ndim < 2 else (rows, columns)
    whole = split in {"whole", "flat"} or tensors[0].ndim == 0 or torch.compiler.is_compiling()
    block = length if whole else max(1, elements // width)
    for start in range(0, length, block):
        cut = tensors if block >= length else [tensor[start : start + block] for tensor in tensors]
        yield _view(cut, member, columns if tensors[0].ndim > 1 else cut[0].numel())


def _view(tensors: list[Tensor], member: int, columns: int) -> Piece:
    """Operands of shape (1, R, C): views where the memory allows, else copies that are written back."""
    batches = [tensor.reshape(1, -1, columns) for tensor in tensors]
    if torch.compiler.is_compiling():
        batches[1:] = [b if _in_place(t) else b.clone() for t, b in zip(tensors[1:], batches[1:], strict=True)]
    copies = [([t], b) for t, b in zip(tensors[1:], batches[1:], strict=True) if not _in_place(t)]
    return Piece(batches, slice(member, member + 1), copies)


def _in_place(tensor: Tensor) -> bool:
    """Whether an operand may be a view of what is written.

    In a trace not with more than two dimensions: what is done in place to a view ends there as a copy in loops of
    another shape, and torch 2.11's inductor for a CPU can put that before the last read of the old value
    (pytorch/pytorch#177631). A copy costs nothing there: the trace has no in-place operations but the last.
    """
    return tensor.is_contiguous() and not (tensor.ndim > 2 and torch.compiler.is_compiling())


def advance(steps: list[Tensor], finite: Tensor | None) -> None:
    """t ← t + 1, or t + 0 in a step that is passed over.

    As one list: in a compiled function torch 2.13 loses what is done in place to a single 0-dim float64 CPU tensor.
    """
    torch._foreach_add_(steps, 1 if finite is None else [finite.to(step) for step in steps])
