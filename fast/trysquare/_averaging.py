"""Two sets of weights in one place: those that are trained, y, and their mean, x, which is evaluated.

`Averaging` is the part of an optimizer that exchanges them. Which of the two the parameters hold is part of every
group, and goes into checkpoints with a fingerprint of both sets: weights of one mode beside a state of the other would
train on from the wrong point, without a sign.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trysquare._constraints import Constraint, Flag, Number
from trysquare._fingerprint import Fingerprints, fingerprint
from trysquare._optimizer import BatchedOptimizer, Group
from trysquare.ops import schedule_free


class Averaging(BatchedOptimizer):
    """Modes of the schedule-free parameters of an optimizer; a subclass says which those are."""

    _carried: ClassVar[Mapping[str, tuple[Any, Constraint]]] = {
        "train_mode": (True, Flag()),
        "averaged_with": (None, Number(high=1.0, none=True)),
        "fingerprints": (None, Fingerprints()),
    }
    _loaded = False

    def train(self) -> None:
        """Put the trained weights y into the parameters. Does nothing in train mode."""
        self._switch(train=True)

    def eval(self) -> None:
        """Put the averaged weights x into the schedule-free parameters, to evaluate or to save them.

        `train` puts back y, bit for bit. Parameters that have not been stepped yet stay, and those of other groups.
        Does nothing in eval mode; nothing is communicated between processes.
        """
        self._switch(train=False)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """``with optimizer.averaged():`` holds the averaged weights; after it the mode is what it was."""
        was_training = self._training
        self.eval()
        try:
            yield
        finally:
            if was_training:
                self.train()

    def export_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """``model.state_dict()`` with averaged weights, as copies; the model is not touched.

        Args:
            model: has the parameters that this optimizer steps, under its own names.
        """
        self._refuse_other_mode()
        self._refuse_other_betas()
        self._settle()
        means = {} if not self._training else {id(p): self._mean(group, p) for group, p in self._schedule_free()}
        exported = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in means and name in exported:
                exported[name] = means[id(parameter)].to(parameter.dtype)
        return exported

    @property
    def _training(self) -> bool:
        return bool(self.param_groups[0]["train_mode"])

    @abstractmethod
    def _averages(self, group: Group) -> bool:
        """Whether the parameters of a group have a mean of their own."""

    def _refuse_eval_mode(self, what: str) -> None:
        if not self._training:
            raise RuntimeError(
                f"{what} in eval mode would train on from the averaged weights: call optimizer.train() first"
            )

    def _refuse_other_betas(self) -> None:
        for index, group in enumerate(self.param_groups):
            self._check_average(group, f"group {index}")

    @staticmethod
    def _check_average(group: Group, where: str) -> None:
        """Raise if β₁ is no longer that of y = (1 − β₁)z + β₁x."""
        used = group.get("averaged_with")
        if used is not None and used != group["betas"][0]:
            raise ValueError(
                f"{where}: betas={group['betas']!r}, but its schedule-free average was begun with beta1={used}, which "
                "cannot change; for a scheduler that cycles momentum use cycle_momentum=False"
            )

    def _schedule_free(self) -> Iterator[tuple[Group, Tensor]]:
        """The parameters that have something to exchange."""
        for group in self.param_groups:
            for parameter in group["params"] if self._averages(group) else ():
                if self.state.get(parameter):
                    yield group, parameter

    def _check_gradients(self) -> None:
        self._settle()
        super()._check_gradients()

    def _settle(self) -> None:
        for _, parameter in self._schedule_free() if self._training else ():
            self._settle_y(parameter)

    @torch.no_grad()
    def _settle_y(self, parameter: Tensor) -> None:
        """A model may have changed its dtype: in train mode y is in the state if, and only if, the parameter rounds."""
        state = self.state[parameter]
        if _rounded(parameter) and "y" not in state:
            state["y"] = parameter.detach().to(torch.float32)
        elif "y" in state and not _rounded(parameter):
            parameter.copy_(state.pop("y"))

    @torch.no_grad()
    def _switch(self, *, train: bool) -> None:
        self._refuse_other_mode()
        if train == self._training:
            return
        self._refuse_other_betas()
        self._settle()
        for group, parameter in self._schedule_free():
            (self._put_back if train else self._put_mean)(group, parameter)
        for group in self.param_groups:
            group["train_mode"] = train

    def _put_mean(self, group: Group, parameter: Tensor) -> None:
        mean = self._mean(group, parameter)
        if not _rounded(parameter):
            self.state[parameter]["y"] = parameter.detach().clone()
        parameter.copy_(mean)

    def _put_back(self, _: Group, parameter: Tensor) -> None:
        state = self.state[parameter]
        parameter.copy_(state["y"] if _rounded(parameter) else state.pop("y"))

    @torch.no_grad()
    def _mean(self, group: Group, parameter: Tensor) -> Tensor:
        """x in the precision of the state, in train mode."""
        state: dict[str, Tensor] = self.state[parameter]
        beta1 = group["betas"][0]
        if beta1 == 0:
            return state["x"]
        return schedule_free.averaged(state["y"] if _rounded(parameter) else parameter, state["z"], beta1)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with fingerprints of the trained and of the averaged weights in the groups."""
        self._refuse_other_mode()
        self._refuse_other_betas()
        self._settle()
        for group in self.param_groups:
            group["fingerprints"] = self._fingerprints(group) if self._averages(group) else None
        return super().state_dict()

    def _fingerprints(self, group: Group) -> tuple[int, int]:
        """Of the weights that the parameters hold, and of those that they would hold in the other mode."""
        stepped = [parameter for parameter in group["params"] if self.state.get(parameter)]
        other = (self._other(group, parameter).to(parameter.dtype) for parameter in stepped)
        return fingerprint(stepped), fingerprint(other)

    def _other(self, group: Group, parameter: Tensor) -> Tensor:
        return self._mean(group, parameter) if self._training else self.state[parameter]["y"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer here; weights of the other mode are refused when they are first used."""
        super().load_state_dict(state_dict)
        self._loaded = True

    def _refuse_other_mode(self) -> None:
        """Raise if the parameters hold what the state that was loaded takes for the weights of the other mode."""
        if not self._loaded:
            return
        for index, group in enumerate(self.param_groups):
            if group["fingerprints"] is None:
                continue
            own, other = group["fingerprints"]
            stepped = [parameter for parameter in group["params"] if self.state.get(parameter)]
            if own != other and fingerprint(stepped) == other:
                raise RuntimeError(_mismatch(index, train=self._training))
        self._loaded = False


def _mismatch(index: int, *, train: bool) -> str:
    state, weights = ("train", "averaged weights, of eval mode") if train else ("eval", "weights of train mode")
    return (
        f"group {index}: the optimizer's state was saved in {state} mode, but the parameters hold the {weights}: "
        f"load the model's weights that were saved in {state} mode too"
    )


def _rounded(parameter: Tensor) -> bool:
    """Whether a parameter is the rounding of a y in the state."""
    return parameter.dtype in {torch.bfloat16, torch.float16}
