"""Time of one fused (FlashAttention-class) attention kernel on one device.

Blocks of 128 queries of each head and sequence are dealt out to the SMs; each walks over the keys that
its mask lets through. List scheduling ends at most the longest block after the even share (R. L. Graham,
"Bounds on multiprocessing timing anomalies", SIAM J. Appl. Math. 17, 1969), so the time is the even
share plus a share of the longest block. Sources: Dao et al., arXiv 2205.14135; Dao, arXiv 2307.08691.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from parsim.cost.gemm import DEFAULT_LAUNCH_S, DEFAULT_MEMORY_EFFICIENCY
from parsim.cost.interpolation import among_points, residual_factor
from parsim.hardware import DTYPE_BYTES, Cluster, Device, peak_flops_per_s
from parsim.kernels import AttentionFit, MeasuredAttention

BACKWARD_FLOPS_RATIO = 2.5
"""Backward over forward FLOPs of a fused kernel: five matrix products instead of two."""
BACKWARD_EFFICIENCY_RATIO = 0.87
"""Backward over forward FLOPs per second of long sequences: 561/648 TFLOP/s of FlashAttention-3 and
322/370 of FlashAttention-2 on H100, head_dim 128 (Shah et al., arXiv 2407.08608, figures 5 and 6)."""
DEFAULT_ATTENTION_EFFICIENCY = 0.5
"""Share of the data sheet's peak that a fused kernel reaches where nothing was measured."""

QUERY_BLOCK = 128
"""Queries of one block of work."""
HEAD_DIM_STEP = 32
"""Kernels are compiled for head dimensions that are multiples of this; others compute the difference."""
ALIGNED_HEAD_DIM = 8
"""Other head dimensions are first copied into padded tensors (flash-attn's interface)."""


class AttentionWork(NamedTuple):
    """What a fused kernel does, at the data sheet's rates."""

    compute_s: float
    """All tiles, spread evenly over the SMs."""
    tail_s: float
    """The longest block alone on one SM."""
    query_s: float
    """Moving queries and output through memory once."""
    kv_s: float
    """Moving keys and values once."""


def attention_flops(
    *,
    batch: int,
    seq_q: int,
    seq_kv: int,
    heads: int,
    head_dim: int,
    v_head_dim: int = 0,
    causal: bool = True,
    window: int = 0,
) -> float:
    """Forward FLOPs: 2 (d_qk + d_v) a pair of query and key that the mask lets through.

    Causal masks align the last query with the last key, so seq_q = seq_kv = s has s(s+1)/2 pairs.

    >>> attention_flops(batch=1, seq_q=4, seq_kv=4, heads=1, head_dim=1, causal=False)
    64.0
    """
    pairs = pairs_in_mask(seq_q, seq_kv, causal=causal, window=window)
    return 2.0 * batch * heads * pairs * (head_dim + (v_head_dim or head_dim))


def pairs_in_mask(seq_q: int, seq_kv: int, *, causal: bool, window: int = 0) -> float:
    """Pairs of query and key inside the mask of one head.

    With a causal mask query i of q sees the keys up to kv − q + i + 1, of which a window keeps the last.

    >>> pairs_in_mask(3, 3, causal=True), pairs_in_mask(3, 5, causal=True)
    (6.0, 12.0)
    >>> pairs_in_mask(4, 4, causal=True, window=2)
    7.0
    """
    widest = min(window or seq_kv, seq_kv)
    if not causal:
        return float(seq_q * widest)
    seq_q = min(seq_q, seq_kv)  # queries before the first key see nothing
    first = seq_kv - seq_q + 1
    growing = max(0, min(seq_q, widest - first + 1))  # queries whose keys the window does not cut
    return float(growing * (2 * first + growing - 1) / 2 + (seq_q - growing) * widest)


def attention_s(
    cluster: Cluster,
    *,
    batch: int,
    seq_q: int,
    seq_kv: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    v_head_dim: int = 0,
    causal: bool = True,
    window: int = 0,
    dtype: str,
    backward: bool = False,
    serving: bool = False,
) -> float:
    """Seconds of one fused attention kernel, forward or backward.

    `serving` adds what inference frameworks do inside the op: rotary embedding, and writing keys and
    values to a paged cache. Raises ParsimError for a dtype that the device does not have.
    """
    v_head_dim = v_head_dim or head_dim
    table = _measured(cluster, dtype, backward)
    if table is not None:
        flops = attention_flops(
            batch=batch,
            seq_q=seq_q,
            seq_kv=seq_kv,
            heads=heads,
            head_dim=head_dim,
            v_head_dim=v_head_dim,
            causal=causal,
            window=window,
        )
        return _from_table(table, flops, (batch, math.sqrt(seq_q * seq_kv), heads, kv_heads, head_dim))
    work = attention_work(
        cluster.device,
        batch=batch,
        seq_q=seq_q,
        seq_kv=seq_kv,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        causal=causal,
        window=window,
        dtype=dtype,
    )
    padding_s = 0.0
    if head_dim % ALIGNED_HEAD_DIM or v_head_dim % ALIGNED_HEAD_DIM:
        copied_s = 2 * (work.query_s + work.kv_s) / DEFAULT_MEMORY_EFFICIENCY
        padding_s = copied_s * (2 if backward else 1)
    fit = attention_fit(cluster, dtype, head_dim, serving=serving)
    if fit is None:
        return padding_s + _roofline_s(work, backward)
    if not serving:
        return padding_s + _kernel_s(fit, work, backward)
    length = math.sqrt(seq_q * seq_kv)
    return padding_s + serving_s(fit, work) * residual_factor(fit.residuals, heads, kv_heads, length)


def attention_work(
    device: Device,
    *,
    batch: int,
    seq_q: int,
    seq_kv: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    v_head_dim: int = 0,
    causal: bool = True,
    window: int = 0,
    dtype: str,
) -> AttentionWork:
    """The forward's work at the data sheet's rates, in whole blocks of queries and padded head dims."""
    v_head_dim = v_head_dim or head_dim
    blocks = math.ceil(seq_q / QUERY_BLOCK)
    widest = min(window or seq_kv, seq_kv)
    pairs = pairs_in_mask(seq_q, seq_kv, causal=causal, window=window) * blocks * QUERY_BLOCK / seq_q
    if causal:  # a block computes all of the diagonal's tile, and where a window begins all of that one
        pairs += blocks * QUERY_BLOCK * QUERY_BLOCK / 2 * (2 if widest < seq_kv else 1)
    flops_a_pair = 2.0 * (_padded(head_dim) + _padded(v_head_dim))
    peak = peak_flops_per_s(device, dtype)
    token_bytes = (head_dim + v_head_dim) * DTYPE_BYTES[dtype]
    bandwidth = device.memory_bandwidth_bytes_per_s
    return AttentionWork(
        compute_s=batch * heads * pairs * flops_a_pair / peak,
        tail_s=max(widest, QUERY_BLOCK) * QUERY_BLOCK * flops_a_pair / (peak / device.num_sms),
        query_s=batch * seq_q * heads * token_bytes / bandwidth,
        kv_s=batch * seq_kv * kv_heads * token_bytes / bandwidth,
    )


def attention_fit(
    cluster: Cluster, dtype: str, head_dim: int, *, serving: bool = False
) -> AttentionFit | None:
    """The fit of the nearest head dimension, in the log; outside serving only flash-class kernels."""
    same = {"fp16": "bf16"}.get(dtype, dtype)
    fits = [f for f in cluster.kernels.attention if f.dtype in (dtype, same) and (f.flash or serving)]
    return min(fits, key=lambda f: abs(math.log(f.head_dim / head_dim)), default=None)


def serving_s(fit: AttentionFit, work: AttentionWork) -> float:
    """The op of an inference framework: one kernel after the other, nothing overlaps."""
    return (
        fit.launch_s
        + (work.compute_s + fit.tail * work.tail_s) / fit.efficiency
        + fit.query_traffic * work.query_s
        + fit.kv_traffic * work.kv_s
    )


def _kernel_s(fit: AttentionFit, work: AttentionWork, backward: bool) -> float:
    """The fused kernel alone: its own traffic hides behind its compute, or the other way round."""
    compute_s = (work.compute_s + fit.tail * work.tail_s) / fit.efficiency
    memory_s = (work.query_s + work.kv_s) / DEFAULT_MEMORY_EFFICIENCY
    if backward:
        compute_s *= BACKWARD_FLOPS_RATIO / BACKWARD_EFFICIENCY_RATIO
        memory_s *= 2
    return fit.launch_s + max(compute_s, memory_s)


def _roofline_s(work: AttentionWork, backward: bool) -> float:
    compute_s = work.compute_s / DEFAULT_ATTENTION_EFFICIENCY
    memory_s = (work.query_s + work.kv_s) / DEFAULT_MEMORY_EFFICIENCY
    if backward:
        compute_s, memory_s = compute_s * BACKWARD_FLOPS_RATIO, memory_s * 2
    return DEFAULT_LAUNCH_S + max(compute_s, memory_s)


def _padded(head_dim: int) -> int:
    return math.ceil(head_dim / HEAD_DIM_STEP) * HEAD_DIM_STEP


def _measured(cluster: Cluster, dtype: str, backward: bool) -> MeasuredAttention | None:
    for table in cluster.kernels.measured_attention:
        if table.dtype == dtype and table.backward == backward:
            return table
    return None


def _from_table(table: MeasuredAttention, flops: float, at: tuple[float, ...]) -> float:
    """From the machine's own table: FLOPs over the rate interpolated among its points."""
    rates = []
    for batch, seq, heads, kv_heads, head_dim, seconds in table.points:
        done = attention_flops(
            batch=batch, seq_q=seq, seq_kv=seq, heads=heads, head_dim=head_dim, causal=table.causal
        )
        rates.append(((batch, seq, heads, kv_heads, head_dim), done / seconds))
    return flops / among_points(rates, at)
