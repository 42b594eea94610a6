"""A ModelSpec as Megatron-LM's model arguments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from parsim.export.target import refused
from parsim.model import MlaSpec, ModelSpec, MoeSpec
from parsim.plan import Job, ParallelPlan

_TARGET = "Megatron-LM"
_PAD_TO = 128
"""Megatron pads the vocabulary to a multiple of so many rows on each tensor-parallel rank."""


def check_model(job: Job) -> None:
    """Raises ParsimError for a shape that Megatron-LM's GPT does not have."""
    model = job.model
    usual = {"norms_per_layer": 2, "embedding_norm": False, "final_norm": True}
    for key, value in usual.items():
        if getattr(model, key) != value:
            raise refused(_TARGET, "this shape of model", where=f"model.{key}", got=getattr(model, key),
                          expected=f"{key} of {value}")  # fmt: skip
    if model.position == "alibi":
        raise refused(_TARGET, "ALiBi positions", where="model.position", got="alibi",
                      expected="rope, learned, none")  # fmt: skip
    if model.norm == "layernorm" and not model.norm_bias:
        raise refused(_TARGET, "a layernorm without bias", where="model.norm_bias", got=False)
    moe = model.moe
    if moe is not None and moe.expert_bias != model.linear_bias:
        raise refused(_TARGET, "biases in experts or elsewhere alone", where="model.moe.expert_bias",
                      got=moe.expert_bias, expected=f"{model.linear_bias}, as linear_bias")  # fmt: skip
    rows = model.position_rows or model.max_seq_len
    if model.position == "learned" and rows < job.seq_len:
        raise refused(_TARGET, "sequences longer than the table of positions", where="seq_len",
                      got=job.seq_len, expected=f"at most {rows}")  # fmt: skip


def model_arguments(job: Job) -> Iterator[Sequence[object]]:
    """The arguments that tell the model's shape, each with its values."""
    model = job.model
    yield "--num-layers", model.layers
    yield "--hidden-size", model.hidden
    yield "--ffn-hidden-size", model.ffn_hidden
    yield "--num-attention-heads", model.heads
    yield from _attention(model)
    if model.gated_mlp:
        yield ("--swiglu",)
    elif not model.linear_bias:
        yield ("--no-bias-gelu-fusion",)
    if not model.linear_bias:
        yield ("--disable-bias-linear",)
    yield "--normalization", "RMSNorm" if model.norm == "rmsnorm" else "LayerNorm"
    yield from _positions(job)
    if not model.tied_embeddings:
        yield ("--untie-embeddings-and-output-weights",)
    yield "--vocab-size", model.vocab
    if model.moe is not None:
        yield from _experts(model, model.moe)
    if model.mtp_layers:
        yield "--mtp-num-layers", model.mtp_layers


def _attention(model: ModelSpec) -> Iterator[Sequence[object]]:
    if model.mla is not None:
        yield from _latent_attention(model.mla)
        return
    yield "--kv-channels", model.head_dim
    if model.kv_heads != model.heads:
        yield ("--group-query-attention",)
        yield "--num-query-groups", model.kv_heads
    if model.qkv_bias:
        yield ("--add-qkv-bias",)
    if model.qk_norm:
        yield ("--qk-layernorm",)
    if model.attention_sinks:
        yield "--softmax-type", "learnable"
    if model.window:
        # Megatron counts the tokens before the query's own.
        yield "--window-size", f"{model.window - 1},0"
        if model.window_every > 1:
            yield (
                "--window-attn-skip-freq",
                _pattern([model.is_window_layer(i) for i in range(model.layers)]),
            )


def _latent_attention(mla: MlaSpec) -> Iterator[Sequence[object]]:
    yield ("--multi-latent-attention",)
    if mla.q_lora_rank:
        yield "--q-lora-rank", mla.q_lora_rank
    yield "--kv-lora-rank", mla.kv_lora_rank
    yield "--qk-head-dim", mla.qk_nope_head_dim
    yield "--qk-pos-emb-head-dim", mla.qk_rope_head_dim
    yield "--v-head-dim", mla.v_head_dim
    yield ("--qk-layernorm",)  # the norms of the two latents


def _positions(job: Job) -> Iterator[Sequence[object]]:
    model = job.model
    kind = {"rope": "rope", "learned": "learned_absolute", "none": "none"}[model.position]
    yield "--position-embedding-type", kind
    learned = model.position == "learned"
    rows = (model.position_rows or model.max_seq_len) if learned else job.seq_len
    yield "--max-position-embeddings", rows
    yield "--seq-length", job.seq_len


def _experts(model: ModelSpec, moe: MoeSpec) -> Iterator[Sequence[object]]:
    yield "--num-experts", moe.experts
    yield "--moe-router-topk", moe.top_k
    if moe.top_k == 1:
        yield ("--moe-router-pre-softmax",)  # over a single expert a softmax would be 1
    yield "--moe-ffn-hidden-size", moe.ffn_hidden
    yield ("--moe-grouped-gemm",)
    if moe.shared_ffn_hidden:
        yield "--moe-shared-expert-intermediate-size", moe.shared_ffn_hidden
    if moe.shared_gate:
        yield ("--moe-shared-expert-gate",)
    if moe.router_bias:
        yield ("--moe-router-enable-expert-bias",)
        yield "--moe-router-score-function", "sigmoid"
    layers = [model.is_moe_layer(i) for i in range(model.layers)]
    if not all(layers):
        yield "--moe-layer-freq", _pattern(layers)


def _pattern(flags: Sequence[bool]) -> str:
    """Which layers have something, in the list expression that Megatron reads.

    >>> _pattern([False, False, True, True, True, False])
    '[0]*2+[1]*3+[0]*1'
    """
    runs: list[tuple[int, int]] = []
    for flag in map(int, flags):
        if runs and runs[-1][0] == flag:
            runs[-1] = (flag, runs[-1][1] + 1)
        else:
            runs.append((flag, 1))
    return "+".join(f"[{flag}]*{count}" for flag, count in runs)


def model_notes(job: Job, plan: ParallelPlan) -> Iterator[str]:
    """What a ModelSpec does not say and Megatron-LM decides, and the other way round."""
    model = job.model
    yield f"activation: {'SwiGLU' if model.gated_mlp else 'GELU'}, as the model file names none"
    if model.position == "rope":
        yield "rope: Megatron-LM's base and scaling; neither changes cost or shape"
    padded = -(-model.vocab // (_PAD_TO * plan.tp)) * _PAD_TO * plan.tp
    if padded != model.vocab:
        yield f"vocabulary: Megatron-LM pads its {model.vocab} rows to {padded}"
    if model.moe is not None:
        yield "routing: scores, groups and losses for balance are Megatron-LM's defaults"
