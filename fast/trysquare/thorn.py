"""THORN: orthogonalized updates for matrices, schedule-free Adam for everything else."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trysquare import _assignment, _backend
from trysquare._constraints import Constraint, DType, Flag, Integer, Number, Pair, Triples
from trysquare._optimizer import Entry, Group
from trysquare._parameters import arithmetic
from trysquare._release import Release
from trysquare._thorn_steps import matrix_shape, rule_of
from trysquare.ops import clipping
from trysquare.ops import thorn as ops

NEVER_ACTIVE = 0.6
"""β₂ up to which RAdam's ρ∞ = 2/(1 − β₂) − 1 is at most 4: the rectification never lets a parameter move."""


class THORN(Release):
    r"""Orthogonalized updates for matrices, and schedule-free Adam for everything else.

    Matrices ($R \times C$, convolutions flattened to (out, rest)), in step $t = 1, 2, \dots$:

    $$ \begin{aligned}
       m &\leftarrow \beta_1 m + g, \qquad u = g + \beta_1 m, \\
       X &= \text{polar factor of } u \text{ by } T \text{ quintics}, \\
       v &\leftarrow \beta_2 v + (1 - \beta_2)\,\text{rowmean}(X^2), \qquad
           X \leftarrow \text{rows of } X / \sqrt v, \text{ at the old } \lVert X\rVert_F, \\
       \theta &\leftarrow \theta - \eta\,\rho\sqrt{\max(R, C)}\,(X + \lambda\,\theta \text{ where signs agree}).
    \end{aligned} $$

    Everything else, with $y = \theta$ while training:

    $$ \begin{aligned}
       v &\leftarrow \beta_2 v + (1 - \beta_2) g^2, \qquad
       u = g / \bigl(\sqrt{v / (1 - \beta_2^t)} + \varepsilon\bigr) + \lambda\,y \text{ where signs agree}, \\
       y &\leftarrow y + c\,(z - y) + \eta\,(\beta_1(1 - c) - 1)\,u, \qquad z \leftarrow z - \eta u,
    \end{aligned} $$

    with $c$ the share of this step in the mean of all $z$, which `eval` puts into the parameters. State and arithmetic
    are float32 for half-precision and float32 parameters, float64 for float64 ones.

    Args:
        params: a model, whose parameters are assigned (`explain` tells how and why), or groups, each with
            ``"orthogonalize": True`` or ``False``. A group may override every hyperparameter.
        lr: learning rate $\eta$, a float or a 0-dim tensor. AdamW's own serves both kinds of groups.
        betas: $(\beta_1, \beta_2)$ in [0, 1). Matrices: momentum, and mean square of rows (0: rows stay as they
            are, and no $v$ is kept). Others: 0 evaluates the mean of $z$, towards 1 trains at the mean itself; second
            moment. $\beta_1$ of a schedule-free group cannot change after its first step.
        weight_decay: cautious decay $\lambda$, a float or a 0-dim tensor. For a matrix it stands inside the scaled
            update: its weights decay $\rho\sqrt{\max(R, C)}$ times as fast as AdamW's $\lambda$ says.
        rectify: multiply updates by RAdam's rectification, which leaves out the first four steps or so.
        target_rms: $\rho$, root mean square of a matrix's update over $\eta$; 0: the scale
            $\sqrt{\max(1, R/C)}$ of Muon instead.
        none_grad: set gradients to None after the step.
        eps: least norm that is divided by, and Adam's $\varepsilon$; > 0.
        iters: quintics $T$.
        lower_bound: singular value over norm, in (0, 1], from which the quintics are to reach 1.
        safety_factor: allowance for rounding: all but the last quintic take singular values up to 1 + this.
        cushion: least lower end of an interval that a quintic is fitted on, over its upper end; in [0, 1).
        schedule_free: False: Adam with cautious decay for the non-orthogonalized parameters instead.
        batched: the last two dimensions are matrices, all before them count these (expert weights); never by itself.
        coefficients: the $T$ triples $(a, b, c)$ themselves, instead of the Polar Express's.
        matmul_dtype: of the products of the quintics; None: bfloat16 where the device multiplies it faster.
        exclude: patterns (as of `fnmatch`) for names of matrices of a model that are not to be orthogonalized.
        nonfinite: what a gradient with NaN or inf does: ``"propagate"`` as in torch; ``"skip"`` changes nothing in
            this step, without a synchronisation, and counts it (`skipped_steps`); ``"raise"`` raises.
        workspace_bytes: bound on the scratch memory of one call of an update. A matrix cannot be cut: one that is
            larger takes a few times its own size. None: chosen by measurement for each kind of device.
        backend: ``"eager"``, ``"compiled"`` (the updates through `torch.compile`), ``"triton"`` (kernels for NVIDIA and
            AMD GPUs) or ``"auto"``: Triton on a GPU where it is installed, unless the environment variable
            ``THORN_DISABLE_TRITON`` is 1, else eager; compiled if ``THORN_COMPILE`` is 1 where the optimizer is made.

    Raises:
        TypeError, ValueError: names the argument or parameter, its value and what is allowed; nothing has changed.
        ImportError: ``backend="triton"`` without that package.
        RuntimeError: a kernel cannot be compiled, found before anything moves.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 5))
        >>> optimizer = THORN(model, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
        >>> model(torch.randn(8, 20)).square().mean().backward()
        >>> optimizer.step()
        >>> with optimizer.averaged():
        ...     evaluated = model(torch.randn(8, 20))

    References:
        pykeio 2025, THORN. Jordan et al. 2024, Muon. Amsel et al. 2025, Polar Express, arXiv 2505.16932.
        Li et al. 2025, NorMuon, arXiv 2510.05491. Liu, Su et al. 2025, arXiv 2502.16982, equation 4 (the scale).
        Cautious decay, arXiv 2510.12402. Defazio et al. 2024, schedule-free, arXiv 2405.15682.
        Liu et al. 2020, RAdam, arXiv 1908.03265.
    """

    _constraints: ClassVar[Mapping[str, Constraint]] = {
        "lr": Number(tensor=True),
        "betas": Pair(Number(high=1.0)),
        "weight_decay": Number(tensor=True),
        "rectify": Flag(),
        "target_rms": Number(),
        "none_grad": Flag(),
        "eps": Number(low_open=True),
        "iters": Integer(1),
        "lower_bound": Number(low_open=True, high=1.0, high_closed=True),
        "safety_factor": Number(),
        "cushion": Number(high=1.0),
        "schedule_free": Flag(),
        "batched": Flag(),
        "coefficients": Triples(),
        "matmul_dtype": DType((torch.float32, torch.bfloat16, torch.float16, torch.float64)),
        "orthogonalize": Flag(),
    }
    _entries: ClassVar[tuple[str, ...]] = (
        *("step", "momentum_buffer", "row_exp_avg_sq"),
        *("z", "y", "x", "exp_avg", "exp_avg_sq", "lr_max", "weight_sum", "update_sum"),
    )
    _required: ClassVar[frozenset[str]] = frozenset({"orthogonalize"})

    _reasons: Mapping[int, str] = MappingProxyType({})

    def __init__(
        self,
        params: nn.Module | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        weight_decay: float | Tensor = 0.1,
        *,
        rectify: bool = False,
        target_rms: float = 0.2,
        none_grad: bool = True,
        eps: float = 1e-8,
        iters: int = 5,
        lower_bound: float = 1e-3,
        safety_factor: float = 0.02,
        cushion: float = 0.02,
        schedule_free: bool = True,
        batched: bool = False,
        coefficients: Sequence[tuple[float, float, float]] | None = None,
        matmul_dtype: torch.dtype | None = None,
        exclude: Sequence[str] = (),
        nonfinite: str = "propagate",
        workspace_bytes: int | None = None,
        backend: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "rectify": rectify,
            "target_rms": target_rms,
            "none_grad": none_grad,
            "eps": eps,
            "iters": iters,
            "lower_bound": lower_bound,
            "safety_factor": safety_factor,
            "cushion": cushion,
            "schedule_free": schedule_free,
            "batched": batched,
            "coefficients": coefficients,
            "matmul_dtype": matmul_dtype,
        }
        _assignment.check_exclude(exclude, isinstance(params, nn.Module))
        groups: Any = params
        if isinstance(params, nn.Module):
            groups, self._reasons = _assignment.groups_of(params, exclude)
        self._asked_to_compile = _asked_to_compile()
        super().__init__(groups, defaults, nonfinite=nonfinite, workspace_bytes=workspace_bytes, backend=backend)

    # Groups

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, as `torch.optim.Optimizer.add_param_group` does, after checking all of it."""
        if isinstance(param_group, dict) and "orthogonalize" not in param_group:
            raise ValueError(
                f"group {len(self.param_groups)} does not say whether it is orthogonalized: give it the key "
                "'orthogonalize' with True or False, or give THORN the model itself"
            )
        super().add_param_group(param_group)
        group, first = self.param_groups[-1], self.param_groups[0]
        for name in ("train_mode", "update_rate"):
            group[name] = first[name]
        if group["rectify"] and 0 < group["betas"][1] <= NEVER_ACTIVE:
            warnings.warn(
                f"group {len(self.param_groups) - 1}: rectify=True with beta2={group['betas'][1]} never lets a "
                f"parameter move: use a beta2 above {NEVER_ACTIVE}, or 0",
                stacklevel=2,
            )

    def _check_group(self, group: Group, where: str) -> None:
        coefficients, iters = group["coefficients"], group["iters"]
        if coefficients is not None and len(coefficients) != iters:
            raise ValueError(f"{where}: coefficients has {len(coefficients)} triples, iters={iters}: one for each")
        if group["batched"] and not group["orthogonalize"]:
            raise ValueError(f"{where}: batched=True says how matrices lie, but 'orthogonalize' is False")
        least = 3 if group["batched"] else 2
        for position, parameter in enumerate(group["params"] if group["orthogonalize"] else ()):
            if parameter.ndim < least:
                name = group["param_names"][position] if "param_names" in group else f"parameter {position}"
                raise ValueError(
                    f"{where}: {name} has shape {tuple(parameter.shape)}, but to be orthogonalized "
                    f"{'in a batch ' * group['batched']}it needs {least} dimensions: put it into another group"
                )
        self._check_average(group, where)

    def _averages(self, group: Group) -> bool:
        return group["schedule_free"] and not group["orthogonalize"]

    def _layout(self, group: Group, parameter: Tensor) -> dict[str, Entry]:
        wide = clipping.wide_dtype(parameter.device)
        whole, number = Entry(tuple(parameter.shape), arithmetic(parameter)), Entry((), wide)
        if group["orthogonalize"]:
            layout = {"step": number, "momentum_buffer": whole}
            rows = Entry((*matrix_shape(group, parameter)[:-1], 1), whole.dtype)
            return {**layout, "row_exp_avg_sq": rows} if group["betas"][1] > 0 else layout
        if self._averages(group):
            layout = {"step": number, "z": whole, "exp_avg_sq": whole, "lr_max": number, "weight_sum": number}
            held = {"y": parameter.dtype != whole.dtype or not group["train_mode"], "x": group["betas"][0] == 0}
            layout |= {name: whole for name, is_held in held.items() if is_held}
        else:
            layout = {"step": number, "exp_avg": whole, "exp_avg_sq": whole}
        return {**layout, "update_sum": whole} if group["update_rate"] > 1 else layout

    def _new_state(self, group: Group, parameter: Tensor) -> dict[str, Tensor]:
        state = super()._new_state(group, parameter)
        if self._averages(group) and group["averaged_with"] is None:
            group["averaged_with"] = group["betas"][0]
        for name in {"x", "y", "z"} & state.keys():
            state[name].copy_(parameter)
        return state

    # Words

    def _rule_in_words(self, group: Group, parameter: Tensor) -> str:
        reason = self._reasons.get(id(parameter), "its group says so")
        if not group["orthogonalize"]:
            rule = "schedule-free Adam" if group["schedule_free"] else "Adam"
            return f"{rule} ({reason})"
        *batch, rows, columns = matrix_shape(group, parameter)
        chosen = rule_of(group, parameter)
        shape = " x ".join(map(str, [*batch, rows, columns]))
        size = ops.scale(rows, columns, group["target_rms"]) if rows * columns else 0.0
        products = f"{chosen.form} form in {str(chosen.matmul_dtype).removeprefix('torch.')}"
        if self._chosen(parameter.device) == "triton":
            from trysquare.kernels import _polar_choices

            products += " " + _polar_choices.in_words(min(rows, columns), chosen.matmul_dtype, parameter.device)
        return f"orthogonalized as {shape}, rate x {size:.4g}, {products} ({reason})"

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_asked_to_compile": self._asked_to_compile}

    def _before_step(self, closure: Callable[[], Any] | None) -> None:  # noqa: ARG002 (whatever it computes)
        self._refuse_released_step()
        self._refuse_eval_mode("step()")
        self._refuse_other_mode()

    def _chosen(self, device: torch.device) -> str:
        if self.backend == "auto" and self._asked_to_compile:
            return "compiled"
        chosen = _backend.choose(self.backend, device)
        return "eager" if self.backend == "auto" and os.environ.get("THORN_DISABLE_TRITON") == "1" else chosen


def _asked_to_compile() -> bool:
    """Whether the environment asks for the compiled backend where none is named; a warning where that cannot be met."""
    if os.environ.get("THORN_COMPILE") != "1":
        return False
    missing = None
    if sys.platform == "win32":
        missing = "torch.compile needs a compiler that it does not find on Windows"
    elif torch.cuda.is_available() and find_spec("triton") is None:
        missing = "torch.compile needs Triton on this GPU, which is not installed"
    if missing:
        warnings.warn(f"THORN_COMPILE=1 is not followed: {missing}; the eager backend runs", stacklevel=4)
    return missing is None
