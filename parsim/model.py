"""ModelSpec: the shape of a decoder-only transformer, and how many parameters it has.

Standard library only: the executor's workers import it where nothing but torch is installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from parsim.errors import ParsimError

Norm = Literal["rmsnorm", "layernorm"]
Position = Literal["rope", "learned", "alibi", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeSpec:
    """The mixture-of-experts feed-forward part of a model."""

    experts: int
    """Routed experts per MoE layer."""
    top_k: int
    """Routed experts that each token visits."""
    ffn_hidden: int
    """Inner width of one routed expert."""
    shared_ffn_hidden: int = 0
    """Inner width, all together, of the experts that every token visits; 0: none."""
    dense_layers: int = 0
    """Leading layers that keep a dense feed-forward of ModelSpec.ffn_hidden."""
    every: int = 1
    """Of the layers after the dense ones, each `every`-th is MoE (Llama 4 Maverick: 2), the rest dense."""
    router_bias: bool = False
    """One extra value an expert, as in DeepSeek-V3's loss-free balancing (a buffer, not counted)."""
    expert_bias: bool = False
    """Experts and router have additive biases (gpt-oss)."""
    shared_gate: bool = False
    """A learned gate scales the shared expert's output (Qwen2-MoE)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaSpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    kv_lora_rank: int
    q_lora_rank: int = 0
    """0: queries are projected directly."""
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer."""

    name: str
    layers: int
    hidden: int
    heads: int
    """Query heads."""
    kv_heads: int = 0
    """Key/value heads; 0 in a file means as many as `heads`."""
    head_dim: int = 0
    """0 in a file means hidden / heads."""
    ffn_hidden: int
    """Inner width of the dense feed-forward."""
    gated_mlp: bool
    """True: three matrices (SwiGLU, GeGLU); False: two."""
    vocab: int
    max_seq_len: int
    """Tokens the model was trained for; the default sequence length of a Job."""
    tied_embeddings: bool = False
    norm: Norm = "rmsnorm"
    position: Position = "rope"
    linear_bias: bool = False
    """Biases in every linear layer except the head (GPT-2, GPT-3, BLOOM)."""
    qkv_bias: bool = False
    """Biases in the query, key and value projections alone (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm on queries and keys per head (Qwen3)."""
    norms_per_layer: int = 2
    """Norms of width `hidden` in a layer: 1 where attention and feed-forward share one, 4 in Gemma 2."""
    embedding_norm: bool = False
    """A norm right after the embedding (BLOOM)."""
    final_norm: bool = True
    attention_sinks: bool = False
    """One learned logit a head (gpt-oss)."""
    window: int = 0
    """Tokens a sliding-window layer looks back; 0: every layer sees everything before it."""
    window_every: int = 1
    """One layer in `window_every` slides, the rest are full (gpt-oss, Gemma 2: 2)."""
    moe: MoeSpec | None = None
    mla: MlaSpec | None = None
    source: str = ""
    """Where the shape was published."""

    def __post_init__(self) -> None:
        for key in ("layers", "hidden", "heads", "ffn_hidden", "vocab", "max_seq_len"):
            if getattr(self, key) < 1:
                raise ParsimError("a size must be positive", where=key, got=getattr(self, key))
        if self.kv_heads == 0:
            object.__setattr__(self, "kv_heads", self.heads)
        if self.head_dim == 0:
            if self.hidden % self.heads:
                raise ParsimError(
                    "heads must divide hidden unless head_dim is given",
                    where="heads",
                    got=f"hidden {self.hidden}, heads {self.heads}",
                )
            object.__setattr__(self, "head_dim", self.hidden // self.heads)
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ParsimError(
                "kv_heads must divide heads",
                where="kv_heads",
                got=self.kv_heads,
                expected=f"a divisor of {self.heads}",
            )
        if self.moe is not None and not 1 <= self.moe.top_k <= self.moe.experts:
            raise ParsimError(
                "top_k must lie between 1 and the number of experts",
                where="moe.top_k",
                got=self.moe.top_k,
            )

    @property
    def attention_kind(self) -> Literal["MHA", "GQA", "MQA", "MLA"]:
        if self.mla is not None:
            return "MLA"
        if self.kv_heads == self.heads:
            return "MHA"
        return "MQA" if self.kv_heads == 1 else "GQA"

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) has routed experts instead of a dense feed-forward.

        Layers after the dense ones count from 1: with every = 2 the second, fourth … are MoE.
        """
        if self.moe is None or layer < self.moe.dense_layers:
            return False
        return (layer - self.moe.dense_layers + 1) % self.moe.every == 0

    def is_window_layer(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) attends to the last `window` tokens only."""
        return self.window > 0 and layer % self.window_every == 0


def _norm_parameters(model: ModelSpec, width: int) -> int:
    return width * (2 if model.norm == "layernorm" else 1)


def attention_parameters(model: ModelSpec) -> int:
    """Parameters of one layer's attention, without its norm."""
    h, a, d = model.hidden, model.heads, model.head_dim
    if model.mla is not None:
        mla = model.mla
        qk_head_dim = mla.qk_nope_head_dim + mla.qk_rope_head_dim
        if mla.q_lora_rank:
            query = h * mla.q_lora_rank + mla.q_lora_rank + mla.q_lora_rank * a * qk_head_dim
        else:
            query = h * a * qk_head_dim
        down = h * (mla.kv_lora_rank + mla.qk_rope_head_dim) + mla.kv_lora_rank
        up = mla.kv_lora_rank * a * (mla.qk_nope_head_dim + mla.v_head_dim)
        return query + down + up + a * mla.v_head_dim * h
    qkv_width = (a + 2 * model.kv_heads) * d
    biases = qkv_width if model.linear_bias or model.qkv_bias else 0
    biases += h if model.linear_bias else 0
    extras = (2 * d if model.qk_norm else 0) + (a if model.attention_sinks else 0)
    return h * qkv_width + a * d * h + biases + extras


def mlp_parameters(model: ModelSpec, ffn_hidden: int, *, bias: bool) -> int:
    """Parameters of one feed-forward of inner width `ffn_hidden`."""
    matrices = 3 if model.gated_mlp else 2
    biases = ((matrices - 1) * ffn_hidden + model.hidden) if bias else 0
    return matrices * model.hidden * ffn_hidden + biases


def expert_parameters(model: ModelSpec) -> int:
    """Parameters of one routed expert of an MoE layer."""
    assert model.moe is not None
    return mlp_parameters(model, model.moe.ffn_hidden, bias=model.moe.expert_bias)


def layer_parameters(model: ModelSpec, layer: int, *, active: bool = False) -> int:
    """Parameters of layer `layer` (from 0); with `active`, those that one token meets."""
    total = attention_parameters(model)
    total += model.norms_per_layer * _norm_parameters(model, model.hidden)
    if not model.is_moe_layer(layer):
        return total + mlp_parameters(model, model.ffn_hidden, bias=model.linear_bias)
    moe = model.moe
    assert moe is not None
    router = model.hidden * moe.experts + (moe.experts if moe.expert_bias else 0)
    experts = (moe.top_k if active else moe.experts) * expert_parameters(model)
    shared = mlp_parameters(model, moe.shared_ffn_hidden, bias=False) if moe.shared_ffn_hidden else 0
    gate = model.hidden if moe.shared_gate else 0
    return total + router + experts + shared + gate


def embedding_parameters(model: ModelSpec) -> int:
    """Parameters of everything before the first layer."""
    learned_positions = model.max_seq_len if model.position == "learned" else 0
    norm = _norm_parameters(model, model.hidden) if model.embedding_norm else 0
    return (model.vocab + learned_positions) * model.hidden + norm


def head_parameters(model: ModelSpec) -> int:
    """Parameters after the last layer: the final norm, and the output matrix unless it is tied."""
    norm = _norm_parameters(model, model.hidden) if model.final_norm else 0
    return norm + (0 if model.tied_embeddings else model.vocab * model.hidden)


def num_parameters(model: ModelSpec, *, active: bool = False) -> int:
    """All parameters, tied ones once; with `active`, those that one token meets (top_k experts)."""
    layers = sum(layer_parameters(model, i, active=active) for i in range(model.layers))
    return embedding_parameters(model) + layers + head_parameters(model)
