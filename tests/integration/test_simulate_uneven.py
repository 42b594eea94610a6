"""`parsim simulate` with ranks that are not alike, as a user types it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parsim.cli.main import run_command

SEVENTY_B = (
    "simulate --model llama-3.1-70b --hardware h100-sxm-80gb --global-batch 32 "
    "--plan dp=4,tp=8,pp=4,recompute=full,zero=1 --json"
).split()


def item(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:  # type: ignore[type-arg]
    status = run_command([*SEVENTY_B, *arguments])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return json.loads(captured.out)


def test_a_straggler_is_told_with_what_it_costs(capsys: pytest.CaptureFixture[str]) -> None:
    even = item(capsys)
    slow = item(capsys, "--straggler", "rank=127,slow=1.5")
    assert slow["unevenness"]["even_step_time_s"] == pytest.approx(even["step_time_s"])
    assert slow["unevenness"]["stragglers"] == [{"rank": 127, "slow": 1.5, "link": 1.0}]
    assert slow["unevenness"]["replica_groups"] == 2
    # The last stage with its head is the slowest as it is: it paces every micro-batch.
    assert 1.3 < slow["unevenness"]["slowdown"] < 1.5
    assert sum(slow["breakdown_s"].values()) == pytest.approx(slow["step_time_s"])
    assert "unevenness" not in even


def test_random_stragglers_and_jitter_follow_the_seed(capsys: pytest.CaptureFixture[str]) -> None:
    drawn = ["--straggler", "count=3,slow=1.2", "--jitter", "0.03", "--seed"]
    one, again, other = (item(capsys, *drawn, seed) for seed in ("1", "1", "2"))
    assert one == again
    assert one["seed"] == 1
    assert one["unevenness"]["stragglers"] != other["unevenness"]["stragglers"]
    assert one["unevenness"]["replica_groups"] == 4


def test_other_devices_for_some_ranks_are_kept_in_a_plan_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    mixed = item(capsys, "--rank-hardware", "2-3=a100-sxm-80gb")
    assert mixed["step_time_s"] > item(capsys)["step_time_s"]
    path = tmp_path / "mixed.json"
    path.write_text(json.dumps(mixed))
    assert run_command(["simulate", "--plan", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step_time_s"] == mixed["step_time_s"]


def test_a_trace_has_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    traces = []
    for hash_seed in ("1", "2"):
        path = tmp_path / f"{hash_seed}.json"
        command = [*SEVENTY_B, "--jitter", "0.02", "--straggler", "rank=3,link=2", "--trace", str(path)]
        subprocess.run(
            [sys.executable, "-m", "parsim", *command],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
        )
        traces.append(path.read_bytes())
    assert traces[0] == traces[1]
    assert b"dp 0 pp 0" in traces[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--global-batch", "100000000"], "too many actions"),
        (["--ps", "workers=4,steps=1000000"], "at most 312500 steps"),
        (["--mtbf", "1e300h"], "millions of years"),
    ],
)
def test_what_would_take_for_ever_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    plan = "simulate --model llama-3.1-8b --hardware h100-sxm-80gb --plan dp=4,tp=8".split()
    assert run_command([*plan, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--straggler", "rank=128,slow=2"], "no such rank"),
        (["--straggler", "slow=2"], "rank=7,slow=1.3"),
        (["--straggler", "rank=1,slo=2"], "did you mean 'slow'"),
        (["--straggler", "count=4"], "how much slower"),
        (["--straggler", "count=200,slow=2"], "not so many ranks"),
        (["--straggler", "rank=1,slow=nan"], "1 to 1000"),
        (["--jitter", "2"], "--jitter"),
        (["--rank-hardware", "2-4=a100-sxm-80gb"], "0 to 3"),
        (["--rank-hardware", "a100-sxm-80gb"], "8-15=a100-sxm-80gb"),
        (["--rank-hardware", "0=a100"], "a100"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert run_command([*SEVENTY_B, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
