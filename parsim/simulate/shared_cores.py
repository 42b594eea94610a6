"""Ranks on fewer cores than they are: a Program replayed with what runs on a core at once slowed down.

The executor binds rank r of a machine to core r mod cores, and the system gives ranks that are ready to
run on one core equal parts of its time. So a core is a link of one second a second, and what a rank does
a flow over it: rates are max-min fair.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

import simpy

from parsim.plan import ParallelPlan
from parsim.schedule.program import Program, TaskTimes
from parsim.simulate.flows import FlowNetwork
from parsim.simulate.replay import replayed_times
from parsim.timeline import COMPUTE


def times_on_cores(program: Program, plan: ParallelPlan, cores: int) -> TaskTimes:
    """When each task of a program runs whose ranks share so many cores of one machine.

    The dp·cp·tp ranks that a rank of the program stands for go in step, so the fullest of their cores
    holds all of them up.
    """
    env = simpy.Environment()
    network = FlowNetwork(env, dict.fromkeys(range(cores), 1.0))
    replicas = plan.gpus // plan.pp
    bound = [
        Counter(rank % cores for rank in range(first, first + replicas))
        for first in range(0, plan.gpus, replicas)
    ]
    carried = {
        index: partial(network.transfer, bound[task.rank], task.duration_s, cap_bytes_per_s=1.0)
        for index, task in enumerate(program.tasks)
        if task.stream == COMPUTE and task.rank >= 0 and task.duration_s > 0
    }
    return replayed_times(program, carried, env)


def on_cores(program: Program, plan: ParallelPlan, cores: int | None) -> Program:
    """The program whose tasks last as long as they do where its ranks share so many cores.

    Its longest path is the shared step. The program as it is, where each rank has a core of its own.
    """
    if cores is None or cores >= plan.gpus:
        return program
    times = times_on_cores(program, plan, cores)
    tasks = tuple(
        task._replace(duration_s=end_s - start_s)
        for task, start_s, end_s in zip(program.tasks, times.start_s, times.end_s, strict=True)
    )
    return replace(program, tasks=tasks)
