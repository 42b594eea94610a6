"""Timelines one above the other: predicted and measured, or one schedule and the next."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from parsim.charts.gantt import PLOT_IN, SHADES, bubble_share
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
from parsim.charts.palette import TEXT_COLOR
from parsim.charts.style import (
    LEFT_IN,
    counted,
    file_format,
    grow,
    header,
    new_figure,
    save,
    style,
    time_unit,
)
from parsim.errors import ParsimError
from parsim.timeline import Timeline
from parsim.units import format_duration, percent

_LABEL_IN = 0.6
"""Room that the words "predicted" and "measured" need beside the ranks' names."""
_PAIR_GAP = 0.35
"""Space between the pairs of two ranks, in rows."""


def draw_comparison(predicted: Timeline, measured: Timeline, path: Path, *, because: str = "") -> None:
    """Write predicted above measured (or replayed), rank by rank on one time axis, to a .png, .svg or
    .pdf file; `because` says what makes them differ.

    Ranks that only one of the two has are left out, and the chart says so. Raises ParsimError for
    another suffix, a timeline without spans, or two timelines without a common rank.
    """
    file_format(path)
    save(comparison_figure(predicted, measured, because=because), path)


def comparison_figure(predicted: Timeline, measured: Timeline, *, because: str = "") -> Figure:
    """Predicted above measured, rank by rank, as a figure."""
    for timeline in (predicted, measured):
        require_spans(timeline)
    both = [spans_by_rank(predicted), spans_by_rank(measured)]
    ranks = sorted(both[0].keys() & both[1].keys())
    if not ranks:
        raise ParsimError(
            "the two timelines have no rank in common",
            got=f"predicted {_listed(both[0])}, measured {_listed(both[1])}",
        )
    rows = [
        Row(label=label, top=place * (2 + _PAIR_GAP) + half, spans=spans[rank])
        for place, rank in enumerate(ranks)
        for half, (label, spans) in enumerate(
            ((f"rank {rank} predicted", both[0]), (_word(measured), both[1]))
        )
    ]
    num_rows = rows[-1].top + 1
    end_s = max(predicted.end_s, measured.end_s)
    shown_s = 1.01 * end_s  # so that the line at the end is seen
    unit = time_unit(end_s)
    row_in = row_height_in([predicted, measured], len(rows))
    with style():
        figure = new_figure()
        left_out = len(both[0].keys() | both[1].keys()) - len(ranks)
        header_in = header(
            figure,
            _comparison_finding(predicted, measured),
            "; ".join(filter(None, (because, _comparison_note(predicted, measured, left_out)))),
            legend_entries([predicted, measured]),
            name=measured.title or predicted.title,
        )
        (axes,) = grow(figure, header_in, [row_in * num_rows], 0.0, left_in=LEFT_IN + _LABEL_IN)
        draw_rows(axes, rows, end_s=shown_s, unit_s=unit[1], width_in=PLOT_IN - _LABEL_IN, row_in=row_in)
        finish_axes(axes, num_rows=num_rows, end_s=shown_s, unit=unit, bottom=True)
        for timeline, line in ((predicted, (0, (5, 3))), (measured, "solid")):
            axes.axvline(
                timeline.end_s / unit[1], color=TEXT_COLOR, linewidth=1.2, linestyle=line, zorder=1.5
            )
    return figure


def _listed(ranks: Mapping[int, object]) -> str:
    return f"{counted(len(ranks), 'rank')} from {min(ranks)} to {max(ranks)}"


def _comparison_finding(predicted: Timeline, measured: Timeline) -> str:
    error = predicted.end_s / measured.end_s - 1
    verdict = f"{percent(abs(error))} too {'long' if error > 0 else 'short'}"
    if abs(error) < 0.0005:
        verdict = "the same"
    return (
        f"predicted {format_duration(predicted.end_s)}, "
        f"{_word(measured)} {format_duration(measured.end_s)}, {verdict}"
    )


def _word(measured: Timeline) -> str:
    """What the second timeline is: a real step, or a replay with what was measured of it."""
    return "measured" if measured.source == "measured" else "replayed"


def _comparison_note(predicted: Timeline, measured: Timeline, left_out: int) -> str:
    parts = [
        f"bubble: {percent(bubble_share(predicted))} predicted, "
        f"{percent(bubble_share(measured))} {_word(measured)}",
        f"end of the step: predicted dashed, {_word(measured)} solid",
    ]
    if max(chunks_per_rank(predicted), chunks_per_rank(measured)) > 1:
        parts.append(SHADES)
    if left_out:
        parts.append(f"{counted(left_out, 'rank')} that only one of them has left out")
    return "; ".join(parts)
