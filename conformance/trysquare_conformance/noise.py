"""Monte Carlo arithmetic: an array on which a reference page runs as if in float32, bfloat16 or float16.

Every result of a ufunc gets a uniform relative error of one unit roundoff of the simulated format (Parker 1997;
Verificarlo). A few such runs scatter around the float64 result as far as honest arithmetic of that precision strays
from it, on this very input, ill-conditioned or not. `budget` makes error budgets of that scatter.

What is modelled:

- **Elementwise results**: relative error up to u. Library functions (exp, log, …) promise one ulp, so up to 2u.
- **Sums and products** over K terms: the rounding errors of the partial sums add up like a random walk, and no code
  adds more than a few hundred terms in one chain. For terms of either sign that is u_acc·(√min(K, 512)·√Σ(aₖbₖ)² +
  |result|). Partial sums of one sign grow towards the result, which adds min(K, 128)/3·result² under the root (without
  it real float32 products of positive matrices err by 2 to 3 spreads). Equal terms round alike again and again, and
  their errors add up without a walk: min(K, 256)/4·|result| (otherwise 10 to 40 spreads).
- **Mixed precision**: operands of `@` are rounded to `product_input` first, its results to `product_output`.
- **Range**: a result beyond the largest number is infinite; every result carries an absolute error of half the smallest
  subnormal, which is all that is left of a number below it.
- **Constants**: a Python number that the format cannot hold enters rounded, everywhere in the same way.
- **Exact operations** stay exact: multiplication by a power of two, adding zero, negation, maximum, comparison, copies.
- **Rounding is a function of its operands**: the error is a hash of the result and of a key that each operation draws,
  so that equal entries get equal errors, as they do in a machine. (Independent errors would average out over a
  constant tensor, and no honest code could keep to the budget.)
- **Wide results**: `dtype=np.float64` in a reference page means float64 in every precision, and is simulated as such.

Noise must not leak. `np.dot`, `einsum`, `linalg.norm` and the like bypass `__array_ufunc__`, so everything that is not
on a short list raises; scalars stay 0-dimensional arrays; turning one into a Python number raises too.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Plain: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_DOUBLE = np.dtype(np.float64)

LONGEST_CHAIN = 512
"""Terms that code adds up in one chain at most: longer sums are blocked, and their error grows no further."""

EQUAL = 2.0**-26
"""Terms count as equal if K·Σ(aₖbₖ)² exceeds the squared sum, which it does unless all are equal, by no more."""


@dataclass(frozen=True)
class Arithmetic:
    """The precision in which a lane computes, as unit roundoffs (2⁻ᵖ for a significand of p bits), and its range.

    Attributes:
        name: For messages.
        elementwise: Of every elementwise result.
        accumulate: Of the accumulator of sums and matrix products.
        product_input: Of the operands of matrix products; 0 where they are in the format already.
        product_output: Of the stored result of sums and products; 0 where it is the accumulator.
        largest: Results beyond it are infinite.
        smallest: The smallest subnormal (on hardware that flushes subnormals: the smallest normal number).
    """

    name: str
    elementwise: float
    accumulate: float
    product_input: float
    product_output: float
    largest: float
    smallest: float


FLOAT64 = Arithmetic("float64", 2.0**-52, 2.0**-52, 0.0, 0.0, float(np.finfo(np.float64).max), 2.0**-1074)
"""Twice its unit roundoff: the reference computes in the same format and rounds too, and less would vanish in that."""

FLOAT32 = Arithmetic("float32", 2.0**-24, 2.0**-24, 0.0, 0.0, (2 - 2.0**-23) * 2.0**127, 2.0**-149)
BFLOAT16 = Arithmetic("bfloat16", 2.0**-8, 2.0**-24, 0.0, 2.0**-8, (2 - 2.0**-7) * 2.0**127, 2.0**-133)
FLOAT16 = Arithmetic("float16", 2.0**-11, 2.0**-24, 0.0, 2.0**-11, 65504.0, 2.0**-24)


def mixed(elementwise: Arithmetic, products: Arithmetic) -> Arithmetic:
    """Everything in `elementwise`, but matrix products read and written in the format of `products`.

    Examples:
        >>> mixed(FLOAT32, BFLOAT16).name
        'float32, products in bfloat16'
    """
    return Arithmetic(
        name=f"{elementwise.name}, products in {products.name}",
        elementwise=elementwise.elementwise,
        accumulate=max(elementwise.accumulate, products.accumulate),
        product_input=products.elementwise,
        product_output=products.elementwise,
        largest=min(elementwise.largest, products.largest),
        smallest=elementwise.smallest,
    )


class Source:
    """Where the errors of one draw come from: the arithmetic, the random keys, and how each constant was rounded."""

    def __init__(self, arithmetic: Arithmetic, rng: np.random.Generator) -> None:
        self.arithmetic = arithmetic
        self._rng = rng
        self._constants: dict[float, Plain] = {}

    def key(self) -> np.uint64:
        """A fresh key for one operation."""
        return np.uint64(self._rng.bit_generator.random_raw())

    def constant(self, value: float) -> Plain:
        """A Python number as the format holds it: exact if it can, else off by up to one unit roundoff."""
        if value not in self._constants:
            u = self.arithmetic.elementwise
            significand = math.frexp(value)[0] / u if math.isfinite(value) else 0.0
            exact = significand == math.floor(significand) and abs(value) >= self.arithmetic.smallest
            x, key = np.asarray(value), self.key()
            self._constants[value] = x if exact else _perturb(x, u * x, None, self.arithmetic, key)
        return self._constants[value]


def noisy(array: Plain, arithmetic: Arithmetic, rng: np.random.Generator) -> "Noisy":
    """An array whose every descendant is perturbed; for several arrays of one run, share a `wrapper` instead."""
    return wrapper(arithmetic, rng)(array)


def wrapper(arithmetic: Arithmetic, rng: np.random.Generator) -> Callable[[Plain], "Noisy"]:
    """A function that makes arrays noisy, all from one source, so that they can meet in one computation."""
    source = Source(arithmetic, rng)

    def wrap(array: Plain) -> Noisy:
        wrapped: Noisy = _wrap(np.array(array, dtype=np.float64), source)
        return wrapped

    return wrap


class _Inner(Source):
    """Another arithmetic for a part of a computation; constants enter it as outside."""

    def __init__(self, arithmetic: Arithmetic, outer: Source) -> None:
        super().__init__(arithmetic, outer._rng)  # noqa: SLF001  # the same stream of keys goes on
        self._outer = outer

    def constant(self, value: float) -> Plain:
        return self._outer.constant(value)


def computed_in(arithmetic: Arithmetic, function: Callable[..., Any], x: Plain, *arguments: Any) -> Any:
    """`function(x, *arguments)` with a noisy `x` rounded to another arithmetic, which ends with the function.

    For a part that works on tensors of a narrower format and takes its constants as the rest does.
    """
    if not isinstance(x, Noisy):
        return function(x, *arguments)
    inner = _Inner(arithmetic, x.source)
    plain = np.asarray(x)
    rounded = _perturb(plain, arithmetic.elementwise * plain, plain == 0, arithmetic, inner.key())
    return _wrap(np.asarray(function(_wrap(rounded, inner), *arguments)), x.source)


class Noisy(np.ndarray[Any, np.dtype[np.float64]]):
    """A float64 array that computes as if in another arithmetic. `np.asarray` takes the values out."""

    source: Source

    def __array_finalize__(self, obj: Plain | None) -> None:
        self.source = getattr(obj, "source", None)  # type: ignore[assignment]  # a bare view is given its source next

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        out = kwargs.pop("out", (None,))[0]
        source = _shared_source(*inputs, out)
        compute = _METHODS.get(method)
        if compute is None:
            raise TypeError(f"np.{ufunc.__name__}.{method} has no noise model: write it with ufuncs, reductions and @")
        wide = kwargs.pop("dtype", None)
        arithmetic = source.arithmetic if wide is None else _arithmetic_of(wide)
        result = _wrap(compute(ufunc, arithmetic, source, inputs, _plain_options(kwargs)), source)
        if out is None:
            return result
        np.copyto(np.asarray(out), np.asarray(result))
        return out

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func not in _REWRAPPED and not (func is np.copyto and isinstance(args[0], Noisy)):
            raise TypeError(f"np.{func.__name__} would lose the noise: write it with ufuncs, reductions and @")
        return _wrap(super().__array_function__(func, types, args, kwargs), self.source)

    def __getitem__(self, index: Any) -> Any:
        return _wrap(super().__getitem__(index), self.source)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"noisy {np.asarray(self)!r}"

    __str__ = __repr__


def _refuse(name: str) -> Callable[..., Any]:
    def refused(*_: Any, **__: Any) -> Any:
        raise TypeError(f"{name} of a noisy array would lose the noise: stay with arrays, ufuncs, reductions and @")

    return refused


for _name in ("__float__", "__int__", "__bool__", "__index__", "item", "tolist", "dot", "cumsum", "cumprod", "trace"):
    setattr(Noisy, _name, _refuse(_name))

_REWRAPPED = {
    *(np.where, np.stack, np.concatenate, np.broadcast_to, np.reshape, np.ravel, np.transpose, np.swapaxes),
    *(np.moveaxis, np.expand_dims, np.squeeze, np.take, np.take_along_axis, np.flip, np.sort, np.argsort, np.copy),
    *(np.sum, np.mean, np.max, np.min, np.amax, np.amin, np.argmax, np.argmin, np.clip, np.any, np.all),
    *(np.zeros_like, np.ones_like, np.full_like, np.empty_like, np.shape, np.ndim, np.size),
}
"""Functions that move numbers, or that call a reduction or ufunc on the noisy array itself."""

_EXACT = {
    *(np.negative, np.positive, np.absolute, np.fabs, np.sign, np.copysign, np.conjugate),
    *(np.minimum, np.maximum, np.fmin, np.fmax, np.floor, np.ceil, np.rint, np.trunc, np.ldexp, np.frexp),
    *(np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal),
    *(np.isfinite, np.isnan, np.isinf, np.signbit, np.logical_and, np.logical_or, np.logical_not),
}
_ROUNDED = {np.add, np.subtract, np.multiply, np.divide, np.square, np.sqrt, np.reciprocal}
_LIBRARY = {np.exp, np.expm1, np.exp2, np.log, np.log1p, np.log2, np.log10, np.tanh, np.power, np.float_power, np.cbrt}
"""Vector mathematics libraries promise one ulp, two unit roundoffs."""


def _wrap(result: Any, source: Source) -> Any:
    """Floats become noisy arrays, 0-dimensional ones too; booleans, integers and shapes are plain."""
    if not (hasattr(result, "dtype") and result.dtype == _DOUBLE):
        return np.asarray(result) if isinstance(result, Noisy) else result
    wrapped = np.asarray(result).view(Noisy)
    wrapped.source = source
    return wrapped


def _shared_source(*operands: Any) -> Source:
    """The one source of all noisy operands: two draws must not meet."""
    sources = [x.source for x in operands if isinstance(x, Noisy)]
    if any(source is not sources[0] for source in sources):
        raise TypeError("noisy arrays of different draws meet in one operation: wrap all inputs of a run alike")
    return sources[0]


def _arithmetic_of(dtype: Any) -> Arithmetic:
    if np.dtype(dtype) != np.float64:
        raise TypeError(f"dtype={dtype}: a reference page computes in float64 or leaves the precision to the lane")
    return FLOAT64


def _plain_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What is left of the keyword arguments: axis and keepdims. NumPy's own methods spell out some defaults."""
    if not kwargs:
        return kwargs
    if kwargs.pop("where", True) is not True or kwargs.pop("initial", None) is not None:
        raise TypeError("where= and initial= have no noise model: use np.where")
    return {name: value for name, value in kwargs.items() if name in {"axis", "keepdims"}}


def _operand(x: Any, arithmetic: Arithmetic, source: Source) -> Plain:
    """The values of an operand; a Python number as the format holds it."""
    if isinstance(x, (float, int)) and arithmetic is source.arithmetic:
        return source.constant(float(x))
    return np.asarray(x)


def _call(ufunc: np.ufunc, arithmetic: Arithmetic, source: Source, inputs: Any, options: dict[str, Any]) -> Any:
    if ufunc is np.matmul:
        return _product(arithmetic, source, *(np.asarray(x) for x in inputs))
    operands = [_operand(x, arithmetic, source) for x in inputs]
    result = ufunc(*operands, **options)
    if ufunc in _EXACT:
        return result
    if ufunc not in _ROUNDED and ufunc not in _LIBRARY:
        raise TypeError(f"np.{ufunc.__name__} has no noise model: add it to noise.py if its error is known")
    u = arithmetic.elementwise * (2 if ufunc in _LIBRARY else 1)
    return _perturb(result, u * result, _is_exact(ufunc, operands), arithmetic, source.key())


def _reduce(ufunc: np.ufunc, arithmetic: Arithmetic, source: Source, inputs: Any, options: dict[str, Any]) -> Any:
    x = np.asarray(inputs[0])
    result = np.asarray(ufunc.reduce(x, **options))
    if ufunc in _EXACT:
        return result
    if ufunc is not np.add:
        raise TypeError(f"np.{ufunc.__name__}.reduce has no noise model: only sums, maxima and minima have one")
    terms = x.size // max(result.size, 1)
    squares = np.add.reduce(x * x, **options)
    return _accumulated(result, squares, terms, terms <= 1, arithmetic, source.key())


def _product(arithmetic: Arithmetic, source: Source, a: Plain, b: Plain) -> Plain:
    if arithmetic.product_input:
        key = source.key()  # one for both sides: in X @ X.T an entry is rounded alike in either place
        a, b = (_perturb(x, arithmetic.product_input * x, x == 0, arithmetic, key) for x in (a, b))
    squares = np.matmul(a * a, b * b)
    return _accumulated(np.matmul(a, b), squares, a.shape[-1], False, arithmetic, source.key())


def _accumulated(
    result: Plain, squares: Plain, terms: int, exact: bool, arithmetic: Arithmetic, key: np.uint64
) -> Plain:
    """A sum of `terms` numbers whose squares add up to `squares`."""
    size = np.abs(result)
    equal = terms * squares <= result * result * (1 + EQUAL)
    drift = np.where(equal, min(terms, 256) / 4, math.sqrt(min(terms, 128) / 3)) * size
    walk = np.sqrt(min(terms, LONGEST_CHAIN) * squares + drift * drift)
    amplitude = arithmetic.accumulate * (walk + size) + arithmetic.product_output * size
    return _perturb(result, np.copysign(amplitude, result), np.asarray(exact), arithmetic, key)


def _perturb(x: Plain, amplitude: Plain, exact: Plain | None, arithmetic: Arithmetic, key: np.uint64) -> Plain:
    """Add an error up to `amplitude`, which has the sign of x, where the operation is not exact (None: it never is).

    What leaves the range of the format becomes infinite, or is off by half its smallest number.
    """
    error = _hash(x, key)
    y = amplitude * error
    y += x
    above = _magnitude(y)
    if _is_ordinary(above, arithmetic):
        return y if exact is None else np.where(exact, x, y)
    exact = np.asarray(False) if exact is None else exact
    error *= arithmetic.smallest / 2
    above += error
    np.maximum(above, 0.0, out=above)  # what underflows keeps its sign
    above[above > arithmetic.largest] = np.inf
    return np.where(exact | ~np.isfinite(x) | (y == 0), x, np.copysign(above, y))


def _is_ordinary(magnitude: Plain, arithmetic: Arithmetic) -> bool:
    """Whether all of it is finite, and so large that in float64 half the smallest number of the format is nothing."""
    if not magnitude.size or np.minimum.reduce(magnitude, axis=None) <= arithmetic.smallest * 2.0**54:
        return False
    return bool(np.maximum.reduce(magnitude, axis=None) <= arithmetic.largest)


def _hash(x: Plain, key: np.uint64) -> Plain:
    """A number in [-1, 1) for every entry, a function of its magnitude and the key: multiply, fold, multiply."""
    z = _magnitude(x).view(np.uint64)
    z ^= key
    z *= _FIRST_FACTOR
    z ^= z >> _HALF
    z *= _SECOND_FACTOR
    z >>= _EXPONENT_BITS
    z |= _EXPONENT_OF_TWO
    uniform = z.view(np.float64)
    uniform -= 3
    return uniform


# Of SplitMix64; the top 52 bits become the significand of a number in [2, 4).
_FIRST_FACTOR, _SECOND_FACTOR = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_HALF, _EXPONENT_BITS, _EXPONENT_OF_TWO = np.uint64(32), np.uint64(12), np.uint64(0x4000000000000000)
_SIGNIFICAND = np.uint64(0x000FFFFFFFFFFFFF)


def _magnitude(x: Plain) -> Plain:
    """|x| as a new array, also when x is 0-dimensional (NumPy would give a scalar, which cannot change in place)."""
    magnitude: Plain = np.abs(x, out=np.empty(x.shape))
    return magnitude


def _is_exact(ufunc: np.ufunc, operands: list[Plain]) -> Plain | None:
    """Where the operation has no rounding error whatever the format: the other operand says so."""
    if ufunc is np.add or ufunc is np.subtract:
        return np.asarray((operands[0] == 0) | (operands[1] == 0))
    if ufunc is np.multiply:
        return _any_power_of_two(*operands)
    if ufunc is np.divide:
        return _is_power_of_two(operands[1])
    return None


def _any_power_of_two(a: Plain, b: Plain) -> Plain:
    """Where either is a power of two. Of a scalar and an array the scalar decides, which is quicker."""
    if a.ndim == 0 or b.ndim == 0:
        return _is_power_of_two(a if a.ndim == 0 else b)
    return _is_power_of_two(a) | _is_power_of_two(b)


def _is_power_of_two(x: Plain) -> Plain:
    """Powers of two and zero, whose significand has no bit set."""
    bits = np.abs(x.astype(np.float64, copy=False)).view(np.uint64)
    return np.asarray((bits & _SIGNIFICAND) == 0)


_METHODS: dict[str, Callable[[np.ufunc, Arithmetic, Source, Any, dict[str, Any]], Any]] = {
    "__call__": _call,
    "reduce": _reduce,
}
