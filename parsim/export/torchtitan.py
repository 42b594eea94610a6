"""A job and its plan as a config module of torchtitan 0.3: Python, as that release has no TOML.

The module holds a function that `--module FILE --config train` finds. The model is built from
torchtitan's own parts: its Llama 3 blocks, Qwen 3's where heads are normed or feed-forwards are experts,
DeepSeek-V3's for latent attention.
"""

from __future__ import annotations

from parsim.errors import ParsimError
from parsim.export.target import (
    Exported,
    nodes_of,
    one_line,
    refused,
    require_plain_reduction,
    same_ranks,
)
from parsim.export.torchtitan_model import check_model, model_source
from parsim.model import num_parameters
from parsim.plan import USUAL_PLACEMENT, Job, ParallelPlan, recomputed_layers, stage_layers
from parsim.schedule import SPLIT_SCHEDULES, make_schedule
from parsim.schedule.csv_file import schedule_to_csv
from parsim.stack import Stack

TARGET = "torchtitan"
SCHEDULE_CLASSES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved": "Interleaved1F1B",
    "looped-bfs": "LoopedBFS",
    "interleaved-zb": "InterleavedZeroBubble",
    "zbv": "ZBVZeroBubble",
    "dualpipev": "DualPipeV",
}
"""Schedules that torch.distributed.pipelining has, by its names; each gives the actions parsim has."""
FROM_CSV = "PipelineScheduleSingle"
"""The name that schedules of one stage a rank go by which are written down action by action."""
CSV_SCHEDULES = ("zb-h1", "zb-h2")

PRECISIONS = ("bf16", "fp32", "fp8", "mxfp8", "nvfp4")
_CONVERTERS = {
    "fp8": "Float8LinearConverter.Config(model_compile_enabled=True, filter_fqns=['lm_head', 'gate'])",
    "mxfp8": "MXFP8LinearConverter.Config(model_compile_enabled=True, fqns=['layers'])",
    "nvfp4": "NVFP4LinearConverter.Config(model_compile_enabled=True, fqns=['layers'])",
}
_CHECKPOINTING = {"none": "None", "selective": "SelectiveAC.Config()", "full": "FullAC.Config()"}

_MODULE = '''\
"""{title}

For torchtitan 0.3, saved as parsim_plan.py where Python finds it:
  torchrun --nnodes {nodes} --nproc-per-node {per_node} --rdzv-backend c10d \\\\
    --rdzv-endpoint HOST:29500 -m torchtitan.train --module parsim_plan --config train
"""

from functools import partial
{path_import}
import torch.nn as nn
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.optimizer import {optimizer_imports}
{quantization_import}from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
{checkpointing_import}from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

{model}

def model_spec() -> ModelSpec:
    """The model, of {parameters:,} parameters."""
    config = model_config()
{convert}    return ModelSpec(
        name={name!r},
        flavor="exported",
        model=config,
        parallelize_fn=PARALLELIZE,
        pipelining_fn=pipeline_llm,
        post_optimizer_build_fn={after_optimizer},
        state_dict_adapter=None,
    )


def train() -> Trainer.Config:
    """The training; its learning rate, data and tokenizer are torchtitan's defaults, not the plan's."""
    return Trainer.Config(
        loss=ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config(global_vocab_size={vocab})),
        model_spec=model_spec(),
        optimizer={optimizer},
        training=TrainingConfig(
            local_batch_size={local_batch},
            global_batch_size={global_batch},
            seq_len={seq_len},
            mixed_precision_param={param_dtype!r},
            disable_cuda_graphs=True,  # as predicted; and CUDA graphs take no pipeline
        ),
        dataloader=HuggingFaceTextDataLoader.Config(dataset="c4"),
        parallelism=ParallelismConfig(
{parallelism}        ),
        activation_checkpoint={checkpointing},
        compile=CompileConfig(enable={compile}, enable_async_tensor_parallel={async_tp}),
    )
'''


def torchtitan_module(job: Job, plan: ParallelPlan, stack: Stack, *, devices_per_node: int) -> Exported:
    """The config module, and the schedule's CSV where torch has no class for it.

    Raises ParsimError for what torchtitan would run as something else.
    """
    _check_plan(job, plan)
    check_model(job)
    model = job.model
    csv = _schedule_csv(job, plan)
    nodes, per_node = nodes_of(plan, devices_per_node)
    local_batch = job.global_batch // plan.dp if plan.pp > 1 else plan.micro_batch
    quantized = job.precision in _CONVERTERS
    sgd = job.optimizer == "sgd"
    policy = _CHECKPOINTING[plan.recompute if any(recomputed_layers(model, plan)) else "none"]
    optimizer_imports = "OptimizersContainer, ParamGroupConfig" if sgd else "default_adamw"
    text = _MODULE.format(
        title=f"{_plain(model.name)} on {plan.gpus} GPUs: {_plain(plan.short())}",
        nodes=nodes,
        per_node=per_node,
        path_import="from pathlib import Path\n" if csv is not None else "",
        optimizer_imports=optimizer_imports
        + (", register_moe_load_balancing_hook" if model.moe else ""),
        quantization_import=_import("components.quantization", _CONVERTERS.get(job.precision)),
        checkpointing_import=_import("distributed.activation_checkpoint", policy),
        model=model_source(job),
        parameters=num_parameters(model),
        convert=f"    config = {_CONVERTERS[job.precision]}.build().convert(config)\n"
        if quantized
        else "",
        name=one_line(model.name),
        after_optimizer="register_moe_load_balancing_hook" if model.moe else "None",
        vocab=model.vocab,
        optimizer=_SGD if sgd else "default_adamw()",
        local_batch=local_batch,
        global_batch=job.global_batch,
        seq_len=job.seq_len,
        param_dtype="float32" if job.precision == "fp32" else "bfloat16",
        parallelism="".join(f"            {k}={v},\n" for k, v in _parallelism(job, plan, csv).items()),
        checkpointing=policy,
        compile=plan.tp_overlap or quantized,
        async_tp=plan.tp_overlap,
    )
    return Exported(text=text, not_expressed=_not_expressed(job, plan, stack), schedule_csv=csv)


def _import(module: str, expression: str | None) -> str:
    """The line that imports the class that an expression begins with, if it does."""
    name, dot, _ = (expression or "").partition(".")
    return f"from torchtitan.{module} import {name}\n" if dot else ""


def _plain(text: str) -> str:
    """A text from outside for the inside of a docstring."""
    return one_line(text).replace("\\", "/").replace('"', "'")


_SGD = """OptimizersContainer.Config(
            param_groups=[
                ParamGroupConfig(pattern=r".*", optimizer_name="SGD", optimizer_kwargs={"lr": 8e-4})
            ]
        )"""


def _parallelism(job: Job, plan: ParallelPlan, csv: str | None) -> dict[str, object]:
    """Fields of torchtitan's ParallelismConfig."""
    shard = _sharding_ranks(plan)
    fields: dict[str, object] = {
        "data_parallel_replicate_degree": plan.dp // shard,
        "data_parallel_shard_degree": shard,
        "tensor_parallel_degree": plan.tp,
        "enable_sequence_parallel": plan.sequence_parallel,
        "context_parallel_degree": plan.cp,
        "pipeline_parallel_degree": plan.pp,
        "expert_parallel_degree": plan.ep,
    }
    if plan.zero >= 2:
        # ZeRO-2 keeps parameters whole between forward and backward; ZeRO-3 gathers them twice.
        fields["fsdp_reshard_after_forward"] = repr("always" if plan.zero == 3 else "never")
    if plan.cp > 1:
        fields["context_parallel_load_balancer"] = repr("ptrr")  # the one for FlexAttention
    if plan.pp > 1:
        name = FROM_CSV if csv is not None else SCHEDULE_CLASSES[plan.schedule]
        fields["pipeline_parallel_schedule"] = repr(name)
        fields["pipeline_parallel_microbatch_size"] = plan.micro_batch
        fields["module_fqns_per_model_part"] = _stage_modules(job, plan)
    if csv is not None:
        fields["pipeline_parallel_schedule_csv"] = 'str(Path(__file__).with_suffix(".csv"))'
    return fields


def _stage_modules(job: Job, plan: ParallelPlan) -> str:
    """The modules of every stage, as a list of lists."""
    lines, first = [], 0
    layers = stage_layers(job.model, plan)
    for stage, count in enumerate(layers):
        modules = [f"layers.{i}" for i in range(first, first + count)]
        before = ["tok_embeddings"] if stage == 0 else []
        after = ["norm", "lm_head"] if stage == len(layers) - 1 else []
        if stage == len(layers) - 1 or stage == 0 or count > 3:
            listed = f"*(f'layers.{{i}}' for i in range({first}, {first + count}))"
            words = [*map(repr, before), listed, *map(repr, after)]
        else:
            words = [*map(repr, [*before, *modules, *after])]
        lines.append(f"                [{', '.join(words)}],\n")
        first += count
    return "[\n" + "".join(lines) + "            ]"


def _sharding_ranks(plan: ParallelPlan) -> int:
    """Of the dp ranks those that share shards; cp ranks always do in torchtitan's FSDP."""
    return plan.shard_group // plan.cp if plan.zero else 1


def _schedule_csv(job: Job, plan: ParallelPlan) -> str | None:
    """The schedule action by action, where torch has no class for it or its class does not take it."""
    micro_batches = plan.num_micro_batches(job)
    if plan.pp == 1:
        return None
    short = plan.schedule in ("gpipe", "1f1b") and micro_batches < plan.pp
    if plan.schedule in CSV_SCHEDULES or short:
        return schedule_to_csv(make_schedule(plan, micro_batches))
    return None


def _check_plan(job: Job, plan: ParallelPlan) -> None:
    """Raises ParsimError for what torchtitan would run as something else."""
    for problem in (_data_parallel_problem(plan), _other_problem(job, plan)):
        if problem is not None:
            raise problem
    require_plain_reduction(TARGET, plan)


def _data_parallel_problem(plan: ParallelPlan) -> ParsimError | None:
    if plan.zero == 1:
        return refused(
            TARGET, "ZeRO-1", where="zero", got=1, expected="0, 2 or 3",
            hint="its FSDP shards gradients too: zero=2 keeps parameters between forward and backward",
        )  # fmt: skip
    if plan.cp > 1 and plan.shard_group % plan.cp:
        return refused(
            TARGET, "context parallelism whose ranks do not share shards", where="zero",
            got=f"zero {plan.zero}, {plan.shard_group} ranks a shard group, cp {plan.cp}",
            expected="zero of 2 or 3, and a zero_group that cp divides",
        )  # fmt: skip
    if plan.zero == 3 and plan.pp > 1 and plan.schedule in SPLIT_SCHEDULES:
        return refused(
            TARGET, "ZeRO-3 with backwards split into I and W: torch leaves gradients out", where="zero",
            got=f"zero 3, schedule {plan.schedule}", expected="zero=2",
        )  # fmt: skip
    return None


def _other_problem(job: Job, plan: ParallelPlan) -> ParsimError | None:
    if plan.pp > 1 and plan.schedule not in (*SCHEDULE_CLASSES, *CSV_SCHEDULES):
        return refused(
            TARGET, "this schedule", where="schedule", got=plan.schedule,
            expected=", ".join((*SCHEDULE_CLASSES, *CSV_SCHEDULES)),
        )  # fmt: skip
    if not same_ranks(plan, USUAL_PLACEMENT):
        return refused(
            TARGET, "another order of mesh dimensions", where="placement", got=plan.placement,
            expected=USUAL_PLACEMENT,
        )  # fmt: skip
    if plan.expert_tp > 1:
        return refused(
            TARGET, "experts cut by tensor parallelism", where="expert_tp", got=plan.expert_tp,
            expected="expert_tp=1",
        )  # fmt: skip
    again, layers = sum(recomputed_layers(job.model, plan)), job.model.layers
    if again not in (0, layers):
        return refused(
            TARGET, "recomputation of some layers only", where="recompute_layers",
            got=f"{again} of {layers} layers", expected="all layers, or none",
            hint="--to megatron can",
        )  # fmt: skip
    if job.precision not in PRECISIONS:
        return refused(
            TARGET, "this precision", where="precision", got=job.precision,
            expected=", ".join(PRECISIONS),
        )  # fmt: skip
    return None


def _not_expressed(job: Job, plan: ParallelPlan, stack: Stack) -> tuple[str, ...]:
    """What differs from the prediction all the same."""
    model, said = job.model, []
    said.append("learning rate, data set and tokenizer: torchtitan's defaults stand in the file")
    if model.gated_mlp:
        said.append("activation: torchtitan's feed-forward is SwiGLU")
    if plan.recompute == "selective" and stack.selective_recompute != "every_other_gemm":
        said.append(
            "recompute=selective: torchtitan recomputes every second matrix product, the prediction "
            f"with stack {one_line(stack.name)} attention alone"
        )
    if plan.cp > 1:
        said.append(
            "context parallelism: torchtitan gathers keys and values, the prediction is of a ring"
        )
    if model.moe is not None:
        said.append("routing: scores, groups and balancing are torchtitan's defaults")
    if model.position == "rope":
        said.append("rope: base 500,000 without scaling; neither changes cost or shape")
    if job.precision in _CONVERTERS and model.moe is not None:
        said.append(f"{job.precision}: the experts' grouped products stay in bf16")
    if plan.tp_overlap:
        said.append("tp_overlap: async tensor parallelism also needs torch.compile, which is on")
    if not stack.name.startswith("torchtitan"):
        said.append(
            f"the prediction is for stack {one_line(stack.name)}; --stack torchtitan predicts this one"
        )
    return tuple(said)
