"""Wrong files that parsim once crashed, hung or swelled on, each by name."""

from __future__ import annotations

import gzip
import json
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from parsim.capacity_cases import read_prices
from parsim.cli.simulated_step import read_schedule
from parsim.cli.sweep_inputs import read_grids
from parsim.compare.kernel_rows import UnreadableRow, read_kernel_rows
from parsim.compare.runs import read_runs
from parsim.compare.steps import compare_documents
from parsim.config import (
    MAX_FILE_BYTES,
    MAX_JSON_BYTES,
    MAX_JSON_VALUES,
    load_cluster,
    load_model,
    load_stack,
    parse_json,
    read_json,
    read_toml,
)
from parsim.errors import ParsimError
from parsim.execute.launch.checkpoint_folder import newest
from parsim.execute.token_file import open_tokens
from parsim.importers.nvidia_smi import parse_topology
from parsim.model import ModelSpec
from parsim.plan import Job, ParallelPlan, parse_plan
from parsim.plan_file import read_plan
from parsim.traces import chrome_file
from parsim.traces.traced_run import read_traces

MODEL = ModelSpec(
    name="m", layers=2, hidden=8, heads=2, kv_heads=2, ffn_hidden=8, gated_mlp=True, vocab=16,
    max_seq_len=8,
)  # fmt: skip
JOB = Job(model=MODEL, seq_len=8, global_batch=2)
ROOT = Path(__file__).parents[2]


def edited(path: Path, shipped: str, old: str, new: str) -> str:
    text = (ROOT / shipped).read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return str(path)


def _schedule(path: Path) -> object:
    return read_schedule(path, ParallelPlan(pp=2, schedule="gpipe"), JOB)


@pytest.mark.parametrize(
    "size", ["layers = 1000000000", "layers = 1025", "hidden = 9223372036854775808"]
)
def test_a_model_of_impossible_size_is_refused(tmp_path: Path, size: str) -> None:
    key = size.split(maxsplit=1)[0]
    lines = (ROOT / "models/tiny-llama-8l.toml").read_text().splitlines()
    old = next(line for line in lines if line.startswith(key))
    with pytest.raises(ParsimError, match="out of range"):
        load_model(edited(tmp_path / "m.toml", "models/tiny-llama-8l.toml", old, size))


@pytest.mark.parametrize(
    "plan",
    ["dp=1000000000000", "pp=1000001", "pp=1000000,vpp=3", "tp=1001,dp=1001", "micro_batch=2147483649"],
)
def test_a_plan_of_impossible_size_is_refused(plan: str) -> None:
    with pytest.raises(ParsimError, match=r"out of range|no cluster has"):
        parse_plan(plan)


@pytest.mark.parametrize("key", ["seq_len", "global_batch"])
def test_a_job_of_impossible_size_is_refused(key: str) -> None:
    with pytest.raises(ParsimError, match="out of range"):
        Job(model=MODEL, **{"seq_len": 8, "global_batch": 8} | {key: 2**31 + 1})


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("gpus_per_node = 8", "gpus_per_node = 1000000", "gpus_per_node"),
        ("num_sms = 132", "num_sms = 1000000000000000000000", "num_sms"),
        ('power_w = "700 W"', 'power_w = "1e300 W"', "power_w"),
        ('"989.4 TFLOP/s"', "1e-300", "peak_flops_per_s.bf16"),
        ('name = "h100-sxm-80gb"', 'name = "a\\u001b[31m"', "name"),
        ('name = "h100-sxm-80gb"', 'name = "a\\nb"', "name"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(tmp_path: Path, old: str, new: str, key: str) -> None:
    with pytest.raises(ParsimError) as caught:
        load_cluster(edited(tmp_path / "h.toml", "hardware_profiles/h100-sxm-80gb.toml", old, new))
    assert f"{key}: " in caught.value.what
    assert str(caught.value).replace("\n", "").isprintable()


@pytest.mark.parametrize(
    "line", ["layer_host_s = -5", "dp_bucket_parameters = 0.5", "relative_error = 9e9"]
)
def test_a_stack_that_cannot_be_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "s.toml"
    path.write_text(f'name = "s"\ndescription = "d"\nsource = "s"\n{line}\n')
    with pytest.raises(ParsimError, match=line.split(maxsplit=1)[0]):
        load_stack(str(path))


def test_problems_without_number_make_a_short_message(tmp_path: Path) -> None:
    path = tmp_path / "h.toml"
    path.write_text("".join(f"a{i} = 1\n" for i in range(3_000)))
    with pytest.raises(ParsimError) as caught:
        load_cluster(str(path))
    assert len(str(caught.value)) < 10_000
    assert "and 2" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["a." * 100_000 + "b = 1", '"a"." b".' * 50_000 + "c = 1", "[" + "a." * 100_000 + "b]"]
)
def test_a_key_of_many_parts_takes_no_quadratic_time(tmp_path: Path, text: str) -> None:
    path = tmp_path / "deep.toml"
    path.write_text(text)
    with pytest.raises(ParsimError, match="too deeply"):
        read_toml(path)


def test_large_files_are_refused_before_they_are_held(tmp_path: Path) -> None:
    path = tmp_path / "large.csv"
    with path.open("wb") as file:
        file.truncate(200 * 2**20)
    readers: tuple[Callable[[Path], object], ...] = (
        *(read_runs, read_kernel_rows, read_prices, _schedule),
        *(lambda path: read_grids(path, {}), read_json, read_toml),
    )
    tracemalloc.start()
    for read in readers:
        with pytest.raises(ParsimError, match="too large"):
            read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("read", [read_json, read_kernel_rows, read_runs])
def test_a_gzip_bomb_is_refused(tmp_path: Path, read: Callable[[Path], object]) -> None:
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(gzip.compress(b"0" * 40 * 2**20) + b"", 1))
    with pytest.raises(ParsimError):
        read(path)
    most = MAX_JSON_BYTES if read is read_json else MAX_FILE_BYTES
    path.write_bytes(gzip.compress(b"0" * (most + 1), 1))
    with pytest.raises(ParsimError, match="too large"):
        read(path)


@pytest.mark.parametrize("rows", [b"a\n" * 260_000, b"," * 5_000_001])
def test_a_table_of_too_many_rows_or_cells_is_refused(tmp_path: Path, rows: bytes) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(rows)
    with pytest.raises(ParsimError, match="too large"):
        read_runs(path)


@pytest.mark.parametrize("read", [_schedule, lambda path: read_grids(path, {})])
def test_a_cell_too_long_for_the_csv_module_is_refused(
    tmp_path: Path, read: Callable[[Path], object]
) -> None:
    path = tmp_path / "cell.csv"
    path.write_text("model," + "x" * 200_000 + "\n1,2\n")
    with pytest.raises(ParsimError, match="no valid CSV"):
        read(path)


def test_a_collective_over_more_devices_than_there_are_is_unsupported(tmp_path: Path) -> None:
    path = tmp_path / "nccl.csv"
    path.write_text(
        "collective,gpus,bytes,time_ms\nalltoall,2147483647,1024,0.02\nalltoall,8,1024,0.02\n"
    )
    wrong, right = read_kernel_rows(path)
    assert isinstance(wrong, UnreadableRow)
    assert "more than 1,000,000" in wrong.reason
    assert not isinstance(right, UnreadableRow)


def test_an_empty_line_of_a_schedule_is_a_rank_without_actions(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text("0F0,0B0\n\n1F0,1B0\n")
    with pytest.raises(ParsimError, match="another plan") as caught:
        _schedule(path)
    assert str(caught.value.got).startswith("3 ranks")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"a": ' + "1" + "0" * 400 + "}", "must be finite"),
        ('{"name": "\\ud800"}', "half a character"),
        ("{" + ", ".join(f'"k{i}": 1' for i in range(100_000)) + ', "k99999": 2}', "given twice"),
    ],
)
def test_json_that_would_fail_later_is_refused(text: str, what: str) -> None:
    with pytest.raises(ParsimError, match=what):
        parse_json(text, where="x.json")


def test_a_document_of_too_many_values_is_refused() -> None:
    with pytest.raises(ParsimError, match="too large"):
        parse_json("[" + "0," * MAX_JSON_VALUES + "0]", where="x.json")


def test_whole_numbers_beyond_64_bits_are_refused_only_where_they_are_used(tmp_path: Path) -> None:
    """transformers writes int(1e30) for a tokenizer without a longest text."""
    path = tmp_path / "config.json"
    known = json.loads((Path(__file__).parent / "huggingface_configs.json").read_text())["llama-2-7b"][
        "config"
    ]
    endless = {"model_max_length": int(1e30), "seed": 2**64 - 1}
    path.write_text(json.dumps(known))
    plain = load_model(str(path))
    path.write_text(json.dumps(known | endless))
    assert load_model(str(path)) == plain
    path.write_text(json.dumps(known | {"hidden_size": 2**64}))
    with pytest.raises(ParsimError, match="hidden"):
        load_model(str(path))
    path.write_text(json.dumps({"plan": {"dp": 2**64}}))
    with pytest.raises(ParsimError, match="dp"):
        read_plan(str(path))


@pytest.mark.parametrize(
    "changes", [{"plan": [1]}, {"plan": "x"}, {"step_time_s": 1e-300}, {"step_time_s": 1e300}]
)
def test_a_step_that_is_none_is_refused(changes: dict[str, object]) -> None:
    good = {"plan": {}, "step_time_s": 1.0, "breakdown_s": {"compute": 1.0}}
    with pytest.raises(ParsimError):
        compare_documents(good, good | changes, where=("a", "b"))


def _event(**changes: object) -> dict[str, object]:
    event: dict[str, object] = {
        "ph": "X",
        "cat": "kernel",
        "name": "k",
        "pid": 1,
        "tid": 1,
        "ts": 1,
        "dur": 1,
    }
    return event | changes


@pytest.mark.parametrize("changes", [{"tid": [1]}, {"args": {"correlation": [1]}}, {"pid": {}}])
def test_a_trace_may_name_its_threads_oddly(tmp_path: Path, changes: dict[str, object]) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps([_event(**changes)]))
    assert len(read_traces([path]).timeline.spans) == 1


@pytest.mark.parametrize("ts", [10**400, 1e300, -1e16])
def test_a_trace_of_impossible_times_is_refused(tmp_path: Path, ts: float) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps([_event(ts=ts)]))
    with pytest.raises(ParsimError, match="must be a number"):
        read_traces([path])


def test_a_trace_is_held_a_block_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = [_event(cat="python_function", args={"x": "y" * 500})] * 20_000 + [_event()]
    path = tmp_path / "t.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events, "z" * 999: 1}).encode(), 1))
    tracemalloc.start()
    found = chrome_file.read_chrome_file(path, {"kernel"})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [event.name for event in found.events] == ["k"]
    assert peak < 8 * 2**20
    # The same file in blocks that end inside every number and word.
    monkeypatch.setattr(chrome_file, "_BLOCK", 7)
    path.write_bytes(gzip.compress(json.dumps([_event(ts=123456), _event(dur=7.25)]).encode()))
    assert [e.start_ns for e in chrome_file.read_chrome_file(path, {"kernel"}).events] == [
        123456000,
        1000,
    ]
    beside = (
        '{"x": 1.5, "y": [-2.5e-3], "baseTimeNanoseconds": 12.5e+3, "traceEvents": [{}], "host_name": 7}'
    )
    path.write_bytes(gzip.compress(beside.encode()))
    for block in range(1, 60):
        monkeypatch.setattr(chrome_file, "_BLOCK", block)
        head = chrome_file.read_chrome_file(path, {"kernel"}).head
        assert head == {"baseTimeNanoseconds": 12500.0, "host_name": 7}


def test_an_endless_value_of_a_trace_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chrome_file, "LONGEST_VALUE", 5000)
    monkeypatch.setattr(chrome_file, "_BLOCK", 1000)
    path = tmp_path / "t.json"
    path.write_text('{"a": [' + "[],\n" * 5000 + '[]], "traceEvents": []}')
    with pytest.raises(ParsimError, match="no valid JSON"):
        read_traces([path])


@pytest.mark.parametrize(
    "header", [b"{'descr': '<u2', 'fortran_order': False, 'shape': (", b"\x00" * 40, b"9" * 4000]
)
def test_a_header_that_numpy_stumbles_over_is_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "t.npy"
    path.write_bytes(
        b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\n" + bytes(99)
    )
    with pytest.raises(ParsimError, match="no array of numpy"):
        open_tokens(path, None, JOB, 1)


def test_a_topology_with_links_beyond_counting_is_refused() -> None:
    with pytest.raises(ParsimError, match="not whole"):
        parse_topology("\tGPU0\tGPU1\nGPU0\tX\tNV" + "1" * 5000 + "\nGPU1\tNV1\tX\n")


@pytest.mark.parametrize(
    "changes",
    [{"step": "1"}, {"steps": []}, {"plan_since": -1}, {"identity": 3}, {"files": 3}, {"plan": 3}],
)
def test_a_checkpoint_of_wrong_types_does_not_count(tmp_path: Path, changes: dict[str, object]) -> None:
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    record = {"time_s": 1.0, "loss": 2.0, "foreign_cpu_s": 0.0, "settling": False}
    good = {"schema_version": 1, "step": 1, "plan": "dp=2", "plan_since": 0, "identity": {},
            "steps": [record], "files": {}}  # fmt: skip
    (folder / "parsim.json").write_text(json.dumps(good))
    assert newest(tmp_path) is not None
    (folder / "parsim.json").write_text(json.dumps(good | changes))
    assert newest(tmp_path) is None
    (folder / "parsim.json").write_text("[" * 100_000)
    assert newest(tmp_path) is None


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x04]\x94.", pickle.dumps({"a": 1}), b"cos\nsystem\n(S'id'\ntR."]
)
def test_a_checkpoints_index_builds_nothing_but_an_index(tmp_path: Path, data: bytes) -> None:
    checkpoint = pytest.importorskip("parsim.execute.training.checkpoint")
    (tmp_path / ".metadata").write_bytes(data)
    with pytest.raises(ParsimError, match="index"):
        checkpoint.IndexReader(tmp_path).read_metadata()
