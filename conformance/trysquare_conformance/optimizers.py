"""What the cases pages of optimizers share: the stages of a case, from how the reference and the fast code step.

An algorithm's page gives the abstract methods. Everything else is here: layouts, several parameters and groups, missing
gradients, non-finite gradients under each policy, teacher forcing, free-running drift.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from trysquare._optimizer import BatchedOptimizer
from trysquare.ops.clipping import wide_dtype
from trysquare_conformance import inputs
from trysquare_conformance.budget import STORED, Stored
from trysquare_conformance.case import Array, Case, Outputs, Stage, Wrap
from trysquare_conformance.lanes import Lane
from trysquare_conformance.noise import FLOAT32, FLOAT64, Arithmetic
from trysquare_conformance.noisy import Noisy
from trysquare_conformance.snapshots import Feed, Snapshot, outputs, rounded, to_array, to_tensor
from trysquare_reference import clipping

ALL_STEPS = 16
"""Up to so many steps of a run are each compared by themselves."""


class OptimizerSubject(ABC):
    """A `Subject` for optimizers; the class docstring of each page's subclass names its algorithm."""

    algorithm: str

    @abstractmethod
    def cases(self) -> Iterable[Case]:
        """Every case, those of the smaller tiers first."""

    @abstractmethod
    def build(self, case: Case, parameters: Sequence[torch.nn.Parameter], lane: Lane) -> BatchedOptimizer:
        """The fast optimizer of this case over these parameters, on the lane's backend."""

    @abstractmethod
    def begin(self, case: Case, parameters: Sequence[Array]) -> Snapshot:
        """The reference's snapshot before the first step."""

    @abstractmethod
    def advance(self, case: Case, before: Snapshot, feed: Feed) -> Snapshot:
        """One step of the reference. Parameters without a gradient keep their entries."""

    @abstractmethod
    def stored_as(self, case: Case, name: str) -> str:
        """The dtype in which the fast code keeps a state tensor of this name."""

    def is_finite(self, feed: Feed) -> bool:
        """Whether the `nonfinite` policies let a step with these gradients pass: their norm, in float64, is finite."""
        with np.errstate(over="ignore", invalid="ignore"):
            return bool(np.isfinite(clipping.global_norm([g for g in feed.gradients if g is not None])))

    def in_lane(self, case: Case, lane: Lane) -> Case:  # noqa: ARG002  # most cases are the same in every lane
        """The case with what it leaves to the lane filled in, so that the reference computes in the same manner."""
        return case

    def arithmetic(self, case: Case) -> Arithmetic:
        """How the fast code computes: float64 for float64 parameters, else float32."""
        return FLOAT64 if case.dtype == "float64" else FLOAT32

    def computes(self, case: Case, feed: Feed, step: int) -> bool:  # noqa: ARG002  # most steps are alike
        """Whether step 0, 1, … has anything to compute, so that a call of the lane's backend must be seen."""
        return feed.computes

    def loss(self, case: Case, step: int) -> float | None:  # noqa: ARG002  # most algorithms never ask for one
        """The closure's loss in step 0, 1, …; None: no closure."""
        return None

    def load_shared(self, optimizer: BatchedOptimizer, shared: dict[str, float]) -> None:  # noqa: B027  # as above
        """Put the numbers that belong to no parameter into the fast optimizer, if there are any."""

    def read_shared(self, optimizer: BatchedOptimizer) -> dict[str, float]:  # noqa: ARG002  # most have none
        """Read them back."""
        return {}

    def keeps_gradients(self, case: Case) -> bool:  # noqa: ARG002  # as torch's optimizers do
        """Whether a step leaves every bit of the gradients; otherwise it must remove them all."""
        return True

    def take_step(self, run: "FastRun", gradients: Sequence[torch.Tensor | None], loss: float | None) -> None:
        """Let the fast optimizer step with these gradients."""
        for parameter, gradient in zip(run.parameters, gradients, strict=True):
            parameter.grad = gradient
        if loss is None:
            run.optimizer.step()
        else:
            run.optimizer.step(lambda: loss)

    def expected_view(self, case: Case, after: Snapshot) -> Outputs:  # noqa: ARG002  # most have none
        """What else can be seen after a step, by the reference."""
        return {}

    def observed_view(self, run: "FastRun") -> Outputs:  # noqa: ARG002  # as above
        """The same by the fast code, which it must leave as it was."""
        return {}

    def place(self, array: Array, dtype: str, layout: str, lane: Lane) -> torch.Tensor:
        """A tensor on the lane's device, in a layout."""
        return inputs.lay_out(to_tensor(array, dtype).to(lane.device), layout)

    def stages(self, case: Case, lane: Lane) -> Iterator[Stage]:
        """One stage a step that is looked at, each from the reference's state as the fast code would store it."""
        fast, here = FastRun(self, case, lane), self.in_lane(case, lane)
        for step, before, feed in self.looked_at(case):
            yield Stage(
                f"step {step + 1}",
                partial(self._step_outputs, here, before, feed),
                partial(fast.teacher_forced, before, feed, fresh=step == 0),
                self._stored(case, before),
                self.arithmetic(here),
                computes=self.computes(case, feed, step) and not self.refuses(case, feed),
            )

    def drift(self, case: Case, lane: Lane) -> Stage | None:
        """All steps without correction, judged against the reference doing the same in the lane's arithmetic."""
        if case.steps == 1:
            return None
        path, here = list(self.trajectory(case)), self.in_lane(case, lane)
        start, feeds = path[0][0], [feed for _, feed in path]
        moving = [self.computes(case, feed, step) and not self.refuses(case, feed) for step, feed in enumerate(feeds)]
        return Stage(
            f"free run of {case.steps} steps",
            partial(self._free_outputs, here, start, feeds),
            lambda: FastRun(self, case, lane).free(start, feeds),
            self._stored(case, start),
            self.arithmetic(here),
            computes=any(moving),
        )

    def looked_at(self, case: Case) -> Iterator[tuple[int, Snapshot, Feed]]:
        """Step 0, 1, …, snapshot and feed of the steps that are compared one by one."""
        chosen = stepwise(case.steps)
        return ((step, *what) for step, what in enumerate(self.trajectory(case)) if step in chosen)

    def trajectory(self, case: Case) -> Iterator[tuple[Snapshot, Feed]]:
        """Before each step: the reference's snapshot, rounded as stored, and what is fed in."""
        exact = self.begin(case, self._weights(case))
        for step in range(case.steps):
            before = self.as_stored(case, exact)
            feed = Feed(self._gradients(case, before, step), self.loss(case, step))
            yield before, feed
            if step + 1 < case.steps:
                exact = self._expected(case, exact, feed)

    def _weights(self, case: Case) -> list[Array]:
        kind = inputs.KINDS[case.inputs]
        draws = [inputs.Draw(_rng(case, "weights", i), shape, case.dtype) for i, shape in enumerate(case.shapes)]
        return [rounded(kind.weights(draw), case.dtype) for draw in draws]

    def _gradients(self, case: Case, before: Snapshot, step: int) -> tuple[Array | None, ...]:
        kind = inputs.KINDS[case.inputs]
        return tuple(
            self._gradient(case, index, weights, step) if kind.has_gradient(index, step) else None
            for index, weights in enumerate(before.parameters)
        )

    def _gradient(self, case: Case, index: int, weights: Array, step: int) -> Array:
        """Non-finite values hurt the first parameter alone: what the others do then is part of the question."""
        kind = inputs.KINDS[case.inputs]
        maker = kind.gradient if kind.finite or index == 0 else inputs.KINDS["gaussian"].gradient
        drawn = maker(inputs.Draw(_rng(case, step, index), weights.shape, case.dtype, weights))
        if case.layout == "expanded" and inputs.fits("expanded", weights.shape):
            drawn = np.broadcast_to(drawn[:1], weights.shape)
        return rounded(drawn, case.dtype)

    def _expected(self, case: Case, before: Snapshot, feed: Feed) -> Snapshot:
        """The reference's step under the case's `nonfinite` policy, which acts on non-finite gradients only."""
        policy = case.hyperparameters["nonfinite"]
        if policy != "propagate" and not self.is_finite(feed):
            return replace(before, shared=before.shared | {"raised": policy == "raise", "skipped": policy == "skip"})
        with np.errstate(all="ignore"):
            after = self.advance(case, before, feed)
        return replace(after, shared=after.shared | {"raised": False, "skipped": False})

    def refuses(self, case: Case, feed: Feed) -> bool:
        """Whether the step is to raise."""
        return case.hyperparameters["nonfinite"] == "raise" and not self.is_finite(feed)

    def _step_outputs(self, case: Case, before: Snapshot, feed: Feed, wrap: Wrap) -> Outputs:
        after = self._expected(case, before.wrapped(wrap), feed.wrapped(wrap))
        return outputs(before, after) | self.expected_view(case, after)

    def _free_outputs(self, case: Case, start: Snapshot, feeds: Sequence[Feed], wrap: Wrap) -> Outputs:
        now = start
        for feed in feeds:
            now = self._expected(case, self._as_kept(case, now).wrapped(wrap), feed.wrapped(wrap))
        return outputs(start, now) | self.expected_view(case, now)

    def _as_kept(self, case: Case, before: Snapshot) -> Snapshot:
        """In noisy arithmetic each of many steps begins with numbers of the storage, as the lane's; exact stays exact.

        The last one's results stay as they are: sixteen draws that storage rounds to one number seem to have no error.
        """
        noisy = any(isinstance(array, Noisy) for array in before.parameters)
        return self.as_stored(case, before) if noisy else before

    def as_stored(self, case: Case, exact: Snapshot) -> Snapshot:
        """A snapshot rounded to the dtypes in which the fast code keeps it."""
        return exact.mapped(lambda array, name: rounded(array, self.stored_as(case, name) if name else case.dtype))

    def _stored(self, case: Case, snapshot: Snapshot) -> dict[str, Stored]:
        """How each output is kept: updates as parameters, state tensors as the page says, numbers in float64."""
        kinds = {name: self.stored_as(case, name) for state in snapshot.states for name in state if name != "step"}
        names = outputs(snapshot, snapshot).keys() | {"raised", "skipped"}
        stored = {name: STORED[kinds.get(name.partition("/")[0], "float64")] for name in names}
        parameter = STORED[case.dtype]
        stored |= dict.fromkeys(self.expected_view(case, snapshot), parameter)
        return stored | {f"update/{i}": parameter.beside(old) for i, old in enumerate(snapshot.parameters)}


def stepwise(steps: int) -> set[int]:
    """Which of steps 0, 1, … are compared one by one: all of a short run; of a long one ever fewer, and the last two.

    Each is a budget of its own, sixteen draws of the reference; the free run goes over all steps in any case.

    Examples:
        >>> sorted(stepwise(50))
        [0, 1, 2, 3, 4, 7, 12, 20, 33, 48, 49]
    """
    if steps <= ALL_STEPS:
        return set(range(steps))
    chosen, ahead = set(range(5)), (5, 8)
    while ahead[1] < steps:
        chosen.add(ahead[1] - 1)
        ahead = ahead[1], sum(ahead)
    return chosen | {steps - 2, steps - 1}


class FastRun:
    """A fast optimizer over the parameters of one case, to be stepped from any snapshot."""

    def __init__(self, subject: OptimizerSubject, case: Case, lane: Lane) -> None:
        self.subject, self.case, self.lane = subject, case, lane
        layout = "contiguous" if case.layout == "expanded" else case.layout
        zeros = [subject.place(np.zeros(shape), case.dtype, layout, lane) for shape in case.shapes]
        self.parameters = [torch.nn.Parameter(tensor) for tensor in zeros]
        self.optimizer = subject.build(case, self.parameters, lane)
        self.last: dict[str, float] = {}

    def teacher_forced(self, before: Snapshot, feed: Feed, *, fresh: bool) -> Outputs:
        """One step from the reference's snapshot. A fresh optimizer makes its own state, which is zero likewise."""
        self._load_parameters(before)
        if not fresh:
            self._load_states(before)
        self._step(feed)
        return outputs(before, self._read(before)) | self.subject.observed_view(self)

    def free(self, start: Snapshot, feeds: Sequence[Feed]) -> Outputs:
        """All steps, each from where the last one ended."""
        self._load_parameters(start)
        for feed in feeds:
            self._step(feed)
        return outputs(start, self._read(start)) | self.subject.observed_view(self)

    def _load_parameters(self, before: Snapshot) -> None:
        with torch.no_grad():
            for parameter, array in zip(self.parameters, before.parameters, strict=True):
                parameter.copy_(to_tensor(array, self.case.dtype))

    def _load_states(self, before: Snapshot) -> None:
        for parameter, state in zip(self.parameters, before.states, strict=True):
            self.optimizer.state[parameter] = {
                name: self._state_tensor(parameter, name, value) for name, value in state.items()
            }
        self.subject.load_shared(self.optimizer, before.shared)

    def _state_tensor(self, parameter: torch.Tensor, name: str, value: object) -> torch.Tensor:
        """A count is 0-dimensional, float64 where the device has it; what fits is laid out as the parameter."""
        if not isinstance(value, np.ndarray):
            return torch.tensor(value, dtype=wide_dtype(parameter.device), device=parameter.device)
        if value.dtype == np.uint8:
            return torch.from_numpy(value.copy()).to(parameter.device)
        stored = to_tensor(value, self.subject.stored_as(self.case, name))
        if stored.shape != parameter.shape:
            return stored.to(parameter.device)
        return torch.empty_like(parameter, dtype=stored.dtype, requires_grad=False).copy_(stored)

    def _step(self, feed: Feed) -> None:
        """One step; `last` then says whether it raised or was skipped, where the policy makes that an answer."""
        gradients = [None if g is None else self._placed(g) for g in feed.gradients]
        kept = [None if g is None else g.clone() for g in gradients]
        skipped = int(self.optimizer.skipped_steps)
        raised = self._raises(feed, gradients)
        self._check_gradients(kept if self.subject.keeps_gradients(self.case) or raised else [None] * len(kept))
        self.last = {"raised": raised, "skipped": int(self.optimizer.skipped_steps) - skipped}

    def _placed(self, gradient: Array) -> torch.Tensor:
        return self.subject.place(gradient, self.case.dtype, self.case.layout, self.lane)

    def _raises(self, feed: Feed, gradients: Sequence[torch.Tensor | None]) -> bool:
        """Steps. An exception is an answer only where one is called for."""
        try:
            self.subject.take_step(self, gradients, feed.loss)
        except (ArithmeticError, RuntimeError, ValueError):
            if not self.subject.refuses(self.case, feed):
                raise
            return True
        return False

    def _check_gradients(self, expected: Sequence[torch.Tensor | None]) -> None:
        """A step reads gradients; every bit of them must be as expected, and where none is expected none may be."""
        for index, (parameter, before) in enumerate(zip(self.parameters, expected, strict=True)):
            if before is None and parameter.grad is not None:
                raise AssertionError(f"the step left a gradient to parameter {index}")
            if before is not None and not torch.equal(_bits(parameter.grad), _bits(before)):
                raise AssertionError(f"the step changed the gradient of parameter {index}")

    def _read(self, before: Snapshot) -> Snapshot:
        """Parameters and states as they are now; a parameter that was never stepped has the state it began with."""
        states = []
        for parameter, initial in zip(self.parameters, before.states, strict=True):
            held = self.optimizer.state.get(parameter) or initial
            states.append({name: to_array(v) if isinstance(v, torch.Tensor) else v for name, v in held.items()})
        shared = self.subject.read_shared(self.optimizer) | self.last
        return Snapshot(tuple(to_array(p) for p in self.parameters), tuple(states), shared)


def _bits(tensor: torch.Tensor | None) -> torch.Tensor:
    """The bytes of a tensor, in which NaN equals itself."""
    if tensor is None:
        raise AssertionError("the step removed a gradient")
    return tensor.contiguous().view(-1).view(torch.uint8)


def _rng(case: Case, *names: object) -> np.random.Generator:
    return np.random.default_rng(inputs.seed(case.id, *names))
