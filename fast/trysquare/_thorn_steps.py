"""How THORN moves a batch: which op, on which operands, with which numbers, for each kind of group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from trysquare import _backend, _batches
from trysquare._averaging import Averaging
from trysquare._batches import Batch, Piece
from trysquare._optimizer import Group
from trysquare._parameters import arithmetic
from trysquare.ops import _scratch, moments, polar, polar_express, rectification, schedule_free
from trysquare.ops import thorn as ops


class Steps(Averaging):
    """The part of THORN that computes."""

    def _move(self, batches: Sequence[Batch]) -> None:
        finite = self._finite(self._norm(batches, None)) if self.nonfinite == "skip" else None
        self._advance(batches, finite)
        if torch.compiler.is_compiling():
            self._move_each(batches, finite)
            return
        with _scratch.kept():
            self._move_each([batch for batch in batches if batch.group["orthogonalize"]], finite)
        self._move_each([batch for batch in batches if not batch.group["orthogonalize"]], finite)

    def _move_each(self, batches: Sequence[Batch], finite: Tensor | None) -> None:
        for batch in batches:
            if batch.parameters[0].numel():
                self._move_batch(batch, finite)
            if batch.group["none_grad"] and not _backend.rehearsing:
                for parameter in batch.parameters:
                    parameter.grad = None

    def _advance(self, batches: Sequence[Batch], finite: Tensor | None) -> None:
        self._count(batches, finite)
        for batch in batches:
            if not self._launches(batch):
                _batches.advance(batch.state["step"], finite)

    def _launch_batch(self, batch: Batch, finite: Tensor | None) -> None:
        from trysquare import _thorn_launches

        group, first = batch.group, batch.parameters[0]
        workspace = self._workspace(first.device)
        if group["orthogonalize"]:
            shape = matrix_shape(group, first)
            _thorn_launches.step_matrices(batch, shape, rule_of(group, first), finite, workspace)
        else:
            _thorn_launches.step_others(batch, "step", finite, workspace)

    def _move_batch(self, batch: Batch, finite: Tensor | None) -> None:
        if self._launches(batch):
            self._launch_batch(batch, finite)
        elif batch.group["orthogonalize"]:
            self._orthogonalized(batch, finite)
        elif batch.group["schedule_free"]:
            self._schedule_free_adam(batch, finite)
        else:
            self._adam(batch, finite)

    def _orthogonalized(self, batch: Batch, finite: Tensor | None) -> None:
        """The products between the two updates are never compiled: there is nothing in them to fuse."""
        group, first = batch.group, batch.parameters[0]
        rule, shape = rule_of(group, first), matrix_shape(group, first)
        steps = torch.stack(batch.state["step"])
        steps = steps if group["update_rate"] == 1 else (steps / group["update_rate"]).floor()
        rates = self._rates(group, steps) * ops.scale(shape[-2], shape[-1], group["target_rms"])
        row_states = batch.state.get("row_exp_avg_sq")
        momentum, weight_decay, eps, beta2 = self._scalars(group, first)
        for piece in self._pieces(batch, ("momentum_buffer",), "whole"):
            before = piece.snapshot(finite)
            rows = None if row_states is None else _Rows(row_states[piece.members], shape, finite)
            gradient, theta, momentum_buffer = (operand.view(-1, *shape[-2:]) for operand in piece.operands)
            each = theta.shape[0] // len(batch.parameters[piece.members])
            rate = per_slice(rates[piece.members].repeat_interleave(each), momentum_buffer)
            x = polar.polar_factor(
                self._run(ops.prepare_, momentum_buffer, gradient, momentum),
                *(rule.coefficients, rule.safety_factor, group["eps"], rule.matmul_dtype, rule.form),
            )
            stacked = None if rows is None else rows.stacked
            self._run(ops.apply_, theta, x, stacked, rate, weight_decay, eps, beta2)
            del x
            piece.restore(before, finite)
            piece.store()
            if rows is not None:
                rows.store()

    def _schedule_free_adam(self, batch: Batch, finite: Tensor | None) -> None:
        group, first = batch.group, batch.parameters[0]
        rates = self._weighed(batch, finite)
        corrections = self._corrections(batch)
        _, weight_decay, eps, beta2 = self._scalars(group, first)
        optional = [name for name in ("y", "x") if name in batch.state]
        for piece in self._pieces(batch, ("z", "exp_avg_sq", *optional), "elements"):
            before = piece.snapshot(finite)
            gradient, theta, z, exp_avg_sq, *rest = piece.operands
            held = dict(zip(optional, rest, strict=True))
            own = [per_slice(rate[piece.members], z) for rate in rates]
            operands = theta, gradient, z, exp_avg_sq, held.get("y"), held.get("x")
            correction = per_slice(corrections[piece.members], z)
            self._run(ops.schedule_free_, *operands, correction, *own, weight_decay, eps, beta2)
            piece.restore(before, finite)
            piece.store()

    def _adam(self, batch: Batch, finite: Tensor | None) -> None:
        group, first = batch.group, batch.parameters[0]
        rates, means = self._rates(group, torch.stack(batch.state["step"])), self._mean_corrections(batch)
        corrections = self._corrections(batch)
        _, weight_decay, eps, beta2 = self._scalars(group, first)
        (beta1,) = _backend.scalars(self._chosen(first.device), [group["betas"][0]], torch.float64)
        for piece in self._pieces(batch, ("exp_avg", "exp_avg_sq"), "elements"):
            before = piece.snapshot(finite)
            gradient, theta, exp_avg, exp_avg_sq = piece.operands
            own = (per_slice(rate[piece.members], exp_avg) for rate in (means, corrections, rates))
            self._run(ops.adam_, theta, gradient, exp_avg, exp_avg_sq, *own, weight_decay, eps, beta1, beta2)
            piece.restore(before, finite)
            piece.store()

    # Numbers of a step

    def _rates(self, group: Group, steps: Tensor) -> Tensor:
        """η, times r where `rectify` says so, of every member of a batch."""
        ones = torch.ones_like(steps)
        rectified = rectification.rectification(steps, group["betas"][1]) if group["rectify"] else ones
        rates: Tensor = rectified * group["lr"]
        return rates

    def _weighed(self, batch: Batch, finite: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Rate, share in the mean and pull of every member; the counters of the mean are brought up to date."""
        group, state = batch.group, batch.state
        lr_max, weight_sum = torch.stack(state["lr_max"]), torch.stack(state["weight_sum"])
        rate = self._rates(group, torch.stack(state["step"]))
        highest, total, share = schedule_free.weigh(rate, lr_max, weight_sum)
        if finite is not None:
            moves = finite.to(rate.device)
            highest, total = torch.where(moves, highest, lr_max), torch.where(moves, total, weight_sum)
        torch._foreach_copy_([*state["lr_max"], *state["weight_sum"]], [*highest.unbind(), *total.unbind()])
        return rate, share, schedule_free.pull(rate, share, group["betas"][0])

    def _corrections(self, batch: Batch) -> Tensor:
        """1/√(1 − β₂ᵗ) of every member."""
        steps = torch.stack(batch.state["step"])
        return moments.correction(steps, batch.group["betas"][1], steps.dtype)

    def _mean_corrections(self, batch: Batch) -> Tensor:
        """1/(1 − β₁ᵗ) of every member."""
        steps = torch.stack(batch.state["step"])
        return torch.reciprocal(1 - batch.group["betas"][0] ** steps)

    def _scalars(self, group: Group, parameter: Tensor) -> list[Any]:
        """β₁, λ and ε in the dtype of the arithmetic, and β₂, of which 1 − β₂ needs the digits."""
        numbers = [group["betas"][0], group["weight_decay"], group["eps"]]
        chosen = self._chosen(parameter.device)
        narrow = _backend.scalars(chosen, numbers, arithmetic(parameter))
        return [*narrow, *_backend.scalars(chosen, [group["betas"][1]], torch.float64)]

    def _pieces(self, batch: Batch, names: Sequence[str], split: _batches.Split) -> Iterable[Piece]:
        written = [batch.parameters, *(batch.state[name] for name in names)]
        snapshots = len(written) if self.nonfinite == "skip" else 0
        device = batch.parameters[0].device
        if self._chosen(device) == "compiled" and split == "elements":
            split = "flat"  # a compiled update needs no scratch
        operands, workspace = [batch.gradients, *written], self._workspace(device)
        return _batches.pieces(operands, workspace, split, snapshots, known=batch.dense)

    def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        return _backend.run(self._chosen(args[0].device), function, *args)


class _Rows:
    """The row states of the members of a piece as one tensor, (B, R, 1), written back like a piece."""

    def __init__(self, members: list[Tensor], shape: tuple[int, ...], finite: Tensor | None) -> None:
        self.members, self.finite = members, finite
        self.copied = len(members) > 1 or finite is not None or not members[0].is_contiguous()
        stacked = torch.stack(members) if self.copied else members[0].unsqueeze(0)
        self.stacked = stacked.view(-1, shape[-2], 1)

    def store(self) -> None:
        if not self.copied:
            return
        new = [rows.view(old.shape) for rows, old in zip(self._parted(), self.members, strict=True)]
        if self.finite is not None:
            finite = self.finite.to(self.stacked.device)
            new = [torch.where(finite, rows, old) for rows, old in zip(new, self.members, strict=True)]
        torch._foreach_copy_(self.members, new)

    def _parted(self) -> tuple[Tensor, ...]:
        return self.stacked.view(len(self.members), -1).unbind()


def matrix_shape(group: Group, parameter: Tensor) -> tuple[int, ...]:
    """(R, C) of the flattened parameter, or (…, R, C) of a batched one."""
    return tuple(parameter.shape) if group["batched"] else _batches.rows_and_columns(parameter.shape)


def rule_of(group: Group, parameter: Tensor) -> ops.Rule:
    """Coefficients, and the form and precision of products that suit shape and device."""
    rows, columns = matrix_shape(group, parameter)[-2:]
    given = group["coefficients"]
    if given is None:
        table = _solved(group["iters"], group["lower_bound"], group["safety_factor"], group["cushion"])
    else:
        table = tuple((float(a), float(b), float(c)) for a, b, c in given)
    dtype = group["matmul_dtype"] or polar.choose_matmul_dtype(arithmetic(parameter), parameter.device)
    form = polar.choose_form(rows, columns, parameter.device, dtype, len(table))
    return ops.Rule(table, float(group["safety_factor"]), dtype, form)


def _solved(iters: int, lower_bound: float, safety_factor: float, cushion: float) -> tuple[polar.Coefficients, ...]:
    """The Polar Express's coefficients; a trace of the whole step takes them as they are."""
    return polar_express.coefficients(iters, lower_bound, safety_factor, cushion)


# what `torch.compiler.assume_constant_result` does, which would import the compiler with the package
_solved._dynamo_marked_constant = True  # type: ignore[attr-defined]  # noqa: SLF001


def per_slice(values: Tensor, like: Tensor) -> Tensor:
    """Numbers of the members of a piece as they multiply its operands: (B, 1, 1), in their dtype."""
    return values.reshape(-1, 1, 1).to(like.dtype)
