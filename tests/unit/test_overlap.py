"""Tensor-parallel communication beside the matrix products that hide it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from parsim.cost.cell import Cell, cell_of
from parsim.cost.layer import layer_operations
from parsim.cost.operation import Attention, Transfer
from parsim.cost.price import PartTime, part_time
from parsim.cost.stage import CostModel
from parsim.cost.step import step_cost
from parsim.model import ModelSpec
from parsim.plan import Job, ParallelPlan
from parsim.stack import Stack
from tests.builders import plain_stack, round_cluster


def gpt(hidden: int) -> ModelSpec:
    return ModelSpec(
        name="gpt", layers=2, hidden=hidden, heads=16, ffn_hidden=4 * hidden, gated_mlp=False,
        vocab=51200, max_seq_len=2048,
    )  # fmt: skip


def cell(plan: ParallelPlan, hidden: int = 4096) -> Cell:
    return cell_of(Job(model=gpt(hidden), seq_len=2048, global_batch=1), plan)


def layer_time(plan: ParallelPlan, stack: Stack, hidden: int = 4096) -> PartTime:
    at = cell(plan, hidden)
    return part_time(layer_operations(gpt(hidden), 0, at, stack), at, round_cluster(), stack)


PLAN = ParallelPlan(tp=4, sequence_parallel=True)
OVERLAPPED = ParallelPlan(tp=4, sequence_parallel=True, tp_overlap=True)
ASYNC = plain_stack(tp_async_backward=True, overlap_cost=0.0)


def kinds(plan: ParallelPlan, stack: Stack, when: str) -> list[str]:
    operations = layer_operations(gpt(4096), 0, cell(plan), stack)
    return sorted(op.kind for op in operations if isinstance(op, Transfer) and op.when == when)


def test_collectives_of_a_layer_with_sequence_parallelism() -> None:
    """Korthikanti et al. 2022, section 4.2.2: two of each a pass, and the input gathered again."""
    assert kinds(PLAN, ASYNC, "forward") == ["all_gather"] * 2 + ["reduce_scatter"] * 2
    assert kinds(PLAN, ASYNC, "backward") == ["all_gather"] * 4 + ["reduce_scatter"] * 2
    assert kinds(PLAN, plain_stack(), "backward") == ["all_gather"] * 2 + ["reduce_scatter"] * 2


def test_a_long_product_hides_its_transfer() -> None:
    """Only the two gathers of output gradients stay in the way of an asynchronous backward."""
    plain, hidden = layer_time(PLAN, plain_stack()), layer_time(PLAN, ASYNC)
    assert hidden.forward == plain.forward
    assert hidden.backward.tp_s == pytest.approx(plain.backward.tp_s / 2)
    assert layer_time(OVERLAPPED, ASYNC).backward.tp_s == 0
    assert layer_time(OVERLAPPED, ASYNC).forward.tp_s == 0


def test_a_small_model_cannot_hide_its_communication() -> None:
    """Compute shrinks with the square of the width, communication with the width."""
    shares = [
        layer_time(OVERLAPPED, ASYNC, hidden).forward.tp_s
        / layer_time(PLAN, plain_stack(), hidden).forward.tp_s
        for hidden in (256, 1024, 4096)
    ]
    assert shares[0] > shares[1] > shares[2] == 0


def test_hidden_communication_costs_its_share() -> None:
    stack = plain_stack(tp_async_backward=True, overlap_cost=0.25)
    exposed = layer_time(OVERLAPPED, stack).forward.tp_s
    assert exposed == pytest.approx(0.25 * layer_time(PLAN, stack).forward.tp_s)


def test_an_attention_kernel_of_an_older_generation_is_capped() -> None:
    """4·s²·h/2 causal FLOPs a forward, and the diagonal, at no more than the cap; 2.5 × backward."""
    uncapped, capped = (
        layer_time(ParallelPlan(), plain_stack(attention_max_flops_per_s=cap)) for cap in (0.0, 1e12)
    )
    flops = 4 * 4096 * 2048 * 2049 / 2
    gained = [
        getattr(capped, when).compute_s - getattr(uncapped, when).compute_s
        for when in ("forward", "input_grad")
    ]
    assert gained[1] == pytest.approx(2.5 * gained[0], rel=0.05)
    assert flops / 1e12 * 0.9 < gained[0] < flops / 1e12


def test_the_cap_on_attention_yields_to_the_power_limit_in_training() -> None:
    stack = plain_stack(attention_max_flops_per_s=1e12)
    device = replace(round_cluster().device, training_slowdown={"bf16": 1.25})
    at = cell(ParallelPlan())
    (attention,) = (op for op in layer_operations(gpt(4096), 0, at, stack) if isinstance(op, Attention))
    alone, limited = (
        part_time((attention,), at, cluster, stack).forward.compute_s
        for cluster in (round_cluster(), round_cluster(device=device))
    )
    assert limited == pytest.approx(1.25 * alone)


def test_broadcasts_of_zero_cost_by_the_rank() -> None:
    """InternEvo: every rank of the shard group broadcasts what it updated."""
    job = Job(model=gpt(512), seq_len=2048, global_batch=16)
    plan = ParallelPlan(dp=16, zero=1)
    gathers = [
        step_cost(job, plan, CostModel(job.model, round_cluster(), stack)).syncs[0].gather_s
        for stack in (plain_stack(), plain_stack(zero_broadcast_s=3e-3))
    ]
    assert gathers[1] - gathers[0] == pytest.approx(16 * 3e-3)


def test_fp8_operands_are_gathered_as_fp8_and_gradients_reduced_in_16_bits() -> None:
    def num_bytes(precision: str, kind: str) -> float:
        at = cell(PLAN)._replace(precision=precision)
        operations = layer_operations(gpt(4096), 0, at, plain_stack())
        return sum(op.num_bytes for op in operations if isinstance(op, Transfer) and op.kind == kind)

    assert num_bytes("fp8", "all_gather") == num_bytes("bf16", "all_gather") / 2
    assert num_bytes("fp8", "reduce_scatter") == num_bytes("bf16", "reduce_scatter")
