"""Shipped models have the parameter counts that their papers and weights publish."""

import dataclasses
from pathlib import Path

import pytest

from parsim.config import load_model
from parsim.errors import ParsimError
from parsim.model import (
    MlaSpec,
    ModelSpec,
    MoeSpec,
    embedding_parameters,
    num_parameters,
)
from parsim.shipped import shipped

# Exact, from the headers of the released weights (rotary tables and routing buffers left out).
PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "mpt-7b": 6_649_286_656,
    "bloom-176b": 176_247_271_424,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "deepseek-v3": 671_026_404_352,
    "gpt-oss-120b": 116_829_156_672,
}

# Rounded to one decimal of a billion: Narayanan et al. 2021 (arXiv 2104.04473), table 1.
NARAYANAN_BILLIONS = (1.7, 3.6, 7.5, 18.4, 39.1, 76.1, 145.6, 310.1, 529.6, 1008.0)

# In the words of the source, with the digits it gives.
ROUNDED_BILLIONS = {
    "gpt3-175b": (174.6, 1),
    "megatron-22b": (22, 0),
    "megatron-530b": (530, 0),
    "megatron-1t": (1008, 0),
    "mpt-30b": (30, 0),
    "nemotron-4-15b": (15.6, 1),
    "nemotron-4-340b": (341, 0),
    "kimi-k2": (1026, 0),
    "llama-4-maverick-400b": (400.7, 1),
}


@pytest.mark.parametrize("name", shipped("models"))
def test_a_shipped_model_loads_under_its_file_name_and_says_where_it_is_from(name: str) -> None:
    model = load_model(name)
    assert model.name == name
    assert len(model.source) > 10
    assert model.max_seq_len % 64 == 0


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_parameters_are_exactly_those_of_the_released_weights(name: str, parameters: int) -> None:
    assert num_parameters(load_model(name)) == parameters


@pytest.mark.parametrize("billions", NARAYANAN_BILLIONS)
def test_parameters_round_to_narayanan_table_1(billions: float) -> None:
    model = load_model(f"gpt-{billions:g}b")
    assert round(num_parameters(model) / 1e9, 1) == billions
    # Equation 2, which leaves out the final norm's 2·h.
    l, h, V, s = model.layers, model.hidden, model.vocab, model.max_seq_len  # noqa: E741
    assert num_parameters(model) == 12 * l * h**2 + 13 * l * h + (V + s) * h + 2 * h


@pytest.mark.parametrize(("name", "rounded"), ROUNDED_BILLIONS.items())
def test_parameters_round_to_the_published_figure(name: str, rounded: tuple[float, int]) -> None:
    billions, digits = rounded
    assert round(num_parameters(load_model(name)) / 1e9, digits) == billions


def test_grok_1_has_314_billion_parameters_in_its_layers() -> None:
    model = load_model("grok-1-314b")
    assert num_parameters(model) - embedding_parameters(model) == pytest.approx(314e9, rel=0.005)


def test_active_parameters_are_those_of_the_sources() -> None:
    # Mixtral counts the embedding (arXiv 2401.04088: "13B active"), the gpt-oss card does not
    # (arXiv 2508.10925 table 1: 5.13B); DeepSeek-V3 says 37B (arXiv 2412.19437).
    assert num_parameters(load_model("mixtral-8x7b"), active=True) == 12_879_925_248
    oss = load_model("gpt-oss-120b")
    active = num_parameters(oss, active=True) - embedding_parameters(oss)
    assert round(active / 1e9, 2) == 5.13
    v3 = load_model("deepseek-v3")
    assert round((num_parameters(v3, active=True) - embedding_parameters(v3)) / 1e9) == 37
    assert round(num_parameters(load_model("qwen3-235b-a22b"), active=True) / 1e9) == 22


def test_families_without_a_shipped_model_count_exactly() -> None:
    gpt = ModelSpec(
        name="gpt2", layers=12, hidden=768, heads=12, ffn_hidden=3072, gated_mlp=False, vocab=50257,
        max_seq_len=1024, tied_embeddings=True, norm="layernorm", position="learned", linear_bias=True,
    )  # fmt: skip
    assert num_parameters(gpt) == 124_439_808
    opt = dataclasses.replace(gpt, vocab=50272, max_seq_len=2048, position_rows=2050)
    assert num_parameters(opt) == 125_239_296
    neox = dataclasses.replace(
        gpt, layers=44, hidden=6144, heads=64, kv_heads=64, head_dim=96, ffn_hidden=24576, vocab=50432,
        tied_embeddings=False, position="rope",
    )  # fmt: skip
    assert num_parameters(neox) == 20_554_567_680
    falcon = ModelSpec(
        name="falcon-7b", layers=32, hidden=4544, heads=71, kv_heads=1, ffn_hidden=4 * 4544,
        gated_mlp=False, vocab=65024, max_seq_len=2048, tied_embeddings=True, norm="layernorm",
        norms_per_layer=1,
    )  # fmt: skip
    assert num_parameters(falcon) == 6_921_720_704


@pytest.mark.parametrize("name", [n for n in shipped("models") if "tiny" in n])
def test_a_tiny_model_can_be_split_eight_ways_and_trained_on_a_cpu(name: str) -> None:
    model = load_model(name)
    assert model.moe is None
    assert model.layers >= 8
    assert model.kv_heads % 4 == 0
    assert model.heads % 8 == model.ffn_hidden % 8 == model.vocab % 8 == 0
    assert 5e6 < num_parameters(model) < 30e6


def test_layers_are_of_the_kind_that_the_papers_say() -> None:
    v3 = load_model("deepseek-v3")
    assert [v3.is_moe_layer(i) for i in range(5)] == [False, False, False, True, True]
    maverick = load_model("llama-4-maverick-400b")
    assert [i for i in range(6) if maverick.is_moe_layer(i)] == [1, 3, 5]
    oss = load_model("gpt-oss-120b")
    assert [i for i in range(6) if oss.is_window_layer(i)] == [0, 2, 4]
    assert all(load_model("mistral-7b").is_window_layer(i) for i in range(32))
    assert [load_model(n).attention_kind for n in ("gpt3-175b", "llama-3.1-8b", "deepseek-v3")] == [
        "MHA", "GQA", "MLA",
    ]  # fmt: skip
    assert v3.head_dim == 128 + 64


DENSE = {"name": "x", "layers": 2, "hidden": 64, "heads": 8, "ffn_hidden": 96, "gated_mlp": True}
DENSE |= {"vocab": 100, "max_seq_len": 32}
MLA = MlaSpec(kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"layers": 0}, "layers"),
        ({"layers": 10**9}, "layers"),
        ({"hidden": 10**12, "head_dim": 8}, "hidden"),
        ({"vocab": -1}, "vocab"),
        ({"kv_heads": -8}, "kv_heads"),
        ({"kv_heads": 3}, "kv_heads"),
        ({"kv_heads": 16}, "kv_heads"),
        ({"heads": 7}, "heads"),
        ({"window": -1}, "window"),
        ({"window": 8, "window_every": 0}, "window_every"),
        ({"norms_per_layer": -1}, "norms_per_layer"),
        ({"mla": MLA, "head_dim": 8}, "head_dim"),
        ({"mla": MLA, "kv_heads": 2}, "kv_heads"),
        ({"mla": MLA, "linear_bias": True}, "linear_bias"),
    ],
)
def test_an_impossible_shape_is_refused_by_its_key(change: dict[str, object], where: str) -> None:
    ModelSpec(**DENSE)  # type: ignore[arg-type]
    with pytest.raises(ParsimError) as caught:
        ModelSpec(**(DENSE | change))  # type: ignore[arg-type]
    assert caught.value.where == where


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"top_k": 0}, "top_k"),
        ({"top_k": 9}, "top_k"),
        ({"experts": 0}, "experts"),
        ({"every": 0}, "every"),
        ({"shared_ffn_hidden": -4}, "shared_ffn_hidden"),
    ],
)
def test_impossible_experts_are_refused_by_their_key(change: dict[str, int], where: str) -> None:
    with pytest.raises(ParsimError) as caught:
        MoeSpec(**({"experts": 8, "top_k": 2, "ffn_hidden": 16} | change))  # type: ignore[arg-type]
    assert caught.value.where == where


def test_a_file_with_impossible_experts_is_refused_by_file_and_key(tmp_path: Path) -> None:
    path = tmp_path / "giant.toml"
    text = shipped("models")["mixtral-8x7b"].read_text().replace("top_k = 2", "top_k = 9")
    path.write_text(text)
    with pytest.raises(ParsimError, match=r"moe\.top_k") as caught:
        load_model(str(path))
    assert caught.value.where == str(path)
