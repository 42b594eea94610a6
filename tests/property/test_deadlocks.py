"""Shuffled schedules: what deadlocks is what torch cannot lower, and is told by a true cycle."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parsim.errors import ParsimError
from parsim.plan import ParallelPlan
from parsim.schedule import make_schedule
from parsim.schedule.action import Action, Schedule, computations, parse_action
from parsim.schedule.check_actions import check_schedule
from parsim.schedule.order import Needs
from tests.unit.test_schedules import SIZES

STEP = re.compile(r"rank (\d+): (\S+) waits for (\S+) of rank (\d+)(?:, which stands behind (\S+))?")


@st.composite
def shuffled(draw: st.DrawFn) -> tuple[ParallelPlan, int, Schedule]:
    """A schedule in which some actions have moved forward or back on their ranks."""
    plan, m = draw(st.sampled_from([case for case in SIZES if 1 < case[0].pp < 5 and case[1] < 10]))
    schedule = make_schedule(plan, m)
    ranks = [list(rank) for rank in schedule.ranks]
    for _ in range(draw(st.integers(0, 4))):
        row = ranks[draw(st.integers(0, plan.pp - 1))]
        action = row.pop(draw(st.integers(0, len(row) - 1)))
        row.insert(draw(st.integers(0, len(row))), action)
    return plan, m, replace(schedule, ranks=tuple(map(tuple, ranks)))


def problem(schedule: Schedule) -> ParsimError | None:
    try:
        check_schedule(schedule)
    except ParsimError as error:
        return error
    return None


@given(shuffled())
@settings(max_examples=300)
def test_a_deadlock_is_a_cycle_of_actions_that_wait(case: tuple[ParallelPlan, int, Schedule]) -> None:
    _, _, schedule = case
    error = problem(schedule)
    if error is None:
        return
    steps = [STEP.fullmatch(text) for text in str(error.where).split("; ")]
    needs = Needs(schedule)

    def place(action: str) -> tuple[int, int]:
        found = [
            (rank, at)
            for rank, row in enumerate(schedule.ranks)
            for at, other in enumerate(row)
            if action in map(str, (other, *other.parts))
        ]
        assert len(found) == 1
        return found[0]

    for step, following in zip(steps, [*steps[1:], steps[0]], strict=True):
        assert step is not None
        assert following is not None
        rank, waiting, missing, home, behind = step.groups()
        assert str(place(waiting)[0]) == rank
        assert parse_action(missing) in list(needs.of(parse_action(waiting)))
        assert str(place(missing)[0]) == home == following[1]
        assert place(behind or missing)[1] == place(following[2])[1] <= place(missing)[1]


@given(shuffled())
@settings(max_examples=300)
def test_what_torch_lowers_is_what_runs(case: tuple[ParallelPlan, int, Schedule]) -> None:
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    plan, m, schedule = case
    if plan.chains > 1:
        return

    def of_torch(action: Action) -> object:
        return schedules._Action.from_str(str(action))

    rows = {rank: [of_torch(action) for action in row] for rank, row in enumerate(schedule.ranks)}
    accepted = True
    try:
        schedules._validate_schedule(rows, plan.pp, plan.num_stages, m)
        schedules._add_send_recv(rows, plan.stage_rank, plan.num_stages)
    except (AssertionError, IndexError):  # its message about more ranks than actions fails itself
        accepted = False
    assert accepted == (problem(schedule) is None)
    assert sorted(schedule.actions()) == sorted(
        action for rank in make_schedule(plan, m).ranks for action in computations(rank)
    )
