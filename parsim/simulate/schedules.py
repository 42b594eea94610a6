"""One job under many schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from parsim.cost.stage import CostModel
from parsim.errors import ParsimError
from parsim.plan import V_SHAPED_SCHEDULES, Job, ParallelPlan
from parsim.schedule import ONE_CHUNK_SCHEDULES
from parsim.schedule.check import plan_problems
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
        problem = next(plan_problems(job, other, costs.cluster), None)
        if problem is not None:
            yield Refused(schedule, problem)
        else:
            yield Simulated(*predict(job, other, costs))


def with_schedule(plan: ParallelPlan, schedule: str, vpp: int) -> ParallelPlan:
    """The plan with another schedule; a stage split that was made for other stages is dropped."""
    chunks = {**dict.fromkeys(ONE_CHUNK_SCHEDULES, 1), **dict.fromkeys(V_SHAPED_SCHEDULES, 2)}.get(
        schedule, vpp
    )
    kept = plan.stage_split if chunks == plan.vpp else ()
    return replace(plan, schedule=schedule, vpp=chunks, stage_split=kept)
