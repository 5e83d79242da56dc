"""The margin strip plot: where each dot stands. One strip a lane and dtype, a logarithmic axis, the line at 1."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trysquare_conformance.report.schema import Result, Row
from trysquare_conformance.report.summary import BAD, SEVERITY, dtype_order
from trysquare_conformance.report.text import clean, figure, number

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 980, 190, 24, 34, 30
GUTTER = 84  # the columns beside the axis: no error at all on the left, no finite margin on the right
DOT = 5
HALF_LOW, HALF_HIGH, GAP = 9, 36, 7
NAMED = 300  # cases that are not right have a tooltip each, up to so many; beyond, those that have a card
SHAPES = {
    "wrong": "m0-4.4l4.4 4.4-4.4 4.4-4.4-4.4z",
    "error": "m0-4.4l4.4 4.4-4.4 4.4-4.4-4.4z",
    "could not tell": "m0-3.6l3.6 6.4h-7.2z",
    "expected failure": "m-2.3 0a2.3 2.3 0 1 0 4.6 0a2.3 2.3 0 1 0-4.6 0z",
}
DECADES = (-6, 6)  # the axis never reaches further: a margin of 1e30 must not squeeze the rest

Columns = dict[int, list[Row]]
Cards = Mapping[tuple[str, str], str]  # lane and case to the card of a failure


@dataclass(frozen=True)
class Axis:
    """Decades `low` to `high`, between the pixels `start` and `end`; a gutter is None where nothing stands in it."""

    low: int
    high: int
    start: float
    end: float
    nothing: float | None
    infinite: float | None

    def at(self, margin: float) -> float:
        """The pixel of a margin."""
        if margin < 10.0**self.low:
            return self.start if self.nothing is None else self.nothing
        if not margin <= 10.0**self.high:
            return self.end if self.infinite is None else self.infinite
        return self.start + (self.end - self.start) * (math.log10(margin) - self.low) / (self.high - self.low)

    def column(self, margin: float) -> int:
        """The column of dots of a margin. The line at 1 runs between two: no dot is drawn across it."""
        return math.ceil((self.at(margin) - self.at(1)) / DOT) - 1

    def middle(self, column: int) -> float:
        """The pixel of a column's dots."""
        return round(self.at(1) + (column + 0.5) * DOT, 1)

    def ticks(self) -> list[tuple[float, str]]:
        """The decades: pixel and label."""
        return [(self.at(10.0**decade), _decade(decade)) for decade in range(self.low, self.high + 1)]


@dataclass(frozen=True)
class Dot:
    """A case that is drawn for itself, with its words and the card that it leads to."""

    path: str
    status: str
    title: str
    card: str


@dataclass(frozen=True)
class Strip:
    """The cases of one lane and dtype: each for itself, or as part of the path of its status."""

    lane: str
    dtype: str
    cases: int
    y: float
    half: float
    named: list[Dot]
    paths: dict[str, str]


@dataclass(frozen=True)
class Plot:
    """Everything that the template draws. A round dot stands for up to `share` cases that are right."""

    height: float
    axis: Axis
    strips: list[Strip]
    share: int


def plot(result: Result, cards: Cards) -> Plot | None:
    """Lay out the rows that have a margin or should have had one; None if there is none."""
    rows = [row for row in result["results"] if row["margin"] is not None or row["status"] in BAD]
    if not rows:
        return None
    axis = _axis([_margin(row) for row in rows])
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["lane"], row["dtype"]), []).append(row)
    lanes = [lane["name"] for lane in result["lanes"]]
    keys = sorted(found, key=lambda key: (lanes.index(key[0]) if key[0] in lanes else len(lanes), dtype_order(key[1])))
    if sum(row["status"] != "right" for row in rows) <= NAMED:
        cards = {(row["lane"], row["case"]): "" for row in rows} | dict(cards)
    columns = {key: _columns(found[key], axis) for key in keys}
    share = _share(list(columns.values()), axis)
    strips: list[Strip] = []
    y: float = TOP
    for key in keys:
        strips.append(_strip(key, columns[key], axis, share, y, cards))
        y += 2 * strips[-1].half + GAP
    return Plot(y + BOTTOM, axis, strips, share)


def _margin(row: Row) -> float:
    margin = number(row["margin"])
    return math.inf if margin is None or math.isnan(margin) else margin


def _axis(margins: Sequence[float]) -> Axis:
    powers = [math.log10(margin) for margin in margins if 10.0 ** DECADES[0] <= margin <= 10.0 ** DECADES[1]]
    low = min(math.floor(min(powers, default=-1)), -1)
    high = max(math.ceil(max(powers, default=1)), 1)
    nothing, infinite = any(m < 10.0**low for m in margins), any(m > 10.0**high for m in margins)
    start = LEFT + (GUTTER if nothing else DOT)
    end = WIDTH - RIGHT - (GUTTER if infinite else DOT)
    return Axis(low, high, start, end, start - GUTTER / 2 if nothing else None, end + GUTTER / 2 if infinite else None)


def _columns(rows: list[Row], axis: Axis) -> Columns:
    """The rows by the column of dots that they fall into, the gravest first."""
    columns: Columns = {}
    for row in sorted(rows, key=lambda row: SEVERITY.index(row["status"])):
        columns.setdefault(axis.column(_margin(row)), []).append(row)
    return dict(sorted(columns.items()))


def _share(strips: list[Columns], axis: Axis) -> int:
    """How many cases a round dot stands for, so that the tallest column within the axis fits its strip."""
    first = axis.column(10.0**axis.low)
    tallest = max((_right(stack) for columns in strips for at, stack in columns.items() if at >= first), default=0)
    return max(1, math.ceil(tallest * DOT / (2 * HALF_HIGH)))


def _right(stack: list[Row]) -> int:
    return sum(row["status"] == "right" for row in stack)


def _strip(key: tuple[str, str], columns: Columns, axis: Axis, share: int, top: float, cards: Cards) -> Strip:
    drawn = {at: _drawn(stack, share) for at, stack in columns.items()}
    half = min(HALF_HIGH, max(HALF_LOW, max(map(len, drawn.values())) * DOT / 2))
    named: list[Dot] = []
    paths: dict[
        str, dict[str, None]
    ] = {}  # ordered sets: where a column is squeezed, dots that coincide are drawn once
    for at, stack in drawn.items():
        x = axis.middle(at)
        for row, y in zip(stack, _heights(len(stack), top + half, half), strict=True):
            place, status, card = f"M{x:g} {y:g}", row["status"], cards.get((row["lane"], row["case"]))
            if status == "right" or card is None:
                paths.setdefault(status, {})[place + SHAPES.get(status, "h0")] = None
            else:
                named.append(Dot(place + SHAPES[status], status, _title(row), card))
    cases = sum(map(len, columns.values()))
    joined = {status: "".join(parts) for status, parts in paths.items()}
    return Strip(clean(key[0]), clean(key[1]), cases, top + half, half, named, joined)


def _drawn(stack: list[Row], share: int) -> list[Row]:
    """Every row that is not right, and one in `share` of those that are."""
    right = [row for row in stack if row["status"] == "right"]
    return [row for row in stack if row["status"] != "right"] + right[::share]


def _heights(amount: int, middle: float, half: float) -> list[float]:
    """A column of dots around the middle, the first at the middle, squeezed where it would leave the strip."""
    apart = min(DOT, (2 * half - DOT) / max(1, amount - 1))
    return [round(2 * (middle + (rank + 1) // 2 * apart * (-1) ** rank)) / 2 for rank in range(amount)]


def _title(row: Row) -> str:
    return clean(f"{row['status']}, margin {figure(row['margin'])}: {row['case']} in {row['lane']}")


def _decade(power: int) -> str:
    if -3 <= power <= 3:
        return f"{10.0**power:g}"
    return "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
