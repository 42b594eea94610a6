"""Replay, longest path and networkx agree on random programs of random plans."""

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parsim.cost.stage import CostModel
from parsim.schedule import make_schedule
from parsim.schedule.program import Program, Task, step_time_s, task_times
from parsim.simulate.fold import unfolded
from parsim.simulate.prediction import predict, program_of
from parsim.simulate.replay import replay, replayed_times
from parsim.timeline import Timeline, breakdown_s
from tests.strategies import CASES, Case


def longest_path_s(program: Program) -> float:
    """The step time as networkx finds it, on the graph of tasks."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(program.tasks)))
    graph.add_node("end")
    previous: dict[tuple[int, str], int] = {}
    for index, task in enumerate(program.tasks):
        before = set(task.after)
        stream = (task.rank, task.stream)
        if stream in previous:
            before.add(previous[stream])
        previous[stream] = index
        for i in before:
            graph.add_edge(i, index, weight=program.tasks[i].duration_s)
        graph.add_edge(index, "end", weight=task.duration_s)
    return float(nx.dag_longest_path_length(graph))


@given(CASES)
@settings(max_examples=60)
def test_replay_longest_path_and_networkx_agree(case: Case) -> None:
    program, _ = program_of(*case)
    expected = step_time_s(program)
    assert replay(program).end_s == pytest.approx(expected, rel=1e-9)
    assert longest_path_s(program) == pytest.approx(expected, rel=1e-9)


@given(CASES)
def test_no_overlap_and_causality(case: Case) -> None:
    program, _ = program_of(*case)
    timeline = replay(program)
    for _, _, spans in timeline.lanes():
        for one, other in pairwise(spans):
            assert other.start_s >= one.end_s
    starts, ends = task_times(program)
    for task, start in zip(program.tasks, starts, strict=True):
        assert all(start >= ends[i] for i in task.after)


def sends_and_receives(timeline: Timeline) -> dict[str, list[tuple[float, float, str]]]:
    found = defaultdict(list)
    for span in timeline.spans:
        if span.kind == "pp":
            found["send" if "send" in span.stream else "recv"].append(
                (span.start_s, span.end_s, span.name)
            )
    return {side: sorted(spans) for side, spans in found.items()}


@given(CASES)
def test_every_send_has_its_receive(case: Case) -> None:
    job, plan, costs = case
    _, timeline = predict(job, plan, costs)
    found = sends_and_receives(timeline)
    assert found.get("send") == found.get("recv")
    schedule = make_schedule(plan, plan.num_micro_batches(job))
    neighbours = [(s, schedule.next_stage(s)) for s in range(plan.num_stages)]
    between_ranks = sum(
        other is not None and plan.stage_rank(s) != plan.stage_rank(other) for s, other in neighbours
    )
    runs = plan.num_micro_batches(job) // plan.chains
    assert len(found.get("send", [])) == 2 * between_ranks * runs


@given(CASES)
def test_breakdown_adds_up_and_memory_peaks_agree(
    case: Case,
) -> None:
    prediction, timeline = predict(*case)
    assert sum(prediction.breakdown_s.values()) == pytest.approx(prediction.step_time_s, rel=1e-9)
    assert all(seconds >= 0 for seconds in prediction.breakdown_s.values())
    peak = max(sample.num_bytes for sample in timeline.memory)
    assert peak == pytest.approx(prediction.memory.peak, rel=1e-9)


@given(CASES)
def test_unfolding_changes_no_mean(case: Case) -> None:
    _, plan, _ = case
    _, timeline = predict(*case)
    whole = unfolded(timeline, plan)
    assert whole.ranks == tuple(range(plan.gpus))
    assert breakdown_s(whole) == pytest.approx(breakdown_s(timeline), rel=1e-9)


@given(CASES)
def test_the_same_input_gives_the_same_timeline(case: Case) -> None:
    assert predict(*case) == predict(*case)


@given(CASES)
def test_no_step_is_shorter_than_the_work_of_a_stream(case: Case) -> None:
    program, _ = program_of(*case)
    work_s: dict[tuple[int, str], float] = defaultdict(float)
    for task in program.tasks:
        work_s[task.rank, task.stream] += task.duration_s
    assert replay(program).end_s >= max(work_s.values()) * (1 - 1e-12)


@given(CASES, st.sampled_from(["intra_node", "inter_node"]))
@settings(max_examples=60)
def test_more_bandwidth_never_makes_a_step_longer(case: Case, which: str) -> None:
    job, plan, costs = case
    times = []
    for factor in (1.0, 1.5, 8.0):
        link = getattr(costs.cluster, which)
        faster = replace(link, bandwidth_bytes_per_s=factor * link.bandwidth_bytes_per_s)
        cluster = replace(costs.cluster, **{which: faster})
        program, _ = program_of(job, plan, CostModel(costs.model, cluster, costs.stack))
        times.append(replay(program).end_s)
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(times))


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Any tasks on a few streams of a few ranks; each waits for some that stand before it."""
    tasks = []
    for index in range(draw(st.integers(0, 40))):
        before = st.sets(st.integers(0, max(0, index - 1)), max_size=min(4, index))
        tasks.append(
            Task(
                draw(st.integers(0, 3)),
                draw(st.sampled_from(["compute", "tp", "dp"])),
                str(index),
                "forward",
                draw(st.one_of(st.just(0.0), st.floats(0, 10))),
                tuple(sorted(draw(before))),
            )
        )
    return Program(tasks=tuple(tasks))


@given(programs())
@settings(max_examples=200)
def test_any_program_runs_as_its_longest_path_says(program: Program) -> None:
    assert replayed_times(program) == task_times(program)
    assert replay(program).end_s == pytest.approx(longest_path_s(program), rel=1e-9)


@given(programs())
def test_on_any_program_streams_run_one_task_at_a_time(program: Program) -> None:
    for _, _, spans in replay(program).lanes():
        for one, other in pairwise(spans):
            assert other.start_s >= one.end_s
