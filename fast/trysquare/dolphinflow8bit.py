"""DolphinFlow8bit: DolphinFlow's gradient under AdamW's moments, kept as 8-bit codes in bitsandbytes' format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from trysquare import _backend, _batches, _bitsandbytes, _coded_state, _coded_windows
from trysquare._batches import Batch, advance
from trysquare._coded_launches import CodedLaunches
from trysquare._constraints import Choice, Constraint, Flag, Integer, Number
from trysquare._optimizer import Entry, Group
from trysquare.ops import blockwise8bit, clipping
from trysquare.ops import dolphinflow8bit as ops


class DolphinFlow8bit(CodedLaunches):
    r"""DolphinFlow with a state of 2.03 bytes a parameter: AdamW's moments of the projected gradient, as 8-bit codes.

    In step $t = 1, 2, \dots$, with $\tilde g$ the gradient clipped by the norm $G$ of all gradients and projected off
    the weights row by row (or orthogonalized), and $m, v$ decoded:

    $$ \begin{aligned}
       m &\leftarrow \beta_1 m + (1 - \beta_1)\tilde g, \qquad
       v \leftarrow \beta_2 v + (1 - \beta_2)\tilde g^2, \\
       \theta &\leftarrow (1 - \eta\lambda)\,\theta
         - \eta\,\frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \varepsilon}.
    \end{aligned} $$

    Then $m$ and $v$ are coded again: blocks of 256 elements with a float32 scale each, in the format of bitsandbytes. A
    parameter of fewer than 4,096 elements keeps them in float32, a float64 one in float64.

    Args:
        params: parameters, ``named_parameters()`` or groups.
        lr: learning rate $\eta$, a float or a 0-dim tensor.
        weight_decay: decoupled decay $\lambda$, a float or a 0-dim tensor.
        momentum: $\beta_1$ in [0, 1); AdamW's, not Nesterov's as in `DolphinFlow`.
        ortho_mode: ``"vector"`` projects each row of the gradient off the same row of the weights; ``"matrix"``
            orthogonalizes the gradient by Newton–Schulz iterations, keeping its norm; None does neither.
        adaptive_lr: divide by the second moment. Without it $m \leftarrow \beta_1 m + \tilde g$, $\theta$ moves by
            $-\eta m$, and the state is half as large.
        beta2: $\beta_2$ in [0, 1).
        eps: $\varepsilon$ > 0.
        ns_steps: Newton–Schulz iterations of the matrix mode.
        gradient_clipping: $G$; None or 0: no clipping. ``p.grad`` itself is not changed.
        loss_aware_schedule: lower the rate by 1 % each time the loss has not improved on its running mean five
            times in a row. Needs a closure at every step.
        loss_ema_beta: weight of the past in that running mean.
        nonfinite: what a gradient with NaN or inf does: ``"propagate"`` as in torch (in a step or two it is NaN all
            over its block); ``"skip"`` changes nothing in this step, without a synchronisation, and counts it
            (`skipped_steps`); ``"raise"`` raises.
        workspace_bytes: bound on the scratch memory of one call of the update; the matrix mode needs a whole matrix, a
            parameter that is not contiguous a whole row. None: chosen by measurement for each kind of device.
        backend: ``"eager"``, ``"compiled"`` (the updates through `torch.compile`), ``"triton"`` (kernels, on a GPU),
            ``"bitsandbytes"`` (eager, with that package's decoder, on a CPU) or ``"auto"`` (Triton on a GPU that has
            it, else eager).

    Raises:
        TypeError, ValueError: names the argument or parameter, its value and what is allowed; nothing has changed.
        ImportError: ``backend="bitsandbytes"`` without that package.

    Example:
        >>> model = torch.nn.Linear(100, 64)
        >>> optimizer = DolphinFlow8bit(model.parameters(), lr=1e-4)
        >>> model(torch.randn(8, 100)).square().mean().backward()
        >>> optimizer.step()
        >>> plan, _ = optimizer.explain()
        >>> plan.rule
        'gradient projected in 64 rows of 100; 8-bit moments'

    References:
        Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861 (the format).
        Prieto et al. 2025, Grokking at the Edge of Numerical Stability, arXiv 2501.04697 (the projection).
        Hartford 2024, dolphinflow.
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
    }
    _entries: ClassVar[tuple[str, ...]] = ("step", "state1", "qmap1", "absmax1", "state2", "qmap2", "absmax2")
    _constant_entries: ClassVar[frozenset[str]] = frozenset({"qmap1", "qmap2"})
    _backends: ClassVar[tuple[str, ...]] = (*_backend.BACKENDS, "bitsandbytes")

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
        nonfinite: str = "propagate",
        workspace_bytes: int | None = None,
        backend: str = "auto",
    ) -> None:
        if isinstance(backend, str) and backend == "bitsandbytes":
            _bitsandbytes.require()
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
        }
        super().__init__(params, defaults, nonfinite=nonfinite, workspace_bytes=workspace_bytes, backend=backend)

    # State

    def _layout(self, group: Group, parameter: Tensor) -> dict[str, Entry]:
        step = Entry((), clipping.wide_dtype(parameter.device))
        return {"step": step, **_coded_state.entries(parameter, _coded_windows.moments_of(group))}

    def _new_state(self, group: Group, parameter: Tensor) -> dict[str, Tensor]:
        state = super()._new_state(group, parameter)
        for i in _coded_windows.numbered(group) if _coded_state.is_coded(parameter) else ():
            state[f"qmap{i}"] = self._map(i, parameter.device)
            state[f"state{i}"].fill_(_coded_windows.ZEROS[i - 1])
        return state

    def _map(self, i: int, device: torch.device) -> Tensor:
        """The map of a moment: one tensor for all states, so that it takes no memory for each."""
        if (i, device) not in self._maps:
            self._maps[i, device] = blockwise8bit.dynamic_map(i == 1, device).clone()
        return self._maps[i, device]

    @property
    def _maps(self) -> dict[tuple[int, torch.device], Tensor]:
        maps: dict[tuple[int, torch.device], Tensor] = self.__dict__.setdefault("_own_maps", {})
        return maps

    def _check_device(self, device: torch.device, name: str) -> None:
        super()._check_device(device, name)
        if self.backend == "bitsandbytes":
            _bitsandbytes.check_device(device, name)

    def _rule_in_words(self, group: Group, parameter: Tensor) -> str:
        mode, rows, columns = _coded_windows.mode_of(group, parameter), *_batches.rows_and_columns(parameter.shape)
        what = {
            "vector": f"gradient projected in {rows} rows of {columns}",
            "matrix": f"gradient orthogonalized as {rows} x {columns}",
            None: "ortho_mode=None" if group["ortho_mode"] is None else "fewer than two dimensions: not projected",
        }[mode]
        return f"{what}; {_kept(parameter)}"

    # The step

    def _move(self, batches: Sequence[Batch]) -> None:
        clip = batches[0].group["gradient_clipping"]
        norm = self._norm(batches, clip) if clip or self.nonfinite == "skip" else None
        scale, finite = None if norm is None else norm.scale, self._finite(norm)
        self._count(batches, finite)
        for batch in batches:
            if self._launches(batch):
                self._launch_batch(batch, scale, finite)
                continue
            advance(batch.state["step"], finite)
            if not batch.parameters[0].numel():
                continue
            first = batch.parameters[0]
            kind = torch.float64 if first.dtype == torch.float64 else torch.float32
            factor = None if scale is None else scale.to(first.device, kind)  # else compiled anew where it is NaN
            if _coded_state.is_coded(first):
                for member in range(len(batch.parameters)):
                    self._move_coded(batch, member, factor, finite)
            else:
                self._move_small(batch, factor, finite)

    def _move_small(self, batch: Batch, scale: Tensor | None, finite: Tensor | None) -> None:
        """Parameters whose moments are not coded, stacked as far as the workspace goes."""
        group, first = batch.group, batch.parameters[0]
        mode = _coded_windows.mode_of(group, first)
        held = [batch.state[f"state{i}"] for i in _coded_windows.numbered(group)]
        snapshots = 1 + len(held) if finite is not None else 0
        operands, workspace = [batch.gradients, batch.parameters, *held], self._workspace(first.device)
        split = _coded_windows.SPLITS[mode]
        for piece in _batches.pieces(operands, workspace, split, snapshots, known=batch.dense):
            before = piece.snapshot(finite)
            gradient, theta, state1, *rest = piece.operands
            kind = state1.dtype
            gradient, factor, coefficient = self._direction(group, mode, theta, gradient, scale, kind)
            corrections = _coded_windows.corrections_of(group, torch.stack(batch.state["step"][piece.members]), kind)
            moved = theta, gradient, state1, rest[0] if rest else None, *corrections, factor, coefficient
            _backend.run(self._chosen(first.device), ops.update_, *moved, *self._numbers(group, kind))
            piece.restore(before, finite)
            piece.store()

    # Checkpoints

    def bitsandbytes_state_dict(self) -> dict[str, Any]:
        """The state as `bitsandbytes.optim.AdamW8bit.state_dict` returns it, for its `load_state_dict`.

        Learning rate, betas, eps and weight decay go with it; what `AdamW8bit` has no argument for does not.

        Raises:
            ValueError: a group without second moment, or a float64 parameter.
        """
        return _bitsandbytes.written(self)

    def load_bitsandbytes_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `bitsandbytes.optim.AdamW8bit.state_dict` returned, of any version since 0.45.

        Learning rate, betas (``momentum`` and ``beta2``), eps and weight decay are taken over with the state; the other
        arguments stay as they are.

        Raises:
            TypeError, ValueError: what does not fit; nothing has changed.
        """
        wide = clipping.wide_dtype(self.param_groups[0]["params"][0].device)
        super().load_state_dict(_bitsandbytes.read(state_dict, self.param_groups, wide))

    def _check_format(self, state_dict: Mapping[str, Any]) -> None:
        if _bitsandbytes.is_foreign(state_dict):
            raise ValueError(f"state_dict: written by bitsandbytes. {_bitsandbytes.HINT}")
        _coded_state.check_format(state_dict["state"])

    def _adopt(self, state: Mapping[Tensor, dict[str, Tensor]]) -> None:
        """States with equal maps share one tensor, as states that were made here do."""
        kept: dict[tuple[int, torch.device], list[Tensor]] = {}
        for parameter, entries in state.items():
            for i in (1, 2):
                if f"qmap{i}" not in entries:
                    continue
                known = kept.setdefault((i, parameter.device), [self._map(i, parameter.device)])
                loaded = entries[f"qmap{i}"]
                same = next((qmap for qmap in known if torch.equal(qmap, loaded)), None)
                known += [loaded] if same is None else []
                entries[f"qmap{i}"] = loaded if same is None else same


def _kept(parameter: Tensor) -> str:
    """How the moments are kept."""
    if _coded_state.is_coded(parameter):
        return "8-bit moments"
    if parameter.dtype == torch.float64:
        return "float64: moments not coded"
    return f"fewer than {_coded_state.SMALLEST_CODED} elements: float32 moments"
