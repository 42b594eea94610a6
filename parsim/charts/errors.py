"""Predicted against measured step times of many runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from parsim.charts.palette import MUTED_COLOR, SERIES_COLORS
from parsim.charts.style import (
    SMALL_PT,
    counted,
    file_format,
    grow,
    header,
    new_figure,
    save,
    style,
)
from parsim.errors import ParsimError
from parsim.units import format_duration, percent

Comparison = tuple[str, float, float]
"""(group, measured_s, predicted_s) of one run."""

BAND = 0.10
"""Half width of the band around the diagonal, as a share of the measured time."""
_WIDTH_IN = 8.5
_PANEL_IN = 6.2
_ROOMY_GROUPS = 15
"""More names than this are written smaller, to stay above the diagonal."""
_MARKERS = "osD^vP*X"


def draw_predicted_measured(rows: Sequence[Comparison], path: Path, *, title: str) -> None:
    """Write predicted over measured step times on log axes to a .png, .svg or .pdf file.

    Each group has a colour and a marker, and its median absolute error |predicted / measured - 1| in
    the legend. Raises ParsimError for another suffix, no rows, or a time that is not positive.
    """
    file_format(path)
    save(predicted_measured_figure(rows, title=title), path)


def predicted_measured_figure(rows: Sequence[Comparison], *, title: str) -> Figure:
    """Predicted over measured step times on log axes as a figure."""
    if not rows:
        raise ParsimError("there are no runs to draw", expected="one or more")
    for group, measured_s, predicted_s in rows:
        if not (0 < measured_s < math.inf and 0 < predicted_s < math.inf):
            raise ParsimError(
                "a log axis shows positive times only",
                where=group,
                got=f"measured {measured_s} s, predicted {predicted_s} s",
            )
    groups = sorted({group for group, _, _ in rows})
    errors = [abs(predicted_s / measured_s - 1) for _, measured_s, predicted_s in rows]
    inside = sum(error <= BAND for error in errors)
    with style():
        figure = new_figure(_WIDTH_IN)
        subtitle = (
            f"{counted(len(rows), 'run')}, median error {percent(median(errors))}; "
            f"{inside} of them within {percent(BAND)} (the band)"
        )
        header_in = header(figure, title, subtitle)
        (axes,) = grow(figure, header_in, [_PANEL_IN], 0.0)
        _draw_diagonal(axes, rows)
        for i, group in enumerate(groups):
            _draw_group(axes, group, [row for row in rows if row[0] == group], i)
        size_pt = min(SMALL_PT, SMALL_PT * _ROOMY_GROUPS / len(groups))
        axes.legend(
            loc="upper left", fontsize=size_pt, frameon=False, handletextpad=0.3, borderaxespad=0.3
        )
    return figure


def _draw_diagonal(axes: Axes, rows: Sequence[Comparison]) -> None:
    times = [time_s for _, *pair in rows for time_s in pair]
    low, high = min(times) / 1.5, max(times) * 1.5
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.fill_between(
        [low, high],
        [low * (1 - BAND), high * (1 - BAND)],
        [low * (1 + BAND), high * (1 + BAND)],
        color="#E4E4E4",
        linewidth=0,
        zorder=0,
    )
    axes.plot([low, high], [low, high], color=MUTED_COLOR, linewidth=0.9, zorder=1)
    subs = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter(FuncFormatter(lambda value, _: format_duration(value)))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(color="#EDEDED", linewidth=0.6, zorder=0.5)
    axes.set_axisbelow(True)
    axes.set_xlabel("measured step time (log scale)")
    axes.set_ylabel("predicted step time (log scale)")


def _draw_group(axes: Axes, group: str, rows: Sequence[Comparison], place: int) -> None:
    error = median(abs(predicted_s / measured_s - 1) for _, measured_s, predicted_s in rows)
    round_trip = place // len(SERIES_COLORS)
    (points,) = axes.plot(
        [measured_s for _, measured_s, _ in rows],
        [predicted_s for _, _, predicted_s in rows],
        _MARKERS[(place + round_trip) % len(_MARKERS)],
        color=SERIES_COLORS[place % len(SERIES_COLORS)],
        markersize=6,
        markeredgecolor="white",
        markeredgewidth=0.5,
        alpha=0.9,
        label=f"{group}: {counted(len(rows), 'run')}, median error {percent(error)}",
        zorder=3,
    )
    points.set_gid(f"group {place}")
