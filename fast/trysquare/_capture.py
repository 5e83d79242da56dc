"""A step as a CUDA graph: launched as one, and bit for bit the step that it was captured from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from trysquare._circumstances import (
    NUMBERS,
    Circumstances,
    check,
    circumstances,
    device_of,
    difference,
    dtype_of,
    misplaced,
    refusal,
    with_gradient,
)
from trysquare._optimizer import BatchedOptimizer, Group


class CapturedStep:
    """The step of an optimizer as one CUDA graph, to be called instead of ``optimizer.step()``.

    The first call takes an ordinary step, the second captures a step and runs it, and every later one replays it, which
    costs the processor one launch. Learning rate and weight decay are read from the device: whatever a scheduler or a
    hand writes into ``optimizer.param_groups`` is used, be it a float or a tensor. Results are those of ``step()`` with
    both as 0-dim tensors (float64 ones for floats), bit for bit.

    All else is constant in a graph. A call that finds something changed (another hyperparameter, a parameter with a
    gradient that had none, state that was loaded, a model that was moved) takes an ordinary step again, and the next
    one that finds nothing changed captures anew; what changes in every step should be a learning rate.

    Args:
        optimizer: one of this package, with all parameters on one NVIDIA or AMD GPU.
        copy_gradients: copy gradients to where the graph reads them, which takes as much memory as they do. False:
            read them where they are, which has to be the same place in every step, as after
            ``zero_grad(set_to_none=False)``.

    Attributes:
        optimizer: the optimizer; its ``step()`` may be called in between.
        captures: how often a step was captured.
        reason: why the latest ordinary step was none from a graph.

    Raises:
        TypeError: ``optimizer`` is none of this package.
        RuntimeError: says what cannot be captured; nothing has changed.

    Example:
        ```python
        step = trysquare.CapturedStep(optimizer)
        for inputs, targets in batches:
            optimizer.zero_grad()
            loss_function(model(inputs), targets).backward()
            step()
            scheduler.step()
        ```
    """

    def __init__(self, optimizer: BatchedOptimizer, *, copy_gradients: bool = True) -> None:
        if not isinstance(optimizer, BatchedOptimizer):
            raise TypeError(f"optimizer is a {type(optimizer).__name__}: give one of trysquare's")
        if not isinstance(copy_gradients, bool):
            raise TypeError(f"copy_gradients={copy_gradients!r} must be True or False")
        reason = refusal(optimizer) or misplaced(optimizer)
        if reason is not None:
            raise RuntimeError(f"{type(optimizer).__name__} cannot be captured into a CUDA graph: {reason}")
        self.optimizer = optimizer
        self.captures = 0
        self.reason = "nothing was captured yet"
        self._numbers = Numbers()
        self._gradients = Gradients(copied=copy_gradients)
        self._seen: Circumstances | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._tables: dict[Any, Tensor] = {}

    @torch.no_grad()
    def __call__(self) -> None:
        """Take one step on the gradients that the parameters have.

        Raises:
            RuntimeError, TypeError, ValueError: as ``step()`` does, and where a step can no longer be captured, with
                the reason; nothing has changed.
        """
        check(self.optimizer)
        if not with_gradient(self.optimizer):
            return
        changed = self._changed()
        if changed is not None:
            self._step(changed)
        else:
            if self._graph is None:
                self._capture()
            self._replay()
        self._drop_gradients()

    def _changed(self) -> str | None:
        """What stands against a replay, or a capture."""
        if self._seen is None:
            return self.reason
        return difference(self._seen, self._circumstances(), self.optimizer.param_groups)

    def _circumstances(self) -> Circumstances:
        return circumstances(self.optimizer, copied=self._gradients.copied)

    def _step(self, reason: str) -> None:
        """An ordinary step on what a graph would read: it makes the state and compiles the kernels."""
        self.reason, self._seen, self._graph, self._tables = reason, None, None, {}
        self._gradients.forget()
        self._load()
        with self._in_place():
            self.optimizer.step()
        self._seen = self._circumstances()

    def _load(self) -> None:
        """Bring what a graph reads up to date."""
        self._numbers.load(self.optimizer.param_groups, device_of(self.optimizer))
        self._gradients.load(with_gradient(self.optimizer))

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """While it lasts, the optimizer has for its own what a graph reads."""
        with ExitStack() as stack:
            stack.enter_context(self._numbers.in_place(self.optimizer.param_groups))
            stack.enter_context(self._gradients.in_place(with_gradient(self.optimizer)))
            yield

    def _capture(self) -> None:
        """Write a step down without taking it."""
        device = device_of(self.optimizer)
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        tables = _Tables(triton=self.optimizer._chosen(device) == "triton")  # noqa: SLF001
        current = torch.cuda.current_stream(device)
        with torch.cuda.device(device), tables.reserved(current), self._in_place():
            try:
                # other threads may go on with their own work, which may allocate memory
                with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                    self.optimizer.step()
            except Exception as error:
                because = str(error).partition("\n")[0]  # CUDA's go on for a paragraph
                raise RuntimeError(
                    f"a step of {type(self.optimizer).__name__} could not be captured into a CUDA graph: {because}; "
                    "nothing was changed. optimizer.step() does the same without a graph"
                ) from error
            finally:
                torch.cuda.set_stream(current)  # torch leaves the other one in place where a capture fails
        self._tables = tables.filled()
        self._graph = graph
        self.captures += 1

    def _replay(self) -> None:
        self._load()
        if self._graph is not None:
            self._graph.replay()
        # so that a backward pass through the values before it fails, as after any step
        torch.autograd.graph.increment_version(with_gradient(self.optimizer))
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # noqa: SLF001 (what schedulers look at)

    def _drop_gradients(self) -> None:
        """What ``none_grad`` asks for, which is no work for a GPU."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"] if group.get("none_grad") else ():
                parameter.grad = None


class Numbers:
    """Learning rate and weight decay of every group as 0-dim tensors that stay where they are."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, str], Tensor] = {}
        self._written: dict[tuple[int, str], float] = {}

    def load(self, groups: Sequence[Group], device: torch.device) -> None:
        """Take over what the groups say. Nothing waits: a float is an argument of the kernel that writes it."""
        for index, group in enumerate(groups):
            for name in NUMBERS:
                self._load((index, name), group[name], device)

    def _load(self, key: tuple[int, str], value: float | Tensor, device: torch.device) -> None:
        held = self._held.get(key)
        if held is None or held.dtype != dtype_of(value) or held.device != device:
            held = self._held[key] = torch.zeros((), dtype=dtype_of(value), device=device)
            self._written.pop(key, None)
        if isinstance(value, Tensor) and value.device.type != "cpu":
            held.copy_(value)
            self._written.pop(key, None)
        elif self._written.get(key) != float(value):
            self._written[key] = float(value)
            held.fill_(self._written[key])

    @contextmanager
    def in_place(self, groups: Sequence[Group]) -> Iterator[None]:
        """While it lasts, the groups hold these tensors."""
        given = [(group, name, group[name]) for group in groups for name in NUMBERS]
        try:
            for index, group in enumerate(groups):
                group.update({name: self._held[index, name] for name in NUMBERS})
            yield
        finally:
            for group, name, value in given:
                group[name] = value


class Gradients:
    """Gradients where a graph reads them: copies that stay where they are, or those of the parameters themselves."""

    def __init__(self, *, copied: bool) -> None:
        self.copied = copied
        self._held: dict[Tensor, Tensor] = {}

    def forget(self) -> None:
        """Make new copies the next time."""
        self._held = {}

    def load(self, parameters: Sequence[Tensor]) -> None:
        """Copy what the parameters have for gradients."""
        if not self.copied:
            return
        given = {p: p.grad for p in parameters if p.grad is not None}
        for p, gradient in given.items():
            if p not in self._held:
                self._held[p] = torch.empty_like(gradient)
        torch._foreach_copy_([self._held[p] for p in given], list(given.values()))

    @contextmanager
    def in_place(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """While it lasts, the parameters have the copies; after it their own, also where a step drops gradients."""
        given = [parameter.grad for parameter in parameters]
        try:
            for parameter in parameters:
                parameter.grad = self._held.get(parameter, parameter.grad)
            yield
        finally:
            for parameter, gradient in zip(parameters, given, strict=True):
                parameter.grad = gradient


class _Tables:
    """The tables of addresses that kernels read: places during a capture, filled after it; none without Triton."""

    def __init__(self, *, triton: bool) -> None:
        self._triton = triton
        self._places: dict[Any, Tensor] = {}

    @contextmanager
    def reserved(self, stream: torch.cuda.Stream) -> Iterator[None]:
        """While it lasts, launches get places for their tables, of the memory of a stream that is not captured."""
        if not self._triton:
            yield
            return
        from trysquare.kernels._launch import reserving

        with reserving(stream) as self._places:
            yield

    def filled(self) -> dict[Any, Tensor]:
        """The tables, which have to live as long as the graph."""
        if self._places:
            from trysquare.kernels._launch import fill

            fill(self._places)
        return self._places
