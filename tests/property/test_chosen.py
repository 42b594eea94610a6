"""Bounds that hold whatever is chosen for a plan: its split into stages, the layers it recomputes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from parsim.cost.memory import ENOUGH_HEADROOM
from parsim.plan import ParallelPlan, stage_layers
from parsim.schedule.check import plan_problems
from parsim.search.examine import Examiner
from parsim.search.fullest import fullest_rank
from parsim.search.space import Family
from parsim.simulate.prediction import estimate
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


@given(CASES, st.data())
@settings(max_examples=600, deadline=None)
def test_no_split_and_no_counts_are_faster_than_the_bound(case: Case, data: st.DataObject) -> None:
    job, plan, costs = case
    plan = usual(plan)
    free = plan.vpp == 1 and plan.pp > 1
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
    step_s = estimate(job, plan, costs).step_time_s
    needed = fullest_rank(job, plan, costs).peak + costs.stack.context_bytes
    device = replace(costs.cluster.device, memory_bytes=needed / (1 - ENOUGH_HEADROOM))
    exact = replace(costs, cluster=replace(costs.cluster, device=device))
    family = alone(plan, "partial", even_split=not free)
    _, legal = Examiner(job, exact).legality(family)
    assume(legal.all())  # the even split
    _, bound_s = Examiner(job, exact).figures(family, legal)
    if np.isfinite(bound_s[0, 0, 0]):  # with everything recomputed it may still not fit on even stages
        assert bound_s[0, 0, 0] <= step_s / ROUNDING
