"""Seconds of one operation of a layer: each pass of its kernels, and its transfers."""

from __future__ import annotations

import math

from parsim.cost.attention import BACKWARD_FLOPS_RATIO, attention_flops, attention_s
from parsim.cost.cell import Cell
from parsim.cost.collective import (
    Group,
    collective_s,
    dispatch_s,
    dispatch_wire_factor,
    group_of,
    group_over,
    wire_factor,
)
from parsim.cost.gemm import gemm_s, training_slowdown
from parsim.cost.memory_bound import memory_bound_s
from parsim.cost.operation import Attention, Elementwise, Gemm, Operation, Stream, Transfer
from parsim.hardware import Cluster, slowest_of
from parsim.stack import Stack


def forward_s(op: Operation, cell: Cell, cluster: Cluster, stack: Stack) -> float:
    """Seconds of an operation's forward on the device; a transfer has no kernel of its own."""
    if isinstance(op, Gemm):
        return sum(_gemm(op, op.m, n, op.k, "TN", cell, cluster, stack) for n in _widths(op, stack))
    if isinstance(op, Attention):
        return _attention_s(op, cell, cluster, stack, backward=False)
    if isinstance(op, Elementwise):
        return _elementwise_s(op, op.forward_bytes, cluster, stack)
    return 0.0


def input_grad_s(op: Operation, cell: Cell, cluster: Cluster, stack: Stack) -> float:
    """Seconds of the part of its backward that the layer before waits for."""
    if isinstance(op, Gemm):
        widths = _widths(op, stack)
        added_bytes = 3 * (len(widths) - 1) * op.batch * op.m * op.k * cell.activation_bytes
        added_s = stack.memory_bound_slowdown * memory_bound_s(cluster, added_bytes)
        return added_s + sum(_gemm(op, op.m, op.k, n, "NN", cell, cluster, stack) for n in widths)
    if isinstance(op, Attention):
        return _attention_s(op, cell, cluster, stack, backward=True)
    if isinstance(op, Elementwise):
        return _elementwise_s(op, op.backward_bytes, cluster, stack)
    return 0.0


def weight_grad_s(op: Operation, cell: Cell, cluster: Cluster, stack: Stack) -> float:
    """Seconds of the gradient of its weights, which only products have."""
    if isinstance(op, Gemm):
        return sum(_gemm(op, n, op.k, op.m, "NT", cell, cluster, stack) for n in _widths(op, stack))
    return 0.0


def straggling_s(op: Transfer, cell: Cell, stack: Stack) -> float:
    """What a collective in the way costs beyond itself; none among one rank."""
    ranks = {"tp": cell.tp, "cp": cell.cp, "ep": cell.ep}[op.stream]
    return stack.collective_overhead_s * math.log2(ranks)


def transfer_bytes(op: Transfer, cell: Cell, cluster: Cluster, stack: Stack) -> float:
    """Bytes that each device sends in one collective."""
    group = transfer_group(cell, cluster, op.stream)
    if op.top_k and stack.moe_dispatch == "deduplicated":
        return dispatch_wire_factor(op.top_k, group) * op.num_bytes / op.top_k
    return wire_factor(op.kind, group.size) * op.num_bytes


def transfer_s(op: Transfer, cell: Cell, cluster: Cluster, stack: Stack) -> float:
    """Seconds of one collective over the group that the plan places for its stream."""
    group = transfer_group(cell, cluster, op.stream)
    if not op.top_k:
        crossing = stack.dp_slowdown if group.domains > 1 else 1.0
        return crossing * collective_s(cluster, op.kind, op.num_bytes, group)
    if stack.moe_dispatch == "deduplicated":
        return stack.ep_slowdown * dispatch_s(cluster, op.num_bytes / op.top_k, op.top_k, group)
    return stack.ep_slowdown * collective_s(cluster, op.kind, op.num_bytes, group)


def transfer_group(cell: Cell, cluster: Cluster, stream: Stream) -> Group:
    """The worst group that a stream's collectives run in."""
    if cell.groups:
        axes = cell.groups[("tp", "cp", "ep").index(stream)]
        return group_over(cluster, axes, gpus=cell.gpus)
    size, stride = {
        "tp": (cell.tp, 1),
        "cp": (cell.cp, cell.tp),
        "ep": (cell.ep, cell.expert_tp),
    }[stream]
    return group_of(cluster, size=size, stride=stride, gpus=cell.gpus)


def _gemm(
    op: Gemm, m: int, n: int, k: int, layout: str, cell: Cell, cluster: Cluster, stack: Stack
) -> float:
    dtype = cell.precision if op.low_precision else cell.activation_dtype
    bare_s = gemm_s(
        cluster,
        m,
        n,
        k,
        dtype=dtype,
        layout=layout,
        batch=op.batch,
        stream_k=stack.gemm_stream_k,
        training=True,
    )
    by_row = dtype == "fp8" and stack.fp8_scaling == "row"
    slowdown = stack.gemm_slowdown * (stack.fp8_row_slowdown if by_row else 1.0)
    return slowdown * _pace(cell, cluster) * bare_s


def _pace(cell: Cell, cluster: Cluster) -> float:
    """What waiting for the slowest device adds to compute under a power limit."""
    return slowest_of(cell.gpus, cluster.device.clock_spread)


def _elementwise_s(op: Elementwise, num_bytes: float, cluster: Cluster, stack: Stack) -> float:
    routed = stack.routed_slowdown if op.routed else 1.0
    return routed * stack.memory_bound_slowdown * memory_bound_s(cluster, num_bytes)


def _widths(op: Gemm, stack: Stack) -> tuple[int, ...]:
    """Columns of the products that a linear layer runs as."""
    return op.columns if op.columns and not stack.merged_products else (op.n,)


def _attention_s(op: Attention, cell: Cell, cluster: Cluster, stack: Stack, *, backward: bool) -> float:
    dtype = cell.activation_dtype
    if op.fused:
        whole_s = attention_s(
            cluster,
            batch=op.batch,
            seq_q=op.seq_len,
            seq_kv=op.seq_len,
            heads=op.heads,
            kv_heads=op.kv_heads,
            head_dim=op.head_dim,
            v_head_dim=op.v_head_dim,
            window=op.window,
            dtype=dtype,
            backward=backward,
        )
        whole_s *= stack.attention_slowdown * _pace(cell, cluster)
        if stack.attention_max_flops_per_s:
            capped_s = _useful_flops(op, backward) / stack.attention_max_flops_per_s
            slowdown = training_slowdown(cluster.device, dtype) * _pace(cell, cluster)
            whole_s = max(whole_s, capped_s * slowdown)
        return whole_s / op.context_ranks
    batch = op.batch * op.heads
    queries = op.seq_len // op.context_ranks
    scores = gemm_s(cluster, queries, op.seq_len, op.head_dim, dtype=dtype, batch=batch)
    values = gemm_s(cluster, queries, op.v_head_dim, op.seq_len, dtype=dtype, batch=batch)
    return stack.gemm_slowdown * _pace(cell, cluster) * (scores + values) * (2 if backward else 1)


def _useful_flops(op: Attention, backward: bool) -> float:
    """FLOPs under the causal mask of the whole sequence."""
    flops = attention_flops(
        batch=op.batch,
        seq_q=op.seq_len,
        seq_kv=op.seq_len,
        heads=op.heads,
        head_dim=op.head_dim,
        v_head_dim=op.v_head_dim,
        window=op.window,
    )
    return flops * (BACKWARD_FLOPS_RATIO if backward else 1.0)
