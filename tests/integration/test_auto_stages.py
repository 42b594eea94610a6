"""`stage_split=auto` and `recompute_layers=auto`, as a user types them."""

import json
from pathlib import Path

import pytest

from parsim.cli.main import run_command
from parsim.cost.memory import ENOUGH_HEADROOM

SEVENTY_B = "--model llama-3.1-70b --hardware h100-sxm-80gb --seq-len 4096".split()


def simulate(capsys: pytest.CaptureFixture[str], plan: str, *more: str, status: int = 0) -> dict:  # type: ignore[type-arg]
    assert run_command(["simulate", *SEVENTY_B, "--plan", plan, "--json", *more]) == status
    found: dict = json.loads(capsys.readouterr().out)  # type: ignore[type-arg]
    return found


def test_the_rank_with_the_head_gets_fewer_layers(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plan = "tp=8,pp=8,zero=1"
    usual = simulate(capsys, plan, "--global-batch", "64")
    auto = simulate(capsys, f"{plan},stage_split=auto", "--global-batch", "64")
    assert auto["step_time_s"] < usual["step_time_s"]
    assert (
        auto["plan"]["stage_split"] == auto["stage_layers"] == auto["partition"]["after"]["stage_layers"]
    )
    assert sum(auto["stage_layers"]) == 80
    assert auto["stage_layers"][-1] == 9
    assert auto["partition"]["before"]["slowest_rank"] == 7
    assert auto["partition"]["why"].startswith("rank 7 was slowest")
    # The plan file holds the numbers, and needs no choice any more.
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(auto))
    again = simulate(capsys, str(path))
    assert again["step_time_s"] == auto["step_time_s"]
    assert "partition" not in again


def test_as_few_layers_are_recomputed_as_leave_enough_memory(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = "tp=4,pp=4,zero=0,recompute=full"
    whole = simulate(capsys, plan, "--memory", "100GB")
    auto = simulate(capsys, f"{plan},recompute_layers=auto", "--memory", "100GB")
    none = simulate(capsys, plan.replace("full", "none"), "--memory", "100GB", status=1)
    counts = auto["plan"]["recompute_layers"]
    assert none["step_time_s"] < auto["step_time_s"] < whole["step_time_s"]
    assert auto["fits"]
    # 1F1B keeps more micro-batches the nearer a rank is to the start.
    assert counts == sorted(counts, reverse=True)
    assert 0 == counts[-1] < counts[0] <= 20
    fewer = "-".join(map(str, (counts[0] - 1, *counts[1:])))
    more = simulate(capsys, f"{plan},recompute_layers={fewer}", "--memory", "100GB")
    needed = [item["memory_bytes"]["peak"] + item["memory_bytes"]["context"] for item in (auto, more)]
    assert needed[0] <= 100e9 * (1 - ENOUGH_HEADROOM) < needed[1]


def test_counts_leave_what_they_can(capsys: pytest.CaptureFixture[str]) -> None:
    # With everything recomputed there is less than enough to spare: then all of it may be filled.
    plan = "tp=4,pp=4,zero=0,recompute=full"
    memory = simulate(capsys, plan, "--memory", "100GB")["memory_bytes"]
    tight = f"{(memory['peak'] + memory['context']) * 1.03 / 1e9:.3f}GB"
    auto = simulate(capsys, f"{plan},recompute_layers=auto", "--memory", tight)
    assert auto["fits"]
    assert sum(auto["plan"]["recompute_layers"]) < 80


def test_slower_ranks_get_fewer_layers(capsys: pytest.CaptureFixture[str]) -> None:
    others = ["--rank-hardware", "2-3=a100-sxm-80gb"]
    plan = "tp=8,pp=4,zero=1"
    usual = simulate(capsys, plan, *others)
    auto = simulate(capsys, f"{plan},stage_split=auto", *others)
    assert auto["step_time_s"] < 0.8 * usual["step_time_s"]
    assert max(auto["stage_layers"][2:]) < min(auto["stage_layers"][:2])


def test_where_nothing_fits_the_answer_is_no_and_says_which_rank(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = "tp=1,pp=4,recompute=full,stage_split=auto,recompute_layers=auto"
    answer = simulate(capsys, plan, status=1)
    after = answer["partition"]["after"]
    assert not answer["fits"]
    assert answer["partition"]["why"].startswith(
        f"nothing fits: at the least rank {after['fullest_rank']} needs "
    )
    assert max(after["rank_bytes"]) == pytest.approx(
        answer["memory_bytes"]["peak"] + answer["memory_bytes"]["context"]
    )


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("pp=4,stage_split=auto,stage_split=20-20-20-20", "'stage_split' is given twice"),
        ("pp=4,stage_split=auto,stage_split=auto", "'stage_split' is given twice"),
        ("pp=4,recompute_layers=auto", "needs a way to recompute"),
        ("pp=4,vpp=auto", "whole number"),
    ],
)
def test_what_cannot_be_chosen_is_said(
    capsys: pytest.CaptureFixture[str], plan: str, message: str
) -> None:
    assert run_command(["simulate", *SEVENTY_B, "--plan", plan]) == 2
    assert message in capsys.readouterr().err


def test_an_exported_plan_is_said_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    plan = "tp=8,pp=8,stage_split=auto"
    assert run_command(["export", plan, "--to", "schedule-csv", *SEVENTY_B]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("0F0,")
    assert "stage_split   10-" in captured.err


def test_text_says_what_was_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    for plan, said in (
        ("tp=8,pp=8,stage_split=auto", "instead of 10x8"),
        ("tp=8,dp=2,zero=1,recompute=full,stage_split=auto", "80: without a pipeline"),
        ("tp=8,pp=4,vpp=2,schedule=interleaved,stage_split=auto", "share its memory"),
        ("tp=8,pp=8,recompute=full,recompute_layers=auto", "no layer: all fit without"),
    ):
        run_command(["simulate", *SEVENTY_B, "--plan", plan])
        assert said in capsys.readouterr().out
