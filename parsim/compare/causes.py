"""Why a predicted step time is off: the prediction is replayed with what was measured, part by part.

A kernel that is 10% slower than predicted shows in a step's breakdown twice, in compute and in the
bubble of the ranks that wait for it. Here the predicted Program gets the measured durations, first of
its compute, then of each kind of communication and so on, and its step time is taken again after each:
what changes is what that part explains, bubble and all. What is left when everything has its measured
duration is the order of the work and time that no span covers. So the parts add up to the error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean

from parsim.compare.waiting import COLLECTIVE_STREAMS, without_waiting
from parsim.plan import ParallelPlan
from parsim.schedule.program import Program, step_time_s
from parsim.timeline import EXPERTS, Span, Timeline, transfers

_COMPUTE_KINDS = ("forward", "backward", "input_grad", "weight_grad", "recompute")
PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("compute", _COMPUTE_KINDS),
    *((kind, (kind,)) for kind in ("tp", "cp", "ep", "pp", "dp")),
    ("optimizer", ("optimizer",)),
    ("overhead", ("host",)),
)
"""Parts of a step in the order in which they get their measured durations, with their kinds of span."""
IMBALANCE = "imbalance"
"""Waiting of peers with the same work for the slowest of them."""
REST = "rest"
"""What measured durations do not explain."""

Durations = Mapping[tuple[int, str], float]
"""Seconds by pipeline rank (of a transfer: the sender's) and name, all spans of a name together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """What one part of a step explains of a prediction's error."""

    what: str
    """A part, "imbalance" or "rest"."""
    step_time_s: float
    """The predicted step time when this part and those before it last as measured."""
    difference_s: float
    """Before less after: below 0 where the prediction is too short because of it."""
    measured_work_s: float
    """What the part takes on the mean rank, as measured; waiting only, for "imbalance"."""
    predicted_work_s: float


def causes_of(
    program: Program, plan: ParallelPlan, measured: Timeline, measured_s: float
) -> tuple[Cause, ...]:
    """What explains the difference of the program's step time and the measured one, part by part.

    `program` has a rank for each pipeline rank, `measured` one for each global rank (or some of them).
    The differences add up to step_time_s(program) − measured_s.
    """
    alone = without_waiting(measured, plan)
    causes: list[Cause] = []
    before_s = step_time_s(program)
    for what, kinds in PARTS:
        durations = _durations(alone, plan, kinds)
        changed = with_durations(program, durations, kinds)
        after_s = step_time_s(changed)
        work_s = _work_s(program, kinds), sum(durations.values()) / plan.pp
        if any(work_s):
            causes.append(_cause(what, before_s, after_s, *work_s))
        program, before_s = changed, after_s
    waiting = without_waiting(measured, plan, collectives=False)
    waited_s = 0.0
    for kind in COLLECTIVE_STREAMS:
        durations = _durations(waiting, plan, (kind,))
        waited_s += sum(durations.values()) / plan.pp - _work_s(program, (kind,))
        program = with_durations(program, durations, (kind,))
    after_s = step_time_s(program)
    if waited_s > 0:
        causes.append(_cause(IMBALANCE, before_s, after_s, 0.0, waited_s))
    causes.append(_cause(REST, after_s, measured_s, 0.0, max(0.0, measured_s - after_s)))
    return tuple(causes)


def with_durations(program: Program, measured: Durations, kinds: Iterable[str]) -> Program:
    """The program with the measured durations of tasks of some kinds.

    Tasks of one name share what is measured of that name as they share what is predicted. Names that
    only the prediction has share, on each rank, what was measured under other names; where nothing was
    measured on a rank at all, its tasks stay as they are.
    """
    kinds = frozenset(kinds)
    predicted: dict[tuple[int, str], float] = defaultdict(float)
    for task in program.tasks:
        if task.kind in kinds and task.rank >= 0:
            predicted[task.rank, task.name] += task.duration_s
    other_s: dict[int, float] = defaultdict(float)
    other_measured_s: dict[int, float] = defaultdict(float)
    for (rank, name), seconds in predicted.items():
        if (rank, name) not in measured:
            other_s[rank] += seconds
    for (rank, name), seconds in measured.items():
        if (rank, name) not in predicted:
            other_measured_s[rank] += seconds
    seen = {rank for rank, _ in measured}

    def factor(rank: int, name: str) -> float:
        if rank not in seen:
            return 1.0
        own_s = predicted[rank, name]
        if (rank, name) in measured:
            return measured[rank, name] / own_s if own_s else 1.0
        return other_measured_s[rank] / other_s[rank] if other_s[rank] else 1.0

    tasks = tuple(
        task._replace(duration_s=task.duration_s * factor(task.rank, task.name))
        if task.kind in kinds and task.rank >= 0
        else task
        for task in program.tasks
    )
    return replace(program, tasks=tasks)


def _durations(timeline: Timeline, plan: ParallelPlan, kinds: Iterable[str]) -> Durations:
    """What spans of some kinds took, mean over the ranks that run the same stages."""
    if "pp" in kinds:
        return _transfers_s(timeline.spans, plan)
    kinds = frozenset(kinds)
    by_name: dict[tuple[int, str], dict[int, float]] = defaultdict(lambda: defaultdict(float))
    replicas: dict[int, int] = defaultdict(int)
    for rank in timeline.ranks:
        replicas[plan.coordinate(rank).pp] += 1
    for span in timeline.spans:
        if span.kind in kinds:
            name = span.name.removeprefix(EXPERTS)  # predicted together with the others of its stage
            by_name[plan.coordinate(span.rank).pp, name][span.rank] += span.duration_s
    return {key: sum(own.values()) / replicas[key[0]] for key, own in by_name.items()}


def _transfers_s(spans: Iterable[Span], plan: ParallelPlan) -> Durations:
    """How long the receiver still waited once the sender had begun, mean over replicas."""
    found: dict[tuple[int, str], list[float]] = defaultdict(list)
    for send, receive in transfers(spans):
        key = plan.coordinate(send.rank).pp, send.name
        found[key].append(receive.end_s - max(send.start_s, receive.start_s))
    return {key: max(0.0, fmean(seconds)) for key, seconds in found.items()}


def _work_s(program: Program, kinds: Iterable[str]) -> float:
    """What tasks of some kinds take on the mean rank."""
    kinds = frozenset(kinds)
    total_s = sum(task.duration_s for task in program.tasks if task.kind in kinds)
    return total_s / max(1, len(program.ranks))


def _cause(what: str, before_s: float, after_s: float, predicted_s: float, measured_s: float) -> Cause:
    return Cause(
        what=what,
        step_time_s=after_s,
        difference_s=before_s - after_s,
        predicted_work_s=predicted_s,
        measured_work_s=measured_s,
    )
