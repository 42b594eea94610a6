"""What each rank holds over the step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from parsim.charts.palette import SERIES_COLORS, TEXT_COLOR
from parsim.charts.style import (
    Color,
    Entry,
    file_format,
    grow,
    header,
    new_figure,
    save,
    style,
    time_unit,
)
from parsim.errors import ParsimError
from parsim.timeline import MemorySample, Timeline
from parsim.units import format_bytes, format_duration, percent

_PANEL_IN = 4.2
_MAX_NAMED = len(SERIES_COLORS)
"""With more ranks than this the legend names the first, the last and the fullest."""


def draw_memory(timeline: Timeline, path: Path, *, capacity_bytes: float | None = None) -> None:
    """Write the memory of every rank over time to a .png, .svg or .pdf file.

    `capacity_bytes` draws a line at what a device has. Raises ParsimError for another suffix or a
    timeline without memory samples.
    """
    file_format(path)
    save(memory_figure(timeline, capacity_bytes=capacity_bytes), path)


def memory_figure(timeline: Timeline, *, capacity_bytes: float | None = None) -> Figure:
    """The memory of every rank over time as a figure."""
    if not timeline.memory:
        raise ParsimError(
            "this timeline holds no memory samples, so there is nothing to draw",
            where=timeline.title or timeline.source,
        )
    peak = max(timeline.memory, key=lambda s: (s.num_bytes, -s.rank, -s.time_s))
    end_s = max(timeline.end_s, *(s.time_s for s in timeline.memory)) or 1.0
    by_rank: dict[int, list[MemorySample]] = defaultdict(list)
    for sample in sorted(timeline.memory):
        by_rank[sample.rank].append(sample)
    colors = _rank_colors(sorted(by_rank))
    with style():
        figure = new_figure()
        note = f"{timeline.source}, step {format_duration(timeline.end_s)}"
        finding = _finding(peak, capacity_bytes)
        legend = _legend(colors, peak.rank)
        header_in = header(figure, finding, note, legend, name=timeline.title)
        (axes,) = grow(figure, header_in, [_PANEL_IN], 0.0)
        unit, unit_bytes = _byte_unit(max(peak.num_bytes, capacity_bytes or 0.0))
        time_name, unit_s = time_unit(end_s)
        axes.set_xlim(0, end_s / unit_s)
        axes.set_ylim(0, 1.14 * max(peak.num_bytes, capacity_bytes or 0.0, 1.0) / unit_bytes)
        axes.grid(color="#E2E2E2", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(f"time since the start of the step ({time_name})")
        axes.set_ylabel(f"memory held ({unit})")
        _draw_steps(axes, by_rank, colors, peak.rank, end_s, (unit_s, unit_bytes))
        if capacity_bytes is not None:
            _draw_capacity(axes, capacity_bytes, unit_bytes)
        _mark_peak(axes, peak, end_s, (unit_s, unit_bytes))
    return figure


def _finding(peak: MemorySample, capacity_bytes: float | None) -> str:
    text = f"rank {peak.rank} holds the most, {format_bytes(peak.num_bytes)}"
    if capacity_bytes is None:
        return text
    if peak.num_bytes > capacity_bytes:
        return f"{text}, {format_bytes(peak.num_bytes - capacity_bytes)} over the capacity"
    return f"{text}, {percent(peak.num_bytes / capacity_bytes)} of the capacity"


def _rank_colors(ranks: Sequence[int]) -> dict[int, Color]:
    """A colour a rank: distinct ones for a few, from a scale from first to last for many."""
    if len(ranks) <= _MAX_NAMED:
        return {rank: to_rgb(SERIES_COLORS[i]) for i, rank in enumerate(ranks)}
    scale = colormaps["viridis"]
    return {rank: scale(0.92 * i / (len(ranks) - 1))[:3] for i, rank in enumerate(ranks)}


def _legend(colors: dict[int, Color], fullest: int) -> list[Entry]:
    ranks = list(colors)
    if len(ranks) <= _MAX_NAMED:
        return [(f"rank {rank}", [colors[rank]]) for rank in ranks]
    scale = [colors[ranks[i * (len(ranks) - 1) // 5]] for i in range(6)]
    return [
        (f"rank {ranks[0]} to rank {ranks[-1]}", scale),
        (f"rank {fullest}, the fullest", [to_rgb(TEXT_COLOR)]),
    ]


def _byte_unit(largest_bytes: float) -> tuple[str, float]:
    for unit, size in (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10)):
        if largest_bytes >= size:
            return unit, size
    return "B", 1.0


def _draw_steps(
    axes: Axes,
    by_rank: dict[int, list[MemorySample]],
    colors: dict[int, Color],
    fullest: int,
    end_s: float,
    scale: tuple[float, float],
) -> None:
    """A step line a rank, the fullest rank on top; a sample holds until the next."""
    order = sorted(by_rank, key=lambda rank: (rank == fullest, rank))
    many = len(by_rank) > _MAX_NAMED
    lines = []
    for rank in order:
        times = np.array([sample.time_s for sample in by_rank[rank]] + [end_s]) / scale[0]
        held = np.array([sample.num_bytes for sample in by_rank[rank]]) / scale[1]
        lines.append(np.column_stack([np.repeat(times, 2)[1:-1], np.repeat(held, 2)]))
    collection = LineCollection(
        lines,
        colors=[to_rgb(TEXT_COLOR) if many and rank == fullest else colors[rank] for rank in order],
        linewidths=[1.8 if rank == fullest else 0.7 if many else 1.3 for rank in order],
        zorder=2,
    )
    collection.set_gid("memory")
    axes.add_collection(collection)


def _draw_capacity(axes: Axes, capacity_bytes: float, unit_bytes: float) -> None:
    level = capacity_bytes / unit_bytes
    axes.axhline(level, color="#B00020", linewidth=1.4, linestyle=(0, (6, 3)), zorder=3)
    axes.annotate(
        f"capacity {format_bytes(capacity_bytes)}",
        (1.0, level),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color="#B00020",
        zorder=6,
        bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1.0},
    )


def _mark_peak(axes: Axes, peak: MemorySample, end_s: float, scale: tuple[float, float]) -> None:
    """A ring at the first moment of the peak; its words stand on the side that has room."""
    left = peak.time_s < 0.6 * end_s
    at = (peak.time_s / scale[0], peak.num_bytes / scale[1])
    axes.plot(*at, "o", markersize=7, markerfacecolor="white", markeredgecolor=TEXT_COLOR, zorder=5)
    text = f"peak {format_bytes(peak.num_bytes)}, rank {peak.rank}, at {format_duration(peak.time_s)}"
    axes.annotate(
        text,
        at,
        xytext=(8 if left else -8, 5),
        textcoords="offset points",
        ha="left" if left else "right",
        va="bottom",
        weight="bold",
        color=TEXT_COLOR,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.0},
        zorder=6,
    )
