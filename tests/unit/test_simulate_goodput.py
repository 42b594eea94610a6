"""`parsim simulate --mtbf`: its settings, its answer and its chart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from parsim.cli.main import run_command
from parsim.cost.checkpoint import daly_interval_s

LLAMA = (
    "simulate --model llama-3.1-405b --hardware h100-sxm-80gb --plan dp=128,tp=8,pp=16,zero=1,"
    "recompute=full --global-batch 2048"
).split()


def goodput(capsys: pytest.CaptureFixture[str], mtbf: str, seed: int = 0) -> dict[str, Any]:
    assert run_command([*LLAMA, "--mtbf", mtbf, "--seed", str(seed), "--json"]) == 0
    item: dict[str, Any] = json.loads(capsys.readouterr().out)
    answer: dict[str, Any] = item["goodput"]
    assert answer["tokens_per_s_per_gpu"] == pytest.approx(
        answer["goodput"] * item["tokens_per_s_per_gpu"]
    )
    assert sum(answer["time_s"].values()) == pytest.approx(answer["simulated_s"])
    return answer


def test_failures_of_the_job_and_of_a_gpu_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    job = goodput(capsys, "419/54days,runs=2")
    gpu_hours = 16_384 * 54 * 24 / 419
    gpu = goodput(capsys, f"{gpu_hours!r}h,runs=2")
    assert job["mtbf_s"] == pytest.approx(54 * 86400 / 419)
    assert job["gpu_mtbf_s"] == pytest.approx(gpu_hours * 3600)
    assert gpu["goodput"] == pytest.approx(job["goodput"])


def test_llama_3_as_its_paper_reports(capsys: pytest.CaptureFixture[str]) -> None:
    """More than 90% effective training time, with ten minutes to find a failure and no more said."""
    answer = goodput(capsys, "466/54days,duration=54days")
    assert 0.90 < answer["interval"][0] < answer["goodput"] < answer["interval"][1] < 0.95
    checkpoint = answer["checkpoint"]
    assert checkpoint["bytes"] == pytest.approx(14 * 405.85e9, rel=1e-3)
    assert checkpoint["write_s"] == pytest.approx(checkpoint["bytes"] / (2e12 * 16_384 / 24_576))
    assert answer["restart_s"] == pytest.approx(600 + checkpoint["write_s"])
    assert checkpoint["interval_s"] == answer["best_interval_s"]["exact"]
    assert answer["best_interval_s"]["daly"] == pytest.approx(checkpoint["interval_s"], rel=1e-3)
    assert len(answer["assumed"]) == 4


def test_every_setting_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        "50000h,checkpoint=30min,write=60s,blocking=0.25,detect=2min,restart=3min,load=1min,spares=4,"
        "repair=12h,duration=20days,runs=3"
    )
    answer = goodput(capsys, text, seed=7)
    assert answer["checkpoint"] | {"bytes": 0} == {
        "bytes": 0, "interval_s": 1800.0, "write_s": 60.0, "blocking_s": 15.0,
    }  # fmt: skip
    assert answer["restart_s"] == 360.0
    assert (answer["spares"], answer["repair_s"], answer["runs"], answer["seed"]) == (4, 43200.0, 3, 7)
    assert answer["simulated_s"] == pytest.approx(20 * 86400)
    assert answer["best_interval_s"]["daly"] == daly_interval_s(15.0, 50_000 * 3600 / 16_384)
    assert answer["time_s"]["waiting"] > 0
    assert answer["assumed"] == []
    assert goodput(capsys, text, seed=8)["goodput"] != answer["goodput"]
    assert goodput(capsys, text, seed=7) == answer
    half = goodput(capsys, "50000h,storage=100GB/s,runs=1")["checkpoint"]
    assert half["write_s"] == pytest.approx(half["bytes"] / 100e9)


def test_a_job_that_makes_no_progress_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([*LLAMA, "--mtbf", "100h,runs=2"]) == 0
    assert "NO PROGRESS" in capsys.readouterr().out
    assert run_command([*LLAMA, "--mtbf", "50000h,runs=2"]) == 0
    assert "NO PROGRESS" not in capsys.readouterr().out


def test_chart(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "goodput.svg"
    command = [*LLAMA, "--mtbf", "50000h,checkpoint=1h", "--goodput-chart", str(path)]
    assert run_command(command) == 0
    captured = capsys.readouterr()
    assert str(path) in captured.err
    assert "goodput" in captured.out
    first = path.read_bytes()
    assert run_command(command) == 0
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("mtbf", "words"),
    [
        ("checkpoint=30min", ["--mtbf", "name"]),
        ("50000", ["--mtbf", "unit"]),
        ("0/54days", ["419/54days"]),
        ("-3h", ["50000h"]),
        ("50000h,checkpont=30min", ["did you mean 'checkpoint'"]),
        ("50000h,checkpoint=0s", ["checkpoint"]),
        ("50000h,blocking=2", ["blocking", "0 to 1"]),
        ("50000h,blocking=nan", ["blocking", "0 to 1"]),
        ("50000h,detect=-1s", ["detect"]),
        ("50000h,spares=-1", ["spares"]),
        ("50000h,runs=0", ["runs"]),
        ("50000h,repair=1h", ["spares"]),
        ("50000h,write=1s,load=1s,storage=1GB/s", ["storage"]),
    ],
)
def test_bad_settings(capsys: pytest.CaptureFixture[str], mtbf: str, words: list[str]) -> None:
    assert run_command([*LLAMA, f"--mtbf={mtbf}"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert all(word in captured.err for word in words), captured.err


def test_a_chart_of_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run_command([*LLAMA, "--goodput-chart", str(tmp_path / "x.png")]) == 2
    assert "--mtbf" in capsys.readouterr().err
