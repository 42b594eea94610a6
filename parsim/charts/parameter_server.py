"""Throughput over the number of workers: parameter servers beside all-reduce."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

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

_WIDTH_IN = 9.0
_PANEL_IN = 4.6
_MARKERS = "os^D"


class PsCurve(NamedTuple):
    """Throughput of one way to train, for each number of workers."""

    name: str
    samples_per_s: tuple[float, ...]
    staleness: float = 0.0
    """Mean staleness of the gradients with the most workers, in updates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PsComparison:
    """Parameter servers beside all-reduce."""

    title: str
    note: str
    workers: tuple[int, ...]
    all_reduce: PsCurve
    servers: tuple[PsCurve, ...]
    compute_samples_per_s: float
    """What one worker would do if it only computed."""


def draw_parameter_servers(data: PsComparison, path: Path) -> None:
    """Write throughput by worker over their number to a .png, .svg or .pdf file.

    Raises ParsimError for another suffix.
    """
    file_format(path)
    save(parameter_server_figure(data), path)


def parameter_server_figure(data: PsComparison) -> Figure:
    """Throughput by worker over their number as a figure; flat lines scale perfectly."""
    with style():
        figure = new_figure(_WIDTH_IN)
        header_in = header(figure, _finding(data), data.note, name=data.title)
        (axes,) = grow(figure, header_in, [_PANEL_IN], 0.0)
        axes.set_xscale("log", base=2)
        axes.axhline(
            data.compute_samples_per_s,
            color=MUTED_COLOR,
            linewidth=1.0,
            linestyle=":",
            label="compute alone",
        )
        for i, curve in enumerate([data.all_reduce, *data.servers]):
            axes.plot(
                data.workers,
                [rate / n for rate, n in zip(curve.samples_per_s, data.workers, strict=True)],
                marker=_MARKERS[i % len(_MARKERS)],
                color=SERIES_COLORS[i],
                linewidth=2.4 - 0.4 * i,  # where two lines are one, both can be seen
                linestyle="-" if i % 2 == 0 else "--",
                markersize=7.5 - i,
                markeredgecolor="white",
                label=curve.name if i == 0 else f"{curve.name} servers",
            )
        axes.set_ylim(0, 1.08 * data.compute_samples_per_s)
        axes.xaxis.set_major_locator(FixedLocator(list(data.workers)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:.0f}"))
        axes.grid(color="#EDEDED", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel("workers (log scale)")
        axes.set_ylabel("sequences a second of each worker")
        axes.legend(loc="lower left", frameon=False, fontsize=SMALL_PT)
    return figure


def _finding(data: PsComparison) -> str:
    """Who is ahead with all the workers, and what it takes."""
    best = max(data.servers, key=lambda curve: curve.samples_per_s[-1])
    ratio = data.all_reduce.samples_per_s[-1] / best.samples_per_s[-1]
    where = f"with {counted(data.workers[-1], 'worker')}"
    if abs(ratio - 1) < 0.02:
        return f"{where} all-reduce and {best.name} servers are as fast as each other"
    if ratio > 1:
        return f"{where} all-reduce is {ratio:.2g} × as fast as {best.name} servers"
    stale = f", on gradients {best.staleness:.0f} updates old" if best.staleness >= 0.5 else ""
    return f"{where} {best.name} servers are {1 / ratio:.2g} × as fast as all-reduce{stale}"
