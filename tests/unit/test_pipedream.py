"""Pipelines without a flush: pace, versions of the weights and staleness, against their papers."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parsim.cli.main import run_command
from parsim.cost.memory import weight_bytes
from parsim.cost.price import PartTime, PassTime
from parsim.cost.stage import CostModel
from parsim.cost.step import StepCost, step_cost
from parsim.errors import ParsimError
from parsim.plan import Job, ParallelPlan, parse_plan
from parsim.schedule import check_micro_batches, make_schedule
from parsim.schedule.check_actions import check_schedule
from parsim.schedule.lower import lower
from parsim.schedule.one_f_one_b import one_f_one_b
from parsim.schedule.pipedream import staleness, weight_versions
from parsim.schedule.program import task_times, timeline_of
from parsim.search.bound import lower_bound_s
from parsim.search.fullest import fullest_rank
from parsim.simulate.prediction import estimate, predict, program_of
from parsim.simulate.steady import steady_steps, steps_shown
from parsim.timeline import Timeline, breakdown_s
from tests.builders import flat_cost, plain_stack, round_cluster, small_model

PIPEDREAM, TWO_BW = (
    ParallelPlan(pp=4, schedule="pipedream"),
    ParallelPlan(pp=4, schedule="pipedream-2bw"),
)


def steady(plan: ParallelPlan, m: int, cost: StepCost, **stack: object) -> Timeline:
    schedule = make_schedule(plan, m)
    check_schedule(schedule)
    static = (0.0,) * plan.pp
    program = lower(schedule, cost, plan, plain_stack(**stack), static_bytes=static)
    return steady_steps(timeline_of(program, task_times(program)), schedule)


def step_s(plan: ParallelPlan, m: int, cost: StepCost, **stack: object) -> float:
    return steady(plan, m, cost, **stack).end_s / steps_shown(plan, m)


def stages_of(times: list[float]) -> StepCost:
    """Stages whose forwards take these times, and their backwards twice as long."""
    base = flat_cost(len(times))
    parts = [PartTime(PassTime(t), PassTime(t), PassTime(t), PassTime()) for t in times]
    return replace(base, stages=tuple(replace(base.stages[0], time=part) for part in parts))


# The pace


@given(
    st.sampled_from(["pipedream", "pipedream-2bw"]),
    st.lists(st.floats(0.25, 4.0), min_size=2, max_size=6),
    st.integers(1, 12),
)
def test_the_slowest_stage_sets_the_pace(schedule: str, times: list[float], m: int) -> None:
    # Narayanan et al. 2019, section 3.1: without a flush throughput is the slowest stage's.
    plan = ParallelPlan(pp=len(times), schedule=schedule)
    m = max(m, plan.pp) if schedule == "pipedream-2bw" else m
    assert step_s(plan, m, stages_of(times)) == pytest.approx(m * 3 * max(times))


@pytest.mark.parametrize("m", [4, 7, 16])
def test_a_round_trip_of_all_in_flight_is_the_other_limit(m: int) -> None:
    # p micro-batches are under way: p periods last as long as one of them takes there and back.
    cost = flat_cost(4, send_s=1.0)
    assert step_s(PIPEDREAM, m, cost, pp_overlap=True) == pytest.approx(m * (4 * 3.0 + 6 * 1.0) / 4)


@pytest.mark.parametrize("m", [4, 6, 16])
def test_updates_come_after_every_micro_batch_or_every_step(m: int) -> None:
    cost = flat_cost(4, optimizer_s=0.5)
    assert step_s(PIPEDREAM, m, cost) == pytest.approx(m * (3.0 + 0.5))
    # A gradient goes on its way before the update, so updates of different ranks run side by side.
    assert step_s(TWO_BW, m, cost) == pytest.approx(m * 3.0 + 0.5)
    updates = [s for s in steady(TWO_BW, m, cost).spans if s.kind == "optimizer"]
    assert len(updates) == 4 * steps_shown(TWO_BW, m)


@pytest.mark.parametrize("overlap", [False, True])
def test_gradients_are_reduced_before_each_update(overlap: bool) -> None:
    plan = replace(PIPEDREAM, dp=2)
    cost = flat_cost(4, reduce_s=1.0, buckets=4)
    exposed_s = 1.0 / 4 if overlap else 1.0  # all but the last bucket run beside the backward
    assert step_s(plan, 8, cost, dp_overlap=overlap) == pytest.approx(8 * (3.0 + exposed_s))


@pytest.mark.parametrize("plan", [PIPEDREAM, TWO_BW])
def test_the_host_s_work_comes_once_a_step_however_many_updates_it_has(plan: ParallelPlan) -> None:
    hosts = [s for s in steady(plan, 8, flat_cost(4), step_overhead_s=1.0).spans if s.stream == "host"]
    assert [s.duration_s for s in hosts] == [1.0] * 4 * steps_shown(plan, 8)


def test_a_flush_costs_a_bubble_that_these_do_not_have() -> None:
    step = steady(PIPEDREAM, 8, flat_cost(4))
    assert breakdown_s(step)["bubble"] == pytest.approx(0.0, abs=1e-9)
    assert step.end_s == pytest.approx(8 * 3.0)


@given(st.data(), st.sampled_from(["pipedream", "pipedream-2bw"]), st.integers(2, 4))
@settings(max_examples=25)
def test_the_steps_shown_are_those_of_a_run_that_began_long_ago(
    data: st.DataObject, name: str, pp: int
) -> None:
    plan, m = ParallelPlan(pp=pp, schedule=name), data.draw(st.integers(pp, 9))
    base = stages_of(data.draw(st.lists(st.floats(0.25, 4.0), min_size=pp, max_size=pp)))
    sends = data.draw(st.lists(st.floats(0.0, 3.0), min_size=pp - 1, max_size=pp - 1))
    cost, stack = replace(base, send_s=tuple(sends)), plain_stack(pp_overlap=data.draw(st.booleans()))
    shown = make_schedule(plan, m)
    steps = shown.steps + 16
    longer = replace(shown, ranks=one_f_one_b(pp, steps * m).ranks, steps=steps)
    program = lower(longer, cost, plan, stack)
    late = steady_steps(timeline_of(program, task_times(program)), longer)
    soon = steady(plan, m, cost, pp_overlap=stack.pp_overlap)
    assert soon.end_s == pytest.approx(late.end_s, rel=1e-9)


def test_memory_at_the_steady_pace_is_that_of_a_full_pipeline() -> None:
    step = steady(PIPEDREAM, 8, flat_cost(4, saved_bytes=8.0))
    for rank in range(4):
        samples = [s for s in step.memory if s.rank == rank]
        assert samples[0].time_s == 0.0
        assert {s.num_bytes for s in samples} == {8.0 * (3 - rank), 8.0 * (4 - rank)}


# Versions of the weights


def updates_late(plan: ParallelPlan, m: int) -> list[set[int]]:
    """Updates of each rank between forward and backward of a micro-batch, once the pipeline is full."""
    schedule = make_schedule(plan, m)
    program = lower(schedule, flat_cost(plan.pp, optimizer_s=0.125), plan, plain_stack())
    late: list[set[int]] = []
    for rank in range(plan.pp):
        updates, seen, found = 0, dict[int, int](), set[int]()
        for task in (t for t in program.tasks if t.rank == rank and t.stream == "compute"):
            if task.kind == "optimizer":
                updates += 1
            elif task.kind == "forward":
                seen[task.micro_batch] = updates
            elif task.micro_batch >= plan.pp:
                found.add(updates - seen[task.micro_batch])
        late.append(found)
    return late


@pytest.mark.parametrize("pp", [2, 3, 5])
def test_pipedream_is_as_stale_as_there_are_stages_behind(pp: int) -> None:
    # Section 3.3: stage s (from 1) of n computes with weights of n − s updates ago.
    plan = ParallelPlan(pp=pp, schedule="pipedream")
    assert updates_late(plan, 6) == [{pp - 1 - rank} for rank in range(pp)]
    assert [staleness(plan, rank) for rank in range(pp)] == [pp - 1 - rank for rank in range(pp)]
    assert [weight_versions(plan, rank) for rank in range(pp)] == [pp - rank for rank in range(pp)]


def test_two_versions_are_enough_where_a_step_has_as_many_micro_batches_as_are_in_flight() -> None:
    # Narayanan et al. 2021, section 3.1: m ≥ p. Forwards in flight then span one update at most.
    assert all(late <= {0, 1} for late in updates_late(TWO_BW, 4))
    assert [staleness(TWO_BW, rank) for rank in range(4)] == [1] * 4
    assert [weight_versions(TWO_BW, rank) for rank in range(4)] == [2] * 4


def memory(schedule: str) -> tuple[dict[str, float], Timeline]:
    job = Job(model=small_model(), seq_len=256, global_batch=8)
    prediction, timeline = predict(
        job, ParallelPlan(pp=4, schedule=schedule), CostModel(job.model, round_cluster(), plain_stack())
    )
    return prediction.memory.to_data(0.0), timeline


@pytest.mark.parametrize(("schedule", "versions"), [("pipedream", 4), ("pipedream-2bw", 2)])
def test_older_versions_are_kept_as_they_are_computed_with(schedule: str, versions: int) -> None:
    (stale, timeline), (whole, _) = memory(schedule), memory("1f1b")
    first = CostModel(small_model(), round_cluster(), plain_stack())
    job = Job(model=small_model(), seq_len=256, global_batch=8)
    stage = step_cost(job, ParallelPlan(pp=4), first).stages[0]
    assert whole["weights"] == pytest.approx(stage.parameters * weight_bytes("bf16"))
    older = (versions - 1) * stage.parameters * weight_bytes("bf16")
    assert stale["weights"] - whole["weights"] == pytest.approx(older)
    assert stale["activations"] == whole["activations"]
    assert max(s.num_bytes for s in timeline.memory) == pytest.approx(stale["peak"])


# Predictions


@given(
    st.sampled_from(["pipedream", "pipedream-2bw"]), st.sampled_from([2, 4]), st.sampled_from([1, 2]),
    st.integers(1, 12), st.booleans(), st.booleans(), st.sampled_from([0.0, 1e-3]),
)  # fmt: skip
@settings(max_examples=40)
def test_predictions_of_pipelines_without_a_flush(
    schedule: str, pp: int, dp: int, m: int, dp_overlap: bool, pp_overlap: bool, host_s: float
) -> None:
    plan = ParallelPlan(dp=dp, pp=pp, schedule=schedule)
    job = Job(model=small_model(), seq_len=256, global_batch=max(m, pp) * dp)
    stack = plain_stack(dp_overlap=dp_overlap, pp_overlap=pp_overlap, step_overhead_s=host_s)
    costs = CostModel(job.model, round_cluster(), stack)
    prediction, timeline = predict(job, plan, costs)
    assert estimate(job, plan, costs).step_time_s == pytest.approx(prediction.step_time_s, rel=1e-9)
    assert sum(prediction.breakdown_s.values()) == pytest.approx(prediction.step_time_s, rel=1e-9)
    bound_s = lower_bound_s(step_cost(job, plan, costs), job, plan, stack)
    assert bound_s <= prediction.step_time_s * (1 + 1e-9)
    _, uses = program_of(job, plan, costs)
    assert fullest_rank(job, plan, costs).peak == pytest.approx(max(use.peak for use in uses))
    for _, _, spans in timeline.lanes():
        assert all(a.end_s <= b.start_s + 1e-12 for a, b in pairwise(spans))


@pytest.mark.parametrize(
    ("plan", "m", "said"),
    [
        ("schedule=pipedream", 4, "needs a pipeline"),
        ("pp=4,schedule=pipedream-2bw", 3, "4 or more"),
        ("dp=2,pp=2,zero=1,schedule=pipedream", 4, "one version of the weights"),
    ],
)
def test_what_cannot_run_without_a_flush(plan: str, m: int, said: str) -> None:
    with pytest.raises(ParsimError) as caught:
        check_micro_batches(parse_plan(plan), m)
    assert said in str(caught.value)


MODEL = "--model tiny-llama-8l --hardware a100-sxm-80gb"


def test_the_item_says_what_is_stale(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(f"simulate {MODEL} --plan pp=4,schedule=pipedream --json".split()) == 0
    item = json.loads(capsys.readouterr().out)
    assert item["staleness"] == [3, 2, 1, 0]
    assert item["weight_versions"] == [4, 3, 2, 1]
    assert run_command(f"simulate {MODEL} --plan pp=4 --json".split()) == 0
    assert "staleness" not in json.loads(capsys.readouterr().out)


def test_the_search_has_them_only_where_they_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    plan = f"plan {MODEL} --gpus 4 --global-batch 16 --zero 0"
    assert run_command([*plan.split(), "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert not any("pipedream" in item["plan"]["schedule"] for item in plans)
    assert run_command([*plan.split(), "--schedule", "pipedream,pipedream-2bw"]) == 0
    assert "not those of synchronous training" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        f"simulate {MODEL} --plan pp=4,schedule=pipedream --jitter 0.1",
        f"simulate {MODEL} --plan pp=4,schedule=pipedream --schedule-csv new.csv",
        f"export pp=4,schedule=pipedream-2bw --to schedule-csv {MODEL}",
        f"run pp=2,schedule=pipedream {MODEL} --checkpoint nowhere",
    ],
)
def test_what_asks_for_a_flush_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(command.split()) == 2
    assert "pipedream" in capsys.readouterr().err
