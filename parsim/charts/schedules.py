"""The same job under several schedules, one above the other on one time axis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from parsim.charts.gantt import SHADES, bubble_share, draw_panels
from parsim.charts.lanes import chunks_per_rank, legend_entries, require_spans
from parsim.charts.style import SMALL_PT, file_format, header, new_figure, save, style
from parsim.errors import ParsimError
from parsim.timeline import COMPUTE, Timeline
from parsim.units import format_bytes, format_duration, percent

_GAP_IN = 0.34
"""Between panels, with the words of the lower one."""


class Panel(NamedTuple):
    """One schedule."""

    schedule: str
    timeline: Timeline
    peak_bytes: float
    """Memory of the fullest rank."""
    fits: bool = True
    vpp: int = 1


def draw_schedules(panels: Sequence[Panel], path: Path, *, name: str = "") -> None:
    """Write the compute streams of several schedules, each with step time, bubble and peak memory.

    `name` says what job it is. Raises ParsimError for another suffix than .png, .svg and .pdf, or where
    there is no schedule to draw.
    """
    file_format(path)
    save(schedules_figure(panels, name=name), path)


def schedules_figure(panels: Sequence[Panel], *, name: str = "") -> Figure:
    """Several schedules of one job as a figure, in the order given."""
    if not panels:
        raise ParsimError("there is no schedule to draw", expected="one or more")
    timelines = [_compute_only(panel.timeline) for panel in panels]
    for timeline in timelines:
        require_spans(timeline)
    note = "compute streams, one row a pipeline rank; bubble: time in which nothing runs on a rank, mean"
    if max(map(chunks_per_rank, timelines)) > 1:
        note += f"; {SHADES}"
    with style():
        figure = new_figure()
        header_in = header(figure, _finding(panels), note, legend_entries(timelines), name=name)
        rows = draw_panels(figure, timelines, header_in=header_in + _GAP_IN, gap_in=_GAP_IN)
        for axes, panel in zip(rows, panels, strict=True):
            _name_panel(axes, panel)
    return figure


def _compute_only(timeline: Timeline) -> Timeline:
    spans = tuple(span for span in timeline.spans if span.stream == COMPUTE)
    return Timeline(spans=spans, source=timeline.source, title=timeline.title)


def _finding(panels: Sequence[Panel]) -> str:
    fitting = [panel for panel in panels if panel.fits]
    among = fitting or panels
    best, slowest = (f(among, key=lambda panel: panel.timeline.end_s) for f in (min, max))
    text = f"fastest: {best.schedule}"
    if len(fitting) < len(panels):
        text += f" of the {len(fitting)} that fit" if fitting else ", but none fits"
    other = next((panel for panel in among if panel.schedule == "1f1b"), slowest)
    if other is not best:
        saved = 1 - best.timeline.end_s / other.timeline.end_s
        text += f", {percent(saved)} less time than {other.schedule}"
    return text


def _name_panel(axes: Axes, panel: Panel) -> None:
    words = [
        f"step {format_duration(panel.timeline.end_s)}",
        f"bubble {percent(bubble_share(panel.timeline))}",
        f"peak {format_bytes(panel.peak_bytes)}",
        *([] if panel.fits else ["does not fit"]),
    ]
    chunks = f" ({panel.vpp} chunks a rank)" if panel.vpp > 1 else ""
    axes.annotate(
        f"{panel.schedule}{chunks}: {', '.join(words)}",
        (0.0, 1.0),
        xycoords="axes fraction",
        xytext=(0, 4),
        textcoords="offset points",
        va="bottom",
        size=SMALL_PT + 0.5,
        weight="bold",
        annotation_clip=False,
    )
