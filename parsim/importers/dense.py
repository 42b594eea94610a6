"""Families without experts, each as its config.json names its sizes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import AliasChoices, Field

from parsim.errors import ParsimError
from parsim.importers.base import Count, Family, Layers, LayerTypes, LlamaLike, Size, window_fields


class Llama(LlamaLike):
    """Llama 1 to 3 (arXiv 2302.13971, 2407.21783) and the many that took over its config."""

    num_key_value_heads: Size | None = None
    attention_bias: bool = False
    mlp_bias: bool = False

    def shape(self) -> dict[str, Any]:
        if self.attention_bias != self.mlp_bias:
            raise ParsimError(
                "biases in attention alone or in the feed-forward alone are not supported",
                where="attention_bias",
                got=self.attention_bias,
                expected=f"{self.mlp_bias}, as mlp_bias",
            )
        return super().shape() | {"linear_bias": self.attention_bias}


class Mistral(LlamaLike):
    """Mistral 7B and NeMo (arXiv 2310.06825): every layer slides where there is a window."""

    sliding_window: Size | None = 4096

    def shape(self) -> dict[str, Any]:
        return super().shape() | window_fields(self.sliding_window, None, every=1)


class QwenWindow(LlamaLike):
    """Qwen's sliding window: off unless asked for, and then only in layers from max_window_layers on."""

    use_sliding_window: bool = False
    sliding_window: Size | None = 4096
    max_window_layers: Count = 28

    def shape(self) -> dict[str, Any]:
        if not self.use_sliding_window or self.max_window_layers >= self.num_hidden_layers:
            return super().shape()
        if self.max_window_layers > 0:
            raise ParsimError(
                "a sliding window in the upper layers alone is not supported",
                where="max_window_layers",
                got=self.max_window_layers,
                expected=f"0, or at least num_hidden_layers ({self.num_hidden_layers})",
            )
        return super().shape() | window_fields(self.sliding_window, None, every=1)


class Qwen2(QwenWindow):
    """Qwen2 and 2.5 (arXiv 2412.15115): biases in the query, key and value projections."""

    def shape(self) -> dict[str, Any]:
        return super().shape() | {"qkv_bias": True}


class Qwen3(QwenWindow):
    """Qwen3 (arXiv 2505.09388): norms on queries and keys instead of biases."""

    attention_bias: Literal[False] = False
    head_dim: Size | None = 128

    def shape(self) -> dict[str, Any]:
        return super().shape() | {"qk_norm": True}


class Gemma(LlamaLike):
    """Gemma (arXiv 2403.08295): heads wider than hidden / heads, tied embeddings."""

    attention_bias: Literal[False] = False
    head_dim: Size | None = 256
    tie_word_embeddings: bool = True


class Gemma2(Gemma):
    """Gemma 2 (arXiv 2408.00118): norms before and after, every other layer slides."""

    sliding_window: Size | None = 4096
    layer_types: LayerTypes | None = None

    def shape(self) -> dict[str, Any]:
        window = window_fields(self.sliding_window, self.layer_types, every=2)
        return super().shape() | {"norms_per_layer": 4} | window


class Gpt2(Family):
    """GPT-2 (Radford et al. 2019)."""

    n_layer: Layers
    n_embd: Size
    n_head: Size
    n_inner: Size | None = None
    n_positions: Size
    vocab_size: Size
    tie_word_embeddings: bool = True

    def shape(self) -> dict[str, Any]:
        return {
            "layers": self.n_layer,
            "hidden": self.n_embd,
            "heads": self.n_head,
            "ffn_hidden": self.n_inner or 4 * self.n_embd,
            "gated_mlp": False,
            "vocab": self.vocab_size,
            "max_seq_len": self.n_positions,
            "tied_embeddings": self.tie_word_embeddings,
            "norm": "layernorm",
            "position": "learned",
            "linear_bias": True,
        }


class GptNeox(Family):
    """GPT-NeoX-20B (arXiv 2204.06745) and Pythia; each half of the layer keeps a norm of its own."""

    num_hidden_layers: Layers
    hidden_size: Size
    num_attention_heads: Size
    intermediate_size: Size
    vocab_size: Size
    max_position_embeddings: Size
    tie_word_embeddings: bool = False
    attention_bias: Literal[True] = True

    def shape(self) -> dict[str, Any]:
        return {
            "layers": self.num_hidden_layers,
            "hidden": self.hidden_size,
            "heads": self.num_attention_heads,
            "ffn_hidden": self.intermediate_size,
            "gated_mlp": False,
            "vocab": self.vocab_size,
            "max_seq_len": self.max_position_embeddings,
            "tied_embeddings": self.tie_word_embeddings,
            "norm": "layernorm",
            "linear_bias": True,
        }


class Opt(Family):
    """OPT (arXiv 2205.01068), save the 350M model, which norms after and embeds narrower."""

    num_hidden_layers: Layers
    hidden_size: Size
    num_attention_heads: Size
    ffn_dim: Size
    vocab_size: Size
    max_position_embeddings: Size
    word_embed_proj_dim: Size | None = None
    do_layer_norm_before: Literal[True] = True
    enable_bias: Literal[True] = True
    layer_norm_elementwise_affine: Literal[True] = True
    tie_word_embeddings: bool = True

    def shape(self) -> dict[str, Any]:
        if self.word_embed_proj_dim not in (None, self.hidden_size):
            raise ParsimError(
                "an embedding narrower than the model is not supported",
                where="word_embed_proj_dim",
                got=self.word_embed_proj_dim,
                expected=f"hidden_size ({self.hidden_size})",
            )
        return {
            "layers": self.num_hidden_layers,
            "hidden": self.hidden_size,
            "heads": self.num_attention_heads,
            "ffn_hidden": self.ffn_dim,
            "gated_mlp": False,
            "vocab": self.vocab_size,
            "max_seq_len": self.max_position_embeddings,
            "tied_embeddings": self.tie_word_embeddings,
            "norm": "layernorm",
            "position": "learned",
            # The first two rows are kept for padding, as in fairseq.
            "position_rows": self.max_position_embeddings + 2,
            "linear_bias": True,
        }


class Bloom(Family):
    """BLOOM (arXiv 2211.05100); its sizes go by two sets of names."""

    n_layer: Layers = Field(validation_alias=AliasChoices("n_layer", "num_hidden_layers"))
    hidden_size: Size = Field(validation_alias=AliasChoices("hidden_size", "n_embed"))
    n_head: Size = Field(validation_alias=AliasChoices("n_head", "num_attention_heads"))
    vocab_size: Size
    seq_length: Size = 2048
    """Every BLOOM was trained with 2,048 tokens (table 3), and not every config says so."""
    tie_word_embeddings: bool = True

    def shape(self) -> dict[str, Any]:
        return {
            "layers": self.n_layer,
            "hidden": self.hidden_size,
            "heads": self.n_head,
            "ffn_hidden": 4 * self.hidden_size,
            "gated_mlp": False,
            "vocab": self.vocab_size,
            "max_seq_len": self.seq_length,
            "tied_embeddings": self.tie_word_embeddings,
            "norm": "layernorm",
            "position": "alibi",
            "linear_bias": True,
            "embedding_norm": True,
        }


class Falcon(Family):
    """Falcon (arXiv 2311.16867): 7B shares one key/value head and one norm, 40B and 180B have more."""

    num_hidden_layers: Layers = Field(validation_alias=AliasChoices("num_hidden_layers", "n_layer"))
    hidden_size: Size
    num_attention_heads: Size = Field(validation_alias=AliasChoices("num_attention_heads", "n_head"))
    num_kv_heads: Size | None = None
    ffn_hidden_size: Size | None = None
    vocab_size: Size
    max_position_embeddings: Size = 2048
    alibi: bool = False
    bias: bool = False
    multi_query: bool = True
    new_decoder_architecture: bool = False
    num_ln_in_parallel_attn: Literal[1, 2] | None = None
    parallel_attn: bool = True
    tie_word_embeddings: bool = True

    def shape(self) -> dict[str, Any]:
        if self.new_decoder_architecture:
            kv_heads = self.num_kv_heads or self.num_attention_heads
            norms = self.num_ln_in_parallel_attn or 2
        else:
            kv_heads = 1 if self.multi_query else self.num_attention_heads
            norms = 1 if self.parallel_attn else 2
        return {
            "layers": self.num_hidden_layers,
            "hidden": self.hidden_size,
            "heads": self.num_attention_heads,
            "kv_heads": kv_heads,
            "ffn_hidden": self.ffn_hidden_size or 4 * self.hidden_size,
            "gated_mlp": False,
            "vocab": self.vocab_size,
            "max_seq_len": self.max_position_embeddings,
            "tied_embeddings": self.tie_word_embeddings,
            "norm": "layernorm",
            "position": "alibi" if self.alibi else "rope",
            "linear_bias": self.bias,
            "norms_per_layer": norms,
        }
