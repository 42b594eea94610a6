"""Goodput of a long run over its checkpoint interval."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

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
from parsim.cost.checkpoint import young_interval_s
from parsim.simulate.faults import LongRun
from parsim.units import format_duration

_WIDTH_IN = 9.0
_PANEL_IN = 4.4
_SHOWN = 17
"""Points of the curve that are drawn with their bars."""
_APART = 0.1
"""An interval that is nearer to the best than this share is not marked beside it."""
_TICKS_S = [
    size_s * count
    for size_s, counts in (
        (1, (1, 3, 10, 30)),
        (60, (1, 3, 10, 30)),
        (3600, (1, 3, 10)),
        (86400, (1, 3, 10)),
    )
    for count in counts
]


def _tick(seconds: float) -> str:
    unit, size_s = next(
        (unit, size_s)
        for unit, size_s in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
        if seconds >= size_s
    )
    return f"{seconds / size_s:.0f} {unit}"


def draw_goodput(run: LongRun, path: Path, *, title: str) -> None:
    """Write goodput over the checkpoint interval to a .png, .svg or .pdf file.

    Raises ParsimError for another suffix.
    """
    file_format(path)
    save(goodput_figure(run, title=title), path)


def goodput_figure(run: LongRun, *, title: str) -> Figure:
    """Goodput over the checkpoint interval as a figure: closed form, simulated runs, the best."""
    best = run.best
    finding = (
        f"a checkpoint every {format_duration(best.interval_s)} is best, goodput {best.simulated:.1%}"
    )
    note = (
        f"{counted(len(run.histories), 'simulated run')} of {format_duration(run.split.total_s)}; "
        f"a failure every {format_duration(run.failures.mtbf_s)}, "
        f"{format_duration(run.failures.restart_s)} until it trains again, "
        f"training stops {format_duration(run.checkpointing.blocking_s)} for a checkpoint"
    )
    with style():
        figure = new_figure(_WIDTH_IN)
        header_in = header(figure, finding, note, name=title)
        (axes,) = grow(figure, header_in, [_PANEL_IN], 0.0)
        _draw_curves(axes, run)
        _mark(axes, run)
        axes.grid(color="#EDEDED", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel("training between two checkpoints (log scale)")
        axes.set_ylabel("goodput: share of the time that trains and is kept")
        axes.legend(loc="lower center", framealpha=1, edgecolor="none")
    return figure


def _draw_curves(axes: Axes, run: LongRun) -> None:
    intervals = [point.interval_s for point in run.curve]
    shown = run.curve[:: max(1, len(run.curve) // _SHOWN)]
    axes.set_xscale("log")
    axes.plot(
        intervals,
        [point.expected for point in run.curve],
        color=SERIES_COLORS[0],
        linewidth=1.8,
        label="closed form (Daly 2006)",
    )
    # Where few runs see a failure their mean lies below all that the others reach.
    axes.errorbar(
        [point.interval_s for point in shown],
        [(point.low + point.high) / 2 for point in shown],
        yerr=[(point.high - point.low) / 2 for point in shown],
        fmt="none",
        ecolor=SERIES_COLORS[1],
        elinewidth=1.2,
        capsize=2.5,
    )
    axes.plot(
        [point.interval_s for point in shown],
        [point.simulated for point in shown],
        "o",
        color=SERIES_COLORS[1],
        markersize=4.5,
        label="simulated: mean, and 90% of the runs",
    )
    axes.xaxis.set_major_locator(FixedLocator(_TICKS_S))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: _tick(seconds)))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _mark(axes: Axes, run: LongRun) -> None:
    """The best interval, Young's, and the one that was asked for where it is another."""
    best = run.best
    axes.plot(
        best.interval_s,
        best.simulated,
        "*",
        color=SERIES_COLORS[2],
        markersize=15,
        markeredgecolor="white",
        zorder=5,
        label=f"best simulated: {format_duration(best.interval_s)}",
    )
    asked = run.point
    if abs(asked.interval_s / best.interval_s - 1) > _APART:
        axes.plot(
            asked.interval_s,
            asked.simulated,
            "D",
            color=SERIES_COLORS[4],
            markersize=8,
            markeredgecolor="white",
            zorder=4,
            label=f"asked for: {format_duration(asked.interval_s)}, goodput {asked.simulated:.1%}",
        )
    young_s = young_interval_s(run.checkpointing.blocking_s, run.failures.mtbf_s)
    low, high = axes.get_xlim()
    if low < young_s < high:
        axes.axvline(young_s, color=MUTED_COLOR, linewidth=0.9, linestyle=":")
        axes.annotate(
            f"Young 1974: {format_duration(young_s)}",
            (young_s, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(4, -2),
            va="top",
            textcoords="offset points",
            size=SMALL_PT,
            color=MUTED_COLOR,
        )
