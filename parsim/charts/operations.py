"""The operations of some actions: compute on one lane, what it hides or waits for on the lanes below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from parsim.charts.palette import COLORS, IDLE_COLOR, LABELS
from parsim.charts.style import (
    LEFT_IN,
    RIGHT_IN,
    WIDTH_IN,
    Entry,
    file_format,
    grow,
    header,
    lighter,
    new_figure,
    save,
    style,
    text_color_on,
    time_unit,
)
from parsim.errors import ParsimError
from parsim.simulate.detail import SHARED, ActionDetail
from parsim.timeline import COMPUTE, CP, DP, EP, TP, Span, Timeline
from parsim.units import percent

MAX_ACTIONS = 8
"""Panels that fit under each other."""
PARTS_SHOWN = 3
"""Parts of the model (layers, embedding, head) that an action is drawn of: the others look the same."""
COMPUTE_IN, LANE_IN, GAP_IN = 1.15, 0.24, 0.34
PLOT_IN = WIDTH_IN - LEFT_IN - RIGHT_IN
TEXT_PT = 6.5


def draw_operations(
    details: Sequence[ActionDetail], timeline: Timeline, path: Path, *, rank: int
) -> None:
    """Write the operations of a rank's actions, a panel each, to a .png, .svg or .pdf file.

    From the timeline comes what its replicas exchange meanwhile.

    Raises ParsimError for another suffix, or more than MAX_ACTIONS actions.
    """
    file_format(path)
    save(operations_figure(details, timeline, rank=rank), path)


def operations_figure(details: Sequence[ActionDetail], timeline: Timeline, *, rank: int) -> Figure:
    """The first parts of each action as a figure; all panels have one time scale."""
    if not 0 < len(details) <= MAX_ACTIONS:
        raise ParsimError(
            "a chart of operations has a panel for each action",
            where="--detail-chart",
            got=f"{len(details)} actions",
            expected=f"1 to {MAX_ACTIONS}",
            hint="--detail-micro-batches says of how many micro-batches",
        )
    replicas = [span for span in timeline.spans if (span.rank, span.stream) == (rank, DP)]
    shown = [_shown(detail, replicas) for detail in details]
    name = f"{timeline.title}, {timeline.rank_name(rank)}"
    longest_s = max(end_s for _, end_s in shown)
    unit = time_unit(longest_s)
    occurring = {span.stream for spans, _ in shown for span in spans}
    lanes = [stream for stream in (COMPUTE, TP, CP, EP, DP) if stream == COMPUTE or stream in occurring]
    with style():
        figure = new_figure()
        header_in = header(figure, _finding(details), _note(details), _legend(shown), name=name)
        height_in = COMPUTE_IN + LANE_IN * (len(lanes) - 1)
        panels = grow(figure, header_in + 0.2, [height_in] * len(details), GAP_IN)
        for axes, detail, (spans, end_s) in zip(panels, details, shown, strict=True):
            _draw(axes, spans, lanes, end_s=end_s, longest_s=longest_s, unit_s=unit[1])
            axes.set_title(_panel_title(detail, end_s), loc="left", size=TEXT_PT + 2)
            axes.tick_params(axis="x", labelbottom=axes is panels[-1])
        panels[-1].set_xlabel(f"time since the start of the action ({unit[0]})")
    return figure


def _shown(detail: ActionDetail, replicas: Sequence[Span]) -> tuple[list[Span], float]:
    """Spans of an action's first parts, from its start, with those of the dp stream that run meanwhile;
    and where these parts end.
    """
    own = sorted((s for s in detail.spans if s.name != SHARED), key=lambda s: s.start_s)
    first = set(list(dict.fromkeys(map(_part, own)))[:PARTS_SHOWN])
    end_s = max(s.end_s for s in own if _part(s) in first and s.stream == COMPUTE)
    spans = [
        span._replace(
            start_s=max(span.start_s, detail.start_s) - detail.start_s,
            end_s=min(span.end_s, end_s) - detail.start_s,
        )
        for span in (*detail.spans, *replicas)
        if span.start_s < end_s and span.end_s > detail.start_s
    ]
    return spans, end_s - detail.start_s


def _part(span: Span) -> str:
    return span.name.partition(": ")[0]


def _draw(
    axes: Axes, spans: Sequence[Span], lanes: list[str], *, end_s: float, longest_s: float, unit_s: float
) -> None:
    """One panel: lanes from the top down, names in the boxes that have room."""
    heights = [COMPUTE_IN if lane == COMPUTE else LANE_IN for lane in lanes]
    tops = dict(zip(lanes, np.cumsum([0.0, *heights[:-1]]), strict=True))
    tall = dict(zip(lanes, heights, strict=True))
    points_per_s = PLOT_IN * 72 / longest_s
    axes.add_collection(_ground(end_s / unit_s, tops, tall))
    corners, colors, widths = [], [], []
    for span in spans:
        left, right = span.start_s / unit_s, span.end_s / unit_s
        top, bottom = tops[span.stream] + 0.02, tops[span.stream] + tall[span.stream] - 0.02
        corners.append([(left, top), (right, top), (right, bottom), (left, bottom)])
        colors.append(COLORS[span.kind])
        wide_pt = (span.end_s - span.start_s) * points_per_s
        widths.append(0.5 if wide_pt > 3 else 0.0)
        _name(axes, span, wide_pt, (left + right) / 2, (top + bottom) / 2)
    boxes = PolyCollection(corners, facecolors=colors, edgecolors="white", linewidths=widths, zorder=2)
    boxes.set_gid("spans")
    axes.add_collection(boxes)
    axes.set_ylim(sum(heights), 0)
    axes.set_xlim(0, longest_s / unit_s)
    middles = [tops[lane] + tall[lane] / 2 for lane in lanes]
    axes.set_yticks(middles, lanes)
    axes.tick_params(axis="y", length=0, pad=4)
    axes.spines["left"].set_visible(False)


def _ground(end: float, tops: dict[str, float], tall: dict[str, float]) -> PolyCollection:
    """Where compute could run: what stays visible of it is idle."""
    top, bottom = tops[COMPUTE] + 0.02, tops[COMPUTE] + tall[COMPUTE] - 0.02
    corners = [[(0, top), (end, top), (end, bottom), (0, bottom)]]
    return PolyCollection(corners, facecolors=IDLE_COLOR, linewidths=0, zorder=0.5)


def _name(axes: Axes, span: Span, wide_pt: float, x: float, y: float) -> None:
    """The operation's name, along its box or upright, where that is wide enough."""
    text = span.name.rpartition(": ")[2]
    along_pt = 0.62 * TEXT_PT * len(text)
    if wide_pt < 1.15 * TEXT_PT or (span.stream != COMPUTE and wide_pt < along_pt):
        return
    room_pt = COMPUTE_IN * 72
    longest = int(0.95 * room_pt / (0.58 * TEXT_PT))
    upright = wide_pt < along_pt
    if upright and len(text) > longest:
        text = text[: longest - 1] + "…"
    axes.text(
        x,
        y,
        text,
        size=TEXT_PT,
        rotation=90 if upright else 0,
        color=text_color_on(lighter(COLORS[span.kind], 0.0)),
        ha="center",
        va="center",
        clip_on=True,
        zorder=3,
    )


def _legend(shown: Sequence[tuple[list[Span], float]]) -> list[Entry]:
    occurring = {span.kind for spans, _ in shown for span in spans}
    known = [kind for kind in COLORS if kind in occurring]
    entries: list[Entry] = [(LABELS.get(kind, kind), [lighter(COLORS[kind], 0.0)]) for kind in known]
    return [*entries, ("compute waits", [lighter(IDLE_COLOR, 0.0)])]


def _hidden_share(details: Sequence[ActionDetail]) -> float | None:
    """Communication beside compute over all communication of the actions; None where there is none."""
    all_s = sum(s.duration_s for d in details for s in d.spans if s.stream != COMPUTE)
    hidden_s = sum(seconds for d in details for seconds in d.hidden_s.values())
    return hidden_s / all_s if all_s else None


def _finding(details: Sequence[ActionDetail]) -> str:
    share = _hidden_share(details)
    if share is None:
        return "no communication inside layers"
    return f"{percent(share)} of the communication inside layers runs beside compute"


def _note(details: Sequence[ActionDetail]) -> str:
    spans = sum(len(detail.spans) for detail in details)
    return f"simulated, {spans} operations; of each action the first {PARTS_SHOWN} parts of the model"


def _panel_title(detail: ActionDetail, end_s: float) -> str:
    share = end_s / (detail.end_s - detail.start_s)
    return f"{detail.action}: " + ("all of it" if share > 0.999 else f"the first {percent(share)}")
