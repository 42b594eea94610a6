"""One rank's measured compute in the place of modelled, and what follows for the other ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from parsim.cost.cell import cell_of
from parsim.cost.price import PassTime
from parsim.cost.stage import EMBEDDING, HEAD, CostModel
from parsim.cost.step import step_cost
from parsim.execute.one_rank.emulation_work import work_of
from parsim.plan import Job, parse_plan
from parsim.schedule import make_schedule
from parsim.schedule.lower import pass_times
from parsim.schedule.measured import MeasuredWork, measured_cost
from parsim.search.bound import lower_bound_s
from parsim.simulate.prediction import memory_by_rank, predict, program_of
from parsim.timeline import COMPUTE, DP, HOST, TP
from tests.builders import plain_stack, round_cluster, small_model

PLAN = parse_plan("dp=2,pp=4")
JOB = Job(model=small_model(), seq_len=256, global_batch=16)
COSTS = CostModel(JOB.model, round_cluster(), plain_stack())
COST = step_cost(JOB, PLAN, COSTS)


def work(stage: int, factor: float) -> MeasuredWork:
    """What the model says of a stage, `factor` times over."""
    times = pass_times(COST.stages[stage].time, PassTime())
    return MeasuredWork(
        compute_s={(stage, kind): factor * times[kind].compute_s for kind in "FB"},
        optimizer_s=factor * COST.syncs[stage].optimizer_s,
    )


def part_s(kind: str, part: str) -> float:
    return pass_times(COSTS.part(cell_of(JOB, PLAN), part).time, PassTime())[kind].compute_s


@pytest.mark.parametrize("stage", range(4))
def test_a_measurement_that_is_the_model_changes_nothing(stage: int) -> None:
    predicted, _ = predict(JOB, PLAN, COSTS)
    replayed, _ = predict(JOB, PLAN, COSTS, work=work(stage, 1.0))
    assert replayed.step_time_s == pytest.approx(predicted.step_time_s, rel=1e-12)


def test_layers_of_other_stages_take_as_much_longer_and_what_the_rank_has_not_does_not() -> None:
    found = measured_cost(work(1, 3.0), COST, JOB, PLAN, COSTS)
    layers = 2
    for kind in "FB":
        middle_s = 3 * layers * part_s(kind, "dense layer")
        expected = {1: 0.0, 2: 0.0, 0: part_s(kind, EMBEDDING), 3: part_s(kind, HEAD)}
        for stage, more_s in expected.items():
            assert found.compute_s[stage, kind] == pytest.approx(middle_s + more_s, rel=1e-12)
    assert found.ratios == pytest.approx({"F": 3.0, "B": 3.0, "optimizer": 3.0})
    for before, after in zip(COST.syncs, found.cost.syncs, strict=True):
        assert after == replace(before, optimizer_s=3 * before.optimizer_s)


def test_each_stage_of_a_rank_keeps_its_own_time_and_its_like_share_it() -> None:
    plan = parse_plan("pp=2,vpp=2,schedule=interleaved,dp=2")
    cost = step_cost(JOB, plan, COSTS)
    own = {(1, "F"): 5.0, (1, "B"): 7.0, (3, "F"): 11.0, (3, "B"): 13.0}
    found = measured_cost(MeasuredWork(compute_s=own, optimizer_s=1.0), cost, JOB, plan, COSTS)
    assert {key: found.compute_s[key] for key in own} == own
    assert found.compute_s[2, "F"] == 5.0  # layers alone, as in stage 1


def test_communication_stays_modelled() -> None:
    """Twice the compute of every rank: all else is what it was."""
    before, _ = program_of(JOB, PLAN, COSTS)
    after, _ = program_of(JOB, PLAN, COSTS, work=work(1, 2.0))
    assert [t.num_bytes for t in after.tasks] == [t.num_bytes for t in before.tasks]
    for one, other in zip(before.tasks, after.tasks, strict=True):
        if one.stream != COMPUTE:
            assert other.duration_s == one.duration_s


def test_a_step_is_taken_apart_without_its_communication() -> None:
    """Two forwards of 2 s and 1 s, cut by a collective; 1 s between them, 0.5 s of it sending."""
    spans = [
        [COMPUTE, "0F0", "forward", 0, 0, 1.0, 2.0],
        [TP, "0F0", "tp", 0, 0, 2.0, 2.5],
        [COMPUTE, "0F0", "forward", 0, 0, 2.5, 3.5],
        ["pp_send_next", "0F0", "pp", 0, 0, 3.5, 4.0],
        [COMPUTE, "0F1", "forward", 0, 1, 4.5, 5.5],
        [HOST, "flatten gradients", "host", 0, -1, 5.5, 6.0],
        [DP, "gradients 0", "dp", 0, -1, 6.0, 7.0],
        [COMPUTE, "optimizer", "optimizer", -1, -1, 7.0, 7.5],
    ]
    found = work_of(spans, 8.0)
    actions = [{"stage": 0, "kind": "forward", "seconds": [2.0, 1.0], "whole": [2.5, 1.0]}]
    assert found["actions"] == actions
    assert found["optimizer_s"] == 0.5
    assert found["action_host_s"] == pytest.approx(0.5)  # 1 s for two actions
    assert found["step_host_s"] == pytest.approx(2.0)  # before, flattening, after


def test_asking_for_messages_is_the_pipeline_runtime_s_time() -> None:
    """Two receives are asked for before the only forward: 1.5 s from the first of them on."""
    spans = [
        [HOST, "recv_f", "host", 1, -1, 1.0, 1.5],
        [HOST, "recv_b", "host", 1, -1, 1.5, 2.0],
        [COMPUTE, "1F0", "forward", 1, 0, 2.5, 3.5],
    ]
    found = work_of(spans, 5.0)
    assert (found["action_host_s"], found["step_host_s"]) == pytest.approx((1.5, 2.5))


ACCUMULATES = plain_stack(sums_in_pipeline=True, fsdp_prefetch=0)


@pytest.mark.parametrize("zero", [2, 3])
def test_a_pipeline_that_sums_gradients_reduces_once_and_keeps_what_a_backward_gathered(
    zero: int,
) -> None:
    """1F1B on two ranks, four micro-batches. Rank 0: F F B F B F B B; parameters are gathered for the
    first two forwards and for each backward but the last, which follows another. The forwards between
    find what a backward left. Rank 1: F B F B F B F B; for the first forward and for each backward.
    """
    plan = parse_plan(f"dp=2,pp=2,zero={zero}")
    job = replace(JOB, global_batch=8)
    costs = CostModel(JOB.model, round_cluster(), ACCUMULATES)
    cost = step_cost(job, plan, costs)
    program, memory = program_of(job, plan, costs)
    for rank in (0, 1):
        mine = [t for t in program.tasks if t.rank == rank and t.stream == DP]
        reduced = sum(t.num_bytes for t in mine if not t.gathers)
        gathered = sum(t.num_bytes for t in mine if t.gathers)
        assert reduced == pytest.approx(cost.syncs[rank].reduce_bytes)
        assert gathered == pytest.approx((5 if zero == 3 else 1) * cost.syncs[rank].gather_bytes)
    each = CostModel(JOB.model, round_cluster(), plain_stack(fsdp_prefetch=0))
    schedule = make_schedule(plan, 4)
    others = memory_by_rank(step_cost(job, plan, each), schedule, job, plan, each)
    for use, other in zip(memory, others, strict=True):
        assert use.gradients == 2 * other.gradients  # whole, not one of two shards


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("text", ["pp=2,dp=2", "pp=4,dp=2,tp=2", "pp=2,vpp=2,dp=2,schedule=interleaved"])
def test_no_plan_of_a_pipeline_that_sums_gradients_beats_its_bound(text: str, zero: int) -> None:
    """Short sequences and a slow network: what every micro-batch would reduce is most of the step."""
    plan = parse_plan(f"{text},zero={zero}")
    stack = replace(ACCUMULATES, sums_norm_gradients=True)
    costs = CostModel(JOB.model, round_cluster(gpus_per_node=1, scale_up_domain=1), stack)
    job = replace(JOB, seq_len=16, global_batch=64)
    predicted, _ = predict(job, plan, costs)
    bound_s = lower_bound_s(step_cost(job, plan, costs), job, plan, stack)
    assert bound_s <= predicted.step_time_s * (1 + 1e-12)


def test_gradients_of_norms_are_summed_over_tp_where_the_stack_does() -> None:
    """Two norms of 512 a layer, two layers a stage, in bf16; the last stage has one more."""
    plan = parse_plan("dp=2,tp=2,pp=4")
    stack = plain_stack(sums_norm_gradients=True, gradient_dtype="same")
    program, _ = program_of(JOB, plan, CostModel(JOB.model, round_cluster(), stack))
    found = [t for t in program.tasks if t.name == "gradients of norms"]
    assert [t.num_bytes for t in found] == [4 * 512 * 2.0] * 3 + [5 * 512 * 2.0]
    assert all(t.duration_s > 0 and t.stream == TP for t in found)
