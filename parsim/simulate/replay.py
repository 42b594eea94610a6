"""Replay: a Program run as a discrete-event simulation.

Every stream of every rank is a SimPy process that takes its tasks in order; time is in seconds.
"""

from __future__ import annotations

from collections.abc import Generator

import simpy

from parsim.schedule.program import Program, Task, TaskTimes, timeline_of
from parsim.timeline import Timeline


def replay(program: Program) -> Timeline:
    """The Timeline of a program.

    A task starts when its stream is free and everything in `after` has ended; a transfer also shows on
    the receiving rank's stream.
    """
    env = simpy.Environment()
    done = [env.event() for _ in program.tasks]
    times = TaskTimes([0.0] * len(program.tasks), [0.0] * len(program.tasks))
    streams: dict[tuple[int, str], list[int]] = {}
    for index, task in enumerate(program.tasks):
        streams.setdefault((task.rank, task.stream), []).append(index)
    for indices in streams.values():
        env.process(_stream(env, program.tasks, indices, done, times))
    env.run()
    return timeline_of(program, times)


def _stream(
    env: simpy.Environment,
    tasks: tuple[Task, ...],
    indices: list[int],
    done: list[simpy.Event],
    times: TaskTimes,
) -> Generator[simpy.Event, None, None]:
    """One stream: its tasks one after the other."""
    for index in indices:
        task = tasks[index]
        for needed in task.after:
            if not done[needed].processed:
                yield done[needed]
        times.start_s[index] = env.now
        yield env.timeout(task.duration_s)
        times.end_s[index] = env.now
        done[index].succeed()
