"""What the backward runs again, against the papers and torchtitan's rule."""

from __future__ import annotations

from dataclasses import replace

import pytest

from parsim.cost.cell import Cell, cell_of
from parsim.cost.layer import layer_operations
from parsim.cost.memory import gradient_bytes
from parsim.cost.operation import Attention, Elementwise, Gemm, Operation
from parsim.cost.recompute import recomputed_shares, saved_bytes
from parsim.cost.stage import CostModel
from parsim.model import ModelSpec
from parsim.plan import Job, ParallelPlan
from parsim.stack import Stack
from tests.builders import plain_stack, round_cluster

LLAMA = ModelSpec(
    name="llama", layers=2, hidden=4096, heads=32, kv_heads=8, ffn_hidden=14336, gated_mlp=True,
    vocab=128256, max_seq_len=8192,
)  # fmt: skip


def layer(stack: Stack) -> tuple[tuple[Operation, ...], Cell]:
    job = Job(model=LLAMA, seq_len=8192, global_batch=1)
    cell = cell_of(job, ParallelPlan())
    return layer_operations(LLAMA, 0, cell, stack), cell


def test_torchtitan_runs_every_second_product_again() -> None:
    """q k v o w1 w3 w2: k, o and w3 run again, of the widths 4096 1024 1024 4096 14336 14336 14336."""
    operations, _ = layer(plain_stack())
    shares = recomputed_shares(operations, "every_other_gemm")
    gemms = [(op, share) for op, share in zip(operations, shares, strict=True) if isinstance(op, Gemm)]
    again = sum(share * op.flops for op, share in gemms)
    weights_again = 4096 * (1024 + 4096 + 14336)
    weights = 4096 * (4096 + 1024 + 1024 + 4096 + 3 * 14336)
    assert again / sum(op.flops for op, _ in gemms) == pytest.approx(weights_again / weights)


def test_torchtitan_keeps_attention_and_runs_elementwise_kernels_again() -> None:
    operations, _ = layer(plain_stack())
    for op, share in zip(operations, recomputed_shares(operations, "every_other_gemm"), strict=True):
        if isinstance(op, Attention):
            assert share == 0
        elif isinstance(op, Elementwise):
            assert share == 1


def test_megatron_runs_only_the_attention_core_again() -> None:
    operations, _ = layer(plain_stack(attention="fused_softmax"))
    shares = recomputed_shares(operations, "attention_core")
    names = [op.name if not isinstance(op, Attention) else "core" for op in operations]
    again = [name for name, share in zip(names, shares, strict=True) if share]
    assert again == ["core", "softmax"]


def test_recomputation_that_stops_early_spares_the_last_product() -> None:
    """w2 of q k v o w1 w3 w2: its output is added to the residual, whose backward needs no tensor."""
    operations, _ = layer(plain_stack())
    shares = recomputed_shares(operations, "everything", stops_early=True)
    spared = [op for op, share in zip(operations, shares, strict=True) if not share]
    assert spared == list(operations[-2:])
    assert isinstance(spared[0], Gemm)
    assert spared[0].name == "fc2"
    assert set(recomputed_shares(operations, "everything")) == {1.0}


def test_a_norm_after_the_feed_forward_needs_its_last_product() -> None:
    model = replace(LLAMA, norms_per_layer=4)
    cell = cell_of(Job(model=model, seq_len=8192, global_batch=1), ParallelPlan())
    operations = layer_operations(model, 0, cell, plain_stack())
    shares = recomputed_shares(operations, "everything", stops_early=True)
    assert shares == (1.0,) * (len(operations) - 1) + (0.0,)


def test_an_early_stop_saves_its_share_of_the_time() -> None:
    times = [
        CostModel(LLAMA, round_cluster(), plain_stack(recompute_stops_early=early))
        .layer(
            cell_of(Job(model=LLAMA, seq_len=8192, global_batch=1), ParallelPlan(recompute="full")), 0
        )
        .time
        for early in (False, True)
    ]
    assert times[0].recompute == times[0].forward == times[1].forward
    saved_s = times[0].recompute.compute_s - times[1].recompute.compute_s
    product_s = 2 * 8192 * 4096 * 14336 / 0.7e14  # GEMMs of the round device reach 0.7 of its peak
    assert saved_s == pytest.approx(product_s, rel=0.05)


def test_kept_activations_shrink_in_order() -> None:
    operations, cell = layer(plain_stack())
    nothing, half = (saved_bytes(operations, what, cell) for what in ("nothing", "every_other_gemm"))
    assert 0 == saved_bytes(operations, "everything", cell) < half < nothing
    # q, v, w1 and the attention's output in 16 bits, and its logarithms in fp32
    assert half == 8192 * (2 * (4096 + 1024 + 14336 + 4096) + 4 * 32)
    # torchtitan's policy keeps w2's too, though its backward needs nothing; a compiler drops it.
    eager = saved_bytes(operations, "every_other_gemm", cell, compiled=False)
    assert eager - half == 8192 * 2 * 4096


def test_time_of_recomputation_lies_between_none_and_full() -> None:
    job = Job(model=LLAMA, seq_len=8192, global_batch=1)
    stack = plain_stack(selective_recompute="every_other_gemm")
    times = [
        CostModel(LLAMA, round_cluster(), stack)
        .layer(cell_of(job, ParallelPlan(recompute=recompute)), 0)
        .time.recompute.total_s
        for recompute in ("none", "selective", "full")
    ]
    assert times[0] == 0 < times[1] < times[2]


def test_deepspeed_reduces_fp16_gradients_as_they_are() -> None:
    """bigscience's chronicles: fp32 accumulation came with bf16."""
    stack = plain_stack(gradient_dtype="fp32_for_bf16")
    assert gradient_bytes("fp16", stack) == 2
    assert gradient_bytes("bf16", stack) == 4
    assert gradient_bytes("fp32", stack) == 4
