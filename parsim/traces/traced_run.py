"""Traces of several ranks as one measured step: clocks aligned, steps cut out, idle hosts told apart."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from parsim.errors import ParsimError
from parsim.plan import ParallelPlan
from parsim.timeline import CP, DP, EP, HOST, STREAMS, TP, Span, Timeline
from parsim.traces.clocks import clock_offsets_ns
from parsim.traces.groups import group_of
from parsim.traces.kineto import RankTrace, Work, read_rank_trace

Window = tuple[int, int]
"""Begin and end of a step, in nanoseconds of the common clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedRun:
    """What traces say of a run."""

    timeline: Timeline
    """The step nearest to the median; rank is the global rank."""
    step: int
    """Its number, as torch's profiler counts; -1 where the trace marks no steps."""
    steps_s: tuple[float, ...]
    """All traced steps: from when the last rank begins one to when it begins the next."""
    world_size: int
    ranks: tuple[int, ...]
    on_gpu: bool
    clock_offsets_s: dict[int, float]
    """How far each rank's clock was ahead of the first one's, where clocks had to be set."""
    unaligned: bool
    """Whether they are of several hosts and nothing tells how their clocks differ."""
    left_out: int
    """Events that could not be used."""

    @property
    def step_time_s(self) -> float:
        """The median step."""
        return statistics.median(self.steps_s)


def read_traces(
    paths: Sequence[Path],
    plan: ParallelPlan | None = None,
    *,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> TracedRun:
    """Files of torch's profiler, one a rank, as a measured step.

    With the plan that ran, process groups become its streams. Raises ParsimError for a file that is no
    trace, two files of one rank, or ranks that the plan does not have.
    """
    traces: list[RankTrace] = []
    for done, path in enumerate(paths):
        progress("traces read", done, len(paths))
        traces.append(read_rank_trace(path, plan, place=done))
    _check_ranks(traces, plan)
    traces.sort(key=lambda trace: trace.rank)
    traces = [_with_transfers_named(trace, plan) for trace in traces]
    groups = {
        (trace.rank, stream): tuple(group_of(plan, stream, trace.rank)) if plan else ()
        for trace in traces
        for stream in (TP, CP, EP, DP)
    }
    offsets = clock_offsets_ns(traces, groups)
    hosts = {trace.host for trace in traces}
    zero_ns = min(trace.base_ns for trace in traces)
    traces = [_moved(trace, trace.base_ns - zero_ns - offsets[trace.rank]) for trace in traces]
    windows = _windows(traces)
    lengths = {step: (end_ns - begin_ns) * 1e-9 for step, (begin_ns, end_ns) in windows.items()}
    middle_s = statistics.median(lengths.values())
    step = min(lengths, key=lambda number: (abs(lengths[number] - middle_s), number))
    return TracedRun(
        timeline=_timeline(traces, windows[step], step),
        step=step,
        steps_s=tuple(lengths[number] for number in sorted(lengths)),
        world_size=max(trace.world_size for trace in traces),
        ranks=tuple(trace.rank for trace in traces),
        on_gpu=any(trace.on_gpu for trace in traces),
        clock_offsets_s={rank: ns * 1e-9 for rank, ns in offsets.items() if ns},
        unaligned=not any(offsets.values()) and len(hosts) > 1,
        left_out=sum(trace.left_out for trace in traces),
    )


def _check_ranks(traces: Sequence[RankTrace], plan: ParallelPlan | None) -> None:
    where: dict[int, str] = {}
    for trace in traces:
        if trace.rank in where:
            raise ParsimError(
                f"two traces are of rank {trace.rank}",
                where=trace.where,
                got=f"{where[trace.rank]} is, too",
                hint="give each rank's trace of one run",
            )
        where[trace.rank] = trace.where
        world = max(trace.world_size, trace.rank + 1)
        if plan is not None and (trace.rank >= plan.gpus or (world > 1 and world != plan.gpus)):
            raise ParsimError(
                "the trace is of a run of another size than the plan",
                where=trace.where,
                got=f"rank {trace.rank} of {world}",
                expected=f"one of {plan.gpus} ranks ({plan.short()})",
            )


def _with_transfers_named(trace: RankTrace, plan: ParallelPlan | None) -> RankTrace:
    """Transfers between stages under the name of the action whose result travels, as parsim has them.

    With one stage a rank, micro-batches pass every stage in order: the k-th of a step is number k.
    """
    if plan is None or plan.vpp > 1:
        return trace
    at = plan.coordinate(trace.rank).pp
    carried = {
        "pp_send_next": (at, "F"),
        "pp_recv_prev": (at - 1, "F"),
        "pp_send_prev": (at, "B"),
        "pp_recv_next": (at + 1, "B"),
    }
    seen: dict[tuple[int, str], int] = defaultdict(int)
    steps = sorted(trace.steps.items(), key=lambda item: item[1])
    named = []
    for work in trace.work:
        if work.kind == "pp":
            stage, letter = carried[work.stream]
            own = (n for n, (begin, end) in steps if begin <= work.launched_ns < end)
            key = next(own, -1), work.stream
            work = work._replace(name=f"{stage}{letter}{seen[key]}", stage=stage, micro_batch=seen[key])
            seen[key] += 1
        named.append(work)
    return replace(trace, work=tuple(named))


def _moved(trace: RankTrace, by_ns: int) -> RankTrace:
    """A trace on the common clock."""
    work = tuple(
        w._replace(
            start_ns=w.start_ns + by_ns, end_ns=w.end_ns + by_ns, launched_ns=w.launched_ns + by_ns
        )
        for w in trace.work
    )
    steps = {number: (begin + by_ns, end + by_ns) for number, (begin, end) in trace.steps.items()}
    return replace(trace, work=work, steps=steps, base_ns=0)


def _windows(traces: Sequence[RankTrace]) -> dict[int, Window]:
    """The steps that all ranks have, by number; without marks all there is, as step -1.

    A step begins for all when the last rank begins it, and ends when the next one begins: so each is as
    long as training takes for it, though ranks that have less to do run ahead of the others.
    """
    by_rank = {trace.rank: _rank_windows(trace) for trace in traces}
    common = sorted(set.intersection(*(set(own) for own in by_rank.values())))
    if not common:
        raise ParsimError(
            "no step is in all traces",
            got="; ".join(f"rank {rank}: steps {sorted(own)}" for rank, own in by_rank.items()),
            hint="profile the same steps on every rank",
        )
    if common == [-1]:
        begins, ends = zip(*(own[-1] for own in by_rank.values()), strict=True)
        return {-1: (min(begins), max(ends))}
    begin = {number: max(own[number][0] for own in by_rank.values()) for number in common}
    end = {number: max(own[number][1] for own in by_rank.values()) for number in common}
    return {number: (begin[number], begin.get(number + 1, end[number])) for number in common}


def _rank_windows(trace: RankTrace) -> dict[int, Window]:
    """The steps of one rank; a GPU's begin with the first kernel that the host launched in them."""
    if not trace.steps:
        return {-1: (trace.work[0].start_ns, max(work.end_ns for work in trace.work))}
    if not trace.on_gpu:
        return dict(trace.steps)
    found: dict[int, Window] = {}
    for number, (begin_ns, end_ns) in trace.steps.items():
        own = [work for work in trace.work if begin_ns <= work.launched_ns < end_ns]
        if own:
            found[number] = min(w.start_ns for w in own), max(w.end_ns for w in own)
    return found


def _timeline(traces: Sequence[RankTrace], window: Window, step: int) -> Timeline:
    """The spans of one step of all ranks, cut at its ends."""
    zero_ns, end_ns = window

    def span(rank: int, stream: str, name: str, times_ns: Window, kind: str, *place: int) -> Span:
        start_s, end_s = ((at_ns - zero_ns) * 1e-9 for at_ns in times_ns)
        return Span(rank, stream, name, start_s, end_s, kind, *place)

    spans: list[Span] = []
    for trace in traces:
        own = [work for work in trace.work if work.start_ns < end_ns and work.end_ns > zero_ns]
        own = [w._replace(start_ns=max(w.start_ns, zero_ns), end_ns=min(w.end_ns, end_ns)) for w in own]
        spans += (
            span(trace.rank, w.stream, w.name, (w.start_ns, w.end_ns), w.kind, w.stage, w.micro_batch)
            for w in own
        )
        following = next((work for work in trace.work if work.start_ns >= end_ns), None)
        gaps = _host_gaps(own, following, window, on_gpu=trace.on_gpu)
        spans += (span(trace.rank, HOST, "host", gap, "host") for gap in gaps)
    spans.sort(key=lambda span: (span.rank, STREAMS.index(span.stream), span.start_s, span.end_s))
    title = "traced run" if step < 0 else f"traced step {step}"
    return Timeline(spans=tuple(spans), source="measured", title=title)


def _host_gaps(
    work: Sequence[Work], following: Work | None, window: Window, *, on_gpu: bool
) -> Iterator[Window]:
    """When nothing runs because the host has not asked for more.

    On a CPU that is all time without an operator or collective: it goes to Python and the framework. A
    GPU's gap is the host's where the next kernel was launched after the one before had ended; else the
    device waited for an event.
    """
    at_ns = window[0]
    for own in work:
        if own.start_ns > at_ns and (not on_gpu or own.launched_ns >= at_ns):
            yield at_ns, own.start_ns
        at_ns = max(at_ns, own.end_ns)
    late = following is not None and following.launched_ns >= at_ns
    if window[1] > at_ns and (late or not on_gpu):
        yield at_ns, window[1]
