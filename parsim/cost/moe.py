"""A mixture-of-experts feed-forward as operations on one rank.

ep·expert_tp regroups the dp·cp·tp ranks of a stage; each holds 1/expert_tp of experts/ep experts and
routes its own tokens, T/tp of them, to top_k experts. Routing is balanced. With expert_tp > 1 the ranks
that share an expert gather their tokens after the dispatch and sum their results before the combine.
Sources: Lepikhin et al. 2020 (GShard), arXiv 2006.16668; Rajbhandari et al. 2022, arXiv 2201.05596;
Megatron-Core, megatron/core/transformer/moe/token_dispatcher.py.
"""

from __future__ import annotations

import math
from dataclasses import replace

from parsim.cost.cell import Cell
from parsim.cost.feed_forward import activation, mlp_operations, tensor_parallel
from parsim.cost.operation import PASSES, Elementwise, Gemm, Operation, Transfer
from parsim.hardware import DTYPE_BYTES
from parsim.model import ModelSpec, MoeSpec
from parsim.stack import Stack

PADDED_TOKENS = 32
"""An expert's tokens are padded to a multiple of this: in the weight gradient they are the rows that
tensor cores read, and one scale covers 32 of them (Transformer Engine, GroupedLinear)."""


def moe_operations(model: ModelSpec, cell: Cell, stack: Stack) -> tuple[Operation, ...]:
    """Router, dispatch, experts, combine, and the experts that every token visits."""
    moe = model.moe
    assert moe is not None
    h, e = model.hidden, cell.activation_bytes
    tokens = cell.tokens // cell.tp
    moved = float(tokens * moe.top_k * h * e)
    combine = Elementwise(
        name="combine",
        forward_bytes=tokens * h * e + moved,
        backward_bytes=tokens * h * e + 2 * moved,
        saved_bytes=moved,
        routed=True,
    )
    shared: tuple[Operation, ...] = ()
    if moe.shared_ffn_hidden:
        shared = mlp_operations(model, moe.shared_ffn_hidden, cell, stack)
    return (
        *_router(moe, tokens, h, e),
        _copy("permute", tokens * h * e + moved),
        *_exchange("dispatch", moe, cell, moved),
        *_share("dispatched tokens", "all_gather", "reduce_scatter", cell, moved),
        *_sort("sort", moe, cell, stack, moved),
        *_experts(model, cell, stack, tokens * moe.top_k * cell.expert_tp),
        *_sort("unsort", moe, cell, stack, moved),
        *_share("expert results", "reduce_scatter", "all_gather", cell, moved),
        *_exchange("combine", moe, cell, moved),
        combine,
        *shared,
    )


def _router(moe: MoeSpec, tokens: int, h: int, e: int) -> tuple[Operation, ...]:
    """Scores of all experts, softmax and top-k in fp32."""
    return (
        Gemm(name="router", m=tokens, n=moe.experts, k=h, saved_bytes=tokens * h * e),
        Elementwise(
            name="routing",
            forward_bytes=4.0 * tokens * moe.experts * 4,
            backward_bytes=4.0 * tokens * moe.experts * 3,
            saved_bytes=4.0 * tokens * moe.experts,
        ),
    )


def _copy(name: str, num_bytes: float) -> Elementwise:
    """A permutation of tokens, and back in the backward."""
    return Elementwise(name=name, forward_bytes=num_bytes, backward_bytes=num_bytes, routed=True)


def _sort(name: str, moe: MoeSpec, cell: Cell, stack: Stack, moved: float) -> tuple[Elementwise, ...]:
    """An all-to-all leaves tokens in the order of their senders: they are sorted by local expert."""
    if stack.moe_dispatch != "all_to_all" or cell.ep * cell.expert_tp == 1 or moe.experts == cell.ep:
        return ()
    return (_copy(name, 2 * moved * cell.expert_tp),)


def _exchange(name: str, moe: MoeSpec, cell: Cell, num_bytes: float) -> tuple[Transfer, ...]:
    """All-to-all of the routed tokens, there in the forward and back in the backward."""
    if cell.ep == 1:
        return ()
    return tuple(
        Transfer(
            name=name,
            stream="ep",
            kind="all_to_all",
            num_bytes=num_bytes,
            top_k=moe.top_k,
            when=when,
        )
        for when in PASSES
    )


def _share(name: str, forward: str, backward: str, cell: Cell, num_bytes: float) -> tuple[Transfer, ...]:
    """Between the ranks that share an expert: each has tokens of its own, and a part of the weights."""
    if cell.expert_tp == 1:
        return ()
    whole = num_bytes * cell.expert_tp
    return (
        tensor_parallel(name, forward, whole, "forward"),
        tensor_parallel(name, backward, whole, "backward"),
    )


def _experts(model: ModelSpec, cell: Cell, stack: Stack, routed: int) -> tuple[Operation, ...]:
    """The local experts as grouped products; every rank receives as many tokens as it sends."""
    moe = model.moe
    assert moe is not None
    h, e, f = model.hidden, cell.activation_bytes, math.ceil(moe.ffn_hidden / cell.expert_tp)
    local = max(1, moe.experts // cell.ep)
    each = PADDED_TOKENS * math.ceil(routed / local / PADDED_TOKENS)
    columns = 2 * f if model.gated_mlp else f
    narrow = DTYPE_BYTES[cell.precision] if cell.low_precision else e
    operations: list[Operation] = []
    if cell.low_precision and not stack.fused_experts:
        operations.append(
            Elementwise(
                name="expert casts",
                forward_bytes=routed * (h + f) * (e + 2 * narrow),
                backward_bytes=routed * (columns + h) * (e + 2 * narrow),
                routed=True,
            )
        )
    fc1, fc2 = (
        Gemm(
            name=name,
            m=each,
            n=n,
            k=k,
            batch=local,
            low_precision=True,
            expert=True,
            saved_bytes=routed * k * narrow,
        )
        for name, n, k in (("expert fc1", columns, h), ("expert fc2", h, f))
    )
    act = activation(routed, f, model, cell, stack)
    if stack.fused_experts:
        return fc1, replace(act, forward_bytes=0.0, backward_bytes=0.0), fc2
    return (*operations, fc1, act, fc2, *_bias(moe, routed * h))


def _bias(moe: MoeSpec, values: int) -> tuple[Elementwise, ...]:
    """Biases of fc2 times the tokens' probabilities, added expert by expert and put together again.

    Probabilities are fp32, and so is every sum until the last cast: TEGroupedMLP of Megatron-Core,
    _apply_bias. Bytes a value: forward product 4, sum 2 + 4 + 4, joining 4 + 4, cast 4 + 2; backward
    casts 6 + 6, products with bias and with probability 8 each, and their sums 4 each.
    """
    if not moe.expert_bias:
        return ()
    size = float(values)
    return (
        Elementwise(name="expert bias", forward_bytes=28 * size, backward_bytes=36 * size, routed=True),
    )
