"""What is wrong with a plan or a schedule, each problem with a hint."""

from __future__ import annotations

import math
from collections.abc import Iterator

from parsim.cost.sync import replica_axes, shard_ranks
from parsim.errors import ParsimError
from parsim.hardware import Cluster, peak_flops_per_s
from parsim.mesh import group_size, mesh_axes, part_of
from parsim.plan import (
    ASYNCHRONOUS_SCHEDULES,
    USUAL_PLACEMENT,
    V_SHAPED_SCHEDULES,
    Job,
    ParallelPlan,
    stage_layers,
)
from parsim.schedule import (
    ONE_CHUNK_SCHEDULES,
    SCHEDULES,
    SPLIT_SCHEDULES,
    check_micro_batches,
    unknown_schedule,
)
from parsim.stack import Stack


def check_plan(job: Job, plan: ParallelPlan, cluster: Cluster) -> None:
    """Raises the first problem of a plan, as ParsimError; does nothing for a legal one."""
    for problem in plan_problems(job, plan, cluster):
        raise problem


def plan_problems(job: Job, plan: ParallelPlan, cluster: Cluster) -> Iterator[ParsimError]:
    """Everything that makes a plan illegal for a job; whether it fits in memory is another question."""
    peak_flops_per_s(cluster.device, job.precision)
    yield from batch_problems(job, plan)
    yield from tensor_problems(job, plan)
    yield from pipeline_problems(job, plan)
    yield from group_problems(job, plan)
    yield from _reduction_problems(plan)
    if plan.placement != USUAL_PLACEMENT:
        yield from placement_problems(plan, cluster)


def stack_problems(job: Job, plan: ParallelPlan, stack: Stack) -> Iterator[ParsimError]:
    """What the training software does not run of a plan that is legal."""
    if plan.schedule in stack.lacks_schedules:
        others = [name for name in V_SHAPED_SCHEDULES if name not in stack.lacks_schedules]
        yield ParsimError(
            f"{stack.name} does not run {plan.schedule}",
            where="schedule",
            got=plan.schedule,
            hint=f"{others[-1]} runs, and other stacks have it" if others else None,
        )
    sharded = plan.zero == 3 and plan.dp * plan.cp > 1
    if sharded and plan.schedule in SPLIT_SCHEDULES and not stack.zero3_splits_backward:
        yield ParsimError(
            f"{stack.name} does not split backwards under ZeRO 3",
            where="zero",
            got=f"zero {plan.zero}, schedule {plan.schedule}",
            hint="zero=2: parameters stay whole between forward and backward",
        )
    ends_meet = plan.pp > 1 and plan.stage_rank(0) == plan.stage_rank(plan.num_stages - 1)
    if job.model.tied_embeddings and ends_meet and not stack.ties_on_one_rank:
        yield ParsimError(
            f"{stack.name} does not tie embeddings on two stages of one rank",
            where="schedule",
            got=plan.schedule,
            hint="schedules that are not V-shaped have the first and the last stage on different ranks",
        )


def divisors(n: int) -> list[int]:
    """All divisors of n, in order.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def batch_problems(job: Job, plan: ParallelPlan) -> Iterator[ParsimError]:
    """The global batch is a whole number of micro-batches on every replica."""
    if job.global_batch % (plan.dp * plan.micro_batch):
        yield ParsimError(
            "dp·micro_batch does not divide the global batch",
            where="micro_batch",
            got=f"global_batch {job.global_batch}, dp {plan.dp}, micro_batch {plan.micro_batch}",
            expected=f"a global batch that is a multiple of {plan.dp * plan.micro_batch}",
            hint=f"dp·micro_batch may be {_listed(divisors(job.global_batch))}",
        )


def tensor_problems(job: Job, plan: ParallelPlan) -> Iterator[ParsimError]:
    """Heads, feed-forward and sequence can be cut into tp parts."""
    model = job.model
    for what, size in (("query heads", model.heads), ("KV heads", model.kv_heads)):
        if size % plan.tp:
            yield ParsimError(
                f"tp does not divide the {what}",
                where="tp",
                got=plan.tp,
                expected=f"a divisor of the {size} {what} of {model.name}",
                hint=f"legal: {_listed(divisors(model.kv_heads))}",
            )
            return
    if model.ffn_hidden % plan.tp:
        yield ParsimError(
            "tp does not divide the feed-forward's width",
            where="tp",
            got=plan.tp,
            expected=f"a divisor of ffn_hidden {model.ffn_hidden}",
        )
    if plan.sequence_parallel and plan.tp == 1:
        yield ParsimError(
            "sequence parallelism shares the norms of a tensor-parallel group",
            where="sequence_parallel",
            got="tp=1",
            expected="tp of 2 or more",
        )
    if plan.sequence_parallel and (job.seq_len // plan.cp) % plan.tp:
        yield ParsimError(
            "sequence parallelism needs a sequence that tp divides",
            where="seq_len",
            got=f"seq_len {job.seq_len}, cp {plan.cp}, tp {plan.tp}",
        )


def pipeline_problems(job: Job, plan: ParallelPlan) -> Iterator[ParsimError]:
    """The schedule is known, and takes the plan's ranks, chunks, stages and micro-batches."""
    if plan.schedule not in SCHEDULES:
        yield unknown_schedule(plan.schedule)
        return
    yield from _chunk_problems(plan)
    yield from _split_problems(job, plan)
    if plan.pp > 1 or plan.schedule in ASYNCHRONOUS_SCHEDULES:
        try:
            check_micro_batches(plan, max(1, plan.num_micro_batches(job)))
        except ParsimError as problem:
            yield problem
    if plan.schedule in ASYNCHRONOUS_SCHEDULES and job.model.tied_embeddings:
        yield ParsimError(
            "tied embeddings are two copies of different age in a pipeline without a flush",
            where="model.tied_embeddings",
            got=plan.schedule,
            hint="schedules with a flush keep them alike",
        )


def _chunk_problems(plan: ParallelPlan) -> Iterator[ParsimError]:
    if plan.schedule in ("interleaved", "interleaved-zb") and plan.vpp == 1:
        whole, one = ("1F1B", "1f1b") if plan.schedule == "interleaved" else ("zero bubble", "zb-h1")
        yield ParsimError(
            f"interleaved {whole} needs more than one chunk a rank",
            where="vpp",
            got=1,
            expected="vpp of 2 or more",
            hint=f"schedule={one} is the same with one chunk",
        )
    elif plan.schedule in V_SHAPED_SCHEDULES and plan.vpp != 2:
        yield ParsimError(
            "a V-shaped schedule has two chunks a rank",
            where="vpp",
            got=plan.vpp,
            expected="vpp=2",
            hint="leave vpp out: it is 2 for this schedule",
        )
    elif plan.schedule in ONE_CHUNK_SCHEDULES and plan.vpp > 1:
        several = "interleaved-zb" if plan.schedule in SPLIT_SCHEDULES else "interleaved"
        yield ParsimError(
            f"{plan.schedule} has one chunk a rank",
            where="vpp",
            got=plan.vpp,
            expected="vpp=1",
            hint=f"schedule={several} runs several",
        )
    if plan.vpp > 1 and plan.pp == 1:
        yield ParsimError("chunks need a pipeline", where="vpp", got="pp=1", expected="pp of 2 or more")


def _split_problems(job: Job, plan: ParallelPlan) -> Iterator[ParsimError]:
    """Every stage has work: a layer, the embedding or the head."""
    layers = job.model.layers
    # A million stages are not written down to see that there are too many.
    too_many = not plan.stage_split and plan.model_stages > layers + 2
    split = () if too_many else stage_layers(job.model, plan)
    if sum(split) != layers and not too_many:
        yield ParsimError(
            "stage_split does not add up to the layers of the model",
            where="stage_split",
            got=sum(split),
            expected=f"{layers}, the layers of {job.model.name}",
        )
    elif too_many or min(split) < 0 or (len(split) > 2 and min(split[1:-1]) < 1):
        yield ParsimError(
            "there are more stages than layers",
            where="pp·vpp",
            got=plan.model_stages,
            expected=f"at most {layers}, or {layers + 2} with embedding and head alone at the ends",
        )
    else:
        yield from recompute_problems(job, plan)


def recompute_problems(job: Job, plan: ParallelPlan) -> Iterator[ParsimError]:
    """No stage recomputes more layers than it has."""
    *others, last = stage_layers(job.model, plan)
    whole = *others, last + job.model.mtp_layers
    for stage, (again, layers) in enumerate(zip(plan.recompute_layers, whole, strict=False)):
        if again > layers:
            yield ParsimError(
                "a stage recomputes more layers than it has",
                where="recompute_layers",
                got=f"{again} on stage {stage}",
                expected=f"at most {'-'.join(map(str, whole))}",
            )
            return


def group_problems(job: Job, plan: ParallelPlan) -> Iterator[ParsimError]:
    """Context, expert and shard groups are whole parts of what they regroup."""
    moe = job.model.moe
    if plan.cp > 1 and job.seq_len % (2 * plan.cp):
        yield ParsimError(
            "context parallelism cuts a causal sequence into 2·cp chunks",
            where="cp",
            got=f"cp {plan.cp}, seq_len {job.seq_len}",
            expected=f"a sequence length that is a multiple of {2 * plan.cp}",
        )
    if plan.ep > 1 and moe is None:
        yield ParsimError(
            "a dense model has no experts to share", where="ep", got=plan.ep, expected="ep=1"
        )
    if moe is not None and moe.experts % plan.ep:
        yield ParsimError(
            "ep does not divide the experts",
            where="ep",
            got=plan.ep,
            expected=f"a divisor of the {moe.experts} experts of {job.model.name}",
            hint=f"legal: {_listed(divisors(moe.experts))}",
        )
    ranks = plan.dp * plan.cp * plan.tp
    if plan.expert_tp not in (1, plan.tp):
        yield ParsimError(
            "an expert is whole on a rank, or cut as the dense layers are",
            where="expert_tp",
            got=plan.expert_tp,
            expected=f"1 or tp = {plan.tp}",
        )
    if ranks % plan.expert_ranks:
        yield ParsimError(
            "ep·expert_tp regroups the dp·cp·tp ranks of a stage",
            where="ep",
            got=plan.expert_ranks,
            expected=f"a divisor of dp·cp·tp = {ranks}",
        )
    if moe is not None and plan.tp > 1 and not plan.sequence_parallel:
        yield ParsimError(
            "experts with tensor parallelism need sequence parallelism", where="sequence_parallel"
        )
    if plan.zero_group and (plan.zero == 0 or plan.dp * plan.cp % plan.zero_group):
        yield ParsimError(
            "zero_group shares ZeRO's shards among some of the dp·cp ranks",
            where="zero_group",
            got=f"zero {plan.zero}, zero_group {plan.zero_group}",
            expected=f"zero of 1 or more, and a divisor of dp·cp = {plan.dp * plan.cp}",
        )


def placement_problems(plan: ParallelPlan, cluster: Cluster) -> Iterator[ParsimError]:
    """Where dimensions lie in another order than usual, scale-up domains hold them in whole blocks."""
    domain, block = cluster.scale_up_domain, 1

    def torn(block: int, what: str) -> ParsimError:
        return ParsimError(
            "this placement tears blocks of ranks over scale-up domains",
            where="placement",
            got=f"blocks of {block} ranks {what}, {domain} devices a domain",
            expected="blocks that divide a domain, or that it divides",
            hint=f"the usual placement is {USUAL_PLACEMENT}",
        )

    for dimension in plan.placement.split("-"):
        block *= getattr(plan, dimension)
        if domain % block and block % domain:
            yield torn(block, f"up to {dimension}")
            return
    try:
        experts = part_of(mesh_axes(plan, "tp", "cp", "dp"), size=plan.ep, skip=plan.expert_tp)
        for axes in replica_axes(plan):
            shards = shard_ranks(axes, plan)
            part_of(axes, size=shards)
            part_of(axes, size=group_size(axes) // shards, skip=shards)
    except ParsimError as problem:
        yield problem
        return
    for axis in experts:
        block = axis.size * axis.stride
        if domain % block and block % domain:
            yield torn(block, "that share experts")
            return


def _reduction_problems(plan: ParallelPlan) -> Iterator[ParsimError]:
    """Settings of the sum of gradients over replicas."""
    if plan.zero and plan.compression != "none":
        yield ParsimError(
            "compression replaces the all-reduce of whole gradients, which ZeRO does not have",
            where="compression",
            got=f"{plan.compression} with zero {plan.zero}",
            expected="zero 0",
            hint="frameworks hook compression into replicated data parallelism alone: use zero=0",
        )
    if plan.zero and plan.aggregation != "bucket":
        yield ParsimError(
            "ZeRO shards gradients in flat buckets",
            where="aggregation",
            got=f"{plan.aggregation} with zero {plan.zero}",
            expected="aggregation=bucket",
            hint="zero=3 reduces them layer by layer in any case",
        )
    if plan.dp * plan.cp == 1:
        for key, idle in (("compression", "none"), ("weighted", False), ("aggregation", "bucket")):
            if getattr(plan, key) != idle:
                yield ParsimError(
                    "a single replica reduces no gradients",
                    where=key,
                    got=f"{str(getattr(plan, key)).lower()} with dp·cp = 1",
                    hint=f"leave {key} out, or use dp of 2 or more",
                )
