"""What a step costs beside its stages: transfers between them, gradient reduction, optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from parsim.cost.cell import Cell, cell_of
from parsim.cost.collective import Group, collective_s, group_over, send_recv_s, wire_factor
from parsim.cost.memory import gradient_bytes, sharded
from parsim.cost.stage import CostModel, StageCost
from parsim.cost.sync import StageSync, stage_sync
from parsim.cost.traffic import Traffic
from parsim.cost.weights import NO_WEIGHTS
from parsim.hardware import Cluster
from parsim.mesh import Axis, group_size, mesh_axes
from parsim.plan import Job, ParallelPlan, stage_layers

EXTREMES_BYTES = 1024.0
"""A scale each for two operands and a gradient of the few products of a chunk, in fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """All times and bytes that lowering a schedule needs."""

    stages: tuple[StageCost, ...]
    syncs: tuple[StageSync, ...]
    send_s: tuple[float, ...]
    """Transfer of one micro-batch from stage i to stage i + 1 (and of its gradient back)."""
    send_bytes: tuple[float, ...]
    """What each device sends in one such transfer; so for the others."""
    tied_reduce_s: float
    """All-reduce of tied embedding gradients between the first and the last stage."""
    extremes_s: float = 0.0
    """All-reduce of the extremes of fp8 tensors after each pass of a stage (delayed scaling)."""
    tied_reduce_bytes: float = 0.0
    extremes_bytes: float = 0.0
    copies_reduce: tuple[Traffic, ...] = ()
    """All-reduce of a stage's gradients between the two ranks that hold it, by stage of the model; only
    where a pipeline holds the model twice (DualPipe)."""


def step_cost(job: Job, plan: ParallelPlan, costs: CostModel) -> StepCost:
    """The costs of a plan's step."""
    cell = cell_of(job, plan)
    split = stage_layers(job.model, plan)
    model_stages = costs.stages(cell, split, plan.recompute_layers)
    stages = model_stages * plan.chains
    weights = (NO_WEIGHTS,) * len(stages)
    if plan.aggregation == "tensor" or plan.compression != "none":
        weights = costs.stage_weights(cell, split) * plan.chains
    syncs: dict[int, StageSync] = {}  # stages of the same parts are one object
    for stage, tensors in zip(stages, weights, strict=True):
        if id(stage) not in syncs:
            syncs[id(stage)] = stage_sync(stage, job, plan, costs.cluster, costs.stack, tensors)
    tied_s = tied_bytes = 0.0
    # In a V the first and the last stage share a rank.
    if job.model.tied_embeddings and plan.stage_rank(0) != plan.stage_rank(plan.num_stages - 1):
        size = job.model.vocab * job.model.hidden / plan.tp * gradient_bytes(job.precision, costs.stack)
        if plan.zero and costs.stack.sums_tied_shards:
            size /= plan.shard_group
        ends = _pair(plan.stage_rank(0), plan.stage_rank(plan.num_stages - 1), plan, costs.cluster)
        tied_s = collective_s(costs.cluster, "all_reduce", size, ends)
        tied_bytes = wire_factor("all_reduce", 2) * size
    extremes_s, extremes_bytes = _extremes(job, plan, costs)
    sends = [_send(i, job, plan, costs) for i in range(len(stages) - 1)]
    return StepCost(
        stages=stages,
        syncs=tuple(syncs[id(stage)] for stage in stages),
        send_s=tuple(seconds for seconds, _ in sends),
        send_bytes=tuple(num_bytes for _, num_bytes in sends),
        tied_reduce_s=tied_s,
        tied_reduce_bytes=tied_bytes,
        extremes_s=extremes_s,
        extremes_bytes=extremes_bytes,
        copies_reduce=tuple(
            _copies_reduce(s, stage, job, plan, costs)
            for s, stage in enumerate(model_stages)
            if plan.chains > 1
        ),
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
    return replace(  # what is sent does not depend on who sends it
        of_stage[0],
        stages=tuple(cost.stages[s] for s, cost in enumerate(of_stage)),
        syncs=tuple(cost.syncs[s] for s, cost in enumerate(of_stage)),
        send_s=tuple(
            max(here.send_s[s], there.send_s[s]) for s, (here, there) in enumerate(pairwise(of_stage))
        ),
        tied_reduce_s=max(cost.tied_reduce_s for cost in priced.values()),
        extremes_s=max(cost.extremes_s for cost in priced.values()),
        copies_reduce=tuple(
            map(max, zip(*(cost.copies_reduce for cost in priced.values()), strict=True))
        ),
    )


def _copies_reduce(s: int, stage: StageCost, job: Job, plan: ParallelPlan, costs: CostModel) -> Traffic:
    """All-reduce of what a rank keeps of a stage's gradients with the rank that holds the stage too."""
    kept = sharded(stage, plan) if plan.zero else stage.parameters
    size = kept * gradient_bytes(job.precision, costs.stack)
    copy = plan.stage_rank(plan.model_stages + s)
    ends = _pair(plan.stage_rank(s), copy, plan, costs.cluster)
    seconds = costs.stack.dp_slowdown * collective_s(costs.cluster, "all_reduce", size, ends)
    return Traffic(seconds, wire_factor("all_reduce", 2) * size)


def _extremes(job: Job, plan: ParallelPlan, costs: CostModel) -> tuple[float, float]:
    """Seconds and sent bytes of an all-reduce of a few kilobytes over all ranks that hold a stage.

    Source: Transformer Engine, FP8GlobalStateManager.reduce_and_update_fp8_tensors, which ends the
    outermost autocast; Megatron-Core gives it the ranks of tensor, context and data parallelism.
    """
    axes = mesh_axes(plan, "tp", "cp", "dp")
    ranks = group_size(axes)
    if job.precision != "fp8" or costs.stack.fp8_scaling != "delayed" or ranks == 1:
        return 0.0, 0.0
    group = group_over(costs.cluster, axes, gpus=plan.gpus)
    waiting_s = costs.stack.collective_overhead_s * math.log2(ranks)
    seconds = collective_s(costs.cluster, "all_reduce", EXTREMES_BYTES, group) + waiting_s
    return seconds, wire_factor("all_reduce", ranks) * EXTREMES_BYTES


def _pair(one: int, other: int, plan: ParallelPlan, cluster: Cluster) -> Group:
    """Two devices that stand alike on two pipeline ranks.

    Every replica's pair is as far apart: all are local only where a domain holds both ranks whole.
    """
    stride = plan.strides.pp
    ends = min(one, other) * stride, (max(one, other) + 1) * stride - 1
    return Group(2, 2 if cluster.same_domain(*ends) else 1)


def _send(stage: int, job: Job, plan: ParallelPlan, costs: CostModel) -> tuple[float, float]:
    """Seconds and bytes from each device of a micro-batch's activations on their way to a next stage."""
    source, target = plan.stage_rank(stage), plan.stage_rank(stage + 1)
    if source == target:
        return 0.0, 0.0
    local = is_local(source, target, plan, costs)
    return send_between(cell_of(job, plan), mesh_axes(plan, "tp"), costs, local=local)


def is_local(source: int, target: int, plan: ParallelPlan, costs: CostModel) -> bool:
    """Whether transfers between two pipeline ranks stay inside a scale-up domain."""
    local = _pair(source, target, plan, costs.cluster).domains == 1
    return local and not costs.stack.pp_over_network


def send_between(
    cell: Cell, tp_axes: tuple[Axis, ...], costs: CostModel, *, local: bool
) -> tuple[float, float]:
    """Seconds and bytes from each device of a micro-batch's activations between two pipeline ranks.

    What the receivers gather among themselves takes time, and is not counted as sent.
    """
    cluster = costs.cluster
    whole = cell.tokens * costs.model.hidden * cell.activation_bytes
    cut = cell.tp if cell.sequence_parallel or costs.stack.pp_scatter_gather else 1
    seconds = send_recv_s(cluster, whole / cut, local=local)
    if cut > 1 and not cell.sequence_parallel:
        # Narayanan et al. 2021, section 4.1: each tp rank sends its part, the receivers gather them.
        group = group_over(cluster, tp_axes, gpus=cell.gpus)
        seconds += collective_s(cluster, "all_gather", whole, group)
    return seconds, whole / cut
