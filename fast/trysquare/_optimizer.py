"""The bookkeeping that every optimizer here shares: checked groups, state, batches of one shape, checkpoints.

A subclass says which hyperparameters there are and what they may be (`_constraints`), what state a parameter has
(`_layout`), and moves batches (`_move`). `step` checks everything before anything is touched.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from trysquare import _backend, _batches, _checkpoint, _constraints, _parameters
from trysquare._batches import Batch
from trysquare._constraints import Constraint
from trysquare._explain import Explanation, ParameterPlan
from trysquare._norms import Norms
from trysquare._rolls import CHOICES, Roll

Group = dict[str, Any]


class Entry(NamedTuple):
    """Shape and dtype of one state tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class BatchedOptimizer(Norms):
    """Base of the optimizers. See the module."""

    _constraints: ClassVar[Mapping[str, Constraint]]
    """What each hyperparameter of a group may be."""

    _entries: ClassVar[tuple[str, ...]]
    """Every name that a state may have; `_layout` says which of them a parameter's has."""

    _required: ClassVar[frozenset[str]] = frozenset()
    """Hyperparameters without a default: every group must say."""

    _global: ClassVar[frozenset[str]] = frozenset()
    """Hyperparameters that concern all groups at once: a group cannot have its own."""

    _carried: ClassVar[Mapping[str, tuple[Any, Constraint]]] = {}
    """What a group carries from step to step besides its hyperparameters: the value in a new group, what it may be."""

    _constant_entries: ClassVar[frozenset[str]] = frozenset()
    """Names of a state that no step writes: what was computed from them may be kept."""

    _backends: ClassVar[tuple[str, ...]] = _backend.BACKENDS
    """What ``backend`` may be."""

    def __init__(
        self, params: ParamsT, defaults: Group, *, nonfinite: str, workspace_bytes: int | None, backend: str
    ) -> None:
        name = type(self).__name__
        execution = {**_constraints.EXECUTION, "backend": _constraints.Choice(self._backends)}
        _constraints.check(execution, {"nonfinite": nonfinite, "backend": backend}, name)
        _constraints.check_workspace(workspace_bytes)
        known = {key: constraint for key, constraint in self._constraints.items() if key not in self._required}
        _constraints.check(known, defaults, name)
        _constraints.check_tensors(known, defaults, name)
        _backend.check(backend, name)
        self.nonfinite = nonfinite
        self.workspace_bytes = workspace_bytes
        self.backend = backend
        self._rolls: dict[int, Roll] = {}
        self._rehearsed: set[Any] = set()
        _parameters.check_iterable(params)
        super().__init__(params, defaults)
        given = [parameter for group in self.param_groups for parameter in group["params"]]
        if not given:
            raise ValueError(f"{name} got no parameters: every group is empty")
        self._skipped = torch.zeros((), dtype=torch.int64, device=given[0].device)

    @abstractmethod
    def _layout(self, group: Group, parameter: Tensor) -> dict[str, Entry]:
        """The state tensors of a parameter, by name; one of them is ``step``. They start as zeros.

        They follow from the parameter and from what of the group is neither a float nor a tensor (`_rolls.SETTINGS`).
        """

    @abstractmethod
    def _move(self, batches: Sequence[Batch]) -> None:
        """Step every batch."""

    @abstractmethod
    def _rule_in_words(self, group: Group, parameter: Tensor) -> str:
        """What is done to a parameter, for `explain`."""

    def _before_step(self, closure: Callable[[], Any] | None) -> None:
        """Raise if the step cannot be taken."""

    def _after_closure(self, loss: Any) -> None:
        """React to the loss, before the parameters move."""

    def _check_group(self, group: Group, where: str) -> None:
        """Raise if the hyperparameters of a group, each right by itself, do not fit together or its parameters."""

    # Groups

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, as `torch.optim.Optimizer.add_param_group` does, after checking all of it."""
        group = _parameters.materialized(param_group)
        where = f"group {len(self.param_groups)}"
        _parameters.check_keys(group, set(self._constraints), where)
        common = self.param_groups[0] if self.param_groups else self.defaults
        group = {**group, **{name: common[name] for name in sorted(self._global - group.keys())}}
        settings = {**self.defaults, **group}
        _constraints.check(self._constraints, settings, where)
        _constraints.check_tensors(self._constraints, settings, where)
        for name in sorted(self._global):
            if group[name] != common[name]:
                raise ValueError(
                    f"{where}: {name}={group[name]!r} differs from {common[name]!r}, but it concerns all "
                    f"groups at once: give it to {type(self).__name__}(...) instead"
                )
        taken = {id(p) for g in self.param_groups for p in g["params"]}
        _parameters.check_parameters(group["params"], where, taken)
        self._check_group({**settings, **_parameters.names_apart(group["params"])}, where)
        super().add_param_group({**group, **{name: value for name, (value, _) in self._carried.items()}})

    def _check_groups(self, groups: Sequence[Group], where: str = "") -> None:
        """Groups may have been edited since the last step, by a scheduler or by hand, or come from a checkpoint."""
        for index, group in enumerate(groups):
            self._check_settings(group, f"{where}group {index}")
            for name in self._global:
                if group[name] != groups[0][name]:
                    raise ValueError(
                        f"{where}group {index}: {name}={group[name]!r} differs from group 0's {groups[0][name]!r}, "
                        "but it concerns all groups at once: set it in every group"
                    )

    def _check_settings(self, group: Group, where: str) -> None:
        carried = {name: constraint for name, (_, constraint) in self._carried.items()}
        _constraints.check({**self._constraints, **carried}, group, where)
        self._check_group(group, where)

    def _check_gradients(self) -> None:
        self._rolls = {
            id(group): self._rolls[id(group)]
            for group in self.param_groups
            if id(group) in self._rolls and self._rolls[id(group)].holds(group, self.state)
        }
        for index, group in enumerate(self.param_groups):
            if id(group) in self._rolls:
                continue
            layout_of, known = self._layouts(group), set[torch.device]()
            for position, parameter in enumerate(group["params"]):
                gradient = parameter.grad
                if gradient is None:
                    continue
                state, layout = self.state.get(parameter) or {}, layout_of(parameter)
                if parameter.device in known and _parameters.are_plain(parameter, gradient, state, layout):
                    continue
                name = _parameters.name_of(group, index, position)
                _parameters.check_gradient(parameter, name)
                self._check_device(parameter.device, name)
                _parameters.check_state(state, layout, name)
                known.add(parameter.device)

    def _layouts(self, group: Group) -> Callable[[Tensor], dict[str, Entry]]:
        """`_layout` of parameters of a group as it is now: one of a kind has that of all."""
        known: dict[Any, dict[str, Entry]] = {}

        def layout_of(parameter: Tensor) -> dict[str, Entry]:
            kind = _batches.same_kind(parameter)
            found = known.get(kind)
            if found is None:
                found = known[kind] = self._layout(group, parameter)
            return found

        return layout_of

    def _check_device(self, device: torch.device, name: str) -> None:
        """Raise if the backend that was asked for cannot run where a parameter is."""
        if self.backend == "triton":
            _backend.check_device(device, name)

    # One step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: evaluates the loss anew and returns it, with gradients computed.

        Returns:
            What the closure returned, or None.
        """
        if closure is not None and not callable(closure):
            raise TypeError(f"closure={closure!r} must be a function that computes the loss and its gradients, or None")
        traced = torch.compiler.is_compiling()
        if not traced:
            self._check_groups(self.param_groups)
            self._refuse_recording(torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
        self._before_step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not traced:
            self._check_gradients()
            self._refuse_nonfinite()
        self._after_closure(loss)
        batches = []
        for group in self.param_groups:
            batches += self._batches(group, traced)
        if batches:
            self._rehearse(batches, self._move)
            self._move(batches)
            self._tell_autograd(batches)
        return loss

    def _tell_autograd(self, batches: Sequence[Batch]) -> None:
        """Count what kernels wrote, as torch counts its own: a backward pass through the values before then fails."""
        written = [parameter for batch in batches if self._launches(batch) for parameter in batch.parameters]
        if written:
            torch.autograd.graph.increment_version(written)

    def _rehearse(self, batches: Sequence[Batch], move: Callable[[Sequence[Batch]], None]) -> None:
        """Compile the kernels of batches of a new kind: one that cannot be compiled fails before anything moves."""
        launched = [batch for batch in batches if self._launches(batch)]  # what is not would move for good
        new = {_kind(batch) for batch in launched} - self._rehearsed
        if not new:
            return
        from trysquare.kernels import compiling

        with compiling():
            move(launched)
        self._rehearsed |= new

    def _batches(self, group: Group, traced: bool) -> list[Batch]:
        known = None if traced else self._rolls.get(id(group))
        if known is not None:
            return known.batches()
        held: list[str] = []
        parameters: list[Tensor] = []
        gradients: list[Tensor] = []
        states: list[list[Tensor]] = [[] for _ in self._entries]
        self._init_group(group, traced, held, parameters, gradients, *states)
        everything = held, parameters, gradients, states
        if traced:
            return [self._batch(group, [i], *everything) for i in range(len(parameters))]
        together: dict[Any, list[int]] = {}
        for i, parameter in enumerate(parameters):
            together.setdefault(_batches.same_kind(parameter), []).append(i)
        batches = [self._batch(group, members, *everything) for members in together.values()]
        self._rolls[id(group)] = Roll(group, self.state, batches)
        return batches

    def _batch(
        self,
        group: Group,
        members: list[int],
        held: list[str],
        parameters: list[Tensor],
        gradients: list[Tensor],
        states: list[list[Tensor]],
    ) -> Batch:
        names = held[members[0]].split()
        state = {
            name: [tensors[i] for i in members]
            for name, tensors in zip(self._entries, states, strict=True)
            if name in names
        }
        return _batches.batch(group, [parameters[i] for i in members], [gradients[i] for i in members], state)

    def _init_group(
        self,
        group: Group,
        check: bool,
        held: list[str],
        parameters: list[Tensor],
        gradients: list[Tensor],
        *states: list[Tensor],
    ) -> None:
        """Fill the lists with what has a gradient; new parameters get their state.

        The lists are parallel, one of states for each of `_entries`: ``held`` says which of them a parameter has, and
        its ``step`` stands in for the others.
        torch.compile knows a method of this name and runs it outside the trace: the first step needs no graph of its
        own, and the checks of a traced step stand here.
        """
        if check and group is self.param_groups[0]:
            self._refuse_recording(True)
            self._check_groups(self.param_groups)
            self._check_gradients()
        layout_of = self._layouts(group)
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            layout = layout_of(parameter)
            state = self._state_of(group, parameter, layout)
            held.append(" ".join(layout))
            parameters.append(parameter)
            gradients.append(gradient)
            for name, tensors in zip(self._entries, states, strict=True):
                tensors.append(state[name if name in layout else "step"])

    def _state_of(self, group: Group, parameter: Tensor, layout: Mapping[str, Entry]) -> dict[str, Tensor]:
        """The state of a parameter as its layout says: made if there is none, and moved where the model was."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state.update(self._new_state(group, parameter))
        device = parameter.device
        for name, (_, dtype) in layout.items():
            tensor = state[name]
            if tensor.dtype != dtype or tensor.device != device:
                state[name] = tensor.to(device, dtype)
        return state

    def _new_state(self, group: Group, parameter: Tensor) -> dict[str, Tensor]:
        layout = self._layout(group, parameter)
        return {name: torch.zeros(e.shape, dtype=e.dtype, device=parameter.device) for name, e in layout.items()}

    # What a user can ask

    def explain(self) -> Explanation:
        """What every parameter gets, and why."""
        return Explanation(
            ParameterPlan(
                _parameters.name_of(group, index, position),
                index,
                tuple(parameter.shape),
                self._rule_in_words(group, parameter),
                self._chosen(parameter.device),
                sum(entry.bytes for entry in self._layout(group, parameter).values()),
            )
            for index, group in enumerate(self.param_groups)
            for position, parameter in enumerate(group["params"])
        )

    # Checkpoints and copies

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint as it was saved, bit for bit and with its own dtypes; reject a foreign one whole."""
        state_dict = _checkpoint.after_hooks(self, state_dict)
        self._check_format(state_dict)
        groups = _checkpoint.checked_groups(self, state_dict, set(self._constraints), set(self._carried))
        self._check_groups(groups, "state_dict: ")
        for index, group in enumerate(groups):
            _constraints.check_tensors(self._constraints, group, f"state_dict: group {index}")
        state = _checkpoint.checked_state(state_dict, groups, self._layout)
        self._adopt(state)
        self.__setstate__({"state": state, "param_groups": groups})
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _check_format(self, state_dict: Mapping[str, Any]) -> None:
        """Raise if a state dict is one that another function reads."""

    def _adopt(self, state: Mapping[Tensor, dict[str, Tensor]]) -> None:
        """Check the values of states that are about to be taken over, whose shapes and dtypes are right."""

    def __getstate__(self) -> dict[str, Any]:
        names = ("nonfinite", "workspace_bytes", "backend", "_skipped")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch puts it there, and the next group would have it as a key
        self._rolls, self._rehearsed = {}, set()


def _kind(batch: Batch) -> Any:
    """What decides which kernels step a batch: everything but its numbers, and whether members have to be copied."""
    choices = [(name, value) for name, value in batch.group.items() if isinstance(value, CHOICES)]
    clips = batch.group.get("gradient_clipping") or 0.0
    return (*_batches.same_kind(batch.parameters[0]), *batch.state, batch.dense, clips > 0, *choices)
