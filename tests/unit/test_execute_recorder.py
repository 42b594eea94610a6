"""Spans of one rank: nesting, waiting, and what the watcher is told."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from parsim.execute.launch.heartbeat import Heartbeats  # noqa: E402
from parsim.execute.training.recorder import Label, Recorder, Row  # noqa: E402
from parsim.schedule.action import parse_action  # noqa: E402
from parsim.timeline import COMPUTE, DP, TP  # noqa: E402

TP_LABEL = Label(TP, "0F1", TP, 0, 1)


@pytest.fixture
def heartbeats(tmp_path: Path) -> Heartbeats:
    return Heartbeats(tmp_path / "heartbeats", 3)


@pytest.fixture
def recorder(heartbeats: Heartbeats) -> Recorder:
    return Recorder(1, heartbeats, torch.device("cpu"))


def lengths(rows: list[Row], stream: str) -> int:
    return sum(row.end_ns - row.begin_ns for row in rows if row.label.stream == stream)


def test_communication_within_an_action_is_taken_out_of_it(recorder: Recorder) -> None:
    recorder.begin_step(0)
    begin = recorder.mark()
    with recorder.act(parse_action("0F1")), recorder.span(TP_LABEL, waits=True):
        pass
    end = recorder.mark()
    recorder.end_step()
    rows = recorder.rows()
    computing = [row for row in rows if row.label.stream == COMPUTE]
    (communicating,) = [row for row in rows if row.label.stream == TP]
    assert len(computing) == 2
    assert computing[0].end_ns == communicating.begin_ns
    assert computing[1].begin_ns == communicating.end_ns
    assert lengths(rows, COMPUTE) + lengths(rows, TP) <= end - begin
    assert {row.label for row in computing} == {Label(COMPUTE, "0F1", "forward", 0, 1)}


def test_spans_come_in_order_and_none_is_lost(recorder: Recorder) -> None:
    recorder.begin_step(0)
    for text in ("0F0", "0I0", "0W0"):
        with recorder.act(parse_action(text)):
            pass
    recorder.end_step()
    assert [row.label.kind for row in recorder.rows()] == ["forward", "input_grad", "weight_grad"]


def test_an_action_that_waited_first_begins_when_it_has_its_input(recorder: Recorder) -> None:
    recorder.begin_step(0)
    with recorder.act(parse_action("1F0")):
        with recorder.span(Label("pp_recv_prev", "0F0", "pp"), waits=True):
            pass
        recorder.begin_again()
    recorder.end_step()
    received, computed = recorder.rows()
    assert received.label.stream == "pp_recv_prev"
    assert computed.begin_ns >= received.end_ns


def test_nothing_is_kept_outside_a_step(recorder: Recorder) -> None:
    with recorder.act(parse_action("0F0")):
        pass
    recorder.begin_step(0)
    recorder.end_step()
    with recorder.act(parse_action("0F1")):
        pass
    assert recorder.rows() == []


def test_the_watcher_sees_what_runs_and_whether_it_waits(
    recorder: Recorder, heartbeats: Heartbeats
) -> None:
    assert heartbeats.read(1).pid == 0
    recorder.begin_step(4)
    with recorder.act(parse_action("2B7")):
        assert heartbeats.read(1).doing == "2B7"
        assert not heartbeats.read(1).waits
        assert recorder.action == parse_action("2B7")
        with recorder.span(Label(DP, "gradients 2", DP, 2), waits=True):
            beat = heartbeats.read(1)
            assert beat.waits
            assert beat.step == 4
            assert recorder.stage == 2
        assert heartbeats.read(1).doing == "2B7"
    assert heartbeats.read(0).pid == 0
    assert heartbeats.read(2).pid == 0


def test_what_failed_stays_in_the_heartbeat(recorder: Recorder, heartbeats: Heartbeats) -> None:
    recorder.begin_step(0)
    with pytest.raises(ZeroDivisionError), recorder.act(parse_action("3F2")):
        _ = 1 / 0
    assert heartbeats.read(1).doing == "3F2"


def test_long_words_do_not_reach_the_next_line(heartbeats: Heartbeats) -> None:
    heartbeats.write(1, 0, "next")
    heartbeats.write(0, 0, "é" * 500)
    assert heartbeats.read(1).doing == "next"
    assert heartbeats.read(0).doing.startswith("éé")
