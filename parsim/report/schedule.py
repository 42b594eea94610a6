"""A Timeline as the data of a schedule chart: small enough for a page, whatever the step's size.

Rows are ranks; of more than MOST_ROWS neighbours share a row. Spans are sent one by one as long as there
are few enough of them, compute first; the lanes of the other streams are cut into bins that say what
runs there most of the time, and for which share of it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parsim.charts.palette import COLORS, LABELS
from parsim.report.page import Cell, Column, Row, Schedule, Table
from parsim.timeline import COMPUTE, PP_STREAMS, STREAMS, Span, Timeline, busy_s
from parsim.units import format_duration

MOST_ROWS = 64
MOST_SPANS = 50_000
"""Spans that a page carries one by one: a megabyte."""
MOST_BINS = 1_500
"""Bins of a lane, at the most: about the pixels of a wide screen."""
ALL_BINS = 250_000
"""Bins of all lanes together."""
TICKS = 1 << 22
"""Times are whole numbers of this part of the chart's length."""
LEVELS = "0123456789"
"""How much of a bin is busy, in tenths, rounded up."""
KINDS = "abcdefghijklmnopqrstuvwxyz"
"""A bin's kind, as a place in the chart's list of kinds."""
OTHER = "other"
"""What kinds that have no colour are shown as."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSpans:
    """A row of the chart."""

    label: str
    ranks: int
    spans: tuple[Span, ...]


def schedule_of(
    timelines: Sequence[Timeline], *, caption: str, most_spans: int = MOST_SPANS
) -> Schedule:
    """The chart of some timelines, a row of each below the other where they have the same ranks."""
    rows = _rows(timelines)
    end_s = max(timeline.end_s for timeline in timelines)
    kinds = _kinds(rows)
    exact = _exact_streams(rows, most_spans)
    lanes = sum(len({_lane(span.stream) for span in row.spans} - exact) for row in rows)
    bins = max(100, min(MOST_BINS, ALL_BINS // max(lanes, 1)))
    whats: dict[tuple[str, str, int], int] = {}
    data = {
        "end_s": end_s,
        "ticks": TICKS,
        "kinds": kinds,
        "rows": [
            {
                "label": row.label,
                "ranks": row.ranks,
                "lanes": _lanes(row, exact, kinds, whats, bins=bins, end_s=end_s),
            }
            for row in rows
        ],
    }
    data["whats"] = [[pattern, kinds.index(key), stage] for pattern, key, stage in whats]
    return Schedule(
        caption=caption,
        note=_note(rows, exact, bins),
        data=data,
        legend=tuple((key, LABELS.get(key, key)) for key in kinds),
        rows=len(rows),
        summary=_summary(rows, end_s),
    )


def color_key(span: Span) -> str:
    """What colours a span: its kind, with pipeline transfers split by direction.

    Kinds are any text in a file: those without a colour are one, whatever they are called.
    """
    if span.kind != "pp":
        return span.kind if span.kind in COLORS else OTHER
    return "pp_recv" if span.stream.startswith("pp_recv") else "pp_send"


def _lane(stream: str) -> str:
    """Streams that share a lane: the two directions of a pipeline stream."""
    return stream.rsplit("_", 1)[0] if stream in PP_STREAMS else stream


LANES = tuple(dict.fromkeys(map(_lane, STREAMS)))


def _rows(timelines: Sequence[Timeline]) -> list[RowSpans]:
    """Rows in order of rank, timeline by timeline for each rank."""
    found: list[RowSpans] = []
    several = len(timelines) > 1
    ranks = sorted({rank for timeline in timelines for rank in timeline.ranks})
    together = -(-len(ranks) * len(timelines) // MOST_ROWS)
    by_rank: list[dict[int, list[Span]]] = []
    for timeline in timelines:
        own: dict[int, list[Span]] = defaultdict(list)
        for span in timeline.spans:
            own[span.rank].append(span)
        by_rank.append(own)
    for first in range(0, len(ranks), together):
        some = ranks[first : first + together]
        for timeline, own in zip(timelines, by_rank, strict=True):
            spans = tuple(span for rank in some for span in own.get(rank, ()))
            if not spans:
                continue
            label = timeline.rank_name(some[0])
            if len(some) > 1:
                label = f"ranks {some[0]}–{some[-1]}"
            source = f" {timeline.source}" if several else ""
            found.append(RowSpans(label=label + source, ranks=len(some), spans=spans))
    return found


def _kinds(rows: Sequence[RowSpans]) -> list[str]:
    occurring = {color_key(span) for row in rows for span in row.spans}
    return [key for key in (*COLORS, OTHER) if key in occurring]


def _exact_streams(rows: Sequence[RowSpans], most_spans: int) -> set[str]:
    """The lanes whose spans are sent one by one: compute first, then the smallest."""
    if any(row.ranks > 1 for row in rows):
        return set()
    numbers = Counter(_lane(span.stream) for row in rows for span in row.spans)
    kept: set[str] = set()
    total = 0
    for lane in sorted(numbers, key=lambda lane: (lane != COMPUTE, numbers[lane], lane)):
        total += numbers[lane]
        if total > most_spans:
            break
        kept.add(lane)
    return kept


def _lanes(
    row: RowSpans,
    exact: set[str],
    kinds: list[str],
    whats: dict[tuple[str, str, int], int],
    *,
    bins: int,
    end_s: float,
) -> list[dict[str, Any]]:
    by_lane: dict[str, list[Span]] = defaultdict(list)
    for span in row.spans:
        by_lane[_lane(span.stream)].append(span)
    lanes = []
    for lane in LANES:
        spans = by_lane.get(lane)
        if spans and lane in exact:
            lanes.append({"stream": lane} | _one_by_one(spans, whats, end_s))
        elif spans:
            lanes.append({"stream": lane, "bins": _binned(spans, kinds, row.ranks, bins, end_s)})
    return lanes


def _one_by_one(
    spans: list[Span], whats: dict[tuple[str, str, int], int], end_s: float
) -> dict[str, list[int]]:
    """Columns of spans: the gap since the end of the one before, length, what it is, micro-batch."""
    gaps, lengths, what, micro_batches = [], [], [], []
    before = 0
    for span in sorted(spans, key=lambda span: (span.start_s, span.end_s)):
        start, end = (round(time_s / end_s * TICKS) for time_s in (span.start_s, span.end_s))
        gaps.append(start - before)
        lengths.append(end - start)
        before = end
        what.append(whats.setdefault((_pattern(span), color_key(span), span.stage), len(whats)))
        micro_batches.append(span.micro_batch)
    return {"gap": gaps, "length": lengths, "what": what, "mb": micro_batches}


def _pattern(span: Span) -> str:
    """A span's name with its micro-batch left out, so that few names serve many spans.

    >>> _pattern(Span(0, "compute", "2F13", 0.0, 1.0, "forward", 2, 13))
    '2F{m}'
    """
    return re.sub(rf"(?<!\d){span.micro_batch}(?!\d)(?!.*\d)", "{m}", span.name.replace("{", "("))


def _binned(spans: list[Span], kinds: list[str], ranks: int, bins: int, end_s: float) -> str:
    """Two letters a bin: the kind that runs there longest, and how much of it is busy in all."""
    edges = np.linspace(0.0, end_s, bins + 1)
    covered = np.zeros((len(kinds), bins))
    for number, key in enumerate(kinds):
        own = [(span.start_s, span.end_s) for span in spans if color_key(span) == key]
        if own:
            starts, ends = np.sort(np.array(own), axis=0).T
            covered[number] = np.diff(_time_before(edges, starts) - _time_before(edges, ends))
    busy = covered.sum(axis=0) / (ranks * end_s / bins)
    level = np.minimum(np.ceil(busy * 9 - 1e-6), 9).astype(int)
    longest = covered.argmax(axis=0)
    return "".join(f"{KINDS[kind]}{LEVELS[of]}" for kind, of in zip(longest, level, strict=True))


def _time_before(
    edges: np.ndarray[Any, np.dtype[np.float64]], times: np.ndarray[Any, np.dtype[np.float64]]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Σ max(0, edge − time) over sorted times, for every edge."""
    number = np.searchsorted(times, edges)
    before = np.concatenate([[0.0], np.cumsum(times)])[number]
    return np.asarray(number * edges - before, dtype=np.float64)


def _note(rows: Sequence[RowSpans], exact: set[str], bins: int) -> str:
    lanes = {_lane(span.stream) for row in rows for span in row.spans}
    text = f"{len(rows)} rows; tall: compute; thin: communication, then the host"
    together = max(row.ranks for row in rows)
    if together > 1:
        text += f"; a row is the mean of up to {together} ranks"
    binned = [lane for lane in LANES if lane in lanes - exact]
    if binned:
        text += (
            f"; {', '.join(binned)} in {bins} steps of time, each with what runs longest there: "
            "too many tasks to show one by one"
        )
    return text


def _summary(rows: Sequence[RowSpans], end_s: float) -> Table:
    """What each row does with the step."""
    made: list[Row] = []
    for number, row in enumerate(rows):
        by_rank: dict[int, list[Span]] = defaultdict(list)
        for span in row.spans:
            by_rank[span.rank].append(span)
        compute = [busy_s(s for s in own if s.stream == COMPUTE) for own in by_rank.values()]
        anything = [busy_s(own) for own in by_rank.values()]
        last_s = max(span.end_s for span in row.spans)
        times = (_mean(compute), end_s - _mean(anything), last_s)
        cells = (
            Cell(text=row.label, value=number),
            *(Cell(text=format_duration(time_s), value=time_s) for time_s in times),
            Cell(text=f"{len(row.spans):,}", value=len(row.spans)),
        )
        made.append(Row(cells=cells))
    return Table(
        caption="What each row does with the step",
        columns=(
            Column(key="rank", title="row"),
            Column(key="compute", title="computes", numeric=True),
            Column(key="idle", title="nothing runs", numeric=True),
            Column(key="end", title="last task ends", numeric=True),
            Column(key="tasks", title="tasks", numeric=True),
        ),
        rows=tuple(made),
        folded=True,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
