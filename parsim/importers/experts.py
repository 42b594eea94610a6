"""Families with experts, each as its config.json names its sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field

from parsim.errors import ParsimError
from parsim.importers.base import Count, LayerTypes, LlamaLike, Size, window_fields
from parsim.importers.dense import Mistral, Qwen2, Qwen3
from parsim.model import MlaSpec, MoeSpec


class Mixtral(Mistral):
    """Mixtral (arXiv 2401.04088): intermediate_size is one expert's."""

    sliding_window: Size | None = None
    num_local_experts: Size
    num_experts_per_tok: Size

    def shape(self) -> dict[str, Any]:
        moe = MoeSpec(
            experts=self.num_local_experts,
            top_k=self.num_experts_per_tok,
            ffn_hidden=self.intermediate_size,
        )
        return super().shape() | {"moe": moe}


class QwenExperts(LlamaLike):
    """The keys that Qwen's two MoE families share."""

    num_experts: Size
    num_experts_per_tok: Size
    moe_intermediate_size: Size
    decoder_sparse_step: Size = 1
    mlp_only_layers: Annotated[tuple[Count, ...], Field(strict=False)] = ()

    def dense_layers(self) -> int:
        """Leading layers without experts; refuses those that lie elsewhere."""
        dense = len(self.mlp_only_layers)
        leading = sorted(self.mlp_only_layers) == list(range(dense))
        # Layer i holds experts where (i + 1) % decoder_sparse_step == 0; ModelSpec counts from the last
        # leading dense layer, which is the same only where the step divides their number.
        if not leading or dense % self.decoder_sparse_step:
            raise ParsimError(
                "dense layers other than the first ones are not supported",
                where="mlp_only_layers",
                got=self.mlp_only_layers,
                expected="an empty list, or [0, 1, …] in whole steps of decoder_sparse_step",
            )
        return dense


class Qwen2Moe(Qwen2, QwenExperts):
    """Qwen1.5- and Qwen2-MoE (arXiv 2407.10671): a shared expert behind a gate of its own."""

    shared_expert_intermediate_size: Size

    def shape(self) -> dict[str, Any]:
        moe = MoeSpec(
            experts=self.num_experts,
            top_k=self.num_experts_per_tok,
            ffn_hidden=self.moe_intermediate_size,
            shared_ffn_hidden=self.shared_expert_intermediate_size,
            dense_layers=self.dense_layers(),
            every=self.decoder_sparse_step,
            shared_gate=True,
        )
        return super().shape() | {"moe": moe}


class Qwen3Moe(Qwen3, QwenExperts):
    """Qwen3 30B-A3B and 235B-A22B (arXiv 2505.09388)."""

    head_dim: Size | None = None

    def shape(self) -> dict[str, Any]:
        moe = MoeSpec(
            experts=self.num_experts,
            top_k=self.num_experts_per_tok,
            ffn_hidden=self.moe_intermediate_size,
            dense_layers=self.dense_layers(),
            every=self.decoder_sparse_step,
        )
        return super().shape() | {"moe": moe}


class GptOss(LlamaLike):
    """gpt-oss (arXiv 2508.10925): biases everywhere, attention sinks, every other layer slides."""

    attention_bias: Literal[True] = True
    head_dim: Size | None = 64
    num_local_experts: Size
    num_experts_per_tok: Size = Field(
        validation_alias=AliasChoices("num_experts_per_tok", "experts_per_token")
    )
    sliding_window: Size | None = 128
    layer_types: LayerTypes | None = None

    def shape(self) -> dict[str, Any]:
        moe = MoeSpec(
            experts=self.num_local_experts,
            top_k=self.num_experts_per_tok,
            ffn_hidden=self.intermediate_size,
            expert_bias=True,
        )
        window = window_fields(self.sliding_window, self.layer_types, every=2)
        own = {"moe": moe, "linear_bias": True, "attention_sinks": True}
        return super().shape() | own | window


class DeepseekV2(LlamaLike):
    """DeepSeek-V2 and its Lite version (arXiv 2405.04434)."""

    num_key_value_heads: Size | None = None
    attention_bias: Literal[False] = False
    kv_lora_rank: Size
    q_lora_rank: Size | None
    qk_nope_head_dim: Size
    qk_rope_head_dim: Size
    v_head_dim: Size
    n_routed_experts: Size
    n_shared_experts: Count | None
    num_experts_per_tok: Size
    moe_intermediate_size: Size
    first_k_dense_replace: Count
    moe_layer_freq: Literal[1] = 1
    num_nextn_predict_layers: Count = 0

    def moe(self) -> MoeSpec:
        """The experts; shared ones are as wide as routed ones."""
        return MoeSpec(
            experts=self.n_routed_experts,
            top_k=self.num_experts_per_tok,
            ffn_hidden=self.moe_intermediate_size,
            shared_ffn_hidden=(self.n_shared_experts or 0) * self.moe_intermediate_size,
            dense_layers=self.first_k_dense_replace,
        )

    def shape(self) -> dict[str, Any]:
        mla = MlaSpec(
            kv_lora_rank=self.kv_lora_rank,
            q_lora_rank=self.q_lora_rank or 0,
            qk_nope_head_dim=self.qk_nope_head_dim,
            qk_rope_head_dim=self.qk_rope_head_dim,
            v_head_dim=self.v_head_dim,
        )
        # transformers writes the rotated part's width as head_dim; here it follows from the two parts.
        own = {"mla": mla, "moe": self.moe(), "kv_heads": 0, "head_dim": 0}
        own["mtp_layers"] = self.num_nextn_predict_layers
        return super().shape() | own


class DeepseekV3(DeepseekV2):
    """DeepSeek-V3 (arXiv 2412.19437) and Kimi K2: routing balanced by a bias instead of a loss."""

    topk_method: str = "noaux_tc"

    def moe(self) -> MoeSpec:
        return replace(super().moe(), router_bias=self.topk_method == "noaux_tc")
