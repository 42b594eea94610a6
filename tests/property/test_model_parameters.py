"""A model never shrinks when one of its sizes grows, and no token meets more of it than there is."""

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from parsim.model import MlaSpec, ModelSpec, MoeSpec, layer_parameters, num_parameters

sizes = st.integers(1, 512)

mixtures = st.builds(
    lambda top_k, more, **rest: MoeSpec(top_k=top_k, experts=top_k + more, **rest),
    top_k=st.integers(1, 8),
    more=st.integers(0, 64),
    ffn_hidden=sizes,
    shared_ffn_hidden=st.integers(0, 64),
    dense_layers=st.integers(0, 4),
    every=st.integers(1, 3),
    expert_bias=st.booleans(),
    shared_gate=st.booleans(),
)
latents = st.builds(
    MlaSpec,
    kv_lora_rank=sizes,
    q_lora_rank=st.integers(0, 64),
    qk_nope_head_dim=sizes,
    qk_rope_head_dim=st.integers(0, 64),
    v_head_dim=sizes,
)

maybe_mixtures: st.SearchStrategy[MoeSpec | None] = st.none() | mixtures
maybe_latents: st.SearchStrategy[MlaSpec | None] = st.none() | latents


@st.composite
def models(
    draw: st.DrawFn,
    moe: st.SearchStrategy[MoeSpec | None] = maybe_mixtures,
    mla: st.SearchStrategy[MlaSpec | None] = maybe_latents,
) -> ModelSpec:
    latent = draw(mla)
    groups, per_group = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    flags = ["gated_mlp", "tied_embeddings", "embedding_norm", "final_norm", "norm_bias"]
    attention_flags = ["linear_bias", "qkv_bias", "qk_norm", "attention_sinks"]
    on: dict[str, Any] = {flag: draw(st.booleans()) for flag in flags}
    on |= {flag: latent is None and draw(st.booleans()) for flag in attention_flags}
    return ModelSpec(
        name="any",
        layers=draw(st.integers(1, 12)),
        hidden=draw(sizes),
        heads=groups * per_group,
        kv_heads=0 if latent else groups,
        head_dim=0 if latent else draw(sizes),
        ffn_hidden=draw(sizes),
        vocab=draw(sizes),
        max_seq_len=draw(sizes),
        norm=draw(st.sampled_from(["rmsnorm", "layernorm"])),
        position=draw(st.sampled_from(["rope", "learned", "alibi", "none"])),
        norms_per_layer=draw(st.sampled_from([1, 2, 4])),
        moe=draw(moe),
        mla=latent,
        **on,
    )


@settings(deadline=None)
@given(models())
def test_one_more_layer_row_or_column_is_more_parameters(model: ModelSpec) -> None:
    before = num_parameters(model)
    for key in ("layers", "hidden", "vocab"):
        assert num_parameters(replace(model, **{key: getattr(model, key) + 1})) > before, key
    longer = num_parameters(replace(model, max_seq_len=model.max_seq_len + 1))
    assert longer - before == (model.hidden if model.position == "learned" else 0)


@settings(deadline=None)
@given(models(mla=st.none()))
def test_more_or_wider_heads_are_more_parameters(model: ModelSpec) -> None:
    before = num_parameters(model)
    assert num_parameters(replace(model, heads=2 * model.heads)) > before
    assert num_parameters(replace(model, head_dim=model.head_dim + 1)) > before
    assert num_parameters(replace(model, heads=2 * model.heads, kv_heads=2 * model.kv_heads)) > before
    every_head = replace(model, kv_heads=model.heads)
    assert (num_parameters(every_head) > before) == (model.kv_heads < model.heads)


@settings(deadline=None)
@given(models())
def test_a_wider_dense_feed_forward_counts_where_there_are_dense_layers(model: ModelSpec) -> None:
    dense = any(not model.is_moe_layer(i) for i in range(model.layers))
    wider = num_parameters(replace(model, ffn_hidden=model.ffn_hidden + 1))
    assert (wider > num_parameters(model)) == dense


@settings(deadline=None)
@given(models(moe=mixtures))
def test_more_or_wider_experts_count_where_there_are_moe_layers(model: ModelSpec) -> None:
    assert model.moe is not None
    moe_layers = sum(model.is_moe_layer(i) for i in range(model.layers))
    for key in ("experts", "ffn_hidden", "shared_ffn_hidden"):
        larger = replace(model, moe=replace(model.moe, **{key: getattr(model.moe, key) + 1}))
        assert (num_parameters(larger) > num_parameters(model)) == (moe_layers > 0), key


@settings(deadline=None)
@given(models(mla=latents))
def test_wider_latents_are_more_parameters(model: ModelSpec) -> None:
    assert model.mla is not None
    widths = ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
    widths += ["q_lora_rank"] if model.mla.q_lora_rank else []
    for key in widths:
        wider = replace(model.mla, **{key: getattr(model.mla, key) + 1})
        larger = replace(model, mla=wider, head_dim=0)
        assert num_parameters(larger) > num_parameters(model), key


@settings(deadline=None)
@given(models())
def test_a_token_meets_at_most_every_parameter_and_all_of_a_dense_model(model: ModelSpec) -> None:
    active, total = num_parameters(model, active=True), num_parameters(model)
    assert active <= total
    idle = model.moe is not None and model.moe.top_k < model.moe.experts
    has_moe_layers = any(model.is_moe_layer(i) for i in range(model.layers))
    assert (active == total) == (not (idle and has_moe_layers))


@settings(deadline=None)
@given(models(moe=mixtures), st.integers(0, 11))
def test_experts_beyond_top_k_change_what_is_held_but_not_what_is_met(
    model: ModelSpec, layer: int
) -> None:
    assert model.moe is not None
    no_router_bias = replace(model.moe, expert_bias=False)
    small = replace(model, moe=no_router_bias)
    large = replace(model, moe=replace(no_router_bias, experts=model.moe.experts + 1))
    met = [layer_parameters(m, layer, active=True) for m in (small, large)]
    # Only the router's row for the new expert is met by every token.
    assert met[1] - met[0] == (model.hidden if model.is_moe_layer(layer) else 0)
