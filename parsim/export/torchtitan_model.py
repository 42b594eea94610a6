"""A ModelSpec as Python that builds torchtitan's config of the same shape, layer by layer."""

from __future__ import annotations

from parsim.export.target import refused
from parsim.model import ModelSpec
from parsim.plan import Job

_TARGET = "torchtitan"

_COMMON = '''\
import {family} as family
from torchtitan.models.common import {rope}, Embedding, Linear, RMSNorm
from torchtitan.models.common.config_utils import {makers}

PARALLELIZE = family.{parallelize}
LAYERS = {layers}
HIDDEN = {hidden}
VOCAB = {vocab}
INIT = {{"weight": partial(nn.init.normal_, std=0.02), "bias": nn.init.zeros_}}
ROPE = {rope}.Config(dim={rope_dim}, max_seq_len={max_seq_len}, theta=500000.0)


def norm(width: int) -> RMSNorm.Config:
    return RMSNorm.Config(normalized_shape=width, param_init={{"weight": nn.init.ones_}})


def feed_forward(width: int):
    return make_ffn_config(dim=HIDDEN, hidden_dim=width, w1_param_init=INIT, w2w3_param_init=INIT)

{experts}
def layer(index: int):
    """One layer{kind}."""
    return family.{block}.Config(
        attention_norm=norm(HIDDEN),
        ffn_norm=norm(HIDDEN),
        attention={attention},
        feed_forward={feed_forward},
        moe={moe},
    )


def model_config():
    return family.{model}.Config(
        dim=HIDDEN,
        vocab_size=VOCAB,
        enable_weight_tying={tied},
        tok_embeddings=Embedding.Config(num_embeddings=VOCAB, embedding_dim=HIDDEN, param_init=INIT),
        norm=norm(HIDDEN),
        lm_head=Linear.Config(in_features=HIDDEN, out_features=VOCAB, param_init=INIT),
        layers=[layer(i) for i in range(LAYERS)],
    )
'''

_EXPERTS = """
def experts():
    return make_moe_config(
        num_experts={experts},
        router=make_router_config(
            dim=HIDDEN, num_experts={experts}, gate_param_init=INIT, top_k={top_k}, score_func="softmax"
        ),
        routed_experts=make_routed_experts_config(
            dim=HIDDEN,
            hidden_dim={ffn_hidden},
            num_experts={experts},
            top_k={top_k},
            param_init={{name: INIT["weight"] for name in ("w1_EFD", "w2_EDF", "w3_EFD")}},
            comm_backend="standard",
        ),
        shared_experts={shared},
        load_balance_coeff={balance},
    )

"""

_GQA = """make_gqa_config(
            dim=HIDDEN,
            n_heads={heads},
            n_kv_heads={kv_heads},
            head_dim={head_dim},
            wqkv_param_init=INIT,
            wo_param_init=INIT,
            inner_attention=get_attention_config("flex"),
            fuse_qkv=True,
            rope=ROPE,
            qk_norm={qk_norm},
        )"""

_MLA = """family.make_mla_attention_config(
            layer_id=index,
            dim=HIDDEN,
            n_heads={heads},
            q_lora_rank={q_lora_rank},
            kv_lora_rank={kv_lora_rank},
            qk_nope_head_dim={qk_nope_head_dim},
            qk_rope_head_dim={qk_rope_head_dim},
            v_head_dim={v_head_dim},
            attn_backend="flex",
            linear_init=INIT,
            norm_init={{"weight": nn.init.ones_}},
            depth_init=lambda index: INIT,
            rope=ROPE,
        )"""

_LLAMA = {
    "family": "torchtitan.models.llama3",
    "rope": "ComplexRoPE",
    "parallelize": "parallelize_llama",
    "block": "Llama3TransformerBlock",
    "model": "Llama3Model",
}
_QWEN = {
    "family": "torchtitan.models.qwen3",
    "rope": "CosSinRoPE",
    "parallelize": "parallelize_qwen3",
    "block": "Qwen3TransformerBlock",
    "model": "Qwen3Model",
}
_DEEPSEEK = {
    "family": "torchtitan.models.deepseek_v3",
    "rope": "ComplexRoPE",
    "parallelize": "parallelize_deepseekv3",
    "block": "DeepSeekV3TransformerBlock",
    "model": "DeepSeekV3Model",
}


def check_model(job: Job) -> None:
    """Raises ParsimError for a shape that torchtitan's blocks do not have."""
    model, usual = job.model, {
        "norm": "rmsnorm", "position": "rope", "gated_mlp": True, "linear_bias": False,
        "qkv_bias": False, "norms_per_layer": 2, "embedding_norm": False, "final_norm": True,
        "attention_sinks": False, "mtp_layers": 0,
    }  # fmt: skip
    for key, value in usual.items():
        got = getattr(model, key)
        if got != value:
            raise refused(
                _TARGET, "this shape of model", where=f"model.{key}", got=got,
                expected=f"{key} of {value}: its blocks are those of Llama 3, Qwen 3 and DeepSeek-V3",
            )  # fmt: skip
    if 0 < model.window < job.seq_len:
        raise refused(
            _TARGET, "sliding-window attention", where="model.window", got=model.window,
            expected=f"none, or at least seq_len = {job.seq_len}",
        )  # fmt: skip
    if model.head_dim % 2 and model.mla is None:
        raise refused(_TARGET, "rotary heads of odd width", where="model.head_dim", got=model.head_dim)
    moe = model.moe
    if moe is not None and (moe.expert_bias or moe.shared_gate):
        key = "expert_bias" if moe.expert_bias else "shared_gate"
        raise refused(_TARGET, "experts of this kind", where=f"model.moe.{key}", got=True)


def model_source(job: Job) -> str:
    """Python that defines `model_config` and PARALLELIZE; only numbers of the model are in it."""
    model = job.model
    mla, moe = model.mla, model.moe
    qwen = model.qk_norm or moe is not None or model.head_dim * model.heads != model.hidden
    family = _DEEPSEEK if mla is not None else _QWEN if qwen else _LLAMA
    dense = f"feed_forward({model.ffn_hidden})"
    expert_layers = [i for i in range(model.layers) if model.is_moe_layer(i)]
    if not expert_layers:
        feed_forward, experts, kind = dense, "None", ""
    elif len(expert_layers) == model.layers:
        feed_forward, experts, kind = "None", "experts()", " with experts"
    else:
        rule = _expert_rule(model)
        feed_forward, experts = f"None if {rule} else {dense}", f"experts() if {rule} else None"
        kind = ", of which some have experts"
    return _COMMON.format(
        **family,
        layers=model.layers,
        hidden=model.hidden,
        vocab=model.vocab,
        rope_dim=mla.qk_rope_head_dim if mla is not None else model.head_dim,
        max_seq_len=max(model.max_seq_len, job.seq_len),
        experts=_experts_source(model),
        attention=_attention_source(model),
        feed_forward=feed_forward,
        moe=experts,
        kind=kind,
        tied=model.tied_embeddings,
        makers=", ".join(_makers(model)),
    )


def _makers(model: ModelSpec) -> list[str]:
    """The functions of torchtitan that the module calls."""
    attention = ["get_attention_config", "make_gqa_config"] if model.mla is None else []
    experts = ["make_moe_config", "make_routed_experts_config", "make_router_config"]
    return ["make_ffn_config", *attention, *(experts if model.moe is not None else [])]


def _expert_rule(model: ModelSpec) -> str:
    """As ModelSpec.is_moe_layer has it."""
    assert model.moe is not None
    first, every = model.moe.dense_layers, model.moe.every
    rule = f"index >= {first}"
    return rule if every == 1 else f"{rule} and (index - {first} + 1) % {every} == 0"


def _experts_source(model: ModelSpec) -> str:
    moe = model.moe
    if moe is None:
        return ""
    return _EXPERTS.format(
        experts=moe.experts,
        top_k=moe.top_k,
        ffn_hidden=moe.ffn_hidden,
        shared=f"feed_forward({moe.shared_ffn_hidden})" if moe.shared_ffn_hidden else None,
        balance=1e-3 if moe.router_bias else None,
    )


def _attention_source(model: ModelSpec) -> str:
    mla = model.mla
    if mla is None:
        return _GQA.format(
            heads=model.heads,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            qk_norm=f"norm({model.head_dim})" if model.qk_norm else None,
        )
    return _MLA.format(
        heads=model.heads,
        q_lora_rank=mla.q_lora_rank,
        kv_lora_rank=mla.kv_lora_rank,
        qk_nope_head_dim=mla.qk_nope_head_dim,
        qk_rope_head_dim=mla.qk_rope_head_dim,
        v_head_dim=mla.v_head_dim,
    )
