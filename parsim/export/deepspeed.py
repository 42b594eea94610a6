"""A job and its plan as a DeepSpeed (0.19) configuration: JSON for `--deepspeed_config`.

The configuration holds batch, precision, ZeRO, and tensor and expert parallelism of models that
DeepSpeed cuts itself. Model and pipeline are Python of the user: what they have to do is listed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from parsim.config import dump_json
from parsim.errors import ParsimError
from parsim.export.target import (
    Exported,
    nodes_of,
    one_line,
    refused,
    require_plain_reduction,
    same_ranks,
)
from parsim.plan import USUAL_PLACEMENT, Job, ParallelPlan, recompute_text, stage_layers
from parsim.stack import Stack

TARGET = "DeepSpeed"
PRECISIONS = ("bf16", "fp16", "fp32")
COMMUNICATION = ("fp16", "bf16")
"""Compressions that DeepSpeed has as a dtype of communication."""


def deepspeed_config(job: Job, plan: ParallelPlan, stack: Stack, *, devices_per_node: int) -> Exported:
    """The JSON text.

    Raises ParsimError for what DeepSpeed would run as something else.
    """
    for problem in _problems(job, plan):
        raise problem
    require_plain_reduction(TARGET, plan, compressions=COMMUNICATION)
    config: dict[str, Any] = {
        "train_batch_size": job.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.num_micro_batches(job),
        "optimizer": {"type": "SGD" if job.optimizer == "sgd" else "AdamW", "params": {"lr": 1e-4}},
        "gradient_clipping": 1.0,
        "zero_optimization": _zero(plan, stack),
        "zero_allow_untested_optimizer": job.optimizer == "sgd" and plan.zero > 0,
    }
    if job.precision in ("bf16", "fp16"):
        config[job.precision] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": _gradient_dtype(job, stack)}
    if plan.compression in COMMUNICATION:
        config["communication_data_type"] = plan.compression
    if plan.tp > 1 and plan.pp == 1:
        config["tensor_parallel"] = {"autotp_size": plan.tp, "tp_overlap_comm": plan.tp_overlap}
    if plan.ep > 1 and plan.pp == 1:
        config["expert_parallel"] = {
            "enabled": True,
            "autoep_size": plan.ep,
            "expert_tensor_parallel_size": plan.expert_tp,
        }
    if plan.pp > 1:
        config["pipeline"] = {
            "stages": plan.pp,
            "activation_checkpoint_interval": 1 if plan.recompute == "full" else 0,
        }
    return Exported(
        text=dump_json(config), not_expressed=tuple(_not_expressed(job, plan, stack, devices_per_node))
    )


def _zero(plan: ParallelPlan, stack: Stack) -> dict[str, Any]:
    bucket = int(stack.dp_bucket_parameters)
    return {
        "stage": plan.zero,
        "overlap_comm": stack.dp_overlap,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }


def _gradient_dtype(job: Job, stack: Stack) -> str:
    """Stack.gradient_dtype in DeepSpeed's words."""
    if stack.gradient_dtype == "fp32_for_bf16":
        return "fp32" if job.precision == "bf16" else job.precision
    return job.precision if stack.gradient_dtype == "same" else stack.gradient_dtype


def _problems(job: Job, plan: ParallelPlan) -> Iterator[ParsimError]:
    if job.precision not in PRECISIONS:
        yield refused(TARGET, "this precision", where="precision", got=job.precision,
                      expected=", ".join(PRECISIONS))  # fmt: skip
    if plan.cp > 1:
        yield refused(TARGET, "context parallelism of rings", where="cp", got=plan.cp, expected="cp=1",
                      hint="its Ulysses exchanges heads instead")  # fmt: skip
    if plan.tp > 1 and plan.sequence_parallel:
        yield refused(
            TARGET, "sequence parallelism beside tensor parallelism", where="sequence_parallel",
            got=True, expected="sequence_parallel=false",
        )  # fmt: skip
    if plan.zero and plan.shard_group != plan.dp:
        yield refused(TARGET, "ZeRO in groups smaller than dp", where="zero_group", got=plan.zero_group,
                      expected=f"all dp = {plan.dp} ranks")  # fmt: skip
    if not same_ranks(plan, USUAL_PLACEMENT):
        yield refused(TARGET, "this order of mesh dimensions", where="placement", got=plan.placement,
                      expected=USUAL_PLACEMENT)  # fmt: skip
    if plan.pp > 1:
        yield from _pipeline_problems(job, plan)


def _pipeline_problems(job: Job, plan: ParallelPlan) -> Iterator[ParsimError]:
    if plan.schedule != "1f1b":
        yield refused(TARGET, "this schedule", where="schedule", got=plan.schedule, expected="1f1b")
    if plan.zero >= 2:
        yield refused(TARGET, "ZeRO 2 or 3 in a pipeline", where="zero", got=plan.zero,
                      expected="zero of 0 or 1")  # fmt: skip
    if plan.ep > 1:
        yield refused(
            TARGET, "expert parallelism in a pipeline", where="ep", got=plan.ep, expected="ep=1"
        )
    layers = stage_layers(job.model, plan)
    if len(set(layers)) > 1:
        yield refused(TARGET, "stages of unequal numbers of layers", where="stage_split",
                      got="-".join(map(str, layers)), expected="as many on each")  # fmt: skip


def _not_expressed(job: Job, plan: ParallelPlan, stack: Stack, devices_per_node: int) -> Iterator[str]:
    """What the user's Python has to do, and what differs from the prediction."""
    model = job.model
    nodes, per_node = nodes_of(plan, devices_per_node)
    yield (
        f"model: {one_line(model.name)} ({model.layers} layers of {model.hidden}) and seq_len "
        f"{job.seq_len} are the training script's"
    )
    yield f"ranks: deepspeed --num_nodes {nodes} --num_gpus {per_node} SCRIPT"
    if plan.pp > 1:
        yield (
            f"pipeline: PipelineModule(num_stages={plan.pp}, partition_method='type:…') with your class "
            "of layers, so that each stage has as many; DeepSpeed refuses the batch where it is missing"
        )
        if plan.tp > 1:
            yield (
                f"tp: PipeModelDataParallelTopology(num_pp={plan.pp}, num_mp={plan.tp}, "
                f"num_dp={plan.dp}) and layers that cut themselves"
            )
    if plan.recompute != "none" and (plan.pp == 1 or plan.recompute != "full" or plan.recompute_layers):
        yield (
            f"recompute={recompute_text(model, plan)}: DeepSpeed has no switch for it; call "
            "deepspeed.checkpointing in the model"
        )
    yield "learning rate and clipping: 1e-4 and 1.0 stand in the file"
    if "deepspeed" not in stack.name:
        yield (
            f"the prediction is for stack {one_line(stack.name)}; --stack megatron-deepspeed predicts "
            "this one"
        )
