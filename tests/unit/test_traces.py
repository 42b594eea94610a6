"""Traces of torch's profiler, made by hand as Kineto writes them: streams, steps, clocks, errors."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from parsim.errors import ParsimError
from parsim.plan import ParallelPlan
from parsim.timeline import Timeline, breakdown_s
from parsim.traces.chrome_file import is_chrome_trace, read_chrome_file
from parsim.traces.groups import stream_of
from parsim.traces.kineto import CATEGORIES, read_rank_trace
from parsim.traces.traced_run import TracedRun, read_traces

BASE_NS = 1_790_857_026_000_000_000
ALL_REDUCE = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
SCATTER = "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
Event = dict[str, Any]


def event(
    name: str, cat: str, ts: float, dur: float, tid: object = 1, pid: object = 100, **args: Any
) -> Event:
    return {
        "ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": ts, "dur": dur, "args": args
    }  # fmt: skip


def launched(
    name: str, asked: float, ts: float, dur: float, *, tid: object = 1, **args: Any
) -> list[Event]:
    """A kernel and the call that launched it, which share their correlation."""
    number = round(1000 * asked)
    return [
        event("cudaLaunchKernel", "cuda_runtime", asked, 2.0, tid, correlation=number),
        event(name, "kernel", ts, dur, 7, 0, correlation=number, stream=7, **args),
    ]


def nccl(what: str, group: str, ranks: list[int]) -> dict[str, Any]:
    return {
        "Collective name": what,
        "Process Group Name": group,
        "Process Group Ranks": str(ranks),
        "Group size": len(ranks),
    }


def gpu_step(number: int, at: float, tp: list[int], dp: list[int]) -> list[Event]:
    """100 µs of a step: a forward with its tensor-parallel sum, a backward, gradients, the update."""
    return [
        event(f"ProfilerStep#{number}", "user_annotation", at, 100.0),
        *launched("gemm", at + 1, at + 10, 20),
        *launched(ALL_REDUCE, at + 3, at + 30, 10, **nccl("allreduce", "1", tp)),
        event("autograd::engine::evaluate_function: MmBackward0", "cpu_op", at + 35, 20, tid=2),
        *launched("gemm", at + 36, at + 45, 30, tid=2),
        *launched(SCATTER, at + 38, at + 75, 10, tid=2, **nccl("_reduce_scatter_base", "2", dp)),
        event("Optimizer.step#AdamW.step", "user_annotation", at + 60, 30),
        *launched("multi_tensor_apply", at + 88, at + 90, 15),
    ]  # fmt: skip


def write(
    path: Path,
    events: list[Event],
    *,
    rank: int = 0,
    world: int = 1,
    host: str = "a",
    shift: float = 0.0,
) -> Path:
    moved = [e | {"ts": e["ts"] + shift} for e in events]
    document = {
        "schemaVersion": 1,
        "distributedInfo": {"backend": "nccl", "rank": rank, "world_size": world},
        "host_name": host,
        "traceEvents": moved,
        "baseTimeNanoseconds": BASE_NS,
    }
    path.write_text(json.dumps(document))
    return path


def gpu_run(folder: Path, plan: ParallelPlan, *, shifts: dict[int, float] | None = None) -> TracedRun:
    """Three steps on every rank of a plan; `shifts`: how far clocks are ahead, in µs, a host each."""
    paths = []
    for rank in range(plan.gpus):
        at = plan.coordinate(rank)
        tp = [plan.rank(at._replace(tp=i)) for i in range(plan.tp)]
        dp = [plan.rank(at._replace(dp=i)) for i in range(plan.dp)]
        events = [e for step in range(3) for e in gpu_step(step + 5, 1000 + 100.0 * step, tp, dp)]
        shift = (shifts or {}).get(rank, 0.0)
        host = f"host{rank}" if shifts else "host"
        path = folder / f"rank{rank}.json"
        paths.append(write(path, events, rank=rank, world=plan.gpus, host=host, shift=shift))
    return read_traces(paths, plan)


PLAN = ParallelPlan(dp=2, tp=2)


def seconds_by_kind(timeline: Timeline, rank: int) -> dict[str, float]:
    found: dict[str, float] = {}
    for span in timeline.spans:
        if span.rank == rank:
            found[span.kind] = round(found.get(span.kind, 0.0) + span.duration_s * 1e6, 3)
    return found


def test_kernels_go_to_what_asked_for_them(tmp_path: Path) -> None:
    """Times of every kind are those written by hand; the group's ranks tell tp from dp."""
    run = gpu_run(tmp_path, PLAN)
    assert run.on_gpu
    assert run.steps_s == pytest.approx((100e-6, 100e-6, 95e-6))
    for rank in range(4):
        assert seconds_by_kind(run.timeline, rank) == pytest.approx(
            # nothing runs for 5 µs: the update was asked for 3 µs after the gradients were there
            {"forward": 20, "tp": 10, "backward": 30, "dp": 10, "optimizer": 15, "host": 5}
        )
    assert sum(breakdown_s(run.timeline).values()) == pytest.approx(run.timeline.end_s)


def test_a_gap_is_the_hosts_only_where_it_was_late(tmp_path: Path) -> None:
    """Between the first sum and the backward 5 µs pass too, but that kernel had been asked for."""
    run = gpu_run(tmp_path, PLAN)
    gaps = [(span.start_s, span.end_s) for span in run.timeline.spans if span.kind == "host"]
    assert {(round(a * 1e6, 3), round(b * 1e6, 3)) for a, b in gaps} == {(75.0, 80.0)}
    assert breakdown_s(run.timeline)["bubble"] == pytest.approx(5e-6)


def test_a_late_next_step_is_the_hosts_too(tmp_path: Path) -> None:
    """The device has nothing to do for 40 µs before the second step: batches are slow to come."""
    events = [*gpu_step(1, 0, [0], [0]), *gpu_step(2, 140, [0], [0])]
    run = read_traces([write(tmp_path / "t.json", events)])
    assert run.steps_s == pytest.approx((140e-6, 95e-6))
    slow = read_traces([write(tmp_path / "t.json", [*events, *gpu_step(3, 280, [0], [0])])])
    last = max(slow.timeline.spans, key=lambda span: span.end_s)
    assert (last.kind, last.end_s) == ("host", pytest.approx(140e-6))
    assert last.duration_s == pytest.approx(45e-6)


@pytest.mark.parametrize("ahead", [{1: 5_000_000.0, 2: -300.0, 3: 12.5}])
def test_clocks_of_several_hosts_are_set(tmp_path: Path, ahead: dict[int, float]) -> None:
    (tmp_path / "right").mkdir()
    right = gpu_run(tmp_path / "right", PLAN)
    found = gpu_run(tmp_path, PLAN, shifts=ahead)
    assert found.clock_offsets_s == pytest.approx({rank: 1e-6 * us for rank, us in ahead.items()})
    assert [s[:3] for s in found.timeline.spans] == [s[:3] for s in right.timeline.spans]
    for mine, its in zip(found.timeline.spans, right.timeline.spans, strict=True):
        assert mine.start_s == pytest.approx(its.start_s, abs=1e-9)


def pipeline(folder: Path, *, ahead_us: float = 0.0, hosts: tuple[str, str] = ("a", "a")) -> TracedRun:
    """Two ranks on CPUs, two micro-batches: what rank 0 sends at 10 and 20 has come after 3 µs."""
    first = [
        event("ProfilerStep#1", "user_annotation", 0, 100),
        event("aten::linear", "cpu_op", 1, 9),
        event("gloo:send", "user_annotation", 10, 4),
        event("aten::linear", "cpu_op", 14, 6),
        event("gloo:send", "user_annotation", 20, 4),
        event("gloo:recv", "user_annotation", 25, 25),
        event("autograd::engine::evaluate_function: X", "cpu_op", 50, 12),
        event("aten::mm", "cpu_op", 52, 9),
        event("aten::t", "cpu_op", 53, 1),
        event("gloo:recv", "user_annotation", 62, 8),
        event("autograd::engine::evaluate_function: X", "cpu_op", 70, 20),
        event("aten::mm", "cpu_op", 71, 18),
    ]
    second = [
        event("ProfilerStep#1", "user_annotation", 0, 100),
        event("gloo:recv", "user_annotation", 1, 12),
        event("aten::linear", "cpu_op", 13, 10),
        event("gloo:recv", "user_annotation", 23, 1),
        event("autograd::engine::evaluate_function: X", "cpu_op", 24, 22),
        event("aten::mm", "cpu_op", 25, 20),
        event("gloo:send", "user_annotation", 47, 3),
        event("gloo:send", "user_annotation", 67, 3),
    ]
    paths = [
        write(folder / "r0.json", first, rank=0, world=2, host=hosts[0]),
        write(folder / "r1.json", second, rank=1, world=2, host=hosts[1], shift=ahead_us),
    ]
    return read_traces(paths, ParallelPlan(pp=2))


def test_gloo_transfers_find_their_stream_and_name(tmp_path: Path) -> None:
    spans = [span for span in pipeline(tmp_path).timeline.spans if span.kind == "pp"]
    assert [(s.rank, s.stream, s.name) for s in spans] == [
        (0, "pp_send_next", "0F0"), (0, "pp_send_next", "0F1"),
        (0, "pp_recv_next", "1B0"), (0, "pp_recv_next", "1B1"),
        (1, "pp_send_prev", "1B0"), (1, "pp_send_prev", "1B1"),
        (1, "pp_recv_prev", "0F0"), (1, "pp_recv_prev", "0F1"),
    ]  # fmt: skip


def test_operators_inside_others_count_once(tmp_path: Path) -> None:
    found = seconds_by_kind(pipeline(tmp_path).timeline, 0)
    assert (found["forward"], found["backward"]) == (15, 27)


def test_clocks_of_a_pipeline_are_set_by_its_fastest_transfers(tmp_path: Path) -> None:
    """Both ways the fastest takes 3 µs, so the offset comes out exactly."""
    run = pipeline(tmp_path, ahead_us=1234.0, hosts=("a", "b"))
    assert run.clock_offsets_s == pytest.approx({1: 1234e-6})
    assert pipeline(tmp_path).clock_offsets_s == {}


def test_actions_that_torch_records_name_the_spans(tmp_path: Path) -> None:
    events = [
        event("PP:1F3", "user_annotation", 0, 10),
        event("aten::linear", "cpu_op", 1, 5),
        event("PP:1W3", "user_annotation", 10, 10),
        event("aten::mm", "cpu_op", 11, 5),
        event("gloo:all_reduce", "user_annotation", 20, 5, tid=9),
    ]
    run = read_traces([write(tmp_path / "t.json", events)])
    named = [(s.name, s.kind, s.stage, s.micro_batch) for s in run.timeline.spans if s.kind != "host"]
    assert named == [
        ("1F3", "forward", 1, 3),
        ("1W3", "weight_grad", 1, 3),
        ("all_reduce", "dp", -1, -1),
    ]
    assert run.step == -1


@pytest.mark.parametrize(
    ("what", "ranks", "description", "plan", "stream"),
    [
        ("allreduce", (2, 3), "", ParallelPlan(dp=2, tp=2), "tp"),
        ("allreduce", (0, 2), "", ParallelPlan(dp=2, tp=2), "dp"),
        ("allgather", (0, 2, 4, 6), "", ParallelPlan(dp=2, cp=2, tp=2), "dp"),
        ("allgather", (0, 2), "", ParallelPlan(dp=2, cp=2, tp=2), "cp"),
        ("all_to_all", (0, 1, 2, 3), "", ParallelPlan(dp=8, ep=4), "ep"),
        ("allreduce", (), "TENSOR_MODEL_PARALLEL_GROUP", None, "tp"),
        ("allreduce", (), "mesh_dp", None, "dp"),
        ("allreduce", (), "EXPERT_DATA_PARALLEL_GROUP", ParallelPlan(dp=4, ep=2), "dp"),
        ("allreduce", (), "INTRA_EXPERT_DATA_PARALLEL_GROUP", None, "dp"),
        ("all_to_all", (), "EXPERT_MODEL_PARALLEL_GROUP", ParallelPlan(dp=4, ep=2), "ep"),
        ("allreduce", (), "EXPERT_TENSOR_PARALLEL_GROUP", None, "tp"),
        ("all_to_allv", (), "", ParallelPlan(dp=4, tp=2, ep=4), "ep"),
        ("all_reduce", (), "", ParallelPlan(tp=4), "tp"),
        ("all_reduce", (), "", None, "dp"),
    ],
)
def test_collectives_find_their_stream(
    what: str, ranks: tuple[int, ...], description: str, plan: ParallelPlan | None, stream: str
) -> None:
    rank = ranks[0] if ranks else 0
    assert stream_of(what, ranks, description, plan, rank, "optimizer", {}) == stream


def test_peers_of_transfers_are_taken_from_the_trace() -> None:
    plan = ParallelPlan(pp=4, vpp=2, schedule="interleaved")
    found = [stream_of("send", (), "", plan, 3, "forward", {"Dst Rank": peer}) for peer in (0, 2)]
    assert found == ["pp_send_next", "pp_send_prev"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "this is no trace"),
        ("not json", "this is no trace"),
        ('{"schemaVersion": 1}', "holds no events"),
        ('{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "a", "ts": 1, "dur": 2', "breaks off"),
        ('{"traceEvents": [{"ph": "X", "cat": "cpu_op", "na', "breaks off"),
        ('{"traceEvents": [{"ph": "M"}, {"ph" 1}]}', "no valid JSON"),
        (
            '{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "k", "ts": "1", "dur": 1}]}',
            "a number",
        ),
        (
            '{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "k", "ts": NaN, "dur": 1}]}',
            "a number",
        ),
        ('{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "k", "ts": 1}]}', "a number"),
        ('{"traceEvents": []}', "holds no events"),
        ('{"traceEvents": [{"ph": "X", "cat": "python_function"}]}', "neither kernels nor operators"),
        ('{"distributedInfo": {"rank": "x"}, "traceEvents": [{}]}', "whole number"),
        ("[" * 100_000, "no valid JSON"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, content: str, what: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises(ParsimError, match=what) as caught:
        read_traces([path])
    assert str(path) in str(caught.value.where)


def test_ranks_are_checked(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{i}.json", gpu_step(1, 0, [0], [0]), rank=1, world=2) for i in range(2)]
    with pytest.raises(ParsimError, match="two traces are of rank 1"):
        read_traces(paths)
    with pytest.raises(ParsimError, match="another size"):
        read_traces(paths[:1], ParallelPlan(dp=4))
    paths[0].write_text("\n")
    with pytest.raises(ParsimError, match="no trace"):
        read_traces(paths)


def test_files_may_be_lists_or_compressed_and_clumsy(tmp_path: Path) -> None:
    events = [*gpu_step(1, 0, [0], [0]), event("gemm", "kernel", 200, -5, 7, correlation=-1)]
    plain = tmp_path / "list.json"
    plain.write_text(" [\n" + ",\n".join(map(json.dumps, events)) + "\n]\n")
    packed = tmp_path / "list.json.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert is_chrome_trace(packed)
    assert read_chrome_file(packed, CATEGORIES) == read_chrome_file(plain, CATEGORIES)
    run = read_traces([packed])
    assert (run.left_out, run.ranks) == (1, (0,))
    packed.write_bytes(packed.read_bytes()[:100])
    with pytest.raises(ParsimError, match="cannot be read"):
        read_traces([packed])


def test_a_small_file_that_unpacks_to_anything_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parsim.traces.chrome_file.LONGEST", 5000)
    packed = tmp_path / "bomb.json.gz"
    content = json.dumps({"traceEvents": gpu_step(1, 0, [0], [0])})
    packed.write_bytes(gzip.compress(content.ljust(5000).encode()))
    assert len(read_chrome_file(packed, CATEGORIES).events) > 0
    packed.write_bytes(gzip.compress(content.ljust(5001).encode()))
    with pytest.raises(ParsimError, match="too large") as caught:
        read_traces([packed])
    assert caught.value.where == str(packed)


def test_gloos_threads_work_for_the_thread_of_autograd_that_does_most(tmp_path: Path) -> None:
    """Threads named by text, whose order in a set changes with every start of Python."""
    engine = "autograd::engine::evaluate_function: X"
    for most in range(4):
        events = [event("ProfilerStep#1", "user_annotation", 0, 100), event("aten::mm", "cpu_op", 1, 4)]
        events += [event(engine, "cpu_op", 10 + n, 1, tid=f"thread {n}") for n in range(4)]
        # The busiest is in its optimizer when gloo adds up, which then is no sum of tensor parallelism.
        events += [
            event(engine, "cpu_op", 20, 20, tid=f"thread {most}"),
            event("Optimizer.step#SGD.step", "user_annotation", 50, 30, tid=f"thread {most}"),
            event("gloo:all_reduce", "user_annotation", 60, 5, tid="gloo"),
        ]
        path = write(tmp_path / "r.json", events)
        (work,) = (w for w in read_rank_trace(path, PLAN, place=0).work if w.name == "all_reduce")
        assert work.stream == "dp", most


def shared(folder: Path, ahead_us: dict[int, float], *, one_host: bool = False) -> TracedRun:
    """Ranks 0 and 2 sum, then 1 and 2: nothing ties 0 and 1 but what both share with 2."""
    groups = {0: [("1", [0, 2])], 1: [("2", [1, 2])], 2: [("1", [0, 2]), ("2", [1, 2])]}
    paths = []
    for rank, own in groups.items():
        events = launched("gemm", 1, 5, 10)
        for name, ranks in own:
            at = 20.0 * int(name)
            events += launched(ALL_REDUCE, at, at + 1, 8, **nccl("allreduce", name, ranks))
        host = "a" if one_host else f"host{rank}"
        path = folder / f"{rank}.json"
        paths.append(write(path, events, rank=rank, world=3, host=host, shift=ahead_us.get(rank, 0.0)))
    return read_traces(paths)


def test_clocks_are_set_through_a_third_rank(tmp_path: Path) -> None:
    run = shared(tmp_path, {1: 500.0, 2: -200.0})
    assert run.clock_offsets_s == pytest.approx({1: 500e-6, 2: -200e-6})


def test_clocks_of_one_host_are_set_where_they_contradict_themselves(tmp_path: Path) -> None:
    """4 µs may be a late rank; a sum that ends before its other rank begins is a wrong clock."""
    assert shared(tmp_path, {1: 4.0}, one_host=True).clock_offsets_s == {}
    found = shared(tmp_path, {1: 50.0}, one_host=True).clock_offsets_s
    assert found == pytest.approx({1: 50e-6})
