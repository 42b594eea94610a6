"""Published Hugging Face configs become models with exactly the parameters of their weights.

`huggingface_configs.json` holds facts: what each repository's config.json says about the shape, and the
number of parameters in its weights (tied ones once, without multi-token prediction and routing buffers).
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parsim.config import load_model
from parsim.errors import ParsimError
from parsim.importers.huggingface import FAMILIES, model_from_config
from parsim.model import num_parameters

FACTS: dict[str, Any] = json.loads((Path(__file__).parent / "huggingface_configs.json").read_text())


def config(name: str, **changes: object) -> dict[str, Any]:
    return {**FACTS[name]["config"], **changes}


def test_every_family_has_a_published_config_here() -> None:
    assert {fact["config"]["model_type"] for fact in FACTS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", FACTS)
def test_a_published_config_has_the_parameters_of_its_weights(name: str) -> None:
    model = model_from_config(config(name), where=f"{name}.json")
    assert model.name == name
    assert num_parameters(model) == FACTS[name]["parameters"]


@pytest.mark.parametrize("name", [name for name, fact in FACTS.items() if "shipped" in fact])
def test_a_published_config_is_the_shipped_model(name: str) -> None:
    ours = load_model(FACTS[name]["shipped"])
    theirs = model_from_config(config(name), where="config.json")
    # A config tells how long a context may become; a shipped model, how long sequences of pre-training
    # were. The name and the source are each file's own.
    comparable = dataclasses.replace(
        theirs, name=ours.name, source=ours.source, max_seq_len=ours.max_seq_len
    )
    assert comparable == ours


def test_a_model_is_called_as_the_folder_of_its_config(tmp_path: Path) -> None:
    folder = tmp_path / "Llama-3.1-8B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config("llama-3.1-8b")))
    model = load_model(str(folder / "config.json"))
    assert (model.name, model.max_seq_len) == ("Llama-3.1-8B", 131072)
    assert model_from_config(config("llama-3.1-8b"), where="config.json").name == "llama"


def test_windows_and_positions_are_read() -> None:
    gemma = model_from_config(config("gemma-2-2b"), where="x.json")
    assert [gemma.is_window_layer(i) for i in range(4)] == [True, False, True, False]
    opt = model_from_config(config("opt-125m"), where="x.json")
    assert (opt.position, opt.position_rows, opt.max_seq_len) == ("learned", 2050, 2048)
    assert model_from_config(config("bloom-560m"), where="x.json").position == "alibi"
    qwen = config("qwen2.5-7b", use_sliding_window=True, max_window_layers=0, sliding_window=512)
    assert model_from_config(qwen, where="x.json").window == 512
    assert model_from_config(config("qwen2.5-7b"), where="x.json").window == 0
    one_in_three = ["sliding_attention", "full_attention", "full_attention"] * 12
    model = model_from_config(config("gpt-oss-120b", layer_types=one_in_three), where="x.json")
    assert (model.window, model.window_every) == (128, 3)


def test_experts_after_dense_layers_are_read() -> None:
    qwen = config("qwen3-30b-a3b", mlp_only_layers=[0, 1], decoder_sparse_step=2)
    model = model_from_config(qwen, where="x.json")
    # transformers: layer i has experts where (i + 1) % 2 == 0 and i is not in mlp_only_layers
    assert [i for i in range(8) if model.is_moe_layer(i)] == [3, 5, 7]


def test_a_missing_key_is_named_and_all_are_named_at_once() -> None:
    broken = config("llama-2-7b")
    del broken["hidden_size"], broken["vocab_size"]
    with pytest.raises(ParsimError) as caught:
        model_from_config(broken, where="zoo/config.json")
    text = str(caught.value)
    assert "2 problems" in text
    assert "hidden_size: field required" in text
    assert "vocab_size: field required" in text
    assert caught.value.where == "zoo/config.json"


def test_a_key_that_goes_by_two_names_is_asked_for_when_both_are_missing() -> None:
    broken = config("bloom-560m")
    del broken["n_embed"]
    with pytest.raises(ParsimError, match="hidden_size"):
        model_from_config(broken, where="x.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("hidden_size", 10**15),
        ("vocab_size", 0),
        ("num_attention_heads", -32),
        ("intermediate_size", math.nan),
        ("intermediate_size", 11008.0),
        ("max_position_embeddings", "4096"),
        ("num_key_value_heads", True),
        ("tie_word_embeddings", "yes"),
        ("hidden_size", None),
    ],
)
def test_a_size_that_cannot_be_is_refused_by_its_key(key: str, value: object) -> None:
    with pytest.raises(ParsimError, match=f"{key}: .*, got "):
        model_from_config(config("llama-2-7b", **{key: value}), where="x.json")


def test_a_shape_that_the_model_itself_refuses_names_the_file() -> None:
    with pytest.raises(ParsimError, match="kv_heads must divide heads") as caught:
        model_from_config(config("llama-2-7b", num_key_value_heads=5), where="x.json")
    assert caught.value.where == "x.json: kv_heads"


def test_an_unknown_family_lists_the_known_and_suggests_the_nearest() -> None:
    with pytest.raises(ParsimError) as caught:
        model_from_config({"model_type": "lama"}, where="x.json")
    assert caught.value.hint == "did you mean 'llama'?"
    assert caught.value.expected is not None
    assert all(family in caught.value.expected for family in FAMILIES)


@pytest.mark.parametrize("data", [None, [], "llama", 7, {}, {"model_type": 3}, {"model_type": None}])
def test_what_is_no_config_is_refused(data: object) -> None:
    with pytest.raises(ParsimError):
        model_from_config(data, where="x.json")


@pytest.mark.parametrize(
    ("name", "changes", "key"),
    [
        ("opt-125m", {"word_embed_proj_dim": 512}, "word_embed_proj_dim"),
        ("opt-125m", {"do_layer_norm_before": False}, "do_layer_norm_before"),
        ("llama-3.1-8b", {"attention_bias": True}, "attention_bias"),
        ("qwen3-8b", {"attention_bias": True}, "attention_bias"),
        ("deepseek-v3", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("qwen3-30b-a3b", {"mlp_only_layers": [3]}, "mlp_only_layers"),
        ("qwen2.5-7b", {"use_sliding_window": True, "max_window_layers": 8}, "max_window_layers"),
        ("gpt-oss-20b", {"layer_types": ["full_attention", "sliding_attention"] * 12}, "layer_types"),
    ],
)
def test_what_a_model_cannot_say_is_refused(name: str, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ParsimError) as caught:
        model_from_config(config(name, **changes), where="x.json")
    assert key in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(data=st.data(), value=JSON)
def test_any_value_of_any_key_gives_a_model_or_an_explanation(data: st.DataObject, value: Any) -> None:
    name = data.draw(st.sampled_from(sorted(FACTS)))
    key = data.draw(st.sampled_from(sorted(FACTS[name]["config"])))
    parameters, problem = 0, ""
    try:
        parameters = num_parameters(model_from_config(config(name, **{key: value}), where="x.json"))
    except ParsimError as error:
        problem = str(error)
    assert parameters > 0 or "x.json" in problem
