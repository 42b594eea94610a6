"""Traces that torch's profiler writes of real ranks, read back: two processes, gloo, a 1F1B pipeline."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from parsim.cli.main import run_command
from parsim.plan import ParallelPlan
from parsim.timeline import transfers
from parsim.traces.traced_run import read_traces

pytest.importorskip("torch")
pytestmark = pytest.mark.slow

MICRO_BATCHES, STEPS = 3, 2
SCRIPT = """
import os, sys
import torch, torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.profiler import ProfilerActivity, profile, schedule

rank, port, micro_batches, steps = map(int, sys.argv[1:5])
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
torch.set_num_threads(1)
dist.init_process_group("gloo", rank=rank, world_size=2)
stage = PipelineStage(torch.nn.Linear(256, 256), rank, 2, torch.device("cpu"))
run = Schedule1F1B(stage, micro_batches, loss_fn=lambda y, t: (y - t).pow(2).mean())
optimizer = torch.optim.AdamW(stage.submod.parameters())
x = torch.randn(32 * micro_batches, 256)
wanted = schedule(wait=1, warmup=1, active=steps, repeat=1)
write = lambda p: p.export_chrome_trace(sys.argv[5])
with profile(activities=[ProfilerActivity.CPU], schedule=wanted, on_trace_ready=write) as p:
    for _ in range(2 + steps):
        run.step(x) if rank == 0 else run.step(target=x)
        optimizer.step()
        optimizer.zero_grad()
        p.step()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("traces")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = [folder / f"rank{rank}.json" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *map(str, (rank, port, MICRO_BATCHES, STEPS, path))],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank, path in enumerate(paths)
    ]  # fmt: skip
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    return paths


def test_a_real_pipeline_is_read_back(traces: list[Path]) -> None:
    """Every transfer of a step is there with its other end, and none arrives before it is sent.

    The profiler turns the processor's counter into time in each process by itself, so clocks may differ
    even on one host; then they are set.
    """
    run = read_traces(traces, ParallelPlan(pp=2))
    assert (run.ranks, run.world_size, run.on_gpu) == ((0, 1), 2, False)
    assert len(run.steps_s) == STEPS
    assert run.left_out == 0
    pairs = transfers(run.timeline.spans)
    assert sorted(send.name for send, _ in pairs) == sorted(
        f"{action}{i}" for action in ("0F", "1B") for i in range(MICRO_BATCHES)
    )
    assert all(send.rank != receive.rank for send, receive in pairs)
    assert all(receive.end_s > send.start_s for send, receive in pairs)
    kinds = {span.kind for span in run.timeline.spans if span.rank == 1}
    assert kinds == {"forward", "backward", "optimizer", "pp", "host"}


def test_a_clock_that_is_wrong_is_set(traces: list[Path], tmp_path: Path) -> None:
    """The same traces, one of them from a host whose clock is seven seconds ahead."""
    found = []
    for ahead_s in (0.0, 7.0):
        document = json.loads(traces[1].read_text())
        for event in document["traceEvents"]:
            if "ts" in event:
                event["ts"] += ahead_s * 1e6
        path = tmp_path / "elsewhere.json"
        path.write_text(json.dumps(document | {"host_name": "elsewhere"}))
        found.append(read_traces([traces[0], path], ParallelPlan(pp=2)))
    offsets_s = [run.clock_offsets_s[1] for run in found]
    assert abs(offsets_s[0]) < 0.1
    assert offsets_s[1] - offsets_s[0] == pytest.approx(7.0, abs=1e-6)
    for run in found:
        pairs = transfers(run.timeline.spans)
        assert min(receive.end_s - send.start_s for send, receive in pairs) > 0


def test_trace_and_validate_take_real_traces(
    traces: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(path) for path in traces]
    outputs = {"-o": tmp_path / "m.json", "--chart": tmp_path / "c.png", "--trace": tmp_path / "t.json"}
    words = [str(word) for pair in outputs.items() for word in pair]
    found = answer(capsys, "trace", *files, "--plan", "pp=2", *words)
    assert sum(found["breakdown_s"].values()) == pytest.approx(
        max(found["timeline"]["spans"]["end_s"]), rel=1e-6
    )
    assert {"pp_exposed", "imbalance", "overhead"} <= found["breakdown_s"].keys()
    arrows = [e for e in json.loads(outputs["--trace"].read_text())["traceEvents"] if e["ph"] == "s"]
    assert len(arrows) == 2 * MICRO_BATCHES
    flags = "--model tiny-llama-8l --hardware local-cpu --seq-len 64 --global-batch 3".split()
    prediction = answer(capsys, "simulate", *flags, "--plan", "pp=2,micro_batch=1,schedule=1f1b")
    (tmp_path / "p.json").write_text(json.dumps(prediction))
    compared = [
        answer(capsys, "validate", str(tmp_path / "p.json"), *measured)
        for measured in (files, [str(outputs["-o"])])
    ]
    # Another model was traced: what counts is that the parts of the difference add up, both ways.
    for one in compared:
        error_s = one["predicted_s"] - one["measured_s"]
        assert sum(cause["difference_s"] for cause in one["causes"]) == pytest.approx(error_s)
        assert sum(part["difference_s"] for part in one["parts"]) == pytest.approx(error_s)
        assert {"compute", "pp", "rest"} <= {cause["what"] for cause in one["causes"]}
    assert compared[0]["causes"] == compared[1]["causes"]


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run_command([*arguments, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))
