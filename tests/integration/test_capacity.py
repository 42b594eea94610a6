"""`parsim capacity` from the command line."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import parsim.search.capacity
from parsim.cli.main import run_command
from parsim.search.search import search

SMALL = "capacity --model llama-3.2-1b --hardware h100-sxm-80gb --tokens 20x --global-batch 64".split()


def answer(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> dict[str, Any]:
    assert run_command([*SMALL, *words, "--json"]) == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_rows_answers_and_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("rows.csv", "p.png", "s.png", "t.png")}
    flags = zip(("--csv", "--chart", "--scaling-chart", "--tornado-chart"), files.values(), strict=True)
    found = answer(
        capsys,
        *("--gpus", "4-8,19", "--deadline", "3 weeks", "--budget", "1M", "--pue", "1.2"),
        *(str(word) for pair in flags for word in pair),
    )
    # 19 stages are more than there are layers, and 19 replicas do not share 64 sequences.
    assert [row["gpus"] for row in found["rows"]] == [4, 8]
    assert [(no["gpus"], "that 19 divides" in no["reason"]) for no in found["refused"]] == [(19, True)]
    for row in found["rows"]:
        tokens_per_s = row["tokens_per_s_per_gpu"] * row["gpus"]
        assert row["days_ideal"] == pytest.approx(row["tokens"] / tokens_per_s / 86400)
        assert row["days"] == pytest.approx(row["days_ideal"] / row["goodput"])
        assert row["usd"] == pytest.approx(row["gpus"] * row["days"] * 24 * row["usd_per_gpu_hour"])
        assert row["energy_kwh_bounds"][0] < row["energy_kwh"] < row["energy_kwh_bounds"][1]
        assert row["facility_kwh"] > row["energy_kwh"]
        assert row["meets"]
        assert row["deadline_probability"] > 0.99
    assert {each["objective"] for each in found["answers"]["llama-3.2-1b"]} == {
        "smallest",
        "cheapest",
        "fastest",
    }
    (strong,) = found["scaling"]["strong"].values()
    (weak,) = found["scaling"]["weak"].values()
    assert [point["global_batch"] for point in strong] == [64, 64]
    assert [point["global_batch"] for point in weak] == [64, 128]
    (effects,) = found["sensitivity"].values()
    assert len(effects) == 10
    rows = list(csv.DictReader(files["rows.csv"].read_text().splitlines()))
    assert [(row["gpus"], bool(row["days"]), bool(row["reason"])) for row in rows] == [
        ("4", True, False),
        ("8", True, False),
        ("19", False, True),
    ]
    assert all(path.stat().st_size > 500 for path in files.values())


def test_each_row_is_a_plan_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (row,) = answer(capsys, "--gpus", "8", "--memory", "60GB")["rows"]
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(row))
    assert run_command(["simulate", "--plan", str(file), "--json"]) == 0
    simulated = json.loads(capsys.readouterr().out)
    assert simulated["step_time_s"] == pytest.approx(row["step_time_s"], rel=1e-9)
    assert simulated["plan"] == row["plan"]


def test_the_answer_may_be_no(capsys: pytest.CaptureFixture[str]) -> None:
    late = answer(capsys, "--gpus", "4", "--deadline", "1h", status=1)
    assert late["answers"]["llama-3.2-1b"] == []
    assert late["rows"][0]["deadline_probability"] < 0.01
    assert answer(capsys, "--gpus", "4", "--budget", "$10", status=1)["rows"][0]["meets"] is False
    nothing = answer(capsys, "--gpus", "1", "--memory", "4GB", status=1)
    assert nothing["rows"] == []
    assert "no plan fits" in nothing["refused"][0]["reason"]
    assert run_command([*SMALL, "--gpus", "4", "--deadline", "1h"]) == 1
    text = capsys.readouterr().out
    assert "no cluster trains it within 1.0 h" in text
    days = late["rows"][0]["days"]
    assert f"fastest of all: 4 × h100-sxm-80gb, {days:.1f} (" in text
    hours, kwh = late["rows"][0]["gpu_hours"], late["rows"][0]["energy_kwh"]
    assert f" {hours:.1f} " in text or f" {hours / 1000:.1f}k " in text
    assert f" {kwh / 1000:.3g} " in text


def test_the_report_says_what_stands_behind_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([*SMALL, "--gpus", "4,8", "--top", "2", "--usd-per-gpu-hour", "1.5"]) == 0
    text = capsys.readouterr().out
    assert "1.50 USD a GPU-hour (given by the user)" in text
    assert "failures: every 50,677 h of a GPU; assumed: 10 min to detect" in text
    assert text.count("matrix FLOP/s first") == 4
    assert "cheapest:" in text
    assert "strong scaling of llama-3.2-1b on h100-sxm-80gb, global batch 64 throughout" in text


def test_failures_of_the_gpus_are_an_input(capsys: pytest.CaptureFixture[str]) -> None:
    (usual,) = answer(capsys, "--gpus", "8")["rows"]
    (worse,) = answer(capsys, "--gpus", "8", "--mtbf", "100h,detect=1h,spares=1,repair=2h")["rows"]
    assert worse["mtbf_s"] == pytest.approx(100 * 3600 / 8)
    assert worse["goodput"] < 0.95 < usual["goodput"]
    assert worse["gpu_hours"] == pytest.approx(16 * worse["days"] * 24)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "the number of GPUs is out of range"),
        (["--gpus", "8-4"], "the number of GPUs is out of range"),
        (["--gpus", "2000000"], "the number of GPUs is out of range"),
        (["--gpus", "many"], "--gpus"),
        (["--gpus", ","], "this names nothing"),
        (["--gpus", "4", "--tokens", "x"], "a training has some tokens"),
        (["--gpus", "4", "--tokens", "-1x"], "a training has some tokens"),
        (["--gpus", "4", "--tokens", "nanx"], "a training has some tokens"),
        (["--gpus", "4", "--tokens", "0"], "a training has some tokens"),
        (["--gpus", "4", "--deadline", "soon"], "--deadline"),
        (["--gpus", "4", "--deadline", "0 days"], "a deadline is some time away"),
        (["--gpus", "4", "--budget", "5 EUR"], "unknown unit of money"),
        (["--gpus", "4", "--mtbf", "419/54days"], "the failures of a job depend on its size"),
        (["--gpus", "4", "--mtbf", "100h,runs=5"], "goodput is a closed form here"),
        (["--gpus", "4", "--pue", "0.5"], "a facility draws at least what its servers do"),
        (["--gpus", "4", "--usd-per-gpu-hour", "-1"], "a price is some dollars"),
        (["--gpus", "4", "--chart", "chart.gif"], "unknown type of picture"),
        (["--gpus", "4", "--hardware", "h100"], "h100"),
        (["--gpus", "4", "--hardware", "local-cpu", "--budget", "1M"], "a budget needs prices"),
        (["--gpus", "4", "--vpp", "4", "--max-vpp", "2"], "--vpp and --max-vpp contradict each other"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert run_command([*SMALL, *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_an_interrupt_keeps_what_is_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[1])
        if args[1] == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return search(*args, **kwargs)

    monkeypatch.setattr(parsim.search.capacity, "search", interrupted)
    found = answer(capsys, "--gpus", "4-16", status=130)
    assert found["partial"]
    assert [row["gpus"] for row in found["rows"]] == [4]
    assert calls == [4, 8]
    # The handler is gone again.
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert run_command([*SMALL, "--gpus", "8,16"]) == 130
    assert capsys.readouterr().out == ""


def test_plans_are_narrowed_by_the_flags_of_plan(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--schedule 1f1b --micro-batch 1,2 --pp 2,4 --max-pp 2 --sequence-parallel true --dp 2,4"
    found = answer(capsys, "--gpus", "8", "--top", "12", *flags.split())
    plans = [row["plan"] for row in found["rows"]]
    assert {plan["dp"] for plan in plans} <= {2, 4}
    assert {plan["pp"] for plan in plans} == {2}
    assert {plan["micro_batch"] for plan in plans} == {1, 2}
    assert all(plan["sequence_parallel"] == (plan["tp"] > 1) for plan in plans)
    assert found["inputs"]["constraints"] == {
        "schedule": "1f1b", "micro_batch": "1,2", "pp": "2,4", "max_pp": 2,
        "sequence_parallel": "true", "dp": "2,4",
    }  # fmt: skip
