"""A layer with experts: what travels, what is computed, what the host launches."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from parsim.cost.cell import cell_of
from parsim.cost.collective import Group, collective_s, dispatch_s, expected_distinct
from parsim.cost.layer import layer_operations
from parsim.cost.memory_bound import memory_bound_s
from parsim.cost.operation import Elementwise, Gemm, Operation, Transfer
from parsim.cost.price import PartTime
from parsim.cost.stage import CostModel
from parsim.errors import ParsimError
from parsim.hardware import Cluster, Link
from parsim.model import ModelSpec, MoeSpec
from parsim.plan import Job, ParallelPlan
from parsim.schedule.check import check_plan
from tests.builders import plain_stack, round_cluster, small_model

EXPERTS = small_model(moe=MoeSpec(experts=8, top_k=2, ffn_hidden=512))
PLAN = ParallelPlan(dp=8, ep=8)


def job(model: ModelSpec, precision: str = "bf16") -> Job:
    return Job(model=model, seq_len=256, global_batch=24, precision=precision)


def operations(
    model: ModelSpec, plan: ParallelPlan, precision: str = "bf16", **stack: Any
) -> tuple[Operation, ...]:
    cell = cell_of(job(model, precision), plan)
    return layer_operations(model, 0, cell, plain_stack(**stack))


def products(ops: tuple[Operation, ...]) -> dict[str, Gemm]:
    return {op.name: op for op in ops if isinstance(op, Gemm)}


def layer_time(bytes_per_s: float, plan: ParallelPlan = PLAN, **stack: Any) -> PartTime:
    link = Link(latency_s=0.0, bandwidth_bytes_per_s=bytes_per_s, source="", date="")
    costs = CostModel(EXPERTS, round_cluster(intra_node=link), plain_stack(**stack))
    return costs.layer(cell_of(job(EXPERTS), plan), 0).time


@pytest.mark.parametrize(("places", "draws"), [(1, 3), (2, 3), (3, 2), (4, 4)])
def test_expected_distinct_places_by_counting_all_draws(places: int, draws: int) -> None:
    counts = [len(set(drawn)) for drawn in product(range(places), repeat=draws)]
    assert expected_distinct(places, draws) == pytest.approx(sum(counts) / len(counts))


@pytest.mark.parametrize("group", [Group(8, 8), Group(32, 8)])
def test_with_one_expert_a_token_nothing_is_sent_twice(group: Group) -> None:
    """Then it only saves what an all-to-all over the network sends to ranks of its own domain."""
    cluster = round_cluster()
    assert dispatch_s(cluster, 1e9, 1, group) == pytest.approx(
        collective_s(cluster, "all_to_all", 1e9, group), rel=0.01
    )


def test_a_token_crosses_the_network_once_for_each_domain() -> None:
    """4 domains, 8 draws: 4 (1 - 0.75^8) domains, 3/4 of them remote; an all-to-all sends 8 · 24/32."""
    cluster, group = round_cluster(), Group(32, 8)
    network = 0.93 * 1e10
    copies = 4 * (1 - 0.75**8) * 3 / 4
    assert dispatch_s(cluster, 1e9, 8, group) == pytest.approx(copies * 1e9 / network, rel=0.02)
    assert collective_s(cluster, "all_to_all", 8e9, group) == pytest.approx(6e9 / network, rel=0.02)


def test_one_expert_is_a_dense_feed_forward() -> None:
    """Same products and activation, and a router of one column."""
    dense = small_model(ffn_hidden=512)
    alone = small_model(moe=MoeSpec(experts=1, top_k=1, ffn_hidden=512))
    want, got = (products(operations(model, ParallelPlan())) for model in (dense, alone))
    for name in ("fc1", "fc2"):
        ours, theirs = got[f"expert {name}"], want[name]
        assert (ours.m, ours.n, ours.k, ours.batch) == (theirs.m, theirs.n, theirs.k, 1)
        assert ours.saved_bytes == theirs.saved_bytes
    assert (got["router"].m, got["router"].n) == (256, 1)


@pytest.mark.parametrize("expert_tp", [1, 4])
def test_tensor_parallel_experts_do_the_same_work(expert_tp: int) -> None:
    """A part of each expert, for the tokens of all ranks that share it."""
    plan = ParallelPlan(dp=2, tp=4, ep=2, expert_tp=expert_tp, sequence_parallel=True)
    ops = operations(EXPERTS, plan)
    fc1 = products(ops)["expert fc1"]
    assert fc1.n == 2 * 512 // expert_tp
    assert fc1.flops == 2 * (256 // 4 * 2) * (2 * 512) * 512
    moved = 256 // 4 * 2 * 512 * 2
    shared = [
        (op.when, op.kind, op.num_bytes)
        for op in ops
        if isinstance(op, Transfer) and op.name in ("dispatched tokens", "expert results")
    ]
    assert shared == (
        []
        if expert_tp == 1
        else [
            ("forward", "all_gather", 4 * moved), ("backward", "reduce_scatter", 4 * moved),
            ("forward", "reduce_scatter", 4 * moved), ("backward", "all_gather", 4 * moved),
        ]
    )  # fmt: skip


def test_a_rank_holds_its_part_of_its_experts() -> None:
    whole, cut = (
        CostModel(EXPERTS, round_cluster(), plain_stack())
        .layer(cell_of(job(EXPERTS), ParallelPlan(dp=4, tp=4, ep=2, expert_tp=etp)), 0)
        .expert_parameters
        for etp in (1, 4)
    )
    assert whole == 4 * cut == 8 // 2 * 3 * 512 * 512


def test_the_ranks_of_a_stage_hold_the_experts_at_least_once() -> None:
    plan = ParallelPlan(dp=6, tp=4, ep=8, expert_tp=4, sequence_parallel=True)
    with pytest.raises(ParsimError, match=r"ep·expert_tp regroups"):
        check_plan(job(EXPERTS), plan, round_cluster())
    half = ParallelPlan(dp=8, tp=4, ep=8, expert_tp=2, sequence_parallel=True)
    with pytest.raises(ParsimError, match="cut as the dense layers"):
        check_plan(job(EXPERTS), half, round_cluster())


def test_tokens_of_an_expert_are_padded() -> None:
    """256 tokens to 3 of 384 experts, 6 a rank: 128 tokens an expert and rank, 6 after padding 32."""
    kimi = small_model(moe=MoeSpec(experts=384, top_k=3, ffn_hidden=512))
    assert products(operations(kimi, ParallelPlan(dp=64, ep=64)))["expert fc1"].m == 128
    odd = small_model(moe=MoeSpec(experts=384, top_k=8, ffn_hidden=512))
    assert products(operations(odd, ParallelPlan(dp=64, ep=64)))["expert fc1"].m == 352


def test_biases_of_experts_cost_passes_of_their_own_until_they_are_fused() -> None:
    biased = small_model(moe=MoeSpec(experts=8, top_k=2, ffn_hidden=512, expert_bias=True))

    def names(**stack: Any) -> set[str]:
        ops = operations(biased, PLAN, "fp8", **stack)
        return {op.name for op in ops if isinstance(op, Elementwise) and op.forward_bytes > 0}

    assert names() - names(fused_experts=True) == {"expert bias", "expert casts", "activation"}


def test_an_exchange_hides_behind_compute_and_takes_some_of_it() -> None:
    plain = layer_time(1e11, overlap_cost=0.25)
    hidden = layer_time(1e11, overlap_cost=0.25, fused_experts=True)
    assert 0 < plain.forward.ep_s < hidden.forward.compute_s
    assert hidden.forward.ep_s == pytest.approx(0.25 * plain.forward.ep_s)
    slow = layer_time(1e8, overlap_cost=0.25)
    left = layer_time(1e8, overlap_cost=0.25, fused_experts=True)
    beside_s = left.forward.compute_s
    assert left.forward.ep_s == pytest.approx(slow.forward.ep_s - 0.75 * beside_s)


def test_only_exchanges_over_the_network_may_be_hidden() -> None:
    inside, apart = ParallelPlan(dp=8, ep=8), ParallelPlan(dp=8, tp=2, ep=8, expert_tp=2)
    for plan, hides in ((inside, False), (apart, True)):
        shown, hidden = (layer_time(1e11, plan, ep_overlap=when) for when in ("never", "network"))
        assert (hidden.forward.ep_s < shown.forward.ep_s) is hides


def test_the_host_of_a_layer_with_experts_unless_graphs_launch_it() -> None:
    eager = layer_time(1e11, moe_host_s=1.0)
    assert eager.forward.total_s == pytest.approx(1.0)
    assert eager.backward.total_s == pytest.approx(1.0)
    cluster = round_cluster()
    slow_host = replace(cluster, device=replace(cluster.device, host_slowdown=2.0))

    def forward_s(on: Cluster, graphs: bool) -> float:
        stack = plain_stack(moe_host_s=1.0, graphs_for_slow_hosts=graphs)
        costs = CostModel(EXPERTS, on, stack)
        return costs.layer(cell_of(job(EXPERTS), PLAN), 0).time.forward.total_s

    assert forward_s(slow_host, graphs=False) == pytest.approx(2.0)
    assert forward_s(slow_host, graphs=True) < 0.5
    assert forward_s(cluster, graphs=True) == pytest.approx(1.0)


def test_routed_tokens_and_exchanges_are_slower_in_training() -> None:
    plain = layer_time(1e9)
    slow = layer_time(1e9, ep_slowdown=1.5, routed_slowdown=3.0)
    assert slow.forward.ep_s == pytest.approx(1.5 * plain.forward.ep_s)
    routed = [op for op in operations(EXPERTS, PLAN) if isinstance(op, Elementwise) and op.routed]
    assert {op.name for op in routed} == {"permute", "combine"}
    once_s = sum(memory_bound_s(round_cluster(), op.forward_bytes) for op in routed)
    assert slow.forward.compute_s - plain.forward.compute_s == pytest.approx(2 * once_s)
    assert slow.weight_grad == plain.weight_grad
