"""Data-parallel communication and update of one stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from parsim.cost.collective import collective_s, group_over, wire_factor
from parsim.cost.interpolation import along_line
from parsim.cost.memory import (
    gathered_bytes,
    gradient_bytes,
    optimizer_bytes,
    sharded,
    stored_weight_bytes,
    weight_bytes,
)
from parsim.cost.memory_bound import memory_bound_s
from parsim.cost.stage import StageCost
from parsim.hardware import Cluster
from parsim.mesh import Axis, group_size, mesh_axes, part_of
from parsim.plan import Job, ParallelPlan
from parsim.stack import Stack


class Traffic(NamedTuple):
    """A transfer: how long it takes, and what each device sends."""

    seconds: float = 0.0
    num_bytes: float = 0.0

    def plus(self, other: Traffic) -> Traffic:
        """Both, one after the other."""
        return Traffic(self.seconds + other.seconds, self.num_bytes + other.num_bytes)

    def times(self, count: float) -> Traffic:
        """The same, `count` times over."""
        return Traffic(count * self.seconds, count * self.num_bytes)


NO_TRAFFIC = Traffic()


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSync:
    """Data-parallel communication and update of one stage."""

    reduce_s: float
    """Reduction of all its gradients: all-reduce, or reduce-scatter with ZeRO."""
    gather_s: float
    """All-gather of all its parameters (ZeRO)."""
    gather_takes_s: float = 0.0
    """What a gather takes from the compute beside it: its share of SMs and memory, and copies out of the
    buffer (FSDP2)."""
    reduce_takes_s: float = 0.0
    """The same of a reduction, with copies into the buffer."""
    buckets: int
    """Pieces that both can be cut into, to run beside compute."""
    optimizer_s: float
    reduce_bytes: float = 0.0
    """What each device sends in the whole reduction."""
    gather_bytes: float = 0.0


def stage_sync(
    stage: StageCost, job: Job, plan: ParallelPlan, cluster: Cluster, stack: Stack
) -> StageSync:
    """What reduction, gathering and update of a stage cost on each of its replicas."""
    gradients, weights = gradient_bytes(job.precision, stack), weight_bytes(job.precision)
    replicas = mesh_axes(plan, "tp", "cp", "dp")
    expert_ranks = max(1, group_size(replicas) // plan.expert_ranks)
    buckets = min(max(1, stage.num_layers), max(1, round(stage.parameters / stack.dp_bucket_parameters)))
    if plan.zero == 3:
        buckets = max(1, stage.num_layers)
    reduced = gathered = NO_TRAFFIC
    for parameters, axes in (
        (stage.dense_parameters, mesh_axes(plan, "cp", "dp")),
        (stage.expert_parameters, part_of(replicas, size=expert_ranks, skip=plan.expert_ranks)),
    ):
        part = _reduce(cluster, parameters * gradients / buckets, axes, plan)
        reduced = reduced.plus(part.times(buckets))
        if plan.zero:
            shards = part_of(axes, size=shard_ranks(axes, plan))
            size = parameters * gathered_bytes(job.precision, stack) / buckets
            part = _collective(cluster, "all_gather", size, shards, plan)
            gathered = gathered.plus(part.times(buckets))
    gather_s = gathered.seconds
    if plan.zero in (1, 2) and plan.shard_group > 1:
        # Each rank broadcasts once a step, whatever number of chunks it holds.
        gather_s += plan.shard_group * stack.zero_broadcast_s / plan.vpp
    reduce_s, gather_s = stack.dp_slowdown * reduced.seconds, stack.dp_slowdown * gather_s
    ahead = (stack.fsdp_prefetch if plan.zero == 3 else stack.zero_prefetch) > 0
    return StageSync(
        reduce_s=reduce_s,
        gather_s=gather_s,
        gather_takes_s=stack.dp_overlap_cost * gather_s * ahead
        + _copy_s(stage, plan, cluster, stack, 2 * weights),
        reduce_takes_s=stack.dp_overlap_cost * reduce_s
        + _copy_s(stage, plan, cluster, stack, weights + gradients),
        buckets=buckets,
        optimizer_s=_optimizer_s(stage, job, plan, cluster, stack),
        reduce_bytes=reduced.num_bytes,
        gather_bytes=gathered.num_bytes,
    )


def _copy_s(
    stage: StageCost, plan: ParallelPlan, cluster: Cluster, stack: Stack, parameter_bytes: float
) -> float:
    """Seconds to read and write `parameter_bytes` a parameter, where FSDP copies."""
    if plan.zero != 3 or not stack.fsdp_copies:
        return 0.0
    return stack.memory_bound_slowdown * memory_bound_s(cluster, stage.parameters * parameter_bytes)


def shard_ranks(axes: tuple[Axis, ...], plan: ParallelPlan) -> int:
    """Ranks of a gradient's group that share its shards, in order."""
    ranks = group_size(axes)
    return min(ranks, plan.zero_group or ranks)


def _reduce(cluster: Cluster, num_bytes: float, axes: tuple[Axis, ...], plan: ParallelPlan) -> Traffic:
    """Sum of gradients over a group of ranks: within the shard group first, then between those."""
    if plan.zero == 0:
        return _collective(cluster, "all_reduce", num_bytes, axes, plan)
    ranks, group = group_size(axes), shard_ranks(axes, plan)
    within = _collective(cluster, "reduce_scatter", num_bytes, part_of(axes, size=group), plan)
    if ranks == group:
        return within
    others = part_of(axes, size=ranks // group, skip=group)
    return within.plus(_collective(cluster, "all_reduce", num_bytes / group, others, plan))


def _collective(
    cluster: Cluster, kind: str, num_bytes: float, axes: tuple[Axis, ...], plan: ParallelPlan
) -> Traffic:
    group = group_over(cluster, axes, gpus=plan.gpus)
    return Traffic(
        collective_s(cluster, kind, num_bytes, group), wire_factor(kind, group.size) * num_bytes
    )


def _optimizer_s(
    stage: StageCost, job: Job, plan: ParallelPlan, cluster: Cluster, stack: Stack
) -> float:
    """Gradient norm, update and zeroing, bound by memory traffic.

    The update reads the gradient and reads and writes each state; without fp32 weights of its own it
    reads and writes the weights, else it writes their 16-bit copy. The norm reads all gradients once
    more, zeroing writes them.
    """
    measured = cluster.kernels.measured_optimizer
    if measured is not None and measured.optimizer == job.optimizer:
        return along_line(measured.points, sharded(stage, plan))
    gradients, weights = gradient_bytes(job.precision, stack), weight_bytes(job.precision)
    states = optimizer_bytes(job, stack)
    has_master = stack.master_weights and weights < 4
    stored = stored_weight_bytes(job, plan, stack)
    update = gradients + 2 * states + (weights if has_master else 2 * stored)
    kept = sharded(stage, plan) if plan.zero >= 2 else stage.parameters
    moved = sharded(stage, plan) * (update + gradients) + kept * gradients
    return stack.memory_bound_slowdown * memory_bound_s(cluster, moved)
