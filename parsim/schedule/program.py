"""Task and Program: a schedule with durations, ready to be replayed.

A Program lists tasks so that everything a task waits for stands before it. Each stream of each rank runs
its tasks in that order, one at a time; a task starts when its stream is free and `after` are all over.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from parsim.timeline import MemorySample, Span, Timeline


class Task(NamedTuple):
    """One piece of work on one stream of one rank."""

    rank: int
    """Negative: on no rank; a task of no time, at which replicas wait for each other."""
    stream: str
    name: str
    kind: str
    duration_s: float
    after: tuple[int, ...]
    """Indices of the tasks that must have ended."""
    stage: int = -1
    micro_batch: int = -1
    receiver: tuple[int, str] | None = None
    """The rank and stream at the other end of a transfer, where it shows for the same time. That stream
    has one sender, so it is never busy with two."""
    allocated_bytes: float = 0.0
    """Activations that come to life when the task starts."""
    freed_bytes: float = 0.0
    """Activations that die when it ends."""
    joins_replicas: bool = False
    """Runs among all data-parallel replicas of its pipeline rank, or waits for all of them: it starts
    for all at once where they are not alike."""
    num_bytes: float = 0.0
    """What each device sends in this transfer."""
    gathers: bool = False
    """Brings parameters that other replicas hold, where other data-parallel transfers sum gradients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """The tasks of one step, in an order in which they can run."""

    tasks: tuple[Task, ...]
    static_bytes: tuple[float, ...] = ()
    """What each rank holds all the time: everything but activations kept for the backward."""
    rank_names: tuple[str, ...] = ()
    """What each rank is, where numbers do not say it."""
    copies: tuple[int, ...] = ()
    """How many pipelines each rank stands for, where they differ."""
    title: str = ""

    @property
    def ranks(self) -> range:
        return range(1 + max((task.rank for task in self.tasks), default=-1))


class TaskTimes(NamedTuple):
    """When each task of a program starts and ends, in seconds, by its index."""

    start_s: list[float]
    end_s: list[float]


def task_times(program: Program) -> TaskTimes:
    """When each task runs: its end is the longest path to it.

    The same model as the discrete-event replay, evaluated in one pass because tasks stand in order.
    """
    times = TaskTimes([], [])
    stream_free: dict[tuple[int, str], float] = {}
    for task in program.tasks:
        stream = (task.rank, task.stream)
        start = stream_free.get(stream, 0.0)
        for i in task.after:
            if times.end_s[i] > start:
                start = times.end_s[i]
        end = start + task.duration_s
        times.start_s.append(start)
        times.end_s.append(end)
        stream_free[stream] = end
    return times


def step_time_s(program: Program) -> float:
    """The end of the last task."""
    return max(task_times(program).end_s, default=0.0)


def timeline_of(program: Program, times: TaskTimes) -> Timeline:
    """The Timeline of a program whose tasks run at `times`."""
    lanes: dict[tuple[int, str], list[Span]] = {}
    for task, start, end in zip(program.tasks, times.start_s, times.end_s, strict=True):
        rank, stream, name, kind, _, _, stage, i, receiver, *_ = task
        if rank < 0:
            continue
        lane = lanes.setdefault((rank, stream), [])
        lane.append(Span(rank, stream, name, start, end, kind, stage, i))
        if receiver is not None:
            rank, stream = receiver
            lane = lanes.setdefault((rank, stream), [])
            lane.append(Span(rank, stream, name, start, end, kind, stage, i))
    # Tasks of a stream stand in the order in which they run, so no lane needs sorting.
    spans = tuple(chain.from_iterable(lanes[lane] for lane in sorted(lanes)))
    return Timeline(
        spans=spans,
        memory=_memory(program, times),
        rank_names=program.rank_names,
        copies=program.copies,
        title=program.title,
    )


def _memory(program: Program, times: TaskTimes) -> tuple[MemorySample, ...]:
    """Bytes each rank holds, whenever they change; what is freed at an instant goes first."""
    changes: dict[int, list[tuple[float, int, float]]] = {rank: [] for rank in program.ranks}
    for task, start, end in zip(program.tasks, times.start_s, times.end_s, strict=True):
        if task.allocated_bytes:
            changes[task.rank].append((start, 1, task.allocated_bytes))
        if task.freed_bytes:
            changes[task.rank].append((end, 0, -task.freed_bytes))
    samples = []
    for rank, static in zip(program.ranks, program.static_bytes, strict=False):
        held = static
        samples.append(MemorySample(rank, 0.0, held))
        for time_s, _, change in sorted(changes[rank]):
            held += change
            samples.append(MemorySample(rank, time_s, held))
    return tuple(samples)
