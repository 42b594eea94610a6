"""Structured pruning: what is left is a legal, smaller model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parsim.cli.main import run_command
from parsim.config import load_model, to_data
from parsim.cost.flops import model_flops_per_token
from parsim.errors import ParsimError
from parsim.model import num_parameters
from parsim.plan import Job, ParallelPlan
from parsim.pruning import Keep, pruned
from parsim.schedule.check import plan_problems
from parsim.shipped import shipped
from tests.builders import round_cluster

SHARES = st.one_of(st.none(), st.floats(0.05, 0.9))


def test_minitron_4b() -> None:
    """Muralidharan et al. 2024, table 5: Nemotron-4 15B pruned in width keeps its 32 layers; the shapes
    of Minitron 8B and 4B differ in embedding and heads, which stay here, and in the feed-forward.
    """
    nemotron = load_model("nemotron-4-15b")
    small = pruned(nemotron, Keep(ffn=16384))
    taken = 2 * nemotron.hidden * (nemotron.ffn_hidden - 16384) * nemotron.layers
    assert num_parameters(nemotron) - num_parameters(small) == taken


def test_parameters_of_a_layer_go_with_it() -> None:
    """An eighth of Llama's layers: attention, three matrices and two norms each."""
    llama = load_model("llama-3.1-8b")
    small = pruned(llama, Keep(layers=28))
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    assert num_parameters(llama) - num_parameters(small) == 4 * layer


def test_heads_go_with_the_key_and_value_they_share() -> None:
    llama = load_model("llama-3.1-8b")
    small = pruned(llama, Keep(heads=0.7))
    assert (small.heads, small.kv_heads, small.head_dim, small.hidden) == (24, 6, 128, 4096)
    removed = 2 * 4096 * 8 * 128 + 2 * 4096 * 2 * 128  # query and output, key and value
    assert num_parameters(llama) - num_parameters(small) == 32 * removed
    with pytest.raises(ParsimError, match="must stay a multiple"):
        pruned(llama, Keep(heads=30))


def test_what_is_left_splits_over_tp_where_that_is_asked() -> None:
    llama = load_model("llama-3.1-70b")
    assert pruned(llama, Keep(heads=0.7, ffn=0.7)).kv_heads == 6
    small = pruned(llama, Keep(heads=0.7, ffn=0.7, tp=4))
    assert (small.kv_heads, small.ffn_hidden) == (4, 157 * 128)
    job = Job(model=small, seq_len=1024, global_batch=8)
    assert not list(plan_problems(job, ParallelPlan(tp=4), round_cluster()))
    with pytest.raises(ParsimError, match="too few heads"):
        pruned(llama, Keep(heads=0.5, tp=16))


def test_mixtures_of_experts() -> None:
    mixtral = load_model("mixtral-8x7b")
    small = pruned(mixtral, Keep(experts=0.5, ffn=0.5))
    assert small.moe is not None
    assert (small.moe.experts, small.moe.top_k, small.moe.ffn_hidden) == (4, 2, 7168)
    with pytest.raises(ParsimError, match="needs its experts"):
        pruned(mixtral, Keep(experts=1))
    with pytest.raises(ParsimError, match="no layer with experts"):
        pruned(load_model("deepseek-v3"), Keep(layers=3))
    with pytest.raises(ParsimError, match="has no experts"):
        pruned(load_model("llama-3.1-8b"), Keep(experts=2))


@given(
    name=st.sampled_from(sorted(shipped("models"))), layers=SHARES, heads=SHARES, ffn=SHARES,
    tp=st.sampled_from([1, 2, 3, 4]),
)  # fmt: skip
def test_any_share_leaves_a_legal_model_that_is_smaller_and_near_it(
    name: str, layers: float | None, heads: float | None, ffn: float | None, tp: int
) -> None:
    model = load_model(name)
    try:
        small = pruned(model, Keep(layers=layers, heads=heads, ffn=ffn, tp=tp))
    except ParsimError:
        # Nothing to take, a dimension smaller than tp, or a mixture without any mixture left.
        assert tp > 1 or model.moe is not None or heads is not None or {layers, ffn} == {None}
        return
    assert 0 < num_parameters(small) < num_parameters(model)
    assert 0 < model_flops_per_token(small, 128) < model_flops_per_token(model, 128)
    assert small.heads % small.kv_heads == 0
    assert small.heads // small.kv_heads == model.heads // model.kv_heads
    assert (small.hidden, small.head_dim, small.vocab) == (model.hidden, model.head_dim, model.vocab)
    if heads is not None:
        assert small.kv_heads % tp == 0
        assert abs(small.kv_heads - max(tp, heads * model.kv_heads)) <= tp / 2 + 1e-9
    if layers is not None:
        assert abs(small.layers - max(1, layers * model.layers)) <= 0.5 + 1e-9
    if ffn is not None:
        assert small.ffn_hidden % tp == 0


@pytest.mark.parametrize("share", [0.0, 1.5, -0.5])
def test_shares_lie_between_nothing_and_all(share: float) -> None:
    with pytest.raises(ParsimError, match="share lies above 0"):
        pruned(load_model("llama-3.1-8b"), Keep(layers=share))


def test_the_command_writes_a_model_that_loads_and_simulates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "small.toml"
    command = ["models", "llama-3.1-8b", "--prune", "layers=0.75,heads=24,ffn=0.5", "-o", str(file)]
    assert run_command([*command, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    (small,) = answer["models"]
    assert answer["pruned_from"]["parameters"] > small["parameters"]
    assert answer["pruned_from"]["flops_per_token"] > small["flops_per_token"]
    loaded = load_model(str(file))
    assert to_data(loaded).items() <= small.items()
    assert loaded == replace(
        pruned(load_model("llama-3.1-8b"), Keep(layers=24, heads=24, ffn=7168)), name=loaded.name
    )
    plan = ["simulate", "--hardware", "h100-sxm-80gb", "--plan", "tp=2,pp=4", "--json"]
    times = []
    for model in (str(file), "llama-3.1-8b"):
        assert run_command([*plan, "--model", model]) == 0
        times.append(json.loads(capsys.readouterr().out)["step_time_s"])
    assert times[0] < times[1]


def test_the_command_says_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["models", "--prune", "layers=0.5"]) == 2
    assert "one model" in capsys.readouterr().err
    assert run_command(["models", "llama-3.1-8b", "--prune", "layer=0.5"]) == 2
    assert "did you mean" in capsys.readouterr().err.lower()


@pytest.mark.parametrize("layers", [0, 33])
def test_pruning_leaves_some_and_adds_none(layers: int) -> None:
    with pytest.raises(ParsimError, match="leaves some and adds none"):
        pruned(load_model("llama-3.1-8b"), Keep(layers=layers))
