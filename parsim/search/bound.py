"""A lower bound of a plan's step time, without a schedule."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

from parsim.cost.price import PassTime
from parsim.cost.stage import StageCost
from parsim.cost.step import StepCost
from parsim.plan import ASYNCHRONOUS_SCHEDULES, Job, ParallelPlan
from parsim.schedule import OVERLAPPED_SCHEDULES, SPLIT_SCHEDULES
from parsim.search.replicas import ReplicaTime, replica_time
from parsim.stack import Stack


def lower_bound_s(cost: StepCost, job: Job, plan: ParallelPlan, stack: Stack) -> float:
    """No schedule that runs these stages on these ranks is faster.

    A pipeline rank must run all its forwards and backwards; it cannot start before a micro-batch has
    come through the stages before one of its own, and after its last backward a gradient must still go
    back through them. (1F1B on equal stages with free transfers reaches the bound: Narayanan et al.
    2021, section 2.2.1.) Weight gradients that are split off may all come after that, with what the last
    of them takes more, and overlapped pairs may hide all exchanges but what hiding costs. A rank's
    gathers and reductions follow each other. The slowest update and the host come on top, for all ranks
    wait for all gradients.
    """
    replicas = [replica_time(sync, plan.zero, stack) for sync in cost.syncs]
    times = [
        _stage_times(stage, replica, plan, stack)
        for stage, replica in zip(cost.stages, replicas, strict=True)
    ]
    m = plan.num_micro_batches(job)
    if plan.schedule in ASYNCHRONOUS_SCHEDULES:
        return _stale_bound_s(times, replicas, m, plan) + stack.step_overhead_s
    chain = range(plan.model_stages)
    there = [times[s].forward_s + replicas[s].first_s + cost.send_s[s] for s in chain[:-1]]
    back = [times[s].hand_back_s + cost.send_s[s] for s in chain[:-1]]
    # The last gradient that reaches a first stage is followed by its weight gradient there.
    last_s = times[0].backward_s - times[0].hand_back_s
    head = [0.0, *accumulate(there)] * plan.chains
    tail = [0.0, *(last_s + seconds for seconds in accumulate(back))] * plan.chains
    own = plan.rank_stages()
    runs, most = m / plan.chains, 0.0
    for stages in own:
        busy_s = runs * sum(times[s].forward_s + times[s].backward_s for s in stages)
        busy_s += sum(replicas[s].first_s + replicas[s].last_s for s in stages)
        later_s = runs * sum(times[s].backward_s - times[s].hand_back_s for s in stages)
        if plan.schedule in SPLIT_SCHEDULES:
            later_s += sum(replicas[s].last_s for s in stages)
        late_s = sum(replicas[s].late_s for s in stages)
        after_s = max(
            late_s + min(replicas[s].last_bucket_s for s in stages),
            min(tail[s] for s in stages) - later_s,
        )
        stream_s = runs * sum(replicas[s].stream_s for s in stages)
        most = max(most, min(head[s] for s in stages) + busy_s + after_s, stream_s)
    return most + max(sum(replicas[s].update_s for s in of) for of in own) + stack.step_overhead_s


def _stale_bound_s(
    times: list[_StageTimes], replicas: list[ReplicaTime[float]], m: int, plan: ParallelPlan
) -> float:
    """The work of the slowest rank, with its own updates: without a flush nothing else is certain."""
    updates = updates_a_step(plan, m)
    return max(
        m * (time.forward_s + time.backward_s) + updates * replica.update_s
        for time, replica in zip(times, replicas, strict=True)
    )


def updates_a_step(plan: ParallelPlan, num_micro_batches: int) -> int:
    """Updates of a stage's weights in a step of a schedule without a flush."""
    return num_micro_batches if plan.schedule == "pipedream" else 1


class _StageTimes(NamedTuple):
    """The least that a stage's passes take for a micro-batch."""

    forward_s: float
    hand_back_s: float
    """Until the gradient of its input is there: of a split backward a part, else all of it."""
    backward_s: float


def _stage_times(
    stage: StageCost, replica: ReplicaTime[float], plan: ParallelPlan, stack: Stack
) -> _StageTimes:
    host_s = stack.action_host_s if plan.pp > 1 else 0.0
    forward, backward = stage.time.forward, stage.time.backward
    input_grad = stage.time.recompute.plus(stage.time.input_grad)
    if plan.schedule in OVERLAPPED_SCHEDULES and stack.pair_overlap:
        forward, backward, input_grad = (_unhidden(p, stack) for p in (forward, backward, input_grad))
    every_s = host_s + replica.gather_each_s
    backward_s = backward.total_s + every_s + replica.reduce_each_s
    split = plan.schedule in SPLIT_SCHEDULES
    hand_back_s = input_grad.total_s + every_s if split else backward_s
    return _StageTimes(forward.total_s + every_s, hand_back_s, backward_s)


def _unhidden(time: PassTime, stack: Stack) -> PassTime:
    """A pass in an overlapped pair whose other pass has compute enough."""
    return time._replace(tp_s=stack.overlap_cost * time.tp_s, ep_s=stack.overlap_cost * time.ep_s)
