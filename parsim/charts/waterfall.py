"""Waterfall: how a time becomes another, part after part: what a step is made of, or why it is off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from parsim.charts.palette import MUTED_COLOR, SERIES_COLORS, TEXT_COLOR
from parsim.charts.style import (
    SMALL_PT,
    Entry,
    file_format,
    grow,
    header,
    lighter,
    new_figure,
    save,
    style,
    time_unit,
)
from parsim.errors import ParsimError
from parsim.units import format_duration, percent

_WIDTH_IN = 9.0
_BAR_IN = 0.36
_LETTER_IN = 0.078
"""Mean width of a letter of the words at the left."""
_LEAST_SHARE = 0.004
"""A part below this share of the axis is drawn this wide, to be seen at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waterfall:
    """A time that parts make longer or shorter, one after another."""

    name: str
    finding: str
    note: str
    parts: tuple[tuple[str, float], ...]
    """Words and seconds, below 0 where the time gets shorter."""
    begin: str = ""
    """What the time at the beginning is; "": it begins with nothing, and is not shown."""
    begin_s: float = 0.0
    end: str = "step"

    @property
    def end_s(self) -> float:
        return self.begin_s + sum(seconds for _, seconds in self.parts)


def draw_waterfall(waterfall: Waterfall, path: Path) -> None:
    """Write a waterfall to a .png, .svg or .pdf file.

    Raises ParsimError for another suffix, or where there is no time at all.
    """
    file_format(path)
    save(waterfall_figure(waterfall), path)


def waterfall_figure(waterfall: Waterfall) -> Figure:
    """A waterfall as a figure, from the top down.

    Where it begins with nothing the axis does too; else it shows the times that occur, and the two ends
    are points, not bars, so that no length lies.
    """
    if not waterfall.parts or not max(waterfall.begin_s, waterfall.end_s) > 0:
        raise ParsimError("there is no time to draw a waterfall of", where=waterfall.name)
    longer, shorter = _colors(waterfall)
    legend: list[Entry] = [("longer", [longer]), ("shorter", [shorter])] if waterfall.begin else []
    names = [waterfall.begin, *(what for what, _ in waterfall.parts), waterfall.end]
    left_in = 0.4 + _LETTER_IN * max(map(len, names))
    rows = len(waterfall.parts) + (2 if waterfall.begin else 1)
    with style():
        figure = new_figure(_WIDTH_IN)
        header_in = header(figure, waterfall.finding, waterfall.note, legend, name=waterfall.name)
        (axes,) = grow(figure, header_in, [_BAR_IN * rows + 0.1], 0.0, left_in=left_in)
        _draw(axes, waterfall)
    return figure


def _colors(waterfall: Waterfall) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    longer = SERIES_COLORS[1] if waterfall.begin else SERIES_COLORS[0]
    return lighter(longer, 0.0), lighter(SERIES_COLORS[6], 0.0)


def _draw(axes: Axes, waterfall: Waterfall) -> None:
    levels_s = list(accumulate((s for _, s in waterfall.parts), initial=waterfall.begin_s))
    unit, unit_s = time_unit(max(levels_s))
    low_s, high_s = _limits(waterfall, levels_s)
    least = _LEAST_SHARE * (high_s - low_s) / unit_s
    first = 1 if waterfall.begin else 0
    end = first + len(waterfall.parts)
    longer, shorter = _colors(waterfall)
    for place, ((_, seconds), from_s) in enumerate(zip(waterfall.parts, levels_s, strict=False), first):
        width = seconds / unit_s
        wide = width if abs(width) >= least else (least if seconds >= 0 else -least)
        axes.barh(place, wide, left=from_s / unit_s, height=0.6, color=longer if width >= 0 else shorter)
        share = percent(abs(seconds) / waterfall.end_s)
        sign = "" if not waterfall.begin else ("+" if seconds >= 0 else "−")
        text = f"{sign}{format_duration(abs(seconds))}, {share}"
        _say(axes, text, max(from_s, from_s + seconds, from_s + wide * unit_s) / unit_s, place)
        level = (from_s + seconds) / unit_s
        axes.plot([level, level], [place - 0.3, place + 1.3], color=MUTED_COLOR, linewidth=0.7, zorder=1)
    if waterfall.begin:
        _end(axes, waterfall.begin_s, 0, unit_s, bar=False)
        axes.plot([levels_s[0] / unit_s] * 2, [0, 1.3], color=MUTED_COLOR, linewidth=0.7, zorder=1)
    _end(axes, levels_s[-1], end, unit_s, bar=not waterfall.begin)
    names = [waterfall.begin] * first + [what for what, _ in waterfall.parts] + [waterfall.end]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(end + 0.6, -0.6)
    axes.set_xlim(low_s / unit_s, high_s / unit_s)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color="#EDEDED", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"step time ({unit})")


def _limits(waterfall: Waterfall, levels_s: Sequence[float]) -> tuple[float, float]:
    """What the axis shows: room to the right for the words at the bars."""
    if not waterfall.begin:
        return 0.0, 1.2 * max(levels_s)
    span_s = max(max(levels_s) - min(levels_s), 0.02 * max(levels_s))
    return max(0.0, min(levels_s) - 0.1 * span_s), max(levels_s) + 0.3 * span_s


def _end(axes: Axes, at_s: float, place: int, unit_s: float, *, bar: bool) -> None:
    """The time at the beginning or at the end."""
    if bar:
        axes.barh(place, at_s / unit_s, height=0.6, color=TEXT_COLOR)
    else:
        axes.plot([at_s / unit_s], [place], marker="D", markersize=6.5, color=TEXT_COLOR, zorder=3)
    _say(axes, format_duration(at_s), at_s / unit_s, place, bold=True, away_pt=4 if bar else 8)


def _say(axes: Axes, text: str, x: float, y: float, *, bold: bool = False, away_pt: float = 4.0) -> None:
    axes.annotate(
        text,
        (x, y),
        xytext=(away_pt, 0),
        textcoords="offset points",
        va="center",
        size=SMALL_PT - 0.5,
        weight="bold" if bold else "normal",
        color=TEXT_COLOR,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6},
        zorder=2,
    )
