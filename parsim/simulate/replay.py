"""Replay: a Program run as a discrete-event simulation. Time is in seconds.

The end of every task is one SimPy event. When it happens, the tasks that waited for it count down, and
those with nothing left to wait for start. A SimPy process for each stream would take several events a
task; docs/decisions/0010-replay-by-callbacks.md has the figures.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import simpy

from parsim.schedule.program import Program, TaskTimes, timeline_of
from parsim.timeline import Timeline


def replay(program: Program) -> Timeline:
    """The Timeline of a program.

    A task starts when its stream is free and everything in `after` has ended; a transfer also shows on
    the receiving rank's stream.
    """
    with no_garbage_collection():
        return timeline_of(program, replayed_times(program))


def replayed_times(
    program: Program,
    carried: Mapping[int, Callable[[], simpy.Event]] | None = None,
    env: simpy.Environment | None = None,
) -> TaskTimes:
    """When each task of a program runs, in seconds, by its index.

    A task in `carried` lasts until the event happens that its function returns when it starts, in `env`.
    """
    if not program.tasks:
        return TaskTimes([], [])
    ranks, streams, _, _, durations_s, afters, *_ = zip(*program.tasks, strict=True)
    missing, waiting = dependencies(zip(ranks, streams, strict=True), afters)
    return run_events(durations_s, missing, waiting, carried, env)


def run_events(
    durations_s: Sequence[float],
    missing: list[int],
    waiting: Sequence[Sequence[int]],
    carried: Mapping[int, Callable[[], simpy.Event]] | None = None,
    env: simpy.Environment | None = None,
) -> TaskTimes:
    """Run tasks that wait for `missing` others each; `waiting` says for whom their ends count."""
    start_s, end_s = [0.0] * len(missing), [0.0] * len(missing)
    env = env or simpy.Environment()
    carried = carried or {}
    schedule, new = env.schedule, _TaskEnd.__new__

    def ended(event: _TaskEnd) -> None:
        index = event.index
        end_s[index] = now = env.now
        for other in waiting[index]:
            if missing[other] == 1:
                start_s[other] = now
                if other in carried:
                    carry(other)
                    continue
                end = new(_TaskEnd)
                end.index, end.callbacks = other, callbacks
                schedule(end, 1, durations_s[other])
            else:
                missing[other] -= 1

    def carry(index: int) -> None:
        end = carried[index]()
        end.index, end.callbacks = index, callbacks

    callbacks = [ended]
    for index, count in enumerate(missing):
        if not count and index in carried:
            carry(index)
        elif not count:
            end = new(_TaskEnd)
            end.index, end.callbacks = index, callbacks
            schedule(end, 1, durations_s[index])
    env.run()
    return TaskTimes(start_s, end_s)


class _TaskEnd(simpy.Event):  # type: ignore[misc]
    """The end of a task: what simpy.Timeout is, with a list of callbacks that all ends share.

    SimPy takes `callbacks` off an event before it calls them, so one list serves many events.
    """

    __slots__ = ("callbacks", "index")
    _ok = True


def dependencies(
    streams: Iterable[tuple[int, str]], afters: Sequence[tuple[int, ...]]
) -> tuple[list[int], list[list[int]]]:
    """How many tasks each task waits for, and which tasks wait for it.

    It waits for `after` and for the task before it on its stream, unless the first of `after` waits for
    that one itself, as communication behind compute does.
    """
    missing = list(map(len, afters))
    waiting: list[list[int]] = [[] for _ in afters]
    latest: dict[tuple[int, str], int] = {}
    for index, (stream, after) in enumerate(zip(streams, afters, strict=True)):
        for i in after:
            waiting[i].append(index)
        before = latest.get(stream)
        latest[stream] = index
        if before is None or (after and before in afters[after[0]]):
            continue
        waiting[before].append(index)
        missing[index] += 1
    return missing, waiting


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Without the cyclic garbage collector: a replay makes many objects and no cycles."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
