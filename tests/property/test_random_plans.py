"""Any plan of any job on any machine is refused in words, or its answer holds together.

PARSIM_RANDOM_EXAMPLES=10000 is the long form; PARSIM_RANDOM_SEED=1 draws other examples than the usual.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, event

from parsim.cost.step import step_cost
from parsim.errors import ParsimError
from parsim.plan import ASYNCHRONOUS_SCHEDULES
from parsim.report.memory import memory_picture
from parsim.report.schedule import schedule_of
from parsim.schedule.check import plan_problems
from parsim.schedule.program import step_time_s
from parsim.search.bound import lower_bound_s
from parsim.search.fullest import fullest_rank
from parsim.simulate.contention import predict_over
from parsim.simulate.fabric import fabric_of
from parsim.simulate.prediction import Prediction, estimate, predict, program_of
from parsim.simulate.replay import replay
from parsim.simulate.uneven import Replica, unfolded_program
from parsim.timeline import Timeline
from tests.invariants import (
    SLACK,
    as_shown,
    check_item,
    check_timeline,
    check_trace,
)
from tests.worlds import World, drawn


def is_legal(world: World) -> bool:
    """Whether the plan is legal; where not, the refusal is one that helps."""
    problems = list(plan_problems(world.job, world.plan, world.cluster))
    for problem in problems:
        assert isinstance(problem, ParsimError)
        assert problem.what
        assert problem.where
        assert "\n" not in problem.what
    event(f"refused: {problems[0].what}" if problems else f"schedule {world.plan.schedule}")
    return not problems


@drawn()
def test_a_random_plan_is_refused_or_its_answer_holds_together(world: World) -> None:
    if not is_legal(world):
        return
    job, plan, costs = world.job, world.plan, world.costs()
    prediction, timeline = predict(job, plan, costs)
    check_item(prediction.to_item())
    check_timeline(timeline)
    check_peak(prediction, timeline)
    # The longest path finds what the replay finds, and nothing is faster than its bound.
    quick = estimate(job, plan, costs)
    assert quick.step_time_s == pytest.approx(prediction.step_time_s, rel=SLACK)
    assert quick.breakdown_s == pytest.approx(
        prediction.breakdown_s, rel=1e-6, abs=SLACK * quick.step_time_s
    )
    assert quick.memory == prediction.memory
    bound_s = lower_bound_s(step_cost(job, plan, costs), job, plan, costs.stack)
    assert 0 < bound_s <= prediction.step_time_s * (1 + SLACK)
    assert fullest_rank(job, plan, costs).peak == pytest.approx(prediction.memory.peak)


def check_peak(prediction: Prediction, timeline: Timeline) -> None:
    """Memory over time reaches the memory model's peak, and no more."""
    peak = max(sample.num_bytes for sample in timeline.memory)
    assert peak == pytest.approx(prediction.memory.peak, rel=SLACK)


@drawn(0.3)
def test_folded_ranks_do_what_each_of_them_does_unfolded(world: World) -> None:
    assume(is_legal(world) and world.plan.dp > 1)
    assume(world.plan.schedule not in ASYNCHRONOUS_SCHEDULES)
    plan = world.plan
    program, _ = program_of(world.job, plan, world.costs())
    ones = (1.0,) * plan.pp
    alike = tuple(Replica(members=(i,), slow=ones, link=ones, exchange=ones) for i in range(plan.dp))
    folded, whole = replay(program), replay(unfolded_program(program, alike))
    assert whole.end_s == pytest.approx(folded.end_s, rel=SLACK)
    for rank in range(plan.pp):
        expected = as_shown([span for span in folded.spans if span.rank == rank])
        for i in range(plan.dp):
            found = as_shown([span for span in whole.spans if span.rank == i * plan.pp + rank])
            assert found == expected


@drawn(0.3)
def test_more_replicas_never_need_more_memory(world: World) -> None:
    assume(is_legal(world))
    job, plan, costs = world.job, world.plan, world.costs()
    more = replace(plan, dp=2 * plan.dp)
    larger = replace(job, global_batch=2 * job.global_batch)
    assume(not list(plan_problems(larger, more, world.cluster)))
    by_rank = zip(program_of(job, plan, costs)[1], program_of(larger, more, costs)[1], strict=True)
    for before, after in by_rank:
        assert after.peak <= before.peak * (1 + SLACK)
        assert after.activations == pytest.approx(before.activations, rel=SLACK)
        if plan.zero == 0:
            assert after == before
        elif plan.zero_group == 0 and before.optimizer:
            assert after.optimizer < before.optimizer


@drawn(0.15)
def test_shared_links_and_slow_devices_only_cost_time(world: World) -> None:
    assume(is_legal(world) and (world.fabric or not world.uneven.is_even))
    assume(world.plan.schedule not in ASYNCHRONOUS_SCHEDULES)
    job, plan, costs = world.job, world.plan, world.costs()
    even_s = step_time_s(program_of(job, plan, costs)[0])
    uneven = None if world.uneven.is_even else world.uneven
    if world.fabric is None:
        prediction, timeline = predict(job, plan, costs, uneven=uneven)
        alone_s = even_s
    else:
        fabric = fabric_of(world.fabric, world.cluster, plan.gpus)
        prediction, timeline, contention = predict_over(fabric, job, plan, costs, uneven=uneven)
        alone_s = contention.alone_s
        assert all(load <= 1 + SLACK for use in contention.links for _, load in use.points)
        assert all(0 <= use.mean <= 1 + SLACK for use in contention.links)
        assert contention.step_s == pytest.approx(timeline.end_s, rel=SLACK)
        if uneven is None and "algorithm" not in world.fabric:
            assert alone_s == pytest.approx(even_s, rel=SLACK)
    if world.uneven.jitter == 0 or world.fabric is not None:
        assert prediction.step_time_s >= alone_s * (1 - SLACK)
    check_item(prediction.to_item())
    check_timeline(timeline)
    check_peak(prediction, timeline)


@drawn(0.15)
def test_a_trace_and_a_chart_show_the_whole_step(world: World) -> None:
    assume(is_legal(world))
    _, timeline = predict(world.job, world.plan, world.costs())
    check_trace([timeline, timeline])
    schedule = schedule_of([timeline], caption="a step")
    assert schedule is not None
    capacity = world.cluster.device.memory_bytes
    assert memory_picture(timeline, capacity_bytes=capacity) is not None
