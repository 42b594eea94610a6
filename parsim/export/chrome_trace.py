"""Timelines as a Chrome trace, for Perfetto (ui.perfetto.dev) and chrome://tracing.

A process is one rank of one timeline, a thread one stream of it. Arrows join the two ends of a pipeline
transfer; memory is a counter. Times are rounded to nanoseconds, starts and ends alike, so that spans
that touch still touch.

Format: Google's "Trace Event Format", which perfetto.dev describes under "Other trace formats".
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from parsim import __version__
from parsim.config import write_file
from parsim.errors import ParsimError
from parsim.timeline import STREAMS, MemorySample, Span, Timeline, transfers

Event = dict[str, Any]
"""One event of the trace, with the keys of the format: ph is its phase, ts and dur are in µs."""


def write_chrome_trace(path: Path, timelines: Sequence[Timeline]) -> None:
    """Write timelines to one Chrome trace file, an event a line."""
    trace = chrome_trace(timelines)
    events = ",\n".join(json.dumps(e, separators=(",", ":")) for e in trace["traceEvents"])
    rest = json.dumps({key: value for key, value in trace.items() if key != "traceEvents"})
    write_file(path, f'{rest[:-1]}, "traceEvents": [\n{events}\n]}}\n')


def chrome_trace(timelines: Sequence[Timeline]) -> dict[str, Any]:
    """Timelines as one document in the Chrome trace format.

    Raises ParsimError where a timeline has no spans.
    """
    if not timelines:
        raise ParsimError("there is no timeline to write", expected="one or more")
    for timeline in timelines:
        if not timeline.spans:
            raise ParsimError(
                "this timeline holds no spans, so there is no trace of it",
                where=timeline.title or timeline.source,
            )
    events: list[Event] = []
    first_pid = 1  # Perfetto takes process 0 for the idle task
    for group, timeline in zip(group_names(timelines), timelines, strict=True):
        ranks = sorted({*timeline.ranks, *(sample.rank for sample in timeline.memory)})
        pids = {rank: first_pid + i for i, rank in enumerate(ranks)}
        first_pid += len(ranks)
        events += _timeline_events(timeline, group, pids, first_flow=len(events))
    return {
        "displayTimeUnit": "ms",
        "otherData": {"parsim": __version__, "timelines": [t.title or t.source for t in timelines]},
        "traceEvents": events,
    }


def group_names(timelines: Sequence[Timeline]) -> list[str]:
    """What tells the timelines' processes apart: source, then title, then a number.

    >>> group_names([Timeline(spans=()), Timeline(spans=(), source="measured")])
    ['simulated', 'measured']
    """
    sources = Counter(t.source for t in timelines)
    names = [t.source if sources[t.source] == 1 else f"{t.source} {t.title}".strip() for t in timelines]
    total, seen = Counter(names), Counter[str]()
    for i, name in enumerate(names):
        seen[name] += 1
        if total[name] > 1:
            names[i] = f"{name} ({seen[name]})"
    return names


def _timeline_events(
    timeline: Timeline, group: str, pids: dict[int, int], *, first_flow: int
) -> Iterator[Event]:
    """Names and slices of each thread, then arrows, which need the slices they join, then counters."""
    threads = {(rank, stream): without_overlap(spans) for rank, stream, spans in timeline.lanes()}
    place: dict[Span, tuple[int, int]] = {}
    for rank, pid in pids.items():
        yield _name("process_name", pid, 0, {"name": f"{group} {timeline.rank_name(rank)}"})
        yield _name("process_sort_index", pid, 0, {"sort_index": pid})
        mine = [
            (stream if i == 0 else f"{stream} ({i + 1})", spans)
            for stream in STREAMS
            for i, spans in enumerate(threads.get((rank, stream), ()))
        ]
        for i, (name, spans) in enumerate(mine):
            # Perfetto knows a thread by its number alone, so no two processes share one.
            tid = pid * 1000 + i
            yield _name("thread_name", pid, tid, {"name": name})
            yield _name("thread_sort_index", pid, tid, {"sort_index": i})
            for span in spans:
                yield _slice(span, pid, tid)
                place[span] = (pid, tid)
    for i, (send, receive) in enumerate(transfers(timeline.spans)):
        yield from _arrow(first_flow + i, send, place[send], receive, place[receive])
    for sample in sorted(timeline.memory, key=lambda s: (s.rank, s.time_s)):
        yield _counter(sample, pids[sample.rank])


def without_overlap(spans: Iterable[Span]) -> list[tuple[Span, ...]]:
    """Spans of one stream on as few threads as hold them without overlap: one, for a stream in order."""
    threads: list[list[Span]] = []
    for span in sorted(spans, key=lambda s: (s.start_s, s.end_s)):
        start_ns = _ns(span.start_s)
        free = next((t for t in threads if _ns(t[-1].end_s) <= start_ns), None)
        if free is None:
            threads.append([span])
        else:
            free.append(span)
    return [tuple(thread) for thread in threads]


def _ns(time_s: float) -> int:
    return round(time_s * 1e9)


def _us(time_ns: int) -> float:
    return time_ns / 1000


def _name(kind: str, pid: int, tid: int, args: Event) -> Event:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": args}


def _slice(span: Span, pid: int, tid: int) -> Event:
    args: Event = {"kind": span.kind}
    if span.stage >= 0:
        args["stage"] = span.stage
    if span.micro_batch >= 0:
        args["micro_batch"] = span.micro_batch
    start_ns = _ns(span.start_s)
    return {
        "ph": "X",
        "name": span.name,
        "cat": span.kind,
        "pid": pid,
        "tid": tid,
        "ts": _us(start_ns),
        "dur": _us(_ns(span.end_s) - start_ns),
        "args": args,
    }


def _arrow(
    flow: int, send: Span, sender: tuple[int, int], receive: Span, receiver: tuple[int, int]
) -> Iterator[Event]:
    """An arrow from the start of the send to the last nanosecond of the receive."""
    same = {"name": send.name, "cat": "pp", "id": flow}
    arrival_ns = max(_ns(receive.start_s), _ns(receive.end_s) - 1)
    yield {"ph": "s", **same, "pid": sender[0], "tid": sender[1], "ts": _us(_ns(send.start_s))}
    yield {
        "ph": "f",
        "bp": "e",
        **same,
        "pid": receiver[0],
        "tid": receiver[1],
        "ts": _us(max(arrival_ns, _ns(send.start_s))),
    }


def _counter(sample: MemorySample, pid: int) -> Event:
    return {
        "ph": "C",
        "name": "memory",
        "pid": pid,
        "ts": _us(_ns(sample.time_s)),
        "args": {"bytes": sample.num_bytes},
    }
