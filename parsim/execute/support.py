"""What the torch executor runs, and what it refuses and why.

A plan is refused where torch lacks a part of it or computes it wrong; nothing is approximated.
"""

from __future__ import annotations

from parsim.cost.compression import keeps_residual
from parsim.errors import ParsimError
from parsim.execute.request import Case
from parsim.model import ModelSpec, MoeSpec
from parsim.plan import (
    ASYNCHRONOUS_SCHEDULES,
    USUAL_PLACEMENT,
    Job,
    ParallelPlan,
    parse_compression,
    stage_layers,
)
from parsim.schedule.action import INPUT_GRAD, Schedule
from parsim.schedule.check import divisors, recompute_problems
from parsim.schedule.check_actions import check_schedule

DTYPES = ("fp64", "fp32", "bf16", "fp16")


def check_executable(job: Job, plan: ParallelPlan, schedule: Schedule, dtype: str) -> None:
    """Raise ParsimError, with the reason, for what the executor does not run."""
    if dtype not in DTYPES:
        raise ParsimError(
            "the executor does not compute in this dtype",
            where="precision",
            got=dtype,
            expected=", ".join(DTYPES),
            hint="fp8 has kernels that torch does not choose by itself",
        )
    _check_model(job.model, plan)
    _check_sizes(job, plan)
    _check_plan(plan, schedule)
    _check_schedule(job, plan, schedule)


def check_served(case: Case) -> None:
    """Raise ParsimError for what does not go with parameter servers."""
    plan = case.plan
    if plan.gpus != plan.dp or plan.zero or plan.compression != "none" or plan.dp == 1:
        raise ParsimError(
            "parameter servers have several workers, each one rank that holds the model once",
            where="--ps with PLAN",
            got=plan.short(),
            expected="dp of 2 or more, tp=1, pp=1, zero=0, compression=none",
        )
    if case.checkpoint is not None:
        raise ParsimError(
            "checkpoints do not hold the clocks of parameter servers", where="--checkpoint with --ps"
        )


def check_on_gpus(case: Case) -> None:
    """Raise ParsimError for what runs on CPU ranks alone."""
    plan = case.plan
    if case.servers is not None:
        raise ParsimError(
            "parameter servers run on CPU ranks only",
            where="--ps",
            hint="--device cpu; a server takes requests from anybody, which NCCL cannot",
        )
    if plan.schedule in ASYNCHRONOUS_SCHEDULES:
        raise ParsimError(
            "pipelines without a flush run on CPU ranks only",
            where="schedule",
            got=plan.schedule,
            hint="--device cpu; NCCL would let sends and receives of neighbours wait for each other",
        )


def check_resumable(plan: ParallelPlan) -> None:
    """Raise ParsimError for plans whose training is more than weights and optimizer states."""
    if plan.schedule in ASYNCHRONOUS_SCHEDULES:
        raise ParsimError(
            "checkpoints do not hold the micro-batches under way in a pipeline without a flush",
            where="--checkpoint",
            got=f"schedule={plan.schedule}",
            hint="schedule=1f1b ends every step with a flush",
        )
    if keeps_residual(parse_compression(plan.compression)):
        raise ParsimError(
            "checkpoints do not hold what compression still has to send",
            where="--checkpoint",
            got=f"compression={plan.compression}",
            expected="compression of none, fp16, bf16 or int8",
        )


def _refuse(part: str, where: str, got: object, hint: str | None = None) -> ParsimError:
    return ParsimError(f"the executor does not run {part}", where=where, got=got, hint=hint)


def _check_model(model: ModelSpec, plan: ParallelPlan) -> None:
    if model.moe is not None:
        _check_experts(model.moe, plan)
    elif plan.ep > 1:
        raise _refuse("expert parallelism without experts", "ep", plan.ep)
    if model.mla is not None:
        raise _refuse("multi-head latent attention", "model.mla", "MLA")
    if model.mtp_layers:
        raise _refuse("multi-token prediction", "model.mtp_layers", model.mtp_layers)
    if model.window:
        raise _refuse("sliding-window attention", "model.window", model.window)
    if model.attention_sinks:
        raise _refuse("attention sinks", "model.attention_sinks", True)
    if model.position == "alibi":
        raise _refuse("ALiBi positions", "model.position", model.position)
    if model.norms_per_layer != 2:
        raise _refuse("layers without exactly two norms", "model.norms_per_layer", model.norms_per_layer)
    if model.position == "rope" and model.head_dim % 2:
        raise _refuse("rotary positions on heads of odd width", "model.head_dim", model.head_dim)
    if model.tied_embeddings and plan.pp > 1:
        _check_tied(plan)


def _check_tied(plan: ParallelPlan) -> None:
    if plan.schedule in ASYNCHRONOUS_SCHEDULES:
        raise _refuse(
            "tied embeddings in a pipeline without a flush",
            "model.tied_embeddings",
            plan.schedule,
            "they would be two copies of different age",
        )
    if plan.stage_rank(0) == plan.stage_rank(plan.num_stages - 1):
        raise _refuse(
            "tied embeddings where one rank has the first and the last stage",
            "model.tied_embeddings",
            plan.schedule,
            "torch's stages share no parameters; other schedules have a copy on each end",
        )
    if plan.compression != "none":
        raise _refuse(
            "compressed gradients of tied embeddings in a pipeline",
            "compression",
            plan.compression,
            "what is lost differs between the copies, which would drift apart",
        )


def _check_experts(moe: MoeSpec, plan: ParallelPlan) -> None:
    if moe.router_bias:
        raise _refuse(
            "routing biases that balance the load",
            "model.moe.router_bias",
            True,
            "they are set by counts of tokens, not by gradients",
        )
    if plan.expert_tp > 1:
        raise _refuse("experts cut over tensor-parallel ranks", "expert_tp", plan.expert_tp)
    if plan.tp > 1 and not plan.sequence_parallel:
        raise _refuse(
            "experts on tensor-parallel ranks that all have the same tokens",
            "sequence_parallel",
            False,
            "with sequence_parallel=yes each routes its own",
        )
    for key, size in (
        ("experts", moe.experts),
        ("dp·cp·tp", plan.dp * plan.cp * plan.tp),
    ):
        if size % plan.ep:
            raise ParsimError(
                f"ep must divide {key}",
                where="ep",
                got=f"ep {plan.ep}, {key} {size}",
                hint=f"legal for {key}: {divisors(size)}",
            )
    if plan.compression != "none" and (plan.ep > 1 or plan.tp > 1):
        raise _refuse(
            "compressed gradients of experts that other ranks hold than the dense layers",
            "compression",
            plan.compression,
        )


def _check_sizes(job: Job, plan: ParallelPlan) -> None:
    model = job.model
    sizes = {"heads": model.heads, "kv_heads": model.kv_heads, "vocab": model.vocab}
    if not all(map(model.is_moe_layer, range(model.layers))):
        sizes["ffn_hidden"] = model.ffn_hidden
    if model.moe is not None and model.moe.shared_ffn_hidden:
        sizes["moe.shared_ffn_hidden"] = model.moe.shared_ffn_hidden
    if plan.cp > 1 and job.seq_len % (2 * plan.cp):
        raise ParsimError(
            "context parallelism cuts a causal sequence into 2·cp chunks",
            where="cp",
            got=f"cp {plan.cp}, seq_len {job.seq_len}",
            expected=f"a sequence length that is a multiple of {2 * plan.cp}",
        )
    if plan.sequence_parallel:
        sizes["seq_len / cp"] = job.seq_len // plan.cp
    if model.position == "learned":
        sizes["position_rows"] = rows = model.position_rows or model.max_seq_len
        if job.seq_len > rows:
            raise ParsimError(
                "the model has no positions for sequences this long",
                where="seq_len",
                got=job.seq_len,
                expected=f"at most {rows}",
            )
    for key, size in sizes.items():
        if size % plan.tp:
            raise ParsimError(
                f"tp must divide {key}",
                where="tp",
                got=f"tp {plan.tp}, {key} {size}",
                hint=f"legal for {key}: {divisors(size)}",
            )
    if job.global_batch % (plan.dp * plan.micro_batch):
        raise ParsimError(
            "dp·micro_batch must divide the global batch",
            where="global_batch",
            got=job.global_batch,
            expected=f"a multiple of {plan.dp * plan.micro_batch}",
        )


def _check_plan(plan: ParallelPlan, schedule: Schedule) -> None:
    if plan.schedule in ASYNCHRONOUS_SCHEDULES:
        for key in ("cp", "ep"):
            if getattr(plan, key) > 1:
                raise _refuse(f"{key} in a pipeline without a flush", key, getattr(plan, key))
    if plan.placement != USUAL_PLACEMENT:
        raise _refuse("another placement than usual", "placement", plan.placement)
    if plan.tp_overlap:
        raise _refuse("overlapped tensor parallelism", "tp_overlap", True)
    for key, usual in (("aggregation", "bucket"), ("weighted", False)):
        if getattr(plan, key) != usual:
            raise _refuse("gradients reduced in other ways than by buckets", key, getattr(plan, key))
    if plan.zero and plan.shard_group != plan.dp * plan.cp:
        raise _refuse("ZeRO in groups smaller than dp·cp", "zero_group", plan.zero_group)
    if plan.pp == 1 and plan.vpp > 1:
        raise _refuse("several model chunks without a pipeline", "vpp", plan.vpp)
    if plan.schedule in ASYNCHRONOUS_SCHEDULES and plan.compression != "none":
        raise _refuse(
            "compressed gradients in a pipeline without a flush",
            "compression",
            plan.compression,
            "what is sent later would meet other weights; schedule=1f1b takes it",
        )
    if plan.chains > 1:
        raise _refuse(
            "schedules that hold each stage on two ranks",
            "schedule",
            plan.schedule,
            "torch has no such pipeline; dualpipev overlaps as well and runs",
        )
    splits = any(a.kind == INPUT_GRAD for a in schedule.actions())
    if splits and plan.pp == 1:
        raise _refuse("split backwards without a pipeline", "schedule", plan.schedule)
    if splits and plan.zero == 3 and plan.dp * plan.cp > 1:
        raise ParsimError(
            "torch leaves gradients out under ZeRO 3 with backwards split into I and W",
            where="zero",
            got=f"zero {plan.zero}, schedule {schedule.name}",
            hint="use zero=2: parameters stay whole between forward and backward",
        )


def _check_schedule(job: Job, plan: ParallelPlan, schedule: Schedule) -> None:
    layers = stage_layers(job.model, plan)
    if sum(layers) != job.model.layers or min(layers) < 0:
        raise ParsimError(
            "the stages must hold every layer once",
            where="stage_split",
            got=f"{len(layers)} stages with {sum(layers)} layers",
            expected=f"{job.model.layers} layers",
        )
    for problem in recompute_problems(job, plan):
        raise problem
    micro_batches = plan.num_micro_batches(job) * schedule.steps
    for key, got, expected in (
        ("pipeline ranks", schedule.pp, plan.pp),
        ("stages", schedule.num_stages, plan.num_stages),
        ("micro-batches", schedule.num_micro_batches, micro_batches),
    ):
        if got != expected:
            raise ParsimError(
                f"the schedule has another number of {key} than the plan",
                where=f"schedule {schedule.name}",
                got=got,
                expected=str(expected),
            )
    check_schedule(schedule)
