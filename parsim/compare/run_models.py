"""The model of a measured run, from the shape in its row.

A table of runs gives layers, widths and heads. The rest of the architecture (tied embeddings, norms,
positions, biases, shared experts, latent attention) comes from the shipped model of the same shape, or
else from the shipped model with the nearest vocabulary, as a tokenizer tells the family.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from parsim.config import load_model
from parsim.model import ModelSpec, MoeSpec
from parsim.shipped import shipped

_PADDED = 1.1
"""Vocabularies within this factor are one vocabulary and its padding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What the columns of a row say of a model; 0 for what they leave out."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn_hidden: int
    """Inner width of the dense feed-forward, or of one routed expert."""
    gated_mlp: bool
    vocab: int
    experts: int
    top_k: int


def shipped_models() -> tuple[ModelSpec, ...]:
    """Every shipped model, in order of name."""
    return tuple(load_model(name) for name in shipped("models"))


def model_of(shape: Shape, seq_len: int, known: Sequence[ModelSpec]) -> tuple[ModelSpec, list[str]]:
    """The model of a shape, and what was assumed of it."""
    same = _same_shape(shape, known)
    if same is not None:
        model, assumed = _adapt(shape, same)
    else:
        model, assumed = _from_columns(shape, known)
    return replace(model, max_seq_len=max(seq_len, model.max_seq_len)), assumed


def _same_shape(shape: Shape, known: Sequence[ModelSpec]) -> ModelSpec | None:
    """The shipped model with the widths of a shape: its layers or its experts may be fewer."""
    candidates = [model for model in known if _same_widths(shape, model)]

    def distance(model: ModelSpec) -> tuple[bool, bool, float]:
        moe = model.moe
        other_experts = moe is not None and (moe.experts, moe.top_k) != (shape.experts, shape.top_k)
        return other_experts, model.layers != shape.layers, _vocab_distance(shape, model)

    return min(candidates, key=distance, default=None)


def _same_widths(shape: Shape, model: ModelSpec) -> bool:
    ffn_hidden = model.ffn_hidden if model.moe is None else model.moe.ffn_hidden
    kv_heads = shape.kv_heads or (model.kv_heads if model.mla is not None else shape.heads)
    # The same widths are common; with another tokenizer it is another family.
    same_family = model.moe is not None or _vocab_distance(shape, model) < math.log(_PADDED)
    return (
        (model.hidden, model.heads, model.kv_heads) == (shape.hidden, shape.heads, kv_heads)
        and (ffn_hidden, model.gated_mlp) == (shape.ffn_hidden, shape.gated_mlp)
        and (model.moe is not None) == bool(shape.experts)
        and same_family
    )


def _vocab_distance(shape: Shape, model: ModelSpec) -> float:
    return abs(math.log(shape.vocab / model.vocab))


def _adapt(shape: Shape, model: ModelSpec) -> tuple[ModelSpec, list[str]]:
    """A shipped model with the layers, experts and vocabulary of a row."""
    changes = []
    if model.layers != shape.layers:
        changes.append(f"{shape.layers} layers")
    moe = model.moe
    if moe is not None and (moe.experts, moe.top_k) != (shape.experts, shape.top_k):
        moe = replace(moe, experts=shape.experts, top_k=shape.top_k)
        changes.append(f"{shape.experts} experts, {shape.top_k} a token")
    adapted = replace(model, name=shape.name, layers=shape.layers, vocab=shape.vocab, moe=moe)
    if "w/o MTP" in shape.name and model.mtp_layers:
        adapted = replace(adapted, mtp_layers=0)
        changes.append("no multi-token prediction")
    text = f"architecture of {model.name}" + (f" with {' and '.join(changes)}" if changes else "")
    return adapted, [text]


def _from_columns(shape: Shape, known: Sequence[ModelSpec]) -> tuple[ModelSpec, list[str]]:
    """A model of no shipped shape; a family gives what is not in the columns."""
    relatives = [model for model in known if model.gated_mlp == shape.gated_mlp and model.mla is None]
    family = min(relatives, key=lambda model: _vocab_distance(shape, model))
    moe = None
    if shape.experts:
        moe = MoeSpec(experts=shape.experts, top_k=shape.top_k, ffn_hidden=shape.ffn_hidden)
    model = ModelSpec(
        name=shape.name,
        layers=shape.layers,
        hidden=shape.hidden,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        ffn_hidden=shape.ffn_hidden,
        gated_mlp=shape.gated_mlp,
        vocab=shape.vocab,
        max_seq_len=1,
        tied_embeddings=family.tied_embeddings,
        norm=family.norm,
        norm_bias=family.norm_bias,
        position=family.position,
        linear_bias=family.linear_bias,
        embedding_norm=family.embedding_norm,
        moe=moe,
    )
    return model, list(_assumptions(shape, family))


def _assumptions(shape: Shape, family: ModelSpec) -> Iterator[str]:
    yield f"embeddings, norms, positions and biases as in {family.name}"
    if not shape.kv_heads:
        yield f"kv_heads not stated: as many as heads, {shape.heads}"
    if shape.experts:
        yield "no shared experts and no dense layers"
