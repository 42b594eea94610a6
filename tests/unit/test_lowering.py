"""One step in closed form for each thing that lowering adds to a schedule: f = 1 s, b = 2 s a stage."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from parsim.cost.price import PartTime, PassTime
from parsim.cost.step import StepCost
from parsim.cost.traffic import Traffic
from parsim.plan import ParallelPlan
from parsim.schedule import make_schedule
from parsim.schedule.csv_file import schedule_from_csv
from parsim.schedule.lower import lower
from parsim.schedule.program import step_time_s, task_times, timeline_of
from parsim.timeline import Span, Timeline
from tests.builders import flat_cost, plain_stack


def timeline(plan: ParallelPlan, m: int, cost: StepCost, *, csv: str = "", **stack: Any) -> Timeline:
    schedule = schedule_from_csv(csv) if csv else make_schedule(plan, m)
    program = lower(schedule, cost, plan, plain_stack(**stack), static_bytes=(0.0,) * plan.pp)
    step = timeline_of(program, task_times(program))
    assert step.end_s == step_time_s(program)
    return step


def seconds(plan: ParallelPlan, m: int, cost: StepCost, **stack: Any) -> float:
    return timeline(plan, m, cost, **stack).end_s


def spans(step: Timeline, stream: str, rank: int = 0) -> list[Span]:
    return [span for span in step.spans if (span.rank, span.stream) == (rank, stream)]


def busy(step: Timeline, stream: str, rank: int = 0) -> float:
    return sum(span.duration_s for span in spans(step, stream, rank))


TWO = ParallelPlan(pp=2)


# Transfers between stages


@pytest.mark.parametrize("m", [2, 4, 8])
def test_sends_beside_compute_cost_a_round_trip_for_each_two_micro_batches(m: int) -> None:
    # Two micro-batches are in flight on two ranks, and both wait for the first one's gradient.
    cost = flat_cost(2, send_s=0.125)
    assert seconds(TWO, m, cost, pp_overlap=True) == pytest.approx((m + 1) * 3.0 + m * 0.125)


@pytest.mark.parametrize("m", [2, 4, 8])
def test_sends_in_the_way_of_compute_lengthen_every_slot(m: int) -> None:
    cost = flat_cost(2, send_s=0.125)
    assert seconds(TWO, m, cost, pp_overlap=False) == pytest.approx((m + 1) * (3.0 + 0.125))


@pytest.mark.parametrize(("pp", "m"), [(2, 3), (4, 8)])
def test_gpipe_fills_and_drains_through_its_transfers(pp: int, m: int) -> None:
    plan, cost = ParallelPlan(pp=pp, schedule="gpipe"), flat_cost(pp, send_s=0.125)
    expected = (m + pp - 1) * 3.0 + 2 * (pp - 1) * 0.125
    assert seconds(plan, m, cost, pp_overlap=True) == pytest.approx(expected)


def test_a_transfer_shows_at_both_ends() -> None:
    step = timeline(ParallelPlan(pp=3), 1, flat_cost(3, send_s=0.5))
    (forth,), (back,) = spans(step, "pp_send_next", 0), spans(step, "pp_send_prev", 1)
    assert (forth.start_s, forth.end_s, forth.name) == (1.0, 1.5, "0F0")
    assert (back.start_s, back.end_s, back.name) == (8.5, 9.0, "1B0")
    assert [s[2:5] for s in spans(step, "pp_recv_prev", 1)] == [forth[2:5]]
    assert [s[2:5] for s in spans(step, "pp_recv_next", 0)] == [back[2:5]]


def test_a_transfer_takes_what_lies_between_its_stages() -> None:
    step = timeline(ParallelPlan(pp=3), 1, replace(flat_cost(3), send_s=(0.5, 0.25)))
    sent = {s.name: s.duration_s for s in step.spans if s.stream.startswith("pp_send")}
    assert sent == {"0F0": 0.5, "1F0": 0.25, "2B0": 0.25, "1B0": 0.5}


# Gradients


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize(
    ("overlap", "reduce_s", "exposed_s"),
    [
        (False, 1.0, 1.0),
        (True, 1.0, 1.0 / 4),  # the last of four buckets follows the last quarter of the backward
        (True, 4.0, 4.0 - 2.0 + 2.0 / 4),  # all but the backward's last three quarters
    ],
)
def test_reduction_of_gradients(zero: int, overlap: bool, reduce_s: float, exposed_s: float) -> None:
    plan, cost = ParallelPlan(dp=2, zero=zero), flat_cost(1, reduce_s=reduce_s, buckets=4)
    step = timeline(plan, 3, cost, dp_overlap=overlap)
    assert step.end_s == pytest.approx(3 * 3.0 + exposed_s)
    assert busy(step, "dp") == pytest.approx(reduce_s)  # once a step, not once a micro-batch


@pytest.mark.parametrize("overlap", [False, True])
def test_zero_2_reduces_behind_every_backward(overlap: bool) -> None:
    plan = ParallelPlan(dp=2, zero=2)
    step = timeline(plan, 3, flat_cost(1, reduce_s=1.0, buckets=4), dp_overlap=overlap)
    assert step.end_s == pytest.approx(3 * 3.0 + 1.0 / 4)
    assert busy(step, "dp") == pytest.approx(3 * 1.0)
    slow = timeline(plan, 3, flat_cost(1, reduce_s=6.0, buckets=4), dp_overlap=overlap)
    # The network is never idle after the first quarter of the first backward.
    assert slow.end_s == pytest.approx(1.0 + 2.0 / 4 + 3 * 6.0)


def test_chunks_that_end_early_hide_their_reduction() -> None:
    plan = ParallelPlan(dp=2, pp=2, vpp=2, schedule="interleaved")
    cost = flat_cost(4, reduce_s=2.0)
    # One bucket a stage; those of the second chunks run beside the backwards of the first ones.
    ideal_s = 4 * 2 * 3.0 + 3.0
    assert seconds(plan, 4, cost, dp_overlap=True) == pytest.approx(ideal_s + 2.0)
    assert seconds(plan, 4, cost, dp_overlap=False) == pytest.approx(ideal_s + 2 * 2.0)


def test_tied_embeddings_are_summed_after_everything_else() -> None:
    cost = flat_cost(2, tied_reduce_s=0.5, reduce_s=1.0, optimizer_s=0.25)
    step = timeline(TWO, 4, cost)
    assert step.end_s == pytest.approx(5 * 3.0 + 1.0 + 0.5 + 0.25)
    ends = [next(s for s in spans(step, "dp", r) if s.name == "tied embedding") for r in (0, 1)]
    assert [(s.start_s, s.end_s) for s in ends] == [(16.0, 16.5)] * 2
    # The embedding alone: nothing else is reduced, and every rank's update waits for it.
    alone = timeline(ParallelPlan(pp=4), 4, flat_cost(4, tied_reduce_s=0.5, optimizer_s=0.25))
    assert alone.end_s == pytest.approx(7 * 3.0 + 0.5 + 0.25)
    assert {spans(alone, "compute", r)[-1].start_s for r in range(4)} == {21.5}


def test_tied_embeddings_wait_for_the_last_stage_s_own_gradients() -> None:
    cost = flat_cost(2, tied_reduce_s=0.5)
    late = replace(cost.syncs[1], reduce_s=9.0)
    step = timeline(TWO, 4, replace(cost, syncs=(cost.syncs[0], late)))
    # Rank 1's last backward ends a backward before the step's, at 13.
    assert [(s.start_s, s.end_s) for s in spans(step, "dp", 1)] == [(13.0, 22.0), (22.0, 22.5)]
    assert [(s.start_s, s.end_s) for s in spans(step, "dp", 0)] == [(22.0, 22.5)]


# Parameters


@pytest.mark.parametrize("zero", [1, 2])
def test_zero_gathers_at_the_end_or_beside_the_first_forward(zero: int) -> None:
    plan, cost = ParallelPlan(dp=2, zero=zero), flat_cost(1, gather_s=0.5, optimizer_s=0.25, buckets=4)
    at_end = timeline(plan, 3, cost, dp_overlap=False)
    assert at_end.end_s == pytest.approx(3 * 3.0 + 0.25 + 0.5)
    (gather,) = spans(at_end, "dp")
    assert (gather.start_s, gather.end_s) == (9.25, 9.75)
    beside = timeline(plan, 3, cost, dp_overlap=True)
    assert beside.end_s == pytest.approx(0.5 / 4 + 3 * 3.0 + 0.25)
    assert busy(beside, "dp") == pytest.approx(0.5)
    slow = flat_cost(1, gather_s=2.0, buckets=4)  # twice as long as the forward it runs beside
    assert seconds(plan, 3, slow, dp_overlap=True) == pytest.approx(2.0 + 1.0 / 4 + 2.0 + 2 * 3.0)


def test_fsdp_gathers_in_the_way_of_every_forward_and_backward() -> None:
    plan, cost = ParallelPlan(dp=2, zero=3), flat_cost(1, gather_s=0.5, buckets=4)
    step = timeline(plan, 3, cost, fsdp_prefetch=0)
    assert step.end_s == pytest.approx(3 * (3.0 + 2 * 0.5))
    assert busy(step, "dp") == pytest.approx(3 * 2 * 0.5)


def test_fsdp_gathers_one_layer_ahead() -> None:
    plan = ParallelPlan(dp=2, zero=3)
    step = timeline(plan, 3, flat_cost(1, gather_s=0.5, buckets=4), fsdp_prefetch=1)
    assert step.end_s == pytest.approx(0.5 / 4 + 3 * 3.0)  # only the first layer waits
    assert busy(step, "dp") == pytest.approx(3 * 2 * 0.5)
    # One layer ahead and no more: the third gather waits for the first piece of compute.
    gathers, work = spans(step, "dp"), spans(step, "compute")
    assert [g.start_s for g in gathers[:3]] == [0.0, 0.125, work[0].end_s]
    slow = flat_cost(1, gather_s=4.0, buckets=4)  # longer than either pass: the network sets the pace
    assert seconds(plan, 3, slow, fsdp_prefetch=1) == pytest.approx(3 * 2 * 4.0 + 2.0 / 4)


def test_what_hidden_communication_costs_lies_between_nothing_and_all_of_it() -> None:
    """Share 0: a micro-batch's first gather and last reduction show. Share 1: all of them do."""
    plan = ParallelPlan(dp=2, zero=3)
    cost = flat_cost(1, gather_s=0.5, reduce_s=0.25, buckets=4)
    ends = []
    for share in (0.0, 0.5, 1.0):
        sync = replace(cost.syncs[0], gather_takes_s=share * 0.5, reduce_takes_s=share * 0.25)
        ends.append(seconds(plan, 3, replace(cost, syncs=(sync,))))
    shown_s, beside_s = (0.5 + 0.25) / 4, 2 * 0.5 + 0.25
    assert ends == pytest.approx([3 * (3.0 + shown_s + share * beside_s) for share in (0.0, 0.5, 1.0)])


def test_broadcast_parameters_follow_the_update() -> None:
    plan, cost = ParallelPlan(dp=2, zero=1), flat_cost(1, gather_s=0.5, optimizer_s=0.25, buckets=4)
    step = timeline(plan, 3, cost, dp_overlap=True, zero_broadcast_s=1e-3)
    (gather,) = spans(step, "dp")
    assert (gather.start_s, gather.end_s) == (9.25, 9.75)


# Host and optimizer


def test_pipelines_pay_their_host_for_every_action() -> None:
    cost = flat_cost(2)
    assert seconds(TWO, 4, cost, action_host_s=0.25) == pytest.approx(5 * (3.0 + 2 * 0.25))
    assert seconds(ParallelPlan(), 4, flat_cost(1), action_host_s=0.25) == pytest.approx(4 * 3.0)


def test_the_host_s_work_once_a_step_comes_last() -> None:
    step = timeline(TWO, 4, flat_cost(2, optimizer_s=0.5), step_overhead_s=0.25)
    assert step.end_s == pytest.approx(5 * 3.0 + 0.5 + 0.25)
    assert [(s.kind, s.start_s) for s in spans(step, "host", 1)] == [("host", 15.5)]


def test_no_rank_updates_before_all_gradients_are_there() -> None:
    # The norm of all gradients scales each; rank 1 is done with its backwards a b before rank 0.
    step = timeline(TWO, 4, flat_cost(2, optimizer_s=0.5))
    updates = [spans(step, "compute", rank)[-1] for rank in (0, 1)]
    assert [s.kind for s in updates] == ["optimizer", "optimizer"]
    assert [s.start_s for s in updates] == [15.0, 15.0]
    assert spans(step, "compute", 1)[-2].end_s == pytest.approx(13.0)


def test_a_rank_updates_all_its_chunks() -> None:
    plan = ParallelPlan(pp=2, vpp=2, schedule="interleaved")
    step = timeline(plan, 2, flat_cost(4, optimizer_s=0.5))
    assert spans(step, "compute", 0)[-1].duration_s == pytest.approx(2 * 0.5)


# Passes


def test_communication_of_a_pass_follows_its_compute() -> None:
    part = PassTime(1.0, tp_s=0.5, cp_s=0.25, ep_s=0.125)
    base = flat_cost(1)
    stage = replace(base.stages[0], time=PartTime(part, part, PassTime(1.0), PassTime()))
    step = timeline(ParallelPlan(), 2, replace(base, stages=(stage,)))
    assert step.end_s == pytest.approx(2 * (2 * 1.875 + 1.0))
    for stream, each in (("tp", 0.5), ("cp", 0.25), ("ep", 0.125)):
        assert [s.duration_s for s in spans(step, stream)] == pytest.approx([each] * 4)
    first = [spans(step, stream)[0].start_s for stream in ("compute", "tp", "cp", "ep")]
    assert first == [0.0, 1.0, 1.5, 1.75]


SPLIT = "0F0,0I0,0W0\n1F0,1I0,1W0\n"
WHOLE = "0F0,0B0\n1F0,1B0\n"


def test_a_split_backward_hands_on_its_input_gradient_first() -> None:
    # Qi et al. 2023 (zero bubble), arXiv 2401.10241: only the input's gradient is on the way back.
    cost = flat_cost(2, recompute_s=0.5)  # f = 1, recomputation 0.5, I = W = 1
    assert timeline(TWO, 1, cost, csv=WHOLE).end_s == pytest.approx(2 * 1.0 + 2 * (0.5 + 2.0))
    step = timeline(TWO, 1, cost, csv=SPLIT)
    assert step.end_s == pytest.approx(2 * 1.0 + 2 * (0.5 + 1.0) + 1.0)
    work = spans(step, "compute", 1)[:3]
    assert [s.kind for s in work] == ["forward", "input_grad", "weight_grad"]
    assert [s.duration_s for s in work] == [1.0, 1.5, 1.0]  # recomputed once, with the first gradient


def test_a_split_backward_frees_and_reduces_after_its_weight_gradient() -> None:
    plan = ParallelPlan(dp=2, pp=2)
    step = timeline(plan, 1, flat_cost(2, reduce_s=0.5, saved_bytes=8.0), csv=SPLIT, dp_overlap=True)
    held = [(sample.time_s, sample.num_bytes) for sample in step.memory if sample.rank == 1]
    assert held == [(0.0, 0.0), (1.0, 8.0), (4.0, 0.0)]  # F at 1, I to 3, W to 4
    assert [(s.start_s, s.end_s) for s in spans(step, "dp", 1)] == [(4.0, 4.5)]


def test_a_backward_in_pieces_frees_its_activations_with_the_last() -> None:
    cost = flat_cost(1, reduce_s=0.5, saved_bytes=8.0, buckets=4)
    step = timeline(ParallelPlan(dp=2), 1, cost, dp_overlap=True)
    assert [(s.time_s, s.num_bytes) for s in step.memory] == [(0.0, 0.0), (0.0, 8.0), (3.0, 0.0)]


def test_a_weight_gradient_stays_where_it_is() -> None:
    step = timeline(TWO, 1, flat_cost(2, send_s=0.5), csv=SPLIT)
    sent = [s.name for s in step.spans if s.kind == "pp" and s.stream.startswith("pp_send")]
    assert sorted(sent) == ["0F0", "1I0"]


def test_a_split_backward_gathers_its_parameters_once() -> None:
    plan = ParallelPlan(dp=2, pp=2, zero=3)
    step = timeline(plan, 1, flat_cost(2, gather_s=0.5), csv=SPLIT, fsdp_prefetch=0)
    assert busy(step, "dp", 1) == pytest.approx(2 * 0.5)


# Replicas


@pytest.mark.parametrize(("zero", "overlap"), [(0, False), (1, False), (1, True), (3, True)])
def test_what_joins_replicas(zero: int, overlap: bool) -> None:
    """Reductions, gathers and the update, which needs the norm of all gradients. A tied embedding is
    summed within each pipeline.
    """
    plan = ParallelPlan(dp=2, pp=2, zero=zero)
    cost = flat_cost(2, send_s=0.5, reduce_s=1.0, gather_s=zero and 1.0, tied_reduce_s=0.5)
    stack = plain_stack(dp_overlap=overlap)
    tasks = lower(make_schedule(plan, 2), cost, plan, stack).tasks
    joining = {task.name.split()[0] for task in tasks if task.joins_replicas}
    assert joining == {"gradients", "optimizer"} | ({"parameters"} if zero else set())
    assert {task.name for task in tasks if task.kind == "dp" and not task.joins_replicas} == {
        "tied embedding"
    }


# Two copies of the model (DualPipe)


def test_the_copies_of_a_stage_sum_their_gradients_before_any_update() -> None:
    plan = ParallelPlan(pp=2, vpp=2, schedule="dualpipe")
    copies = (Traffic(0.5), Traffic(0.25))
    cost = replace(flat_cost(4, optimizer_s=0.125), copies_reduce=copies)
    step = timeline(plan, 4, cost)
    # Both ranks run two micro-batches forward and backward in each direction, without a bubble.
    assert step.end_s == pytest.approx(4 * 3.0 + 0.5 + 0.25 + 2 * 0.125)
    for rank in (0, 1):
        reduced = [(s.name, s.start_s, s.end_s) for s in spans(step, "dp", rank)]
        assert reduced == [("copies 0", 12.0, 12.5), ("copies 1", 12.5, 12.75)]


# Overlapped pairs


def pair_s(part: PassTime, **stack: Any) -> float:
    """Seconds of a forward and a backward in a pair, on the first of two ranks; W takes 1 s."""
    base = flat_cost(2)
    stage = replace(base.stages[0], time=PartTime(part, part, PassTime(1.0), PassTime()))
    csv = "0F0,(0F1;0B0)OVERLAP_F_B,0B1\n1F0,1B0,1F1,1B1\n"
    step = timeline(TWO, 2, replace(base, stages=(stage, stage)), csv=csv, **stack)
    begin = next(s.start_s for s in spans(step, "compute") if s.name == "0F1")
    # The pair waits for both inputs, and hands on when both of its passes are over.
    assert begin == max(s.end_s for s in step.spans if s.rank == 1 and s.name == "1B0")
    return next(s.start_s for s in spans(step, "compute", 1) if s.name == "1F1") - begin


def test_a_pair_hides_its_exchanges_and_pays_for_that() -> None:
    part = PassTime(1.0, tp_s=0.25, cp_s=0.125, ep_s=0.5)
    # Compute 1 + 2, the ring of each pass, and a share of what is hidden twice.
    assert pair_s(part, overlap_cost=0.0) == pytest.approx(3.0 + 2 * 0.125)
    assert pair_s(part, overlap_cost=0.2) == pytest.approx(3.0 + 2 * (0.125 + 0.2 * 0.75))
    # A stack whose exchanges run beside another micro-batch anyway has no more to hide of them.
    assert pair_s(part, overlap_cost=0.0, ep_overlap="network") == pytest.approx(3.0 + 2 * (0.125 + 0.5))


def test_where_nothing_hides_a_pair_it_is_two_passes() -> None:
    part = PassTime(1.0, tp_s=0.25, ep_s=0.5)
    base = flat_cost(2)
    stage = replace(base.stages[0], time=PartTime(part, part, PassTime(1.0), PassTime()))
    cost = replace(base, stages=(stage, stage))
    pair = "0F0,(0F1;0B0)OVERLAP_F_B,0B1\n1F0,1B0,1F1,1B1\n"
    apart = "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"
    one = timeline(TWO, 2, cost, csv=pair, pair_overlap=False)
    assert one == timeline(TWO, 2, cost, csv=apart)
    assert one != timeline(TWO, 2, cost, csv=pair)


def test_a_pair_hides_no_more_than_the_other_pass_computes() -> None:
    # Of 3 s each, 2 s run beside the backward's compute and 1 s beside the forward's.
    assert pair_s(PassTime(1.0, ep_s=3.0), overlap_cost=0.0) == pytest.approx(
        3.0 + (3.0 - 2.0) + (3.0 - 1.0)
    )


def test_exchanges_of_a_pair_share_the_compute_beside_them() -> None:
    # Beside the backward's 2 s run 1.5 s of ep and 0.5 of tp, beside the forward's 1 s that much of ep.
    part = PassTime(1.0, tp_s=1.5, ep_s=1.5)
    assert pair_s(part, overlap_cost=0.0) == pytest.approx(3.0 + 1.0 + 2.0)


def test_a_pair_saves_nothing_while_its_host_launches() -> None:
    part = PassTime(1.0, ep_s=0.5, host_bound_s=0.375)
    assert pair_s(part, overlap_cost=0.0) == pytest.approx(3.0 + 2 * 0.375)


def test_the_parts_of_a_pair_reduce_and_gather_as_others_do() -> None:
    plan = ParallelPlan(dp=2, pp=2, zero=3)
    csv = "0F0,(0F1;0B0)OVERLAP_F_B,0B1\n1F0,1B0,1F1,1B1\n"
    step = timeline(plan, 2, flat_cost(2, gather_s=0.5, reduce_s=0.25, buckets=2), csv=csv)
    for rank in (0, 1):
        assert busy(step, "dp", rank) == pytest.approx(2 * 2 * 0.5 + 2 * 0.25)
