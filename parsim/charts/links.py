"""How full the busiest links of a fabric are over the step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from parsim.charts.palette import SERIES_COLORS
from parsim.charts.style import (
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
from parsim.simulate.contention import Contention, LinkUse
from parsim.units import format_bandwidth, format_duration, percent

_PANEL_IN = 0.95
_GAP_IN = 0.42
_LINKS = 6
_MEAN, _MOST = to_rgb(SERIES_COLORS[0]), lighter(SERIES_COLORS[0], 0.65)
_BINS = 600
"""Parts of the step that a load is the mean of: about a pixel or two each."""


def draw_links(contention: Contention, path: Path, *, title: str = "") -> None:
    """Write the load of the busiest links over the step to a .png, .svg or .pdf file.

    Raises ParsimError for another suffix, or where nothing crosses the network.
    """
    file_format(path)
    save(links_figure(contention, title=title), path)


def links_figure(contention: Contention, *, title: str = "") -> Figure:
    """The load of the busiest links over the step, one of each kind, as a figure."""
    uses = _shown(contention.links)
    if not uses:
        raise ParsimError("no transfer crosses the network, so there is nothing to draw", where=title)
    fabric = contention.fabric
    settings = ", ".join(f"{key} {value}" for key, value in fabric.settings.items())
    slower = contention.step_s / contention.alone_s - 1
    finding = (
        f"sharing links of {fabric.name} makes the step {percent(slower)} longer"
        if slower >= 0.0005
        else f"links of {fabric.name} hold no transfer up"
    )
    note = f"{settings}; step {format_duration(contention.step_s)}"
    legend = [(f"mean load of {_BINS} parts of the step", [_MEAN]), ("greatest load in each", [_MOST])]
    with style():
        figure = new_figure()
        header_in = header(figure, finding, note, legend, name=title) + 0.15
        panels = grow(figure, header_in, [_PANEL_IN] * len(uses), _GAP_IN)
        unit, unit_s = time_unit(contention.step_s)
        for axes, use in zip(panels, uses, strict=True):
            _draw(axes, use, contention.step_s, unit_s)
        for axes in panels[:-1]:
            axes.tick_params(labelbottom=False)
        panels[-1].set_xlabel(f"time since the start of the step ({unit})")
    return figure


def _shown(links: tuple[LinkUse, ...]) -> list[LinkUse]:
    """The busiest link between every two kinds of nodes first, then the next ones."""
    first: dict[tuple[str, str], LinkUse] = {}
    for use in links:
        (kind, _), (other, _) = use.kind.example
        first.setdefault((kind, other), use)
    rest = [use for use in links if use not in first.values()]
    chosen = [*first.values(), *rest][:_LINKS]
    return sorted(chosen, key=lambda use: -use.mean)


def _draw(axes: Axes, use: LinkUse, step_s: float, unit_s: float) -> None:
    mean, most = _binned(use.points, step_s)
    edges = np.linspace(0.0, step_s / unit_s, len(mean) + 1)
    axes.stairs(most, edges, fill=True, color=_MOST)
    axes.stairs(mean, edges, fill=True, color=_MEAN)
    axes.set_xlim(0, step_s / unit_s)
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_yticks([0, 0.5, 1])
    axes.grid(axis="y", color="#E2E2E2", linewidth=0.6)
    axes.set_axisbelow(True)
    text = f"{use.name}, {format_bandwidth(use.kind.bytes_per_s)}: {percent(use.mean)} busy"
    axes.set_title(text, loc="left", fontsize=9.0, pad=3)


def _binned(
    points: tuple[tuple[float, float], ...], step_s: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and greatest load in equal parts of the step; a point holds until the next."""
    times = np.array([at for at, _ in points] + [step_s])
    loads = np.array([load for _, load in points])
    carried = np.concatenate([[0.0], np.cumsum(loads * np.diff(times))])
    edges = np.linspace(0.0, step_s, _BINS + 1)
    mean = np.diff(np.interp(edges, times, carried)) / (step_s / _BINS)
    most = mean.copy()
    # A load counts in every part that it touches.
    first = np.searchsorted(edges, times[:-1], side="right") - 1
    last = np.searchsorted(edges, times[1:], side="left") - 1
    for load, low, high in zip(loads, first, last, strict=True):
        if load:
            most[low : high + 1] = np.maximum(most[low : high + 1], load)
    return mean, most
