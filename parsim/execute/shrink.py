"""A job and a plan of the same structure, small enough to be verified on a small machine."""

from __future__ import annotations

import dataclasses

from parsim.model import ModelSpec, MoeSpec
from parsim.plan import Job, ParallelPlan

HEAD_DIM = 8
TOKENS = 16
"""Of a sequence, for each rank that may share it."""


def shrunken(job: Job, plan: ParallelPlan) -> Job:
    """A job with the same structure, small enough to verify: fewer layers, narrower, shorter.

    The plan runs it as it runs the original: the same divisions and remainders, the same number of
    micro-batches and the same kinds of layers.
    """
    model = job.model
    kv_heads = plan.tp * min(model.kv_heads // plan.tp, 2)
    heads = kv_heads * min(model.heads // model.kv_heads, 2)
    head_dim = min(model.head_dim, HEAD_DIM)
    as_wide = model.heads * model.head_dim == model.hidden
    moe = None if model.moe is None else _fewer_experts(model.moe, plan)
    layers = model.layers
    if not (plan.stage_split or plan.recompute_layers):
        if moe is not None:
            moe = dataclasses.replace(moe, dense_layers=min(moe.dense_layers, 1))
        layers = _fewer_layers(model, moe, plan.num_stages)
    seq_len = min(job.seq_len, TOKENS * plan.tp * plan.cp)
    small = dataclasses.replace(
        model,
        layers=layers,
        hidden=heads * head_dim * (1 if as_wide else 2),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_hidden=plan.tp * 24,
        vocab=plan.tp * 48,
        max_seq_len=seq_len,
        position_rows=0,
        moe=moe,
    )
    return dataclasses.replace(job, model=small, seq_len=seq_len)


def _fewer_experts(moe: MoeSpec, plan: ParallelPlan) -> MoeSpec:
    experts = plan.ep * min(moe.experts // plan.ep, 2)
    return dataclasses.replace(
        moe,
        experts=experts,
        top_k=min(moe.top_k, 2, experts),
        ffn_hidden=24,
        shared_ffn_hidden=plan.tp * 16 if moe.shared_ffn_hidden else 0,
    )


def _fewer_layers(model: ModelSpec, moe: MoeSpec | None, stages: int) -> int:
    """The fewest with a layer on each stage, two in all, the same remainder, and one of each kind."""
    fewest = max(stages, 2, moe.dense_layers + moe.every if moe is not None else 0)
    return min(model.layers, fewest + (model.layers - fewest) % stages)


def fewer_replicas(job: Job, plan: ParallelPlan, ranks: int) -> tuple[Job, ParallelPlan]:
    """Plan and job with no more than so many ranks, where fewer data-parallel replicas are enough.

    At least two are left of several, and as many as expert parallelism spans; each runs its
    micro-batches as before.
    """
    if plan.gpus <= ranks:
        return job, plan
    legal = (
        dp
        for dp in range(2, plan.dp)
        if plan.dp % dp == 0 and dp * plan.cp * plan.tp % plan.expert_ranks == 0
    )
    dp = next(legal, plan.dp)
    # A group of shards that spanned all replicas spans all that are left.
    group = 0 if plan.zero_group >= dp * plan.cp else plan.zero_group
    batch = job.global_batch // plan.dp * dp
    return (
        dataclasses.replace(job, global_batch=batch),
        dataclasses.replace(plan, dp=dp, zero_group=group),
    )
