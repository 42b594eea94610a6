"""Ranks on fewer cores than they are, against what a core that never idles has to take."""

from __future__ import annotations

import pytest

from parsim.cost.stage import CostModel
from parsim.plan import Job, parse_plan
from parsim.schedule.program import Program, Task, step_time_s
from parsim.simulate.prediction import predict, program_of
from parsim.simulate.shared_cores import on_cores, times_on_cores
from parsim.timeline import COMPUTE, TP
from tests.builders import plain_stack, round_cluster, small_model

MODEL = small_model()
JOB = Job(model=MODEL, seq_len=64, global_batch=8, precision="fp32")
COSTS = CostModel(MODEL, round_cluster(), plain_stack())


def work(rank: int, seconds: float, *after: int, stream: str = COMPUTE) -> Task:
    return Task(rank, stream, f"{rank}", "forward", seconds, after)


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_replicas_take_as_many_times_as_long_as_the_fullest_core_has_of_them(cores: int) -> None:
    """dp = 4 without communication: 4 ranks on one core, 2 on each of two, or 2, 1, 1."""
    plan = parse_plan("dp=4")
    program = Program(tasks=(work(0, 3.0), work(0, 2.0, 0)))
    fullest = {1: 4, 2: 2, 3: 2}[cores]
    assert times_on_cores(program, plan, cores).end_s == pytest.approx([3.0 * fullest, 5.0 * fullest])


def test_a_rank_that_waits_leaves_its_core_to_the_other() -> None:
    """Two stages on one core: 2 s alone, then 3 s and 1 s share it, and 1 s is left alone."""
    program = Program(tasks=(work(0, 2.0), work(1, 1.0, 0), work(0, 3.0, 0)))
    found = times_on_cores(program, parse_plan("pp=2"), 1)
    assert found.start_s == pytest.approx([0.0, 2.0, 2.0])
    assert found.end_s == pytest.approx([2.0, 4.0, 6.0])


def test_what_is_under_way_between_ranks_takes_no_core() -> None:
    program = Program(tasks=(work(0, 1.0, stream=TP), work(1, 1.0)))
    assert times_on_cores(program, parse_plan("pp=2"), 1).end_s == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("text", ["pp=4,micro_batch=2", "pp=4,vpp=2,schedule=interleaved", "pp=2,dp=2"])
def test_one_core_is_never_idle_while_a_stage_has_work(text: str) -> None:
    """All ranks on one core: no bubble is left, the step is at least the work of all, and at most that
    beside what it takes with a core for each.
    """
    plan = parse_plan(text)
    alone, timeline = predict(JOB, plan, COSTS)
    replicas = plan.gpus // plan.pp
    of_all_s = replicas * sum(s.end_s - s.start_s for s in timeline.spans if s.stream == COMPUTE)
    shared, _ = predict(JOB, plan, COSTS, cores=1)
    assert of_all_s <= shared.step_time_s * (1 + 1e-9)
    away_s = alone.step_time_s - alone.breakdown_s["compute"]
    assert shared.step_time_s <= of_all_s + away_s
    enough, _ = predict(JOB, plan, COSTS, cores=plan.gpus)
    assert enough.step_time_s == alone.step_time_s


@pytest.mark.parametrize("text", ["pp=4,micro_batch=2", "dp=2,tp=2", "pp=2,dp=2,zero=1"])
@pytest.mark.parametrize("cores", [1, 2, 3])
def test_the_longest_path_on_shared_cores_is_the_shared_step(text: str, cores: int) -> None:
    plan = parse_plan(text)
    program, _ = program_of(JOB, plan, COSTS)
    shared, _ = predict(JOB, plan, COSTS, cores=cores)
    assert step_time_s(on_cores(program, plan, cores)) == pytest.approx(shared.step_time_s)
    assert on_cores(program, plan, plan.gpus) is on_cores(program, plan, None) is program
