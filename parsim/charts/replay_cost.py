"""What a replay costs over the number of actions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.ticker import FuncFormatter

from parsim.charts.palette import SERIES_COLORS
from parsim.charts.style import file_format, grow, header, new_figure, save, style

_WIDTH_IN = 8.5
_PANEL_IN = 3.6


def draw_replay_cost(
    points: Mapping[str, Sequence[tuple[int, float]]], path: Path, *, finding: str, note: str
) -> None:
    """Write microseconds an action over the number of actions to a .png, .svg or .pdf file.

    points: (actions, microseconds an action) by what is timed. Linear cost is a level line.
    """
    file_format(path)
    with style():
        figure = new_figure(_WIDTH_IN)
        header_in = header(figure, finding, note)
        (axes,) = grow(figure, header_in, [_PANEL_IN], 0.0)
        for color, (name, line) in zip(SERIES_COLORS, points.items(), strict=False):
            axes.plot(*zip(*line, strict=True), "o-", color=color, label=name, markersize=5)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_ylim(0, 1.6 * max(y for line in points.values() for _, y in line))
        axes.set_xlabel("actions of the schedule (log scale)")
        axes.set_ylabel("time an action (µs)")
        axes.grid(color="#EDEDED", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, loc="upper left", ncols=len(points))
    save(figure, path)
