"""Bounds that hold whatever is chosen for a plan: its split into stages, the layers it recomputes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from parsim.cost.memory import ENOUGH_HEADROOM
from parsim.cost.stage import CostModel
from parsim.model import MoeSpec
from parsim.plan import ASYNCHRONOUS_SCHEDULES, Job, ParallelPlan, stage_layers
from parsim.schedule.check import plan_problems
from parsim.search.examine import Examiner
from parsim.search.fullest import fullest_rank
from parsim.search.space import Family
from parsim.simulate.prediction import estimate
from tests.builders import plain_stack, round_cluster, small_model
from tests.strategies import CASES, Case

ROUNDING = 1 - 1e-9


def alone(plan: ParallelPlan, recompute: str, *, even_split: bool) -> Family:
    """The family of one plan, with its own choices."""
    return Family(
        base=replace(
            plan,
            recompute="none",
            recompute_layers=(),
            stage_split=plan.stage_split if even_split else (),
        ),
        zero=(plan.zero,),
        micro_batch=(plan.micro_batch,),
        sequence_parallel=(plan.sequence_parallel,),
        tp_overlap=(plan.tp_overlap,),
        recompute=(recompute,),  # type: ignore[arg-type]
        even_split=even_split,
    )


def usual(plan: ParallelPlan) -> ParallelPlan:
    return replace(plan, aggregation="bucket", compression="none", weighted=False)


def bound_where_it_just_fits_s(case: Case, *, even_split: bool) -> float | None:
    """The bound of a plan whose recomputed layers are left to be chosen, on devices that have no more
    memory than this choice needs; None where the search has no such plan.
    """
    job, plan, costs = case
    needed = fullest_rank(job, plan, costs).peak + costs.stack.context_bytes
    device = replace(costs.cluster.device, memory_bytes=needed / (1 - ENOUGH_HEADROOM))
    examiner = Examiner(job, replace(costs, cluster=replace(costs.cluster, device=device)))
    family = alone(plan, "partial", even_split=even_split)
    _, legal = examiner.legality(family)
    if not legal.all():  # the even split
        return None
    _, bound_s = examiner.figures(family, legal)
    # With everything recomputed it may still not fit on even stages.
    return float(bound_s[0, 0, 0]) if np.isfinite(bound_s[0, 0, 0]) else None


@given(CASES, st.data())
@settings(max_examples=600, deadline=None)
def test_no_split_and_no_counts_are_faster_than_the_bound(case: Case, data: st.DataObject) -> None:
    job, plan, costs = case
    plan = usual(plan)
    if plan.vpp == 1 and not data.draw(st.integers(0, 3)):
        plan = replace(plan, schedule=data.draw(st.sampled_from(ASYNCHRONOUS_SCHEDULES)))
    free = plan.vpp == 1 and plan.pp > 1 and data.draw(st.booleans())
    split = stage_layers(job.model, plan)
    if free:
        inner = [data.draw(st.integers(1, 3)) for _ in split[1:]]
        assume(sum(inner) < job.model.layers)
        split = tuple(data.draw(st.permutations([job.model.layers - sum(inner), *inner])))
    *others, last = split
    layers = *others, last + job.model.mtp_layers
    counts = tuple(data.draw(st.integers(0, n)) for n in layers)
    plan = replace(plan, stage_split=split, recompute="full", recompute_layers=counts)
    assume(next(plan_problems(job, plan, costs.cluster), None) is None)
    bound_s = bound_where_it_just_fits_s((job, plan, costs), even_split=not free)
    if bound_s is not None:
        assert bound_s <= estimate(job, plan, costs).step_time_s / ROUNDING


@pytest.mark.parametrize("recomputed", [2, 3])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_layers_that_live_on_little_leave_more_room(schedule: str, recomputed: int) -> None:
    # Three dense layers come before those with experts, which need far more while they are recomputed.
    moe = MoeSpec(experts=4, top_k=2, ffn_hidden=2048, dense_layers=3)
    model = small_model(layers=8, moe=moe)
    plan = ParallelPlan(schedule=schedule, recompute="full", recompute_layers=(recomputed,))
    job = Job(model=model, seq_len=256, global_batch=4)
    costs = CostModel(model, round_cluster(), plain_stack())
    bound_s = bound_where_it_just_fits_s((job, plan, costs), even_split=True)
    nothing_s = estimate(job, ParallelPlan(schedule=schedule), costs).step_time_s
    assert bound_s is not None
    assert nothing_s < bound_s <= estimate(job, plan, costs).step_time_s / ROUNDING


@pytest.mark.parametrize("schedule", ASYNCHRONOUS_SCHEDULES)
def test_without_a_flush_the_rank_that_must_recompute_sets_the_pace(schedule: str) -> None:
    # The first rank keeps more versions of its weights and more micro-batches, and no head.
    plan = ParallelPlan(pp=2, schedule=schedule, recompute="full", recompute_layers=(4, 0))
    model = small_model(layers=8)
    job = Job(model=model, seq_len=256, global_batch=16)
    costs = CostModel(model, round_cluster(), plain_stack())
    bound_s = bound_where_it_just_fits_s((job, plan, costs), even_split=True)
    nothing_s = estimate(job, ParallelPlan(pp=2, schedule=schedule), costs).step_time_s
    assert bound_s is not None
    assert nothing_s < bound_s <= estimate(job, plan, costs).step_time_s / ROUNDING


@pytest.mark.parametrize("num_micro_batches", [2, 32])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb-h2", "pipedream"])
def test_no_split_beside_a_long_head_is_faster_than_the_bound(
    schedule: str, num_micro_batches: int
) -> None:
    # The head takes as long as some layers; every split of 13 layers on two ranks is replayed.
    model = small_model(layers=13, vocab=12288)
    job = Job(model=model, seq_len=256, global_batch=num_micro_batches)
    costs = CostModel(model, round_cluster(), plain_stack(pp_overlap=True))
    plan = ParallelPlan(pp=2, schedule=schedule)
    family = alone(plan, "none", even_split=False)
    _, bound_s = Examiner(job, costs).figures(family, np.ones(family.shape, bool))
    best_s = min(
        estimate(job, replace(plan, stage_split=(n, 13 - n)), costs).step_time_s for n in range(1, 14)
    )
    assert 0.5 * best_s < bound_s.item() <= best_s / ROUNDING
