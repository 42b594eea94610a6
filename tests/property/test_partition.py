"""Chosen stages: what parsim believes of them is what the replay says, and no others are better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parsim.cost.stage import CostModel
from parsim.cost.step import mixed_step_cost
from parsim.model import ModelSpec, MoeSpec
from parsim.plan import Job, ParallelPlan, recomputed_layers, stage_layers
from parsim.schedule import ONE_CHUNK_SCHEDULES, make_schedule
from parsim.schedule.program import step_time_s
from parsim.search.partition.chosen import loads_of, partitioned
from parsim.search.partition.plan import Partitioner
from parsim.search.partition.table import Counts, TableMaker, table_of
from parsim.search.partition.walk import Stages, Walker
from parsim.simulate.prediction import memory_by_rank, program_of
from tests.builders import plain_stack, round_cluster, small_model
from tests.strategies import CASES, Case, stage_splits

ONE_CHUNK = CASES.filter(lambda case: case[1].schedule in ONE_CHUNK_SCHEDULES)
EQUAL = {"rel": 1e-9}


def needed_bytes(job: Job, plan: ParallelPlan, costs_by_rank: Sequence[CostModel]) -> list[float]:
    """Of every rank, by a walk through its actions."""
    costs = costs_by_rank[0]
    schedule = make_schedule(plan, plan.num_micro_batches(job))
    cost = mixed_step_cost(job, plan, costs_by_rank)
    uses = memory_by_rank(cost, schedule, job, plan, costs)
    return [use.peak + costs.stack.context_bytes for use in uses]


def with_memory(costs: CostModel, memory_bytes: float) -> CostModel:
    device = replace(costs.cluster.device, memory_bytes=memory_bytes)
    cluster = replace(costs.cluster, device=device)
    return CostModel(costs.model, cluster, costs.stack)


def tight(case: Case) -> Case:
    """With devices whose memory is what the plan needs."""
    job, plan, costs = case
    most = max(needed_bytes(job, plan, [costs] * plan.pp))
    return job, plan, with_memory(costs, most * (1 + 1e-9))


@given(ONE_CHUNK)
@settings(max_examples=80, deadline=None)
def test_the_table_has_the_bytes_of_the_replay(case: Case) -> None:
    job, plan, costs = case
    own = stage_layers(job.model, plan)
    makers = [TableMaker(job, costs)] * plan.pp
    table = table_of(plan, makers, max(own), Counts(fixed=plan.recompute_layers))
    believed = table.along(table.rows.num_bytes, own)
    assert believed == pytest.approx(needed_bytes(job, plan, [costs] * plan.pp), **EQUAL)
    loads = loads_of(job, plan, [costs] * plan.pp)
    assert [load.num_bytes for load in loads.ranks] == pytest.approx(believed, **EQUAL)
    assert tuple(table.along(table.rows.recomputed, own)) == recomputed_layers(job.model, plan) or (
        plan.recompute == "none"
    )


@pytest.mark.parametrize("counts", [(4, 4), (2, 5), (0, 0)])
def test_a_module_that_predicts_more_tokens_is_the_last_layer_of_its_stage(
    counts: tuple[int, int],
) -> None:
    model = small_model(mtp_layers=1)
    job = Job(model=model, seq_len=256, global_batch=4)
    plan = ParallelPlan(pp=2, recompute="full", stage_split=(4, 4), recompute_layers=counts)
    costs = [CostModel(model, round_cluster(), plain_stack())] * 2
    table = table_of(plan, [TableMaker(job, costs[0])] * 2, 4, Counts(fixed=counts))
    loads = loads_of(job, plan, costs).ranks
    assert table.along(table.rows.seconds, (4, 4)) == pytest.approx([load.seconds for load in loads])
    assert table.along(table.rows.num_bytes, (4, 4)) == pytest.approx(needed_bytes(job, plan, costs))


def alone(case: Case) -> Case:
    """Without anything that keeps replicas alike: of parameters, experts or tied embeddings."""
    job, plan, costs = case
    moe = job.model.moe if plan.tp == 1 else None
    model = replace(job.model, tied_embeddings=False, moe=moe)
    job = replace(job, model=model, global_batch=job.global_batch // plan.dp)
    plan = replace(
        plan, dp=1, cp=1, ep=1, expert_tp=1, zero=0, zero_group=0, weighted=False, aggregation="bucket",
        compression="none",
    )  # fmt: skip
    return job, plan, CostModel(model, costs.cluster, costs.stack)


@given(ONE_CHUNK.map(alone))
@settings(max_examples=40, deadline=None)
def test_the_table_has_the_seconds_of_the_replay(case: Case) -> None:
    # Of a split backward the second half is launched apart, which the table leaves out.
    job, plan, costs = case
    plan = replace(plan, schedule="1f1b")
    own = stage_layers(job.model, plan)
    makers = [TableMaker(job, costs)] * plan.pp
    table = table_of(plan, makers, max(own), Counts(fixed=plan.recompute_layers))
    busy_s = [0.0] * plan.pp
    for task in program_of(job, plan, costs)[0].tasks:
        sends = task.kind == "pp" and not costs.stack.pp_overlap
        if sends or task.kind in ("forward", "backward", "tp", "cp", "ep"):
            busy_s[task.rank] += task.duration_s
    m = plan.num_micro_batches(job)
    assert [m * s for s in table.along(table.rows.seconds, own)] == pytest.approx(busy_s, **EQUAL)


@given(CASES, st.booleans(), st.booleans())
@settings(max_examples=80, deadline=None)
def test_what_is_chosen_fits_where_anything_does(case: Case, split: bool, counts: bool) -> None:
    # The plan's own stages fit, just so: where it may keep them, so does what is chosen.
    job, plan, costs = tight(case)
    chosen = Partitioner(job).partition(plan, [costs] * plan.pp, split=split, counts=counts)
    assert max(needed_bytes(job, chosen, [costs] * plan.pp)) <= costs.cluster.device.memory_bytes
    layers = recomputed_layers(job.model, chosen)
    if counts and not any(layers):
        assert (chosen.recompute, chosen.recompute_layers) == ("none", ())
    if counts and plan.recompute != "none" and chosen.schedule in ONE_CHUNK_SCHEDULES and any(layers):
        _no_stage_fits_with_fewer(job, plan, chosen, layers, costs)


def _no_stage_fits_with_fewer(
    job: Job, plan: ParallelPlan, chosen: ParallelPlan, layers: tuple[int, ...], costs: CostModel
) -> None:
    limit = costs.cluster.device.memory_bytes
    for stage, count in enumerate(layers):
        if count:
            fewer = tuple(n - (s == stage) for s, n in enumerate(layers))
            less = replace(chosen, recompute=plan.recompute, recompute_layers=fewer)
            assert needed_bytes(job, less, [costs] * plan.pp)[stage] > limit * (1 - 1e-9)


@pytest.mark.parametrize("schedule", ["pipedream", "gpipe"])
@pytest.mark.parametrize("fast_rank", [0, 1, 3])
def test_a_much_faster_device_may_get_most_layers(schedule: str, fast_rank: int) -> None:
    # Seven times as fast: 18 layers, more than the stages that are looked at first have. Without a flush
    # the slowest rank alone counts, and with hundreds of micro-batches hardly anything else does.
    model = small_model(layers=24, hidden=4096, heads=32, ffn_hidden=16384, vocab=64)
    job, plan = Job(model=model, seq_len=4096, global_batch=512), ParallelPlan(pp=4, schedule=schedule)
    costs = with_memory(CostModel(model, round_cluster(), plain_stack()), 1e15)
    device = costs.cluster.device
    rates = {dtype: 7 * rate for dtype, rate in device.peak_flops_per_s.items()}
    bandwidth = 7 * device.memory_bandwidth_bytes_per_s
    fast = replace(device, peak_flops_per_s=rates, memory_bandwidth_bytes_per_s=bandwidth)
    by_rank = [costs] * 4
    by_rank[fast_rank] = CostModel(model, replace(costs.cluster, device=fast), costs.stack)
    chosen = Partitioner(job).partition(plan, by_rank, split=True, counts=False)
    slow = [n for rank, n in enumerate(chosen.stage_split) if rank != fast_rank]
    assert max(slow) == 2
    assert sum(chosen.stage_split) == 24


SEVERAL_CHUNKS = ("interleaved", "looped-bfs", "interleaved-zb", "zbv", "dualpipe", "dualpipev")


@pytest.mark.parametrize("schedule", SEVERAL_CHUNKS)
@pytest.mark.parametrize("dense", [0, 1])
def test_ranks_of_several_chunks_recompute_least(schedule: str, dense: int) -> None:
    # Layers that are alike, and a first one that is smaller than those with experts.
    moe = MoeSpec(experts=4, top_k=2, ffn_hidden=1024, dense_layers=dense) if dense else None
    model = small_model(layers=8, vocab=512, moe=moe)
    job = Job(model=model, seq_len=256, global_batch=8)
    plan = ParallelPlan(pp=2, vpp=2, schedule=schedule, recompute="full")
    costs = CostModel(model, round_cluster(), plain_stack())
    most = recomputed_layers(model, plan)
    every = []
    for layers in product(*(range(count + 1) for count in most)):
        loads = loads_of(job, replace(plan, recompute_layers=layers), [costs] * 2)
        every.append(
            (max(load.num_bytes for load in loads.ranks), [load.seconds for load in loads.ranks])
        )
    least, none = min(num_bytes for num_bytes, _ in every), every[0][0]
    for share in (0.01, 0.3, 0.6, 0.9):
        limit = least + share * (none - least)
        small = [with_memory(costs, limit)] * 2
        chosen = Partitioner(job).partition(plan, small, split=False, counts=True)
        loads = loads_of(job, chosen, small)
        assert loads.fits
        fastest = min(sum(seconds) for num_bytes, seconds in every if num_bytes <= limit)
        assert sum(load.seconds for load in loads.ranks) == pytest.approx(fastest, rel=1e-6)


@given(ONE_CHUNK.map(alone), st.data())
@settings(max_examples=40, deadline=None)
def test_without_replicas_the_walk_is_the_replay_of_any_split(case: Case, data: st.DataObject) -> None:
    job, plan, costs = case
    plan = replace(plan, recompute_layers=())
    split = data.draw(stage_splits(job.model.layers, plan.pp))
    other = replace(plan, stage_split=split)
    again = recomputed_layers(job.model, other)
    walked = Walker(job, plan, [costs] * plan.pp).steps_s([Stages(split, again)])[0]
    step_s = step_time_s(program_of(job, other, costs)[0])
    assert walked + costs.stack.step_overhead_s == pytest.approx(step_s, rel=1e-12)


def every_split(layers: int, stages: int) -> list[tuple[int, ...]]:
    cuts = product(range(1, layers), repeat=stages - 1)
    ends = [(0, *cut, layers) for cut in cuts if list(cut) == sorted(set(cut))]
    return [tuple(np.diff(end).tolist()) for end in ends]


def mixed_case(schedule: str, m: int, slow: float) -> tuple[Job, ParallelPlan, list[CostModel]]:
    """10 layers on 3 ranks, the last of which has a slower and smaller device."""
    model: ModelSpec = small_model(layers=10, vocab=16384)
    costs = CostModel(model, round_cluster(), plain_stack())
    device = costs.cluster.device
    other = replace(
        device,
        name="slow",
        peak_flops_per_s={k: v / slow for k, v in device.peak_flops_per_s.items()},
        memory_bandwidth_bytes_per_s=device.memory_bandwidth_bytes_per_s / slow,
    )
    slower = CostModel(model, replace(costs.cluster, name="slow", device=other), costs.stack)
    plan = ParallelPlan(pp=3, schedule=schedule)
    return Job(model=model, seq_len=256, global_batch=m), plan, [costs, costs, slower]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1", "zb-h2"])
@pytest.mark.parametrize("slow", [1.0, 2.0])
def test_the_chosen_split_is_nearly_the_best_of_all(schedule: str, slow: float) -> None:
    for m in (3, 6, 24):
        job, plan, costs_by_rank = mixed_case(schedule, m, slow)

        def step_s(plan: ParallelPlan, job: Job = job, by: list[CostModel] = costs_by_rank) -> float:
            return step_time_s(program_of(job, plan, by[0], costs_by_rank=by)[0])

        chosen = partitioned(job, plan, costs_by_rank, split=True, counts=False)
        every = [step_s(replace(plan, stage_split=split)) for split in every_split(10, 3)]
        assert step_s(chosen.plan) <= min(every) * 1.001
        if slow > 1:
            assert chosen.after.layers[2] < min(chosen.after.layers[:2])
            assert chosen.before.slowest == 2


def test_a_smaller_device_gets_fewer_layers() -> None:
    job, plan, costs_by_rank = mixed_case("1f1b", 12, 1.0)
    usual = loads_of(job, plan, costs_by_rank)
    assert usual.fits
    small = with_memory(costs_by_rank[0], usual.ranks[0].num_bytes * 0.8)
    chosen = partitioned(job, plan, [small, *costs_by_rank[1:]], split=True, counts=False)
    assert not chosen.before.fits
    assert chosen.before.fullest == 0
    assert chosen.after.fits
    assert chosen.after.layers[0] < usual.layers[0]


def test_where_nothing_fits_the_fullest_rank_lacks_least() -> None:
    job, plan, costs_by_rank = mixed_case("1f1b", 12, 1.0)
    small = [with_memory(costs, 2e7 - 8e6 * rank) for rank, costs in enumerate(costs_by_rank)]
    chosen = partitioned(job, plan, small, split=True, counts=False)
    assert not chosen.after.fits
    limits = [costs.cluster.device.memory_bytes for costs in small]
    lacking = [
        max(np.subtract(needed_bytes(job, replace(plan, stage_split=split), small), limits))
        for split in every_split(10, 3)
    ]
    fullest = chosen.after.ranks[chosen.after.fullest]
    assert fullest.num_bytes - fullest.limit_bytes <= min(lacking) * (1 + 1e-9)
