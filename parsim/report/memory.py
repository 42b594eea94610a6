"""What each rank holds over the step, as a plot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from parsim.charts.palette import SERIES_COLORS
from parsim.report.page import Cell, Column, Picture, Row, Table
from parsim.report.plot import Line, Plot, Rule, linear_axis
from parsim.timeline import MemorySample, Timeline
from parsim.units import format_bytes, format_duration

MOST_LINES = 64
MOST_POINTS = 600
"""Points of a line: of more samples the highest of each interval is kept."""
MOST_NAMED = len(SERIES_COLORS) - 1
"""Ranks that have colours of their own."""
GIB = 2.0**30
FAR = 5.0
"""Over the peak: a capacity beyond would leave the lines at the bottom of the plot."""


def memory_picture(timeline: Timeline, *, capacity_bytes: float | None) -> Picture | None:
    """Memory of every rank over time; None where nothing is known of it."""
    by_rank: dict[int, list[MemorySample]] = defaultdict(list)
    for sample in sorted(timeline.memory):
        by_rank[sample.rank].append(sample)
    if not by_rank or not timeline.end_s > 0:
        return None
    peaks = {rank: max(s.num_bytes for s in samples) for rank, samples in by_rank.items()}
    fullest = max(peaks, key=lambda rank: (peaks[rank], -rank))
    shown = _shown(sorted(by_rank), fullest)
    lines = [
        Line(
            points=_points(by_rank[rank], timeline.end_s),
            color=_color(number, len(shown)),
            text=f"{timeline.rank_name(rank)}, at most {format_bytes(peaks[rank])}",
            steps=True,
            strong=rank == fullest,
        )
        for number, rank in enumerate(shown)
    ]
    rules, of = [], ""
    if capacity_bytes is not None and capacity_bytes > FAR * peaks[fullest]:
        of = f" of {format_bytes(capacity_bytes)}, far above the plot"
    elif capacity_bytes is not None:
        rules.append(
            Rule(value=capacity_bytes, text=f"{format_bytes(capacity_bytes)} for the allocator")
        )
    highest = max([peaks[fullest], *(rule.value for rule in rules)])
    plot = Plot(
        alt=f"Memory held by each rank over the step. {timeline.rank_name(fullest)} holds the most, "
        f"{format_bytes(peaks[fullest])}.",
        x=linear_axis(
            "time since the start of the step", (timeline.end_s,), format_duration, exact=True
        ),
        y=linear_axis("memory held", (highest,), format_bytes, unit=_unit(highest)),
        lines=tuple(sorted(lines, key=lambda line: line.strong)),
        rules=tuple(rules),
        legend=_legend(timeline, shown, fullest),
    )
    left_out = len(by_rank) - len(shown)
    also = f"; {left_out} ranks between them are left out" if left_out else ""
    return Picture(
        caption=f"{timeline.rank_name(fullest)} holds the most: "
        f"{format_bytes(peaks[fullest])}{of}{also}",
        plot=plot,
        table=_table(timeline, by_rank, capacity_bytes),
    )


def _unit(highest_bytes: float) -> float:
    return next((size for size in (GIB, 2.0**20, 2.0**10) if highest_bytes >= size), 1.0)


def _shown(ranks: Sequence[int], fullest: int) -> list[int]:
    """All ranks, or of many an even choice with the fullest among them."""
    if len(ranks) <= MOST_LINES:
        return list(ranks)
    every = -(-len(ranks) // MOST_LINES)
    return sorted({*ranks[::every], fullest})


def _color(number: int, shown: int) -> str:
    """A class: a colour of its own for each of a few ranks, one of ten shades for many."""
    if shown <= MOST_NAMED:
        return f"s{number}"
    return f"r{round(9 * number / (shown - 1))}"


def _legend(timeline: Timeline, shown: Sequence[int], fullest: int) -> tuple[tuple[str, str], ...]:
    if len(shown) <= MOST_NAMED:
        return tuple((f"s{i}", timeline.rank_name(rank)) for i, rank in enumerate(shown))
    return (
        ("r0", timeline.rank_name(shown[0])),
        ("r9", timeline.rank_name(shown[-1])),
        ("strong", f"{timeline.rank_name(fullest)}, the fullest"),
    )


def _points(samples: Sequence[MemorySample], end_s: float) -> tuple[tuple[float, float], ...]:
    """Samples in order, or the highest of each of MOST_POINTS intervals; then the last until the end."""
    points = [(sample.time_s, sample.num_bytes) for sample in samples]
    if len(points) > MOST_POINTS:
        highest: dict[int, tuple[float, float]] = {}
        for time_s, held in points:
            interval = int(time_s / end_s * MOST_POINTS)
            if held >= highest.get(interval, (0.0, -1.0))[1]:
                highest[interval] = (interval / MOST_POINTS * end_s, held)
        points = [highest[interval] for interval in sorted(highest)]
    return (*points, (end_s, samples[-1].num_bytes))


def _table(
    timeline: Timeline, by_rank: dict[int, list[MemorySample]], capacity_bytes: float | None
) -> Table:
    rows = []
    for rank, samples in by_rank.items():
        peak = max(samples, key=lambda sample: sample.num_bytes)
        cells = [
            Cell(text=timeline.rank_name(rank), value=rank),
            Cell(text=format_bytes(samples[0].num_bytes), value=samples[0].num_bytes),
            Cell(text=format_bytes(peak.num_bytes), value=peak.num_bytes),
            Cell(text=format_duration(peak.time_s), value=peak.time_s),
        ]
        if capacity_bytes:
            share = peak.num_bytes / capacity_bytes
            cells.append(Cell(text=f"{share:.0%}", value=share))
        rows.append(Row(cells=tuple(cells)))
    columns = [
        Column(key="rank", title="rank"),
        Column(key="first", title="at the start", numeric=True),
        Column(key="peak", title="peak", numeric=True),
        Column(key="when", title="first at", numeric=True),
    ]
    if capacity_bytes:
        columns.append(Column(key="of", title="of the device", numeric=True))
    return Table(caption="Memory of each rank", columns=tuple(columns), rows=tuple(rows), folded=True)
