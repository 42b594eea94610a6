"""A transformer's parts as operations on one rank: layer, embedding, head."""

from __future__ import annotations

import math

from parsim.cost.cell import Cell
from parsim.cost.feed_forward import (
    enter_tensor_parallel,
    leave_tensor_parallel,
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
    return (
        norm("attention norm", model, cell, stack),
        *enter_tensor_parallel("attention", model, cell, stack),
        *attention,
        *leave_tensor_parallel("attention", model, cell),
        residual("attention residual", model, cell, stack),
        norm("feed-forward norm", model, cell, stack),
        *feed_forward,
        residual("feed-forward residual", model, cell, stack),
    )


def embedding_operations(model: ModelSpec, cell: Cell, stack: Stack) -> tuple[Operation, ...]:
    """Token (and learned position) lookup, vocabulary-parallel over tp."""
    h, e, T = model.hidden, cell.activation_bytes, cell.tokens
    size = T * h * e
    tables = 2 if model.position == "learned" else 1
    lookup = Elementwise(
        name="embedding",
        forward_bytes=(1 + tables) * size,
        backward_bytes=(1 + 2 * tables) * size,  # reads dy, adds to rows of the gradient
        saved_bytes=cell.local_tokens * h if stack.dropout else 0,
    )
    if cell.tp == 1:
        return (lookup,)
    kind = "reduce_scatter" if cell.sequence_parallel else "all_reduce"
    transfers = [tensor_parallel("embedding output", kind, size, "forward")]
    if cell.sequence_parallel:
        transfers.append(tensor_parallel("embedding gradient", "all_gather", size, "backward"))
    return (lookup, *transfers)


def head_operations(model: ModelSpec, cell: Cell, stack: Stack) -> tuple[Operation, ...]:
    """Final norm, output matrix and cross entropy, vocabulary-parallel over tp.

    Logits are kept once for the backward: in fp32 where the loss runs in fp32, as it usually does.
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
        saved_bytes=logits * (e if stack.fused_cross_entropy else e + 4),
    )
    enter = enter_tensor_parallel("head", model, cell, stack)
    reductions: tuple[Transfer, ...] = ()
    if cell.tp > 1:  # the maximum, the target's logit and the sum of exponentials of every token
        reductions = tuple(
            tensor_parallel(name, "all_reduce", 4.0 * T, "forward") for name in ("max", "target", "sum")
        )
    final_norm = (norm("final norm", model, cell, stack),) if model.final_norm else ()
    head = Gemm(name="head", m=T, n=columns, k=h, saved_bytes=cell.local_tokens * h * e)
    return (*final_norm, *enter, head, loss, *reductions)
