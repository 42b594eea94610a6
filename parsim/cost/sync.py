"""Data-parallel communication and update of one stage."""

from __future__ import annotations

import math
from dataclasses import dataclass

from parsim.cost.collective import group_over
from parsim.cost.compression import NOTHING_REDUCED, Reduced, reduced_over
from parsim.cost.host import layer_step_s, shard_host
from parsim.cost.interpolation import along_line
from parsim.cost.memory import (
    accumulates,
    gathered_bytes,
    gradient_bytes,
    optimizer_bytes,
    sharded,
    stored_weight_bytes,
    weight_bytes,
)
from parsim.cost.memory_bound import memory_bound_s
from parsim.cost.stage import StageCost
from parsim.cost.traffic import NO_TRAFFIC, Traffic, collective
from parsim.cost.weights import NO_WEIGHTS, Gradients, StageWeights, messages
from parsim.hardware import Cluster
from parsim.mesh import Axis, group_size, mesh_axes, part_of
from parsim.plan import Job, ParallelPlan, parse_compression
from parsim.stack import Stack


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
    forward_takes_s: float = 0.0
    """What sharding takes on the host in every forward, whether parameters are gathered or not."""
    backward_takes_s: float = 0.0
    add_s: float = 0.0
    """Adding a backward's gradients to those of the ones before it."""
    buckets: int
    """Pieces that both can be cut into, to run beside compute."""
    optimizer_s: float
    reduce_kernels_s: float = 0.0
    """Kernels that a reduction needs before and after it: weighting, casts, compression."""
    reduce_bytes: float = 0.0
    """What each device sends in the whole reduction."""
    gather_bytes: float = 0.0
    accumulates: bool = False
    """With ZeRO-2 and 3: gradients are reduced once a step, behind the last backward, not each."""
    norms: Traffic = NO_TRAFFIC
    """Sum over tp of the gradients of norms, with each reduction."""


def stage_sync(
    stage: StageCost,
    job: Job,
    plan: ParallelPlan,
    cluster: Cluster,
    stack: Stack,
    weights: StageWeights = NO_WEIGHTS,
) -> StageSync:
    """What reduction, gathering and update of a stage cost on each of its replicas.

    `weights` are needed where tensors are reduced one by one, or compressed by their shape.
    """
    width, gathered_width = gradient_bytes(job.precision, stack), weight_bytes(job.precision)
    dense, experts = replica_axes(plan)
    buckets = min(max(1, stage.num_layers), max(1, round(stage.parameters / stack.dp_bucket_parameters)))
    if plan.zero == 3 or plan.aggregation != "bucket":
        buckets = max(1, stage.num_layers)
    reduced, gathered = NOTHING_REDUCED, NO_TRAFFIC
    for parameters, tensors, axes in (
        (stage.dense_parameters, weights.dense, dense),
        (stage.expert_parameters, weights.experts, experts),
    ):
        for message in messages(parameters, tensors, buckets, plan.aggregation):
            part = _reduce(message.gradients, axes, width, plan, cluster, stack)
            reduced = reduced.plus(part.times(message.times))
        if plan.weighted and parameters and group_size(axes) > 1:
            reduced = reduced.plus(_weighted(parameters * width, axes, plan, cluster, stack))
        if plan.zero:
            shards = part_of(axes, size=shard_ranks(axes, plan))
            size = parameters * gathered_bytes(job.precision, stack) / buckets
            group = group_over(cluster, shards, gpus=plan.gpus)
            gathered = gathered.plus(collective(cluster, "all_gather", size, group).times(buckets))
    gather_s = gathered.seconds
    if plan.zero in (1, 2) and plan.shard_group > 1:
        # Each rank broadcasts once a step, whatever number of chunks it holds.
        gather_s += plan.shard_group * stack.zero_broadcast_s / plan.vpp
    wait_s = _wait_s(stage, plan, cluster, stack)
    reduce_s = stack.dp_slowdown * reduced.traffic.seconds + wait_s
    gather_s = stack.dp_slowdown * gather_s + wait_s
    ahead = (stack.fsdp_prefetch if plan.zero == 3 else stack.zero_prefetch) != 0
    # Once a step the last bucket's reduction has no compute beside it; with ZeRO-2 and 3 every
    # micro-batch's has that of the next.
    each = plan.zero >= 2 and not accumulates(plan, stack)
    beside = 1.0 if each else (buckets - 1) / buckets
    host = shard_host(plan.zero, plan.shard_group, cluster)
    return StageSync(
        forward_takes_s=stage.num_layers * host.forward_s,
        backward_takes_s=stage.num_layers * host.backward_s,
        add_s=_add_s(stage, job, plan, cluster, stack, each=each),
        reduce_s=reduce_s,
        gather_s=gather_s,
        gather_takes_s=stack.dp_overlap_cost * gather_s * ahead
        + _copy_s(stage, plan, cluster, stack, 2 * gathered_width),
        reduce_takes_s=stack.dp_overlap_cost * reduce_s * beside
        + _copy_s(stage, plan, cluster, stack, gathered_width + width),
        buckets=buckets,
        optimizer_s=_optimizer_s(stage, job, plan, cluster, stack)
        + _flatten_s(stage, job, plan, cluster, stack)
        + _update_host_s(stage, plan, cluster),
        reduce_bytes=reduced.traffic.num_bytes,
        reduce_kernels_s=reduced.device_s,
        gather_bytes=gathered.num_bytes,
        accumulates=accumulates(plan, stack),
        norms=_norms(stage, job, plan, cluster, stack),
    )


def _wait_s(stage: StageCost, plan: ParallelPlan, cluster: Cluster, stack: Stack) -> float:
    """What FSDP's gathers, or reductions, of a stage's layers cost beyond themselves where the ranks are
    the host: each waits for the rank that comes last.
    """
    if plan.zero < 2 or plan.shard_group == 1 or not (stack.fsdp_copies and cluster.device.is_host):
        return 0.0
    return stage.num_layers * stack.collective_overhead_s * math.log2(plan.shard_group)


def _add_s(
    stage: StageCost, job: Job, plan: ParallelPlan, cluster: Cluster, stack: Stack, *, each: bool
) -> float:
    """Seconds to read new gradients and those before, and to write the sum: of shards where every
    backward's gradients are reduced.
    """
    if not stack.gradients_arise_anew:
        return 0.0
    values = sharded(stage, plan) if each else stage.parameters
    moved = 3 * values * gradient_bytes(job.precision, stack)
    return stack.memory_bound_slowdown * memory_bound_s(cluster, moved)


def _flatten_s(stage: StageCost, job: Job, plan: ParallelPlan, cluster: Cluster, stack: Stack) -> float:
    """Seconds to read the gradients of replicas, and to write them into one flat buffer."""
    if not stack.gradients_arise_anew or (plan.zero >= 2 and plan.shard_group > 1):
        return 0.0
    moved = 2 * stage.parameters * gradient_bytes(job.precision, stack)
    return stack.memory_bound_slowdown * memory_bound_s(cluster, moved)


def _update_host_s(stage: StageCost, plan: ParallelPlan, cluster: Cluster) -> float:
    """What the host does once a step for each layer, between the last backward and the update's end."""
    if plan.zero >= 2 and plan.shard_group > 1:
        return stage.num_layers * shard_host(plan.zero, plan.shard_group, cluster).update_s
    sequence_parallel = plan.sequence_parallel and plan.tp > 1
    return stage.num_layers * layer_step_s(plan.tp, sequence_parallel=sequence_parallel, cluster=cluster)


def _copy_s(
    stage: StageCost, plan: ParallelPlan, cluster: Cluster, stack: Stack, parameter_bytes: float
) -> float:
    """Seconds to read and write `parameter_bytes` a parameter, where FSDP copies."""
    if plan.zero != 3 or not stack.fsdp_copies:
        return 0.0
    return stack.memory_bound_slowdown * memory_bound_s(cluster, stage.parameters * parameter_bytes)


def _norms(stage: StageCost, job: Job, plan: ParallelPlan, cluster: Cluster, stack: Stack) -> Traffic:
    """Sum of a stage's gradients that every tp rank has a part of."""
    if not stack.sums_norm_gradients or not stage.partial.tensors:
        return NO_TRAFFIC
    # Shards are reduced tensor by tensor, replicas' gradients in one flat buffer.
    count = stage.partial.tensors if plan.zero >= 2 and plan.shard_group > 1 else 1
    num_bytes = stage.partial.parameters * gradient_bytes(job.precision, stack) / count
    group = group_over(cluster, mesh_axes(plan, "tp"), gpus=plan.gpus)
    one = collective(cluster, "all_reduce", num_bytes, group)
    late_s = stack.collective_overhead_s * math.log2(plan.tp)
    return one._replace(seconds=one.seconds + late_s).times(count)


def replica_axes(plan: ParallelPlan) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
    """Axes of the groups that sum gradients: dp·cp for all layers, and for routed experts the ranks of a
    stage that hold the same ones.
    """
    replicas = mesh_axes(plan, "tp", "cp", "dp")
    ranks = max(1, group_size(replicas) // plan.expert_ranks)
    return mesh_axes(plan, "cp", "dp"), part_of(replicas, size=ranks, skip=plan.expert_ranks)


def shard_ranks(axes: tuple[Axis, ...], plan: ParallelPlan) -> int:
    """Ranks of a gradient's group that share its shards, in order."""
    ranks = group_size(axes)
    return min(ranks, plan.zero_group or ranks)


def _reduce(
    gradients: Gradients,
    axes: tuple[Axis, ...],
    width: float,
    plan: ParallelPlan,
    cluster: Cluster,
    stack: Stack,
) -> Reduced:
    """Sum of gradients over a group of ranks: within the shard group first, then between those."""
    num_bytes = gradients.values * width
    if plan.zero == 0:
        group = group_over(cluster, axes, gpus=plan.gpus)
        compression = parse_compression(plan.compression)
        return reduced_over(group, gradients, compression, width, cluster, stack)
    ranks, size = group_size(axes), shard_ranks(axes, plan)
    shards = group_over(cluster, part_of(axes, size=size), gpus=plan.gpus)
    traffic = collective(cluster, "reduce_scatter", num_bytes, shards)
    if ranks > size:
        others = part_of(axes, size=ranks // size, skip=size)
        between = group_over(cluster, others, gpus=plan.gpus)
        traffic = traffic.plus(collective(cluster, "all_reduce", num_bytes / size, between))
    return Reduced(traffic)


def _weighted(
    num_bytes: float, axes: tuple[Axis, ...], plan: ParallelPlan, cluster: Cluster, stack: Stack
) -> Reduced:
    """Gradients scaled by a weight before they are summed: read and written once more, and the sum of
    all replicas' weights (samples, or tokens that count) as an all-reduce of one fp32 number.
    """
    scaling_s = stack.memory_bound_slowdown * memory_bound_s(cluster, 2 * num_bytes)
    group = group_over(cluster, axes, gpus=plan.gpus)
    return Reduced(collective(cluster, "all_reduce", 4.0, group), scaling_s)


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
