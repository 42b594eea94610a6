"""`parsim sweep` from the command line: one answer from any workers, and what an interrupt leaves."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from parsim.cli.main import run_command
from parsim.config import load_cluster

SWEEP = (
    "sweep --model tiny-llama-8l,tiny-gpt-8l --hardware h100-sxm-80gb --gpus 2,4,19 --global-batch 8 "
    "--schedule 1f1b --zero 0"
).split()


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def swept(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> tuple[str, str]:
    """The JSON and the CSV of a sweep."""
    assert run_command([*SWEEP, *words, "--csv", "rows.csv", "--json"]) == status
    return answered(capsys), Path("rows.csv").read_text()


def answered(capsys: pytest.CaptureFixture[str]) -> str:
    """The document on stdout, but for the one line with the command, which says how it was asked."""
    lines = capsys.readouterr().out.splitlines(keepends=True)
    answer = [line for line in lines if not line.startswith('  "command_line": "parsim sweep ')]
    assert len(answer) == len(lines) - 1
    return "".join(answer)


def sessions() -> dict[int, list[str]]:
    """Commands of processes by the session they belong to."""
    found: dict[int, list[str]] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, session = (process / "stat").read_text().rpartition(")")[2].split()[:4]
            if state != "Z":
                found.setdefault(int(session), []).append((process / "cmdline").read_text())
        except OSError:
            continue
    return found


def test_processes_and_one_process_give_the_same_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    one = swept(capsys, "--jobs", "1")
    assert swept(capsys, "--jobs", "2", "-o", "two.jsonl") == one
    document = json.loads(one[0])
    assert document["counts"] == {"ok": 4, "no_plan": 2}
    assert [(row["scenario"]["model"], row["scenario"]["gpus"]) for row in document["rows"]] == [
        (model, gpus) for model in ("tiny-llama-8l", "tiny-gpt-8l") for gpus in (2, 4, 19)
    ]
    rows = list(csv.DictReader(one[1].splitlines()))
    assert [bool(row["best_plan"]) for row in rows] == 2 * [True, True, False]
    assert "no plan is legal" in rows[2]["reason"]
    files = [sorted(Path(name).read_text().splitlines()) for name in ("sweep.jsonl", "two.jsonl")]
    assert files[0] == files[1]


def test_a_dask_cluster_gives_the_same_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    distributed = pytest.importorskip("distributed", reason="parsim[dask] is not installed")
    one = swept(capsys, "--jobs", "1")
    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with cluster:
        address = ("--backend", "dask", "--address", cluster.scheduler_address)
        assert swept(capsys, *address, "-o", "dask.jsonl") == one


def test_a_row_is_what_plan_says_and_a_plan_file(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = json.loads(swept(capsys, "--model", "tiny-llama-8l", "--gpus", "4", "--jobs", "1")[0])[
        "rows"
    ]
    words = "plan --model tiny-llama-8l --hardware h100-sxm-80gb --gpus 4 --global-batch 8 --zero 0"
    assert run_command([*words.split(), "--schedule", "1f1b", "--top", "1", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    # How plans stand to each other is what `plan` adds.
    plans = [{key: item[key] for key in row["plans"][0]} for item in planned["plans"]]
    assert (row["plans"], row["space"]) == (plans, planned["space"])
    Path("plan.json").write_text(json.dumps(row))
    again = ["sweep", "--plan", "plan.json", "-o", "again.jsonl", "--jobs", "1", "--json"]
    assert run_command(again) == 0
    (simulated,) = json.loads(capsys.readouterr().out)["rows"]
    assert simulated["plans"][0]["step_time_s"] == pytest.approx(row["plans"][0]["step_time_s"])


def test_resuming_does_what_is_missing_torn_or_changed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import parsim.search.sweep as module

    Path("mine.toml").write_text((Path(__file__).parents[2] / "models/tiny-gpt-8l.toml").read_text())
    words = ("--model", "tiny-llama-8l,mine.toml", "--jobs", "1")
    whole = swept(capsys, *words)
    asked: list[str] = []
    plain = module.answer

    def counted(scenario: module.Scenario) -> dict[str, object]:
        asked.append(f"{scenario.settings['model']} {scenario.settings['gpus']}")
        return plain(scenario)

    monkeypatch.setattr(module, "answer", counted)
    assert run_command([*SWEEP, *words]) == 2
    assert "--resume" in capsys.readouterr().err
    path = Path("sweep.jsonl")
    path.write_bytes(path.read_bytes()[:-3])
    assert swept(capsys, *words, "--resume") == whole
    assert asked == ["mine.toml 19"]
    assert swept(capsys, *words, "--resume") == whole
    assert asked == ["mine.toml 19"]
    changed = Path("mine.toml").read_text().replace("layers = 8", "layers = 12")
    assert changed != Path("mine.toml").read_text()
    Path("mine.toml").write_text(changed)
    assert run_command([*SWEEP, *words, "--resume"]) == 0
    assert "3 run again: another model" in capsys.readouterr().err
    assert asked[1:] == ["mine.toml 2", "mine.toml 4", "mine.toml 19"]
    assert len(path.read_text().splitlines()) == 9


def test_the_table_has_what_differs_and_no_plan_at_all_is_a_no(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_command([*SWEEP, "--jobs", "1", "--chart", "sweep.png"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("hardware h100-sxm-80gb, global_batch 8, zero 0, schedule 1f1b")
    assert "tiny-gpt-8l" in out
    assert "6 scenarios: 4 with a plan, 2 without any plan" in out
    assert Path("sweep.png").stat().st_size > 1000
    swept(capsys, "--gpus", "19", "--jobs", "1", "-o", "none.jsonl", status=1)


def test_an_interrupt_leaves_no_process_and_a_file_to_go_on_with(
    capsys: pytest.CaptureFixture[str],
) -> None:
    batches = ",".join(str(8 * i) for i in range(1, 400))
    words = [*SWEEP, "--model", "tiny-llama-8l", "--gpus", "4", "--global-batch", batches]
    command = [sys.executable, "-m", "parsim", *words, "--jobs", "2"]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        path = Path("sweep.jsonl")
        while not path.exists() or path.read_bytes().count(b"\n") < 2:
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume goes on" in said
    assert "Traceback" not in said
    deadline = time.monotonic() + 10
    while process.pid in sessions() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sessions().get(process.pid, []) == []
    done = path.read_bytes().count(b"\n")
    few = [*words[:-1], ",".join(batches.split(",")[:5])]
    assert run_command([*few, "--jobs", "1", "--resume", "--json"]) == 0
    resumed = answered(capsys)
    assert run_command([*few, "--jobs", "1", "-o", "whole.jsonl", "--json"]) == 0
    assert answered(capsys) == resumed
    assert 2 <= done <= path.read_bytes().count(b"\n")


def test_prices_give_dollars_for_a_million_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    Path("prices.csv").write_text("hardware,usd_per_gpu_hour\nh100-sxm-80gb,$3.60\n")
    command = (
        "sweep --model tiny-llama-8l --hardware h100-sxm-80gb,a100-sxm-80gb --plan dp=2 --jobs 1 "
        "--prices prices.csv --csv rows.csv"
    ).split()
    assert run_command([*command, "--json"]) == 0
    items = [row["plans"][0] for row in json.loads(capsys.readouterr().out)["rows"]]
    priced, other = sorted(items, key=lambda item: item["hardware"], reverse=True)
    # 3.60 dollars an hour are a tenth of a cent a second, for two GPUs two tenths.
    tokens_per_s = 2 * priced["tokens_per_s_per_gpu"]
    assert priced["usd_per_million_tokens"] == pytest.approx(0.002 * 1e6 / tokens_per_s)
    # Hardware that the file does not name costs what its profile says.
    own = load_cluster("a100-sxm-80gb").price
    assert own is not None
    gpu_hours = 1e6 / other["tokens_per_s_per_gpu"] / 3600
    assert other["usd_per_million_tokens"] == pytest.approx(gpu_hours * own.usd_per_gpu_hour)
    rows = list(csv.DictReader(Path("rows.csv").read_text().splitlines()))
    assert float(rows[0]["usd_per_million_tokens"]) == pytest.approx(priced["usd_per_million_tokens"])
    assert run_command([*command, "--resume"]) == 0
    assert "USD/Mtoken" in capsys.readouterr().out
    unfit = [*command[:-2], "--memory", "1MB", "-o", "unfit.jsonl", "--json"]
    run_command(unfit)
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["status"] for row in rows} == {"does_not_fit"}
    assert {row["plans"][0]["usd_per_million_tokens"] for row in rows} == {None}
