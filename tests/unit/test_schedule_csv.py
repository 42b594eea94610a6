"""Lists of actions that somebody wrote: what is refused, with which words, and what is replayed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from parsim.cli.main import run_command
from parsim.cost.step import StepCost
from parsim.errors import ParsimError
from parsim.plan import ParallelPlan
from parsim.schedule import SYNCHRONOUS_SCHEDULES
from parsim.schedule.action import Action, Schedule
from parsim.schedule.check_actions import check_schedule
from parsim.schedule.csv_file import schedule_from_csv
from parsim.schedule.gpipe import gpipe
from parsim.schedule.lower import lower
from parsim.schedule.program import task_times, timeline_of
from parsim.timeline import Span, Timeline
from tests.builders import flat_cost, plain_stack


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


# Deadlocks


DEADLOCKS = {
    # Each rank waits for the other's later action.
    "0F0,0B1,0F1,0B0\n1F0,1F1,1B0,1B1\n": ["0B1 waits for 0F1 of rank 0, which stands behind 0B1"],
    "0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n": [
        "rank 0: 0B0 waits for 1B0 of rank 1, which stands behind 1F1",
        "rank 1: 1F1 waits for 0F1 of rank 0, which stands behind 0B0",
    ],
    # Three ranks in a ring; the fourth waits for them and is no part of it.
    "0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n2F0,2B0,2F1,2B1\n3F0,3B0,3F1,3B1\n": [
        "rank 0: 0B0 waits for 1B0 of rank 1, which stands behind 1F1",
        "rank 1: 1F1 waits for 0F1 of rank 0, which stands behind 0B0",
    ],
    # Split and overlapped, with the action that is waited for inside a pair.
    "0F0,0I0,0W0,0F1,0I1,0W1\n1F0,(1F1;1B0)OVERLAP_F_B,1I1,1W1\n": [
        "rank 0: 0I0 waits for 1B0 of rank 1",
        "rank 1: (1F1;1B0)OVERLAP_F_B waits for 0F1 of rank 0, which stands behind 0I0",
    ],
    # A weight gradient before the input gradient that it is split from.
    "0F0,0W0,0I0\n": ["rank 0: 0W0 waits for 0I0 of rank 0, which stands behind 0W0"],
    # A receive that stands before a send that it needs.
    "0F0,0RECV_B0,0SEND_F0,0B0\n1RECV_F0,1F0,1B0,1SEND_B0\n": [
        "rank 0: 0RECV_B0 waits for 1SEND_B0 of rank 1, which stands behind 1RECV_F0",
        "rank 1: 1RECV_F0 waits for 0SEND_F0 of rank 0, which stands behind 0RECV_B0",
    ],
}


@pytest.mark.parametrize("text", DEADLOCKS, ids=range(len(DEADLOCKS)))
def test_a_deadlock_is_told_by_its_cycle(text: str) -> None:
    with pytest.raises(ParsimError, match="wait for each other in a cycle") as caught:
        check_schedule(schedule_from_csv(text))
    assert caught.value.where == "; ".join(
        step if step.startswith("rank") else f"rank 0: {step}" for step in DEADLOCKS[text]
    )


SIMULATE = "simulate --model tiny-llama-8l --hardware a100-sxm-80gb --global-batch 2 --plan pp=2".split()


def test_the_command_line_tells_the_cycle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n")
    assert run_command([*SIMULATE, "--schedule-csv", str(path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "rank 1: 1F1 waits for 0F1 of rank 0, which stands behind 0B0" in said.err


def test_the_command_line_replays_written_transfers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = []
    for held in ("0F0,0SEND_F0,0F1,0SEND_F1", "0F0,0F1,0SEND_F0,0SEND_F1"):
        path = tmp_path / "comms.csv"
        path.write_text(
            f"0UNSHARD,{held},0RECV_B0,0RECV_B1,0B0,0B1,0REDUCE_GRAD,0RESHARD\n"
            "1UNSHARD,1RECV_F0,1RECV_F1,1F0,1B0,1SEND_B0,1F1,1B1,1SEND_B1,1REDUCE_GRAD,1RESHARD\n"
        )
        assert run_command([*SIMULATE, "--schedule-csv", str(path), "--json"]) == 0
        seconds.append(json.loads(capsys.readouterr().out)["step_time_s"])
    assert seconds[1] > seconds[0]


@pytest.mark.parametrize("schedule", SYNCHRONOUS_SCHEDULES)
def test_an_exported_schedule_is_read_back(
    schedule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vpp = ",vpp=2" if schedule.startswith("interleaved") else ""
    job = f"--model tiny-llama-8l --hardware a100-sxm-80gb --plan pp=2,schedule={schedule}{vpp} --json"
    path = tmp_path / "exported.csv"
    export = f"export pp=2,schedule={schedule}{vpp} --to schedule-csv --model tiny-llama-8l"
    assert run_command([*export.split(), "--hardware", "a100-sxm-80gb", "-o", str(path)]) == 0
    assert ("cannot run this" in capsys.readouterr().err) == (schedule == "dualpipe")
    assert run_command(["simulate", *job.split(), "--schedule-csv", str(path)]) == 0
    read = json.loads(capsys.readouterr().out)
    assert run_command(["simulate", *job.split()]) == 0
    assert json.loads(capsys.readouterr().out)["step_time_s"] == read["step_time_s"]


# Explicit transfers


FORTH = "0F0,0SEND_F0,0RECV_B0,0B0\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (FORTH + "1F0,1B0,1SEND_B0\n", "no receive where the sends ask for 1RECV_F0"),
        ("0F0,0RECV_B0,0B0\n1RECV_F0,1F0,1B0,1SEND_B0\n", "1RECV_F0 where the sends ask for no receive"),
        (FORTH + "1RECV_F0,1F0,1B0\n", "sends and receives of two ranks do not match"),
        (FORTH + "1RECV_F0,1RECV_F0,1F0,1B0,1SEND_B0\n", "stands twice"),
        (FORTH + "1F0,1RECV_F0,1B0,1SEND_B0\n", "wait for each other in a cycle"),
        (
            "0F0,0SEND_B0,0SEND_F0,0RECV_B0,0B0\n1RECV_F0,1F0,1B0,1SEND_B0\n",
            "between neighbouring stages",
        ),
        (
            "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1\n"
            "1RECV_F1,1RECV_F0,1F0,1B0,1SEND_B0,1F1,1B1,1SEND_B1\n",
            "transfer 1 from rank 0 to rank 1",
        ),
    ],
)
def test_transfers_that_do_not_match_are_refused(text: str, said: str) -> None:
    with pytest.raises(ParsimError) as caught:
        check_schedule(schedule_from_csv(text))
    assert said in str(caught.value)


def replayed(text: str, cost: StepCost, **stack: object) -> Timeline:
    schedule = schedule_from_csv(text)
    check_schedule(schedule)
    program = lower(schedule, cost, ParallelPlan(pp=schedule.pp), plain_stack(**stack))
    return timeline_of(program, task_times(program))


def at(step: Timeline, name: str, kind: str = "") -> list[tuple[float, float]]:
    found: list[Span] = [s for s in step.spans if s.name == name and kind in ("", s.kind)]
    return sorted({(s.start_s, s.end_s) for s in found if s.duration_s})


def test_a_transfer_starts_when_both_ends_have_come_to_it() -> None:
    cost = flat_cost(2, send_s=0.5)
    early = replayed(
        "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0RECV_B1,0B0,0B1\n"
        "1RECV_F0,1RECV_F1,1F0,1B0,1SEND_B0,1F1,1B1,1SEND_B1\n", cost,
    )  # fmt: skip
    assert at(early, "0F1", "pp") == [(2.0, 2.5)]
    # Received only after the first micro-batch's backward, which ends at 1.5 + 1 + 2.
    late = replayed(
        "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0RECV_B1,0B0,0B1\n"
        "1RECV_F0,1F0,1B0,1SEND_B0,1RECV_F1,1F1,1B1,1SEND_B1\n", cost,
    )  # fmt: skip
    assert at(late, "0F1", "pp") == [(4.5, 5.0)]
    # Sent only after the other micro-batch's forward.
    held = replayed(
        "0F0,0F1,0SEND_F0,0SEND_F1,0RECV_B0,0RECV_B1,0B0,0B1\n"
        "1RECV_F0,1RECV_F1,1F0,1B0,1SEND_B0,1F1,1B1,1SEND_B1\n", cost,
    )  # fmt: skip
    assert at(held, "0F0", "pp") == [(2.0, 2.5)]
    assert at(held, "0F1", "pp") == [(2.5, 3.0)]


def test_where_sends_are_in_the_way_the_receiver_waits_for_them() -> None:
    text = (
        "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1\n"
        "1RECV_F0,1F0,1RECV_F1,1B0,1SEND_B0,1F1,1B1,1SEND_B1\n"
    )
    cost = flat_cost(2, send_s=4.0)
    beside, waited = (at(replayed(text, cost, pp_overlap=o), "1B0", "backward") for o in (True, False))
    assert beside == [(6.0, 8.0)]  # 1F0 ends at 6
    assert waited == [(10.0, 12.0)]  # and the second transfer, which starts then, at 10


# What happens to a stage as a whole


def sharded(text: str, zero: int, **cost: float) -> Timeline:
    schedule = schedule_from_csv(text)
    check_schedule(schedule)
    plan = ParallelPlan(dp=2, pp=schedule.pp, zero=zero)
    program = lower(schedule, flat_cost(schedule.pp, buckets=4, **cost), plan, plain_stack())
    return timeline_of(program, task_times(program))


def test_parameters_are_gathered_where_it_is_written_and_kept_until_they_are_let_go() -> None:
    held = sharded("0UNSHARD,0F0,0F1,0B0,0B1,0RESHARD\n", 3, gather_s=0.5)
    assert at(held, "parameters 0") == [(0.0, 0.5)]
    assert at(held, "0B1") == [(4.5, 6.5)]
    again = sharded("0UNSHARD,0F0,0F1,0RESHARD,0UNSHARD,0B0,0B1,0RESHARD\n", 3, gather_s=0.5)
    assert at(again, "parameters 0") == [(0.0, 0.5), (2.5, 3.0)]
    assert at(again, "0B1") == [(5.0, 7.0)]
    # Without ZeRO-3 nothing is to be gathered; and what nobody gathers is gathered for each pass.
    assert at(sharded("0UNSHARD,0F0,0B0,0RESHARD\n", 0, gather_s=0.5), "parameters 0") == []
    assert len(at(sharded("0F0,0B0\n", 3, gather_s=0.5), "parameters 0")) == 2 * 4


@pytest.mark.parametrize("zero", [0, 2])
def test_gradients_are_reduced_where_it_is_written(zero: int) -> None:
    step = sharded("0F0,0B0,0F1,0B1,0REDUCE_GRAD\n", zero, reduce_s=0.5)
    assert at(step, "gradients 0") == [(6.0, 6.5)]
    with pytest.raises(ParsimError, match="before all of them are there"):
        check_schedule(schedule_from_csv("0F0,0B0,0REDUCE_GRAD,0F1,0B1\n"))
    assert len(at(sharded("0F0,0B0,0F1,0B1\n", 2, reduce_s=0.5), "gradients 0")) == 2 * 4


def test_an_overlapped_pair_starts_and_hands_on_as_one() -> None:
    step = replayed("0F0,0F1,0B0,0B1\n1F0,(1F1;1B0)OVERLAP_F_B,1B1\n", flat_cost(2))
    # 1B0 could start at 2, but its partner's input is there at 2 as well; 0B0 waits for both.
    assert at(step, "1F1") == [(2.0, 3.0)]
    assert at(step, "1B0") == [(3.0, 5.0)]
    assert at(step, "0B0") == [(5.0, 7.0)]
