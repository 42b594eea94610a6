from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parsim.config import MAX_FILE_BYTES, dump_json, read_json, write_file
from parsim.errors import ParsimError
from parsim.export.timeline_json import timeline_from_data, timeline_to_data
from parsim.timeline import STREAMS, MemorySample, Span, Timeline

numbers = st.floats(0, 1e6, allow_nan=False)
counts = st.integers(0, 10**6)
spans = st.builds(
    lambda rank, stream, name, times, kind, stage, i: Span(
        rank, stream, name, min(times), max(times), kind, stage, i
    ),
    counts,
    st.sampled_from(STREAMS),
    st.text(max_size=8),
    st.tuples(numbers, numbers),
    st.sampled_from(("forward", "backward", "tp", "pp")),
    st.integers(-1, 100),
    st.integers(-1, 100),
)
timelines = st.builds(
    Timeline,
    spans=st.lists(spans, max_size=12).map(tuple),
    memory=st.lists(st.builds(MemorySample, counts, numbers, numbers), max_size=6).map(tuple),
    source=st.sampled_from(("simulated", "measured")),
    title=st.text(max_size=20),
)


@given(timelines)
def test_a_timeline_comes_back_as_it_was(timeline: Timeline) -> None:
    text = json.dumps(timeline_to_data(timeline))
    assert timeline_from_data(json.loads(text), where="f.json") == timeline


def test_a_measurement_of_a_long_step_comes_back(tmp_path: Path) -> None:
    """Eight ranks of 52,000 spans each: gradient accumulation of an 8B model."""
    spans = tuple(
        Span(
            i // 52_000,
            "compute",
            f"gemm {i % 300}",
            i * 1.1e-5,
            i * 1.1e-5 + 1e-5,
            "forward",
            0,
            i % 16,
        )
        for i in range(416_000)
    )
    timeline = Timeline(spans=spans, memory=(), source="measured", title="step")
    text = dump_json({"timeline": timeline_to_data(timeline)})
    assert len(text) < 25e6
    assert text.count("\n") < 1000
    # As earlier versions wrote it, a number a line: more than a table may have.
    path = tmp_path / "meas.json"
    write_file(path, text.replace(", ", ",\n" + " " * 8))
    assert path.stat().st_size > MAX_FILE_BYTES
    assert read_json(path)["timeline"] == timeline_to_data(timeline)


def test_columns_take_less_than_a_table_a_span(lay_out: Callable[..., Timeline]) -> None:
    timeline = lay_out("1F1B", 8, 64, transfer_s=0.001, tp_s=0.001)
    plain = json.dumps([span._asdict() for span in timeline.spans])
    assert len(json.dumps(timeline_to_data(timeline)["spans"])) < 0.45 * len(plain)


def put(data: Any, path: str, value: object) -> None:
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    for key in parents:
        data = data[key]
    data[last] = value


@pytest.mark.parametrize(
    ("path", "value", "place"),
    [
        ("source", "guessed", "f.json.source"),
        ("title", None, "f.json.title"),
        ("extra", 1, "f.json.extra"),
        ("spans", [], "f.json: spans"),
        ("spans.rank", 3, "f.json: spans.rank"),
        ("spans.rank.0", -1, "f.json: spans.rank[0]"),
        ("spans.rank.0", True, "f.json: spans.rank[0]"),
        ("spans.stage.1", 1.5, "f.json: spans.stage[1]"),
        ("spans.start_s.0", "0", "f.json: spans.start_s[0]"),
        ("spans.start_s.0", float("inf"), "f.json: spans.start_s[0]"),
        ("spans.end_s.1", -1.0, "f.json: spans.end_s[1]"),
        ("spans.end_s", [1.0], "f.json: spans"),
        ("spans.stream.values.0", "gpu", "f.json: spans.stream.values[0]"),
        ("spans.name.index.1", 99, "f.json: spans.name.index[1]"),
        ("spans.kind", ["forward"], "f.json: spans.kind"),
        ("memory.num_bytes.0", None, "f.json: memory.num_bytes[0]"),
    ],
)
def test_what_cannot_be_a_timeline_is_refused_with_its_place(
    lay_out: Callable[..., Timeline], path: str, value: object, place: str
) -> None:
    data = copy.deepcopy(timeline_to_data(lay_out("GPipe", 2, 2)))
    put(data, path, value)
    with pytest.raises(ParsimError) as caught:
        timeline_from_data(data, where="f.json")
    assert caught.value.where == place


def test_a_missing_and_a_misspelt_column_are_named(lay_out: Callable[..., Timeline]) -> None:
    data = timeline_to_data(lay_out("GPipe", 2, 2))
    data["spans"]["microbatch"] = data["spans"].pop("micro_batch")
    with pytest.raises(ParsimError) as caught:
        timeline_from_data(data, where="f.json")
    assert caught.value.hint == "did you mean 'micro_batch'?"
    del data["spans"]["microbatch"]
    with pytest.raises(ParsimError, match="missing") as caught:
        timeline_from_data(data, where="f.json")
    assert caught.value.where == "f.json: spans.micro_batch"
