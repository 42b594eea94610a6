"""Schedules that nobody would write, with passes of any length: what holds for all, holds for them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parsim.cost.price import PartTime, PassTime
from parsim.cost.step import StepCost
from parsim.errors import ParsimError
from parsim.plan import ParallelPlan
from parsim.schedule.action import Action, Schedule
from parsim.schedule.check_actions import check_schedule
from parsim.schedule.csv_file import schedule_from_csv, schedule_to_csv
from parsim.schedule.in_flight import peak_in_flight
from parsim.schedule.lower import lower
from parsim.schedule.program import Program
from parsim.simulate.replay import replay
from parsim.timeline import Span
from tests.builders import flat_cost, plain_stack

SECONDS = st.floats(0.01, 10)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Any order in which all passes of all micro-batches can run, on stages dealt to ranks at random."""
    stages, micro_batches = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    pp = draw(st.integers(1, stages))
    deal = st.permutations([*range(pp), *(s % pp for s in range(pp, stages))])
    home = dict(enumerate(draw(deal)))
    needs: dict[Action, list[Action]] = {}
    for i in range(micro_batches):
        back: list[Action] = []
        for stage in range(stages):
            before = [Action(stage - 1, "F", i)] if stage else []
            needs[Action(stage, "F", i)] = before
        for stage in reversed(range(stages)):
            split = draw(st.booleans())
            hand_back = Action(stage, "I" if split else "B", i)
            needs[hand_back] = [Action(stage, "F", i), *back]
            back = [hand_back]
            if split:
                needs[Action(stage, "W", i)] = [hand_back]
    ranks: list[list[Action]] = [[] for _ in range(pp)]
    done: set[Action] = set()
    while len(done) < len(needs):
        ready = [a for a in needs if a not in done and all(n in done for n in needs[a])]
        action = draw(st.sampled_from(ready))
        done.add(action)
        ranks[home[action.stage]].append(action)
    return Schedule(name="random", ranks=tuple(map(tuple, ranks)))


@st.composite
def costs_of(draw: st.DrawFn, schedule: Schedule) -> StepCost:
    """Passes, transfers and activations of any size."""
    base = flat_cost(schedule.num_stages, send_s=0.0)
    stages = []
    for stage in base.stages:
        passes = (PassTime(draw(SECONDS)) for _ in range(3))
        time = PartTime(*passes, PassTime(draw(st.sampled_from([0.0, 1.0]))))
        stages.append(replace(stage, time=time, saved_bytes=float(draw(st.integers(1, 100)))))
    sends = tuple(draw(st.sampled_from([0.0, 0.5, 5.0])) for _ in base.send_s)
    return replace(base, stages=tuple(stages), send_s=sends)


def program_of(schedule: Schedule, cost: StepCost, *, overlap: bool = True) -> Program:
    plan = ParallelPlan(pp=schedule.pp)
    return lower(
        schedule,
        cost,
        plan,
        plain_stack(pp_overlap=overlap),
        static_bytes=(0.0,) * schedule.pp,
    )


@given(st.data(), st.booleans())
@settings(max_examples=80)
def test_a_random_schedule_is_a_step(data: st.DataObject, overlap: bool) -> None:
    schedule = data.draw(schedules())
    check_schedule(schedule)
    assert schedule_from_csv(schedule_to_csv(schedule), name="random") == schedule
    cost = data.draw(costs_of(schedule))
    timeline = replay(program_of(schedule, cost, overlap=overlap))
    busy_s: dict[tuple[int, str, int], float] = defaultdict(float)
    home = schedule.stage_ranks()
    for rank, stream, spans in timeline.lanes():
        # On a ring one rank is next; stages dealt at random bring transfers from several that way.
        of_peer: dict[int, list[Span]] = defaultdict(list)
        for span in spans:
            of_peer[home[span.stage] if stream.startswith("pp_recv") else rank].append(span)
        for peer, those in of_peer.items():
            busy_s[rank, stream, peer] = sum(span.duration_s for span in those)
            for one, other in pairwise(those):
                assert other.start_s >= one.end_s
    ran = {s.name: s for s in timeline.spans if s.stream == "compute" and s.stage >= 0}
    for rank, actions in enumerate(schedule.ranks):
        # On a rank in the order given; a stage's forward before its backward, I before W.
        for one, other in pairwise(actions):
            assert ran[str(other)].start_s >= ran[str(one)].end_s
        _, held = peak_in_flight(actions, dict.fromkeys({a.stage for a in actions}, 1.0))
        assert sum(held.values()) <= len(actions)
        peak, _ = peak_in_flight(actions, {a.stage: cost.stages[a.stage].saved_bytes for a in actions})
        assert max(s.num_bytes for s in timeline.memory if s.rank == rank) == pytest.approx(peak)
    for action in schedule.actions():
        if action.kind == "F" and action.stage:
            arrives = ran[str(Action(action.stage - 1, "F", action.micro_batch))].end_s
            assert ran[str(action)].start_s >= arrives
    assert timeline.end_s >= max(busy_s.values()) * (1 - 1e-12)


@given(st.data())
@settings(max_examples=60)
def test_slower_passes_never_make_a_random_schedule_faster(data: st.DataObject) -> None:
    schedule = data.draw(schedules())
    cost = data.draw(costs_of(schedule))
    place = data.draw(st.integers(0, schedule.num_stages - 1))
    stages = list(cost.stages)
    slower = stages[place].time.forward.times(1.5)
    stages[place] = replace(stages[place], time=stages[place].time._replace(forward=slower))
    before = replay(program_of(schedule, cost)).end_s
    after = replay(program_of(schedule, replace(cost, stages=tuple(stages)))).end_s
    assert after >= before * (1 - 1e-12)


def waits_in_a_cycle(schedule: Schedule) -> bool:
    """By networkx: whether the order on the ranks contradicts what passes need."""
    graph = nx.DiGraph()
    actions = set(schedule.actions())
    for rank in schedule.ranks:
        graph.add_edges_from(pairwise(rank))
    for stage, kind, i, _ in actions:
        if kind == "F":
            needed = [Action(stage - 1, "F", i)]
        elif kind == "W":
            needed = [Action(stage, "I", i)]
        else:
            needed = [Action(stage, "F", i), Action(stage + 1, "B", i), Action(stage + 1, "I", i)]
        graph.add_edges_from((n, Action(stage, kind, i)) for n in needed if n in actions)
    return not nx.is_directed_acyclic_graph(graph)


@given(st.data())
@settings(max_examples=150)
def test_a_shuffled_schedule_runs_or_its_cycle_is_told(data: st.DataObject) -> None:
    schedule = data.draw(schedules())
    ranks = [list(rank) for rank in schedule.ranks]
    rank = data.draw(st.sampled_from(ranks))
    one = data.draw(st.integers(0, len(rank) - 1))
    other = data.draw(st.integers(0, len(rank) - 1))
    rank[one], rank[other] = rank[other], rank[one]
    shuffled = replace(schedule, ranks=tuple(map(tuple, ranks)))
    if not waits_in_a_cycle(shuffled):
        check_schedule(shuffled)
        return
    with pytest.raises(ParsimError, match="deadlocks") as error:
        check_schedule(shuffled)
    steps = str(error.value.where).split("; ")
    homes = [step.split(":")[0] for step in steps]
    waited_for = [step.split(" of ")[-1].split(",")[0] for step in steps]
    # Each rank waits for the next one's action, the last for the first's.
    assert waited_for == [*homes[1:], homes[0]]
