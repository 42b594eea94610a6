"""What narrow products cost beside themselves: casts, shared extremes, gathers, and time on the host."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from parsim.compare.library import Library
from parsim.compare.run_models import shipped_models
from parsim.compare.run_rows import run_of
from parsim.cost.cell import Cell, cell_of
from parsim.cost.collective import Group, collective_s
from parsim.cost.layer import layer_operations
from parsim.cost.memory import gathered_bytes
from parsim.cost.operation import Elementwise
from parsim.cost.stage import CostModel
from parsim.cost.step import EXTREMES_BYTES, step_cost
from parsim.hardware import slowest_of
from parsim.plan import Job, ParallelPlan
from parsim.schedule import make_schedule
from parsim.schedule.lower import lower
from parsim.schedule.program import step_time_s
from parsim.stack import Stack
from tests.builders import flat_cost, plain_stack, round_cluster, small_model

MODEL = small_model()
DELAYED, TENSOR = plain_stack(), plain_stack(fp8_scaling="tensor")


def cell(precision: str, plan: ParallelPlan | None = None) -> Cell:
    return cell_of(
        Job(model=MODEL, seq_len=256, global_batch=8, precision=precision), plan or ParallelPlan()
    )


def cast_bytes(name: str, precision: str, stack: Stack, plan: ParallelPlan | None = None) -> float:
    operations = layer_operations(MODEL, 0, cell(precision, plan), stack)
    (found,) = (op for op in operations if isinstance(op, Elementwise) and op.name == f"{name} cast")
    return found.forward_bytes


@pytest.mark.parametrize(
    ("precision", "stack", "of_a_norm", "of_an_activation"),
    [
        ("fp8", DELAYED, 1 + 1, 2 + 1 + 1),  # the norm writes fp8 itself, a transposed copy follows
        ("fp8", TENSOR, 2 + 2 + 1 + 1, 2 + 2 + 1 + 1),  # one more pass to find the scale
        ("mxfp8", TENSOR, 2 + 1 + 1, 2 + 1 + 1),  # scales of blocks need no pass before
        ("nvfp4", TENSOR, 3 * 2 + 2 * 0.5625, 3 * 2 + 2 * 0.5625),
    ],
)
def test_bytes_of_a_cast(
    precision: str, stack: Stack, of_a_norm: float, of_an_activation: float
) -> None:
    assert cast_bytes("fc1", precision, stack) == pytest.approx(256 * 512 * of_a_norm)
    assert cast_bytes("fc2", precision, stack) == pytest.approx(256 * 1024 * of_an_activation)


def test_a_gathered_operand_is_cast_by_the_rank_that_has_it() -> None:
    plan = ParallelPlan(tp=4, sequence_parallel=True)
    whole = 256 * 512
    # Scale, cast on a quarter of the rows; what all have gathered is read and written transposed.
    assert cast_bytes("fc1", "fp8", TENSOR, plan) == whole * ((2 + 2 + 1) / 4 + 1 + 1)
    assert cast_bytes("fc1", "mxfp8", TENSOR, plan) == whole * (2 + 1 + 1) / 4


def test_delayed_scaling_shares_extremes_among_all_ranks_of_a_stage() -> None:
    plan = ParallelPlan(dp=4, tp=2, pp=2)
    stack = plain_stack(collective_overhead_s=1e-5)

    def extremes_s(precision: str, stack: Stack) -> float:
        job = Job(model=MODEL, seq_len=256, global_batch=8, precision=precision)
        cluster = round_cluster()
        device = replace(cluster.device, peak_flops_per_s={"bf16": 1e14, "fp8": 2e14})
        return step_cost(job, plan, CostModel(MODEL, replace(cluster, device=device), stack)).extremes_s

    bare_s = collective_s(round_cluster(), "all_reduce", EXTREMES_BYTES, Group(8, 8))
    assert extremes_s("fp8", stack) == pytest.approx(bare_s + 3e-5)
    assert extremes_s("bf16", stack) == 0
    assert extremes_s("fp8", replace(stack, fp8_scaling="tensor")) == 0


def test_every_pass_of_every_stage_waits_for_the_extremes() -> None:
    plan = ParallelPlan(pp=2)
    schedule = make_schedule(plan, 4)
    without = flat_cost(2)
    with_extremes = replace(without, extremes_s=0.1)
    times = [
        step_time_s(lower(schedule, cost, plan, plain_stack())) for cost in (without, with_extremes)
    ]
    # 1F1B: (m + p − 1) forwards and backwards on the longest path
    assert times[1] - times[0] == pytest.approx(2 * 5 * 0.1)


def test_parameters_are_gathered_as_fp8_products_read_them() -> None:
    stack = plain_stack(fp8_gather=True)
    assert [gathered_bytes(precision, stack) for precision in ("fp8", "mxfp8", "nvfp4", "bf16")] == [
        *(1, 1, 2, 2)
    ]
    assert gathered_bytes("fp8", plain_stack()) == 2


def test_a_short_layer_waits_for_the_host() -> None:
    """Passes of 10 ms on the host: plain, with casts, with a ring of two, and by a slower host."""
    stack = plain_stack(layer_host_s=10.0, narrow_host_s=2.0, ring_host_s=3.0)
    cluster = round_cluster()
    device = replace(cluster.device, peak_flops_per_s={"bf16": 1e14, "fp8": 2e14})

    def forward_s(precision: str, host_slowdown: float = 1.0, **plan: int) -> float:
        slower = replace(cluster, device=replace(device, host_slowdown=host_slowdown))
        at = cell(precision, ParallelPlan(**plan))  # type: ignore[arg-type]
        return CostModel(MODEL, slower, stack).layer(at, 0).time.forward.total_s

    assert forward_s("bf16") == pytest.approx(10)
    assert forward_s("fp8") == pytest.approx(12)
    assert forward_s("bf16", cp=2) == pytest.approx(13)
    assert forward_s("fp8", cp=4) == pytest.approx(10 + 2 + 3 * 3)
    assert forward_s("fp8", host_slowdown=1.5) == pytest.approx(18)


def test_parts_of_a_ring_are_summed_in_fp32() -> None:
    plan = ParallelPlan(cp=4)
    operations = layer_operations(MODEL, 0, cell("bf16", plan), plain_stack())
    (sums,) = (op for op in operations if isinstance(op, Elementwise) and op.name.startswith("parts"))
    # Three steps after the first, three quarters of 64 tokens x 512 values: 2 bytes read, 4 + 4 added to
    assert sums.forward_bytes == 3 * 0.75 * 64 * 512 * (2 + 8) == sums.backward_bytes


def test_the_slowest_of_many_devices() -> None:
    # Expected greatest of n standard normals (H. L. Harter, Biometrika 48, 1961)
    assert slowest_of(8, 0.02) == pytest.approx(1 + 0.02 * 1.4236, rel=1e-3)
    assert slowest_of(100, 0.02) == pytest.approx(1 + 0.02 * 2.5076, rel=1e-3)


def test_compute_goes_at_the_pace_of_the_slowest_device() -> None:
    cluster = round_cluster()
    spread = replace(cluster, device=replace(cluster.device, clock_spread=0.01))
    at = cell("bf16")._replace(gpus=512)
    alike, apart = (CostModel(MODEL, c, plain_stack()).layer(at, 0).time for c in (cluster, spread))
    assert apart.weight_grad.total_s == pytest.approx(alike.weight_grad.total_s * slowest_of(512, 0.01))
    assert math.isclose(slowest_of(512, 0.01), 1.0304, abs_tol=2e-4)


def test_performance_recipes_reduce_in_bf16_and_nvfp4_has_no_userbuffers() -> None:
    row = {
        "framework": "megatron-core-2025", "hardware": "gb200-nvl72", "gpus": "8", "layers": "8",
        "hidden": "512", "heads": "8", "ffn_hidden": "1024", "gated_mlp": "1", "vocab": "4096",
        "seq_len": "256", "global_batch": "8", "micro_batch": "1", "tp": "4", "pp": "1",
        "recompute": "none",
    }  # fmt: skip
    library = Library(models=shipped_models())
    plain = run_of(row | {"precision": "fp8"}, library)
    assert plain.plan.tp_overlap
    assert plain.stack.gradient_dtype == "fp32"
    recipe = run_of(row | {"precision": "nvfp4", "notes": "per scripts/performance recipe"}, library)
    assert not recipe.plan.tp_overlap
    assert recipe.stack.gradient_dtype == "bf16"
    assert any("nvfp4" in text for text in recipe.assumed)
