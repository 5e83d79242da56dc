"""DolphinFlow: Nesterov momentum with Adam's second moment, and gradients that cannot lengthen the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from trysquare import _backend, _batches, _graphs
from trysquare._batches import Batch, Piece
from trysquare._batches import advance as _advance
from trysquare._constraints import Choice, Constraint, Flag, Integer, Number
from trysquare._loss_aware import LossAware
from trysquare._loss_aware import rate as _rate
from trysquare._norms import Norm, judged
from trysquare._optimizer import Entry, Group
from trysquare._parameters import arithmetic
from trysquare.ops import clipping, moments
from trysquare.ops import dolphinflow as ops

Run: TypeAlias = Sequence[Batch]
"""Batches of one group and rule."""


class Measured(NamedTuple):
    """What a sweep found of a run: the coefficients of every piece, and the pieces, if none of them is a copy."""

    coefficients: list[Tensor]
    views: list[list[Piece]] | None


class DolphinFlow(LossAware):
    r"""Nesterov momentum with Adam's second moment on gradients orthogonal to the weights.

    In step $t = 1, 2, \dots$, with $s = \min(1, G / (\lVert g\rVert_2 + 10^{-6}))$ over all gradients:

    $$ \begin{aligned}
       \tilde g &= s g - w \langle w, s g\rangle / \langle w, w\rangle \quad\text{per row}, \\
       m &\leftarrow \mu m + \tilde g, \qquad u = \tilde g + \mu m, \\
       v &\leftarrow \beta_2 v + (1 - \beta_2)\tilde g^2, \\
       \theta &\leftarrow (1 - \eta\lambda)\,\theta - \eta\,u / \bigl(\sqrt{v / (1 - \beta_2^t)} + \varepsilon\bigr).
    \end{aligned} $$

    A row is a leading index of a parameter of at least two dimensions; parameters of fewer are not projected. State and
    arithmetic are float32 for half-precision and float32 parameters, float64 for float64 ones.

    Args:
        params: parameters, ``named_parameters()`` or groups.
        lr: learning rate $\eta$, a float or a 0-dim tensor.
        weight_decay: decoupled decay $\lambda$, a float or a 0-dim tensor.
        momentum: $\mu$ in [0, 1).
        ortho_mode: ``"vector"`` projects each row as above; ``"matrix"`` orthogonalizes $u$ by Newton–Schulz
            iterations, keeping its norm; None does neither.
        adaptive_lr: divide by the second moment; without it, $\theta$ moves by $-\eta u$.
        beta2: $\beta_2$ in [0, 1).
        eps: $\varepsilon$ > 0.
        ns_steps: Newton–Schulz iterations of the matrix mode.
        gradient_clipping: $G$, the largest norm of all gradients together; None or 0: no clipping. ``p.grad``
            itself is not changed.
        loss_aware_schedule: lower the rate by 1 % each time the loss has not improved on its running mean five
            times in a row. Needs a closure at every step.
        loss_ema_beta: weight of the past in that running mean.
        project: ``"gradient"`` projects the gradient; ``"update"`` projects $u$ instead and leaves the gradient
            raw, as the package dolphinflow does.
        bias_correction: divide $v$ by $1 - \beta_2^t$.
        nonfinite: what a gradient with NaN or inf does: ``"propagate"`` as in torch; ``"skip"`` changes nothing in
            this step, without a synchronisation, and counts it (`skipped_steps`); ``"raise"`` raises.
        workspace_bytes: bound on the scratch memory of one call of the update, where it can be split: by rows, so that
            one row is the least. None: chosen by measurement for each kind of device.
        backend: ``"eager"``, ``"compiled"`` (the updates through `torch.compile`), ``"triton"`` (kernels for NVIDIA and
            AMD GPUs) or ``"auto"``: Triton on a GPU where it is installed, else eager.

    Raises:
        TypeError, ValueError: names the argument or parameter, its value and what is allowed; nothing has changed.
        ImportError: ``backend="triton"`` without that package.
        RuntimeError: a kernel cannot be compiled, found before anything moves.

    Example:
        >>> model = torch.nn.Linear(100, 10)
        >>> optimizer = DolphinFlow(model.parameters(), lr=1e-4)
        >>> model(torch.randn(8, 100)).square().mean().backward()
        >>> optimizer.step()

    References:
        Prieto et al. 2025, Grokking at the Edge of Numerical Stability, arXiv 2501.04697 (the projection).
        Jordan et al. 2024, Muon (the iteration's coefficients). Hartford 2024, dolphinflow.
    """

    _constraints: ClassVar[Mapping[str, Constraint]] = {
        "lr": Number(tensor=True),
        "weight_decay": Number(tensor=True),
        "momentum": Number(high=1.0),
        "ortho_mode": Choice(("vector", "matrix", None)),
        "adaptive_lr": Flag(),
        "beta2": Number(high=1.0),
        "eps": Number(low_open=True),
        "ns_steps": Integer(1),
        "gradient_clipping": Number(none=True),
        "loss_aware_schedule": Flag(),
        "loss_ema_beta": Number(high=1.0),
        "project": Choice(("gradient", "update")),
        "bias_correction": Flag(),
    }
    _entries: ClassVar[tuple[str, ...]] = ("step", "momentum_buffer", "exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        weight_decay: float | Tensor = 1e-2,
        momentum: float = 0.9,
        ortho_mode: str | None = "vector",
        adaptive_lr: bool = True,
        beta2: float = 0.99,
        eps: float = 1e-8,
        ns_steps: int = 2,
        gradient_clipping: float | None = 1.0,
        loss_aware_schedule: bool = False,
        loss_ema_beta: float = 0.98,
        *,
        project: str = "gradient",
        bias_correction: bool = True,
        nonfinite: str = "propagate",
        workspace_bytes: int | None = None,
        backend: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "ortho_mode": ortho_mode,
            "adaptive_lr": adaptive_lr,
            "beta2": beta2,
            "eps": eps,
            "ns_steps": ns_steps,
            "gradient_clipping": gradient_clipping,
            "loss_aware_schedule": loss_aware_schedule,
            "loss_ema_beta": loss_ema_beta,
            "project": project,
            "bias_correction": bias_correction,
        }
        super().__init__(params, defaults, nonfinite=nonfinite, workspace_bytes=workspace_bytes, backend=backend)

    def _layout(self, group: Group, parameter: Tensor) -> dict[str, Entry]:
        whole = Entry(tuple(parameter.shape), arithmetic(parameter))
        layout = {"step": Entry((), clipping.wide_dtype(parameter.device)), "momentum_buffer": whole}
        return {**layout, "exp_avg_sq": whole} if group["adaptive_lr"] else layout

    def _rule_in_words(self, group: Group, parameter: Tensor) -> str:
        mode, rows, columns = _mode(group, parameter), *_batches.rows_and_columns(parameter.shape)
        if mode == "vector":
            return f"{group['project']} projected in {rows} rows of {columns}"
        if mode == "matrix":
            return f"update orthogonalized as {rows} x {columns}"
        return "ortho_mode=None" if group["ortho_mode"] is None else "fewer than two dimensions: not projected"

    # The step

    def _move(self, batches: Sequence[Batch]) -> None:
        clip = batches[0].group["gradient_clipping"]
        runs = self._runs(batches)
        norm, found = self._measure(runs, clip)
        scale, finite = None if norm is None else norm.scale, self._finite(norm)
        self._count(batches, finite)
        # backwards: what was measured last may still be in a cache
        for run, own in zip(reversed(runs), reversed(found), strict=True):
            if self._launches(run[0]):
                self._launch_batch(run[0], scale, finite)
                continue
            _advance(_steps(run), finite)
            if run[0].parameters[0].numel():
                self._move_run(run, scale, finite, own)

    def _runs(self, batches: Sequence[Batch]) -> list[list[Batch]]:
        """Batches whose members one call may take together: compiled, of all shapes; otherwise each is by itself."""
        if self.backend != "compiled" or torch.compiler.is_compiling():
            return [[batch] for batch in batches]
        alike: dict[Any, list[Batch]] = {}
        for batch in batches:
            first = batch.parameters[0]
            kind = id(batch.group), _rule(batch.group, first), first.dtype, first.device, first.numel() == 0
            alike.setdefault(kind, []).append(batch)
        return list(alike.values())

    def _launch_batch(self, batch: Batch, scale: Tensor | None, finite: Tensor | None) -> None:
        """All members of a batch in a kernel's launch or two, which take no scratch but for the matrix mode."""
        from trysquare.kernels import dolphinflow as kernels

        group, first = batch.group, batch.parameters[0]
        rule, device = _rule(group, first), first.device
        scale = None if scale is None else scale.to(device, non_blocking=True)
        finite = None if finite is None else finite.to(device, non_blocking=True)
        if not first.numel():
            return
        written = [batch.parameters, *(tensors for name, tensors in batch.state.items() if name != "step")]
        numbers = kernels.numbers_of(device, *self._floats(group))
        workspace, split = self._workspace(device), self._split(rule, device)
        in_scratch = max(1, workspace // (8 * _batches.SCRATCH * first.numel()))
        most = in_scratch if split == "whole" else len(batch.parameters)
        for part in _batches.contiguous([batch.gradients, *written], workspace, split, most, known=batch.dense):
            gradients, parameters, momentum_buffers, *rest = part.operands
            steps = [batch.state["step"][i] for i in part.members]
            bucket = kernels.Bucket(parameters, gradients, momentum_buffers, rest[0] if rest else None, steps)
            kernels.step_(bucket, part.shape, numbers, scale, finite, rule, group["eps"])
            part.store()

    def _measure(self, runs: Sequence[Run], clip: float | None) -> tuple[Norm | None, list[Measured | None]]:
        """The norm of all gradients, if it is asked for, and, if compiled, what projected runs were found to be.

        One sweep gives both. It pays for the coefficients alone too: a row's sums and its update in one graph, in two
        loops over each row, take a CPU longer than two graphs.
        """
        batches, asked = [batch for run in runs for batch in run], bool(clip) or self.nonfinite == "skip"
        if self.backend != "compiled" or torch.compiler.is_compiling():
            return self._norm(batches, clip) if asked else None, [None] * len(runs)
        projects = any(_rule(batch.group, batch.parameters[0]).projects_gradient for batch in batches)
        if not asked and not projects:
            return None, [None] * len(runs)
        on_cpu = all(parameter.device.type == "cpu" for batch in batches for parameter in batch.parameters)
        norm, found = self._sweep(runs, wide=not on_cpu)
        if on_cpu and not norm.isfinite():  # nothing waits for a device here
            norm, found = self._sweep(runs, wide=True)
        return judged(norm, clip) if asked else None, found

    def _sweep(self, runs: Sequence[Run], *, wide: bool) -> tuple[Tensor, list[Measured | None]]:
        sums: list[Tensor] = []
        found: list[Measured | None] = []
        for run in runs:
            first = run[0].parameters[0]
            if not (first.numel() and _rule(run[0].group, first).projects_gradient):
                sums += self._sums_of_squares([gradient for batch in run for gradient in batch.gradients])
                found.append(None)
                continue
            coefficients, views, copied = [], list[list[Piece]](), False
            for pieces in self._together(run):
                measured = _backend.run_each("compiled", ops.measure, [p.operands[1::-1] for p in pieces], wide)
                sums += [total for _, total in measured]
                coefficients += [coefficient for coefficient, _ in measured]
                copied = copied or bool(pieces[0].copies)
                if not copied:
                    views.append(pieces)
            found.append(Measured(coefficients, None if copied else views))
        return clipping.total_norm(sums), found

    def _together(self, run: Run) -> Iterator[list[Piece]]:
        """The pieces of a run, as many at a time as one call takes."""
        most = _graphs.TOGETHER if self.backend == "compiled" else 1
        return _batches.together(self._pieces(run), most)

    def _pieces(self, run: Run) -> Iterator[Piece]:
        """The pieces of a run; their members are counted through it."""
        before = 0
        for batch in run:
            first = batch.parameters[0]
            written = [batch.parameters, *(tensors for name, tensors in batch.state.items() if name != "step")]
            snapshots = len(written) if self.nonfinite == "skip" else 0
            split = self._split(_rule(batch.group, first), first.device)
            operands, workspace = [batch.gradients, *written], self._workspace(first.device)
            for piece in _batches.pieces(operands, workspace, split, snapshots, known=batch.dense):
                members = slice(before + piece.members.start, before + piece.members.stop)
                yield Piece(piece.operands, members, piece.copies)  # torch 2.6 cannot trace `_replace`
            before += len(batch.parameters)

    def _move_run(self, run: Run, scale: Tensor | None, finite: Tensor | None, measured: Measured | None) -> None:
        group, first = run[0].group, run[0].parameters[0]
        rule = _rule(group, first)
        scale = None if scale is None else scale.to(first.device)
        corrections = self._corrections(run) if rule.adaptive_lr and rule.bias_correction else None
        found = None if measured is None else iter(_scaled(measured.coefficients, scale, first))
        numbers = self._numbers(group, scale, first)
        known = None if measured is None else measured.views
        for pieces in self._together(run) if known is None else known:
            each = [_operands(piece, corrections, None if found is None else next(found)) for piece in pieces]
            before = [piece.snapshot(finite) for piece in pieces]
            _backend.run_each(self._chosen(first.device), ops.update_, each, *numbers, rule)
            for piece in pieces:
                piece.restore(before.pop(0), finite)
                piece.store()
            del piece, each  # copies are gone before the next are made

    def _corrections(self, run: Run) -> Tensor:
        """1/√(1 − β₂ᵗ) of every member, (B, 1, 1)."""
        first = run[0]
        return moments.correction(torch.stack(_steps(run)), first.group["beta2"], arithmetic(first.parameters[0]))

    def _numbers(self, group: Group, scale: Tensor | None, parameter: Tensor) -> list[Any]:
        """Clipping factor, η, λ, μ, ε, β₂ and 1 − β₂ in the dtype of the arithmetic."""
        dtype = arithmetic(parameter)
        numbers = [*self._floats(group), 1 - group["beta2"]]
        chosen = self._chosen(parameter.device)
        return [None if scale is None else scale.to(dtype), *_backend.scalars(chosen, numbers, dtype)]

    def _floats(self, group: Group) -> list[Any]:
        """η, λ, μ, ε and β₂."""
        return [_rate(group), *(group[name] for name in ("weight_decay", "momentum", "eps", "beta2"))]

    def _split(self, rule: ops.Rule, device: torch.device) -> _batches.Split:
        """A compiled update needs no scratch, so there is nothing to bound."""
        by_elements = rule.ortho_mode is None
        if self._chosen(device) == "compiled":
            return "flat" if by_elements else "whole"
        return "whole" if rule.ortho_mode == "matrix" else "elements" if by_elements else "rows"


def _steps(run: Run) -> list[Tensor]:
    return [step for batch in run for step in batch.state["step"]]


def _mode(group: Group, parameter: Tensor) -> str | None:
    return group["ortho_mode"] if parameter.ndim >= 2 else None


def _rule(group: Group, parameter: Tensor) -> ops.Rule:
    names = ("project", "adaptive_lr", "bias_correction", "ns_steps")
    return ops.Rule(_mode(group, parameter), *(group[name] for name in names))


def _operands(piece: Piece, corrections: Tensor | None, coefficient: Tensor | None) -> tuple[Tensor | None, ...]:
    """What an update gets of a piece."""
    gradient, theta, momentum_buffer, *rest = piece.operands
    correction = None if corrections is None else corrections[piece.members]
    return theta, gradient, momentum_buffer, rest[0] if rest else None, correction, coefficient


def _scaled(measured: list[Tensor], scale: Tensor | None, parameter: Tensor) -> list[Tensor]:
    """Coefficients of the clipped gradient from those of the gradient."""
    dtype = arithmetic(parameter)
    scaled = measured if scale is None else torch._foreach_mul(measured, scale)  # noqa: SLF001
    return [found.to(dtype) for found in scaled]
