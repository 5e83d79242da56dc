"""Arrays on which a reference page runs as if in another precision, in many draws at once.

A `Noisy` array holds one array a draw. To a page it looks like any of them: its shape, axes and indices are those of a
draw, and what a page computes with it is computed in every draw, each with errors of its own (`noise`). So a page of
small arrays costs hardly more in sixteen draws than in one: most of its time goes into NumPy's calls.

Noise must not leak. `np.dot`, `einsum`, `linalg.norm` and the like bypass `__array_ufunc__`, and most methods know
nothing of the draws, so everything that is not on a short list raises. Scalars stay arrays; turning one into a Python
number raises too, and a truth value is given only where all draws agree. Only `np.asarray` shows the draws: it gives
their values with the draws along the first axis.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from trysquare_conformance import noise
from trysquare_conformance.noise import FLOAT64, Arithmetic, Plain, Source

DOUBLE = np.dtype(np.float64)


def wrapper(arithmetic: Arithmetic, rng: np.random.Generator, draws: int) -> Callable[[Any], Any]:
    """A function that makes arrays noisy, all from one source, so that they can meet in one computation.

    What is noisy already it leaves as it is.
    """
    source = Source(arithmetic, rng, draws)

    def wrap(array: Any) -> Any:
        if isinstance(array, Noisy):
            return array
        values = np.asarray(array, dtype=DOUBLE)
        return _wrap(np.repeat(values[np.newaxis], draws, axis=0), source)

    return wrap


def computed_in(arithmetic: Arithmetic, function: Callable[..., Any], x: Any, *arguments: Any) -> Any:
    """`function(x, *arguments)` with a noisy `x` rounded to another arithmetic, which ends with the function.

    For a part that works on tensors of a narrower format and takes its constants as the rest does.
    """
    if not isinstance(x, Noisy):
        return function(x, *arguments)
    inner = x.source.inner(arithmetic)
    return _wrap(np.asarray(function(_wrap(noise.entered(np.asarray(x), inner), inner), *arguments)), x.source)


def exactly(function: Callable[[Plain], Plain], x: Any) -> Any:
    """An elementwise function of the values, to which no error is added: of an array, or of every draw."""
    values = function(np.asarray(x))
    return _wrap(values, x.source) if isinstance(x, Noisy) else values


class Noisy(np.ndarray[Any, np.dtype[Any]]):
    """One array a draw, seen as one. Floats compute as if in the source's arithmetic; masks and codes are exact."""

    source: Source

    def __array_finalize__(self, obj: Plain | None) -> None:
        self.source = getattr(obj, "source", None)  # type: ignore[assignment]  # a bare view is given its source next

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        (out,) = options.pop("out", (None,))
        source = _shared_source(inputs if out is None else (*inputs, out))
        wide = options.pop("dtype", None)
        arithmetic = source.arithmetic if wide is None or ufunc in noise.EXACT else _arithmetic_of(wide)
        if method == "reduce":
            result = noise.reduced(ufunc, np.asarray(inputs[0]), _reduction(inputs[0], options), arithmetic, source)
        elif method == "__call__":
            result = _called(ufunc, inputs, arithmetic, source)
        else:
            raise TypeError(f"np.{ufunc.__name__}.{method} has no noise model: write it with ufuncs, reductions and @")
        if out is None:
            return _wrap(result, source)
        if not isinstance(out, Noisy):
            raise TypeError(f"np.{ufunc.__name__} into a plain array would lose the noise")
        np.copyto(np.asarray(out), result)
        return out

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func in _THROUGH_METHODS:
            return super().__array_function__(func, types, args, kwargs)
        move = _MOVES.get(func)
        if move is None:
            raise TypeError(f"np.{func.__name__} would lose the noise: write it with ufuncs, reductions and @")
        return _wrap(move(self.source, *args, **kwargs), self.source)

    def __getitem__(self, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        if any(isinstance(part, Noisy) for part in parts):
            raise TypeError("a noisy index would take other entries in each draw: use np.where")
        return super().__getitem__((slice(None), *parts))

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __len__(self) -> int:
        return int(self.shape[0])

    def __bool__(self) -> bool:
        values = np.asarray(self)
        if values.dtype != bool or self.size != 1 or values.any() != values.all():
            raise TypeError(f"{self!r} has no truth value in which all draws agree: use np.where")
        return bool(values.all())

    def __repr__(self) -> str:
        return f"noisy, one a draw: {np.asarray(self)!r}"

    __str__ = __repr__

    @property  # type: ignore[misc]  # NumPy's can be set
    def shape(self) -> tuple[int, ...]:
        """Of a draw, as all that follows."""
        return np.asarray(self).shape[1:]

    @property
    def ndim(self) -> int:
        return np.asarray(self).ndim - 1

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def T(self) -> Any:  # noqa: N802  # as NumPy calls it
        return _wrap(np.asarray(self).transpose(0, *range(self.ndim, 0, -1)), self.source)

    @property
    def mT(self) -> Any:  # noqa: N802
        if self.ndim < 2:
            raise ValueError("mT of an array with less than two dimensions")
        return _wrap(np.asarray(self).mT, self.source)

    def reshape(self, *shape: Any) -> Any:  # type: ignore[override]
        new = shape[0] if isinstance(shape[0], Sequence) else shape
        return super().reshape(self.source.draws, *new)


_REDUCING = {"sum", "mean", "max", "min", "any", "all"}
"""Methods that call a ufunc's reduction, which comes back to `__array_ufunc__`."""

_KNOWN = {"shape", "ndim", "size", "T", "mT", "reshape", "dtype", "copy", "astype", *_REDUCING}
_NUMBERS = {"__float__", "__int__", "__complex__", "__index__", "__setitem__", "__contains__"}


def _refuse(name: str) -> property:
    def refused(_: Any) -> Any:
        raise TypeError(f"{name} of a noisy array would lose the noise: stay with arrays, ufuncs, reductions and @")

    return property(refused)


for _name in {name for name in dir(np.ndarray) if not name.startswith("_")} - _KNOWN | _NUMBERS:
    setattr(Noisy, _name, _refuse(_name))


def _wrap(values: Plain, source: Source) -> Any:
    """Values with the draws along their first axis."""
    wrapped = values.view(Noisy)
    wrapped.source = source
    return wrapped


def _shared_source(operands: Sequence[Any]) -> Source:
    """The one source of all noisy operands: two wrappers' draws must not meet."""
    sources = [x.source for x in operands if isinstance(x, Noisy)]
    if any(source is not sources[0] for source in sources):
        raise TypeError("noisy arrays of different sources meet in one operation: wrap all inputs of a run alike")
    return sources[0]


def _arithmetic_of(dtype: Any) -> Arithmetic:
    if np.dtype(dtype) != DOUBLE:
        raise TypeError(f"dtype={dtype}: a reference page computes in float64 or leaves the precision to the lane")
    return FLOAT64


def _called(ufunc: np.ufunc, inputs: Sequence[Any], arithmetic: Arithmetic, source: Source) -> Plain:
    ranks = [np.ndim(x) for x in inputs]
    if ufunc is np.matmul:
        if min(ranks) < 2:
            raise TypeError("@ of a noisy vector has no noise model: multiply and sum")
        a, b = (_in_every_draw(x, max(ranks), source) for x in inputs)
        return noise.product(a, b, arithmetic, source)
    numbers = arithmetic is source.arithmetic
    operands = [_operand(x, max(ranks), source) if numbers else _beside(x, max(ranks)) for x in inputs]
    return noise.elementwise(ufunc, operands, [rank == 0 for rank in ranks], arithmetic, source)


def _operand(x: Any, rank: int, source: Source) -> Plain:
    """The values of an operand; a Python number as the format holds it."""
    if not isinstance(x, (float, int)):
        return _beside(x, rank)
    value = source.constant(float(x))
    return value.reshape(-1, *[1] * rank) if value.ndim else value


def _beside(x: Any, rank: int) -> Plain:
    """The values of an array, shaped to broadcast in every draw with others of so many dimensions."""
    values = np.asarray(x)
    if not isinstance(x, Noisy) or values.ndim > rank:
        return values
    return values.reshape(len(values), *[1] * (rank + 1 - values.ndim), *values.shape[1:])


def _in_every_draw(x: Any, rank: int, source: Source) -> Plain:
    """The values of an array as if it had been wrapped, with so many dimensions beside the draws."""
    if isinstance(x, Noisy):
        return _beside(x, rank)
    return np.broadcast_to(x, (source.draws, *[1] * (rank - np.ndim(x)), *np.shape(x)))


def _reduction(x: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Axis and keepdims for the values. NumPy's own methods spell out some defaults."""
    if options.pop("where", True) is not True or options.pop("initial", None) is not None:
        raise TypeError("where= and initial= have no noise model: use np.where")
    axis = options.get("axis", 0)
    axes = tuple(range(x.ndim)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    return {"axis": tuple(_axis(a, x.ndim) for a in axes), "keepdims": options.get("keepdims", False)}


def _axis(axis: int, rank: int) -> int:
    """Of the values, whose first axis has the draws."""
    if not -rank <= axis < rank:
        raise IndexError(f"axis {axis} of an array with {rank} dimensions")
    return axis % rank + 1


# Functions that move numbers, on the values


def _where(_: Source, condition: Any, x: Any, y: Any) -> Plain:
    rank = max(map(np.ndim, (condition, x, y)))
    return np.where(*(_beside(part, rank) for part in (condition, x, y)))


def _concatenate(source: Source, arrays: Sequence[Any], axis: int = 0) -> Plain:
    values = [_in_every_draw(x, np.ndim(x), source) for x in arrays]
    return np.concatenate(values, axis=_axis(axis, values[0].ndim - 1))


def _stack(source: Source, arrays: Sequence[Any]) -> Plain:
    return np.stack([_in_every_draw(x, np.ndim(x), source) for x in arrays], axis=1)


def _broadcast_to(source: Source, x: Any, shape: tuple[int, ...]) -> Plain:
    return np.broadcast_to(_beside(x, len(shape)), (source.draws, *shape))


def _expand_dims(_: Source, x: Any, axis: int) -> Plain:
    return np.expand_dims(np.asarray(x), _axis(axis, x.ndim + 1))


def _zeros_like(source: Source, x: Any, shape: tuple[int, ...] | None = None) -> Plain:
    return np.zeros((source.draws, *(x.shape if shape is None else shape)))


def _full_like(source: Source, x: Any, value: float, shape: tuple[int, ...] | None = None, dtype: Any = None) -> Plain:
    """The number itself in every draw: unlike a constant it is not rounded."""
    _arithmetic_of(dtype)
    return np.full((source.draws, *(x.shape if shape is None else shape)), value, dtype=DOUBLE)


def _searchsorted(_: Source, steps: Plain, x: Any, side: Any = "left") -> Plain:
    if isinstance(steps, Noisy):
        raise TypeError("np.searchsorted among noisy steps would take others in each draw")
    return np.searchsorted(steps, np.asarray(x), side=side)


_MOVES: dict[Any, Callable[..., Plain]] = {
    np.where: _where,
    np.concatenate: _concatenate,
    np.stack: _stack,
    np.broadcast_to: _broadcast_to,
    np.expand_dims: _expand_dims,
    np.zeros_like: _zeros_like,
    np.full_like: _full_like,
    np.searchsorted: _searchsorted,
}

_THROUGH_METHODS = {np.sum, np.mean, np.max, np.min, np.amax, np.amin, np.any, np.all, np.shape, np.ndim, np.size}
"""Functions that ask the array for its method or attribute of the same name."""
