"""Roofline: how fast each kernel of a model runs, and whether memory or arithmetic holds it back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

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
)
from parsim.cost.roofline import RooflineKernel, attainable_flops_per_s
from parsim.cost.stage import CostModel
from parsim.errors import ParsimError
from parsim.units import format_bandwidth, format_rate, percent

_WIDTH_IN, _PLOT_IN, _KEY_IN = 10.0, 4.4, 2.7
_ROW_IN = 0.23
_MOST_NAMED = 16
"""Kernels that are named: those that take longest."""
_COLORS = {"gemm": SERIES_COLORS[0], "attention": SERIES_COLORS[1]}
_LABELS = {"gemm": "matrix product", "attention": "attention"}
_LARGEST_PT2, _SMALLEST_PT2 = 1800.0, 12.0
"""Areas of the marks for all of the time and for hardly any."""


class _Mark(NamedTuple):
    """A kernel's forward and backward together."""

    name: str
    family: str
    intensity: float
    flops_per_s: float
    share: float
    """Of the compute of all layers."""


def draw_roofline(
    kernels: Sequence[RooflineKernel], costs: CostModel, path: Path, *, title: str = ""
) -> None:
    """Write a model's kernels under the roof of their device to a .png, .svg or .pdf file.

    Raises ParsimError for another suffix.
    """
    file_format(path)
    save(roofline_figure(kernels, costs, title=title), path)


def roofline_figure(kernels: Sequence[RooflineKernel], costs: CostModel, *, title: str = "") -> Figure:
    """Rate against intensity, both logarithmic; the area of a mark is its share of the time."""
    marks = _marks(kernels)
    if not marks:
        raise ParsimError("no kernel does arithmetic, so there is no roofline", where=title)
    families = [family for family in _COLORS if any(mark.family == family for mark in marks)]
    legend: list[Entry] = [(_LABELS[family], [lighter(_COLORS[family], 0.0)]) for family in families]
    with style():
        figure = new_figure(_WIDTH_IN)
        header_in = header(figure, _finding(kernels, costs), _note(kernels, costs), legend, name=title)
        (axes,) = grow(figure, header_in, [_PLOT_IN], 0.0, left_in=1.1)
        place = axes.get_position()
        axes.set_position((place.x0, place.y0, place.width - _KEY_IN / _WIDTH_IN, place.height))
        dtypes = list(dict.fromkeys(kernel.dtype for kernel in kernels if kernel.flops))
        _draw_roof(axes, marks, costs, dtypes)
        _draw_marks(axes, marks)
    return figure


def _marks(kernels: Sequence[RooflineKernel]) -> list[_Mark]:
    """Kernels with arithmetic, the longest first."""
    by_name: dict[tuple[str, str], list[RooflineKernel]] = defaultdict(list)
    for kernel in kernels:
        if kernel.flops > 0:
            by_name[kernel.name, kernel.family].append(kernel)
    whole_s = sum(kernel.seconds * kernel.layers for kernel in kernels)
    marks = []
    for (name, family), own in by_name.items():
        flops, num_bytes, seconds = (
            sum(getattr(kernel, key) * kernel.layers for kernel in own)
            for key in ("flops", "num_bytes", "seconds")
        )
        marks.append(_Mark(name, family, flops / num_bytes, flops / seconds, seconds / whole_s))
    return sorted(marks, key=lambda mark: (-mark.share, mark.name))


def _finding(kernels: Sequence[RooflineKernel], costs: CostModel) -> str:
    """How close to the roof the time with arithmetic is spent."""
    shown = [kernel for kernel in kernels if kernel.flops > 0]
    ideal_s = sum(
        k.layers * k.flops / attainable_flops_per_s(costs, k.intensity, k.dtype) for k in shown
    )
    actual_s = sum(k.layers * k.seconds for k in shown)
    return f"products and attention run at {percent(ideal_s / actual_s)} of the roof"


def _note(kernels: Sequence[RooflineKernel], costs: CostModel) -> str:
    whole_s = sum(k.seconds * k.layers for k in kernels)
    memory_s = sum(k.seconds * k.layers for k in kernels if not k.flops)
    memory_bytes = sum(k.num_bytes * k.layers for k in kernels if not k.flops)
    text = "forward and backward on one rank; area: share of the compute time"
    if memory_s:
        bandwidth = costs.cluster.device.memory_bandwidth_bytes_per_s
        text += (
            f"; memory-bound kernels, {percent(memory_s / whole_s)} of that time, are not drawn: they "
            f"move data at {percent(memory_bytes / memory_s / bandwidth)} of the bandwidth"
        )
    return text


def _draw_roof(axes: Axes, marks: Sequence[_Mark], costs: CostModel, dtypes: Sequence[str]) -> None:
    """The bandwidth's slope, a ceiling for each dtype, and axes that hold both and all marks."""
    bandwidth = costs.cluster.device.memory_bandwidth_bytes_per_s
    peaks = {dtype: attainable_flops_per_s(costs, float("inf"), dtype) for dtype in dtypes}
    ridges = [peak / bandwidth for peak in peaks.values()]
    intensities = [mark.intensity for mark in marks]
    low, high = min([*intensities, *ridges]) / 4, max([*intensities, *ridges]) * 4
    highest = max(peaks.values())
    x = np.geomspace(low, high, 400)
    roof = np.minimum(highest, x * bandwidth)
    axes.plot(x, roof, color=TEXT_COLOR, linewidth=1.4, zorder=2)
    axes.fill_between(x, roof, 10 * highest, color="#F2F2F2", zorder=0)
    for dtype, peak in peaks.items():
        if peak < highest:
            axes.plot([peak / bandwidth, high], [peak, peak], color=MUTED_COLOR, linewidth=0.9, zorder=2)
        _say(axes, f"{dtype} {_rate(peak)}", (high, peak), (-4, 4), "right")
    _say(
        axes,
        f"memory {format_bandwidth(bandwidth)}",
        (1.2 * low, 1.2 * low * bandwidth),
        (9, -8),
        "left",
    )
    lowest = min([*(mark.flops_per_s for mark in marks), low * bandwidth])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(lowest / 1.6, 1.8 * highest)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _rate(value)))
    axes.grid(which="major", color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("arithmetic intensity (FLOPs per byte that must be moved)")


def _rate(flops_per_s: float) -> str:
    """A rate without zeros that say nothing.

    >>> _rate(2e14), _rate(9.895e14)
    ('200 TFLOP/s', '989.5 TFLOP/s')
    """
    return format_rate(flops_per_s).replace(".0 ", " ")


def _draw_marks(axes: Axes, marks: Sequence[_Mark]) -> None:
    """A numbered mark for each kernel, and at the right what the numbers stand for."""
    for mark in marks:
        axes.scatter(
            [mark.intensity],
            [mark.flops_per_s],
            s=_SMALLEST_PT2 + mark.share * _LARGEST_PT2,
            color=_COLORS[mark.family],
            edgecolors="white",
            linewidths=0.8,
            alpha=0.8,
            zorder=3,
        )
    named = marks[:_MOST_NAMED]
    for place, mark in enumerate(sorted(named, key=lambda mark: mark.intensity)):
        # Products of one layer lie close together: neighbours' numbers go to different heights.
        axes.annotate(
            str(named.index(mark) + 1),
            (mark.intensity, mark.flops_per_s),
            xytext=(0, (20, -26, 36, -42)[place % 4]),
            textcoords="offset points",
            ha="center",
            size=SMALL_PT - 0.5,
            weight="bold",
            color=TEXT_COLOR,
            arrowprops={"arrowstyle": "-", "color": MUTED_COLOR, "linewidth": 0.6, "shrinkB": 0},
            zorder=4,
        )
    for place, mark in enumerate(named):
        axes.text(
            1.04,
            1 - _ROW_IN * (place + 0.5) / _PLOT_IN,
            f"{place + 1:>2}  {mark.name}: {percent(mark.share)}, {_rate(mark.flops_per_s)}",
            transform=axes.transAxes,
            size=SMALL_PT - 0.5,
            color=TEXT_COLOR,
            va="center",
        )
    if len(marks) > _MOST_NAMED:
        text = f"and {len(marks) - _MOST_NAMED} more"
        axes.text(1.04, 0.02, text, transform=axes.transAxes, size=SMALL_PT - 0.5, color=MUTED_COLOR)


def _say(
    axes: Axes, text: str, at: tuple[float, float], away_pt: tuple[float, float], side: str
) -> None:
    axes.annotate(
        text,
        at,
        xytext=away_pt,
        textcoords="offset points",
        ha=side,
        size=SMALL_PT - 0.5,
        color=TEXT_COLOR,
        zorder=4,
    )
