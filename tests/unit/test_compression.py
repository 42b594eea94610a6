"""Gradient compression: what is sent, what it costs, and where it pays."""

from __future__ import annotations

from dataclasses import replace

import pytest

from parsim.cost.collective import NETWORK_EFFICIENCY, Group
from parsim.cost.compression import INT8_BLOCK, Reduced, reduced_over
from parsim.cost.memory_bound import memory_bound_s
from parsim.cost.stage import CostModel
from parsim.cost.weights import Gradients, Matrix
from parsim.errors import ParsimError
from parsim.execute.support import check_executable
from parsim.hardware import Cluster, Link
from parsim.plan import Job, ParallelPlan, parse_compression, parse_plan
from parsim.schedule import make_schedule
from parsim.schedule.check import plan_problems
from parsim.schedule.program import step_time_s
from parsim.simulate.prediction import predict, program_of
from tests.builders import plain_stack, round_cluster, small_model

N = 1_000_000
KINDS = ("fp16", "bf16", "int8", "topk-1", "powersgd-4")


def reduced(text: str, ranks: int, gradients: Gradients | None = None, width: float = 4.0) -> Reduced:
    group = Group(ranks, min(8, ranks))
    gradients = gradients or Gradients(float(N))
    compression = parse_compression(text)
    return reduced_over(group, gradients, compression, width, round_cluster(), plain_stack())


@pytest.mark.parametrize("ranks", [2, 8, 32])
def test_bytes_that_each_rank_sends(ranks: int) -> None:
    there_and_back = 2 * (ranks - 1) / ranks
    expected = {
        "none": there_and_back * 4 * N,
        "fp16": there_and_back * 2 * N,
        "bf16": there_and_back * 2 * N,
        # An all-to-all and an all-gather of a byte a value and a scale a block.
        "int8": there_and_back * N * (1 + 4 / INT8_BLOCK),
        # To every other rank: one value in a hundred, with its place.
        "topk-1": (ranks - 1) * 0.01 * N * (4 + 4),
    }
    for text, num_bytes in expected.items():
        assert reduced(text, ranks).traffic.num_bytes == pytest.approx(num_bytes), text


def test_powersgd_sends_two_thin_matrices_for_each_and_vectors_whole() -> None:
    """Vogels et al. 2019, section 3: r(m + n) numbers instead of m·n."""
    big, tiny, rest = Matrix(512, 1024, 3), Matrix(8, 8), 1000
    gradients = Gradients(big.values + tiny.values + rest, (big, tiny))
    sent = 3 * 4 * (512 + 1024) + 8 * 8 + rest  # of the tiny one P and Q would be larger than itself
    assert reduced("powersgd-4", 4, gradients).traffic.num_bytes == pytest.approx(2 * 3 / 4 * 4 * sent)
    # Its appendix: ResNet-18's largest layers, 512 × 4608, become 461/r times smaller.
    layer = Matrix(512, 4608)
    one = Gradients(layer.values, (layer,))
    ratio = reduced("none", 4, one).traffic.num_bytes / reduced("powersgd-2", 4, one).traffic.num_bytes
    assert ratio == pytest.approx(461 / 2, rel=0.01)


def test_top_k_sends_more_than_an_all_reduce_beyond_some_number_of_ranks() -> None:
    """(n − 1)·k·8 bytes against 2(n − 1)/n·4·N: alike where n = N/k."""
    for ranks, less in ((64, True), (128, False)):
        found = reduced("topk-1", ranks).traffic.num_bytes < reduced("none", ranks).traffic.num_bytes
        assert found == less


def test_kernels_move_what_the_algorithms_say() -> None:
    cluster, ranks = round_cluster(), 8

    def passes(*num_bytes: float) -> float:
        return sum(memory_bound_s(cluster, each) for each in num_bytes)

    narrow, picked = 1 + 4 / INT8_BLOCK, 0.01 * N
    assert reduced("none", ranks).device_s == 0
    assert reduced("bf16", ranks).device_s == pytest.approx(passes(6 * N, 6 * N))
    assert reduced("int8", ranks).device_s == pytest.approx(
        passes((4 + narrow) * N, (1 + 1 / ranks) * narrow * N, (narrow + 4) * N)
    )
    # Residual and gradient read, one of them written; read again for what is large, which is written
    # with its place and cleared; zeros, onto which every rank's entries are added.
    assert reduced("topk-1", ranks).device_s == pytest.approx(
        passes(3 * 4 * N, 4 * N + 12 * picked, 4 * N + ranks * 16 * picked)
    )


def test_int8_crosses_the_network_with_what_a_node_has_summed() -> None:
    """ZeRO++, section 3.3: of two nodes of eight, each device sends 1/8·1/2 of a byte a value to the
    other, not half; after that the all-gather.
    """
    cluster = on_network(1e10)
    inside = replace(cluster, intra_node=replace(cluster.intra_node, bandwidth_bytes_per_s=1e18))
    group, values = Group(16, 8), 1e9
    found = reduced_over(group, Gradients(values), parse_compression("int8"), 4.0, inside, plain_stack())
    exchanged_s = 1 / 2 * values / 8 / (NETWORK_EFFICIENCY * 1e10)
    gathered_s = 15 / 16 * values / 8 / (NETWORK_EFFICIENCY * 1e10)  # eight interfaces a node
    scales = 1 + 4 / INT8_BLOCK
    assert found.traffic.seconds == pytest.approx(scales * (exchanged_s + gathered_s), rel=0.01)


def test_powersgd_s_kernels() -> None:
    """Nine values moved a number, and Gram-Schmidt; products once they take more than their memory."""
    cluster, matrix = round_cluster(), Matrix(1024, 1024)
    gradients = Gradients(matrix.values, (matrix,))
    column = 4 * 1024
    one = sum(memory_bound_s(cluster, b) for b in (24 * 1024**2, 12 * 1024**2, 2 * column))
    assert reduced("powersgd-1", 4, gradients).device_s == pytest.approx(one)
    device = replace(cluster.device, peak_flops_per_s={"bf16": 1e14, "fp32": 1e13})
    slow, compression = replace(cluster, device=device), parse_compression("powersgd-64")
    wide = reduced_over(Group(4, 4), gradients, compression, 4.0, slow, plain_stack())
    columns_s = sum(memory_bound_s(slow, 2 * column * left) for left in range(1, 65))
    products_s = 6 * matrix.values * 64 / 1e13
    moved_s = memory_bound_s(slow, 24 * 1024**2)
    assert wide.device_s == pytest.approx(moved_s + products_s + columns_s)


@pytest.mark.parametrize(
    ("peaks", "width", "rate"),
    [
        ({"fp16": 1e13, "fp32": 1e12}, 2.0, 1e13),  # V100: 16 bits, but no bf16
        ({"bf16": 1e13, "fp16": 2e13}, 2.0, 1e13),
        ({"fp32": 1e12, "fp64": 1e11}, 8.0, 1e11),
        ({"bf16": 1e13}, 4.0, 1e13),  # a profile that names no fp32
    ],
)
def test_powersgd_s_products_run_on_units_that_the_device_has(
    peaks: dict[str, float], width: float, rate: float
) -> None:
    cluster, matrix = round_cluster(), Matrix(4096, 4096)
    cluster = replace(cluster, device=replace(cluster.device, peak_flops_per_s=peaks))
    gradients, compression = Gradients(matrix.values, (matrix,)), parse_compression("powersgd-100")

    def device_s(on: Cluster) -> float:
        found = reduced_over(Group(4, 4), gradients, compression, width, on, plain_stack())
        return found.device_s

    boundless = dict.fromkeys(peaks, 1e30)
    memory_s = memory_bound_s(cluster, 3 * matrix.values * width)
    unbound = replace(cluster, device=replace(cluster.device, peak_flops_per_s=boundless))
    products_s = 6 * matrix.values * 100 / rate
    assert device_s(cluster) - device_s(unbound) == pytest.approx(max(0.0, products_s - memory_s))
    assert products_s > memory_s


JOB = Job(model=small_model(layers=8), seq_len=256, global_batch=32)
PLAN = ParallelPlan(dp=16)


def on_network(bytes_per_s: float) -> Cluster:
    link = Link(latency_s=0.0, bandwidth_bytes_per_s=bytes_per_s, source="", date="")
    return round_cluster(inter_node=link, intra_node=link)


def step_s(compression: str, bytes_per_s: float, *, overlap: bool = False) -> float:
    costs = CostModel(JOB.model, on_network(bytes_per_s), plain_stack(dp_overlap=overlap))
    program, _ = program_of(JOB, replace(PLAN, compression=compression), costs)
    return step_time_s(program)


@pytest.mark.parametrize("compression", KINDS)
def test_compression_pays_on_a_slow_network_only(compression: str) -> None:
    """By as much as the transfers get shorter, less its kernels; which no network changes."""
    assert step_s(compression, 1e8) < step_s("none", 1e8)
    assert step_s(compression, 1e13) > step_s("none", 1e13)


def test_where_the_crossover_lies() -> None:
    """Casts cost what half the bytes save: where (bytes saved) / bandwidth = kernels + latencies."""
    slow, fast = 1e9, 1e13
    gains = {b: step_s("none", b) - step_s("bf16", b) for b in (slow, fast)}
    # Both are kernels' time against a transfer that goes with one over the bandwidth.
    saved_bytes = (gains[slow] - gains[fast]) / (1 / slow - 1 / fast)
    crossover = saved_bytes / -gains[fast]
    assert slow < crossover < fast
    assert step_s("bf16", 0.9 * crossover) < step_s("none", 0.9 * crossover)
    assert step_s("bf16", 1.1 * crossover) > step_s("none", 1.1 * crossover)


@pytest.mark.parametrize("overlap", [False, True])
def test_kernels_of_compression_are_in_the_way(overlap: bool) -> None:
    """Beside a backward they come with its pieces, else before the reduction: never for nothing."""
    infinite = 1e18  # transfers take no time
    kernels_s = sum(
        step_s(c, infinite, overlap=overlap) * sign for c, sign in (("bf16", 1), ("none", -1))
    )
    costs = CostModel(JOB.model, on_network(infinite), plain_stack())
    (memory,) = program_of(JOB, PLAN, costs)[1]
    assert kernels_s == pytest.approx(
        2 * memory_bound_s(costs.cluster, 6 * memory.gradients / 4), rel=0.01
    )


@pytest.mark.parametrize(
    ("compression", "copies"), [*((k, 0) for k in KINDS[:3]), *((k, 1) for k in KINDS[3:])]
)
def test_error_feedback_is_one_more_copy_of_the_gradients(compression: str, copies: int) -> None:
    costs = CostModel(JOB.model, round_cluster(), plain_stack())
    plan = replace(PLAN, compression=compression)
    prediction, _ = predict(JOB, plan, costs)
    plain, _ = predict(JOB, PLAN, costs)
    added = copies * plain.memory.gradients
    assert prediction.memory.peak - plain.memory.peak == pytest.approx(added)
    assert prediction.to_item()["memory_bytes"]["residuals"] == added
    assert prediction.to_item()["plan"]["compression"] == compression


def problems(plan: ParallelPlan) -> list[str]:
    return [str(problem.where) for problem in plan_problems(JOB, plan, round_cluster())]


def test_what_frameworks_cannot_do_is_refused() -> None:
    assert problems(parse_plan("dp=16,compression=topk-0.5,aggregation=layer,weighted=true")) == []
    for zero in (1, 2, 3):
        assert problems(ParallelPlan(dp=16, zero=zero, compression="int8")) == ["compression"]
        assert problems(ParallelPlan(dp=16, zero=zero, aggregation="layer")) == ["aggregation"]
        assert problems(ParallelPlan(dp=16, zero=zero, weighted=True)) == []
    assert problems(ParallelPlan(compression="fp16", weighted=True)) == ["compression", "weighted"]


@pytest.mark.parametrize(
    "text", ["zip", "topk", "topk-0", "topk-101", "powersgd-1.5", "fp16-2", "topk-x"]
)
def test_unknown_compressions(text: str) -> None:
    with pytest.raises(ParsimError, match="unknown compression"):
        parse_plan(f"dp=2,compression={text}")


def test_the_short_form_reads_what_it_writes() -> None:
    plan = ParallelPlan(dp=4, compression="topk-0.1", aggregation="tensor", weighted=True)
    assert parse_plan(plan.short()) == plan


def test_the_executor_refuses_what_it_does_not_run() -> None:
    for change in ({"aggregation": "layer"}, {"weighted": True}):
        plan = replace(ParallelPlan(dp=2), **change)  # type: ignore[arg-type]
        with pytest.raises(ParsimError, match="reduced in other ways"):
            check_executable(JOB, plan, make_schedule(plan, 16), "fp32")
