"""Plots as geometry: axes with their ticks, lines and points, in the pixels of an SVG's view box."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 760.0, 330.0
LEFT, RIGHT, TOP, BOTTOM = 74.0, 18.0, 14.0, 46.0
MOST_TICKS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A scale from data to a share of the plot's width or height."""

    label: str
    low: float
    high: float
    log: bool
    ticks: tuple[tuple[float, str], ...]
    """Shares of the axis and their words."""

    def share(self, value: float) -> float:
        """Where a value lies, 0 at the low end and 1 at the high one."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A point, in data; the words of its tooltip."""

    x: float
    y: float
    text: str
    series: int = 0
    hollow: bool = False
    ringed: bool = False
    label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A polyline, in data."""

    points: tuple[tuple[float, float], ...]
    color: str
    """A class of the style sheet, such as s0."""
    text: str = ""
    steps: bool = False
    """A value holds until the next point."""
    dashed: bool = False
    strong: bool = False
    faint: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A line across the plot at one value of an axis."""

    value: float
    text: str
    vertical: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """Lines, points and rules between two axes."""

    alt: str
    """The plot in a sentence, for those who cannot see it."""
    x: Axis
    y: Axis
    lines: tuple[Line, ...] = ()
    points: tuple[Point, ...] = ()
    rules: tuple[Rule, ...] = ()
    legend: tuple[tuple[str, str], ...] = ()
    """Colour classes and their words."""

    width, height = WIDTH, HEIGHT
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM

    def at_x(self, value: float) -> float:
        """A value's place in pixels, kept within the plot."""
        share = min(max(self.x.share(value), 0.0), 1.0)
        return round(LEFT + share * (self.right - LEFT), 1)

    def at_y(self, value: float) -> float:
        """A value's place in pixels from the top, kept within the plot."""
        share = min(max(self.y.share(value), 0.0), 1.0)
        return round(self.bottom - share * (self.bottom - TOP), 1)

    @property
    def radius(self) -> float:
        """Of a point: many are small."""
        return 5.0 if len(self.points) <= 60 else 3.0 if len(self.points) <= 600 else 2.2

    def labelled(self) -> list[tuple[Point, str]]:
        """Points with their labels, left out where another stands; a ringed one's comes first."""
        placed: list[tuple[float, float]] = []
        kept: dict[int, str] = {}
        for i, point in sorted(enumerate(self.points), key=lambda each: not each[1].ringed):
            x, y = self.at_x(point.x), self.at_y(point.y)
            wide = 7.0 * len(point.label)
            if point.label and all(abs(x - a) > wide + 4 or abs(y - b) > 12 for a, b in placed):
                kept[i] = point.label
                placed.append((x, y))
        return [(point, kept.get(i, "")) for i, point in enumerate(self.points)]

    def path(self, line: Line) -> str:
        """A line as an SVG path.

        >>> axis = Axis(label="", low=0.0, high=1.0, log=False, ticks=())
        >>> plot = Plot(alt="", x=axis, y=axis)
        >>> plot.path(Line(points=((0, 0), (1, 1)), color="s0", steps=True))
        'M74 284H742V14'
        """
        words: list[str] = []
        for x, y in line.points:
            px, py = f"{self.at_x(x):g}", f"{self.at_y(y):g}"
            if not words:
                words.append(f"M{px} {py}")
            elif line.steps:
                words.append(f"H{px}V{py}")
            else:
                words.append(f"L{px} {py}")
        return "".join(words)

    def x_ticks(self) -> list[tuple[float, str]]:
        """Ticks of the x axis in pixels."""
        return [(round(LEFT + share * (self.right - LEFT), 1), text) for share, text in self.x.ticks]

    def y_ticks(self) -> list[tuple[float, str]]:
        """Ticks of the y axis in pixels from the top."""
        high = self.bottom - TOP
        return [(round(self.bottom - share * high, 1), text) for share, text in self.y.ticks]


Text = Callable[[float], str]


def linear_axis(
    label: str,
    values: Iterable[float],
    text: Text,
    *,
    zero: bool = True,
    exact: bool = False,
    unit: float = 1.0,
) -> Axis:
    """An axis with round ticks, in multiples of `unit`, over values.

    It begins at zero unless told otherwise, and ends at a tick or, if `exact`, with the values.
    """
    known = [value / unit for value in values]
    low, high = (min(known, default=0.0), max(known, default=1.0))
    low = min(0.0, low) if zero else low
    if not high > low:
        low, high = (low, low + 1.0) if zero else (low - 0.5, high + 0.5)
    step = _round_step((high - low) / (MOST_TICKS - 2))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if not exact:
        low, high = first * step, last * step
    marks = [
        k * step for k in range(first, last + 1) if low <= k * step * (1 + 1e-9) and k * step <= high
    ]
    ticks = tuple(((mark - low) / (high - low), text(mark * unit)) for mark in marks)
    return Axis(label=label, low=low * unit, high=high * unit, log=False, ticks=ticks)


def _round_step(least: float) -> float:
    """The next 1, 2 or 5 times a power of ten.

    >>> _round_step(0.3), _round_step(1.7), _round_step(30)
    (0.5, 2.0, 50.0)
    """
    size = 10.0 ** math.floor(math.log10(least))
    return next(factor * size for factor in (1.0, 2.0, 5.0, 10.0) if factor * size >= least * 0.999)


def log_axis(
    label: str, values: Iterable[float], text: Text, *, room: float = 1.15, at: Sequence[float] = ()
) -> Axis:
    """A logarithmic axis over positive values with room at its ends; ticks `at` values, or round."""
    known = [value for value in values if value > 0] or [1.0]
    low, high = min(known) / room, max(known) * room
    marks = [value for value in at if low <= value <= high] or list(_log_marks(low, high))
    span = math.log(high / low)
    ticks = tuple((math.log(value / low) / span, text(value)) for value in marks)
    return Axis(label=label, low=low, high=high, log=True, ticks=ticks)


def _log_marks(low: float, high: float) -> Iterator[float]:
    """Round values between two, not too many."""
    for factors in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,)):
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        marks = [f * 10.0**e for e in exponents for f in factors if low <= f * 10.0**e <= high]
        if len(marks) <= MOST_TICKS or factors == (1,):
            yield from marks[:: max(1, len(marks) // MOST_TICKS)]
            return
