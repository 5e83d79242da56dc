"""Monte Carlo arithmetic: how far each operation strays in float32, bfloat16 or float16, as random errors on float64.

Every result of a ufunc gets a uniform relative error of one unit roundoff of the simulated format (Parker 1997;
Verificarlo). A few such runs scatter around the float64 result as far as honest arithmetic of that precision strays
from it, on this very input, ill-conditioned or not. `budget` makes error budgets of that scatter; `noisy` has the
arrays on which a reference page runs, in all draws at once. Here every array has the draws along its first axis.

What is modelled:

- **Elementwise results**: relative error up to u. Library functions (exp, log, …) promise one ulp, so up to 2u.
- **Sums and products** over K terms: the rounding errors of the partial sums add up like a random walk, and no code
  adds more than a few hundred terms in one chain. For terms of either sign that is u_acc·(√min(K, 512)·√Σ(aₖbₖ)² +
  |result|). Partial sums of one sign grow towards the result, which adds min(K, 128)/3·result² under the root (without
  it real float32 products of positive matrices err by 2 to 3 spreads). Equal terms round alike again and again, and
  their errors add up without a walk: min(K, 256)/4·|result| (otherwise 10 to 40 spreads).
- **Mixed precision**: operands of `@` are rounded to `product_input` first, its results to `product_output`.
- **Range**: a result beyond the largest number is infinite; every result carries an absolute error of half the smallest
  subnormal, which is all that is left of a number below it. A sum within the range whose terms add up to more without
  their signs is infinite in every second draw: whether its partial sums stay in the range is a matter of their order.
- **Constants**: a Python number that the format cannot hold enters rounded, everywhere in the same way.
- **Exact operations** stay exact: multiplication by a power of two, adding zero, negation, maximum, comparison.
- **Rounding is a function of its operands**: the error is a hash of the result and of a key of the operation in this
  draw, so that equal entries get equal errors, as they do in a machine. (Independent errors would average out over a
  constant tensor, and no honest code could keep to the budget.)
- **Wide results**: `dtype=np.float64` in a reference page means float64 in every precision, and is simulated as such.
- **Numbers computed on the way** err if a page computes them as 0-dimensional arrays like its input; as Python numbers
  they would be constants. For 1 − βᵗ that would be too little in float64, which holds what is left after cancellation
  exactly, though βᵗ itself was rounded: pow(β, t) and exp2(t·log₂β) may be a few units apart, and the weight then
  βᵗ/(1 − βᵗ) times as many, which every entry of a tensor that is divided by it has in common.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

Plain: TypeAlias = np.ndarray[Any, np.dtype[Any]]

LONGEST_CHAIN = 512
"""Terms that code adds up in one chain at most: longer sums are blocked, and their error grows no further."""

EQUAL = 2.0**-26
"""Terms count as equal if K·Σ(aₖbₖ)² exceeds the squared sum, which it does unless all are equal, by no more."""

EXACT = {
    *(np.negative, np.positive, np.absolute, np.fabs, np.sign, np.copysign, np.conjugate),
    *(np.minimum, np.maximum, np.fmin, np.fmax, np.floor, np.ceil, np.rint, np.trunc, np.ldexp),
    *(np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal),
    *(np.isfinite, np.isnan, np.isinf, np.signbit, np.logical_and, np.logical_or, np.logical_not),
    *(np.bitwise_and, np.bitwise_or, np.invert),
}
ROUNDED = {np.add, np.subtract, np.multiply, np.divide, np.square, np.sqrt, np.reciprocal}
LIBRARY = {np.exp, np.expm1, np.exp2, np.log, np.log1p, np.log2, np.log10, np.tanh, np.power, np.float_power, np.cbrt}
"""Vector mathematics libraries promise one ulp, two unit roundoffs."""


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


def coarsened(arithmetic: Arithmetic, factor: float) -> Arithmetic:
    """The same with errors that many times as large, where they are not larger already for the sake of products."""
    elementwise = factor * arithmetic.elementwise
    accumulate, smallest = max(arithmetic.accumulate, elementwise), factor * arithmetic.smallest
    return replace(arithmetic, elementwise=elementwise, accumulate=accumulate, smallest=smallest)


class Source:
    """Where the errors of all draws come from: the arithmetic, the random keys, and how each constant was rounded."""

    def __init__(self, arithmetic: Arithmetic, rng: np.random.Generator, draws: int) -> None:
        self.arithmetic, self.draws = arithmetic, draws
        self._rng = rng
        self._constants: dict[float, Plain] = {}

    def keys(self) -> Plain:
        """For one operation, a fresh key of each draw."""
        keys: Plain = self._rng.bit_generator.random_raw(self.draws)
        return keys

    def constant(self, value: float) -> Plain:
        """A Python number as the format holds it: exact if it can, else off by up to one unit roundoff in each draw."""
        if value not in self._constants:
            u = self.arithmetic.elementwise
            significand = math.frexp(value)[0] / u if math.isfinite(value) else 0.0
            exact = significand == math.floor(significand) and abs(value) >= self.arithmetic.smallest
            self._constants[value] = np.asarray(value) if exact else self._rounded(np.full(self.draws, value))
        return self._constants[value]

    def _rounded(self, values: Plain) -> Plain:
        return _perturb(values, self.arithmetic.elementwise * values, None, self.arithmetic, self.keys())

    def inner(self, arithmetic: Arithmetic) -> "Source":
        """Of another arithmetic for a part of a computation; constants enter it as outside, keys go on."""
        return _Inner(arithmetic, self)


class _Inner(Source):
    def __init__(self, arithmetic: Arithmetic, outer: Source) -> None:
        super().__init__(arithmetic, outer._rng, outer.draws)  # noqa: SLF001  # the same stream of keys goes on
        self._outer = outer

    def constant(self, value: float) -> Plain:
        return self._outer.constant(value)


def entered(x: Plain, source: Source) -> Plain:
    """Values of another format as that of the source holds them."""
    return _perturb(x, source.arithmetic.elementwise * x, x == 0, source.arithmetic, source.keys())


def elementwise(
    ufunc: np.ufunc, operands: list[Plain], scalars: list[bool], arithmetic: Arithmetic, source: Source
) -> Plain:
    """The result of a ufunc on operands that broadcast, of which some are one number a draw.

    Raises:
        TypeError: The error of the function is not known.
    """
    if ufunc not in EXACT | ROUNDED | LIBRARY:
        raise TypeError(f"np.{ufunc.__name__} has no noise model: add it to noise.py if its error is known")
    result: Plain = ufunc(*operands)
    if ufunc in EXACT:
        return result
    u = arithmetic.elementwise * (2 if ufunc in LIBRARY else 1)
    return _perturb(result, u * result, _is_exact(ufunc, operands, scalars), arithmetic, source.keys())


def reduced(ufunc: np.ufunc, x: Plain, options: dict[str, Any], arithmetic: Arithmetic, source: Source) -> Plain:
    """A sum, maximum or minimum; `options` are axis and keepdims.

    Raises:
        TypeError: Another reduction.
    """
    result = np.asarray(ufunc.reduce(x, **options))
    if ufunc in EXACT:
        return result
    if ufunc is not np.add:
        raise TypeError(f"np.{ufunc.__name__}.reduce has no noise model: only sums, maxima and minima have one")
    terms = x.size // max(result.size, 1)

    def sums(values: Plain) -> Plain:
        return np.asarray(np.add.reduce(values, **options))

    length = _root_of(sums, x)
    found = _accumulated(result, length, terms, terms <= 1, arithmetic, source.keys())
    return _in_any_order(found, length * math.sqrt(terms), lambda: sums(np.abs(x)), arithmetic)


def product(a: Plain, b: Plain, arithmetic: Arithmetic, source: Source) -> Plain:
    """The product of the matrices in the last two dimensions."""
    if arithmetic.product_input:
        keys = source.keys()  # one a draw for both sides: in X @ X.T an entry is rounded alike in either place
        a, b = (_perturb(x, arithmetic.product_input * x, x == 0, arithmetic, keys) for x in (a, b))
    terms = a.shape[-1]
    length = _root_of(np.matmul, a, b)
    found = _accumulated(np.matmul(a, b), length, terms, False, arithmetic, source.keys())
    return _in_any_order(found, length * math.sqrt(terms), lambda: np.matmul(np.abs(a), np.abs(b)), arithmetic)


def _root_of(add: Callable[..., Plain], *operands: Plain) -> Plain:
    """The root of the sum or product of the operands' squares, which are scaled where float64 cannot hold them."""
    with np.errstate(over="ignore", invalid="ignore"):
        root = np.sqrt(add(*map(np.square, operands)))
        if bool(np.isfinite(root).all()):
            return root
        largest = [np.max(np.abs(x), where=np.isfinite(x), initial=1.0) for x in operands]
        scales = [np.ldexp(1.0, np.frexp(size)[1] - 1) for size in largest]
        scaled = [np.square(x / scale) for x, scale in zip(operands, scales, strict=True)]
        return np.asarray(math.prod(scales) * np.sqrt(add(*scaled)))


def _accumulated(result: Plain, length: Plain, terms: int, exact: bool, arithmetic: Arithmetic, keys: Plain) -> Plain:
    """A sum of `terms` numbers, the 2-norm of which is `length`."""
    size = np.abs(result)
    equal = math.sqrt(terms) * length <= size * (1 + EQUAL / 2)
    drift = np.where(equal, min(terms, 256) / 4, math.sqrt(min(terms, 128) / 3)) * size
    walk = np.hypot(math.sqrt(min(terms, LONGEST_CHAIN)) * length, drift)
    amplitude = arithmetic.accumulate * (walk + size) + arithmetic.product_output * size
    return _perturb(result, np.copysign(amplitude, result), np.asarray(exact), arithmetic, keys)


def _in_any_order(found: Plain, bound: Plain, magnitudes: Callable[[], Plain], arithmetic: Arithmetic) -> Plain:
    """Sums, every second draw infinite where the magnitudes of the terms, at most `bound`, leave the range together."""
    if not (bound > arithmetic.largest).any():
        return found
    found[1::2][magnitudes()[1::2] > arithmetic.largest] = np.inf
    return found


def _perturb(x: Plain, amplitude: Plain, exact: Plain | None, arithmetic: Arithmetic, keys: Plain) -> Plain:
    """Add an error up to `amplitude`, which has the sign of x, where the operation is not exact (None: it never is).

    What leaves the range of the format becomes infinite, or is off by half its smallest number.
    """
    error = _hash(x, keys.reshape(-1, *[1] * (x.ndim - 1)))
    y = amplitude * error
    y += x
    above = np.abs(y)
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


def _hash(x: Plain, keys: Plain) -> Plain:
    """A number in [-1, 1) for every entry, a function of its magnitude and its draw's key: multiply, fold, multiply."""
    z = np.abs(x).view(np.uint64)
    z ^= keys
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


def _is_exact(ufunc: np.ufunc, operands: list[Plain], scalars: list[bool]) -> Plain | None:
    """Where the operation has no rounding error whatever the format: the other operand says so."""
    if ufunc is np.add or ufunc is np.subtract:
        return np.asarray((operands[0] == 0) | (operands[1] == 0))
    if ufunc is np.multiply:
        return _any_power_of_two(operands, scalars)
    if ufunc is np.divide:
        return _is_power_of_two(operands[1])
    return None


def _any_power_of_two(operands: list[Plain], scalars: list[bool]) -> Plain:
    """Where either is a power of two. Of a scalar and an array the scalar decides, which is quicker."""
    a, b = operands
    if any(scalars):
        return _is_power_of_two(a if scalars[0] else b)
    return _is_power_of_two(a) | _is_power_of_two(b)


def _is_power_of_two(x: Plain) -> Plain:
    """Powers of two and zero, whose significand has no bit set."""
    bits = np.abs(x.astype(np.float64, copy=False)).view(np.uint64)
    return np.asarray((bits & _SIGNIFICAND) == 0)
