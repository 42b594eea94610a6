"""What is true of one fused attention kernel on any device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from parsim.config import load_cluster
from parsim.cost.attention import (
    BACKWARD_EFFICIENCY_RATIO,
    BACKWARD_FLOPS_RATIO,
    DEFAULT_ATTENTION_EFFICIENCY,
    attention_flops,
    attention_s,
    pairs_in_mask,
)
from parsim.cost.gemm import DEFAULT_LAUNCH_S
from parsim.errors import ParsimError
from parsim.hardware import Cluster
from parsim.kernels import AttentionFit, Kernels, MeasuredAttention

FIT = AttentionFit(
    dtype="bf16",
    head_dim=128,
    launch_s=1e-5,
    efficiency=0.6,
    tail=0.5,
    query_traffic=2.0,
    kv_traffic=3.0,
    source="",
    date="",
    fitted_to="",
)


def machine(*fits: AttentionFit, **kernels: Any) -> Cluster:
    return replace(load_cluster("h100-sxm-80gb"), kernels=Kernels(attention=fits, **kernels))


def seconds(cluster: Cluster, **changed: Any) -> float:
    shape: dict[str, Any] = {
        "batch": 4,
        "seq_q": 4096,
        "seq_kv": 4096,
        "heads": 32,
        "kv_heads": 32,
        "head_dim": 128,
        "dtype": "bf16",
    }
    return attention_s(cluster, **(shape | changed))


@pytest.mark.parametrize(
    ("seq_q", "seq_kv", "window"), [(7, 7, 0), (7, 7, 3), (3, 9, 0), (3, 9, 4), (9, 3, 0)]
)
def test_pairs_are_those_of_the_mask(seq_q: int, seq_kv: int, window: int) -> None:
    seen = 0
    for query in range(seq_q):
        last = seq_kv - seq_q + query
        seen += sum(1 for key in range(seq_kv) if key <= last and (not window or key > last - window))
    assert pairs_in_mask(seq_q, seq_kv, causal=True, window=window) == seen
    assert pairs_in_mask(seq_q, seq_kv, causal=False) == seq_q * seq_kv


def test_flops_of_the_flash_attention_papers() -> None:
    """4 · s² · head_dim · heads forward, half of it causal (arXiv 2307.08691, section 4.1)."""
    s, heads, head_dim = 16384, 16, 128
    whole = attention_flops(batch=1, seq_q=s, seq_kv=s, heads=heads, head_dim=head_dim, causal=False)
    assert whole == 4 * s**2 * head_dim * heads
    causal = attention_flops(batch=1, seq_q=s, seq_kv=s, heads=heads, head_dim=head_dim)
    assert causal == pytest.approx(whole / 2, rel=1e-3)


def test_long_sequences_reach_the_fitted_efficiency() -> None:
    cluster = machine(FIT)
    flops = attention_flops(batch=4, seq_q=65536, seq_kv=65536, heads=32, head_dim=128)
    assert flops / seconds(cluster, seq_q=65536, seq_kv=65536) == pytest.approx(0.6 * 989.4e12, rel=0.01)


def test_few_blocks_end_with_the_longest_one() -> None:
    """One head, one sequence: 32 blocks on 132 SMs take as long as the last, which sees all keys."""
    cluster = machine(replace(FIT, tail=1.0, launch_s=0.0))
    alone = seconds(cluster, batch=1, heads=1, kv_heads=1)
    longest_s = 128 * 4096 * 4 * 128 / (0.6 * 989.4e12 / 132)
    assert longest_s <= alone <= 1.3 * longest_s


def test_more_work_takes_longer() -> None:
    cluster = machine(FIT)
    base = seconds(cluster)
    assert seconds(cluster, batch=8) == pytest.approx(2 * base, rel=0.05)
    assert seconds(cluster, heads=64, kv_heads=64) == pytest.approx(2 * base, rel=0.05)
    assert 3.5 * base < seconds(cluster, seq_q=8192, seq_kv=8192) < 4 * base
    assert seconds(cluster, causal=False) == pytest.approx(2 * base, rel=0.06)
    assert seconds(cluster, window=512) < base / 3
    assert seconds(cluster, v_head_dim=64) == pytest.approx(0.75 * base, rel=0.05)


def test_grouped_heads_save_traffic_of_keys_and_values_where_it_is_served() -> None:
    cluster = machine(FIT)
    saved = seconds(cluster, serving=True) - seconds(cluster, kv_heads=8, serving=True)
    kv_bytes = 4 * 4096 * 24 * 2 * 128 * 2
    assert saved == pytest.approx(3.0 * kv_bytes / 3.35e12)
    assert seconds(cluster, serving=True) > seconds(cluster)


def test_backward_does_five_products_instead_of_two() -> None:
    cluster = machine(replace(FIT, launch_s=0.0))
    ratio = seconds(cluster, backward=True) / seconds(cluster)
    assert ratio == pytest.approx(BACKWARD_FLOPS_RATIO / BACKWARD_EFFICIENCY_RATIO)


def test_head_dims_that_are_no_multiple_of_8_are_copied_first() -> None:
    cluster = machine(FIT)
    padded, odd = seconds(cluster, head_dim=112), seconds(cluster, head_dim=108)
    # 108 and 112 both compute as 128; 108 also moves every tensor to a padded one and back.
    assert odd > padded
    assert seconds(cluster, head_dim=128) == pytest.approx(padded)


def test_the_nearest_head_dim_is_taken_and_slow_fallbacks_only_where_they_are_served() -> None:
    slow = replace(FIT, head_dim=192, efficiency=0.1, flash=False)
    cluster = machine(FIT, slow)
    assert seconds(cluster, head_dim=192) == pytest.approx(1.5 * seconds(cluster), rel=0.05)
    assert seconds(cluster, head_dim=192, serving=True) > 5 * seconds(cluster, head_dim=192)
    assert seconds(machine(replace(FIT, head_dim=64), FIT), head_dim=96) > 0


def test_a_measured_table_gives_its_own_points_back() -> None:
    points = ((1, 128, 4, 4, 64, 1e-3), (2, 256, 8, 2, 64, 9e-3), (1, 512, 4, 1, 32, 4e-3))
    table = MeasuredAttention(dtype="fp32", points=points)
    back = MeasuredAttention(dtype="fp32", backward=True, points=((1, 128, 4, 4, 64, 3e-3),))
    cluster = machine(measured_attention=(table, back))
    for batch, seq, heads, kv_heads, head_dim, expected in points:
        found = seconds(
            cluster,
            batch=batch,
            seq_q=seq,
            seq_kv=seq,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dtype="fp32",
        )
        assert found == pytest.approx(expected, rel=1e-12)
    shape = {"batch": 1, "seq_q": 128, "seq_kv": 128, "heads": 4, "kv_heads": 4, "head_dim": 64}
    assert seconds(cluster, **shape, dtype="fp32", backward=True) == pytest.approx(3e-3, rel=1e-12)


def test_without_measurements_a_roofline() -> None:
    flops = attention_flops(batch=4, seq_q=32768, seq_kv=32768, heads=32, head_dim=128)
    expected = DEFAULT_LAUNCH_S + flops / (DEFAULT_ATTENTION_EFFICIENCY * 989.4e12)
    assert seconds(machine(), seq_q=32768, seq_kv=32768) == pytest.approx(expected, rel=0.01)
    with pytest.raises(ParsimError, match="fp8"):
        seconds(replace(machine(), device=load_cluster("a100-sxm-80gb").device), dtype="fp8")


@pytest.mark.parametrize(
    ("seq", "causal", "backward", "tflops"),
    [
        (16384, True, False, 616),
        (8192, True, False, 602),
        (4096, True, False, 579),
        (2048, True, False, 521),
        (16384, False, False, 648),
        (16384, False, True, 561),
        (4096, False, True, 542),
    ],
)
def test_flash_attention_3_on_h100(seq: int, causal: bool, backward: bool, tflops: float) -> None:
    """Shah et al. 2024, arXiv 2407.08608, figures 5 and 6: head_dim 128, 16 heads, 16k tokens."""
    batch = 16384 // seq
    flops = attention_flops(batch=batch, seq_q=seq, seq_kv=seq, heads=16, head_dim=128, causal=causal)
    time = seconds(
        load_cluster("h100-sxm-80gb"),
        batch=batch,
        seq_q=seq,
        seq_kv=seq,
        heads=16,
        kv_heads=16,
        causal=causal,
        backward=backward,
    )
    assert flops * (2.5 if backward else 1) / time / 1e12 == pytest.approx(tflops, rel=0.1)
