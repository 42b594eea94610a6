"""What is true of every answer, whatever was asked: conservation, order, and figures that make sense."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest

from parsim.export.chrome_trace import chrome_trace
from parsim.timeline import STREAMS, Span, Timeline, rank_breakdowns_s

SLACK = 1e-9
"""Relative: sums of many times in another order."""
SIGNED = frozenset({"change", "stage", "micro_batch"})
"""Keys whose figures may be below zero: changes, and what a span has no number of."""


def figures(data: Any, at: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a JSON document, with the place where it stands."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from figures(value, f"{at}.{key}")
    elif isinstance(data, list | tuple):
        for index, value in enumerate(data):
            yield from figures(value, f"{at}[{index}]")
    elif isinstance(data, int | float) and not isinstance(data, bool):
        yield at, data


def check_figures(data: Any) -> None:
    """No negative, NaN or infinite figure anywhere."""
    for at, number in figures(data):
        assert math.isfinite(number), f"{at} is {number}"
        if at.rpartition(".")[2].partition("[")[0] not in SIGNED:
            assert number >= 0, f"{at} is {number}"


def check_item(item: Mapping[str, Any]) -> None:
    """An ITEM of the JSON contract: its parts add up, and its figures agree with each other."""
    check_figures(item)
    step_s, plan, job, memory = (item[key] for key in ("step_time_s", "plan", "job", "memory_bytes"))
    assert step_s > 0
    assert math.fsum(item["breakdown_s"].values()) == pytest.approx(step_s, rel=SLACK)
    assert item["bubble_fraction"] == pytest.approx(item["breakdown_s"]["bubble"] / step_s)
    low_s, high_s = item["interval_s"]
    assert 0 < low_s <= step_s <= high_s
    parts = math.fsum(value for key, value in memory.items() if key not in ("peak", "context"))
    assert parts == pytest.approx(memory["peak"], rel=SLACK)
    gpus = plan["dp"] * plan["tp"] * plan["pp"] * plan["cp"]
    assert item["gpus"] == gpus
    tokens = job["seq_len"] * job["global_batch"]
    assert item["tokens_per_s_per_gpu"] * step_s * gpus == pytest.approx(tokens)
    assert 0 < item["mfu_causal"] <= item["mfu"]
    # A window leaves out attention that the count of model FLOPs has, and a table that is looked up in
    # takes no FLOPs although it has parameters.
    model, peak = item["model"], item["model_tflops_per_gpu"] * 1e12 / item["mfu"]
    rows = 0 if model["tied_embeddings"] else model["vocab"]
    rows += (model["position_rows"] or model["max_seq_len"]) * (model["position"] == "learned")
    looked_up = 6 * rows * model["hidden"] * tokens / (step_s * gpus * peak)
    assert item["mfu_causal"] - looked_up < 1 or model["window"]
    assert item["num_micro_batches"] * plan["dp"] * plan["micro_batch"] == job["global_batch"]
    assert sum(item["stage_layers"]) == item["model"]["layers"]


def check_timeline(timeline: Timeline) -> None:
    """No two spans overlap on a stream of a rank, and all of every rank's time is accounted for."""
    end_s = timeline.end_s
    assert end_s > 0
    for span in timeline.spans:
        assert span.stream in STREAMS
        assert 0 <= span.start_s <= span.end_s <= end_s
    for rank, stream, spans in timeline.lanes():
        for one, other in pairwise(spans):
            assert other.start_s >= one.end_s, (rank, stream, one, other)
    for parts in rank_breakdowns_s(timeline).values():
        assert all(seconds >= 0 for seconds in parts.values()), parts
        assert math.fsum(parts.values()) == pytest.approx(end_s, rel=SLACK)
    for sample in timeline.memory:
        assert 0 <= sample.time_s <= end_s
        assert sample.num_bytes >= 0


def check_trace(timelines: Sequence[Timeline]) -> None:
    """A Chrome trace has every span once, none that overlap on a thread, and both ends of arrows."""
    events = chrome_trace(timelines)["traceEvents"]
    threads: dict[tuple[int, int], float] = {}
    slices = [event for event in events if event["ph"] == "X"]
    assert len(slices) == sum(len(timeline.spans) for timeline in timelines)
    for event in sorted(slices, key=lambda e: (e["ts"], e["dur"])):
        assert event["dur"] >= 0
        thread = event["pid"], event["tid"]
        # To a tenth of the nanoseconds that times are rounded to.
        assert event["ts"] >= threads.get(thread, 0.0) - 1e-4, event
        threads[thread] = event["ts"] + event["dur"]
    begins, ends = ({e["id"]: e for e in events if e["ph"] == phase} for phase in "sf")
    assert begins.keys() == ends.keys()
    assert all(ends[flow]["ts"] >= begin["ts"] for flow, begin in begins.items())
    assert sum(e["ph"] == "C" for e in events) == sum(len(t.memory) for t in timelines)


def as_shown(spans: Sequence[Span]) -> list[tuple[str, str, float, float]]:
    """Spans of one rank without its number, to be compared with those of another."""
    return sorted((span.stream, span.name, span.start_s, span.end_s) for span in spans)
