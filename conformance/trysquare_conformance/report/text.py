"""How the reports write numbers and text that came from elsewhere."""

import math
import re
from collections.abc import Sequence
from typing import Any

SIGNIFICANT = 3
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Controls (an escape sequence can repaint a terminal), lone surrogates and non-characters (no encoding, no XML) and
# bidirectional overrides (they let a text look like another one).
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]")


def clean(text: object) -> str:
    """The text on one line, with every character that is unfit for print shown as its escape."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def clean_lines(text: object) -> str:
    """As `clean`, but lines stay lines."""
    return "\n".join(clean(line) for line in str(text).splitlines())


def number(value: float | str | None) -> float | None:
    """A number of the JSON, where NaN and the infinities are strings."""
    return None if value is None else float(value)


def figure(value: float | str | None) -> str:
    """Three significant digits: 0.0314, 2.72, 1.2e-07 as 1.20e-7."""
    amount = number(value)
    if amount is None:
        return "–"
    if not math.isfinite(amount):
        return "NaN" if math.isnan(amount) else "∞" if amount > 0 else "−∞"
    if amount != 1 and round(amount, SIGNIFICANT - 1) == 1:
        return _beside_1(amount)
    mantissa, exponent = f"{amount:.{SIGNIFICANT - 1}e}".split("e")
    if amount == 0 or -3 < int(exponent) < SIGNIFICANT:
        return f"{amount:.{max(0, SIGNIFICANT - 1 - int(exponent))}f}" if amount else "0"
    return f"{mantissa}e{int(exponent)}"


def _beside_1(amount: float) -> str:
    """As many digits as tell the number from 1, where a margin turns from right to wrong."""
    return next(text for digits in range(SIGNIFICANT, 18) if float(text := f"{amount:.{digits}g}") != 1)


def typeset(value: float | str | None) -> str:
    """As `figure`, the power of ten set as one: 1.20 × 10⁻⁷."""
    mantissa, _, exponent = figure(value).partition("e")
    return f"{mantissa} × 10{exponent.translate(_SUPERSCRIPT)}" if exponent else mantissa.replace("-", "−")


def exact(value: float | str | None) -> str:
    """Digits enough to tell two neighbouring float32 apart."""
    amount = number(value)
    return figure(value) if amount is None or not math.isfinite(amount) else f"{amount:.9g}"


def roundoff(value: float | str) -> str:
    """A unit roundoff as the power of two that it is: 2⁻²⁴; anything else as a figure."""
    amount = number(value)
    if amount and math.isfinite(amount) and math.frexp(amount)[0] == 0.5:
        return "2" + str(math.frexp(amount)[1] - 1).translate(_SUPERSCRIPT)
    return figure(value)


def count(amount: int, noun: str) -> str:
    """`1 case`, `2 cases`."""
    return f"{digits(amount)} {noun}" if amount == 1 else f"{digits(amount)} {noun}s"


def digits(amount: int) -> str:
    """`1204`, `20,000`."""
    return f"{amount:,}" if amount >= 10_000 else str(amount)


def duration(seconds: float | str) -> str:
    """`0.42 s`, `12 s`, `3 min 20 s`."""
    amount = number(seconds) or 0.0
    if not math.isfinite(amount):
        return f"{figure(amount)} s"
    if amount < 60:
        return f"{amount:.2g} s" if amount < 10 else f"{amount:.0f} s"
    minutes, rest = divmod(round(amount), 60)
    return f"{minutes} min {rest} s"


def place(output: str | None, index: Sequence[int]) -> str:
    """The entry of an output: update/0[3, 17]."""
    return f"{output or 'output'}[{', '.join(map(str, index))}]"


def joined(flags: dict[str, Any]) -> str:
    """`name=value, name=value`, or that there are none."""
    return ", ".join(f"{name}={value}" for name, value in flags.items()) or "none set"
