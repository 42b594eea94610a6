"""Why a step was mispredicted: known errors are put into a step, and must be found again."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parsim.compare.causes import causes_of
from parsim.compare.itemised import ItemisedComparison, itemise
from parsim.compare.waiting import fair_breakdowns_s, without_waiting
from parsim.config import load_cluster, load_model, load_stack
from parsim.cost.stage import CostModel
from parsim.plan import Job, ParallelPlan
from parsim.schedule.program import Program, Task, task_times, timeline_of
from parsim.simulate.fold import unfolded
from parsim.simulate.prediction import program_of
from parsim.timeline import Span, Timeline

PLAN = ParallelPlan(dp=2, tp=2, pp=2, micro_batch=1, schedule="1f1b")
PIPELINE = ParallelPlan(pp=2, micro_batch=1, schedule="1f1b")


@pytest.fixture(scope="module")
def program() -> Program:
    return program_for(PLAN)


def program_for(plan: ParallelPlan) -> Program:
    cluster = load_cluster("local-cpu")
    job = Job(model=load_model("tiny-llama-8l"), seq_len=256, global_batch=8, precision="fp32")
    costs = CostModel(job.model, cluster, load_stack("parsim-executor"))
    return program_of(job, plan, costs)[0]


def stretched(program: Program, factors: dict[str, float]) -> Program:
    """The program with tasks of some kinds so many times as long."""
    tasks = tuple(t._replace(duration_s=t.duration_s * factors.get(t.kind, 1.0)) for t in program.tasks)
    return dataclasses.replace(program, tasks=tasks)


def measured_of(program: Program, plan: ParallelPlan = PLAN) -> Timeline:
    """What running the program would measure on every rank."""
    timeline = unfolded(timeline_of(program, task_times(program)), plan)
    return dataclasses.replace(timeline, source="measured")


def compared(program: Program, measured: Timeline, plan: ParallelPlan = PLAN) -> ItemisedComparison:
    predicted = unfolded(timeline_of(program, task_times(program)), plan)
    ends = predicted.end_s, measured.end_s
    return itemise(predicted, measured, plan, predicted_s=ends[0], measured_s=ends[1], program=program)


@pytest.mark.parametrize(
    ("what", "kinds"),
    [
        ("compute", ["forward", "backward"]),
        ("tp", ["tp"]),
        ("dp", ["dp"]),
        ("optimizer", ["optimizer"]),
        ("overhead", ["host"]),
    ],
)
def test_one_wrong_part_explains_the_whole_error(program: Program, what: str, kinds: list[str]) -> None:
    measured = measured_of(stretched(program, dict.fromkeys(kinds, 1.5)))
    found = compared(program, measured)
    by_what = {cause.what: cause for cause in found.causes}
    whole_s = found.whole.predicted_s - found.whole.measured_s
    assert whole_s < 0
    assert by_what[what].difference_s == pytest.approx(whole_s, rel=1e-6)
    assert by_what[what].measured_work_s == pytest.approx(1.5 * by_what[what].predicted_work_s)
    assert sum(abs(c.difference_s) for c in found.causes if c.what != what) < 1e-6 * abs(whole_s)


def test_a_slow_link_between_stages_is_named() -> None:
    program = program_for(PIPELINE)
    measured = measured_of(stretched(program, {"pp": 300.0}), PIPELINE)
    found = compared(program, measured, PIPELINE)
    by_what = {cause.what: cause.difference_s for cause in found.causes}
    assert by_what["pp"] == pytest.approx(found.whole.predicted_s - found.whole.measured_s, rel=1e-6)
    assert "pipeline transfers" in found.because


@settings(max_examples=15, deadline=None)
@given(
    factors=st.dictionaries(
        st.sampled_from(["forward", "backward", "tp", "dp", "optimizer", "host"]),
        st.floats(0.25, 4.0),
    ),
    longer=st.floats(0.8, 1.25),
)
def test_causes_and_parts_add_up_whatever_was_measured(
    program: Program, factors: dict[str, float], longer: float
) -> None:
    measured = measured_of(stretched(program, factors))
    measured_s = longer * measured.end_s
    predicted = measured_of(program)
    found = itemise(
        predicted, measured, PLAN, predicted_s=predicted.end_s, measured_s=measured_s, program=program
    )
    error_s = predicted.end_s - measured_s
    assert sum(c.difference_s for c in found.causes) == pytest.approx(error_s, abs=1e-12)
    assert sum(p.difference_s for p in found.whole.parts) == pytest.approx(error_s, abs=1e-9)
    for row in found.ranks:
        assert sum(p.measured_s for p in row.parts) == pytest.approx(measured_s)
        assert sum(p.predicted_s for p in row.parts) == pytest.approx(predicted.end_s)


def test_a_perfect_prediction_has_nothing_to_explain(program: Program) -> None:
    found = compared(program, measured_of(program))
    assert found.because == ""
    assert max(abs(cause.difference_s) for cause in found.causes) < 1e-9 * found.whole.measured_s


def test_a_slow_replica_is_imbalance_and_compute() -> None:
    """Rank 1 computes a second longer: half of it is the mean rank's compute, half is waiting for it."""
    plan = ParallelPlan(dp=2)
    tasks = (
        Task(0, "compute", "0F0", "forward", 1.0, ()),
        Task(0, "dp", "gradients 0", "dp", 0.5, (0,)),
    )
    program = Program(tasks=tasks)
    measured = Timeline(
        source="measured",
        spans=(
            Span(0, "compute", "0F0", 0.0, 1.0, "forward"),
            Span(0, "dp", "gradients 0", 1.0, 2.5, "dp"),
            Span(1, "compute", "0F0", 0.0, 2.0, "forward"),
            Span(1, "dp", "gradients 0", 2.0, 2.5, "dp"),
        ),
    )
    causes = {c.what: c.difference_s for c in causes_of(program, plan, measured, 2.5)}
    assert causes == pytest.approx({"compute": -0.5, "dp": 0.0, "imbalance": -0.5, "rest": 0.0})
    parts = fair_breakdowns_s(measured, plan)
    assert (parts[0]["imbalance"], parts[0]["dp_exposed"], parts[0]["bubble"]) == (1.0, 0.5, 0.0)
    assert (parts[1]["imbalance"], parts[1]["compute"]) == (0.0, 2.0)


def test_waiting_for_another_stage_is_bubble() -> None:
    plan = ParallelPlan(pp=2)
    spans = (
        Span(0, "compute", "0F0", 0.0, 2.0, "forward", 0, 0),
        Span(0, "pp_send_next", "0F0", 2.0, 2.1, "pp", 0, 0),
        Span(1, "pp_recv_prev", "0F0", 0.0, 2.5, "pp", 0, 0),
        Span(1, "compute", "1F0", 2.5, 4.0, "forward", 1, 0),
    )
    parts = fair_breakdowns_s(Timeline(spans=spans, source="measured"), plan)
    assert parts[1]["pp_exposed"] == pytest.approx(0.5)
    assert parts[1]["bubble"] == pytest.approx(2.0)
    assert parts[1]["imbalance"] == 0.0


def test_collectives_that_do_not_match_stay_as_they_are() -> None:
    spans = (
        Span(0, "tp", "0F0", 0.0, 2.0, "tp"),
        Span(0, "tp", "0F0", 2.0, 3.0, "tp"),
        Span(1, "tp", "0F0", 1.0, 2.0, "tp"),
    )
    timeline = Timeline(spans=spans, source="measured")
    assert without_waiting(timeline, ParallelPlan(tp=2)) == timeline


def test_actions_are_grouped_and_the_slowest_is_named(program: Program) -> None:
    measured = measured_of(program)
    slow = next(s for s in measured.spans if s.rank == 5 and s.name == "1B2" and s.stream == "compute")
    spans = tuple(s._replace(end_s=s.end_s + 0.1) if s is slow else s for s in measured.spans)
    found = compared(program, dataclasses.replace(measured, spans=spans))
    first = found.actions[0]
    assert (first.name, first.slowest) == ("1B", "rank 5 1B2")
    assert first.number == 4 * PLAN.num_micro_batches(job_of_eight())
    assert first.slowest_s == pytest.approx(slow.duration_s + 0.1)
    assert first.fastest_s < first.measured_s < first.slowest_s


def job_of_eight() -> Job:
    return Job(model=load_model("tiny-llama-8l"), seq_len=256, global_batch=8)


def test_replicas_of_another_tensor_parallel_rank_are_not_waited_for() -> None:
    """dp=2, tp=2: ranks 0 and 2 sum among themselves, 1 and 3 a second later among themselves."""
    spans = tuple(
        Span(rank, "dp", "gradients 0", begin_s, begin_s + 0.5, "dp")
        for rank, begin_s in enumerate((1.0, 2.0, 1.0, 2.0))
    )
    timeline = Timeline(spans=spans, source="measured")
    assert without_waiting(timeline, ParallelPlan(dp=2, tp=2)) == timeline


def waits_s(plan: ParallelPlan, name: str, begins_s: list[float], end_s: float = 9.0) -> list[float]:
    """By rank, how long of a collective on the data-parallel stream is waiting for others."""
    spans = tuple(Span(rank, "dp", name, begin_s, end_s, "dp") for rank, begin_s in enumerate(begins_s))
    found = without_waiting(Timeline(spans=spans, source="measured"), plan).spans
    return [span.start_s - begin_s for span, begin_s in zip(found, begins_s, strict=True)]


def test_both_ends_of_a_pipeline_wait_for_each_other_with_a_tied_embedding() -> None:
    # Ranks 0 and 2 are one pipeline, 1 and 3 the other; replicas do not meet in this sum.
    plan = ParallelPlan(pp=2, dp=2)
    assert waits_s(plan, "tied embedding", [1.0, 2.0, 5.0, 3.0]) == [4.0, 1.0, 0.0, 0.0]


def test_experts_are_waited_for_by_those_that_hold_the_same() -> None:
    # Four ranks of a stage (dp=2, tp=2), two to all experts: 0 and 2 hold one half, 1 and 3 the other.
    plan = ParallelPlan(dp=2, tp=2, ep=2)
    assert waits_s(plan, "expert gradients 0", [1.0, 2.0, 5.0, 3.0]) == [4.0, 1.0, 0.0, 0.0]
    # With ep=1 every rank holds all of them, also those of another tensor-parallel place.
    plan = ParallelPlan(dp=2, tp=2)
    assert waits_s(plan, "expert gradients 0", [1.0, 2.0, 5.0, 3.0]) == [4.0, 3.0, 0.0, 2.0]
    # With ep=4 each is alone with its own.
    plan = ParallelPlan(dp=4, tp=2, ep=4)
    begins_s = [1.0, 2.0, 3.0, 4.0, 5.0, 1.0, 2.0, 3.0]
    assert waits_s(plan, "expert gradients 0", begins_s) == [4.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]


def test_sums_of_experts_explain_what_was_predicted_with_those_of_their_stage() -> None:
    tasks = (
        Task(0, "compute", "0B0", "backward", 1.0, ()),
        Task(0, "dp", "gradients 0", "dp", 0.5, (0,)),
    )
    spans = (
        Span(0, "compute", "0B0", 0.0, 1.0, "backward"),
        Span(0, "dp", "gradients 0", 1.0, 1.5, "dp"),
        Span(0, "dp", "expert gradients 0", 1.5, 2.5, "dp"),
    )
    timeline = Timeline(spans=spans, source="measured")
    causes = {c.what: c for c in causes_of(Program(tasks=tasks), ParallelPlan(), timeline, 2.5)}
    assert causes["dp"].difference_s == pytest.approx(-1.0)
    assert causes["rest"].difference_s == pytest.approx(0.0)


def test_work_under_other_names_still_counts() -> None:
    """A trace names kernels, not actions: what a rank measured is shared by its predicted actions."""
    tasks = (
        Task(0, "compute", "0F0", "forward", 1.0, ()),
        Task(0, "compute", "0B0", "backward", 3.0, (0,)),
    )
    spans = (
        Span(0, "compute", "gemm", 0.0, 2.0, "forward"),
        Span(0, "compute", "other gemm", 2.0, 6.0, "backward"),
    )
    measured = Timeline(spans=spans, source="measured")
    causes = {c.what: c for c in causes_of(Program(tasks=tasks), ParallelPlan(), measured, 6.0)}
    assert causes["compute"].difference_s == pytest.approx(-2.0)
    assert causes["rest"].difference_s == pytest.approx(0.0)


def test_a_sentence_stops_where_enough_is_explained(program: Program) -> None:
    """Compute explains nearly all; the optimizer, off as well, is not named."""
    factors = {"forward": 2.0, "backward": 2.0, "optimizer": 1.2}
    found = compared(program, measured_of(stretched(program, factors)))
    assert "because of compute" in found.because
    assert "optimizer" not in found.because
