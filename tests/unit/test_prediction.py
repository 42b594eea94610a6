"""What a prediction reports, from its definition; and the bytes and ranks of every collective.

On round_cluster a collective inside a node has no latency and 80 GB/s.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from parsim.cost.attention import attention_s
from parsim.cost.cell import cell_of
from parsim.cost.collective import send_recv_s
from parsim.cost.interval import WIDTHS
from parsim.cost.layer import layer_operations
from parsim.cost.memory import MemoryUse
from parsim.cost.operation import Transfer
from parsim.cost.price import PartTime
from parsim.cost.stage import CostModel
from parsim.cost.step import StepCost, step_cost
from parsim.hardware import Link
from parsim.model import ModelSpec, MoeSpec
from parsim.plan import Job, ParallelPlan
from parsim.simulate.prediction import Prediction, predict, prediction_of
from parsim.timeline import Span, Timeline, breakdown_s
from tests.builders import plain_stack, round_cluster, small_model

BYTES_PER_S = 0.8 * 1e11
"""Inside a node: the share of a link that is reached where nothing was measured."""

# The ITEM


def use(**changes: float) -> MemoryUse:
    parts = {
        "weights": 1e9, "gradients": 2e9, "optimizer": 3e9, "activations": 4e9, "working": 5e9,
        "buffers": 6e9,
    }  # fmt: skip
    return MemoryUse(**(parts | changes))


def two_seconds() -> Timeline:
    """One rank: a second forward, half a second of nothing, half a second of reduction."""
    return Timeline(
        spans=(
            Span(0, "compute", "0F0", 0.0, 1.0, "forward"),
            Span(0, "dp", "gradients 0", 1.5, 2.0, "dp"),
        )
    )


def prediction(memory: tuple[MemoryUse, ...] = (use(),), **stack: Any) -> Prediction:
    """Two seconds for 24 sequences of 256 tokens on 2·2·3 GPUs, 4 of them in a micro-batch."""
    model = small_model()
    job = Job(model=model, seq_len=256, global_batch=24)
    plan = ParallelPlan(dp=2, tp=2, pp=3, micro_batch=4, sequence_parallel=True)
    costs = CostModel(model, round_cluster(), plain_stack(**stack))
    return prediction_of(job, plan, costs, two_seconds(), list(memory))


def parameters_of_small_model() -> int:
    h, f, vocab, layers, kv = 512, 1024, 4096, 8, 4 * 64
    attention = h * h + 2 * h * kv + h * h
    return 2 * vocab * h + layers * (attention + 3 * h * f + 2 * h) + h


def test_rates_of_the_item() -> None:
    item = prediction().to_item()
    tokens, gpus, step_s = 24 * 256, 12, 2.0
    attention = 12 * 8 * 512 * 256  # 12·L·(H·Q)·T
    flops = tokens * (6 * parameters_of_small_model() + attention)
    causal = tokens * (6 * parameters_of_small_model() + attention / 2)
    assert item["step_time_s"] == step_s
    assert item["gpus"] == gpus
    assert item["num_micro_batches"] == 3
    assert item["tokens_per_s_per_gpu"] == pytest.approx(tokens / step_s / gpus)
    assert item["model_tflops_per_gpu"] == pytest.approx(flops / step_s / gpus / 1e12)
    assert item["mfu"] == pytest.approx(flops / step_s / gpus / 1e14)  # PaLM, appendix B
    assert item["mfu_causal"] == pytest.approx(causal / step_s / gpus / 1e14)
    assert item["bubble_fraction"] == pytest.approx(0.5 / 2.0)
    assert sum(item["breakdown_s"].values()) == pytest.approx(step_s)
    assert item["breakdown_s"]["compute"] == 1.0
    assert item["breakdown_s"]["dp_exposed"] == 0.5


def test_the_peak_is_that_of_the_gemms_dtype() -> None:
    model = small_model()
    costs = CostModel(model, round_cluster(), plain_stack())
    mfu = {}
    for precision in ("bf16", "fp32"):
        job = Job(model=model, seq_len=256, global_batch=1, precision=precision)
        mfu[precision] = prediction_of(job, ParallelPlan(), costs, two_seconds(), [use()]).mfu
    assert mfu["fp32"] == pytest.approx(mfu["bf16"] * 1e14 / 5e13)


def test_what_the_item_says_of_its_inputs() -> None:
    item = prediction().to_item()
    assert (item["hardware"], item["stack"], item["model"]["name"]) == ("round", "plain", "small")
    assert item["job"] == {
        "seq_len": 256, "global_batch": 24, "precision": "bf16", "optimizer": "adamw",
    }  # fmt: skip
    assert (item["plan"]["dp"], item["plan"]["tp"], item["plan"]["micro_batch"]) == (2, 2, 4)


def test_the_interval_is_a_factor_either_way() -> None:
    low, high = prediction(relative_error=math.log(2)).to_item()["interval_s"]
    # The made-up device has no kernel measurements, which widens it a little.
    factor = math.exp(math.hypot(math.log(2), WIDTHS["device without kernel measurements"]))
    assert (low, high) == pytest.approx((2 / factor, 2 * factor))
    assert factor == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize(("context_bytes", "fits"), [(0.0, True), (1e9, True), (1.1e9, False)])
def test_context_counts_against_the_device(context_bytes: float, fits: bool) -> None:
    # 79 of 80 GB are the allocator's.
    found = prediction((use(activations=62e9),), context_bytes=context_bytes)
    assert found.memory.peak == 79e9
    assert found.fits == found.to_item()["fits"] == fits


def test_memory_is_that_of_the_fullest_rank() -> None:
    item = prediction((use(), use(activations=14e9), use(weights=2e9)), context_bytes=7e9).to_item()
    assert item["memory_bytes"] == {
        "peak": 31e9, "weights": 1e9, "gradients": 2e9, "optimizer": 3e9, "activations": 14e9,
        "working": 5e9, "buffers": 6e9, "residuals": 0.0, "slack": 0.0, "context": 7e9,
    }  # fmt: skip


def test_each_instant_goes_to_the_first_of_its_kinds() -> None:
    # On rank 0 every kind starts at 0, and each lasts a second longer than the one before it.
    order = ("forward", "tp", "cp", "ep", "pp", "dp", "optimizer", "host")
    nested = [Span(0, "any", kind, 0.0, i + 1.0, kind) for i, kind in enumerate(order)]
    # Rank 1 only runs a backward, from 6 to 10: the step lasts 10 s.
    timeline = Timeline(spans=(*nested, Span(1, "compute", "0B0", 6.0, 10.0, "backward")))
    assert breakdown_s(timeline) == pytest.approx(
        {
            "compute": (1 + 4) / 2,
            "tp_exposed": 0.5,
            "cp_exposed": 0.5,
            "ep_exposed": 0.5,
            "pp_exposed": 0.5,
            "dp_exposed": 0.5,
            "optimizer": 0.5,
            "overhead": 0.5,
            "bubble": (2 + 6) / 2,
        }
    )


@pytest.mark.parametrize("kind", ["forward", "backward", "input_grad", "weight_grad", "recompute"])
def test_every_pass_is_compute(kind: str) -> None:
    timeline = Timeline(spans=(Span(0, "compute", "x", 0.0, 3.0, kind),))
    assert breakdown_s(timeline)["compute"] == 3.0


def test_a_prediction_is_that_of_its_schedule() -> None:
    # Equal parts would give (p − 1)/(m + p − 1); the host's second a layer makes them so.
    model = small_model()
    costs = CostModel(model, round_cluster(), plain_stack(layer_host_s=1.0))
    job = Job(model=model, seq_len=256, global_batch=6)
    item = predict(job, ParallelPlan(pp=4), costs)[0].to_item()
    assert item["bubble_fraction"] == pytest.approx(3 / 9, rel=1e-3)
    assert item["step_time_s"] == pytest.approx(9 * 2 * 2.0, rel=1e-3)


# Collectives inside a layer

EXPERTS = small_model(moe=MoeSpec(experts=8, top_k=2, ffn_hidden=512))


def transfers(model: ModelSpec, plan: ParallelPlan, stream: str) -> list[tuple[str, str, float]]:
    """(when, kind, bytes) of a layer's collectives on one stream, for one micro-batch."""
    job = Job(model=model, seq_len=256, global_batch=24)
    operations = layer_operations(model, 0, cell_of(job, plan), plain_stack())
    return [
        (op.when, op.kind, op.num_bytes)
        for op in operations
        if isinstance(op, Transfer) and op.stream == stream
    ]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_rank_sends_its_tokens_to_their_experts_and_back(tp: int) -> None:
    # b·s/tp tokens of a rank, top_k copies of each, h numbers of two bytes
    plan = ParallelPlan(dp=8 // tp, tp=tp, ep=8, micro_batch=3, sequence_parallel=tp > 1)
    size = 3 * 256 / tp * 2 * 512 * 2
    assert sorted(transfers(EXPERTS, plan, "ep")) == [
        ("backward", "all_to_all", size), ("backward", "all_to_all", size),
        ("forward", "all_to_all", size), ("forward", "all_to_all", size),
    ]  # fmt: skip
    assert transfers(EXPERTS, replace(plan, ep=1), "ep") == []
    assert transfers(small_model(), replace(plan, ep=1), "ep") == []


@pytest.mark.parametrize("tp", [1, 2])
def test_keys_and_values_go_round_the_ring(tp: int) -> None:
    # Of the whole sequence: b·s tokens, K and V, kv_heads/tp of width 64, two bytes; with the gradients
    # twice that on the way back.
    plan = ParallelPlan(cp=4, tp=tp, micro_batch=3, sequence_parallel=tp > 1)
    size = 3 * 256 * 2 * (4 / tp * 64) * 2
    assert sorted(transfers(small_model(), plan, "cp")) == [
        ("backward", "all_gather", 2 * size),
        ("forward", "all_gather", size),
    ]
    assert transfers(small_model(), replace(plan, cp=1), "cp") == []


def slow_links() -> Any:
    link = Link(latency_s=0.0, bandwidth_bytes_per_s=1e8, source="", date="")
    return round_cluster(intra_node=link)


def layer_time(model: ModelSpec, plan: ParallelPlan, **stack: Any) -> PartTime:
    """A layer where communication takes a thousand times longer than on round_cluster."""
    job = Job(model=model, seq_len=256, global_batch=24)
    costs = CostModel(model, slow_links(), plain_stack(**stack))
    return costs.layer(cell_of(job, plan), 0).time


def test_a_ring_hides_behind_all_of_the_attention_but_its_first_chunk() -> None:
    plan = ParallelPlan(cp=4)
    time = layer_time(small_model(), plan)
    ring_s = 3 / 4 * (256 * 2 * 256 * 2) / (0.8 * 1e8)
    for exposed_s, factor, backward in (
        (time.forward.cp_s, 1, False), (time.input_grad.cp_s, 2, True),
    ):  # fmt: skip
        attention = attention_s(
            slow_links(), batch=1, seq_q=256, seq_kv=256, heads=8, kv_heads=4, head_dim=64,
            v_head_dim=64, window=0, dtype="bf16", backward=backward,
        )  # fmt: skip
        assert exposed_s == pytest.approx(factor * ring_s - 3 / 4 * attention / 4)
    assert time.weight_grad.cp_s == 0
    # Of a long sequence on a quick link nothing is left: attention grows with the square.
    quick = CostModel(small_model(), round_cluster(), plain_stack())
    cell = cell_of(Job(model=small_model(), seq_len=8192, global_batch=1), plan)
    assert quick.layer(cell, 0).time.forward.cp_s == 0


def test_an_all_to_all_there_and_back_in_each_pass() -> None:
    whole_s = 2 * 7 / 8 * (256 * 2 * 512 * 2) / (0.8 * 1e8)
    time = layer_time(EXPERTS, ParallelPlan(dp=8, ep=8))
    assert time.forward.ep_s == pytest.approx(whole_s)
    assert time.input_grad.ep_s == pytest.approx(whole_s)
    assert time.weight_grad.ep_s == 0


@pytest.mark.parametrize(("sequence_parallel", "collectives"), [(False, 2), (True, 4)])
def test_overhead_of_every_collective(sequence_parallel: bool, collectives: int) -> None:
    plan = ParallelPlan(tp=2, sequence_parallel=sequence_parallel)
    plain, dear = (
        layer_time(small_model(), plan, collective_overhead_s=overhead) for overhead in (0.0, 1.0)
    )
    assert dear.forward.tp_s - plain.forward.tp_s == pytest.approx(collectives)
    assert dear.backward.tp_s - plain.backward.tp_s == pytest.approx(collectives)


# Collectives of a step


def step(model: ModelSpec, plan: ParallelPlan, **stack: Any) -> StepCost:
    job = Job(model=model, seq_len=256, global_batch=24)
    return step_cost(job, plan, CostModel(model, round_cluster(), plain_stack(**stack)))


def all_reduce_s(num_bytes: float, ranks: int) -> float:
    return 2 * (ranks - 1) / ranks * num_bytes / BYTES_PER_S


@pytest.mark.parametrize(("ep", "expert_ranks"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_gradients_of_experts_are_summed_over_the_ranks_that_share_them(
    ep: int, expert_ranks: int
) -> None:
    plan = ParallelPlan(dp=2, cp=2, tp=2, ep=ep, sequence_parallel=True)
    cost = step(EXPERTS, plan)
    (stage,), (sync,) = cost.stages, cost.syncs
    experts = 8 * 8 * 3 * 512 * 512 // ep  # layers × experts × matrices
    assert stage.expert_parameters == experts
    # Gradients are fp32; the dense ones are summed over dp·cp = 4 ranks.
    expected = all_reduce_s(4 * stage.dense_parameters, 4) + all_reduce_s(4 * experts, expert_ranks)
    assert sync.reduce_s == pytest.approx(expected)
    assert sync.gather_s == 0


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_zero_scatters_gradients_and_gathers_parameters(zero: int) -> None:
    cost = step(small_model(), ParallelPlan(dp=8, zero=zero))
    n = parameters_of_small_model()
    assert cost.syncs[0].reduce_s == pytest.approx(7 / 8 * 4 * n / BYTES_PER_S)
    assert cost.syncs[0].gather_s == pytest.approx(7 / 8 * 2 * n / BYTES_PER_S)  # bf16


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_shards_within_a_group_are_reduced_on_two_levels(zero: int, group: int) -> None:
    # Rajbhandari et al. 2020, section 5, within the group; what each rank then holds is summed between
    # the groups (hybrid sharding, as in PyTorch FSDP, arXiv 2304.11277, section 3.2.2).
    cost = step(small_model(), ParallelPlan(dp=4, cp=2, zero=zero, zero_group=group))
    n = parameters_of_small_model()
    within = (group - 1) / group * 4 * n / BYTES_PER_S
    between = all_reduce_s(4 * n / group, 8 // group)
    assert cost.syncs[0].reduce_s == pytest.approx(within + between)
    assert cost.syncs[0].gather_s == pytest.approx((group - 1) / group * 2 * n / BYTES_PER_S)


def test_tied_embeddings_are_summed_between_the_ends_of_the_pipeline() -> None:
    model = small_model(tied_embeddings=True)
    cost = step(model, ParallelPlan(pp=2, tp=2, sequence_parallel=True))
    assert cost.tied_reduce_s == pytest.approx(all_reduce_s(4 * 4096 * 512 / 2, 2))
    assert step(model, ParallelPlan(tp=2, sequence_parallel=True)).tied_reduce_s == 0
    assert step(small_model(), ParallelPlan(pp=2)).tied_reduce_s == 0
    # A node of 8 holds both ends of 4 stages on 2 ranks each; of 4 on 4 it does not, and the network
    # is ten times slower. In a V one rank holds both ends.
    near, far = (step(model, ParallelPlan(dp=dp, pp=4)).tied_reduce_s for dp in (2, 4))
    assert far > 5 * near
    assert step(model, ParallelPlan(pp=4, vpp=2, schedule="zbv")).tied_reduce_s == 0


@pytest.mark.parametrize(("sums_tied_shards", "shards"), [(False, 1), (True, 4)])
def test_under_zero_the_ends_sum_whole_gradients_or_shards(sums_tied_shards: bool, shards: int) -> None:
    model, plan = small_model(tied_embeddings=True), ParallelPlan(pp=2, dp=4)
    size = 4 * 4096 * 512
    for zero, summed in ((0, size), (1, size / shards), (3, size / shards)):
        cost = step(model, replace(plan, zero=zero), sums_tied_shards=sums_tied_shards)
        assert cost.tied_reduce_s == pytest.approx(all_reduce_s(summed, 2))


def test_the_copies_of_a_stage_sum_what_their_ranks_keep_of_its_gradients() -> None:
    plan = ParallelPlan(pp=2, dp=2, vpp=2, schedule="dualpipe")
    stages = step(small_model(), plan).stages
    assert len(stages) == 4
    for zero, shards in ((0, 1), (1, 2), (3, 2)):
        cost = step(small_model(), replace(plan, zero=zero))
        expected = [all_reduce_s(4 * stage.parameters / shards, 2) for stage in stages[:2]]
        assert [traffic.seconds for traffic in cost.copies_reduce] == pytest.approx(expected)
    assert step(small_model(), replace(plan, schedule="dualpipev")).copies_reduce == ()


@pytest.mark.parametrize(
    ("sequence_parallel", "scatter_gather", "share", "gathered"),
    [
        (False, False, 1.0, 0.0),
        # Narayanan et al. 2021, section 4.1: 1/tp goes over the network, NVLink gathers the rest.
        (False, True, 1 / 4, 3 / 4),
        # With sequence parallelism 1/tp of the tensor is all that a rank has and needs.
        (True, False, 1 / 4, 0.0),
        (True, True, 1 / 4, 0.0),
    ],
)
def test_what_a_pipeline_sends_to_another_node(
    sequence_parallel: bool, scatter_gather: bool, share: float, gathered: float
) -> None:
    plan = ParallelPlan(tp=4, pp=2, micro_batch=3, sequence_parallel=sequence_parallel)
    cluster = round_cluster(gpus_per_node=4, scale_up_domain=4)
    job = Job(model=small_model(), seq_len=256, global_batch=24)
    stack = plain_stack(pp_scatter_gather=scatter_gather)
    whole = 3 * 256 * 512 * 2
    network_s = send_recv_s(cluster, share * whole, local=False)
    found = step_cost(job, plan, CostModel(small_model(), cluster, stack)).send_s
    assert found == pytest.approx((network_s + gathered * whole / BYTES_PER_S,))


def test_what_a_pipeline_sends_inside_a_node() -> None:
    assert step(small_model(), ParallelPlan(pp=2, micro_batch=3)).send_s == pytest.approx(
        (3 * 256 * 512 * 2 / BYTES_PER_S,)
    )


def test_context_ranks_send_their_part_of_the_sequence() -> None:
    one, two = (step(small_model(), ParallelPlan(pp=2, cp=cp)).send_s[0] for cp in (1, 2))
    assert two == pytest.approx(one / 2)


@pytest.mark.parametrize(
    ("zero", "per_parameter"),
    [
        # Update: gradient 4, two moments and the fp32 copy read and written 2·12, bf16 weight 2; the
        # norm reads the gradient again, 4; zeroing writes it, 4. ZeRO shares the first two, ZeRO-2 all.
        (0, 4 + 24 + 2 + 4 + 4),
        (1, (4 + 24 + 2 + 4) / 8 + 4),
        (2, (4 + 24 + 2 + 4 + 4) / 8),
        (3, (4 + 24 + 2 + 4 + 4) / 8),
    ],
)
def test_the_update_moves_its_states(zero: int, per_parameter: float) -> None:
    cost = step(small_model(), ParallelPlan(dp=8, zero=zero))
    moved_s = per_parameter * parameters_of_small_model() / (0.8 * 1e12)
    assert cost.syncs[0].optimizer_s == pytest.approx(3e-6 + moved_s)  # and a launch
