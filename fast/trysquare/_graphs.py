"""Updates compiled by torch.compile, once for many sizes, and called again without its dispatch.

Before each call torch.compile looks at everything that a graph was made for, and reads sizes one by one. On a CPU that
takes as long as to step a hundred thousand parameters. What a call entered with sizes that were seen before is known,
so it is entered directly then (`_Call`).
"""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

TOGETHER = 4
"""Sets of arguments that share one call of a compiled update, at most."""

SHARED = 1 << 15
"""Elements from which the loops of a compiled update on a CPU are shared among the threads: below, waking them takes
longer. Inductor would decide that by the first shapes which it sees, for all that follow: where those are small, a
large tensor is stepped by one thread, even by a later process, for its cache knows no sizes."""

PLAIN = (Tensor, torch.nn.Parameter)
"""Tensors that are no more than a place in memory."""

CHUNKS: dict[bool, dict[str, Any]] = {
    True: {"cpp.min_chunk_size": 0},
    False: {"cpp.min_chunk_size": 1 << 60},
}
"""By whether loops are shared: how much of one inductor leaves to a thread at least."""


def run_each(function: Callable[..., Any], each: Sequence[Sequence[Any]], shared: Sequence[Any]) -> list[Any]:
    """Call an update on several sets of arguments, and shared ones behind them.

    Neighbours that one compilation serves go four, two or one at a time: most of what a call costs on a CPU is the way
    into the graph, which they then go together.
    """
    seen = tuple([tuple(map(_seen, own)) for own in each])
    results: list[Any] = []
    for sets, call in _calls(function, seen, tuple(map(_seen, shared))):
        found = call(*itertools.chain.from_iterable(each[sets]), *shared)
        results += found if sets.stop - sets.start > 1 else [found]
    return results


def forget() -> None:
    """The next call of every compiled update compiles it anew."""
    ask_again()
    _compiled.cache_clear()


def ask_again() -> None:
    """The next call of every compiled update goes through torch.compile, which sees when a function was replaced."""
    _calls.cache_clear()
    _call.cache_clear()


def _seen(arg: Any) -> Any:
    """What can be told of an argument quickly: all of it, or of a tensor what `_static` asks for."""
    if not isinstance(arg, Tensor):
        return arg
    return arg.dtype, arg.device, arg.shape, type(arg) in PLAIN and arg.is_contiguous()


@functools.lru_cache(maxsize=1024)
def _calls(
    function: Callable[..., Any], each: tuple[tuple[Any, ...], ...], shared: tuple[Any, ...]
) -> list[tuple[slice, _Call]]:
    """Which sets go together, by what is seen of them, and how: a step asks for the same few every time."""
    kinds = [(any(map(_is_large, own)), *map(_static, own)) for own in each]
    found: list[tuple[slice, _Call]] = []
    start = 0
    while start < len(each):
        alike = next((i for i in range(start, len(each)) if kinds[i] != kinds[start]), len(each)) - start
        count = 1 << (min(TOGETHER, alike).bit_length() - 1)
        sets = slice(start, start + count)
        own = itertools.chain.from_iterable(each[sets])
        found.append((sets, _call(function, count, len(each[start]), *own, *shared)))
        start += count
    return found


def _is_tensor(seen: Any) -> bool:
    return isinstance(seen, tuple) and len(seen) == 4 and isinstance(seen[0], torch.dtype)


def _static(seen: Any) -> Any:
    """What a compilation specialises on: all of an argument, or of a tensor what torch.compile does not keep open."""
    if not _is_tensor(seen):
        return seen
    dtype, device, shape, dense = seen
    return dtype, device.type, tuple(size == 1 for size in shape), dense


@functools.lru_cache(maxsize=4096)
def _call(function: Callable[..., Any], count: int, own: int, *seen: Any) -> _Call:
    """The call with arguments like these."""
    dense = all(arg[3] for arg in seen if _is_tensor(arg))
    return _Call(_compiled(function, count, own, any(map(_is_large, seen)), *map(_static, seen)), dense=dense)


def _is_large(seen: Any) -> bool:
    """Whether loops over an argument are shared among threads."""
    return _is_tensor(seen) and seen[1].type == "cpu" and seen[2].numel() >= SHARED


@functools.cache
def _compiled(function: Callable[..., Any], count: int, own: int, shared: bool, *static: Any) -> _Compiled:
    """``function``, on ``count`` sets of ``own`` arguments at once, compiled for dynamic shapes.

    It has a code object of its own: torch.compile keeps its compilations by code object and stops compiling one after a
    handful; with one for every rule and dtype a program with many kinds of groups still runs what it asked for.
    """
    whole = function if count == 1 else _several(function, count, own)
    code = whole.__code__.replace(co_name=f"{function.__name__}_{abs(hash((count, own, shared, static))):x}")
    return _Compiled(types.FunctionType(code, whole.__globals__, closure=whole.__closure__), CHUNKS[shared])


def _several(function: Callable[..., Any], count: int, own: int) -> Callable[..., Any]:
    def several(*args: Any) -> list[Any]:
        shared = args[count * own :]
        return [function(*args[first * own : (first + 1) * own], *shared) for first in range(count)]

    return several


class _Entry(NamedTuple):
    """What torch.compile did for a call: the graph that it chose, what it gave it, and what that returned."""

    graph: Callable[..., Any]
    inputs: tuple[Any, ...]
    outputs: Sequence[Any]


class _Compiled:
    """A function compiled for any sizes, of which one can be told which graph a call entered, and how."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        self._options = options
        self._entries: list[_Entry] = []
        self._new = True
        self._function = torch.compile(function, backend=self._lowered, dynamic=True, fullgraph=True)

    def __call__(self, *args: Any) -> tuple[Any, list[_Entry]]:
        """The result, and the graphs that were entered for it, in turn.

        Sizes that happen to be equal in the first call are taken for different ones: torch would take them for one,
        and compile anew at the first matrix that is not square, as the first one was. A float of a module is a
        constant, which torch would make a tensor in every call.
        """
        entries = self._entries = list[_Entry]()
        try:
            if not self._new:
                return self._function(*args), entries
            any_sizes = torch.fx.experimental._config.patch(use_duck_shape=False)  # type: ignore[attr-defined]  # noqa: SLF001
            with any_sizes, torch._dynamo.config.patch(specialize_float=True):  # noqa: SLF001
                result = self._function(*args)
            self._new = False
            return result, entries
        finally:
            self._entries = []  # no tensor is kept alive

    def _lowered(self, module: torch.fx.GraphModule, examples: Sequence[Any], **_: Any) -> Callable[..., Any]:
        """A graph as torch.compile's own backend makes it, that tells when it is entered."""
        from torch._inductor.compile_fx import compile_fx

        graph: Any = compile_fx(module, examples, config_patches=self._options)

        def entered(*inputs: Any) -> Any:
            outputs = graph(*inputs)
            self._entries.append(_Entry(graph, inputs, outputs))
            return outputs

        return entered


@dataclass(frozen=True)
class _Slot:
    """A place where a tensor belongs: that of an argument, or of an output."""

    index: int


class _Replay:
    """A way through a compiled function that was gone once: into one graph with these arguments, and out again.

    It may be gone again as long as the sizes and dtypes are the same, and what torch.compile looks at besides: torch's
    state (whether gradients are recorded, autocast, threads …).
    """

    def __init__(self, graph: Callable[..., Any], inputs: list[Any], outcome: Any, state: Any) -> None:
        self._graph = graph
        self._constants = [None if isinstance(given, _Slot) else given for given in inputs]
        self._slots = [(place, given.index) for place, given in enumerate(inputs) if isinstance(given, _Slot)]
        self._outcome = outcome
        self._state = state

    @classmethod
    def of(cls, args: Sequence[Any], result: Any, entries: Sequence[_Entry]) -> _Replay | None:
        """The way that a call went; None if it cannot be told from its arguments alone."""
        inside = _inside()
        if inside is None or len(entries) != 1:
            return None
        entry = entries[0]
        given = {id(arg): _Slot(index) for index, arg in enumerate(args) if isinstance(arg, Tensor)}
        made = {id(output): _Slot(index) for index, output in enumerate(entry.outputs) if isinstance(output, Tensor)}
        inputs = [_placed(value, given) for value in entry.inputs]
        outcome = _mapped(lambda value: _placed(value, made), result)
        if any(isinstance(left, Tensor) for left in (*inputs, *_leaves(outcome))):
            return None
        return cls(entry.graph, inputs, outcome, inside.state())

    def holds(self) -> bool:
        return bool(self._state.check())

    def __call__(self, args: Sequence[Any]) -> Any:
        inputs = self._constants.copy()
        for place, index in self._slots:
            inputs[place] = args[index]
        outputs = self._graph(*inputs)
        return _mapped(lambda leaf: outputs[leaf.index] if type(leaf) is _Slot else leaf, self._outcome)


def _placed(value: Any, slots: dict[int, _Slot]) -> Any:
    return slots.get(id(value), value) if isinstance(value, Tensor) else value


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """A result, which is a value or lists and tuples of values, with each of them changed."""
    if type(value) in {list, tuple}:
        return type(value)(_mapped(change, inner) for inner in value)
    return change(value)


def _leaves(value: Any) -> list[Any]:
    if type(value) in {list, tuple}:
        return [leaf for inner in value for leaf in _leaves(inner)]
    return [value]


class _Call:
    """A compiled update with arguments of certain shapes, dtypes and values."""

    def __init__(self, compiled: _Compiled, *, dense: bool) -> None:
        self._compiled = compiled
        self._dense = dense
        self._replay: _Replay | None = None

    def __call__(self, *args: Any) -> Any:
        direct = self._dense and _nothing_intervenes()
        if direct and self._replay is not None and self._replay.holds():
            return self._replay(args)
        detached = [_detached(arg) for arg in args]
        result, entries = self._compiled(*detached)
        if direct and _are_apart(detached):
            self._replay = _Replay.of(detached, result, entries)
        return result


def _detached(arg: Any) -> Any:
    """A tensor that says neither whether it needs a gradient nor of what it is a view: each would be compiled anew."""
    return arg.detach() if isinstance(arg, Tensor) else arg


class _Inside(NamedTuple):
    """What torch tells of itself: its state as far as graphs depend on it, and whether something intervenes."""

    state: Callable[[], Any]
    interventions: tuple[Callable[[], Any], ...]


@functools.cache
def _inside() -> _Inside | None:
    """None, and torch.compile is always asked, if this torch does not tell."""
    try:
        from torch._C import _is_any_autocast_enabled, _len_torch_dispatch_stack, _len_torch_function_stack
        from torch._C._dynamo.guards import GlobalStateGuard
        from torch._dynamo import eval_frame

        def is_told_otherwise() -> bool:
            return bool(eval_frame._stance.stance != "default")  # noqa: SLF001

        is_told_otherwise()
    except (ImportError, AttributeError):
        return None
    modes = _len_torch_function_stack, _len_torch_dispatch_stack, _is_any_autocast_enabled
    return _Inside(GlobalStateGuard, (torch.is_grad_enabled, *modes, is_told_otherwise))


def _nothing_intervenes() -> bool:
    """Whether nobody watches, records or changes operations, and torch.compile is not told to stand back."""
    inside = _inside()
    return inside is not None and not any(intervenes() for intervenes in inside.interventions)


def _are_apart(args: Sequence[Any]) -> bool:
    """Whether no two tensors share memory: for those that do torch.compile may make a graph of its own.

    The other way round it does not look: a graph that was made for some apart it enters with others, too.
    """
    spans = sorted((start, start + arg.nbytes) for arg in args if isinstance(arg, Tensor) and (start := arg.data_ptr()))
    return all(first[1] <= second[0] for first, second in itertools.pairwise(spans))
