"""A lower bound of a plan's step time, without a schedule."""

from __future__ import annotations

from itertools import accumulate

from parsim.cost.step import StepCost
from parsim.plan import Job, ParallelPlan
from parsim.stack import Stack


def lower_bound_s(cost: StepCost, job: Job, plan: ParallelPlan, stack: Stack) -> float:
    """No schedule of whole backwards (F and B) on stages that go round the ranks is faster.

    A pipeline rank must run all its forwards and backwards; it cannot start before a micro-batch has
    come through the stages before its first one, and after its last action a gradient must still go
    back through them. (1F1B on equal stages with free transfers reaches the bound: Narayanan et al.
    2021, section 2.2.1.) The slowest optimizer and the host come on top, for all ranks wait for all
    gradients.
    """
    host_s = stack.action_host_s if plan.pp > 1 else 0.0
    forward = [stage.time.forward.total_s + host_s for stage in cost.stages]
    backward = [stage.time.backward.total_s + host_s for stage in cost.stages]
    there = [f + send for f, send in zip(forward, cost.send_s, strict=False)]
    back = [b + send for b, send in zip(backward[:-1], cost.send_s, strict=True)]
    head = [0.0, *accumulate(there)]
    tail = [0.0, *accumulate(back)]
    num_micro_batches = plan.num_micro_batches(job)
    most = 0.0
    for rank in range(plan.pp):
        stages = range(rank, plan.num_stages, plan.pp)
        busy = num_micro_batches * sum(forward[s] + backward[s] for s in stages)
        most = max(most, head[rank] + busy + max(tail[rank], _last_reduction_s(cost, rank, plan, stack)))
    optimizer = [
        sum(cost.syncs[s].optimizer_s for s in range(r, plan.num_stages, plan.pp))
        for r in range(plan.pp)
    ]
    return most + max(optimizer) + stack.step_overhead_s


def _last_reduction_s(cost: StepCost, rank: int, plan: ParallelPlan, stack: Stack) -> float:
    """Gradient reduction that cannot start before the rank's last backward has ended."""
    syncs = [cost.syncs[s] for s in range(rank, plan.num_stages, plan.pp)]
    if not stack.dp_overlap and plan.zero < 2:
        return sum(sync.reduce_s for sync in syncs)
    return min(sync.reduce_s / sync.buckets for sync in syncs)
