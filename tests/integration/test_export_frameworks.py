"""Exports as the frameworks themselves take them: their own parsers, config classes and process groups.

Everything that is compared was read back from the framework; a fact that an export forgets, or says in
words that the framework does not know, shows up here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from parsim.config import load_model, load_stack
from parsim.export.deepspeed import deepspeed_config
from parsim.export.megatron import megatron_arguments
from parsim.export.torchtitan import torchtitan_module
from parsim.model import num_parameters
from parsim.plan import Coordinate, Job, ParallelPlan, parse_plan, stage_layers
from parsim.schedule import make_schedule
from tests.frameworks import ask

Case = tuple[str, str, int, str]


def job_and_plan(case: Case) -> tuple[Job, ParallelPlan]:
    name, plan, global_batch, precision = case
    model = load_model(name)
    seq_len = min(model.max_seq_len, 4096)
    job = Job(model=model, seq_len=seq_len, global_batch=global_batch, precision=precision)
    return job, parse_plan(plan)


TORCHTITAN: tuple[Case, ...] = (
    # Small ones are built, as one rank of the plan builds them.
    ("tiny-llama-8l", "dp=2,tp=2,pp=2,zero=2,micro_batch=2,recompute=full", 16, "bf16"),
    ("tiny-llama-8l", "dp=2,tp=2,pp=2,schedule=zb-h1", 16, "bf16"),
    ("tiny-llama-8l", "dp=2,pp=4,schedule=gpipe,stage_split=1-3-3-1", 4, "bf16"),
    ("tiny-llama-8l", "dp=2,pp=2,vpp=2,schedule=interleaved,recompute=selective", 16, "bf16"),
    ("tiny-llama-8l", "pp=2,vpp=4,schedule=looped-bfs", 8, "bf16"),
    ("tiny-llama-8l", "dp=2,pp=2,vpp=2,schedule=interleaved-zb,zero=2", 16, "bf16"),
    ("tiny-llama-8l", "dp=2,pp=2,schedule=zbv,zero=2", 16, "bf16"),
    ("tiny-llama-8l", "pp=2,schedule=dualpipev", 8, "bf16"),
    ("tiny-llama-8l", "dp=4,cp=2,zero=3", 16, "fp32"),
    ("tiny-llama-8l", "dp=8,zero=3,zero_group=4,micro_batch=2", 32, "bf16"),
    ("llama-3.1-70b", "dp=4,tp=8,pp=4,zero=2,tp_overlap=true", 64, "bf16"),
    ("llama-3.1-8b", "dp=8,zero=3,tp=2,sequence_parallel=false", 64, "fp8"),
    ("llama-3.1-8b", "dp=8,zero=3", 64, "mxfp8"),
    ("mixtral-8x7b", "dp=8,tp=2,pp=4,ep=8,zero=3", 64, "bf16"),
    ("qwen3-30b-a3b", "dp=16,pp=2,ep=8,zero=2", 64, "bf16"),
    ("kimi-k2", "dp=16,pp=8,ep=16,zero=2,recompute=full", 128, "bf16"),
    ("llama-4-maverick-400b", "dp=16,tp=2,pp=2,ep=16,zero=2", 64, "bf16"),
)
SCHEDULE_CLASSES = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "looped-bfs": "ScheduleLoopedBFS",
    "interleaved-zb": "ScheduleInterleavedZeroBubble",
    "zbv": "ScheduleZBVZeroBubble",
    "dualpipev": "ScheduleDualPipeV",
}


@pytest.fixture(scope="module")
def torchtitan(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("torchtitan")
    asked = []
    for number, case in enumerate(TORCHTITAN):
        job, plan = job_and_plan(case)
        exported = torchtitan_module(job, plan, load_stack("torchtitan"), devices_per_node=8)
        (folder / f"case_{number}.py").write_text(exported.text)
        if exported.schedule_csv is not None:
            (folder / f"case_{number}.csv").write_text(exported.schedule_csv)
        build = case[0].startswith("tiny")
        asked.append({"module": f"case_{number}", "world_size": plan.gpus, "build": build})
    return dict(zip(TORCHTITAN, ask("torchtitan", {"folder": str(folder), "cases": asked}), strict=True))


@pytest.mark.parametrize("case", TORCHTITAN, ids=lambda case: f"{case[0]}-{case[1]}")
def test_torchtitan_reads_back_the_plan(torchtitan: dict[Case, dict[str, Any]], case: Case) -> None:
    job, plan = job_and_plan(case)
    got = torchtitan[case]
    assert "error" not in got, got["traceback"]
    for key in ("tp", "pp", "cp", "ep", "micro_batch", "sequence_parallel"):
        assert got[key] == getattr(plan, key), key
    assert got["dp_replicate"] * got["dp_shard"] == plan.dp
    assert got["dp_shard"] * plan.cp == (plan.shard_group if plan.zero else plan.cp)
    assert got["reshard"] == {0: "default", 2: "never", 3: "always"}[plan.zero]
    assert (got["global_batch"], got["seq_len"]) == (job.global_batch, job.seq_len)
    accumulated = got["global_batch"] // (plan.dp * got["local_batch"])
    in_pipeline = got["local_batch"] // got["micro_batch"]
    assert accumulated * in_pipeline == plan.num_micro_batches(job)
    assert accumulated == 1 or plan.pp == 1
    assert (
        got["checkpointing"]
        == {"none": "none", "full": "FullAC", "selective": "SelectiveAC"}[plan.recompute]
    )
    assert got["async_tp"] == plan.tp_overlap
    assert got["param_dtype"] == ("float32" if job.precision == "fp32" else "bfloat16")
    linear = {"fp8": ["Float8Linear.Config"], "mxfp8": ["MXFP8Linear.Config"]}
    assert got["linears"] in ([], linear.get(job.precision, ["Linear.Config"]))
    assert got["parameters"] == num_parameters(job.model)
    if plan.pp > 1:
        assert tuple(got["stages"]) == stage_layers(job.model, plan)
        assert (
            got["schedule"] == SCHEDULE_CLASSES.get(plan.schedule, "PipelineScheduleSingle")
            or got["csv"]
        )


@pytest.mark.parametrize(
    "case", [c for c in TORCHTITAN if c[0].startswith("tiny")], ids=lambda case: case[1]
)
def test_a_rank_of_torchtitan_holds_its_stages_and_runs_their_actions(
    torchtitan: dict[Case, dict[str, Any]], case: Case
) -> None:
    job, plan = job_and_plan(case)
    got = torchtitan[case]
    layers = stage_layers(job.model, plan)
    assert got["built"] == [layers[stage] for stage in plan.rank_stages()[0]]
    if plan.pp == 1:
        return
    assert got["micro_batches"] == plan.num_micro_batches(job)
    schedule = make_schedule(plan, plan.num_micro_batches(job))
    ours = [[str(action) for action in rank] for rank in schedule.ranks]
    assert got["class"] == (
        "_PipelineScheduleRuntime" if got["csv"] else SCHEDULE_CLASSES[plan.schedule]
    )
    theirs = [[a for a in rank if "REDUCE" not in a] for rank in got["actions"]]
    if got["class"] == "Schedule1F1B":
        # torch lists the last rank's forwards of 1F1B one too late; it runs them by a loop of its own.
        theirs, ours = ([[a[1] for a in rank] for rank in ranks] for ranks in (theirs, ours))
    assert theirs == ours


MEGATRON: tuple[Case, ...] = (
    ("llama-3.1-70b", "dp=4,tp=8,pp=4,zero=1,tp_overlap=true", 64, "bf16"),
    ("llama-3.1-405b", "dp=2,tp=8,pp=8,vpp=2,schedule=interleaved,zero=1,recompute=full", 64, "fp8"),
    ("gpt3-175b", "tp=8,pp=8,recompute=selective", 64, "fp16"),
    ("gpt3-175b", "dp=2,tp=8,pp=4,sequence_parallel=false", 64, "fp32"),
    ("deepseek-v3", "dp=32,tp=2,pp=16,ep=32,zero=1,recompute=full", 512, "bf16"),
    ("gpt-oss-120b", "dp=16,pp=4,ep=8,zero=1", 64, "bf16"),
    ("mixtral-8x7b", "dp=4,tp=4,pp=2,ep=2,expert_tp=4", 64, "bf16"),
    ("llama-4-maverick-400b", "dp=16,tp=2,pp=2,ep=16,zero=1", 64, "bf16"),
    ("qwen3-30b-a3b", "dp=8,tp=2,ep=8,zero=3", 64, "mxfp8"),
    ("llama-3.1-8b", "dp=8,zero=2,cp=2", 64, "bf16"),
    (
        "llama-3.1-8b",
        "dp=8,tp=2,pp=2,zero=1,zero_group=4,placement=tp-cp-pp-dp,recompute=full,recompute_layers=5-5",
        64, "nvfp4",
    ),
    ("llama-3.1-8b", "dp=4,tp=2,pp=3,zero=1,micro_batch=2", 64, "bf16"),
    ("llama-3.1-8b", "dp=2,tp=2,pp=2,vpp=2,schedule=interleaved,stage_split=7-9-9-7", 20, "bf16"),
    ("llama-3.1-8b", "pp=4,vpp=2,schedule=interleaved", 6, "bf16"),
)  # fmt: skip


@pytest.fixture(scope="module")
def megatron() -> dict[Case, dict[str, Any]]:
    asked = []
    for case in MEGATRON:
        job, plan = job_and_plan(case)
        arguments = megatron_arguments(job, plan, load_stack("megatron-core-2025"))
        asked.append({
            "arguments": [str(word) for argument in arguments for word in argument],
            "world_size": plan.gpus,
            "environment": {} if plan.zero >= 2 else {"CUDA_DEVICE_MAX_CONNECTIONS": "1"},
        })  # fmt: skip
    return dict(zip(MEGATRON, ask("megatron", asked), strict=True))


@pytest.mark.parametrize("case", MEGATRON, ids=lambda case: f"{case[0]}-{case[1]}")
def test_megatron_reads_back_the_plan(megatron: dict[Case, dict[str, Any]], case: Case) -> None:
    job, plan = job_and_plan(case)
    got = megatron[case]
    assert "error" not in got, got.get("traceback", got["error"])
    args = got["args"]
    expected = {
        "tensor_model_parallel_size": plan.tp,
        "pipeline_model_parallel_size": plan.pp,
        "context_parallel_size": plan.cp,
        "expert_model_parallel_size": plan.ep,
        "data_parallel_size": plan.dp,
        "virtual_pipeline_model_parallel_size": plan.vpp if plan.vpp > 1 else None,
        "micro_batch_size": plan.micro_batch,
        "global_batch_size": job.global_batch,
        "seq_length": job.seq_len,
        "sequence_parallel": plan.sequence_parallel,
        "tp_comm_overlap": plan.tp_overlap,
        "use_distributed_optimizer": plan.zero >= 1,
        "use_megatron_fsdp": plan.zero >= 2,
        "fp16": job.precision == "fp16",
        "bf16": job.precision not in ("fp16", "fp32"),
        "fp4": "e2m1" if job.precision == "nvfp4" else None,
        "recompute_granularity": None if plan.recompute == "none" else plan.recompute,
        "attention_dropout": 0.0,
    }
    assert {key: args[key] for key in expected} == expected
    if job.model.moe is not None:
        assert args["expert_tensor_parallel_size"] == plan.expert_tp
        ranks = plan.dp * plan.cp * plan.tp
        assert got["expert_data_parallel"] == ranks // plan.expert_ranks
    if plan.zero:
        assert got["optimizer_shards"] == plan.shard_group
        strategies = {2: "optim_grads", 3: "optim_grads_params"}
        if plan.zero >= 2:
            assert args["data_parallel_sharding_strategy"] == strategies[plan.zero]
    if job.precision in ("fp8", "mxfp8"):
        assert args["fp8_recipe"] == {"fp8": "tensorwise", "mxfp8": "mxfp8"}[job.precision]
    if plan.recompute_layers:
        assert (args["recompute_method"], args["recompute_num_layers"]) == ("block", 5)
    assert tuple(got["layers"]) == stage_layers(job.model, plan)


@pytest.mark.parametrize("case", MEGATRON, ids=lambda case: f"{case[0]}-{case[1]}")
def test_megatron_reads_back_the_model(megatron: dict[Case, dict[str, Any]], case: Case) -> None:
    job, plan = job_and_plan(case)
    model, args = job.model, megatron[case]["args"]
    expected: dict[str, Any] = {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "num_attention_heads": model.heads,
        "ffn_hidden_size": model.ffn_hidden,
        "swiglu": model.gated_mlp,
        "add_bias_linear": model.linear_bias,
        "normalization": {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[model.norm],
        "position_embedding_type": {"rope": "rope", "learned": "learned_absolute"}[model.position],
        "untie_embeddings_and_output_weights": not model.tied_embeddings,
        "vocab_size": model.vocab,
        "multi_latent_attention": model.mla is not None,
        "mtp_num_layers": model.mtp_layers or None,
        "num_moe_experts": model.moe.experts if model.moe else None,
    }
    if model.mla is None:
        expected |= {"num_query_groups": model.kv_heads, "kv_channels": model.head_dim}
        expected |= {"qk_layernorm": model.qk_norm, "add_qkv_bias": model.qkv_bias or model.linear_bias}
    else:
        expected |= {"q_lora_rank": model.mla.q_lora_rank, "kv_lora_rank": model.mla.kv_lora_rank}
        expected |= {"qk_head_dim": model.mla.qk_nope_head_dim, "v_head_dim": model.mla.v_head_dim}
        expected |= {"qk_pos_emb_head_dim": model.mla.qk_rope_head_dim, "qk_layernorm": True}
    if model.moe is not None:
        expected |= {"moe_router_topk": model.moe.top_k, "moe_ffn_hidden_size": model.moe.ffn_hidden}
        shared = model.moe.shared_ffn_hidden or None
        expected |= {"moe_shared_expert_intermediate_size": shared}
        frequency = args["moe_layer_freq"]
        experts = [bool(f) for f in frequency] if isinstance(frequency, list) else [True] * model.layers
        assert experts == [model.is_moe_layer(i) for i in range(model.layers)]
    if model.attention_sinks:
        expected["softmax_type"] = "learnable"
    if model.window:
        expected["window_size"] = [model.window - 1, 0]
        slides = [model.is_window_layer(i) for i in range(model.layers)]
        assert [bool(f) for f in args["window_attn_skip_freq"]] == slides
    assert {key: args[key] for key in expected} == expected
    assert args["padded_vocab_size"] - model.vocab in range(128 * plan.tp)


def ranks_of(plan: ParallelPlan, name: str) -> set[frozenset[int]]:
    """The groups of ranks that differ along one mesh dimension only, by parsim's own layout."""
    found: dict[Coordinate, set[int]] = {}
    for rank in range(plan.gpus):
        at = plan.coordinate(rank)
        found.setdefault(at._replace(**{name: 0}), set()).add(rank)
    return {frozenset(group) for group in found.values()}


@pytest.mark.parametrize("case", MEGATRON, ids=lambda case: f"{case[0]}-{case[1]}")
def test_megatron_lays_ranks_out_as_the_plan(megatron: dict[Case, dict[str, Any]], case: Case) -> None:
    _, plan = job_and_plan(case)
    got = megatron[case]
    for name, groups in got["groups"].items():
        assert {frozenset(group) for group in groups} == ranks_of(plan, name), name
    assert got["groups"] or plan.gpus > 64


DEEPSPEED: tuple[Case, ...] = (
    ("llama-3.1-8b", "dp=8,zero=3,micro_batch=2,recompute=full", 64, "bf16"),
    ("llama-3.1-8b", "dp=8,tp=4,sequence_parallel=false,zero=1,tp_overlap=true", 64, "fp16"),
    ("mixtral-8x7b", "dp=8,ep=8,zero=2", 64, "bf16"),
    ("llama-3.1-8b", "dp=2,pp=4,zero=1,recompute=full", 64, "fp32"),
    ("llama-3.1-8b", "dp=2,pp=4,compression=bf16", 64, "bf16"),
)


def test_deepspeed_reads_back_the_plan() -> None:
    stack, asked = load_stack("megatron-deepspeed"), []
    for case in DEEPSPEED:
        job, plan = job_and_plan(case)
        config = json.loads(deepspeed_config(job, plan, stack, devices_per_node=8).text)
        asked.append({"config": config, "dp": plan.dp})
    wrong_world = {"config": asked[0]["config"], "dp": 4}
    *answers, refused = ask("deepspeed", [*asked, wrong_world])
    for case, got in zip(DEEPSPEED, answers, strict=True):
        job, plan = job_and_plan(case)
        assert "error" not in got, got["error"]
        assert got["unknown"] == []
        expected = {
            "train_batch_size": job.global_batch,
            "micro_batch": plan.micro_batch,
            "accumulation": plan.num_micro_batches(job),
            "zero": plan.zero,
            "overlap": stack.dp_overlap,
            "bucket": int(stack.dp_bucket_parameters),
            "bf16": job.precision == "bf16",
            "fp16": job.precision == "fp16",
            "tp": plan.tp if plan.tp > 1 else 0,
            "ep": plan.ep,
            "stages": plan.pp if plan.pp > 1 else "auto",
            "recompute_every": int(plan.pp > 1 and plan.recompute == "full"),
            "optimizer": "adamw",
        }
        assert {key: got[key] for key in expected} == expected, case
        assert ("bfloat16" in got["communication"]) == (plan.compression == "bf16")
    # Without the pipeline that the file asks the user's code for, DeepSpeed refuses the batch.
    assert "train_batch_size is not equal" in refused["error"]


def test_every_environment_is_asked_by_a_script_of_its_name() -> None:
    scripts = {path.stem for path in (Path(__file__).parents[1] / "oracles").glob("*_config.py")}
    assert scripts == {"torchtitan_config", "megatron_config", "deepspeed_config"}
