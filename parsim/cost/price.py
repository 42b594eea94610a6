"""What operations cost: seconds of each pass of a layer, on a cluster and under a stack."""

from __future__ import annotations

import math
from typing import NamedTuple

from parsim.cost.attention import BACKWARD_FLOPS_RATIO, attention_flops, attention_s
from parsim.cost.cell import Cell
from parsim.cost.collective import Group, collective_s, dispatch_s, group_of
from parsim.cost.gemm import gemm_s, training_slowdown
from parsim.cost.memory_bound import memory_bound_s
from parsim.cost.operation import (
    PASSES,
    Attention,
    Beside,
    Elementwise,
    Gemm,
    Operation,
    Pass,
    Stream,
    Transfer,
)
from parsim.cost.recompute import recomputed, recomputed_shares
from parsim.hardware import Cluster, slowest_of
from parsim.stack import Stack


class PassTime(NamedTuple):
    """Seconds of one pass over some layers for one micro-batch, by stream; communication as exposed."""

    compute_s: float = 0.0
    tp_s: float = 0.0
    cp_s: float = 0.0
    ep_s: float = 0.0

    def plus(self, other: PassTime) -> PassTime:
        """Both, one after the other."""
        return PassTime(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, factor: float) -> PassTime:
        """The same, `factor` times over."""
        return PassTime(*(factor * part for part in self))

    @property
    def total_s(self) -> float:
        return sum(self)


class PartTime(NamedTuple):
    """Seconds of one part of the model (a layer, the embedding, the head) for one micro-batch."""

    forward: PassTime
    input_grad: PassTime
    weight_grad: PassTime
    recompute: PassTime

    @property
    def backward(self) -> PassTime:
        """The whole backward: recomputation, then both gradients."""
        return self.recompute.plus(self.input_grad).plus(self.weight_grad)

    def plus(self, other: PartTime) -> PartTime:
        """Both, one after the other."""
        return PartTime(*(a.plus(b) for a, b in zip(self, other, strict=True)))


NO_TIME = PartTime(PassTime(), PassTime(), PassTime(), PassTime())


class HostTime(NamedTuple):
    """Seconds that the host takes to launch the passes of one part of the model."""

    forward_s: float = 0.0
    backward_s: float = 0.0
    lead_s: float = 0.0
    """Before the device's first work of a pass, where parts are timed one by one: a pass then begins
    with nothing queued, and its collectives, timed by themselves, are not beside the launches."""


def part_time(
    operations: tuple[Operation, ...],
    cell: Cell,
    cluster: Cluster,
    stack: Stack,
    *,
    host: HostTime | None = None,
) -> PartTime:
    """Seconds of one part of the model.

    A pass takes max(host, device): the host runs ahead of a busy device and is waited for by an idle
    one. Where the device is itself the host, both times add up.
    """
    host = host or HostTime()
    times = {when: _transfers_s(operations, when, cell, cluster, stack) for when in PASSES}
    forward = times["forward"]._replace(
        compute_s=sum(_forward_s(op, cell, cluster, stack) for op in operations)
    )
    input_grad = times["backward"]._replace(
        compute_s=sum(_input_grad_s(op, cell, cluster, stack) for op in operations)
    )
    weight_grad = PassTime(sum(_weight_grad_s(op, cell, cluster, stack) for op in operations))
    if _overlaps_exchange(cell, cluster, stack):
        forward = _beside_compute(forward, stack)
        input_grad = _beside_compute(input_grad, stack, also_s=weight_grad.compute_s)
    forward = _with_host(forward, host, host.forward_s, cluster)
    input_grad = _with_host(input_grad, host, host.backward_s, cluster, beside_s=weight_grad.total_s)
    recompute = _recompute(operations, forward, cell, cluster, stack, host)
    return PartTime(forward, input_grad, weight_grad, recompute)


def _overlaps_exchange(cell: Cell, cluster: Cluster, stack: Stack) -> bool:
    """Whether tokens travel to and from their experts beside another micro-batch's compute."""
    leaves_domain = _group(cell, cluster, "ep").domains > 1
    return stack.fused_experts or (stack.ep_overlap == "network" and leaves_domain)


def _beside_compute(time: PassTime, stack: Stack, *, also_s: float = 0.0) -> PassTime:
    """A pass whose exchange of tokens has compute beside it: its own, and `also_s` of another pass."""
    hidden_s = min(time.ep_s, time.compute_s + also_s)
    return time._replace(ep_s=time.ep_s - hidden_s + stack.overlap_cost * hidden_s)


def _with_host(
    time: PassTime, host: HostTime, host_s: float, cluster: Cluster, *, beside_s: float = 0.0
) -> PassTime:
    """A pass with what its host adds: all of its time on a device that is the host, else what is left
    of it after the device's work (`beside_s`: of another pass that the host launches with this one).
    """
    if not cluster.device.is_host:
        busy_s = time.compute_s + host.lead_s if host.lead_s else time.total_s
        host_s = host.lead_s + max(0.0, host_s - busy_s - beside_s)
    return time._replace(compute_s=time.compute_s + host_s)


def _recompute(
    operations: tuple[Operation, ...],
    forward: PassTime,
    cell: Cell,
    cluster: Cluster,
    stack: Stack,
    host: HostTime,
) -> PassTime:
    """The part of the forward that the backward runs again."""
    what = recomputed(cell, stack)
    if what == "nothing":
        return PassTime()
    if what == "everything" and not stack.recompute_stops_early:
        return forward
    shares = recomputed_shares(operations, what, stops_early=stack.recompute_stops_early)
    compute_s = sum(
        share * _forward_s(op, cell, cluster, stack)
        for op, share in zip(operations, shares, strict=True)
        if share
    )
    time = _transfers_s(operations, "forward", cell, cluster, stack, shares)
    time = time._replace(compute_s=compute_s)
    return time if what == "attention_core" else _with_host(time, host, host.forward_s, cluster)


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


def _forward_s(op: Operation, cell: Cell, cluster: Cluster, stack: Stack) -> float:
    if isinstance(op, Gemm):
        return sum(_gemm(op, op.m, n, op.k, "TN", cell, cluster, stack) for n in _widths(op, stack))
    if isinstance(op, Attention):
        return _attention_s(op, cell, cluster, stack, backward=False)
    if isinstance(op, Elementwise):
        return _elementwise_s(op, op.forward_bytes, cluster, stack)
    return 0.0


def _input_grad_s(op: Operation, cell: Cell, cluster: Cluster, stack: Stack) -> float:
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


def _weight_grad_s(op: Operation, cell: Cell, cluster: Cluster, stack: Stack) -> float:
    if isinstance(op, Gemm):
        return sum(_gemm(op, n, op.k, op.m, "NT", cell, cluster, stack) for n in _widths(op, stack))
    return 0.0


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


def _transfers_s(
    operations: tuple[Operation, ...],
    when: Pass,
    cell: Cell,
    cluster: Cluster,
    stack: Stack,
    shares: tuple[float, ...] | None = None,
) -> PassTime:
    """Exposed communication of one pass, by stream; `shares` of the operations, or all of them."""
    total = {"tp": 0.0, "cp": 0.0, "ep": 0.0}
    behind_attention_s = 0.0
    for i, op in enumerate(operations):
        if not isinstance(op, Transfer) or op.when != when:
            continue
        share = 1.0 if shares is None else shares[i]
        seconds = share * transfer_s(op, cell, cluster, stack)
        if op.beside == "attention":
            behind_attention_s += seconds
        elif op.beside is not None:
            cover_s = share * _cover_s(operations, i, op.beside, cell, cluster, stack)
            hidden_s = min(seconds, cover_s)
            total[op.stream] += seconds - hidden_s + stack.overlap_cost * hidden_s
        elif share:
            total[op.stream] += seconds + share * _straggling_s(op, cell, stack)
    if behind_attention_s:
        cover_s = sum(
            _attention_s(op, cell, cluster, stack, backward=when == "backward")
            for op in operations
            if isinstance(op, Attention)
        )
        # The first of cp chunks is local, so a ring has (cp − 1)/cp of the attention to hide behind.
        total["cp"] += max(0.0, behind_attention_s - cover_s * (cell.cp - 1) / cell.cp)
    return PassTime(0.0, total["tp"], total["cp"], total["ep"])


def _cover_s(
    operations: tuple[Operation, ...],
    i: int,
    beside: Beside,
    cell: Cell,
    cluster: Cluster,
    stack: Stack,
) -> float:
    """Seconds of the matrix product that transfer `i` runs beside."""
    where, product = beside.split()
    order = operations[i + 1 :] if where == "next" else reversed(operations[:i])
    gemm = next(op for op in order if isinstance(op, Gemm))
    price = {"forward": _forward_s, "input_grad": _input_grad_s, "weight_grad": _weight_grad_s}
    return price[product](gemm, cell, cluster, stack)


def _straggling_s(op: Transfer, cell: Cell, stack: Stack) -> float:
    """What a collective in the way costs beyond itself; none among one rank."""
    ranks = {"tp": cell.tp, "cp": cell.cp, "ep": cell.ep}[op.stream]
    return stack.collective_overhead_s * math.log2(ranks)


def transfer_s(op: Transfer, cell: Cell, cluster: Cluster, stack: Stack) -> float:
    """Seconds of one collective: tp ranks lie next to each other, then cp, then dp (and ep over all)."""
    group = _group(cell, cluster, op.stream)
    if not op.top_k:
        crossing = stack.dp_slowdown if group.domains > 1 else 1.0
        return crossing * collective_s(cluster, op.kind, op.num_bytes, group)
    if stack.moe_dispatch == "deduplicated":
        return stack.ep_slowdown * dispatch_s(cluster, op.num_bytes / op.top_k, op.top_k, group)
    return stack.ep_slowdown * collective_s(cluster, op.kind, op.num_bytes, group)


def _group(cell: Cell, cluster: Cluster, stream: Stream) -> Group:
    size, stride = {
        "tp": (cell.tp, 1),
        "cp": (cell.cp, cell.tp),
        "ep": (cell.ep, cell.expert_tp),
    }[stream]
    return group_of(cluster, size=size, stride=stride, gpus=cell.gpus)
