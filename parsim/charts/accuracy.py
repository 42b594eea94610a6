"""Where errors lie (over size or time), and whether plans are ranked as they were measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from parsim.charts.palette import MUTED_COLOR, SERIES_COLORS, TEXT_COLOR
from parsim.charts.style import (
    FOOTER_IN,
    LEFT_IN,
    RIGHT_IN,
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
from parsim.units import percent

Error = tuple[str, float, float]
"""(group, size, predicted / measured) of one run or kernel."""
Ranked = tuple[float, float]
"""(measured, predicted) of one plan, each over the least of its group."""

BANDS = (0.05, 0.10, 0.20)
_WIDTH_IN = 8.5
_PANEL_IN = 3.6
_MARKERS = "osD^vP*X"
_RATIOS = (1.5, 2.0)
"""The axis ends at the first of these that leaves few points out; those stand at its edge."""
_FEW = 0.005
_BINS = 12
"""Parts of the size axis that a median is drawn of."""


def draw_errors(
    rows: Sequence[Error], path: Path, *, title: str, sizes: str, size_text: Callable[[float], str]
) -> None:
    """Write predicted over measured against a size on log axes, with the running median, to a file.

    `sizes` names the size axis. Raises ParsimError for an unknown type of picture, or no rows.
    """
    file_format(path)
    save(errors_figure(rows, title=title, sizes=sizes, size_text=size_text), path)


def errors_figure(
    rows: Sequence[Error], *, title: str, sizes: str, size_text: Callable[[float], str]
) -> Figure:
    """The same as a figure."""
    _some(rows)
    groups = sorted({group for group, _, _ in rows})
    errors = [abs(ratio - 1) for _, _, ratio in rows]
    off = {most: sum(not 1 / most <= ratio <= most for _, _, ratio in rows) for most in _RATIOS}
    most = next((most for most in _RATIOS if off[most] <= _FEW * len(rows)), _RATIOS[-1])
    note = f"{counted(len(rows), 'row')}, median error {percent(median(errors))}; black: running median"
    if off[most]:
        note += f"; {off[most]} beyond the edge"
    with style():
        figure = new_figure(_WIDTH_IN)
        entries = [
            (f"{group} ({percent(median(_errors(rows, group)))})", [_color(i)])
            for i, group in enumerate(groups)
        ]
        header_in = header(figure, title, note, entries)
        (axes,) = grow(figure, header_in, [_PANEL_IN], 0.0)
        _error_axes(axes, sizes, size_text, most)
        for i, group in enumerate(groups):
            own = [(size, ratio) for name, size, ratio in rows if name == group]
            _scatter(axes, own, i, most, small=len(rows) > 1000)
        _running_median(axes, rows)
    return figure


def _some(rows: Sequence[object]) -> None:
    if not rows:
        raise ParsimError("there is nothing to draw", expected="one row or more")


def _errors(rows: Sequence[Error], group: str) -> list[float]:
    return [abs(ratio - 1) for name, _, ratio in rows if name == group]


def _color(place: int) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    return to_rgb(SERIES_COLORS[place % len(SERIES_COLORS)])


def _error_axes(axes: Axes, sizes: str, size_text: Callable[[float], str], most: float) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(1 / most / 1.02, most * 1.02)
    for band in BANDS:
        axes.axhspan(1 - band, 1 + band, color=MUTED_COLOR, alpha=0.09, linewidth=0, zorder=0)
    axes.axhline(1.0, color=MUTED_COLOR, linewidth=0.8, zorder=1)
    ticks = [t for t in (0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.5, 2.0) if 1 / most <= t <= most]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks([], minor=True)
    axes.xaxis.set_major_locator(LogLocator(numticks=8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size_text(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"{sizes} (log scale; bands: ±5, 10, 20%)")
    axes.set_ylabel("predicted / measured")


def _scatter(
    axes: Axes, own: Sequence[tuple[float, float]], place: int, most: float, *, small: bool
) -> None:
    inside = [(x, y) for x, y in own if 1 / most <= y <= most]
    outside = [(x, min(max(y, 1 / most), most)) for x, y in own if not 1 / most <= y <= most]
    for points, marker in ((inside, _MARKERS[place % len(_MARKERS)]), (outside, "^")):
        if points:
            x, y = zip(*points, strict=True)
            axes.scatter(
                x,
                y,
                s=5 if small else 22,
                marker=marker,
                color=[_color(place)],
                alpha=0.35 if small else 0.75,
                linewidths=0,
                zorder=2,
                rasterized=small,
            )


def _running_median(axes: Axes, rows: Sequence[Error]) -> None:
    """The median of each part of the size axis that holds enough rows."""
    x = np.log([size for _, size, _ in rows])
    y = np.array([ratio for _, _, ratio in rows])
    edges = np.linspace(x.min(), x.max() + 1e-9, _BINS + 1)
    least = max(3, len(rows) // 100)
    middles, medians = [], []
    for low, high in itertools.pairwise(edges):
        inside = (x >= low) & (x < high)
        if inside.sum() >= least:
            middles.append(math.exp(float(np.median(x[inside]))))
            medians.append(float(np.median(y[inside])))
    if len(middles) > 1:
        axes.plot(middles, medians, color=TEXT_COLOR, linewidth=1.4, zorder=3)


def draw_ranking(groups: Sequence[Sequence[Ranked]], path: Path, *, title: str) -> None:
    """Write measured against predicted order within groups, and the regrets, to a file.

    Left: each plan's measured time over the group's best, against the same of its prediction. Right: how
    much longer the plan that parsim likes best took than the best one, a bar for each range of groups.
    """
    file_format(path)
    save(ranking_figure(groups, title=title), path)


def ranking_figure(groups: Sequence[Sequence[Ranked]], *, title: str) -> Figure:
    """The same as a figure."""
    _some(groups)
    regrets = [min(group, key=lambda pair: pair[1])[0] - 1 for group in groups]
    with style():
        figure = new_figure(_WIDTH_IN)
        note = (
            f"{counted(len(groups), 'group')} of plans for one job; mean regret "
            f"{percent(sum(regrets) / len(regrets))}, worst {percent(max(regrets))}"
        )
        header_in = header(figure, title, note)
        height_in = header_in + _PANEL_IN + FOOTER_IN
        figure.set_size_inches(_WIDTH_IN, height_in)
        usable_in = _WIDTH_IN - LEFT_IN - RIGHT_IN
        gap_in = 0.75
        panel_in = (usable_in - gap_in) / 2
        bottom, height = FOOTER_IN / height_in, _PANEL_IN / height_in
        lefts = (LEFT_IN, LEFT_IN + panel_in + gap_in)
        order, bars = (
            figure.add_axes((left / _WIDTH_IN, bottom, panel_in / _WIDTH_IN, height)) for left in lefts
        )
        _order(order, groups)
        _regrets(bars, regrets)
    return figure


def _order(axes: Axes, groups: Sequence[Sequence[Ranked]]) -> None:
    pairs = [pair for group in groups for pair in group]
    chosen = [min(group, key=lambda pair: pair[1]) for group in groups]
    top = 1.1 * max(max(pair) for pair in pairs)
    axes.plot([1, top], [1, top], color=MUTED_COLOR, linewidth=0.9, zorder=1)
    for points, color, label, size in (
        (pairs, SERIES_COLORS[0], "a plan", 12),
        (chosen, SERIES_COLORS[1], "parsim's choice", 24),
    ):
        measured, predicted = zip(*points, strict=True)
        axes.scatter(
            predicted, measured, s=size, color=color, alpha=0.6, linewidths=0, label=label, zorder=2
        )
    for set_scale, set_limit in ((axes.set_xscale, axes.set_xlim), (axes.set_yscale, axes.set_ylim)):
        set_scale("log")
        set_limit(0.97, top)
    close = (1.1, 1.2, 1.3) if top < 2 else ()
    ticks = [tick for tick in sorted((1, 1.5, 2, 3, 5, 8, 12, 20, *close)) if tick < top]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_minor_formatter(NullFormatter())
        axis.set_ticks([], minor=True)
    axes.set_xlabel("predicted time over the group's least")
    axes.set_ylabel("measured time over the group's least")
    axes.legend(loc="lower right", fontsize=SMALL_PT, frameon=False, handletextpad=0.2)


def _regrets(axes: Axes, regrets: Sequence[float]) -> None:
    most = max(0.12, math.ceil(max(regrets) / 0.02 + 1e-9) * 0.02)
    edges = [0.0, 0.005, *np.arange(0.02, most + 0.021, 0.02)]
    counts, _ = np.histogram(regrets, bins=edges)
    labels = ["none", *(f"≤ {100 * edge:.0f}%" for edge in edges[2:])]
    axes.bar(range(len(counts)), counts, color=SERIES_COLORS[0], width=0.8)
    step = math.ceil(len(labels) / 6)
    axes.set_xticks(range(0, len(labels), step), labels[::step])
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.set_xlabel("regret of parsim's choice")
    axes.set_ylabel("groups")
