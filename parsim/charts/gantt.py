"""A step as a Gantt chart: one row a rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from parsim.charts.lanes import (
    Row,
    chunks_per_rank,
    draw_rows,
    finish_axes,
    legend_entries,
    require_spans,
    row_height_in,
    spans_by_rank,
)
from parsim.charts.style import (
    LEFT_IN,
    RIGHT_IN,
    WIDTH_IN,
    counted,
    file_format,
    grow,
    header,
    new_figure,
    save,
    style,
    time_unit,
)
from parsim.timeline import COMPUTE, Timeline, breakdown_s
from parsim.units import format_duration, percent

SHADES = "shades: model chunks of a rank, the first is darkest"
PLOT_IN = WIDTH_IN - LEFT_IN - RIGHT_IN


def draw_gantt(timeline: Timeline, path: Path, *, title: str | None = None) -> None:
    """Write a Gantt chart of one step to a .png, .svg or .pdf file.

    Raises ParsimError for another suffix or a timeline without spans. `title` replaces the one that
    states how much of the step is bubble.
    """
    file_format(path)
    save(gantt_figure(timeline, title=title), path)


def gantt_figure(timeline: Timeline, *, title: str | None = None) -> Figure:
    """The Gantt chart of one step as a figure."""
    require_spans(timeline)
    with style():
        figure = new_figure()
        header_in = header(
            figure,
            _finding(timeline) if title is None else title,
            _note(timeline),
            legend_entries([timeline]),
            name=_name(timeline) if title is None else "",
        )
        draw_panels(figure, [timeline], header_in=header_in, gap_in=0.0)
    return figure


def draw_panels(
    figure: Figure, timelines: Sequence[Timeline], *, header_in: float, gap_in: float
) -> list[Axes]:
    """Draw timelines one above the other on one time axis; returns their axes."""
    end_s = max(t.end_s for t in timelines)
    unit = time_unit(end_s)
    ranks = [spans_by_rank(t) for t in timelines]
    row_in = row_height_in(timelines, sum(map(len, ranks)))
    panels = grow(figure, header_in, [row_in * len(r) for r in ranks], gap_in)
    for axes, timeline, spans in zip(panels, timelines, ranks, strict=True):
        rows = [
            Row(label=timeline.rank_name(rank), top=float(place), spans=spans[rank])
            for place, rank in enumerate(spans)
        ]
        draw_rows(axes, rows, end_s=end_s, unit_s=unit[1], width_in=PLOT_IN, row_in=row_in)
        finish_axes(axes, num_rows=len(rows), end_s=end_s, unit=unit, bottom=axes is panels[-1])
    return panels


def bubble_share(timeline: Timeline) -> float:
    """Share of the step in which nothing runs on a rank, mean over ranks."""
    return breakdown_s(timeline)["bubble"] / timeline.end_s


def _name(timeline: Timeline) -> str:
    batches = {s.micro_batch for s in timeline.spans if s.stream == COMPUTE and s.micro_batch >= 0}
    name = timeline.title or f"a {timeline.source} step"
    return f"{name}, {counted(len(batches), 'micro-batch', 'es')}" if batches else name


def _finding(timeline: Timeline) -> str:
    return f"{percent(bubble_share(timeline))} of the step is bubble"


def _note(timeline: Timeline) -> str:
    """Where the step comes from, and how to read the chart."""
    ranks = counted(len(timeline.ranks), "rank")
    text = (
        f"{timeline.source}, step {format_duration(timeline.end_s)}, {ranks} drawn; "
        "bubble: time in which nothing runs on a rank, mean over ranks"
    )
    return text + (f"; {SHADES}" if chunks_per_rank(timeline) > 1 else "")
