"""`parsim simulate --ps`: its settings, its answer and its chart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from parsim.cli.main import run_command

SMALL = "simulate --model tiny-llama-8l --hardware a100-sxm-80gb".split()


def item(capsys: pytest.CaptureFixture[str], ps: str, *more: str, plan: str = "tp=2") -> dict[str, Any]:
    assert run_command([*SMALL, "--plan", plan, "--ps", ps, *more, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def answer(
    capsys: pytest.CaptureFixture[str], ps: str, *more: str, plan: str = "tp=2"
) -> dict[str, Any]:
    found: dict[str, Any] = item(capsys, ps, *more, plan=plan)["parameter_server"]
    return found


def test_workers_are_the_replicas_of_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    document = item(capsys, "workers=4,servers=2")
    assert document["plan"]["dp"] == 4
    found = document["parameter_server"]
    assert (found["workers"], found["servers"], found["mode"], found["bound"]) == (4, 2, "sync", 0)
    assert found == answer(capsys, "servers=2", plan="tp=2,dp=4")
    per_step = document["job"]["global_batch"] / 4
    assert found["samples_per_s"] == pytest.approx(found["worker_steps_per_s"] * per_step)
    assert found["tokens_per_s"] == pytest.approx(found["samples_per_s"] * document["job"]["seq_len"])
    assert found["step_time_s"] == pytest.approx(4 / found["worker_steps_per_s"])
    assert len(found["compute_s"]) == 4
    assert sum(found["worker_time"].values()) == pytest.approx(1)
    assert found["staleness"]["max"] == 0


def test_modes(capsys: pytest.CaptureFixture[str]) -> None:
    common = "workers=8,servers=8,jitter=0.3,server_nic=1TB/s"
    synchronous = answer(capsys, common)
    stale = answer(capsys, f"{common},mode=ssp,bound=2")
    free = answer(capsys, f"{common},mode=async")
    rates = [found["worker_steps_per_s"] for found in (synchronous, stale, free)]
    assert rates == sorted(rates)
    assert rates[0] < rates[2]
    assert answer(capsys, f"{common},mode=ssp,bound=0") == synchronous | {"mode": "ssp"}
    far = answer(capsys, f"{common},mode=ssp,bound=1000")
    assert far | {"mode": "async", "bound": None, "limits": free["limits"]} == free
    assert stale["max_lead"] <= 3
    assert free["staleness"]["mean"] > 0
    assert sum(free["staleness"]["histogram"].values()) == 8 * 40 * 8
    by_worker = free["staleness"]["by_worker"]
    assert max(own["max"] for own in by_worker) == free["staleness"]["max"]
    assert answer(capsys, f"{common},mode=async", "--seed", "1") != free


def test_servers_limit_what_workers_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    """A slow link at one server: all that a step moves over that link, both ways in turn."""
    few = answer(capsys, "workers=8,servers=1,server_nic=100MB/s,server_memory=100TB/s")
    (pull_bytes,) = few["shards_bytes"]
    moved_s, compute_s = 8 * 3 * pull_bytes / 100e6, few["compute_s"][0]
    assert few["step_time_s"] == pytest.approx(compute_s + moved_s, rel=1e-4)
    assert few["limits"]["servers"] == pytest.approx(100e6 / (2 * pull_bytes))
    assert few["link_utilisation"]["server_receive"] == pytest.approx(2 / 3, rel=0.02)
    many = answer(capsys, "workers=8,servers=4,server_nic=100MB/s,server_memory=100TB/s")
    assert many["step_time_s"] == pytest.approx(compute_s + moved_s / 4, rel=1e-4)
    uneven = answer(capsys, "workers=8,shards=2-1-1,server_nic=100MB/s,server_memory=100TB/s")
    assert uneven["step_time_s"] == pytest.approx(compute_s + moved_s / 2, rel=1e-4)
    slow_memory = answer(capsys, "workers=8,server_memory=1GB/s")
    assert slow_memory["step_time_s"] > answer(capsys, "workers=8")["step_time_s"]


def test_stragglers(capsys: pytest.CaptureFixture[str]) -> None:
    """Rank 5 is in worker 2; asynchronous servers go on without it."""
    slow = ("--straggler", "rank=5,slow=4")
    common = "workers=8,servers=8,server_nic=1TB/s,server_memory=100TB/s"
    synchronous = answer(capsys, common, *slow)
    compute_s = synchronous["compute_s"]
    assert compute_s[2] > 2 * compute_s[0]
    assert all(compute_s[worker] == compute_s[0] for worker in (0, 1, 3, 4, 5, 6, 7))
    free = answer(capsys, f"{common},mode=async", *slow)
    assert free["worker_steps_per_s"] == pytest.approx(free["limits"]["workers"], rel=0.02)
    assert synchronous["worker_steps_per_s"] == pytest.approx(synchronous["limits"]["workers"], rel=0.02)
    assert free["worker_steps_per_s"] > 1.5 * synchronous["worker_steps_per_s"]
    link = answer(capsys, common, "--straggler", "rank=5,link=50")
    assert link["step_time_s"] > 1.5 * answer(capsys, common)["step_time_s"]
    assert link["all_reduce_step_time_s"] > answer(capsys, common)["all_reduce_step_time_s"]


def test_text_and_chart(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "ps.svg"
    command = [*SMALL, "--plan", "tp=2", "--ps", "workers=6,mode=ssp,bound=2", "--ps-chart", str(path)]
    assert run_command(command) == 0
    captured = capsys.readouterr()
    assert str(path) in captured.err
    assert "stale synchronous, bound 2" in captured.out
    first = path.read_bytes()
    assert run_command(command) == 0
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--plan tp=2 --ps worker=4", ["did you mean 'workers'"]),
        ("--plan tp=2 --ps workers=0", ["--ps", "workers"]),
        ("--plan tp=2 --ps workers=4,mode=fast", ["sync, async, ssp"]),
        ("--plan tp=2 --ps workers=4,mode=ssp", ["bound"]),
        ("--plan tp=2 --ps workers=4,bound=3", ["mode=ssp"]),
        ("--plan tp=2 --ps workers=4,mode=ssp,bound=-1", ["bound"]),
        ("--plan tp=2 --ps workers=4,servers=2,shards=1-1-1", ["3 shards"]),
        ("--plan tp=2 --ps workers=4,shards=1-x", ["shards"]),
        ("--plan tp=2 --ps workers=4,shards=1-0", ["shards"]),
        ("--plan tp=2 --ps workers=4,jitter=nan", ["jitter"]),
        ("--plan dp=2 --ps workers=4", ["dp = 2"]),
        ("--plan dp=4,zero=1 --ps workers=4", ["zero=0"]),
        ("--plan pp=2,schedule=dualpipe --ps workers=2", ["dualpipe"]),
        ("--plan dp=4,compression=fp16 --ps workers=4", ["compression=none"]),
        ("--plan dp=2 --ps servers=2 --jitter 0.1", ["--jitter"]),
        ("--plan dp=2 --ps servers=2 --seed -1", ["seed"]),
        ("--plan dp=2 --ps-chart x.png", ["--ps"]),
    ],
)
def test_bad_settings(capsys: pytest.CaptureFixture[str], arguments: str, words: list[str]) -> None:
    assert run_command([*SMALL, *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert all(word in captured.err for word in words), captured.err
