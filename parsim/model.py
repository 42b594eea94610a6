"""ModelSpec: the shape of a decoder-only transformer, and how many parameters it has.

Standard library only: the executor's workers import it where nothing but torch is installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from parsim.errors import ParsimError
from parsim.units import require_range

Norm = Literal["rmsnorm", "layernorm"]
Position = Literal["rope", "learned", "alibi", "none"]

MAX_LAYERS = 1024
MAX_EXPERTS = 1_000_000
MAX_SIZE = 2**31
"""Far above any published shape: what lies beyond is a slip of the pen, and loops over it would hang."""


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
    """Of the layers after those, each `every`-th is MoE and the rest are dense (Llama 4 Maverick: 2)."""
    router_bias: bool = False
    """One extra value an expert, as in DeepSeek-V3's loss-free balancing (a buffer, not counted)."""
    expert_bias: bool = False
    """Experts and router have additive biases (gpt-oss)."""
    shared_gate: bool = False
    """A learned gate scales the shared expert's output (Qwen2-MoE)."""

    def __post_init__(self) -> None:
        require_range(self, 1, MAX_SIZE, "experts", "top_k", "ffn_hidden", "every")
        require_range(self, 0, MAX_SIZE, "shared_ffn_hidden", "dense_layers")
        require_range(self, 1, MAX_EXPERTS, "experts")
        if self.top_k > self.experts:
            raise ParsimError(
                "top_k must lie between 1 and the number of experts",
                where="top_k",
                got=self.top_k,
                expected=f"at most {self.experts}",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaSpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    kv_lora_rank: int
    q_lora_rank: int = 0
    """0: queries are projected directly."""
    qk_nope_head_dim: int
    """Width of the part of a query or key head that carries no position."""
    qk_rope_head_dim: int
    """Width of the rotated part; the key's is shared by all heads."""
    v_head_dim: int

    def __post_init__(self) -> None:
        require_range(self, 1, MAX_SIZE, "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
        require_range(self, 0, MAX_SIZE, "q_lora_rank", "qk_rope_head_dim")


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
    """Width of a query or key head; 0 in a file means hidden / heads, and with MLA its two parts."""
    ffn_hidden: int
    """Inner width of the dense feed-forward."""
    gated_mlp: bool
    """True: three matrices (SwiGLU, GeGLU); False: two."""
    vocab: int
    max_seq_len: int
    """Tokens the model was trained for; the default sequence length of a Job."""
    tied_embeddings: bool = False
    norm: Norm = "rmsnorm"
    norm_bias: bool = True
    """A layernorm adds a bias to its gain (MPT: not); an rmsnorm never does."""
    position: Position = "rope"
    position_rows: int = 0
    """Rows of the table of learned positions; 0: max_seq_len (OPT has two more)."""
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
    """The first of each `window_every` layers slides, the rest are full (gpt-oss, Gemma 2: 2)."""
    moe: MoeSpec | None = None
    mla: MlaSpec | None = None
    mtp_layers: int = 0
    """Modules that predict one token further each, trained beside the model (DeepSeek-V3, arXiv
    2412.19437, section 2.2): a projection, a layer, and the model's own head again. Parameters and FLOPs
    of the model do not count them, as its own figures do not."""
    source: str = ""
    """Where the shape was published."""

    def __post_init__(self) -> None:
        require_range(self, 1, MAX_LAYERS, "layers")
        require_range(self, 1, MAX_SIZE, "hidden", "heads", "ffn_hidden", "vocab", "max_seq_len")
        require_range(self, 1, MAX_SIZE, "window_every")
        require_range(self, 0, MAX_SIZE, "kv_heads", "head_dim", "position_rows", "window")
        require_range(self, 0, 1, "mtp_layers")
        require_range(self, 0, 4, "norms_per_layer")
        if self.kv_heads == 0:
            object.__setattr__(self, "kv_heads", self.heads)
        if self.head_dim == 0:
            object.__setattr__(self, "head_dim", self._default_head_dim())
        if self.heads % self.kv_heads:
            raise ParsimError(
                "kv_heads must divide heads",
                where="kv_heads",
                got=self.kv_heads,
                expected=f"a divisor of {self.heads}",
            )
        if self.mla is not None:
            self._check_mla()

    def _default_head_dim(self) -> int:
        if self.mla is not None:
            return self.mla.qk_nope_head_dim + self.mla.qk_rope_head_dim
        if self.hidden % self.heads:
            raise ParsimError(
                "heads must divide hidden unless head_dim is given",
                where="heads",
                got=f"hidden {self.hidden}, heads {self.heads}",
            )
        return self.hidden // self.heads

    def _check_mla(self) -> None:
        assert self.mla is not None
        width = self.mla.qk_nope_head_dim + self.mla.qk_rope_head_dim
        if self.head_dim != width:
            raise ParsimError(
                "with MLA head_dim is qk_nope_head_dim + qk_rope_head_dim",
                where="head_dim",
                got=self.head_dim,
                expected=str(width),
            )
        if self.kv_heads != self.heads:
            raise ParsimError(
                "with MLA every query head has its own key and value",
                where="kv_heads",
                got=self.kv_heads,
                expected=str(self.heads),
            )
        for key in ("linear_bias", "qkv_bias", "qk_norm", "attention_sinks"):
            if getattr(self, key):
                raise ParsimError("MLA is modelled without this", where=key, got=True)

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
    return width * (2 if model.norm == "layernorm" and model.norm_bias else 1)


def _latent_attention_parameters(model: ModelSpec, mla: MlaSpec) -> int:
    """Parameters of multi-head latent attention with the norms of its two latents.

    Source: arXiv 2405.04434, equations 9 to 19: W^DQ, W^UQ and W^QR, W^DKV and W^KR, W^UK and W^UV, W^O.
    """
    h, a = model.hidden, model.heads
    query = (mla.q_lora_rank or h) * a * model.head_dim
    up = mla.kv_lora_rank * a * (mla.qk_nope_head_dim + mla.v_head_dim)
    return _latent_down_parameters(model, mla) + query + up + a * mla.v_head_dim * h


def _latent_down_parameters(model: ModelSpec, mla: MlaSpec) -> int:
    """W^DQ, W^DKV and W^KR, and the norms of the two latents."""
    latents = mla.q_lora_rank + mla.kv_lora_rank
    return model.hidden * (latents + mla.qk_rope_head_dim) + latents


def attention_parameters(model: ModelSpec) -> int:
    """Parameters of one layer's attention, without the norm before it."""
    if model.mla is not None:
        return _latent_attention_parameters(model, model.mla)
    h, a, d = model.hidden, model.heads, model.head_dim
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
    total = attention_parameters(model) + _layer_norm_parameters(model)
    if not model.is_moe_layer(layer):
        return total + mlp_parameters(model, model.ffn_hidden, bias=model.linear_bias)
    moe = model.moe
    assert moe is not None
    experts = (moe.top_k if active else moe.experts) * expert_parameters(model)
    shared = 0
    if moe.shared_ffn_hidden:
        shared = mlp_parameters(model, moe.shared_ffn_hidden, bias=moe.expert_bias)
    return total + _router_parameters(model, moe) + experts + shared


def _layer_norm_parameters(model: ModelSpec) -> int:
    """The norms of width `hidden` of one layer."""
    return model.norms_per_layer * _norm_parameters(model, model.hidden)


def _router_parameters(model: ModelSpec, moe: MoeSpec) -> int:
    """The router and the gate of the shared expert."""
    biases = moe.experts if moe.expert_bias else 0
    return model.hidden * (moe.experts + moe.shared_gate) + biases


def replicated_layer_parameters(model: ModelSpec, layer: int) -> int:
    """Of layer_parameters those that every tensor-parallel rank holds whole.

    Norms, biases after a sum over the ranks, MLA's down-projections, the router with the shared expert's
    gate. Everything else but the routed experts is cut by columns, rows or heads: Shoeybi et al. 2019,
    arXiv 1909.08053, section 3.
    """
    total = _layer_norm_parameters(model) + (2 * model.head_dim if model.qk_norm else 0)
    total += model.hidden if model.linear_bias else 0
    if model.mla is not None:
        total += _latent_down_parameters(model, model.mla)
    moe = model.moe
    if moe is None or not model.is_moe_layer(layer):
        return total + (model.hidden if model.linear_bias else 0)
    shared_bias = model.hidden if moe.shared_ffn_hidden and moe.expert_bias else 0
    return total + _router_parameters(model, moe) + shared_bias


def mtp_parameters(model: ModelSpec) -> int:
    """Parameters of a module that predicts one token further: its layer, projection and two norms.

    Source: DeepSeek-V3, arXiv 2412.19437, equations 21 to 23; embedding and head are the model's.
    """
    own = 2 * model.hidden * model.hidden + 2 * _norm_parameters(model, model.hidden)
    return layer_parameters(model, model.layers - 1) + own


def embedding_parameters(model: ModelSpec) -> int:
    """Parameters of everything before the first layer."""
    return model.vocab * model.hidden + replicated_embedding_parameters(model)


def replicated_embedding_parameters(model: ModelSpec) -> int:
    """Of embedding_parameters those that tensor parallelism does not cut: positions and the norm."""
    positions = (model.position_rows or model.max_seq_len) if model.position == "learned" else 0
    norm = _norm_parameters(model, model.hidden) if model.embedding_norm else 0
    return positions * model.hidden + norm


def head_parameters(model: ModelSpec) -> int:
    """Parameters after the last layer: the final norm, and the output matrix unless it is tied."""
    matrix = 0 if model.tied_embeddings else model.vocab * model.hidden
    return matrix + replicated_head_parameters(model)


def replicated_head_parameters(model: ModelSpec) -> int:
    """Of head_parameters those that tensor parallelism does not cut: the final norm."""
    return _norm_parameters(model, model.hidden) if model.final_norm else 0


def num_parameters(model: ModelSpec, *, active: bool = False) -> int:
    """All parameters, tied ones once; with `active`, those that one token meets (top_k experts).

    For GPT-3's family it is 12·l·h²·(1 + 13/(12·h) + (V + s)/(12·l·h)), arXiv 2104.04473 equation 2,
    and the final norm's 2·h, which that equation leaves out.

    >>> gpt2 = ModelSpec(name="gpt2", layers=12, hidden=768, heads=12, ffn_hidden=3072, gated_mlp=False,
    ...                  vocab=50257, max_seq_len=1024, tied_embeddings=True, norm="layernorm",
    ...                  position="learned", linear_bias=True)
    >>> num_parameters(gpt2)
    124439808
    """
    layers = sum(layer_parameters(model, i, active=active) for i in range(model.layers))
    return embedding_parameters(model) + layers + head_parameters(model)
