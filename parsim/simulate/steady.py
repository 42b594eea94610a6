"""The steady pace of a pipeline that is never flushed: one step out of the middle of many."""

from __future__ import annotations

from dataclasses import replace

from parsim.errors import ParsimError
from parsim.plan import ASYNCHRONOUS_SCHEDULES, ParallelPlan
from parsim.schedule.action import Schedule
from parsim.schedule.pipedream import measured_steps
from parsim.timeline import MemorySample, Span, Timeline


def steps_shown(plan: ParallelPlan, num_micro_batches: int) -> int:
    """Steps in the timeline of a plan: 1, but where the pace of a pipeline without a flush repeats only
    after several.
    """
    if plan.schedule not in ASYNCHRONOUS_SCHEDULES:
        return 1
    return measured_steps(plan.pp, num_micro_batches)


def steady_steps(timeline: Timeline, schedule: Schedule) -> Timeline:
    """The last steps before the pipeline runs empty, from a replay of many: `steps_shown` of them.

    A step's length on a rank is the time between its last updates of consecutive steps; every rank has
    the same in the long run, so the longest is the pace. Time starts anew where these steps do.
    """
    in_step = schedule.num_micro_batches // schedule.steps
    count = measured_steps(schedule.pp, in_step)
    last = (schedule.steps - schedule.steps_after) * in_step - 1
    first = last - count * in_step
    ends: dict[tuple[int, int], float] = {
        (span.rank, span.micro_batch): span.end_s
        for span in timeline.spans
        if span.kind == "optimizer" and span.micro_batch in (first, last)
    }
    ranks = {rank for rank, _ in ends}
    if not ranks:
        raise ParsimError("this timeline holds no updates to tell its steps by")
    length_s = max(ends[rank, last] - ends[rank, first] for rank in ranks)
    end_s = max(ends[rank, last] for rank in ranks)
    return _window(timeline, end_s - length_s, end_s)


def _window(timeline: Timeline, begin_s: float, end_s: float) -> Timeline:
    """What happens between two instants, from the first of them on."""
    spans: list[Span] = []
    for span in timeline.spans:
        start, end = max(span.start_s, begin_s), min(span.end_s, end_s)
        if start < end:
            spans.append(span._replace(start_s=start - begin_s, end_s=end - begin_s))
    held: dict[int, MemorySample] = {}
    later: list[MemorySample] = []
    for sample in timeline.memory:
        if sample.time_s <= begin_s:
            held[sample.rank] = sample._replace(time_s=0.0)
        elif sample.time_s < end_s:
            later.append(sample._replace(time_s=sample.time_s - begin_s))
    memory = sorted([*held.values(), *later], key=lambda sample: (sample.rank, sample.time_s))
    return replace(timeline, spans=tuple(spans), memory=tuple(memory))
