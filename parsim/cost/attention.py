"""Time of one fused (FlashAttention-class) attention kernel on one device."""

from __future__ import annotations

from parsim.cost.gemm import DEFAULT_MEMORY_EFFICIENCY, peak_flops_per_s
from parsim.cost.interpolation import among_points
from parsim.hardware import DTYPE_BYTES, Cluster
from parsim.kernels import MeasuredAttention

BACKWARD_FLOPS_RATIO = 2.5
"""Backward over forward FLOPs of a fused kernel: five matrix products instead of two."""
DEFAULT_ATTENTION_EFFICIENCY = 0.5
"""Share of the data sheet's peak that a fused kernel reaches where nothing was measured."""


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
    v_head_dim = v_head_dim or head_dim
    pairs = _pairs(seq_q, seq_kv, causal, window)
    return 2.0 * batch * heads * pairs * (head_dim + v_head_dim)


def _pairs(seq_q: int, seq_kv: int, causal: bool, window: int) -> float:
    """Pairs of query and key inside the mask, of one head."""
    if not causal:
        return float(seq_q * min(seq_kv, window or seq_kv))
    first = max(seq_kv - seq_q + 1, 0)  # keys the first query sees
    width = min(window or seq_kv, seq_kv)
    full = max(seq_kv - max(first, width) + 1, 0) if width >= first else seq_q
    growing = seq_q - full
    return float(full * width + growing * (first + first + growing - 1) / 2)


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
) -> float:
    """Seconds of one fused attention kernel, forward or backward."""
    v_head_dim = v_head_dim or head_dim
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
    table = _measured(cluster, dtype, backward)
    if table is not None:
        rates = [
            (p[:5], attention_flops(batch=p[0], seq_q=p[1], seq_kv=p[1], heads=p[2], head_dim=p[4],
                                    causal=table.causal) / p[5])
            for p in table.points
        ]  # fmt: skip
        return flops / among_points(rates, (batch, (seq_q * seq_kv) ** 0.5, heads, kv_heads, head_dim))
    if backward:
        flops *= BACKWARD_FLOPS_RATIO
    compute_s = flops / (DEFAULT_ATTENTION_EFFICIENCY * peak_flops_per_s(cluster.device, dtype))
    values = batch * (seq_q * heads + seq_kv * kv_heads) * (head_dim + v_head_dim)
    moved = values * DTYPE_BYTES[dtype] * (2 if backward else 1)
    rate = DEFAULT_MEMORY_EFFICIENCY * cluster.device.memory_bandwidth_bytes_per_s
    return max(compute_s, moved / rate)


def _measured(cluster: Cluster, dtype: str, backward: bool) -> MeasuredAttention | None:
    for table in cluster.kernels.measured_attention:
        if table.dtype == dtype and table.backward == backward:
            return table
    return None
