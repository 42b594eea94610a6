"""Actions in detail are the same actions: same start, same end, same time on every stream."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parsim.charts.operations import operations_figure
from parsim.cost.cell import cell_of
from parsim.cost.price import TimedOperation
from parsim.cost.stage import CostModel
from parsim.errors import ParsimError
from parsim.model import MoeSpec
from parsim.plan import Job, ParallelPlan
from parsim.schedule import make_schedule
from parsim.schedule.action import Action, Schedule
from parsim.schedule.operations import Step, laid_out
from parsim.simulate import detail
from parsim.simulate.detail import ActionDetail, StepOperations, action_details, detailed
from parsim.simulate.prediction import predict
from parsim.simulate.uneven import Straggler, Unevenness
from parsim.timeline import Span, Timeline
from tests.builders import plain_stack, round_cluster, small_model
from tests.strategies import CASES, Case


def details_of(
    case: Case, rank: int, micro_batches: int, schedule: Schedule | None = None
) -> tuple[Timeline, list[ActionDetail]]:
    job, plan, costs = case
    schedule = schedule or make_schedule(plan, plan.num_micro_batches(job))
    _, timeline = predict(job, plan, costs, schedule)
    operations = StepOperations(job=job, plan=plan, costs=costs, schedule=schedule)
    return timeline, action_details(timeline, operations, rank=rank, micro_batches=micro_batches)


def by_stream(spans: tuple[Span, ...] | list[Span]) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for span in spans:
        total[span.stream] += span.duration_s
    return total


@given(CASES, st.integers(0, 7), st.integers(1, 3))
@settings(max_examples=60)
def test_an_action_in_detail_is_the_same_action(case: Case, rank: int, micro_batches: int) -> None:
    rank %= case[1].pp
    timeline, details = details_of(case, rank, micro_batches)
    whole: dict[str, list[Span]] = defaultdict(list)
    for span in timeline.spans:
        if span.rank == rank and span.stream in ("compute", "tp", "cp", "ep"):
            whole[span.name].append(span)
    schedule = make_schedule(case[1], case[1].num_micro_batches(case[0]))
    alone = [a for a in schedule.ranks[rank] if not a.parts and a.micro_batch < micro_batches]
    lasting = [a for a in alone if any(s.duration_s for s in whole[str(a)])]
    assert [found.action for found in details] == lasting
    operations = StepOperations(job=case[0], plan=case[1], costs=case[2], schedule=schedule)
    pairs = {part for action in schedule.ranks[rank] for part in action.parts}
    rest = detail.left_out(timeline, operations, rank=rank, micro_batches=micro_batches)
    assert set(rest) == {part for part in pairs if part.micro_batch < micro_batches}
    for found in details:
        action = whole[str(found.action)]
        end = max(span.end_s for span in action)
        assert (found.start_s, found.end_s) == (min(span.start_s for span in action), end)
        step_s = timeline.end_s
        assert min(s.start_s for s in found.spans) == pytest.approx(found.start_s, abs=1e-9 * step_s)
        assert max(s.end_s for s in found.spans) == pytest.approx(found.end_s, abs=1e-9 * step_s)
        # By stream: what was there, and what runs beside.
        seconds, before = by_stream(found.spans), by_stream(action)
        for stream in ("compute", "tp", "cp", "ep"):
            expected = before[stream] + found.hidden_s.get(stream, 0.0)
            assert seconds[stream] == pytest.approx(expected, abs=1e-9 * step_s), stream


@given(CASES, st.integers(0, 7))
@settings(max_examples=40)
def test_nothing_overlaps_on_a_stream(case: Case, rank: int) -> None:
    rank %= case[1].pp
    timeline, details = details_of(case, rank, 2)
    whole = detailed(timeline, details, rank=rank)
    slack_s = 1e-9 * timeline.end_s
    for _, _, spans in whole.lanes():
        for one, other in pairwise(spans):
            assert other.start_s >= one.end_s - slack_s
    assert whole.end_s == timeline.end_s
    others = [span for span in timeline.spans if span.rank != rank]
    assert [span for span in whole.spans if span.rank != rank] == others


def timed(stream: str, seconds: float, *, beside: bool = False) -> Step:
    operation = TimedOperation("x", stream, seconds, beside=beside)  # type: ignore[arg-type]
    return Step("layer 0", "forward", operation)


def test_what_is_hidden_runs_beside_the_compute_after_it() -> None:
    steps = [
        timed("compute", 1.0),
        timed("tp", 2.0, beside=True),
        timed("compute", 3.0),
        timed("tp", 0.5),
    ]
    found = [(p.step.operation.stream, p.start_s, p.end_s) for p in laid_out(steps)]
    assert found == [("compute", 0, 1), ("tp", 1, 3), ("compute", 1, 4), ("tp", 4, 4.5)]


def test_hidden_transfers_make_way_and_move_forward_where_the_action_ends() -> None:
    steps = [
        timed("compute", 2.0),
        timed("ep", 3.0, beside=True),  # beside what follows: 2 to 3, then after the other 4 to 5
        timed("compute", 1.0),
        timed("ep", 1.0),
        timed("compute", 1.0),  # and for the last second before its place
    ]
    found = [(p.start_s, p.end_s) for p in laid_out(steps) if p.step.operation.beside]
    assert found == [(0, 1), (2, 3), (4, 5)]


def test_a_layer_s_operations_by_name() -> None:
    """Async tensor parallelism: the gather of the input runs beside the product that needs it."""
    model = small_model(layers=2, hidden=4096, heads=32, kv_heads=32, ffn_hidden=16384)
    plan = ParallelPlan(tp=4, sequence_parallel=True, tp_overlap=True)
    job = Job(model=model, seq_len=2048, global_batch=1)
    stack = plain_stack(tp_async_backward=True, overlap_cost=0.0)
    _, (forward, backward) = details_of((job, plan, CostModel(model, round_cluster(), stack)), 0, 1)
    spans = {span.name: span for span in forward.spans}
    gather, product = spans["layer 1: attention input"], spans["layer 1: qkv"]
    assert (gather.stream, product.stream) == ("tp", "compute")
    assert gather.start_s == product.start_s
    assert gather.end_s <= product.end_s
    order = [s.name for s in sorted(forward.spans, key=lambda s: s.start_s) if s.stream == "compute"]
    places = [order.index(f"layer 0: {name}") for name in ("qkv", "attention", "fc1", "fc2")]
    assert places == sorted(places)
    assert order.index("embedding: embedding") < places[0] < order.index("layer 1: qkv")
    kinds = [s.kind for s in sorted(backward.spans, key=lambda s: s.start_s) if s.name == "layer 0: fc2"]
    assert kinds == ["input_grad", "weight_grad"]
    assert set(backward.hidden_s) == {"tp"}


def test_details_of_a_slow_device_last_as_long_as_its_actions() -> None:
    """Operations of a straggler are all slower by its factor."""
    model, plan = small_model(), ParallelPlan(dp=2, pp=2)
    job, costs = (
        Job(model=model, seq_len=256, global_batch=8),
        CostModel(model, round_cluster(), plain_stack()),
    )
    schedule = make_schedule(plan, 4)
    uneven = Unevenness(stragglers=(Straggler(rank=0, slow=2.0),))
    _, timeline = predict(job, plan, costs, schedule, uneven=uneven)
    operations = StepOperations(job=job, plan=plan, costs=costs, schedule=schedule)
    seconds = {}
    for rank in timeline.ranks:
        (first, *_) = action_details(timeline, operations, rank=rank, micro_batches=1)
        if first.action == Action(0, "F", 0):
            (qkv,) = (s for s in first.spans if s.name == "layer 0: qkv")
            seconds[rank] = qkv.duration_s
    slow, quick = max(seconds.values()), min(seconds.values())
    assert slow == pytest.approx(2 * quick)


@pytest.mark.parametrize("schedule", ["pipedream", "pipedream-2bw"])
def test_steps_out_of_the_middle_of_many_show_whole_actions(schedule: str) -> None:
    """Their ends cut through actions; what is shown lasts as long as an action does."""
    model, plan = small_model(), ParallelPlan(dp=2, pp=4, schedule=schedule)
    costs = CostModel(model, round_cluster(), plain_stack())
    job = Job(model=model, seq_len=256, global_batch=32)
    for rank in range(4):
        _, details = details_of((job, plan, costs), rank, 3)
        assert details
        for found in details:
            whole = costs.stages(cell_of(job, plan), (2, 2, 2, 2))[rank].time
            expected = whole.forward if found.action.kind == "F" else whole.backward
            assert found.end_s - found.start_s == pytest.approx(expected.total_s)


def test_too_much_detail_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(moe=MoeSpec(experts=4, top_k=2, ffn_hidden=256))
    job = Job(model=model, seq_len=256, global_batch=8)
    case = job, ParallelPlan(), CostModel(model, round_cluster(), plain_stack())
    with pytest.raises(ParsimError, match="no such rank"):
        details_of(case, 3, 1)
    monkeypatch.setattr(detail, "MAX_SPANS", 100)
    with pytest.raises(ParsimError, match="more operations than"):
        details_of(case, 0, 8)


def test_a_chart_has_a_panel_for_each_action_and_names_what_has_room() -> None:
    model = small_model(layers=2, hidden=4096, heads=32, kv_heads=32, ffn_hidden=16384)
    plan = ParallelPlan(dp=2, tp=4, sequence_parallel=True, zero=3)
    job = Job(model=model, seq_len=2048, global_batch=2)
    timeline, details = details_of(
        (job, plan, CostModel(model, round_cluster(), plain_stack(tp_async_backward=True))), 0, 1
    )
    figure = operations_figure(details, timeline, rank=0)
    assert [axes.get_title(loc="left").partition(":")[0] for axes in figure.axes] == ["0F0", "0B0"]
    for axes in figure.axes:
        assert [label.get_text() for label in axes.get_yticklabels()] == ["compute", "tp", "dp"]
        assert {"fc1", "fc2"} <= {text.get_text() for text in axes.texts}
    with pytest.raises(ParsimError, match="a panel for each action"):
        operations_figure(details * 5, timeline, rank=0)
