"""Replay: a Program run as a discrete-event simulation.

Every stream of every rank is a SimPy process that takes its tasks in order; time is in seconds.
"""

from __future__ import annotations

from collections.abc import Generator

import simpy

from parsim.schedule.program import Program, Task, timeline_of
from parsim.timeline import Timeline


def replay(program: Program) -> Timeline:
    """The Timeline of a program.

    A task starts when its stream is free and everything in `after` has ended; a transfer also shows on
    the receiving rank's stream.
    """
    env = simpy.Environment()
    done = [env.event() for _ in program.tasks]
    ends = [0.0] * len(program.tasks)
    streams: dict[tuple[int, str], list[int]] = {}
    for index, task in enumerate(program.tasks):
        streams.setdefault((task.rank, task.stream), []).append(index)
    for indices in streams.values():
        env.process(_stream(env, program.tasks, indices, done, ends))
    env.run()
    return timeline_of(program, ends)


def _stream(
    env: simpy.Environment,
    tasks: tuple[Task, ...],
    indices: list[int],
    done: list[simpy.Event],
    ends: list[float],
) -> Generator[simpy.Event, None, None]:
    """One stream: its tasks one after the other."""
    for index in indices:
        task = tasks[index]
        for needed in task.after:
            if not done[needed].processed:
                yield done[needed]
        yield env.timeout(task.duration_s)
        ends[index] = env.now
        done[index].succeed()
