"""Schedules against torch.distributed.pipelining: its lists, its validator, its lowering, its CSV."""

from __future__ import annotations

import csv
import io
from types import SimpleNamespace
from typing import Any

import pytest

from parsim.plan import ParallelPlan
from parsim.schedule import make_schedule
from parsim.schedule.action import Schedule, parse_action
from parsim.schedule.check_actions import check_schedule
from parsim.schedule.csv_file import schedule_from_csv, schedule_to_csv
from parsim.schedule.lower import lower
from parsim.schedule.program import step_time_s
from tests.builders import flat_cost, plain_stack
from tests.unit.test_schedules import SIZES

pytest.importorskip("torch.distributed.pipelining.schedules", exc_type=ImportError)

from torch.distributed.pipelining import schedules

from parsim.execute.training.pipeline_adapter import receives_first

RUN_BY_TORCH = [case for case in SIZES if case[0].chains == 1]
CLASSES = {
    "interleaved": schedules.ScheduleInterleaved1F1B,
    "interleaved-zb": schedules.ScheduleInterleavedZeroBubble,
    "looped-bfs": schedules.ScheduleLoopedBFS,
    "zbv": schedules.ScheduleZBVZeroBubble,
    "dualpipev": schedules.ScheduleDualPipeV,
}


def named(case: tuple[ParallelPlan, int]) -> str:
    return f"{case[0].short()} m={case[1]}"


def torch_actions(schedule: Schedule) -> dict[int, list[Any]]:
    return {
        rank: [schedules._Action.from_str(str(action)) for action in row]
        for rank, row in enumerate(schedule.ranks)
    }


def lowered(plan: ParallelPlan, schedule: Schedule) -> dict[int, list[Any]]:
    """As _PipelineScheduleRuntime prepares it: parameters, gradients and transfers as actions."""
    rows = torch_actions(schedule)
    rows = {rank: schedules._add_unshard_reshard(row) for rank, row in rows.items()}
    rows = {r: schedules._add_reduce_grad(row, schedule.num_micro_batches) for r, row in rows.items()}
    return schedules._add_send_recv(rows, plan.stage_rank, plan.num_stages)  # type: ignore[no-any-return]


def test_torch_accepts_every_schedule() -> None:
    """What _prepare_schedule_with_comms checks, then torch's own dry run of the result."""
    for plan, m in RUN_BY_TORCH[::2]:
        schedule = make_schedule(plan, m)
        homes = schedules._validate_schedule(torch_actions(schedule), plan.pp, plan.num_stages, m)
        assert homes == {s: plan.stage_rank(s) for s in range(plan.num_stages)}
        rows = schedules._add_send_recv(torch_actions(schedule), plan.stage_rank, plan.num_stages)
        # Its dry run knows no overlapped pairs, which its runtime runs part by part.
        apart = {r: [part for a in row for part in a.sub_actions or (a,)] for r, row in rows.items()}
        schedules._simulate_comms_compute(apart, plan.stage_rank, plan.num_stages)


def test_early_receives_meet_their_sends() -> None:
    """Between two ranks gloo matches messages in order, so receives keep that of the peer's sends."""
    for plan, m in RUN_BY_TORCH:
        schedule = make_schedule(plan, m)
        before = schedules._add_send_recv(torch_actions(schedule), plan.stage_rank, plan.num_stages)
        after = {rank: receives_first(row) for rank, row in before.items()}
        for rank, row in after.items():
            assert sorted(map(str, row)) == sorted(map(str, before[rank]))
            posted = [str(action).find("RECV") > 0 for action in row]
            assert posted == sorted(posted, reverse=True)
            for peer in after.keys() - {rank}:
                forth = {"F": 1, "B": -1}
                sent = [
                    (a.stage_index + forth[a.computation_type.name[-1]], a.microbatch_index)
                    for a in after[peer]
                    if "SEND" in str(a)
                ]
                received = [
                    (a.stage_index, a.microbatch_index)
                    for a in row
                    if "RECV" in str(a)
                    and plan.stage_rank(a.stage_index - forth[a.computation_type.name[-1]]) == peer
                ]
                assert [one for one in sent if plan.stage_rank(one[0]) == rank] == received


@pytest.mark.parametrize("name", CLASSES)
def test_torch_s_own_schedules_have_the_same_actions(name: str) -> None:
    for plan, m in (case for case in RUN_BY_TORCH if case[0].schedule == name):
        rounds = max(1, m // plan.pp)
        made = SimpleNamespace(
            pp_group_size=plan.pp, _n_microbatches=m, num_stages=plan.num_stages,
            n_local_stages=plan.vpp, _stages=[None] * plan.vpp, number_of_rounds=rounds,
            microbatches_per_round=m // rounds,
        )  # fmt: skip
        theirs = [CLASSES[name]._calculate_single_rank_operations(made, r) for r in range(plan.pp)]
        ours = [[str(action) for action in row] for row in make_schedule(plan, m).ranks]
        assert ours == [[str(a) for a in row if a is not None] for row in theirs], named((plan, m))


@pytest.mark.parametrize("case", RUN_BY_TORCH[::11], ids=named)
def test_torch_s_lowered_csv_is_read_and_replayed(case: tuple[ParallelPlan, int]) -> None:
    """compute_comms, as _dump_csv writes it: transfers at their own places take as long or longer."""
    plan, m = case
    schedule = make_schedule(plan, m)
    out = io.StringIO()
    csv.writer(out).writerows(lowered(plan, schedule).values())
    read = schedule_from_csv(out.getvalue(), name=schedule.name)
    check_schedule(read)
    assert list(read.actions()) == list(schedule.actions())
    assert (read.is_explicit(), schedule.is_explicit()) == (plan.pp > 1, False)

    def seconds(some: Schedule, send_s: float) -> float:
        cost = flat_cost(plan.num_stages, send_s=send_s)
        return step_time_s(lower(some, cost, plan, plain_stack()))

    assert seconds(read, 0.0) >= seconds(schedule, 0.0) - 1e-9
    assert seconds(read, 0.125) >= seconds(schedule, 0.125) - 1e-9


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1"])
def test_torch_s_lowering_costs_nothing_where_receives_come_early(schedule: str) -> None:
    plan = ParallelPlan(pp=4, schedule=schedule)
    own = make_schedule(plan, 8)
    out = io.StringIO()
    csv.writer(out).writerows(lowered(plan, own).values())
    read = schedule_from_csv(out.getvalue())
    one, other = (
        step_time_s(lower(s, flat_cost(4, send_s=0.0), plan, plain_stack())) for s in (own, read)
    )
    assert one == pytest.approx(other)


@pytest.mark.parametrize(
    "text",
    ["2F0", "10B12", "0I3", "0W3", "1SEND_F2", "2RECV_F2", "1SEND_B0", "0RECV_B0", "1UNSHARD",
     "1RESHARD", "0REDUCE_GRAD", "(0F1;3B0)OVERLAP_F_B", "(3B0;0F1)OVERLAP_F_B"],
)  # fmt: skip
def test_every_action_reads_and_writes_as_torch_does(text: str) -> None:
    assert str(parse_action(text)) == str(schedules._Action.from_str(text)) == text


@pytest.mark.parametrize(
    "text", ["2X0", "F0", "2F", "UNSHARD", "(0F1)OVERLAP_F_B", "(0F1;1F0)OVERLAP_F_B"]
)
def test_what_torch_could_not_run_is_no_action(text: str) -> None:
    with pytest.raises(ValueError, match="cannot read this pipeline action"):
        parse_action(text)


@pytest.mark.parametrize("case", SIZES[::7], ids=named)
def test_csv_round_trip(case: tuple[ParallelPlan, int]) -> None:
    plan, m = case
    schedule = make_schedule(plan, m)
    text = schedule_to_csv(schedule)
    assert schedule_from_csv(text, name=schedule.name, chains=plan.chains) == schedule
