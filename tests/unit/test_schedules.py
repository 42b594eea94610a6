"""Schedules against their papers: bubble, memory, order, and torch's own validator."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parsim.errors import ParsimError
from parsim.plan import ParallelPlan
from parsim.schedule import make_schedule
from parsim.schedule.action import Action, Schedule
from parsim.schedule.check import check_schedule
from parsim.schedule.csv_file import schedule_from_csv, schedule_to_csv
from parsim.schedule.gpipe import gpipe
from parsim.schedule.in_flight import in_flight, peak_in_flight
from parsim.schedule.interleaved import interleaved
from parsim.schedule.lower import lower
from parsim.schedule.one_f_one_b import one_f_one_b
from parsim.schedule.program import step_time_s
from tests.builders import flat_cost, plain_stack


def step_of(plan: ParallelPlan, num_micro_batches: int, **cost: float) -> float:
    schedule = make_schedule(plan, num_micro_batches)
    return step_time_s(lower(schedule, flat_cost(plan.num_stages, **cost), plan, plain_stack()))


@st.composite
def plans_with_micro_batches(draw: st.DrawFn) -> tuple[ParallelPlan, int]:
    schedule = draw(st.sampled_from(["gpipe", "1f1b", "interleaved"]))
    pp = draw(st.integers(2 if schedule == "interleaved" else 1, 6))
    vpp = draw(st.integers(2, 4)) if schedule == "interleaved" else 1
    if schedule == "interleaved":
        rounds = draw(st.integers(1, 4))
        per_round = pp if rounds > 1 else draw(st.integers(1, pp))
        return ParallelPlan(pp=pp, vpp=vpp, schedule=schedule), rounds * per_round
    return ParallelPlan(pp=pp, schedule=schedule), draw(st.integers(1, 12))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("pp", "m"), [(1, 1), (2, 4), (4, 8), (8, 8), (8, 3)])
def test_bubble_of_gpipe_and_1f1b(schedule: str, pp: int, m: int) -> None:
    # Narayanan et al. 2021, section 2.2.1: t = (m + p − 1)(f + b)
    assert step_of(ParallelPlan(pp=pp, schedule=schedule), m) == pytest.approx((m + pp - 1) * 3.0)


@pytest.mark.parametrize(("pp", "vpp", "m"), [(2, 2, 4), (4, 2, 8), (4, 4, 4), (8, 3, 16)])
def test_interleaving_divides_the_bubble_by_the_chunks(pp: int, vpp: int, m: int) -> None:
    # Narayanan et al. 2021, section 2.2.2: bubble (p − 1)(f + b)/v; a chunk takes 1/v of the rank's time
    plan = ParallelPlan(pp=pp, vpp=vpp, schedule="interleaved")
    seconds = step_of(plan, m, forward_s=1 / vpp, backward_s=2 / vpp)
    assert seconds == pytest.approx(m * 3.0 + (pp - 1) * 3.0 / vpp)


@given(plans_with_micro_batches())
def test_no_schedule_beats_its_rank_s_work(case: tuple[ParallelPlan, int]) -> None:
    plan, m = case
    assert step_of(plan, m) >= m * 3.0 * plan.vpp - 1e-9


@given(plans_with_micro_batches())
def test_every_schedule_is_complete_and_free_of_deadlock(case: tuple[ParallelPlan, int]) -> None:
    plan, m = case
    schedule = make_schedule(plan, m)
    check_schedule(schedule)
    assert (schedule.pp, schedule.num_stages, schedule.num_micro_batches) == (
        plan.pp,
        plan.num_stages,
        m,
    )
    assert schedule.stage_ranks() == {s: plan.stage_rank(s) for s in range(plan.num_stages)}


@given(plans_with_micro_batches())
def test_micro_batches_in_flight_in_closed_form(case: tuple[ParallelPlan, int]) -> None:
    plan, m = case
    for rank, actions in enumerate(make_schedule(plan, m).ranks):
        stages = {a.stage: 1.0 for a in actions}
        most, _ = peak_in_flight(actions, stages)
        assert sum(in_flight(plan, rank, m)) == most


def test_memory_of_gpipe_and_1f1b() -> None:
    # GPipe keeps all m micro-batches, 1F1B p − r of them.
    for rank in range(4):
        assert in_flight(ParallelPlan(pp=4, schedule="gpipe"), rank, 16) == (16,)
        assert in_flight(ParallelPlan(pp=4), rank, 16) == (4 - rank,)


def test_interleaved_needs_equal_rounds() -> None:
    with pytest.raises(ParsimError, match="equal rounds"):
        interleaved(4, 2, 9)


@given(plans_with_micro_batches())
def test_csv_round_trip(case: tuple[ParallelPlan, int]) -> None:
    plan, m = case
    schedule = make_schedule(plan, m)
    assert schedule_from_csv(schedule_to_csv(schedule), name=schedule.name) == schedule


def test_a_bad_cell_is_named() -> None:
    with pytest.raises(ParsimError) as caught:
        schedule_from_csv("0F0,0B0\n1F0,1X0\n")
    assert "row 2, column 2" in str(caught.value)


def test_idle_cells_of_a_csv_are_skipped() -> None:
    assert schedule_from_csv("0F0,,0B0\n,1F0,1B0\n", name="gpipe") == gpipe(2, 1)


def test_a_deadlock_is_explained() -> None:
    ranks = (
        (Action(0, "B", 0), Action(0, "F", 0)),
        (Action(1, "F", 0), Action(1, "B", 0)),
    )
    with pytest.raises(ParsimError, match="deadlocks") as caught:
        check_schedule(Schedule(name="bad", ranks=ranks))
    assert "0B0 waits for 0F0" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0B0,0F0\n", "twice"),
        ("0F0,0B0\n0F1,0B1\n", "two ranks"),
        ("0F0\n", "exactly once"),
        ("0F0,0B0,0W0\n", "exactly once"),
    ],
)
def test_incomplete_schedules_are_refused(text: str, message: str) -> None:
    with pytest.raises(ParsimError, match=message):
        check_schedule(schedule_from_csv(text))


@given(plans_with_micro_batches())
def test_torch_accepts_every_schedule(case: tuple[ParallelPlan, int]) -> None:
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    plan, m = case
    actions = {
        rank: [schedules._Action.from_str(str(action)) for action in own]
        for rank, own in enumerate(make_schedule(plan, m).ranks)
    }
    schedules._validate_schedule(actions, plan.pp, plan.num_stages, m)


def test_1f1b_alternates_after_its_warm_up() -> None:
    first = [str(action) for action in one_f_one_b(3, 4).ranks[0]]
    assert first == ["0F0", "0F1", "0F2", "0B0", "0F3", "0B1", "0B2", "0B3"]
