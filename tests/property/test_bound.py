"""What the search relies on: no plan beats its bound, and none needs more memory than it believes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from parsim.cost.stage import CostModel
from parsim.cost.step import StepCost, step_cost
from parsim.plan import Job, ParallelPlan, parse_plan
from parsim.schedule import OVERLAPPED_SCHEDULES, make_schedule, with_schedule
from parsim.schedule.lower import lower
from parsim.schedule.program import step_time_s
from parsim.search.bound import lower_bound_s
from parsim.search.examine import Examiner
from parsim.search.fullest import fullest_rank
from parsim.search.space import Family
from parsim.simulate.prediction import memory_by_rank, program_of
from tests.builders import flat_cost, plain_stack, round_cluster, small_model
from tests.strategies import CASES, Case


@given(CASES)
@settings(max_examples=300)
def test_no_plan_beats_its_bound(case: Case) -> None:
    job, plan, costs = case
    bound_s = lower_bound_s(step_cost(job, plan, costs), job, plan, costs.stack)
    assert bound_s <= step_time_s(program_of(job, plan, costs)[0]) * (1 + 1e-12)


def walked_s(case: Case) -> float:
    """The tighter bound of a plan."""
    job, plan, costs = case
    family = Family(
        base=plan,
        zero=(plan.zero,),
        micro_batch=(plan.micro_batch,),
        sequence_parallel=(plan.sequence_parallel,),
        tp_overlap=(plan.tp_overlap,),
        recompute=(plan.recompute,),
    )
    (bounds_s,) = Examiner(job, costs).tighter_bounds_s([(family, np.array([0]))])
    return float(bounds_s[0])


def of_the_space(case: Case) -> bool:
    """Without the settings that no plan of the search has."""
    _, plan, _ = case
    usual = plan.aggregation == "bucket" and plan.compression == "none" and not plan.weighted
    return usual and plan.zero_group == 0 and plan.expert_tp == 1


@given(CASES.filter(of_the_space))
@settings(max_examples=300)
def test_no_plan_beats_the_walk_through_its_schedule(case: Case) -> None:
    assert walked_s(case) <= step_time_s(program_of(*case)[0]) * (1 + 1e-12)


@given(CASES.filter(of_the_space))
@settings(max_examples=100)
def test_without_replicas_the_walk_is_the_replay(case: Case) -> None:
    # Nothing is left out then, but what overlapped pairs do not hide, and embeddings on two ranks.
    job, plan, costs = case
    # Experts are whole on every tensor-parallel rank unless these share them.
    alone = replace(plan, dp=1, zero=0, cp=1, ep=plan.tp if job.model.moe else 1)
    model = replace(job.model, tied_embeddings=False)
    job = replace(job, model=model, global_batch=job.global_batch // plan.dp)
    if alone.schedule in OVERLAPPED_SCHEDULES:
        alone = with_schedule(alone, "zbv" if alone.schedule == "dualpipev" else "zb-h1")
    case = job, alone, replace(costs, model=model, _parts={}, _stages={})
    assert walked_s(case) == pytest.approx(step_time_s(program_of(*case)[0]), rel=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "pp=2,schedule=gpipe",  # transfers follow each other
        "pp=4,schedule=zbv",
        "dp=2,zero=1",  # the first forward waits for its parameters
        "dp=2,pp=2,vpp=2,zero=1,schedule=interleaved",  # the second chunk's behind the first one's
        "dp=2,pp=2,zero=2",  # every backward's gradients are reduced, one after the other
    ],
)
def test_where_links_are_slow_the_walk_is_nearly_the_replay(text: str) -> None:
    bound_s, step_s = walked_on_links_s(text, bandwidth_bytes_per_s=1e8, dp_bucket_parameters=1e9)
    assert 0.999 * step_s < bound_s <= step_s * (1 + 1e-12)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_the_first_gradients_are_reduced_before_the_first_backward_ends(schedule: str) -> None:
    # Compute and links are equally busy, so that it matters when the reductions begin.
    text = f"dp=2,pp=2,zero=2,schedule={schedule}"
    bound_s, step_s = walked_on_links_s(text, bandwidth_bytes_per_s=3e10, dp_bucket_parameters=2e5)
    assert 0.95 * step_s < bound_s <= step_s


def walked_on_links_s(
    text: str, *, bandwidth_bytes_per_s: float, dp_bucket_parameters: float
) -> tuple[float, float]:
    """The tighter bound of a plan and its step, where its links are slow."""
    cluster, model = round_cluster(), small_model(tied_embeddings=False)
    slow = replace(cluster.intra_node, bandwidth_bytes_per_s=bandwidth_bytes_per_s)
    stack = plain_stack(dp_overlap=True, dp_bucket_parameters=dp_bucket_parameters, zero_prefetch=None)
    plan = parse_plan(text)
    job = Job(model=model, seq_len=256, global_batch=4 * plan.dp)
    case = job, plan, CostModel(model, replace(cluster, intra_node=slow), stack)
    return walked_s(case), step_time_s(program_of(*case)[0])


def bound_and_step_s(plan: ParallelPlan, m: int, cost: StepCost, **stack: Any) -> tuple[float, float]:
    job = Job(model=small_model(), seq_len=256, global_batch=m * plan.dp)
    program = lower(make_schedule(plan, m), cost, plan, plain_stack(**stack))
    return lower_bound_s(cost, job, plan, plain_stack(**stack)), step_time_s(program)


@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("overlap", [False, True])
def test_1f1b_on_equal_stages_reaches_the_bound(pp: int, overlap: bool) -> None:
    # Narayanan et al. 2021, section 2.2.1, and then the update and the host's work. Of a reduction the
    # bound counts what a rank without a pipeline must wait for.
    reduce_s = 1.0 if pp == 1 else 0.0
    cost = flat_cost(pp, reduce_s=reduce_s, buckets=4, optimizer_s=0.25)
    slowest = replace(cost.syncs[-1], optimizer_s=0.5)
    cost = replace(cost, syncs=(*cost.syncs[:-1], slowest))
    bound_s, step_s = bound_and_step_s(
        ParallelPlan(dp=2, pp=pp), 8, cost, dp_overlap=overlap, action_host_s=0.25, step_overhead_s=0.125
    )
    each_s = 3.0 + (0.5 if pp > 1 else 0.0)
    assert bound_s == pytest.approx((8 + pp - 1) * each_s + reduce_s / (4 if overlap else 1) + 0.625)
    assert step_s == pytest.approx(bound_s)


def test_what_the_last_weight_gradient_takes_more_is_not_in_the_way_of_split_backwards() -> None:
    # Forwards until 4, input gradients until 8 and the first stage's weight gradient; meanwhile the last
    # stage's, which takes 1 s more for the copies of its reduction, is over long ago.
    cost = flat_cost(4, reduce_s=0.01)
    copies = replace(cost.syncs[-1], reduce_takes_s=1.0)
    cost = replace(cost, syncs=(*cost.syncs[:-1], copies))
    plan = ParallelPlan(dp=2, pp=4, schedule="zb-h1")
    bound_s, step_s = bound_and_step_s(plan, 1, cost, dp_overlap=True)
    assert step_s == pytest.approx(9.01)
    assert bound_s == pytest.approx(9.0)


def test_only_the_last_chunk_s_reduction_is_certain() -> None:
    # Stage 3 reduces beside the backwards of stage 1; that stage's own reduction is short.
    plan = ParallelPlan(dp=2, pp=2, vpp=2, schedule="interleaved")
    cost = flat_cost(4, reduce_s=0.5)
    cost = replace(cost, syncs=(*cost.syncs[:3], replace(cost.syncs[3], reduce_s=3.0)))
    bound_s, step_s = bound_and_step_s(plan, 2, cost, dp_overlap=True)
    assert bound_s <= step_s == pytest.approx(2 * 2 * 3.0 + 3.0 + 0.5)


def memory_peaks(case: Case) -> tuple[float, float]:
    """Of the fullest rank: as the search believes, and as a walk through the schedule finds it."""
    job, plan, costs = case
    schedule = make_schedule(plan, plan.num_micro_batches(job))
    walked = memory_by_rank(step_cost(job, plan, costs), schedule, job, plan, costs)
    return fullest_rank(job, plan, costs).peak, max(use.peak for use in walked)


@given(CASES)
@settings(max_examples=250)
def test_the_fullest_rank_is_found_without_a_schedule(case: Case) -> None:
    believed, walked = memory_peaks(case)
    assert believed == pytest.approx(walked)


def test_the_fullest_rank_of_unequal_chunks() -> None:
    model = small_model(vocab=64)
    plan = parse_plan("tp=4,pp=2,vpp=5,micro_batch=4,schedule=interleaved")  # 0-1-1-1-1-1-1-1-1-0
    job = Job(model=model, seq_len=256, global_batch=16)
    believed, walked = memory_peaks((job, plan, CostModel(model, round_cluster(), plain_stack())))
    assert believed >= walked * (1 - 1e-9)
