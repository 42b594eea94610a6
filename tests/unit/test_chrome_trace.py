from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from parsim.errors import ParsimError
from parsim.export.chrome_trace import chrome_trace, group_names, write_chrome_trace
from parsim.timeline import Span, Timeline, transfers

LayOut = Callable[..., Timeline]


def events(timelines: list[Timeline], phase: str) -> list[dict[str, Any]]:
    return [e for e in chrome_trace(timelines)["traceEvents"] if e["ph"] == phase]


def names(timelines: list[Timeline], kind: str) -> dict[tuple[int, int], str]:
    return {(e["pid"], e["tid"]): e["args"]["name"] for e in events(timelines, "M") if e["name"] == kind}


def test_a_slice_for_every_span_with_its_times_and_what_it_is(lay_out: LayOut) -> None:
    timeline = lay_out("1F1B", 4, 8, transfer_s=0.001, tp_s=0.002, dp_s=0.01, optimizer_s=0.005)
    slices = events([timeline], "X")
    assert len(slices) == len(timeline.spans)
    assert sum(e["dur"] for e in slices) == pytest.approx(
        1e6 * sum(s.duration_s for s in timeline.spans), abs=1e-3 * len(slices)
    )
    first_backward = next(e for e in slices if e["cat"] == "backward" and e["name"] == "3B0")
    assert first_backward["ts"] == pytest.approx(1e6 * (4 * 0.01 + 3 * 0.001))
    assert first_backward["args"] == {"kind": "backward", "stage": 3, "micro_batch": 0}
    optimizer = next(e for e in slices if e["cat"] == "optimizer")
    assert optimizer["args"] == {"kind": "optimizer"}, "no stage and no micro-batch is no argument"


def test_processes_are_ranks_of_named_timelines_and_threads_are_streams(lay_out: LayOut) -> None:
    both = [
        lay_out("1F1B", 2, 2, transfer_s=0.001, tp_s=0.001),
        lay_out("1F1B", 2, 2, source="measured"),
    ]
    processes = names(both, "process_name")
    assert list(processes.values()) == [
        "simulated rank 0",
        "simulated rank 1",
        "measured rank 0",
        "measured rank 1",
    ]
    assert all(pid > 0 for pid, _ in processes), "process 0 is the idle task to Perfetto"
    threads = names(both, "thread_name")
    assert len({tid for _, tid in threads}) == len(threads)
    of_rank_0 = [name for (pid, _), name in threads.items() if pid == 1]
    assert of_rank_0 == ["compute", "tp", "pp_send_next", "pp_recv_next"]


def test_timelines_of_one_source_are_told_apart_by_title_then_by_number() -> None:
    def named(source: str, title: str) -> Timeline:
        return Timeline(spans=(), source=source, title=title)

    assert group_names([named("simulated", "a"), named("measured", "a")]) == ["simulated", "measured"]
    assert group_names([named("measured", "a"), named("measured", "b")]) == ["measured a", "measured b"]
    assert group_names([named("measured", "a")] * 2) == ["measured a (1)", "measured a (2)"]


def test_slices_of_one_thread_never_overlap(lay_out: LayOut) -> None:
    # Thirds of a second are no whole numbers of nanoseconds; touching spans must still touch.
    awkward = lay_out("Interleaved 1F1B", 4, 8, forward_s=1 / 3, transfer_s=1 / 7, tp_s=1 / 9)
    by_thread = defaultdict(list)
    for e in events([awkward], "X"):
        by_thread[e["tid"]].append((round(1000 * e["ts"]), round(1000 * (e["ts"] + e["dur"]))))
    assert len(by_thread) > 8
    for slices in by_thread.values():
        slices.sort()
        assert all(end <= start for (_, end), (start, _) in pairwise(slices))


def test_spans_that_do_overlap_on_a_stream_get_a_second_thread() -> None:
    spans = (
        Span(0, "dp", "a", 0.0, 2.0, "dp"),
        Span(0, "dp", "b", 1.0, 3.0, "dp"),
        Span(0, "dp", "c", 2.0, 4.0, "dp"),
    )
    timeline = Timeline(spans=spans)
    threads = {tid: name for (_, tid), name in names([timeline], "thread_name").items()}
    assert {e["name"]: threads[e["tid"]] for e in events([timeline], "X")} == {
        "a": "dp",
        "b": "dp (2)",
        "c": "dp",
    }


def test_an_arrow_for_every_pipeline_transfer_from_send_to_receive(lay_out: LayOut) -> None:
    p, m = 4, 8
    timeline = lay_out("1F1B", p, m, transfer_s=0.001)
    starts, ends = events([timeline], "s"), events([timeline], "f")
    assert len(starts) == len(ends) == 2 * (p - 1) * m
    slices = events([timeline], "X")
    for start, end in zip(starts, ends, strict=True):
        assert start["id"] == end["id"]
        (send,) = [e for e in slices if e["tid"] == start["tid"] and e["ts"] == start["ts"]]
        assert send["name"] == start["name"]
        (receive,) = [
            e for e in slices if e["tid"] == end["tid"] and e["ts"] <= end["ts"] < e["ts"] + e["dur"]
        ]
        assert receive["name"] == send["name"]
        forward = send["name"].startswith(f"{send['args']['stage']}F")
        assert end["pid"] - start["pid"] == (1 if forward else -1)
    assert len({start["id"] for start in starts}) == len(starts)


def test_arrows_of_replicas_join_ranks_at_the_same_place_in_their_stage() -> None:
    """Two stages of two data-parallel ranks: 0 and 1 send, 2 and 3 receive."""
    spans = [Span(r, "pp_send_next", "0F0", 0.0, 1.0, "pp", 0, 0) for r in (1, 0)]
    spans += [Span(r, "pp_recv_prev", "0F0", 0.0, 1.0, "pp", 0, 0) for r in (3, 2)]
    assert [(a.rank, b.rank) for a, b in transfers(spans)] == [(0, 2), (1, 3)]


def test_an_end_without_its_other_end_gets_no_arrow() -> None:
    assert transfers([Span(0, "pp_send_next", "0F0", 0.0, 1.0, "pp", 0, 0)]) == []


def test_a_measured_send_that_shows_twice_is_one_transfer() -> None:
    """The executor's sends are a call and, at the end, a wait for it."""
    spans = [
        Span(0, "pp_send_next", "0F0", 1.0, 1.1, "pp", 0, 0),
        Span(0, "pp_send_next", "0F0", 5.0, 5.1, "pp", 0, 0),
        Span(1, "pp_recv_prev", "0F0", 0.0, 1.5, "pp", 0, 0),
    ]
    assert transfers(spans) == [(spans[0], spans[2])]


def test_memory_is_a_counter_in_bytes(lay_out: LayOut) -> None:
    timeline = lay_out("GPipe", 2, 4)
    counters = events([timeline], "C")
    assert len(counters) == len(timeline.memory)
    assert max(e["args"]["bytes"] for e in counters) == (10 + 4 * 1.5) * 2**30


def test_the_file_is_json_with_the_same_bytes_every_time(lay_out: LayOut, tmp_path: Path) -> None:
    both = [lay_out("1F1B", 4, 8, transfer_s=0.001), lay_out("GPipe", 4, 8, source="measured")]
    for name in ("a.json", "b.json"):
        write_chrome_trace(tmp_path / name, both)
    text = (tmp_path / "a.json").read_bytes()
    assert text == (tmp_path / "b.json").read_bytes()
    assert json.loads(text) == chrome_trace(both)


def test_nothing_to_write_is_refused() -> None:
    with pytest.raises(ParsimError, match="holds no spans"):
        chrome_trace([Timeline(spans=(), title="empty")])
    with pytest.raises(ParsimError, match="no timeline"):
        chrome_trace([])


def test_a_receive_that_shows_twice_ends_with_its_last_part() -> None:
    spans = [
        Span(0, "pp_send_next", "0F0", 1.0, 1.1, "pp", 0, 0),
        Span(1, "pp_recv_prev", "0F0", 0.0, 0.2, "pp", 0, 0),
        Span(1, "pp_recv_prev", "0F0", 1.0, 1.5, "pp", 0, 0),
    ]
    assert transfers(spans) == [(spans[0], spans[2])]
