"""Self-attention as operations on one rank: grouped-query and latent, fused and unfused, and what
context parallelism adds to it.

Letters as in the papers: s sequence, b micro-batch, h hidden, a heads, t = tp, c = cp, f = ffn_hidden,
T = b·s/c tokens of a rank, e bytes of an activation.
"""

from __future__ import annotations

import math

from parsim.cost.cell import Cell
from parsim.cost.feed_forward import linear
from parsim.cost.operation import PASSES, Attention, Elementwise, Operation, Transfer
from parsim.model import ModelSpec
from parsim.stack import Stack


def attention_operations(
    model: ModelSpec, cell: Cell, stack: Stack, window: int
) -> tuple[Operation, ...]:
    """Projections, rotary positions and the core of (grouped-query) attention."""
    h, d, e, T = model.hidden, model.head_dim, cell.activation_bytes, cell.tokens
    heads = math.ceil(model.heads / cell.tp)
    kv_heads = math.ceil(model.kv_heads / cell.tp)
    columns = (heads * d, kv_heads * d, kv_heads * d)
    qkv_width = sum(columns)
    core = _core(
        cell, stack, heads, kv_heads, d, d, window,
        qkv_bytes=T * qkv_width * e, kv_bytes=T * 2 * kv_heads * d * e,
    )  # fmt: skip
    rotated = T * (heads + kv_heads) * d * e
    passes = 2 if stack.fused_elementwise else 6
    if stack.complex_rotary:  # cast to fp32, multiplied, cast back: 2 + 4, 4 + 4, 4 + 2 bytes a value
        passes = 10
    rope = Elementwise(
        name="rotary positions", forward_bytes=passes * rotated, backward_bytes=passes * rotated
    )
    x = cell.local_tokens * h * e
    return (
        *linear("qkv", T, qkv_width, h, cell, stack, saved_bytes=x, columns=columns, after_norm=True),
        *((rope,) if model.position == "rope" else ()),
        *_keys_and_values(cell, stack, 2 * kv_heads * d),
        *core,
        *_merges(cell, stack, heads * d),
        *linear(
            "attention output",
            T,
            h,
            heads * d,
            cell,
            stack,
            saved_bytes=T * heads * d * e,
            before_residual=True,
        ),
    )


def latent_attention_operations(model: ModelSpec, cell: Cell, stack: Stack) -> tuple[Operation, ...]:
    """Multi-head latent attention as trained: latents are projected up to full heads.

    Source: DeepSeek-V2, arXiv 2405.04434, equations 37-47. The down-projections are replicated over tp.
    """
    mla = model.mla
    assert mla is not None
    h, e, T = model.hidden, cell.activation_bytes, cell.tokens
    heads = math.ceil(model.heads / cell.tp)
    qk_dim = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    kv_latent = mla.kv_lora_rank + mla.qk_rope_head_dim
    x = cell.local_tokens * h * e
    operations: tuple[Operation, ...] = ()
    if mla.q_lora_rank:
        operations += linear("query down", T, mla.q_lora_rank, h, cell, stack, saved_bytes=x)
        operations += linear(
            "query up",
            T,
            heads * qk_dim,
            mla.q_lora_rank,
            cell,
            stack,
            saved_bytes=T * mla.q_lora_rank * e,
        )
    else:
        operations += linear("query", T, heads * qk_dim, h, cell, stack, saved_bytes=x)
    operations += linear("latent down", T, kv_latent, h, cell, stack, saved_bytes=0)  # shares x
    kv_width = heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    operations += linear(
        "latent up", T, kv_width, mla.kv_lora_rank, cell, stack, saved_bytes=T * mla.kv_lora_rank * e
    )
    qkv_bytes = T * heads * (2 * qk_dim + mla.v_head_dim) * e
    assembled = Elementwise(
        name="rotary positions and concatenation",
        forward_bytes=2 * T * heads * 2 * qk_dim * e,
        backward_bytes=2 * T * heads * 2 * qk_dim * e,
    )
    core = _core(
        cell, stack, heads, heads, qk_dim, mla.v_head_dim, 0,
        qkv_bytes=qkv_bytes, kv_bytes=T * heads * (qk_dim + mla.v_head_dim) * e,
    )  # fmt: skip
    width = heads * mla.v_head_dim
    exchange = _keys_and_values(cell, stack, heads * (qk_dim + mla.v_head_dim))
    output = linear(
        "attention output", T, h, width, cell, stack, saved_bytes=T * width * e, before_residual=True
    )
    merges = _merges(cell, stack, heads * mla.v_head_dim)
    return (*operations, assembled, *exchange, *core, *merges, *output)


def _keys_and_values(cell: Cell, stack: Stack, kv_width: int) -> tuple[Transfer, ...]:
    """Context parallelism: keys and values go round the ring beside the attention they feed, or are
    gathered before it.

    Source: Liu et al. 2023 (ring attention), arXiv 2310.01889: the backward passes the gradients too.
    """
    if cell.cp == 1:
        return ()
    size = cell.tokens * cell.cp * kv_width * cell.activation_bytes
    if stack.context_exchange == "all_gather":
        return tuple(
            Transfer(name="keys and values", stream="cp", kind=kind, num_bytes=size, when=when)
            for when, kind in zip(PASSES, ("all_gather", "reduce_scatter"), strict=True)
        )
    return tuple(
        Transfer(
            name="keys and values",
            stream="cp",
            kind="all_gather",
            num_bytes=size * factor,
            when=when,
            beside="attention",
        )
        for when, factor in zip(PASSES, (1, 2), strict=True)
    )


def _merges(cell: Cell, stack: Stack, width: int) -> tuple[Elementwise, ...]:
    """Sums over the steps of a ring: each but the first reads its part of the output, or of the gradient
    of the queries, and adds it to a sum kept in fp32.

    With two chunks of the sequence a rank, one from each end, so that the causal mask gives all ranks
    the same work, half of these steps have all queries and half have half of them. Source: Transformer
    Engine's attention over point-to-point transfers.
    """
    if cell.cp == 1 or stack.context_exchange == "all_gather":
        return ()
    values = 0.75 * (cell.cp - 1) * cell.tokens * width
    moved = values * (cell.activation_bytes + 2 * 4)
    return (Elementwise(name="parts of attention", forward_bytes=moved, backward_bytes=moved),)


def _core(
    cell: Cell,
    stack: Stack,
    heads: int,
    kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    window: int,
    *,
    qkv_bytes: float,
    kv_bytes: float,
) -> tuple[Operation, ...]:
    """softmax(QKᵀ)V: one fused kernel, or two batched GEMMs around kernels over the s² scores."""
    b, s, e = cell.micro_batch, cell.seq_len, cell.activation_bytes
    queries = s // cell.cp
    scores = b * heads * queries * s
    fused = stack.attention == "flash"
    # Flash keeps a logarithm a query (fp32); else 5·b·a·s² bytes of softmax output, dropout mask and
    # dropout output stay (Korthikanti et al. 2022, section 4.1).
    kept = 4.0 * b * heads * queries if fused else scores * (e + (1 + e if stack.dropout else 0))
    if stack.context_exchange == "all_gather":
        kept += (cell.cp - 1) * kv_bytes  # other ranks' keys and values
    attention = Attention(
        batch=b,
        seq_len=s,
        context_ranks=cell.cp,
        fused=fused,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        window=window,
        saved_bytes=kept,
        qkv_bytes=qkv_bytes,
    )
    if fused:
        return (attention,)
    # Megatron-LM's scaled_upper_triang_masked_softmax reads the half under the mask and writes all.
    forward, backward = (1.5, 2.0) if stack.attention == "fused_softmax" else (6, 7)
    dropout = scores * (2 * e + 1) if stack.dropout else 0
    softmax = Elementwise(
        name="softmax",
        attention_core=True,
        forward_bytes=scores * forward * e + dropout,
        backward_bytes=scores * backward * e + dropout,
    )
    return attention, softmax
