"""A long step from two short ones."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from parsim.compare.measured_steps import _extended
from parsim.cost.price import PartTime, PassTime
from parsim.plan import V_SHAPED_SCHEDULES, Job, ParallelPlan
from parsim.schedule import ONE_CHUNK_SCHEDULES, SYNCHRONOUS_SCHEDULES, make_schedule
from parsim.schedule.lower import lower
from parsim.schedule.program import step_time_s
from tests.builders import flat_cost, plain_stack, small_model


@pytest.mark.parametrize("schedule", SYNCHRONOUS_SCHEDULES)
@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize("rounds", [2, 3, 6])
def test_a_step_grows_by_as_much_with_every_round(schedule: str, pp: int, rounds: int) -> None:
    vpp = 1 if schedule in ONE_CHUNK_SCHEDULES else 2 if schedule in V_SHAPED_SCHEDULES else 3
    plan = ParallelPlan(pp=pp, vpp=vpp, schedule=schedule)
    cost = flat_cost(plan.num_stages, send_s=0.125)
    # The last stage is longer, as with a head.
    part = PartTime(PassTime(1.5), PassTime(1.75), PassTime(1.25), PassTime())
    cost = replace(cost, stages=(*cost.stages[:-1], replace(cost.stages[-1], time=part)))

    def step_s(m: int) -> float:
        return step_time_s(lower(make_schedule(plan, m), cost, plan, plain_stack()))

    job = Job(model=small_model(), seq_len=256, global_batch=rounds * pp)
    run: Any = SimpleNamespace(plan=plan, job=job)
    assert _extended(run, step_s) == pytest.approx(step_s(rounds * pp))
