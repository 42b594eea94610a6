"""One job under many schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from parsim.cost.stage import CostModel
from parsim.errors import ParsimError
from parsim.plan import Job, ParallelPlan
from parsim.schedule import with_schedule
from parsim.schedule.check import plan_problems, stack_problems
from parsim.simulate.prediction import Prediction, predict
from parsim.timeline import Timeline


class Simulated(NamedTuple):
    """The job's step under one schedule."""

    prediction: Prediction
    timeline: Timeline


class Refused(NamedTuple):
    """A schedule that the plan cannot have, and why."""

    schedule: str
    problem: ParsimError


def under_schedules(
    job: Job,
    plan: ParallelPlan,
    costs: CostModel,
    schedules: Sequence[str],
    *,
    vpp: int = 2,
    progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[Simulated | Refused]:
    """The plan's step under each schedule, everything else alike.

    Schedules that take any number of chunks get `vpp` of them, the others the number that they have.
    """
    for done, schedule in enumerate(schedules):
        if progress is not None:
            progress(f"simulating {schedule}", done, len(schedules))
        other = with_schedule(plan, schedule, vpp)
        problems = (*plan_problems(job, other, costs.cluster), *stack_problems(job, other, costs.stack))
        problem = next(iter(problems), None)
        if problem is not None:
            yield Refused(schedule, problem)
        else:
            yield Simulated(*predict(job, other, costs))
