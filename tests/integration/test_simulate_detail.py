"""`parsim simulate --detail operations` as a user types it; and gradients reduced in other ways."""

import json
from pathlib import Path

import pytest

from parsim.cli.main import run_command

PLAN = "simulate --model llama-3.1-8b --hardware h100-sxm-80gb --plan dp=2,tp=4,pp=2 --global-batch 8"


def answer(capsys: pytest.CaptureFixture[str], command: str) -> dict:  # type: ignore[type-arg]
    assert run_command([*command.split(), "--json"]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def test_operations_add_up_to_actions(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    chart, trace = tmp_path / "operations.png", tmp_path / "trace.json"
    wanted = "--detail operations --detail-rank 1 --detail-micro-batches 2"
    item = answer(capsys, f"{PLAN} {wanted} --detail-chart {chart} --trace {trace}")
    assert item["step_time_s"] == answer(capsys, PLAN)["step_time_s"]
    found = item["operations"]
    assert (found["rank"], found["micro_batches"]) == (1, 2)
    assert [a["action"] for a in found["actions"]] == ["1F0", "1B0", "1F1", "1B1"]
    for action in found["actions"]:
        seconds = action["compute_s"] + sum(action["exposed_s"].values())
        assert seconds == pytest.approx(action["end_s"] - action["start_s"], rel=1e-9)
    # Llama's layers have four products each; the backward's gradients of weights are theirs alone.
    assert {"qkv", "attention output", "fc1", "fc2", "head", "host"} == set(
        found["seconds"]["weight_grad"]
    )
    assert chart.read_bytes().startswith(b"\x89PNG")
    names = [event["name"] for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("layer 20: fc1") == 2 * 3  # forward and both gradients of two micro-batches
    assert "1F0" not in names
    assert "0F0" in names


def test_recomputation_stands_in_the_layers_that_are_counted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.json"
    plan = PLAN.replace("pp=2", "pp=2,recompute=full,recompute_layers=2-0")
    assert run_command([*plan.split(), "--detail", "operations", "--trace", str(trace)]) == 0
    assert "recompute_layers=2-0" in capsys.readouterr().out.splitlines()[0]
    events = json.loads(trace.read_text())["traceEvents"]
    again = {event["name"].partition(":")[0] for event in events if event.get("cat") == "recompute"}
    assert again == {"layer 0", "layer 1"}


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ("--detail-rank 1", "--detail operations"),
        ("--detail operations --detail-rank 2", "no such rank"),
        ("--detail operations --detail-micro-batches 0", "1 or more"),
        ("--detail operations --detail-micro-batches 4 --detail-chart X.png", "micro-batches"),
        ("--detail operations --detail-chart X.bmp", "picture"),
        ("--detail kernels", "operations"),
    ],
)
def test_refusals(flags: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    # Rank 0 of a plan with two chunks a rank has four actions a micro-batch.
    plan = PLAN.replace("pp=2", "pp=2,vpp=2,schedule=interleaved") if "batches 4" in flags else PLAN
    assert run_command([*plan.split(), *flags.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert word in captured.err


def test_compressed_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    """Over a slow network a step of a pure data-parallel plan gets faster the less is sent."""
    command = "simulate --model gpt-1.7b --hardware a100-sxm-80gb --inter-node 10Gb/s --global-batch 64"
    times = {}
    for setting in ("none", "bf16", "int8", "powersgd-4"):
        item = answer(capsys, f"{command} --plan dp=16,compression={setting}")
        assert item["plan"]["compression"] == setting
        times[setting] = item["step_time_s"]
    assert times["none"] > times["bf16"] > times["int8"] > times["powersgd-4"]
