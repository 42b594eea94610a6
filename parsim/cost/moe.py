"""A mixture-of-experts feed-forward as operations on one rank.

ep regroups the dp·cp·tp ranks of a stage; each holds experts/ep whole experts (no tensor parallelism
inside an expert) and routes its own tokens, T/tp of them, to top_k experts. Routing is balanced.
Source: Lepikhin et al. 2020 (GShard), arXiv 2006.16668; Rajbhandari et al. 2022, arXiv 2201.05596.
"""

from __future__ import annotations

import math

from parsim.cost.cell import Cell
from parsim.cost.feed_forward import activation, mlp_operations
from parsim.cost.operation import PASSES, Elementwise, Gemm, Operation, Transfer
from parsim.hardware import DTYPE_BYTES
from parsim.model import ModelSpec
from parsim.stack import Stack


def moe_operations(model: ModelSpec, cell: Cell, stack: Stack) -> tuple[Operation, ...]:
    """Router, dispatch, experts, combine, and the experts that every token visits."""
    moe = model.moe
    assert moe is not None
    h, e = model.hidden, cell.activation_bytes
    tokens = cell.tokens // cell.tp
    routed = tokens * moe.top_k
    router = (
        Gemm(name="router", m=tokens, n=moe.experts, k=h, saved_bytes=tokens * h * e),
        # softmax and top-k in fp32
        Elementwise(
            name="routing",
            forward_bytes=4.0 * tokens * moe.experts * 4,
            backward_bytes=4.0 * tokens * moe.experts * 3,
            saved_bytes=4.0 * tokens * moe.experts,
        ),
    )
    moved = routed * h * e
    permute = Elementwise(
        name="permute",
        forward_bytes=tokens * h * e + moved,
        backward_bytes=tokens * h * e + moved,
    )
    combine = Elementwise(
        name="combine",
        forward_bytes=tokens * h * e + moved,
        backward_bytes=tokens * h * e + 2 * moved,
        saved_bytes=moved,
    )
    shared: tuple[Operation, ...] = ()
    if moe.shared_ffn_hidden:
        shared = mlp_operations(model, moe.shared_ffn_hidden, cell, stack)
    return (
        *router,
        permute,
        *_exchange("dispatch", cell, moved),
        *_experts(model, cell, stack, routed),
        *_exchange("combine", cell, moved),
        combine,
        *shared,
    )


def _exchange(name: str, cell: Cell, num_bytes: float) -> tuple[Transfer, ...]:
    """All-to-all of the routed tokens, there in the forward and back in the backward."""
    if cell.ep == 1:
        return ()
    return tuple(
        Transfer(name=name, stream="ep", kind="all_to_all", num_bytes=num_bytes, when=when)
        for when in PASSES
    )


def _experts(model: ModelSpec, cell: Cell, stack: Stack, routed: int) -> tuple[Operation, ...]:
    """The local experts as grouped GEMMs; every rank receives as many tokens as it sends."""
    moe = model.moe
    assert moe is not None
    h, e, f = model.hidden, cell.activation_bytes, moe.ffn_hidden
    local = max(1, moe.experts // cell.ep)
    each = math.ceil(routed / local)
    columns = 2 * f if model.gated_mlp else f
    narrow = DTYPE_BYTES[cell.precision] if cell.low_precision else e
    operations: list[Operation] = []
    if cell.low_precision:
        operations.append(
            Elementwise(
                name="expert casts",
                forward_bytes=routed * (h + f) * (e + 2 * narrow),
                backward_bytes=routed * (columns + h) * (e + 2 * narrow),
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
            saved_bytes=routed * k * narrow,
        )
        for name, n, k in (("expert fc1", columns, h), ("expert fc2", h, f))
    )
    return (*operations, fc1, activation(routed, f, model.gated_mlp, cell, stack), fc2)
