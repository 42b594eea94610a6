"""A transformer's parts as operations on one rank: layer, embedding, head."""

from __future__ import annotations

import math

from parsim.cost.cell import Cell
from parsim.cost.feed_forward import (
    enter_tensor_parallel,
    leave_tensor_parallel,
    linear,
    mlp_operations,
    norm,
    residual,
    tensor_parallel,
)
from parsim.cost.moe import moe_operations
from parsim.cost.operation import Elementwise, Gemm, Operation, Transfer
from parsim.cost.self_attention import attention_operations, latent_attention_operations
from parsim.model import ModelSpec
from parsim.stack import Stack

LAYER_NORMS = (
    "attention norm",
    "feed-forward norm",
    "attention output norm",
    "feed-forward output norm",
)
"""In the order in which models have them: one that both parts share, one each, one after each too."""


def layer_operations(model: ModelSpec, layer: int, cell: Cell, stack: Stack) -> tuple[Operation, ...]:
    """Operations of layer `layer` (from 0) for one micro-batch."""
    window = model.window if model.is_window_layer(layer) else 0
    if model.mla is not None:
        attention = latent_attention_operations(model, cell, stack)
    else:
        attention = attention_operations(model, cell, stack, window)
    if model.is_moe_layer(layer):
        feed_forward = moe_operations(model, cell, stack)
    else:
        feed_forward = mlp_operations(model, model.ffn_hidden, cell, stack)
    values = cell.local_tokens * model.hidden
    norms = [norm(name, values, model, cell, stack) for name in LAYER_NORMS[: model.norms_per_layer]]
    return (
        *norms[:1],
        *enter_tensor_parallel("attention", model, cell, stack),
        *_inner_norm(model, cell, stack),
        *attention,
        *leave_tensor_parallel("attention", model, cell, stack),
        *norms[2:3],
        residual("attention residual", model, cell, stack),
        *norms[1:2],
        *feed_forward,
        *norms[3:],
        residual("feed-forward residual", model, cell, stack),
    )


def _inner_norm(model: ModelSpec, cell: Cell, stack: Stack) -> tuple[Elementwise, ...]:
    """The norm on queries and keys, or on MLA's latents, which every tp rank has whole."""
    if model.mla is not None:
        width = model.mla.q_lora_rank + model.mla.kv_lora_rank
    elif model.qk_norm:
        heads = math.ceil(model.heads / cell.tp) + math.ceil(model.kv_heads / cell.tp)
        width = heads * model.head_dim
    else:
        return ()
    return (norm("norm inside attention", cell.tokens * width, model, cell, stack),)


def mtp_operations(model: ModelSpec, cell: Cell, stack: Stack) -> tuple[Operation, ...]:
    """A module that predicts one token further: projection of state and embedding, a layer, the head.

    Source: DeepSeek-V3, arXiv 2412.19437, equations 21 to 24.
    """
    h, e, T = model.hidden, cell.activation_bytes, cell.tokens
    columns = math.ceil(h / cell.tp)
    both = 2 * cell.local_tokens * h
    return (
        norm("norms before projection", both, model, cell, stack),
        *linear("projection", T, columns, 2 * h, cell, stack, saved_bytes=both * e, after_norm=True),
        *layer_operations(model, model.layers - 1, cell, stack),
        *head_operations(model, cell, stack),
    )


def embedding_operations(model: ModelSpec, cell: Cell, stack: Stack) -> tuple[Operation, ...]:
    """Token (and learned position) lookup, vocabulary-parallel over tp, and a norm in some models."""
    h, e, T = model.hidden, cell.activation_bytes, cell.tokens
    size = T * h * e
    tables = 2 if model.position == "learned" else 1
    # A gradient that arises anew is all of the table, even where tp splits it (DTensor).
    anew = model.vocab * h * e if stack.gradients_arise_anew else 0
    lookup = Elementwise(
        name="embedding",
        forward_bytes=(1 + tables) * size,
        backward_bytes=(1 + 2 * tables) * size + anew,  # reads dy, adds to rows of the gradient
        saved_bytes=cell.local_tokens * h if stack.dropout else 0,
    )
    norms: tuple[Elementwise, ...] = ()
    if model.embedding_norm:
        norms = (norm("embedding norm", cell.local_tokens * h, model, cell, stack),)
    if cell.tp == 1:
        return (lookup, *norms)
    kind = "reduce_scatter" if cell.sequence_parallel else "all_reduce"
    transfers = [tensor_parallel("embedding output", kind, size, "forward")]
    if cell.sequence_parallel:
        transfers.append(tensor_parallel("embedding gradient", "all_gather", size, "backward"))
    return (lookup, *transfers, *norms)


def head_operations(model: ModelSpec, cell: Cell, stack: Stack) -> tuple[Operation, ...]:
    """Final norm, output matrix and cross entropy, vocabulary-parallel over tp.

    Logits are kept once for the backward: in fp32 where the loss runs in fp32, as it usually does;
    unless the stack says that more is there when the backward begins.
    """
    h, e, T = model.hidden, cell.activation_bytes, cell.tokens
    columns = math.ceil(model.vocab / cell.tp)
    logits = T * columns
    # Fused: read logits, write gradients in place. Else: a cast to fp32, max, exp, sum; and back.
    forward, backward = (2 * e, 2 * e) if stack.fused_cross_entropy else (e + 4 * 5, 4 * 2 + e)
    loss = Elementwise(
        name="cross entropy",
        forward_bytes=logits * forward,
        backward_bytes=logits * backward,
        saved_bytes=logits * max(stack.loss_peak_bytes, e if stack.fused_cross_entropy else e + 4),
    )
    enter = enter_tensor_parallel("head", model, cell, stack, fp8=False)
    reductions: tuple[Transfer, ...] = ()
    if cell.tp > 1:  # the maximum, the target's logit and the sum of exponentials of every token
        reductions = tuple(
            tensor_parallel(name, "all_reduce", 4.0 * T, "forward") for name in ("max", "target", "sum")
        )
    final_norm: tuple[Elementwise, ...] = ()
    if model.final_norm:
        final_norm = (norm("final norm", cell.local_tokens * h, model, cell, stack),)
    head = Gemm(name="head", m=T, n=columns, k=h, saved_bytes=cell.local_tokens * h * e)
    return (*final_norm, *enter, head, loss, *reductions)
