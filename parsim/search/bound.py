"""A lower bound of a plan's step time, without a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from parsim.cost.price import PassTime
from parsim.cost.stage import StageCost
from parsim.cost.step import StepCost
from parsim.cost.sync import StageSync
from parsim.plan import ASYNCHRONOUS_SCHEDULES, Job, ParallelPlan
from parsim.schedule import OVERLAPPED_SCHEDULES, SPLIT_SCHEDULES
from parsim.stack import Stack


def lower_bound_s(cost: StepCost, job: Job, plan: ParallelPlan, stack: Stack) -> float:
    """No schedule that runs these stages on these ranks is faster.

    A pipeline rank must run all its forwards and backwards; it cannot start before a micro-batch has
    come through the stages before one of its own, and after its last backward a gradient must still go
    back through them. (1F1B on equal stages with free transfers reaches the bound: Narayanan et al.
    2021, section 2.2.1.) Weight gradients that are split off may all come after that, and overlapped
    pairs may hide all exchanges but what hiding costs. The slowest optimizer and the host come on top,
    for all ranks wait for all gradients.
    """
    times = [_stage_times(stage, cost, plan, stack) for stage in cost.stages]
    chain = range(plan.model_stages)
    there = [times[s].forward_s + cost.send_s[s] for s in chain[:-1]]
    back = [times[s].hand_back_s + cost.send_s[s] for s in chain[:-1]]
    # The last gradient that reaches a first stage is followed by its weight gradient there.
    last_s = times[0].backward_s - times[0].hand_back_s
    head = [0.0, *accumulate(there)] * plan.chains
    tail = [0.0, *(last_s + seconds for seconds in accumulate(back))] * plan.chains
    own: list[list[int]] = [[] for _ in range(plan.pp)]
    for stage in range(plan.num_stages):
        own[plan.stage_rank(stage)].append(stage)
    if plan.schedule in ASYNCHRONOUS_SCHEDULES:
        return _stale_bound_s(cost, times, plan.num_micro_batches(job), plan, stack)
    runs = plan.num_micro_batches(job) / plan.chains
    most = 0.0
    for stages in own:
        busy_s = runs * sum(times[s].forward_s + times[s].backward_s for s in stages)
        later_s = runs * sum(times[s].backward_s - times[s].hand_back_s for s in stages)
        after_s = max(
            last_reduction_s([cost.syncs[s] for s in stages], plan.zero, stack),
            min(tail[s] for s in stages) - later_s,
        )
        most = max(most, min(head[s] for s in stages) + busy_s + after_s)
    optimizer = max(sum(cost.syncs[s].optimizer_s for s in stages) for stages in own)
    return most + optimizer + stack.step_overhead_s


def _stale_bound_s(
    cost: StepCost, times: list[_StageTimes], m: int, plan: ParallelPlan, stack: Stack
) -> float:
    """The work of the slowest rank, with its own updates: without a flush nothing else is certain."""
    work = (
        m * (time.forward_s + time.backward_s) + updates_a_step(plan, m) * sync.optimizer_s
        for time, sync in zip(times, cost.syncs, strict=True)
    )
    return max(work) + stack.step_overhead_s


def updates_a_step(plan: ParallelPlan, num_micro_batches: int) -> int:
    """Updates of a stage's weights in a step of a schedule without a flush."""
    return num_micro_batches if plan.schedule == "pipedream" else 1


class _StageTimes(NamedTuple):
    """The least that a stage's passes take for a micro-batch."""

    forward_s: float
    hand_back_s: float
    """Until the gradient of its input is there: of a split backward a part, else all of it."""
    backward_s: float


def _stage_times(stage: StageCost, cost: StepCost, plan: ParallelPlan, stack: Stack) -> _StageTimes:
    host_s = stack.action_host_s if plan.pp > 1 else 0.0
    time = stage.time
    forward, backward = time.forward, time.backward
    hand_back = time.recompute.plus(time.input_grad) if plan.schedule in SPLIT_SCHEDULES else backward
    if plan.schedule in OVERLAPPED_SCHEDULES:
        forward, backward, hand_back = (_unhidden(p, stack) for p in (forward, backward, hand_back))
    return _StageTimes(*(part.total_s + host_s for part in (forward, hand_back, backward)))


def _unhidden(time: PassTime, stack: Stack) -> PassTime:
    """A pass in an overlapped pair whose other pass has compute enough."""
    return time._replace(tp_s=stack.overlap_cost * time.tp_s, ep_s=stack.overlap_cost * time.ep_s)


def last_reduction_s(syncs: Sequence[StageSync], zero: int, stack: Stack) -> float:
    """Gradient reduction of a rank's stages that cannot start before its last backward has ended."""
    if not stack.dp_overlap and zero < 2:
        return sum(sync.reduce_s for sync in syncs)
    return min(sync.reduce_s / sync.buckets for sync in syncs)
