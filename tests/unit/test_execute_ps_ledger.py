"""What parameter servers allow, whatever the order in which workers come."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parsim.execute.asynchronous.ps_ledger import PULL, PUSH, Event, Ledger

STEPS = 6


def played(workers: int, bound: float, choices: list[int]) -> Ledger:
    """Workers that pull and push in turn until all have done STEPS; `choices` say who comes next."""
    ledger = Ledger(workers, bound)
    done = [0] * workers
    computing: set[int] = set()
    asked: set[int] = set()
    for choice in [*choices, *range(10_000)]:
        busy = [w for w in range(workers) if done[w] < STEPS and w not in asked - computing]
        if not busy:
            break
        worker = busy[choice % len(busy)]
        if worker in computing:
            computing.remove(worker)
            asked.remove(worker)
            ledger.push(worker)
            done[worker] += 1
        else:
            asked.add(worker)
            ledger.ask(worker)
        computing.update(ledger.allowed())
    assert done == [STEPS] * workers, "workers wait for each other"
    return ledger


@given(
    workers=st.integers(2, 5),
    bound=st.sampled_from([0, 1, 2, 3, math.inf]),
    choices=st.lists(st.integers(0, 100), max_size=80),
)
def test_no_order_breaks_the_bound_or_locks_up(workers: int, bound: float, choices: list[int]) -> None:
    """Ho et al. 2013, section 3: nobody is more than bound + 1 clocks ahead; gradients are no older than
    (w − 1)·(2·bound + 1) updates.
    """
    ledger = played(workers, bound, choices)
    assert ledger.max_lead <= bound + 1
    ages = [event.version for event in ledger.events if event.kind == PUSH]
    assert len(ages) == workers * STEPS
    if bound == 0:
        assert set(ages) == {0}
        assert ledger.version == STEPS
    else:
        assert ledger.version == workers * STEPS
        assert max(ages) <= (workers - 1) * (2 * bound + 1)


@given(choices=st.lists(st.integers(0, 100), max_size=80))
def test_an_update_of_another_is_seen_by_one_step_of_a_worker(choices: list[int]) -> None:
    """Asynchronous: versions that a worker pulls, and what happens between a pull and its push, are all
    the updates there are.
    """
    events = played(3, math.inf, choices).events
    for worker in range(3):
        own = [event for event in events if event.worker == worker]
        assert [event.kind for event in own] == [PULL, PUSH] * STEPS
        for pull, push in pairwise(own):
            if pull.kind == PULL:
                between = events[events.index(pull) + 1 : events.index(push, events.index(pull))]
                assert push.version == sum(event.kind == PUSH for event in between)


def test_a_fast_worker_waits_for_the_slowest_and_no_longer() -> None:
    ledger = Ledger(2, 1)
    for clock in (0, 1):
        ledger.ask(0)
        assert ledger.allowed() == [0]
        assert ledger.push(0) == (True, 0), clock
    ledger.ask(0)
    assert ledger.allowed() == []
    ledger.ask(1)
    assert ledger.allowed() == [1]
    ledger.push(1)
    assert ledger.allowed() == [0]
    assert ledger.events[-1] == Event(PULL, 0, 3)


def test_synchronous_servers_update_once_all_have_pushed() -> None:
    ledger = Ledger(3, 0)
    for worker in range(3):
        ledger.ask(worker)
    assert ledger.allowed() == [0, 1, 2]
    assert [ledger.push(worker)[0] for worker in (2, 0, 1)] == [False, False, True]


def test_a_push_belongs_to_a_pull() -> None:
    with pytest.raises(KeyError):
        Ledger(2, math.inf).push(0)
