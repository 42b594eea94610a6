"""Scaling curves: efficiency over the number of GPUs, with the reason where it falls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from parsim.charts.palette import MUTED_COLOR, SERIES_COLORS
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
)
from parsim.search.scaling import TERMS, ScalingPoint
from parsim.units import percent

Curves = Mapping[str, Sequence[ScalingPoint]]
"""By what was scaled, such as "llama-3.1-8b on h100-sxm-80gb"."""

_WIDTH_IN = 9.0
_PANEL_IN = 3.1
_GAP_IN = 0.75
_SHORT = {
    "tp_exposed": "tp",
    "cp_exposed": "cp",
    "ep_exposed": "ep",
    "pp_exposed": "pp",
    "dp_exposed": "dp",
}
"""Terms of the breakdown beside a point."""


def draw_scaling(strong: Curves, weak: Curves, path: Path) -> None:
    """Write strong and weak scaling to a .png, .svg or .pdf file.

    Raises ParsimError for another suffix.
    """
    file_format(path)
    save(scaling_figure(strong, weak), path)


def scaling_figure(strong: Curves, weak: Curves) -> Figure:
    """Efficiency over GPUs as a figure: a panel for strong scaling, one for weak where there is any."""
    names = list(dict.fromkeys((*strong, *weak)))
    colors = {name: SERIES_COLORS[i % len(SERIES_COLORS)] for i, name in enumerate(names)}
    entries: list[Entry] = [(name, [lighter(color, 0.0)]) for name, color in colors.items()]
    panels = [("strong scaling: the same batch on all GPUs", strong)]
    panels += [("weak scaling: the batch grows with the GPUs", weak)] if weak else []
    note = (
        "efficiency: tokens a second and GPU over those of the smallest cluster, the best plan of each; "
        "below a fall of the lowest curve: the part of the step whose GPU time a token grew most"
    )
    with style():
        figure = new_figure(_WIDTH_IN)
        header_in = header(figure, _finding(strong), note, entries)
        for axes, (title, curves) in zip(
            grow(figure, header_in + 0.2, [_PANEL_IN] * len(panels), _GAP_IN), panels, strict=True
        ):
            _draw_panel(axes, curves, colors)
            axes.set_title(title, loc="left", size=SMALL_PT + 1)
    return figure


def _finding(strong: Curves) -> str:
    name, points = min(strong.items(), key=lambda item: item[1][-1].efficiency)
    first, last = points[0], points[-1]
    falls = [point for point in points if point.grew]
    worst = max(falls, key=lambda point: point.grew_by, default=None)
    finding = (
        f"{name}: {last.prediction.plan.gpus:,} GPUs keep {percent(last.efficiency)} of the efficiency "
        f"of {first.prediction.plan.gpus:,}"
    )
    return finding if worst is None else f"{finding}; most is lost to {_words(worst)}"


def _words(point: ScalingPoint) -> str:
    assert point.grew is not None
    return TERMS[point.grew] + (f" ({point.switched})" if point.switched else "")


def _draw_panel(axes: Axes, curves: Curves, colors: Mapping[str, str]) -> None:
    counts = sorted({p.prediction.plan.gpus for points in curves.values() for p in points})
    axes.set_xscale("log", base=2)
    axes.axhline(1.0, color=MUTED_COLOR, linewidth=0.8, linestyle=":")
    worst = min(curves, key=lambda name: curves[name][-1].efficiency)
    for name, points in curves.items():
        gpus = [point.prediction.plan.gpus for point in points]
        axes.plot(
            gpus, [p.efficiency for p in points], "o-", color=colors[name], markersize=5, linewidth=1.6
        )
        for point in points:
            if point.grew and name == worst:
                axes.annotate(
                    f"{_SHORT.get(point.grew, point.grew)} +{percent(point.grew_by)}",
                    (point.prediction.plan.gpus, point.efficiency),
                    xytext=(0, -14),
                    textcoords="offset points",
                    ha="center",
                    size=SMALL_PT - 1,
                    color=colors[name],
                )
    found = [point.efficiency for points in curves.values() for point in points]
    axes.set_ylim(max(0.0, math.floor(10 * min(found)) / 10 - 0.1), max(1.1, 1.1 * max(found)))
    axes.margins(x=0.08)
    axes.grid(color="#EDEDED", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("GPUs (log scale)")
    axes.set_ylabel("efficiency")
    axes.xaxis.set_major_locator(FixedLocator(counts[:: max(1, len(counts) // 10)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
