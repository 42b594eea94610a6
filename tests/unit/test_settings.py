"""Settings of the command line: which source wins, what may be set, and what an answer says of them."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from parsim.cli.main import run_command
from parsim.cli.settings import KEYS, variable

SIMULATE = ["simulate", "--plan", "dp=2,tp=4,zero=1", "--json"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder and a home without settings."""
    for key in KEYS:
        monkeypatch.delenv(variable(key), raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("parsim.cli.settings.user_file", lambda: tmp_path / "user.toml")


def shown(capsys: pytest.CaptureFixture[str], *before: str) -> dict[str, tuple[str | None, str]]:
    assert run_command([*before, "config", "show", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["settings"]
    return {row["key"]: (row["value"], row["origin"]) for row in rows}


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert run_command(list(words)) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_the_nearest_source_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "user.toml").write_text("top = 1\ngpus = 8\nseq-len = 1024\nmodel = 'user'\n")
    Path("pyproject.toml").write_text("[tool.parsim]\ntop = 2\ngpus = 16\nseq_len = 2048\n")
    found = shown(capsys)
    assert found["top"] == ("2", "pyproject.toml [tool.parsim]")
    assert found["model"] == ("user", str(tmp_path / "user.toml"))
    Path("parsim.toml").write_text("top = 3\ngpus = 32\n")
    monkeypatch.setenv("PARSIM_TOP", "4")
    found = shown(capsys)
    assert found["top"] == ("4", "PARSIM_TOP")
    assert found["gpus"] == ("32", "parsim.toml")
    assert found["seq_len"] == ("1024", str(tmp_path / "user.toml")), "parsim.toml hides [tool.parsim]"
    assert found["stack"] == (None, "not set")
    assert {origin for _, origin in shown(capsys, "--no-config").values()} == {"not set"}
    Path("other.toml").write_text("gpus = 64\n")
    found = shown(capsys, "--config-file", "other.toml")
    assert found["gpus"] == ("64", "other.toml")
    assert found["seq_len"][0] is None


def test_flags_win_and_the_command_line_repeats_the_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("parsim.toml").write_text(
        "model = 'llama-3.1-8b'\nhardware = 'h100-sxm-80gb'\nseq_len = 2048\n"
    )
    monkeypatch.setenv("PARSIM_GLOBAL_BATCH", "16")
    monkeypatch.setenv("PARSIM_SECRET", "hunter2")
    given = answer(capsys, *SIMULATE, "--seq-len", "4096")
    assert given["job"] | {"seq_len": 4096, "global_batch": 16} == given["job"]
    line = shlex.split(given["command_line"])
    assert "hunter2" not in json.dumps(given)
    assert line.count("--seq-len") == 1
    for key in ("PARSIM_GLOBAL_BATCH", "PARSIM_SECRET"):
        monkeypatch.delenv(key)
    Path("parsim.toml").unlink()
    again = answer(capsys, *line[1:])
    assert again["step_time_s"] == given["step_time_s"]
    assert again["job"] == given["job"]


def test_a_plan_file_beats_settings(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--model llama-3.1-8b --hardware h100-sxm-80gb --global-batch 8 --seq-len 2048".split()
    item = answer(capsys, *SIMULATE, *flags)
    Path("plan.json").write_text(json.dumps(item))
    settings = "model = 'gpt3-175b'\nhardware = 'a100-sxm-80gb'\nglobal_batch = 64\nseq_len = 1024\n"
    Path("parsim.toml").write_text(settings + "precision = 'fp8'\nmemory = '90GB'\nstack = 'nemo'\n")
    again = answer(capsys, "simulate", "--plan", "plan.json", "--json")
    for key in ("model", "hardware", "stack", "job", "step_time_s"):
        assert again[key] == item[key]
    assert again["command_line"] == "parsim simulate --plan plan.json --json"
    assert "model" not in again["inputs"]


def test_settings_stand_for_required_options(capsys: pytest.CaptureFixture[str]) -> None:
    Path("parsim.toml").write_text(
        "model = 'llama-3.1-8b'\nhardware = 'h100-sxm-80gb'\ngpus = 8\nglobal-batch = 32\ntop = 2\n"
    )
    found = answer(capsys, "plan", "--tp", "2", "--zero", "1", "--schedule", "1f1b", "--json")
    assert len(found["plans"]) == 2
    assert found["inputs"]["gpus"] == 8


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gpsu = 8", "did you mean 'gpus'"),
        ("output = 'x.json'", "there is no setting 'output'"),
        ("top = 'ten'", "parsim.toml: top"),
        ("top = 0", "1 or more"),
        ("budget_s = true", "a number, 0 or more"),
        ("budget_s = inf", "a number, 0 or more"),
        ("model = 7.5", "a text"),
        ("seq-len = 1\nseq_len = 2", "given twice"),
        ("top = ", "no valid TOML"),
    ],
)
def test_bad_settings(text: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("parsim.toml").write_text(text + "\n")
    for command in (["config", "show"], SIMULATE):
        assert run_command(command) == 2
        captured = capsys.readouterr()
        assert words in captured.err
        assert "parsim.toml" in captured.err
        assert captured.out == ""
    assert run_command(["doctor", "--help"]) == 0, "commands without settings do not care"


def test_an_error_names_the_settings_behind_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PARSIM_MODEL", "lama")
    assert run_command([*SIMULATE, "--hardware", "h100-sxm-80gb"]) == 2
    assert "model = lama (PARSIM_MODEL)" in capsys.readouterr().err
    monkeypatch.setenv("PARSIM_GPUS", "8")
    assert run_command(["simulate", "--plan", "dp=2", "--model", "lama"]) == 2
    assert "PARSIM" not in capsys.readouterr().err, "a flag won, and nobody asked for gpus"


def test_a_misspelt_variable_is_named_without_its_value(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PARSIM_MODLE", "hunter2")
    assert run_command(["config", "show"]) == 0
    captured = capsys.readouterr()
    assert "PARSIM_MODLE is no setting; did you mean 'PARSIM_MODEL'?" in captured.err
    assert "hunter2" not in captured.err + captured.out


def test_defaults_of_a_command_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["config", "show", "capacity", "--json"]) == 0
    rows = {row["key"]: row for row in json.loads(capsys.readouterr().out)["settings"]}
    assert rows["top"] == {"key": "top", "value": "1", "origin": "default"}
    assert "processes" not in rows
    assert run_command(["config", "show", "run"]) == 2
    assert "takes no settings" in capsys.readouterr().err
