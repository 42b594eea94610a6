"""`parsim compare-schedules`: one plan under all schedules."""

import json
from pathlib import Path

import pytest

from parsim.cli.main import run_command
from parsim.schedule import SCHEDULES

COMMAND = (
    "compare-schedules --model llama-3.1-8b --hardware h100-sxm-80gb --global-batch 32 "
    "--plan dp=1,tp=4,pp=4,recompute=full"
).split()


def test_every_schedule_is_simulated_as_by_simulate(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([*COMMAND, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    found = {item["plan"]["schedule"]: item for item in document["schedules"]}
    assert set(found) == set(SCHEDULES)
    assert document["refused"] == []
    order = [(not item["fits"], item["step_time_s"]) for item in document["schedules"]]
    assert order == sorted(order)
    simulate = ["simulate", *COMMAND[1:], "--schedule", "zbv", "--json"]
    assert run_command(simulate) == 0
    alone = json.loads(capsys.readouterr().out)
    for key in ("step_time_s", "bubble_fraction", "memory_bytes", "plan"):
        assert found["zbv"][key] == alone[key]
    # Chunks and split backwards shrink the bubble, and GPipe keeps all micro-batches.
    bubble = {name: item["bubble_fraction"] for name, item in found.items()}
    peak = {name: item["memory_bytes"]["activations"] for name, item in found.items()}
    assert bubble["zbv"] < bubble["interleaved"] < bubble["1f1b"]
    assert bubble["zb-h1"] < bubble["1f1b"]
    assert peak["gpipe"] > 3 * peak["1f1b"]


def test_what_cannot_run_is_told_with_its_reason(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    chart = tmp_path / "all.png"
    few = [word if word != "32" else "4" for word in COMMAND]
    assert run_command([*few, "--schedule", "1f1b,dualpipev", "--chart", str(chart)]) == 0
    captured = capsys.readouterr()
    assert "dualpipev cannot run this plan: DualPipeV needs as many micro-batches" in captured.out
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_what_is_said_of_each_stage_goes_where_the_stages_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = f"{COMMAND[-1]},recompute_layers=8-8-4-0"
    schedules = ["--schedule", "1f1b,zb-h1,zbv,dualpipe"]
    assert run_command([*COMMAND[:-1], plan, *schedules]) == 0
    said = "recompute_layers is for 4 stages of the model: left out of zbv"
    assert said in capsys.readouterr().out.splitlines()
    assert run_command([*COMMAND[:-1], plan, *schedules, "--json"]) == 0
    items = json.loads(capsys.readouterr().out)["schedules"]
    counts = {item["plan"]["schedule"]: item["plan"]["recompute_layers"] for item in items}
    given = [8, 8, 4, 0]
    assert counts == {"1f1b": given, "zb-h1": given, "dualpipe": given, "zbv": []}
    assert run_command([*COMMAND, *schedules]) == 0
    assert "recompute_layers" not in capsys.readouterr().out


def test_where_nothing_fits_the_answer_is_no(capsys: pytest.CaptureFixture[str]) -> None:
    command = "compare-schedules --model gpt3-175b --hardware a100-sxm-80gb --plan dp=1,pp=2".split()
    assert run_command([*command, "--schedule", "1f1b,gpipe"]) == 1
    assert "NO" in capsys.readouterr().out
    assert run_command([*COMMAND, "--schedule", "1f1b,zbv", "--memory", "10GB"]) == 1
    assert "yes" not in capsys.readouterr().out
    assert run_command([*command, "--schedule", "1f1"]) == 2
    assert "did you mean '1f1b'" in capsys.readouterr().err
