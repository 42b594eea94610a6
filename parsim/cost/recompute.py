"""What the backward runs again, and what is kept from the forward instead."""

from __future__ import annotations

from typing import Literal

from parsim.cost.cell import Cell
from parsim.cost.operation import Attention, Elementwise, Gemm, Operation, Transfer
from parsim.stack import SelectiveRecompute, Stack

Recomputed = Literal["nothing", "everything"] | SelectiveRecompute


def recomputed(cell: Cell, stack: Stack) -> Recomputed:
    """What a plan's recompute setting means under a stack."""
    if cell.recompute == "selective":
        return stack.selective_recompute
    return "everything" if cell.recompute == "full" else "nothing"


def recomputed_shares(
    operations: tuple[Operation, ...], what: Recomputed, *, stops_early: bool = False
) -> tuple[float, ...]:
    """The share of each operation's forward that the backward runs again.

    attention_core: softmax(QKᵀ)V with all that belongs to it (Korthikanti et al. 2022, arXiv 2205.05198,
    section 5); with context parallelism also its ring, as keys and values are kept of this rank alone.
    every_other_gemm: the second, fourth … matrix product of a layer and everything that is
    none, but neither attention nor reductions over tp (torchtitan, activation_checkpoint.py).
    everything may stop early: with the last operation that leaves something for the backward.
    """
    if what == "everything":
        needed = _needed(operations) if stops_early else len(operations)
        return tuple(float(i < needed) for i in range(len(operations)))
    if what == "nothing":
        return (0.0,) * len(operations)
    if what == "attention_core":
        return tuple(float(_in_attention_core(op)) for op in operations)
    shares = []
    products = 0
    for op in operations:
        if isinstance(op, Gemm):
            columns = op.columns or (op.n,)
            shares.append(sum(columns[(products + 1) % 2 :: 2]) / sum(columns))
            products += len(columns)
        elif isinstance(op, Transfer):
            shares.append(float(op.stream == "tp" and op.kind == "all_gather"))
        else:
            shares.append(float(isinstance(op, Elementwise)))
    return tuple(shares)


def _needed(operations: tuple[Operation, ...]) -> int:
    """How many operations must run for all that the backward reads: a product leaves only its input."""
    last = max(
        i for i, op in enumerate(operations) if not isinstance(op, Transfer) and op.saved_bytes > 0
    )
    return last if isinstance(operations[last], Gemm) else last + 1


def _in_attention_core(op: Operation) -> bool:
    if isinstance(op, Elementwise):
        return op.attention_core
    if isinstance(op, Transfer):
        return op.stream == "cp" and op.when == "forward"
    return isinstance(op, Attention)


def saved_bytes(
    operations: tuple[Operation, ...], what: Recomputed, cell: Cell, *, compiled: bool = True
) -> float:
    """Activations that one micro-batch leaves behind for the backward.

    Where everything is recomputed this is nothing: the caller keeps the input of the layer, as it does
    with every_other_gemm. A compiler drops what no backward reads (`compiled`).
    """
    if what == "everything":
        return 0.0
    if what == "every_other_gemm":
        needed = _needed(operations) if compiled else len(operations)
        return _saved_outputs(operations[:needed], cell)
    total = 0.0
    for op in operations:
        if isinstance(op, Attention):
            total += op.qkv_bytes + (op.saved_bytes if what == "nothing" else 0.0)
        elif not isinstance(op, Transfer):
            total += op.saved_bytes
    return total


def _saved_outputs(operations: tuple[Operation, ...], cell: Cell) -> float:
    """Outputs of the products that do not run again, and of the attention with its logarithms."""
    total = 0.0
    shares = recomputed_shares(operations, "every_other_gemm")
    for op, share in zip(operations, shares, strict=True):
        if isinstance(op, Gemm):
            total += (1 - share) * op.m * op.n * op.batch * cell.activation_bytes
        elif isinstance(op, Attention):
            values = cell.tokens * op.heads * op.v_head_dim
            total += op.saved_bytes + values * cell.activation_bytes
    return total
