"""Replicas that differ: folding is exact, and a slow device costs what waiting for it costs."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parsim.schedule.program import Program, step_time_s, task_times, timeline_of
from parsim.simulate.prediction import program_of
from parsim.simulate.replay import replay, replayed_times
from parsim.simulate.uneven import (
    Replica,
    Straggler,
    Unevenness,
    replicas_of,
    uneven_program,
    unfolded_program,
)
from parsim.timeline import breakdown_s
from tests.strategies import CASES, Case, stragglers


def one_by_one(plan_dp: int, replicas: tuple[Replica, ...]) -> tuple[Replica, ...]:
    """Every pipeline in a group of its own."""
    of = {member: replica for replica in replicas for member in replica.members}
    return tuple(replace(of[dp_i], members=(dp_i,)) for dp_i in range(plan_dp))


@given(CASES)
@settings(max_examples=60)
def test_folded_and_unfolded_agree(case: Case) -> None:
    job, plan, costs = case
    program, _ = program_of(job, plan, costs)
    whole = unfolded_program(program, one_by_one(plan.dp, replicas_of(plan, Unevenness())))
    assert len(whole.ranks) == plan.dp * plan.pp
    assert replay(whole).end_s == pytest.approx(step_time_s(program), rel=1e-9)
    every = breakdown_s(replay(whole))
    assert every == pytest.approx(breakdown_s(replay(program)), rel=1e-9, abs=1e-12)


@given(CASES, st.data())
@settings(max_examples=60)
def test_unfolding_only_what_differs_is_exact(case: Case, data: st.DataObject) -> None:
    job, plan, costs = case
    uneven = Unevenness(stragglers=data.draw(stragglers(plan.gpus)))
    program, _ = program_of(job, plan, costs)
    replicas = replicas_of(plan, uneven)
    assert sorted(member for replica in replicas for member in replica.members) == list(range(plan.dp))
    some = replay(unfolded_program(program, replicas))
    everything = replay(unfolded_program(program, one_by_one(plan.dp, replicas)))
    assert some.end_s == pytest.approx(everything.end_s, rel=1e-9)
    assert breakdown_s(some) == pytest.approx(breakdown_s(everything), rel=1e-9, abs=1e-12)
    assert sum(breakdown_s(some).values()) == pytest.approx(some.end_s)


@given(CASES, st.data())
@settings(max_examples=60)
def test_what_joins_replicas_runs_on_all_of_them_at_once(case: Case, data: st.DataObject) -> None:
    job, plan, costs = case
    program, _ = program_of(job, plan, costs)
    replicas = replicas_of(plan, Unevenness(stragglers=data.draw(stragglers(plan.gpus))))
    whole = unfolded_program(program, replicas)
    starts, ends = replayed_times(whole)
    running = [i for i, task in enumerate(whole.tasks) if task.rank >= 0]
    copies = len(replicas)
    for k, task in enumerate(program.tasks):
        if task.joins_replicas:
            mine = running[k * copies : (k + 1) * copies]
            assert len({starts[i] for i in mine}) == 1
            if task.kind == "dp":
                assert len({ends[i] for i in mine}) == 1


@given(CASES, st.data())
@settings(max_examples=40)
def test_a_straggler_never_helps_and_the_replay_is_the_longest_path(
    case: Case, data: st.DataObject
) -> None:
    job, plan, costs = case
    program, _ = program_of(job, plan, costs)
    slow = Unevenness(stragglers=data.draw(stragglers(plan.gpus)))
    slower = Unevenness(
        stragglers=tuple(Straggler(s.rank, 2 * s.slow, 2 * s.link) for s in slow.stragglers)
    )
    programs = [program, uneven_program(program, plan, slow), uneven_program(program, plan, slower)]
    times = [replay(p).end_s for p in programs]
    assert times == sorted(times)
    assert times[2] <= times[0] * 6.0 * (1 + 1e-9)
    assert replayed_times(programs[1]).end_s == pytest.approx(task_times(programs[1]).end_s, rel=1e-9)


@given(CASES)
@settings(max_examples=20)
def test_jitter_is_drawn_from_the_seed(case: Case) -> None:
    job, plan, costs = case
    program, _ = program_of(job, plan, costs)

    def jittered(seed: int) -> Program:
        return uneven_program(program, plan, Unevenness(jitter=0.05, seed=seed))

    one, again, other = jittered(1), jittered(1), jittered(2)
    assert one == again
    assert one != other
    assert len(one.ranks) == plan.dp * plan.pp
    assert timeline_of(one, replayed_times(one)) == replay(again)
