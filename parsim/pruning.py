"""Structured pruning of a ModelSpec: whole layers, heads, feed-forward columns or experts are taken out.

What is left is an ordinary, smaller model, which every kernel runs without sparsity. Which parts of a
trained model may go is a question of its weights and is not answered here; Muralidharan et al. 2024
(Minitron), arXiv 2407.14679, section 2, gives the dimensions and the usual ways to rank them.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from parsim.errors import ParsimError
from parsim.model import ModelSpec, MoeSpec

WIDTH_UNIT = 128
"""Feed-forward widths stay multiples of what they were multiples of, up to this: tiles of a GEMM."""

Amount = float | int
"""A share of what there is (a float above 0, up to 1), or how many are left (an int)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """What pruning leaves of each dimension; None: all of it."""

    layers: Amount | None = None
    heads: Amount | None = None
    """Query heads; they go in groups with the key/value head that they share."""
    ffn: Amount | None = None
    """Inner width of the feed-forward, in mixtures of experts also that of every expert."""
    experts: Amount | None = None
    """Routed experts of each layer that has them."""
    tp: int = 1
    """Tensor-parallel ranks that must be able to share the heads and the feed-forward that are left."""


def pruned(model: ModelSpec, keep: Keep) -> ModelSpec:
    """The model with what `keep` leaves, named after its new sizes.

    Shares are rounded to the nearest legal size: heads to whole groups of grouped-query attention, the
    feed-forward to multiples of WIDTH_UNIT (or of the largest power of two in it), both to multiples of
    `keep.tp`. Numbers are taken as they are and must be legal. The hidden size and the width of a head
    stay, so every matrix of the smaller model is a part of one of the larger.

    Raises ParsimError for a share outside (0, 1], more than there is, a number that breaks groups or
    that tp does not divide, a dimension that the model lacks, and where nothing would be pruned.

    >>> llama = ModelSpec(name="x", layers=32, hidden=4096, heads=32, kv_heads=8, ffn_hidden=14336,
    ...                   gated_mlp=True, vocab=128256, max_seq_len=8192)
    >>> small = pruned(llama, Keep(layers=0.75, heads=0.75, ffn=0.5))
    >>> small.layers, small.heads, small.kv_heads, small.head_dim, small.ffn_hidden
    (24, 24, 6, 128, 7168)
    """
    if keep.tp < 1:
        raise ParsimError("ranks are counted from 1", where="tp", got=keep.tp)
    changes = _attention(model, keep) | _feed_forward(model, keep)
    if keep.layers is not None:
        changes["layers"] = _kept("layers", model.layers, keep.layers, 1)
    moe = _experts(model, keep)
    if moe != model.moe:
        changes["moe"] = moe
    small = dataclasses.replace(model, **changes)
    if small == model:
        raise ParsimError(
            "nothing is pruned", where="--prune", hint="such as layers=0.75,heads=0.75,ffn=0.5"
        )
    _check_layers(small)
    source = f"{model.name}, pruned: {_changes_text(model, small)}"
    return dataclasses.replace(small, name=_name(model, small), source=source)


def _attention(model: ModelSpec, keep: Keep) -> dict[str, Any]:
    """Heads go by groups: with fewer query heads a group would share its key and value less."""
    if keep.heads is None:
        return {}
    group = model.heads // model.kv_heads
    # Key/value heads have to be shared out over tp, as in every plan.
    heads = _kept("heads", model.heads, keep.heads, group * keep.tp)
    return {"heads": heads, "kv_heads": heads // group}


def _feed_forward(model: ModelSpec, keep: Keep) -> dict[str, Any]:
    if keep.ffn is None:
        return {}
    return {"ffn_hidden": _width("ffn", model.ffn_hidden, keep)}


def _experts(model: ModelSpec, keep: Keep) -> MoeSpec | None:
    moe = model.moe
    if moe is None:
        if keep.experts is not None:
            raise ParsimError("this model has no experts", where="experts", got=model.name)
        return None
    changes: dict[str, Any] = {}
    if keep.experts is not None:
        changes["experts"] = _kept("experts", moe.experts, keep.experts, 1)
        if changes["experts"] < moe.top_k:
            raise ParsimError(
                "every token needs its experts",
                where="experts",
                got=changes["experts"],
                expected=f"at least top_k = {moe.top_k}",
            )
    if keep.ffn is not None:
        if not isinstance(keep.ffn, float):
            raise ParsimError(
                "with experts, widths are pruned by a share",
                where="ffn",
                got=keep.ffn,
                expected="a share such as 0.5: dense layers and experts differ in width",
            )
        changes["ffn_hidden"] = _width("ffn", moe.ffn_hidden, keep)
        if moe.shared_ffn_hidden:
            changes["shared_ffn_hidden"] = _width("ffn", moe.shared_ffn_hidden, keep)
    return dataclasses.replace(moe, **changes)


def _width(key: str, there: int, keep: Keep) -> int:
    assert keep.ffn is not None
    unit = math.gcd(there, WIDTH_UNIT) if isinstance(keep.ffn, float) else 1
    return _kept(key, there, keep.ffn, math.lcm(unit, keep.tp))


def _kept(key: str, there: int, amount: Amount, multiple: int) -> int:
    """How many are left of `there`, a multiple of `multiple`."""
    if multiple > there:
        raise ParsimError(
            f"the model has too few {key} to be shared so",
            where=key,
            got=f"{there} {key}",
            expected=f"a multiple of {multiple}",
            hint="a smaller tp",
        )
    if isinstance(amount, float):
        if not 0 < amount <= 1:
            raise ParsimError(
                "a share lies above 0 and up to 1", where=key, got=amount, expected="such as 0.75"
            )
        amount = multiple * max(1, round(amount * there / multiple))
    if not 1 <= amount <= there:
        raise ParsimError(
            "pruning leaves some and adds none", where=key, got=amount, expected=f"1 to {there}"
        )
    if amount % multiple:
        raise ParsimError(
            f"what is left of the {key} must stay a multiple",
            where=key,
            got=amount,
            expected=f"a multiple of {multiple}",
            hint="whole groups of heads that share a key and value, and equal parts for every tp rank"
            if key == "heads"
            else "equal parts for every tp rank",
        )
    return amount


def _check_layers(small: ModelSpec) -> None:
    """Raises ParsimError where no layer with experts would be left of a mixture of them."""
    moe = small.moe
    if moe is not None and not any(small.is_moe_layer(i) for i in range(small.layers)):
        raise ParsimError(
            "no layer with experts would be left",
            where="layers",
            got=small.layers,
            expected=f"at least {moe.dense_layers + moe.every}",
        )


def _sizes(model: ModelSpec) -> dict[str, int]:
    sizes = {"layers": model.layers, "heads": model.heads, "ffn": model.ffn_hidden}
    if model.moe is not None:
        sizes |= {"experts": model.moe.experts, "expert ffn": model.moe.ffn_hidden}
    return sizes


def _changes_text(model: ModelSpec, small: ModelSpec) -> str:
    before, after = _sizes(model), _sizes(small)
    return ", ".join(f"{k} {before[k]} to {after[k]}" for k in before if before[k] != after[k])


def _name(model: ModelSpec, small: ModelSpec) -> str:
    """The old name and the sizes that changed: llama-3.1-8b-24-layers-24-heads."""
    before, after = _sizes(model), _sizes(small)
    parts = [f"{after[k]}-{k.replace(' ', '-')}" for k in before if before[k] != after[k]]
    return "-".join([model.name, *parts])
