"""Schedules against their papers: bubble, memory and order."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parsim.cost.price import PartTime, PassTime
from parsim.cost.step import StepCost
from parsim.errors import ParsimError
from parsim.plan import V_SHAPED_SCHEDULES, ParallelPlan, parse_plan
from parsim.schedule import (
    ONE_CHUNK_SCHEDULES,
    SYNCHRONOUS_SCHEDULES,
    check_micro_batches,
    make_schedule,
)
from parsim.schedule.check_actions import check_schedule
from parsim.schedule.gpipe import gpipe
from parsim.schedule.in_flight import in_flight, peak_in_flight
from parsim.schedule.interleaved import interleaved
from parsim.schedule.interleaved_zb import interleaved_zb
from parsim.schedule.looped_bfs import looped_bfs
from parsim.schedule.lower import KIND_NAMES, lower
from parsim.schedule.one_f_one_b import one_f_one_b
from parsim.schedule.program import step_time_s, task_times, timeline_of
from parsim.schedule.zb_h1 import zb_h1
from parsim.timeline import Timeline
from tests.builders import flat_cost, plain_stack


def step_of(plan: ParallelPlan, num_micro_batches: int, **cost: float) -> float:
    schedule = make_schedule(plan, num_micro_batches)
    return step_time_s(lower(schedule, flat_cost(plan.num_stages, **cost), plan, plain_stack()))


def bubbles(
    plan: ParallelPlan, m: int, f: float, i: float, w: float, *, exchange: float = 0.0
) -> tuple[float, float]:
    """Idle time of the rank with most of it: of the whole step, and between its own start and end.

    Stages take f, i and w for forward, input gradient and weight gradient; forwards and input gradients
    also `exchange` of expert-parallel communication, which counts as idle where nothing hides it.
    """
    part = PartTime(PassTime(f, ep_s=exchange), PassTime(i, ep_s=exchange), PassTime(w), PassTime())
    stage = replace(flat_cost(1).stages[0], time=part)
    cost = replace(flat_cost(plan.num_stages), stages=(stage,) * plan.num_stages)
    step = predict_timeline(plan, m, cost)
    computing = [s for s in step.spans if s.kind in KIND_NAMES.values()]
    work = m // plan.chains * plan.vpp * (f + i + w)
    own = [
        max(s.end_s for s in computing if s.rank == rank)
        - min(s.start_s for s in computing if s.rank == rank)
        for rank in range(plan.pp)
    ]
    return max(s.end_s for s in computing) - work, max(own) - work


def predict_timeline(plan: ParallelPlan, m: int, cost: StepCost) -> Timeline:
    program = lower(make_schedule(plan, m), cost, plan, plain_stack(overlap_cost=0.0))
    return timeline_of(program, task_times(program))


def takes(plan: ParallelPlan, m: int) -> bool:
    try:
        check_micro_batches(plan, m)
    except ParsimError:
        return False
    return True


SIZES = [
    (ParallelPlan(pp=pp, vpp=vpp, schedule=schedule), m)
    for schedule in SYNCHRONOUS_SCHEDULES
    for pp in range(1, 7)
    for vpp in ((1,) if schedule in ONE_CHUNK_SCHEDULES else (2,) if schedule in V_SHAPED_SCHEDULES
                else (1, 2, 3, 4))
    for m in range(1, 20)
    if takes(ParallelPlan(pp=pp, vpp=vpp, schedule=schedule), m)
]  # fmt: skip
"""Everything that some schedule takes, fewer micro-batches than ranks included."""


def plans_with_micro_batches() -> st.SearchStrategy[tuple[ParallelPlan, int]]:
    return st.sampled_from(SIZES)


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
    assert step_of(plan, m) >= m / plan.chains * 3.0 * plan.vpp - 1e-9


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


WEIGHTS_SHORTEST = [
    (1.0, 1.0, 1.0),
    (1.0, 1.25, 0.75),
    (1.0, 1.0, 0.5),
    (2.0, 1.0, 1.0),
    (1.0, 2.0, 0.5),
]
"""(F, I, W) in which the weight gradient is no longer than the others, as in the paper's table 4."""


@pytest.mark.parametrize("times", WEIGHTS_SHORTEST)
@pytest.mark.parametrize(("pp", "m"), [(1, 3), (2, 2), (2, 5), (4, 4), (4, 16), (6, 9)])
def test_zb_h1_leaves_a_third_of_the_bubble(pp: int, m: int, times: tuple[float, float, float]) -> None:
    # Qi et al. 2024, arXiv 2401.10241, table 2: (p − 1)(T_F + T_B − T_W) with 1F1B's memory
    f, i, w = times
    plan = ParallelPlan(pp=pp, schedule="zb-h1")
    assert bubbles(plan, m, f, i, w)[0] == pytest.approx((pp - 1) * (f + i - w))
    kept = [in_flight(plan, rank, m)[0] for rank in range(pp)]
    assert max(kept) == min(m, pp) == max(in_flight(ParallelPlan(pp=pp), r, m)[0] for r in range(pp))


@pytest.mark.parametrize("times", WEIGHTS_SHORTEST)
@pytest.mark.parametrize(("pp", "m"), [(1, 3), (2, 4), (4, 8), (4, 16), (6, 11)])
def test_zb_h2_trades_memory_for_the_rest(pp: int, m: int, times: tuple[float, float, float]) -> None:
    # The same table: (p − 1)(T_F + T_B − 2·T_W), of a rank's own time, with 2p − 1 micro-batches kept
    f, i, w = times
    plan = ParallelPlan(pp=pp, schedule="zb-h2")
    step, own = bubbles(plan, m, f, i, w)
    assert own == pytest.approx((pp - 1) * (f + i - 2 * w))
    # The last rank starts p − 1 forwards late, which an update that waits for all ranks sees.
    assert step >= (pp - 1) * f - 1e-9
    assert {in_flight(plan, rank, m)[0] for rank in range(pp)} == {2 * pp - 1}


@pytest.mark.parametrize("times", WEIGHTS_SHORTEST)
@pytest.mark.parametrize(("pp", "vpp", "m"), [(2, 2, 2), (2, 3, 8), (4, 2, 4), (4, 4, 8), (6, 2, 12)])
def test_interleaved_zb_divides_zb_h1(
    pp: int, vpp: int, m: int, times: tuple[float, float, float]
) -> None:
    f, i, w = times  # of a chunk
    plan = ParallelPlan(pp=pp, vpp=vpp, schedule="interleaved-zb")
    assert bubbles(plan, m, f, i, w)[0] == pytest.approx((pp - 1) * (f + i - w))


@pytest.mark.parametrize(("pp", "m"), [(2, 3), (2, 8), (4, 7), (4, 16), (6, 24)])
def test_zbv_has_no_bubble_and_1f1b_s_memory(pp: int, m: int) -> None:
    # Qi et al. 2024, section 6, and arXiv 2405.15362: where F, I and W are equal. Chunks are half of
    # 1F1B's stages, so 2p of them are the memory of p micro-batches.
    plan = ParallelPlan(pp=pp, vpp=2, schedule="zbv")
    assert bubbles(plan, m, 1.0, 1.0, 1.0)[1] == pytest.approx(0.0)
    assert max(sum(in_flight(plan, rank, m)) for rank in range(pp)) == 2 * pp
    # Else a rank waits in each of the p − 1 hops there and back for the longer pass instead of w.
    for f, i, w in WEIGHTS_SHORTEST:
        assert bubbles(plan, m, f, i, w)[1] == pytest.approx(2 * (pp - 1) * (max(f, i) - w))


@pytest.mark.parametrize(
    ("schedule", "pp", "half"),
    [
        *(("dualpipe", 2 * half, half) for half in (1, 2, 4)),
        *(("dualpipev", half, half) for half in (2, 3, 4)),
    ],
)
@pytest.mark.parametrize("more", [0, 2, 10])
def test_bubble_and_memory_of_dualpipe(schedule: str, pp: int, half: int, more: int) -> None:
    # README of github.com/deepseek-ai/DualPipe: (PP/2 − 1)(F&B + B − 3W) and PP + 1 chunks, PP = 2·half
    # stages; DualPipeV holds them on half as many ranks. F is taken to be as long as I there.
    plan, m = ParallelPlan(pp=pp, vpp=2, schedule=schedule), 2 * pp + more
    for f, w in ((1.0, 1.0), (1.0, 0.5), (2.0, 1.0), (1.0, 0.25)):
        pair, backward = f + f + w, f + w
        step, _ = bubbles(plan, m, f, f, w)
        assert step == pytest.approx((half - 1) * (pair + backward - 3 * w))
    kept = [sum(in_flight(plan, rank, m)) for rank in range(pp)]
    assert max(kept) == 2 * half + 1


def test_overlapped_pairs_hide_their_exchanges() -> None:
    # In the main part of the schedule every forward has a backward beside it.
    plan = ParallelPlan(pp=4, vpp=2, schedule="dualpipev")
    few, more = (bubbles(plan, m, 1.0, 1.0, 0.5, exchange=0.5)[0] for m in (16, 48))
    assert more == pytest.approx(few)
    plain = ParallelPlan(pp=4, vpp=2, schedule="zbv")
    few, more = (bubbles(plain, m, 1.0, 1.0, 0.5, exchange=0.5)[0] for m in (16, 48))
    assert more - few == pytest.approx(32 * 2 * 2 * 0.5)  # two exchanges a chunk and micro-batch


@pytest.mark.parametrize(("pp", "vpp", "m"), [(2, 1, 4), (2, 2, 2), (4, 2, 8), (4, 4, 4), (3, 3, 7)])
def test_breadth_first_has_the_bubble_of_interleaving(pp: int, vpp: int, m: int) -> None:
    # Lamy-Poirier 2022, arXiv 2211.05953, section 4: (p − 1)/(v·m) of the work, all activations kept
    plan = ParallelPlan(pp=pp, vpp=vpp, schedule="looped-bfs")
    assert bubbles(plan, m, 1.0, 1.5, 0.5)[0] == pytest.approx((pp - 1) * 3.0)
    assert in_flight(plan, 0, m) == (m,) * vpp


def test_one_chunk_of_looped_bfs_is_gpipe() -> None:
    one, other = looped_bfs(3, 1, 4), gpipe(3, 4)
    assert [set(rank) for rank in one.ranks] == [set(rank) for rank in other.ranks]
    assert [rank[:4] for rank in one.ranks] == [rank[:4] for rank in other.ranks]


def test_one_chunk_of_interleaved_zb_is_zb_h1() -> None:
    assert interleaved_zb(4, 1, 8).ranks == zb_h1(4, 8).ranks


@pytest.mark.parametrize("times", WEIGHTS_SHORTEST)
def test_every_split_is_worth_its_while(times: tuple[float, float, float]) -> None:
    plans = [ParallelPlan(pp=4, schedule=s) for s in ("1f1b", "zb-h1", "zb-h2")]
    whole, h1, h2 = (bubbles(plan, 12, *times)[1] for plan in plans)
    assert h2 < h1 < whole


def test_dualpipe_holds_every_stage_on_two_ranks() -> None:
    plan = ParallelPlan(pp=4, vpp=2, schedule="dualpipe")
    schedule = make_schedule(plan, 8)
    assert schedule.stage_ranks() == {0: 0, 1: 1, 2: 2, 3: 3, 4: 3, 5: 2, 6: 1, 7: 0}
    assert [schedule.next_stage(s) for s in range(8)] == [1, 2, 3, None, 5, 6, 7, None]
    assert [schedule.previous_stage(s) for s in range(8)] == [None, 0, 1, 2, None, 4, 5, 6]
    first = [a for a in schedule.actions() if a.stage < 4]
    assert {a.micro_batch for a in first} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("plan", "m", "said"),
    [
        ("pp=3,schedule=dualpipe", 8, "even number of pipeline ranks"),
        ("pp=4,schedule=dualpipe", 9, "an even number from"),
        ("pp=4,schedule=dualpipe", 6, "2·pp = 8"),
        ("pp=4,schedule=dualpipev", 7, "8 or more"),
        ("pp=4,vpp=2,schedule=interleaved", 9, "equal rounds"),
        ("pp=4,vpp=2,schedule=interleaved-zb", 9, "equal rounds"),
    ],
)
def test_sizes_that_a_schedule_does_not_take(plan: str, m: int, said: str) -> None:
    for refuse in (make_schedule, check_micro_batches):
        with pytest.raises(ParsimError) as caught:
            refuse(parse_plan(plan), m)
        assert said in str(caught.value)
        assert caught.value.hint


@pytest.mark.parametrize(("pp", "vpp", "m"), [(2, 2, 4), (4, 2, 8), (4, 4, 8), (6, 3, 12)])
def test_memory_of_interleaving_in_micro_batches_of_a_whole_rank(pp: int, vpp: int, m: int) -> None:
    # Narayanan et al. 2021, section 2.2.2: 1F1B's memory times 1 + (p − 1)/(p·v); with split backwards
    # half as many forwards run ahead, and weight gradients wait on the later ranks instead.
    whole, split = (
        [sum(in_flight(ParallelPlan(pp=pp, vpp=vpp, schedule=name), rank, m)) for rank in range(pp)]
        for name in ("interleaved", "interleaved-zb")
    )
    assert max(whole) / vpp == pytest.approx(pp * (1 + (pp - 1) / (pp * vpp)))
    assert set(split) == {pp * vpp}


def test_interleaved_needs_equal_rounds() -> None:
    with pytest.raises(ParsimError, match="equal rounds"):
        interleaved(4, 2, 9)


def test_1f1b_alternates_after_its_warm_up() -> None:
    first = [str(action) for action in one_f_one_b(3, 4).ranks[0]]
    assert first == ["0F0", "0F1", "0F2", "0B0", "0F3", "0B1", "0B2", "0B3"]
