"""Rows of lanes: the drawing that Gantt charts, comparisons and schedules share.

A row is one rank of one timeline. Its compute stream is a tall lane on a light ground, so that idle
time shows; below lie thin lanes, one for each kind of communication that occurs. A lane that holds
more spans than the plot has pixels is drawn pixel by pixel, in the mean colour of what runs there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb

from parsim.charts.palette import COLORS, IDLE_COLOR, LABELS, OTHER_COLOR
from parsim.charts.style import DPI, Color, Entry, lighter, text_color_on
from parsim.errors import ParsimError
from parsim.timeline import COMPUTE, HOST, PP_STREAMS, Span, Timeline

LANES = (COMPUTE, "tp", "cp", "ep", "dp", "pp_send", "pp_recv", HOST)
"""Lanes of a row from the top down; the two directions of a pipeline stream share one."""
_THIN = 0.24
"""Height of a communication lane as a share of the compute lane's."""
_ROW_FILL = 0.86
"""Share of a row that its lanes take; the rest parts it from the next row."""
_TALLEST_IN = 13.0
"""Rows get lower, rather than the picture higher, beyond this."""
_DIGIT_EM = 0.64
"""Width of a digit of DejaVu Sans."""
_MIN_TEXT_PT, _MAX_TEXT_PT = 5.5, 9.0
_MAX_TEXTS = 4000
"""More numbers than this are no longer read by anyone."""
_MAX_VECTOR_BOXES = 20_000
"""SVG and PDF hold more boxes than this as an image: they would be slow to open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The spans of one rank, and where they are drawn."""

    label: str
    top: float
    """Distance from the top of the panel, in rows."""
    spans: tuple[Span, ...]


class Box(NamedTuple):
    """One rectangle: seconds from left to right, rows from top to bottom."""

    left_s: float
    right_s: float
    top: float
    bottom: float
    color: tuple[float, ...]
    text: str = ""
    merged: bool = False
    """Whether it stands for many spans."""


def require_spans(timeline: Timeline) -> None:
    """Refuse a timeline that has nothing to draw."""
    if not timeline.spans or not timeline.end_s > 0:
        raise ParsimError(
            "this timeline holds no spans, so there is nothing to draw",
            where=timeline.title or timeline.source,
        )


def spans_by_rank(timeline: Timeline) -> dict[int, tuple[Span, ...]]:
    """The spans of each rank, in order of rank."""
    found: dict[int, list[Span]] = defaultdict(list)
    for span in timeline.spans:
        found[span.rank].append(span)
    return {rank: tuple(found[rank]) for rank in sorted(found)}


def legend_entries(timelines: Iterable[Timeline]) -> list[Entry]:
    """What the colours mean: the kinds of time that occur, each in its chunks' shades, then idle."""
    chunks: dict[str, int] = {}
    for timeline in timelines:
        for spans in spans_by_rank(timeline).values():
            held = max(1, len(_chunks(spans)))
            for kind, stream, staged in {(s.kind, s.stream, s.stage >= 0) for s in spans}:
                key = _color_key(kind, stream)
                shades = held if stream == COMPUTE and staged else 1
                chunks[key] = max(chunks.get(key, 1), shades)
    known = [key for key in COLORS if key in chunks]
    entries: list[Entry] = [
        (LABELS.get(key, key), [_shade(key, chunk, chunks[key]) for chunk in range(chunks[key])])
        for key in (*known, *sorted(set(chunks) - set(COLORS)))
    ]
    return [*entries, ("compute idle", [to_rgb(IDLE_COLOR)])]


def chunks_per_rank(timeline: Timeline) -> int:
    """Model chunks of the rank that holds the most."""
    return max((len(_chunks(spans)) for spans in spans_by_rank(timeline).values()), default=0)


def _color_key(kind: str, stream: str) -> str:
    if kind != "pp":
        return kind
    return "pp_recv" if stream.startswith("pp_recv") else "pp_send"


def _lane(stream: str) -> str:
    return stream.rsplit("_", 1)[0] if stream in PP_STREAMS else stream


def _chunks(spans: Sequence[Span]) -> dict[int, int]:
    """The chunk, from 0, of every stage that a rank computes."""
    stages = sorted({s.stage for s in spans if s.stream == COMPUTE and s.stage >= 0})
    return {stage: chunk for chunk, stage in enumerate(stages)}


def _shade(key: str, chunk: int, chunks: int) -> Color:
    """The colour of a model chunk: the first is full, the last is light."""
    share = 0.55 * chunk / (chunks - 1) if chunks > 1 else 0.0
    return lighter(COLORS.get(key, OTHER_COLOR), share)


def _lanes_in(spans: Iterable[Span]) -> list[str]:
    occurring = {_lane(stream) for stream in {span.stream for span in spans}}
    return [lane for lane in LANES if lane == COMPUTE or lane in occurring]


def row_height_in(timelines: Sequence[Timeline], num_rows: int) -> float:
    """Inches of a row: roomy for a few rows, lower for many, higher where communication shows."""
    thin = max(len(_lanes_in(timeline.spans)) for timeline in timelines) - 1
    compute_in = min(0.42, max(0.14, 2.6 / num_rows))
    return min(compute_in * (1 + _THIN * thin) / _ROW_FILL, _TALLEST_IN / num_rows)


def _lane_places(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """(top, height) of each lane inside a row, for the lanes that any row has."""
    lanes = _lanes_in(span for row in rows for span in row.spans)
    weights = [1.0 if lane == COMPUTE else _THIN for lane in lanes]
    each = _ROW_FILL / sum(weights)
    places, top = {}, (1 - _ROW_FILL) / 2
    for lane, weight in zip(lanes, weights, strict=True):
        places[lane] = (top, weight * each)
        top += weight * each
    return places


def _row_boxes(row: Row, places: dict[str, tuple[float, float]]) -> dict[str, list[Box]]:
    """One box a span, by lane."""
    chunks = _chunks(row.spans)
    colors: dict[tuple[str, str, int], Color] = {}
    boxes: dict[str, list[Box]] = defaultdict(list)
    for span in row.spans:
        lane = _lane(span.stream)
        look = (span.kind, span.stream, span.stage if lane == COMPUTE else -1)
        if look not in colors:
            chunk = chunks.get(look[2])
            shades = (0, 1) if chunk is None else (chunk, len(chunks))
            colors[look] = _shade(_color_key(span.kind, span.stream), *shades)
        top = row.top + places[lane][0]
        text = str(span.micro_batch) if lane == COMPUTE and span.micro_batch >= 0 else ""
        boxes[lane].append(Box(span.start_s, span.end_s, top, top + places[lane][1], colors[look], text))
    return boxes


def _merged_where_small(boxes: list[Box], end_s: float, columns: int) -> list[Box]:
    """One lane's boxes, or one box a pixel column where most would be narrower than four pixels.

    Such a box has the mean colour by time, and as opacity the share of its time that is busy (at
    least a half, to be seen at all). Equal neighbours are one box.
    """
    column_s = end_s / columns
    if float(np.median([box.right_s - box.left_s for box in boxes])) >= 4 * column_s:
        return boxes
    edges_s = np.linspace(0.0, end_s, columns + 1)
    colors = sorted({box.color for box in boxes})
    covered = []
    for color in colors:
        mine = [box for box in boxes if box.color == color]
        since_start = _time_after([box.left_s for box in mine], edges_s)
        covered.append(np.diff(since_start - _time_after([box.right_s for box in mine], edges_s)))
    share = np.stack(covered) / column_s  # (color, column)
    busy = share.sum(axis=0)
    mean = np.array(colors).T @ share / np.where(busy > 0, busy, 1.0)
    opacity = np.where(busy > 1e-9, np.clip(busy, 0.5, 1.0), 0.0)
    looks = np.round(np.vstack([mean, opacity]).T * 255) / 255  # (column, rgba)
    starts = np.flatnonzero(np.any(np.diff(looks, axis=0, prepend=-1.0) != 0, axis=1))
    ends = np.append(starts[1:], columns)
    return [
        Box(edges_s[a], edges_s[b], boxes[0].top, boxes[0].bottom, tuple(looks[a]), merged=True)
        for a, b in zip(starts, ends, strict=True)
        if looks[a, 3] > 0
    ]


def _time_after(moments_s: list[float], edges_s: Any) -> Any:
    """Sum over the moments of the time that has passed since each, at every edge."""
    moments = np.sort(np.array(moments_s))
    passed = np.searchsorted(moments, edges_s)
    sums = np.concatenate(([0.0], np.cumsum(moments)))
    return passed * edges_s - sums[passed]


def _collection(boxes: Sequence[Box], *, gid: str, unit_s: float, **how: Any) -> PolyCollection:
    corners = np.array([(b.left_s, b.right_s, b.top, b.bottom) for b in boxes])
    left, right, top, bottom = corners.T
    x = np.stack([left, right, right, left], axis=1) / unit_s
    y = np.stack([top, top, bottom, bottom], axis=1)
    corners_xy: Any = np.stack([x, y], axis=2)
    collection = PolyCollection(corners_xy, **how)
    collection.set_gid(gid)
    return collection


def draw_rows(
    axes: Axes, rows: Sequence[Row], *, end_s: float, unit_s: float, width_in: float, row_in: float
) -> None:
    """Draw rows on an axes whose plot is `width_in` wide and whose rows are `row_in` high."""
    places = _lane_places(rows)
    columns = int(width_in * DPI)
    boxes: list[Box] = []
    for row in rows:
        for lane in _row_boxes(row, places).values():
            boxes += _merged_where_small(lane, end_s, columns)
    top, height = places[COMPUTE]
    ground = [Box(0.0, end_s, row.top + top, row.top + top + height, ()) for row in rows]
    axes.add_collection(
        _collection(ground, gid="idle", unit_s=unit_s, facecolors=IDLE_COLOR, linewidths=0, zorder=0.5)
    )
    points_per_s = width_in * 72 / end_s
    roomy = row_in * 72 * height > 6
    parted = [
        0.5 if roomy and not b.merged and (b.right_s - b.left_s) * points_per_s > 4 else 0.0
        for b in boxes
    ]
    spans = _collection(
        boxes,
        gid="spans",
        unit_s=unit_s,
        facecolors=np.array([(*b.color, 1.0)[:4] for b in boxes]),
        edgecolors="white",
        linewidths=parted,
        zorder=2,
    )
    spans.set_rasterized(len(boxes) > _MAX_VECTOR_BOXES)
    axes.add_collection(spans)
    _number_boxes(axes, boxes, points_per_s=points_per_s, unit_s=unit_s, lane_pt=height * row_in * 72)
    _label_rows(axes, rows, compute=(top, height), row_in=row_in)


def _number_boxes(
    axes: Axes, boxes: Sequence[Box], *, points_per_s: float, unit_s: float, lane_pt: float
) -> None:
    """Write the micro-batch into every box that has the room."""
    numbered = [box for box in boxes if box.text]
    longest = max((len(box.text) for box in numbered), default=0)
    if not longest:
        return
    # The width that half of the time lies in boxes of: an action cut into pieces makes many narrow ones.
    widths_s = np.sort([box.right_s - box.left_s for box in numbered])
    half = np.searchsorted(np.cumsum(widths_s), widths_s.sum() / 2)
    usual_pt = float(widths_s[min(half, len(widths_s) - 1)]) * points_per_s
    size_pt = min(_MAX_TEXT_PT, 0.62 * lane_pt, 0.85 * usual_pt / (longest * _DIGIT_EM))
    if size_pt < _MIN_TEXT_PT:
        return
    fitting = [
        box
        for box in numbered
        if (box.right_s - box.left_s) * points_per_s > (len(box.text) * _DIGIT_EM + 0.2) * size_pt
    ]
    if len(fitting) > _MAX_TEXTS:
        return
    for box in fitting:
        axes.text(
            (box.left_s + box.right_s) / 2 / unit_s,
            (box.top + box.bottom) / 2,
            box.text,
            size=size_pt,
            color=text_color_on(box.color),
            ha="center",
            va="center_baseline",
            clip_on=True,
            zorder=3,
        )


def _label_rows(axes: Axes, rows: Sequence[Row], *, compute: tuple[float, float], row_in: float) -> None:
    """Name every row beside its compute lane, or every second, fourth … where rows are low."""
    step = 1
    while step * row_in < 0.145:
        step *= 2
    shown = rows[::step]
    axes.set_yticks([row.top + compute[0] + compute[1] / 2 for row in shown], [r.label for r in shown])
    axes.tick_params(axis="y", length=0, pad=4)


def finish_axes(
    axes: Axes, *, num_rows: float, end_s: float, unit: tuple[str, float], bottom: bool
) -> None:
    """Limits, grid and time axis; only the panel at the bottom names the time."""
    name, unit_s = unit
    axes.set_ylim(num_rows, 0)
    axes.set_xlim(0, end_s / unit_s)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color="#D0D0D0", linewidth=0.5, zorder=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", labelbottom=bottom)
    if bottom:
        axes.set_xlabel(f"time since the start of the step ({name})")
