"""Random legal plans of small models, for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from parsim.cost.stage import CostModel
from parsim.model import ModelSpec, MoeSpec
from parsim.plan import (
    AGGREGATIONS,
    V_SHAPED_SCHEDULES,
    Job,
    ParallelPlan,
    Recompute,
    stage_layers,
)
from parsim.schedule import ONE_CHUNK_SCHEDULES, OVERLAPPED_SCHEDULES, SYNCHRONOUS_SCHEDULES
from parsim.schedule.check import plan_problems
from parsim.simulate.uneven import Straggler
from parsim.stack import Stack
from tests.builders import plain_stack, round_cluster, small_model

Case = tuple[Job, ParallelPlan, CostModel]

COMPRESSED = ("none", "none", "none", "bf16", "int8", "topk-1", "powersgd-2")
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")


@st.composite
def models(draw: st.DrawFn) -> ModelSpec:
    """Dense or with experts in some of the layers; embeddings tied or not."""
    moe = None
    if draw(st.booleans()):
        moe = MoeSpec(
            experts=4,
            top_k=2,
            ffn_hidden=256,
            shared_ffn_hidden=draw(st.sampled_from([0, 256])),
            dense_layers=draw(st.sampled_from([0, 1])),
            every=draw(st.sampled_from([1, 2])),
        )
    return small_model(
        layers=draw(st.sampled_from([8, 14])), tied_embeddings=draw(st.booleans()), moe=moe
    )


@st.composite
def stacks(draw: st.DrawFn) -> Stack:
    """Everything switched on or off."""
    return plain_stack(
        attention=draw(st.sampled_from(["flash", "fused_softmax"])),
        dropout=draw(st.booleans()),
        selective_recompute=draw(st.sampled_from(["attention_core", "every_other_gemm"])),
        layer_host_s=draw(st.sampled_from([0.0, 1e-4])),
        action_host_s=draw(st.sampled_from([0.0, 1e-4])),
        step_overhead_s=draw(st.sampled_from([0.0, 1e-3])),
        collective_overhead_s=draw(st.sampled_from([0.0, 1e-5])),
        tp_async_backward=draw(st.booleans()),
        recompute_stops_early=draw(st.booleans()),
        allocator_slack=draw(st.sampled_from([0.0, 0.25])),
        dp_overlap=draw(st.booleans()),
        dp_overlap_cost=draw(st.sampled_from([0.0, 0.5])),
        dp_bucket_parameters=draw(st.sampled_from([1e5, 1e6, 1e9])),
        zero_broadcast_s=draw(st.sampled_from([0.0, 1e-4])),
        fsdp_prefetch=draw(st.sampled_from([0, 1, 2])),
        zero_prefetch=draw(st.sampled_from([None, 0, 1])),
        moe_dispatch=draw(st.sampled_from(["all_to_all", "deduplicated"])),
        ep_overlap=draw(st.sampled_from(["never", "network"])),
        pair_overlap=draw(st.booleans()),
        pp_overlap=draw(st.booleans()),
        pp_scatter_gather=draw(st.booleans()),
    )


@st.composite
def recomputed(
    draw: st.DrawFn, model: ModelSpec, stages: int, split: tuple[int, ...]
) -> tuple[Recompute, tuple[int, ...]]:
    """How layers are recomputed, and of each stage how many; none: all of them."""
    recompute = draw(st.sampled_from(RECOMPUTE))
    if recompute == "none" or not draw(st.booleans()):
        return recompute, ()
    each = stage_layers(model, ParallelPlan(pp=stages, stage_split=split))
    return recompute, tuple(draw(st.integers(0, max(0, layers))) for layers in each)


@st.composite
def plans(draw: st.DrawFn, model: ModelSpec) -> ParallelPlan:
    """Any split, schedule and sharding."""
    dp, tp = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    pp, cp = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([1, 1, 2]))
    schedule, vpp = draw(schedules(pp))
    stages = pp if schedule == "dualpipe" else pp * vpp
    zero = draw(st.integers(0, 3))
    groups = [g for g in range(1, dp * cp + 1) if dp * cp % g == 0]
    eps = [ep for ep in (1, 2, 4) if model.moe and dp * cp * tp % ep == 0]
    split = draw(stage_splits(model.layers, stages)) if draw(st.booleans()) else ()
    recompute, counts = draw(recomputed(model, stages, split))
    return ParallelPlan(
        dp=dp,
        tp=tp,
        pp=pp,
        cp=cp,
        ep=draw(st.sampled_from(eps or [1])),
        vpp=vpp,
        micro_batch=draw(st.sampled_from([1, 2])),
        schedule=schedule,
        zero=zero,
        zero_group=draw(st.sampled_from([0, *groups])) if zero else 0,
        sequence_parallel=tp > 1 and (model.moe is not None or draw(st.booleans())),
        recompute=recompute,
        recompute_layers=counts,
        aggregation=draw(st.sampled_from(AGGREGATIONS)) if dp * cp > 1 and not zero else "bucket",
        weighted=dp * cp > 1 and draw(st.booleans()),
        compression=draw(st.sampled_from(COMPRESSED)) if dp * cp > 1 and not zero else "none",
        tp_overlap=tp > 1 and draw(st.booleans()),
        stage_split=split,
    )


@st.composite
def schedules(draw: st.DrawFn, pp: int) -> tuple[str, int]:
    """Any schedule on so many ranks, with chunks that it takes."""
    schedule = draw(
        st.sampled_from([s for s in SYNCHRONOUS_SCHEDULES if pp > 1 or s in ONE_CHUNK_SCHEDULES])
    )
    if schedule in ONE_CHUNK_SCHEDULES:
        return schedule, 1
    if schedule in V_SHAPED_SCHEDULES:
        return schedule, 2
    return schedule, draw(st.sampled_from([2, 3]))


@st.composite
def stage_splits(draw: st.DrawFn, layers: int, stages: int) -> tuple[int, ...]:
    """Layers dealt out at random; only the first and the last stage may have none."""
    split = [0, *[1] * (stages - 2), 0][:stages]
    free = max(0, layers - sum(split))
    for stage in draw(st.lists(st.integers(0, stages - 1), min_size=free, max_size=free)):
        split[stage] += 1
    return tuple(split)


@st.composite
def stragglers(draw: st.DrawFn, gpus: int) -> tuple[Straggler, ...]:
    """A few slow devices."""
    slow = st.sampled_from([1.0, 1.1, 1.5, 3.0])
    rank = st.integers(0, gpus - 1)
    return tuple(draw(st.lists(st.builds(Straggler, rank, slow, slow), min_size=1, max_size=4)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A plan of a small model, on a cluster of round numbers under some stack."""
    model = draw(models())
    plan = draw(plans(model))
    # Interleaving runs in equal rounds: so many, of pp micro-batches or more. DualPipe(V) runs 2·pp or
    # more, half of them in each direction.
    rounds, more = draw(st.integers(1, 3)), draw(st.integers(0, plan.pp - 1))
    num_micro_batches = rounds * (plan.pp + more)
    if plan.schedule in OVERLAPPED_SCHEDULES:
        num_micro_batches *= 2
    global_batch = num_micro_batches * plan.dp * plan.micro_batch
    job = Job(model=model, seq_len=256, global_batch=global_batch)
    return job, plan, CostModel(model, round_cluster(), draw(stacks()))


def legal(case: Case) -> bool:
    job, plan, costs = case
    return next(plan_problems(job, plan, costs.cluster), None) is None


CASES = cases().filter(legal)
"""(job, legal plan, costs)."""
