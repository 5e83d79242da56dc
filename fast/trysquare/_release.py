"""Gradient release: every parameter is stepped in the backward pass, as soon as its gradient is there, which is freed.

With an update rate N > 1 optimizer state accumulates over N backward passes and parameters move in every Nth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trysquare import _backend, _batches, _parameters
from trysquare._averaging import Averaging
from trysquare._batches import Batch
from trysquare._constraints import Constraint, Integer
from trysquare._optimizer import Group
from trysquare._thorn_steps import Steps, per_slice
from trysquare.ops import _scratch
from trysquare.ops import thorn as ops


class Member(NamedTuple):
    """A parameter and where it stands in the optimizer: loading a checkpoint makes new groups."""

    name: str
    place: int
    parameter: Tensor


class ReleaseHandle:
    """``remove()`` takes the hooks away: gradients stay again, and `step` is needed."""

    def __init__(self, hooks: list[RemovableHandle], after: Callable[[], None]) -> None:
        self._hooks, self._after = hooks, after

    def remove(self) -> None:
        """Take the hooks away; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        if self._hooks:
            self._after()
        self._hooks = []


class Release(Steps):
    """The part of THORN that steps parameters in the backward pass."""

    _carried: ClassVar[Mapping[str, tuple[Any, Constraint]]] = {
        **Averaging._carried,  # noqa: SLF001 (a base class's, to be extended)
        "update_rate": (1, Integer(1)),
    }
    _released = False

    def setup_gradient_release(
        self, model: nn.Module, update_rate: int = 1, ignore_existing_hooks: bool = False
    ) -> ReleaseHandle:
        """Step each parameter in the backward pass and free its gradient at once.

        No gradient then outlives its layer, so nothing that needs all of them works: `step` raises, also when a
        GradScaler calls it, and a clipping function finds no gradients.

        Args:
            model: has all parameters that this optimizer steps.
            update_rate: N, backward passes to each update. State accumulates over them, not gradients: the moments
                and, of non-orthogonalized parameters, the mean of the N updates.
            ignore_existing_hooks: go on although parameters have post-accumulate-grad hooks of others.

        Returns:
            A handle whose ``remove()`` ends this.

        Raises:
            TypeError, ValueError, RuntimeError: names what is in the way; no hook was registered.
        """
        self._check_release(model, update_rate)
        members = [member for member in self._members() if member.parameter.requires_grad]
        for member in () if ignore_existing_hooks else members:
            if getattr(member.parameter, "_post_accumulate_grad_hooks", None):
                raise ValueError(
                    f"{member.name} has a post-accumulate-grad hook already: remove it, or give "
                    "ignore_existing_hooks=True if it may run beside this one"
                )
        for group in self.param_groups:
            group["update_rate"] = update_rate
        self._start_or_stop_collecting()
        self._released = True
        hooks = [
            m.parameter.register_post_accumulate_grad_hook(self._hook(m))  # type: ignore[no-untyped-call]
            for m in members
        ]
        return ReleaseHandle(hooks, self._end_release)

    def add_param_group(self, param_group: Group) -> None:
        """As every optimizer here; not under gradient release, which has its hooks already."""
        if self._released:
            raise RuntimeError("under gradient release no group can be added: call remove() on its handle first")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer here; under gradient release only what was saved with the same update rate."""
        for index, group in enumerate(state_dict["param_groups"] if self._released else ()):
            rate, mine = group.get("update_rate"), self.param_groups[0]["update_rate"]
            if rate != mine:
                raise ValueError(
                    f"state_dict: group {index} was saved with update_rate={rate}, gradient release is set up with "
                    f"{mine}: call remove() on its handle, load, and set it up with the saved rate"
                )
        super().load_state_dict(state_dict)

    def _check_release(self, model: Any, update_rate: Any) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}: give the module whose parameters are optimized")
        if not Integer(1).allows(update_rate):
            raise ValueError(f"update_rate={update_rate!r} must be {Integer(1).words}")
        if self._released:
            raise RuntimeError("gradient release is set up already: call remove() on its handle first")
        if self.nonfinite == "skip":
            raise ValueError(
                "nonfinite='skip' needs all gradients at once, which gradient release never has: use 'propagate' or "
                "'raise'"
            )
        from torch.nn.parallel import DistributedDataParallel  # a tenth of the time of `import trysquare`

        if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
            raise ValueError(
                "under DistributedDataParallel a hook sees the gradient before it is averaged between processes: "
                "gradient release cannot be used with it"
            )
        known = {id(parameter) for parameter in model.parameters()}
        for member in self._members():
            if id(member.parameter) not in known:
                raise ValueError(f"{member.name} is not a parameter of the model, so no backward pass would step it")
        self._check_window(update_rate)

    def _check_window(self, update_rate: int) -> None:
        """A window of N backward passes that was begun is ended with the same N."""
        begun = self._within_a_window()
        if begun is not None and self.param_groups[begun.place]["update_rate"] != update_rate:
            rate = self.param_groups[begun.place]["update_rate"]
            raise ValueError(
                f"{begun.name} is in the middle of a window of update_rate={rate} backward passes: use that rate"
            )

    def _within_a_window(self) -> Member | None:
        for member in self._members():
            state = self.state.get(member.parameter)
            if state and int(state["step"]) % self.param_groups[member.place]["update_rate"]:
                return member
        return None

    def _members(self) -> Iterator[Member]:
        for index, group in enumerate(self.param_groups):
            for position, parameter in enumerate(group["params"]):
                yield Member(_parameters.name_of(group, index, position), index, parameter)

    def _start_or_stop_collecting(self) -> None:
        """States that are there already get S, or lose it, as the update rate says."""
        for _, index, parameter in self._members():
            state = self.state.get(parameter)
            if not state:
                continue
            layout = self._layout(self.param_groups[index], parameter)
            if "update_sum" not in layout:
                state.pop("update_sum", None)
            elif "update_sum" not in state:
                entry = layout["update_sum"]
                state["update_sum"] = torch.zeros(entry.shape, dtype=entry.dtype, device=parameter.device)

    def _end_release(self) -> None:
        """Between two windows `step` goes on from here; within one, only gradient release can."""
        self._released = False
        if self._within_a_window() is None:
            for group in self.param_groups:
                group["update_rate"] = 1
            self._start_or_stop_collecting()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """A GradScaler then leaves everything to `step`, which says why it cannot be."""
        return self._released

    def _refuse_released_step(self) -> None:
        if self._released:
            raise RuntimeError(
                "parameters are stepped in the backward pass, and their gradients are gone after it: leave out step(), "
                "zero_grad(), gradient clipping and GradScaler, or call remove() on the handle of "
                "setup_gradient_release"
            )
        rate = self.param_groups[0]["update_rate"]
        if rate > 1:
            raise RuntimeError(
                f"this state collects updates over update_rate={rate} backward passes: "
                f"call setup_gradient_release(model, update_rate={rate})"
            )

    # The backward pass

    def _hook(self, member: Member) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            self._release(member.name, member.place, parameter)

        return hook

    @torch.no_grad()
    def _release(self, name: str, index: int, parameter: Tensor) -> None:
        """One backward pass of one parameter."""
        group = self.param_groups[index]
        self._refuse_eval_mode("a backward pass under gradient release")
        self._refuse_other_mode()
        self._check_settings(group, f"group {index}")
        _parameters.check_gradient(parameter, name)
        gradient = parameter.grad
        if gradient is None:
            return
        if self.nonfinite == "raise" and not bool(gradient.isfinite().all()):
            raise RuntimeError(f"the gradient of {name} is not finite and nonfinite='raise'; it was not changed")
        if self._averages(group) and self.state.get(parameter):
            self._settle_y(parameter)
        layout = self._layout(group, parameter)
        state = self._state_of(group, parameter, layout)
        batch = _batches.batch(group, [parameter], [gradient], {entry: [state[entry]] for entry in layout})
        self._rehearse([batch], self._every_phase)
        self._advance([batch], None)
        if parameter.numel():
            with _scratch.kept():
                self._micro_step(batch)
        self._tell_autograd([batch])
        parameter.grad = None
        self._opt_called = True  # what torch's schedulers look at to see that the optimizer has stepped

    def _micro_step(self, batch: Batch) -> None:
        rate = batch.group["update_rate"]
        if rate == 1:
            self._move_batch(batch, None)
            return
        moves = int(batch.state["step"][0]) % rate == 0
        if batch.group["orthogonalize"]:
            (self._move_batch if moves else self._accumulate)(batch, None)
        else:
            self._collect(batch)
            if moves:
                self._spend(batch)

    def _every_phase(self, batches: Sequence[Batch]) -> None:
        """All that a window of backward passes may launch, to be compiled before any of it changes something."""
        self._advance(batches, None)
        for batch in batches:
            if not batch.parameters[0].numel():
                continue
            if batch.group["update_rate"] == 1 or batch.group["orthogonalize"]:
                self._move_batch(batch, None)
            if batch.group["update_rate"] > 1:
                (self._accumulate if batch.group["orthogonalize"] else self._collect_and_spend)(batch, None)

    def _collect_and_spend(self, batch: Batch, _: Tensor | None) -> None:
        self._collect(batch)
        self._spend(batch)

    def _accumulate(self, batch: Batch, _: Tensor | None) -> None:
        if self._launches(batch):
            from trysquare import _thorn_launches

            _thorn_launches.accumulate(batch, self._workspace(batch.parameters[0].device))
            return
        momentum, *_rest = self._scalars(batch.group, batch.parameters[0])
        for piece in self._pieces(batch, ("momentum_buffer",), "elements"):
            self._run(ops.accumulate_, piece.operands[2], piece.operands[0], momentum)
            piece.store()

    def _collect(self, batch: Batch) -> None:
        """v, m if there is one, and S take up the gradient."""
        if self._launches(batch):
            self._launch_phase(batch, "collect")
            return
        group, first = batch.group, batch.parameters[0]
        moments = ("exp_avg_sq",) if group["schedule_free"] else ("exp_avg", "exp_avg_sq")
        function = ops.collect_ if group["schedule_free"] else ops.collect_mean_
        chosen = self._chosen(first.device)
        (part,) = _backend.scalars(chosen, [1 / group["update_rate"]], torch.float64)
        (beta1,) = _backend.scalars(chosen, [group["betas"][0]], torch.float64)
        _, _, eps, beta2 = self._scalars(group, first)
        betas = (beta2,) if group["schedule_free"] else (beta1, beta2)
        means = () if group["schedule_free"] else (self._mean_corrections(batch),)
        for piece in self._pieces(batch, ("update_sum", *moments), "elements"):
            gradient, _, update_sum, *buffers = piece.operands
            corrections = [per_slice(c, update_sum) for c in (*means, self._corrections(batch))]
            self._run(function, update_sum, gradient, *buffers, *corrections, part, eps, *betas)
            piece.store()

    def _launch_phase(self, batch: Batch, phase: Literal["collect", "spend"]) -> None:
        from trysquare import _thorn_launches

        _thorn_launches.step_others(batch, phase, None, self._workspace(batch.parameters[0].device))

    def _spend(self, batch: Batch) -> None:
        """Move by S, and begin it anew."""
        if self._launches(batch):
            self._launch_phase(batch, "spend")
            return
        group = batch.group
        averages = group["schedule_free"]
        rates = self._weighed(batch, None) if averages else (self._rates(group, torch.stack(batch.state["step"])),)
        optional = [name for name in ("y", "x") if name in batch.state]
        weight_decay = self._scalars(group, batch.parameters[0])[1]
        names = ("update_sum", *(("z", *optional) if averages else ()))
        for piece in self._pieces(batch, names, "elements"):
            _, theta, update_sum, *rest = piece.operands
            own = [per_slice(rate, update_sum) for rate in rates]
            if averages:
                held = dict(zip(optional, rest[1:], strict=True))
                self._run(ops.follow_, theta, update_sum, rest[0], held.get("y"), held.get("x"), *own, weight_decay)
            else:
                self._run(ops.descend_, theta, update_sum, *own, weight_decay)
            update_sum.zero_()
            piece.store()
