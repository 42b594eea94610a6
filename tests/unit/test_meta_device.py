"""Parameter counts against real torch modules on the meta device.

The modules below are written from the papers' definitions with the sizes as literals; they share nothing
with parsim's formulas. On the meta device a module has shapes but no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from parsim.config import load_model
from parsim.model import (
    ModelSpec,
    embedding_parameters,
    head_parameters,
    layer_parameters,
    num_parameters,
)

torch = pytest.importorskip("torch", reason="needs torch for modules on the meta device")
nn = torch.nn


def count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def linear(inputs: int, outputs: int, *, bias: bool = False) -> Any:
    return nn.Linear(inputs, outputs, bias=bias)


def weight(*shape: int) -> Any:
    return nn.Parameter(torch.empty(*shape))


class GroupedAttention(nn.Module):  # type: ignore[name-defined,misc]
    """Ainslie et al. 2023 (arXiv 2305.13245): query heads share key and value heads in groups."""

    def __init__(
        self, hidden: int, heads: int, kv_heads: int, head_dim: int, *, bias: bool = False
    ) -> None:
        super().__init__()
        self.query = linear(hidden, heads * head_dim, bias=bias)
        self.key = linear(hidden, kv_heads * head_dim, bias=bias)
        self.value = linear(hidden, kv_heads * head_dim, bias=bias)
        self.output = linear(heads * head_dim, hidden, bias=bias)


class LatentAttention(nn.Module):  # type: ignore[name-defined,misc]
    """DeepSeek-V2 (arXiv 2405.04434) section 2.1 and appendix C."""

    def __init__(
        self, hidden: int, heads: int, q_rank: int, kv_rank: int, nope: int, rope: int, value: int
    ) -> None:
        super().__init__()
        if q_rank:
            self.query_down = linear(hidden, q_rank)
            self.query_norm = nn.RMSNorm(q_rank)
        self.query_up = linear(q_rank or hidden, heads * (nope + rope))
        self.latent_down = linear(hidden, kv_rank)
        self.latent_norm = nn.RMSNorm(kv_rank)
        self.key_rope = linear(hidden, rope)
        self.key_up = linear(kv_rank, heads * nope)
        self.value_up = linear(kv_rank, heads * value)
        self.output = linear(heads * value, hidden)


class SwiGlu(nn.Module):  # type: ignore[name-defined,misc]
    """Shazeer 2020 (arXiv 2002.05202)."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate = linear(hidden, inner)
        self.up = linear(hidden, inner)
        self.down = linear(inner, hidden)


class Experts(nn.Module):  # type: ignore[name-defined,misc]
    """Routed SwiGLU experts, stacked as one tensor a matrix, and an optional shared one."""

    def __init__(
        self, hidden: int, experts: int, inner: int, *, shared: int = 0, bias: bool = False
    ) -> None:
        super().__init__()
        self.router = linear(hidden, experts, bias=bias)
        self.gate_and_up = weight(experts, hidden, 2 * inner)
        self.down = weight(experts, inner, hidden)
        if bias:
            self.gate_and_up_bias = weight(experts, 2 * inner)
            self.down_bias = weight(experts, hidden)
        if shared:
            self.shared = SwiGlu(hidden, shared)


class Block(nn.Module):  # type: ignore[name-defined,misc]
    """Pre-norm attention and feed-forward."""

    def __init__(self, hidden: int, attention: Any, feed_forward: Any, **extras: Any) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.attention, self.feed_forward = attention, feed_forward
        for name, extra in extras.items():
            setattr(self, name, extra)


def llama_3_1_8b(_: int) -> Any:
    return Block(4096, GroupedAttention(4096, 32, 8, 128), SwiGlu(4096, 14336))


def llama_3_1_405b(_: int) -> Any:
    return Block(16384, GroupedAttention(16384, 128, 8, 128), SwiGlu(16384, 53248))


def gpt3_175b(_: int) -> Any:
    # torch's own encoder layer holds exactly GPT's weights: biases in all four linears, two layer norms.
    return nn.TransformerEncoderLayer(12288, 96, dim_feedforward=49152, norm_first=True)


def bloom_176b(_: int) -> Any:
    return nn.TransformerEncoderLayer(14336, 112, dim_feedforward=57344, norm_first=True)


def mixtral_8x7b(_: int) -> Any:
    return Block(4096, GroupedAttention(4096, 32, 8, 128), Experts(4096, 8, 14336))


def qwen3_30b_a3b(_: int) -> Any:
    norms = {"query_norm": nn.RMSNorm(128), "key_norm": nn.RMSNorm(128)}
    return Block(2048, GroupedAttention(2048, 32, 4, 128), Experts(2048, 128, 768), **norms)


def gpt_oss_120b(_: int) -> Any:
    attention = GroupedAttention(2880, 64, 8, 64, bias=True)
    return Block(2880, attention, Experts(2880, 128, 2880, bias=True), sinks=weight(64))


def llama_4_maverick(layer: int) -> Any:
    odd = layer % 2 == 1
    feed_forward = Experts(5120, 128, 8192, shared=8192) if odd else SwiGlu(5120, 16384)
    return Block(5120, GroupedAttention(5120, 40, 8, 128), feed_forward)


def deepseek_v3(layer: int) -> Any:
    feed_forward = SwiGlu(7168, 18432) if layer < 3 else Experts(7168, 256, 2048, shared=2048)
    return Block(7168, LatentAttention(7168, 128, 1536, 512, 128, 64, 128), feed_forward)


# name, layer, before the layers, after them (the head is listed where it is not tied)
CASES = [
    ("llama-3.1-8b", llama_3_1_8b, [(128256, 4096)], [(4096,), (128256, 4096)]),
    ("llama-3.1-405b", llama_3_1_405b, [(128256, 16384)], [(16384,), (128256, 16384)]),
    ("gpt3-175b", gpt3_175b, [(51200, 12288), (2048, 12288)], [(2, 12288)]),
    ("bloom-176b", bloom_176b, [(250880, 14336), (2, 14336)], [(2, 14336)]),
    ("mixtral-8x7b", mixtral_8x7b, [(32000, 4096)], [(4096,), (32000, 4096)]),
    ("qwen3-30b-a3b", qwen3_30b_a3b, [(151936, 2048)], [(2048,), (151936, 2048)]),
    ("gpt-oss-120b", gpt_oss_120b, [(201088, 2880)], [(2880,), (201088, 2880)]),
    ("llama-4-maverick-400b", llama_4_maverick, [(202048, 5120)], [(5120,), (202048, 5120)]),
    ("deepseek-v3", deepseek_v3, [(129280, 7168)], [(7168,), (129280, 7168)]),
]


@pytest.mark.parametrize(("name", "build", "before", "after"), CASES, ids=[case[0] for case in CASES])
def test_a_model_of_torch_modules_has_as_many_parameters(
    name: str, build: Callable[[int], Any], before: list[tuple[int, ...]], after: list[tuple[int, ...]]
) -> None:
    model = load_model(name)
    with torch.device("meta"):
        ends = [nn.ParameterList(weight(*shape) for shape in shapes) for shapes in (before, after)]
        layers = [build(i) for i in range(model.layers)]
    assert (embedding_parameters(model), head_parameters(model)) == (count(ends[0]), count(ends[1]))
    for i, layer in enumerate(layers):
        assert layer_parameters(model, i) == count(layer), f"layer {i}"
    assert num_parameters(model) == sum(map(count, [*ends, *layers]))


def test_latent_attention_without_a_query_latent() -> None:
    """DeepSeek-V2-Lite projects queries directly (arXiv 2405.04434 appendix B)."""
    v3 = load_model("deepseek-v3")
    assert v3.mla is not None
    mla = replace(v3.mla, q_lora_rank=0)
    lite = replace(v3, hidden=2048, heads=16, kv_heads=16, ffn_hidden=10944, mla=mla)
    with torch.device("meta"):
        layer = Block(2048, LatentAttention(2048, 16, 0, 512, 128, 64, 128), SwiGlu(2048, 10944))
    assert layer_parameters(lite, 0) == count(layer)


@pytest.mark.parametrize("norm_bias", [True, False])
def test_layer_norms_with_and_without_bias(norm_bias: bool) -> None:
    """MPT strips every bias, those of its norms too."""
    model = ModelSpec(
        name="mpt", layers=1, hidden=64, heads=8, ffn_hidden=256, gated_mlp=False, vocab=100,
        max_seq_len=32, norm="layernorm", norm_bias=norm_bias, position="alibi",
    )  # fmt: skip
    with torch.device("meta"):
        layer = nn.ModuleList([linear(64, 3 * 64), linear(64, 64), linear(64, 256), linear(256, 64)])
        layer.extend(nn.LayerNorm(64, bias=norm_bias) for _ in range(2))
    assert layer_parameters(model, 0) == count(layer)
