"""A job and its plan as a script that starts Megatron-LM (of Megatron-Core 0.19) with its arguments.

The script is bash; every argument is quoted by shlex, and nothing of the model but its numbers is one.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from parsim.errors import ParsimError
from parsim.export.megatron_model import check_model, model_arguments, model_notes
from parsim.export.target import (
    Exported,
    nodes_of,
    one_line,
    refused,
    require_plain_reduction,
    same_ranks,
)
from parsim.plan import USUAL_PLACEMENT, Job, ParallelPlan, recomputed_layers, stage_layers
from parsim.schedule.interleaved import micro_batches_per_round
from parsim.stack import Stack

TARGET = "Megatron-LM"
PRECISIONS = ("bf16", "fp16", "fp32", "fp8", "mxfp8", "nvfp4")
PIPELINE_BEFORE_DATA = "tp-cp-pp-dp"
FP8_RECIPES = {"delayed": "delayed", "tensor": "tensorwise"}
"""By Stack.fp8_scaling."""

_SCRIPT = """\
#!/bin/bash
# {title}
# On each of {nodes} nodes, from a checkout of Megatron-LM: bash SCRIPT, with NODE_RANK (or SLURM_NODEID)
# and MASTER_ADDR set. Arguments after SCRIPT are appended and win.
set -euo pipefail
{environment}
arguments=(
{arguments}
)
exec torchrun --nnodes {nodes} --nproc-per-node {per_node} \\
  --node-rank "${{NODE_RANK:-${{SLURM_NODEID:-0}}}}" \\
  --master-addr "${{MASTER_ADDR:-localhost}}" --master-port "${{MASTER_PORT:-29500}}" \\
  pretrain_gpt.py "${{arguments[@]}}" "$@"
"""
# A later device lets more streams run side by side; on Hopper and before, one queue keeps the launch
# order of communication and the products that hide it. Its FSDP asks for the opposite.
_ONE_QUEUE = "export CUDA_DEVICE_MAX_CONNECTIONS=1\n"
_MANY_QUEUES = "unset CUDA_DEVICE_MAX_CONNECTIONS\n"

_TRAINING = (
    ("--train-iters", 100),
    ("--lr", "1e-4"),
    ("--lr-decay-style", "constant"),
    ("--mock-data",),
    ("--tokenizer-type", "NullTokenizer"),
)

Argument = Sequence[object]


def megatron_script(job: Job, plan: ParallelPlan, stack: Stack, *, devices_per_node: int) -> Exported:
    """The script, which trains on mock data until its user says otherwise.

    Raises ParsimError for what Megatron-LM would run as something else, and for ranks that do not fill
    whole nodes: Megatron-LM takes dp from the number of ranks that are started.
    """
    arguments = megatron_arguments(job, plan, stack)
    nodes, per_node = nodes_of(plan, devices_per_node)
    text = _SCRIPT.format(
        title=f"{one_line(job.model.name)} on {plan.gpus} GPUs: {one_line(plan.short())}",
        nodes=nodes,
        per_node=per_node,
        environment=_MANY_QUEUES if plan.zero >= 2 else _ONE_QUEUE,
        arguments="\n".join(f"  {shlex.join(map(str, argument))}" for argument in arguments),
    )
    return Exported(text=text, not_expressed=_not_expressed(job, plan, stack))


def megatron_arguments(job: Job, plan: ParallelPlan, stack: Stack) -> list[Argument]:
    """The arguments of pretrain_gpt.py, each with its values.

    Raises ParsimError for what Megatron-LM would run as something else.
    """
    check_model(job)
    for problem in _problems(job, plan, stack):
        raise problem
    require_plain_reduction(TARGET, plan)
    return [
        *model_arguments(job),
        *_parallel(job, plan),
        *_pipeline(job, plan),
        *_data_parallel(plan, stack),
        *_precision(job, plan, stack),
        *_recompute(job, plan),
        ("--micro-batch-size", plan.micro_batch),
        ("--global-batch-size", job.global_batch),
        ("--optimizer", "sgd" if job.optimizer == "sgd" else "adam"),
        *(() if stack.dropout else (("--attention-dropout", 0.0), ("--hidden-dropout", 0.0))),
        *_TRAINING,
    ]


def _parallel(job: Job, plan: ParallelPlan) -> Iterator[Argument]:
    yield "--tensor-model-parallel-size", plan.tp
    yield "--pipeline-model-parallel-size", plan.pp
    yield "--context-parallel-size", plan.cp
    if plan.sequence_parallel:
        yield ("--sequence-parallel",)
    if plan.tp_overlap:
        yield ("--tp-comm-overlap",)
    if job.model.moe is not None:
        yield "--expert-model-parallel-size", plan.ep
        yield "--expert-tensor-parallel-size", plan.expert_tp
        yield "--moe-token-dispatcher-type", "alltoall"
    if not same_ranks(plan, USUAL_PLACEMENT):
        yield ("--use-tp-pp-dp-mapping",)


def _pipeline(job: Job, plan: ParallelPlan) -> Iterator[Argument]:
    if plan.pp == 1:
        return
    layers = stage_layers(job.model, plan)
    if len(set(layers)) > 1 or job.model.mtp_layers:
        yield "--pipeline-model-parallel-layout", _layout(layers, job.model.mtp_layers)
    elif plan.vpp > 1:
        yield "--num-virtual-stages-per-pipeline-rank", plan.vpp
    if plan.vpp > 1:
        per_round = micro_batches_per_round(plan.pp, plan.num_micro_batches(job))
        if per_round != plan.pp:
            yield "--microbatch-group-size-per-virtual-pipeline-stage", per_round


def _layout(layers: Sequence[int], mtp_layers: int) -> str:
    """Stages in Megatron's letters: E embedding, t layer, m multi-token prediction, L loss.

    >>> _layout((3, 4, 0), 1)
    'Et*3|t*4|mL'
    """
    stages = [f"t*{count}" if count else "" for count in layers]
    stages[0] = "E" + stages[0]
    stages[-1] += "m" * mtp_layers + "L"
    return "|".join(stages)


def _data_parallel(plan: ParallelPlan, stack: Stack) -> Iterator[Argument]:
    if plan.zero >= 1:
        yield ("--use-distributed-optimizer",)
        copies = plan.dp * plan.cp // plan.shard_group
        if copies > 1:
            yield "--num-distributed-optimizer-instances", copies
    if plan.zero >= 2:
        yield ("--use-megatron-fsdp",)
        strategy = "optim_grads" if plan.zero == 2 else "optim_grads_params"
        yield "--data-parallel-sharding-strategy", strategy
        yield "--ckpt-format", "fsdp_dtensor"
    if stack.dp_overlap:
        yield ("--overlap-grad-reduce",)
        if plan.zero >= 1:
            yield ("--overlap-param-gather",)


def _precision(job: Job, plan: ParallelPlan, stack: Stack) -> Iterator[Argument]:
    if job.precision == "fp32":
        return
    yield ("--fp16" if job.precision == "fp16" else "--bf16",)
    if job.precision == "fp8":
        yield "--fp8-format", "hybrid"
        yield "--fp8-recipe", FP8_RECIPES[stack.fp8_scaling]
    elif job.precision == "mxfp8":
        yield "--fp8-format", "e4m3"
        yield "--fp8-recipe", "mxfp8"
    elif job.precision == "nvfp4":
        yield "--fp4-format", "e2m1"
        yield "--fp4-recipe", "nvfp4"
    if job.precision in ("fp8", "mxfp8") and stack.fp8_gather and plan.zero >= 1:
        yield ("--fp8-param-gather",)
    if job.precision != "fp16" and stack.gradient_dtype in ("bf16", "same"):
        yield ("--grad-reduce-in-bf16",)


def _recompute(job: Job, plan: ParallelPlan) -> Iterator[Argument]:
    again = recomputed_layers(job.model, plan)
    if not any(again):
        return
    yield "--recompute-granularity", plan.recompute
    if plan.recompute == "full":
        every = sum(again) == job.model.layers + job.model.mtp_layers
        yield "--recompute-method", "uniform" if every else "block"
        yield "--recompute-num-layers", 1 if every else max(again)


def _problems(job: Job, plan: ParallelPlan, stack: Stack) -> Iterator[ParsimError]:
    """What Megatron-LM would run as something else."""
    if job.precision not in PRECISIONS:
        yield refused(TARGET, "this precision", where="precision", got=job.precision,
                      expected=", ".join(PRECISIONS))  # fmt: skip
    if job.precision == "fp8" and stack.fp8_scaling not in FP8_RECIPES:
        yield refused(TARGET, "fp8 with a scale a row", where="stack.fp8_scaling", got=stack.fp8_scaling,
                      expected=", ".join(FP8_RECIPES), hint="--stack megatron-core-2025")  # fmt: skip
    if not any(same_ranks(plan, order) for order in (USUAL_PLACEMENT, PIPELINE_BEFORE_DATA)):
        yield refused(TARGET, "this order of mesh dimensions", where="placement", got=plan.placement,
                      expected=f"{USUAL_PLACEMENT} or {PIPELINE_BEFORE_DATA}")  # fmt: skip
    if plan.tp_overlap and not plan.sequence_parallel:
        yield refused(TARGET, "tp_overlap without sequence parallelism", where="sequence_parallel",
                      got=False, expected="sequence_parallel=true")  # fmt: skip
    yield from _schedule_problems(job, plan)
    yield from _recompute_problems(job, plan)


def _schedule_problems(job: Job, plan: ParallelPlan) -> Iterator[ParsimError]:
    if plan.pp == 1:
        return
    if plan.schedule not in ("1f1b", "interleaved"):
        yield refused(TARGET, "this schedule", where="schedule", got=plan.schedule,
                      expected="1f1b, or interleaved with vpp of 2 or more")  # fmt: skip
    if plan.vpp > 1 and plan.num_micro_batches(job) < plan.pp:
        yield refused(TARGET, "chunks with fewer micro-batches than pipeline ranks",
                      where="global_batch", got=f"{plan.num_micro_batches(job)} micro-batches",
                      expected=f"at least {plan.pp}")  # fmt: skip
    if plan.zero >= 2:
        yield refused(
            TARGET, "its FSDP in a pipeline", where="zero", got=f"zero {plan.zero}, pp {plan.pp}",
            expected="zero of 0 or 1, or pp=1",
        )  # fmt: skip


def _recompute_problems(job: Job, plan: ParallelPlan) -> Iterator[ParsimError]:
    """Only the first n layers of every stage, with one n, can be recomputed."""
    again, layers = recomputed_layers(job.model, plan), stage_layers(job.model, plan)
    total = job.model.layers + job.model.mtp_layers
    if sum(again) in (0, total):
        return
    if plan.recompute == "selective":
        yield refused(
            TARGET, "selective recomputation of some layers only", where="recompute_layers",
            got=f"{sum(again)} of {total}", expected="all layers, or recompute=full",
        )  # fmt: skip
    elif job.model.mtp_layers or again != tuple(min(max(again), count) for count in layers):
        yield refused(
            TARGET, "another number of recomputed layers in each stage", where="recompute_layers",
            got="-".join(map(str, again)), expected="one number for all stages",
        )  # fmt: skip


def _not_expressed(job: Job, plan: ParallelPlan, stack: Stack) -> tuple[str, ...]:
    """What differs from the prediction all the same, or has to be told elsewhere."""
    said = ["learning rate, data set and tokenizer: mock data and a null tokenizer stand in the script"]
    said += model_notes(job, plan)
    if plan.recompute == "selective" and stack.selective_recompute != "attention_core":
        said.append("recompute=selective: Megatron-LM recomputes attention alone")
    if job.model.moe is not None and stack.moe_dispatch == "deduplicated":
        said.append("dispatch of tokens: the prediction's deduplicated one is "
                    "--moe-token-dispatcher-type flex, which needs DeepEP installed")  # fmt: skip
    if plan.pp > 1 and not stack.pp_overlap:
        said.append("pipeline transfers: the prediction waits for each, Megatron-LM overlaps those of "
                    "interleaved schedules")  # fmt: skip
    if not stack.name.startswith(("megatron", "nemo")):
        said.append(f"the prediction is for stack {one_line(stack.name)}; --stack megatron-core-2025 "
                    "predicts this one")  # fmt: skip
    return tuple(said)
