"""What a step costs beside its stages: transfers between them, gradient reduction, optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from parsim.cost.cell import cell_of
from parsim.cost.collective import collective_s, group_of, send_recv_s
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
from parsim.cost.stage import CostModel, StageCost
from parsim.hardware import Cluster
from parsim.plan import Job, ParallelPlan, stage_layers
from parsim.stack import Stack

EXTREMES_BYTES = 1024.0
"""A scale each for two operands and a gradient of the few products of a chunk, in fp32."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """All times and bytes that lowering a schedule needs."""

    stages: tuple[StageCost, ...]
    syncs: tuple[StageSync, ...]
    send_s: tuple[float, ...]
    """Transfer of one micro-batch from stage i to stage i + 1 (and of its gradient back)."""
    tied_reduce_s: float
    """All-reduce of tied embedding gradients between the first and the last stage."""
    extremes_s: float = 0.0
    """All-reduce of the extremes of fp8 tensors after each pass of a stage (delayed scaling)."""


def step_cost(job: Job, plan: ParallelPlan, costs: CostModel) -> StepCost:
    """The costs of a plan's step."""
    cell = cell_of(job, plan)
    stages = costs.stages(cell, stage_layers(job.model, plan))
    tied_s = 0.0
    if job.model.tied_embeddings and plan.pp > 1:
        size = job.model.vocab * job.model.hidden / plan.tp * gradient_bytes(job.precision, costs.stack)
        stride = (plan.pp - 1) * plan.dp * plan.cp * plan.tp
        tied_s = collective_s(
            costs.cluster,
            "all_reduce",
            size,
            group_of(costs.cluster, gpus=plan.gpus, size=2, stride=stride),
        )
    return StepCost(
        stages=stages,
        syncs=tuple(_stage_sync(stage, job, plan, costs.cluster, costs.stack) for stage in stages),
        send_s=tuple(_send_s(i, job, plan, costs) for i in range(len(stages) - 1)),
        tied_reduce_s=tied_s,
        extremes_s=_extremes_s(job, plan, costs),
    )


def mixed_step_cost(job: Job, plan: ParallelPlan, costs_by_rank: Sequence[CostModel]) -> StepCost:
    """The costs of a step whose pipeline ranks run on different devices.

    A transfer between two kinds of devices takes as long as the slower kind's would.
    """
    if all(costs is costs_by_rank[0] for costs in costs_by_rank):
        return step_cost(job, plan, costs_by_rank[0])
    kinds = {id(costs): costs for costs in costs_by_rank}
    priced = {key: step_cost(job, plan, costs) for key, costs in kinds.items()}
    of_stage = [priced[id(costs_by_rank[plan.stage_rank(s)])] for s in range(plan.num_stages)]
    return StepCost(
        stages=tuple(cost.stages[s] for s, cost in enumerate(of_stage)),
        syncs=tuple(cost.syncs[s] for s, cost in enumerate(of_stage)),
        send_s=tuple(
            max(here.send_s[s], there.send_s[s]) for s, (here, there) in enumerate(pairwise(of_stage))
        ),
        tied_reduce_s=max(cost.tied_reduce_s for cost in priced.values()),
        extremes_s=max(cost.extremes_s for cost in priced.values()),
    )


def _extremes_s(job: Job, plan: ParallelPlan, costs: CostModel) -> float:
    """All-reduce of a few kilobytes over every rank that holds a part of the stage.

    Source: Transformer Engine, FP8GlobalStateManager.reduce_and_update_fp8_tensors, which ends the
    outermost autocast; Megatron-Core gives it the ranks of tensor, context and data parallelism.
    """
    ranks = plan.tp * plan.cp * plan.dp
    if job.precision != "fp8" or costs.stack.fp8_scaling != "delayed" or ranks == 1:
        return 0.0
    group = group_of(costs.cluster, gpus=plan.gpus, size=ranks, stride=1)
    waiting_s = costs.stack.collective_overhead_s * math.log2(ranks)
    return collective_s(costs.cluster, "all_reduce", EXTREMES_BYTES, group) + waiting_s


def _send_s(stage: int, job: Job, plan: ParallelPlan, costs: CostModel) -> float:
    """Transfer of a micro-batch's activations from `stage` to the next."""
    cell, cluster = cell_of(job, plan), costs.cluster
    source, target = plan.stage_rank(stage), plan.stage_rank(stage + 1)
    if source == target:
        return 0.0
    whole = cell.tokens * job.model.hidden * cell.activation_bytes
    cut = plan.tp if cell.sequence_parallel or costs.stack.pp_scatter_gather else 1
    # Every replica hops as far: all stay in a domain only where one holds both stages whole.
    stage_ranks = plan.dp * plan.cp * plan.tp
    ends = min(source, target) * stage_ranks, (max(source, target) + 1) * stage_ranks - 1
    local = cluster.same_domain(*ends) and not costs.stack.pp_over_network
    seconds = send_recv_s(cluster, whole / cut, local=local)
    if cut > 1 and not cell.sequence_parallel:
        # Narayanan et al. 2021, section 4.1: each tp rank sends its part, the receivers gather them.
        seconds += collective_s(
            cluster, "all_gather", whole, group_of(cluster, gpus=plan.gpus, size=plan.tp, stride=1)
        )
    return seconds


def _stage_sync(
    stage: StageCost, job: Job, plan: ParallelPlan, cluster: Cluster, stack: Stack
) -> StageSync:
    gradients, weights = gradient_bytes(job.precision, stack), weight_bytes(job.precision)
    dense_ranks = plan.dp * plan.cp
    expert_ranks = max(1, dense_ranks * plan.tp // plan.expert_ranks)
    buckets = min(max(1, stage.num_layers), max(1, round(stage.parameters / stack.dp_bucket_parameters)))
    if plan.zero == 3:
        buckets = max(1, stage.num_layers)
    reduce_s = gather_s = 0.0
    for parameters, ranks, stride in (
        (stage.dense_parameters, dense_ranks, plan.tp),
        (stage.expert_parameters, expert_ranks, plan.expert_ranks),
    ):
        reduce_s += buckets * _reduce_s(cluster, parameters * gradients / buckets, ranks, stride, plan)
        if plan.zero:
            group = min(ranks, plan.zero_group or ranks)
            gather_s += buckets * collective_s(
                cluster,
                "all_gather",
                parameters * gathered_bytes(job.precision, stack) / buckets,
                group_of(cluster, gpus=plan.gpus, size=group, stride=stride),
            )
    if plan.zero in (1, 2) and plan.shard_group > 1:
        # Each rank broadcasts once a step, whatever number of chunks it holds.
        gather_s += plan.shard_group * stack.zero_broadcast_s / plan.vpp
    reduce_s, gather_s = stack.dp_slowdown * reduce_s, stack.dp_slowdown * gather_s
    ahead = plan.zero < 3 or stack.fsdp_prefetch
    return StageSync(
        reduce_s=reduce_s,
        gather_s=gather_s,
        gather_takes_s=stack.dp_overlap_cost * gather_s * ahead
        + _copy_s(stage, plan, cluster, stack, 2 * weights),
        reduce_takes_s=stack.dp_overlap_cost * reduce_s
        + _copy_s(stage, plan, cluster, stack, weights + gradients),
        buckets=buckets,
        optimizer_s=_optimizer_s(stage, job, plan, cluster, stack),
    )


def _copy_s(
    stage: StageCost, plan: ParallelPlan, cluster: Cluster, stack: Stack, parameter_bytes: float
) -> float:
    """Seconds to read and write `parameter_bytes` a parameter, where FSDP copies."""
    if plan.zero != 3 or not stack.fsdp_copies:
        return 0.0
    return stack.memory_bound_slowdown * memory_bound_s(cluster, stage.parameters * parameter_bytes)


def _reduce_s(cluster: Cluster, num_bytes: float, ranks: int, stride: int, plan: ParallelPlan) -> float:
    """Sum of gradients over `ranks`: within the shard group first, then between the groups."""
    if plan.zero == 0:
        return collective_s(
            cluster,
            "all_reduce",
            num_bytes,
            group_of(cluster, gpus=plan.gpus, size=ranks, stride=stride),
        )
    group = min(ranks, plan.zero_group or ranks)
    seconds = collective_s(
        cluster,
        "reduce_scatter",
        num_bytes,
        group_of(cluster, gpus=plan.gpus, size=group, stride=stride),
    )
    if ranks > group:
        between = group_of(cluster, gpus=plan.gpus, size=ranks // group, stride=stride * group)
        seconds += collective_s(cluster, "all_reduce", num_bytes / group, between)
    return seconds


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
