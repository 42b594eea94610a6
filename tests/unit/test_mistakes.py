"""Names that are nearly right, and completion of names: what the command line offers instead."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parsim.cli.main import run_command
from parsim.cli.run_launch import say_shared_cores
from parsim.config import load_model
from parsim.execute.launch.attempts import Launch
from parsim.execute.request import Case
from parsim.plan import Job, ParallelPlan
from parsim.schedule import make_schedule

EIGHT_B = "--model llama-3.1-8b --hardware h100-sxm-80gb"
PLAN = f"plan {EIGHT_B} --gpus 8 --global-batch 8"


@pytest.mark.parametrize(
    ("command", "offered"),
    [
        ("simulat", "simulate"),
        ("config sho", "show"),
        ("config show simulat", "simulate"),
        ("plan --modell x", "--model"),
        ("plan --hardwear x", "--hardware"),
        ("--no-confg plan", "--no-config"),
        ("simulate --gpus 8", "option of parsim plan, capacity, sweep"),
        ("plan --no-config", "parsim --no-config plan"),
        ("simulate --plan dp=1 dp=2", "--plan dp=2"),
        ("models llama3-70b", "llama-3.1-70b"),
        ("models meta-llama/Llama-3.1-70B", "llama-3.1-70b"),
        ("hardware h100", "h100-sxm-80gb"),
        ("hardware H100-80GB", "h100-sxm-80gb"),
        ("hardware A100-80GB", "a100-pcie-80gb"),
        (f"{PLAN} --stack megatron-core", "megatron-core-2025"),
        (f"{PLAN} --precision bf61", "bf16"),
        (f"{PLAN} --schedule 1f1", "1f1b"),
        (f"{PLAN} --recompute ful", "full"),
        (f"{PLAN} --placement tp-cp-pp", "tp-cp-pp-dp"),
        (f"{PLAN} --sequence-parallel tru", "true"),
        (f"compare-schedules {EIGHT_B} --plan dp=2 --schedule zvb", "zbv"),
        (f"simulate {EIGHT_B} --plan dp=2,micro_bach=2", "micro_batch"),
        (f"simulate {EIGHT_B} --plan dp=2,schedule=zvb", "zbv"),
        (f"simulate {EIGHT_B} --plan dp=2,recompute=ful", "full"),
        (f"simulate {EIGHT_B} --plan dp=2 --fabric fat-tre", "fat-tree"),
        (f"simulate {EIGHT_B} --plan dp=2 --straggler rnk=1,slow=2", "rank"),
        (f"export dp=2 {EIGHT_B} --to megatrn", "megatron"),
        ("run dp=2 --model tiny-lama-8l", "tiny-llama-8l"),
        ("models llama-3.1-8b --prune layer=0.5", "layers"),
        ("sweep --backend dsk", "dask"),
        ("collective --kind all-reduc --bytes 1MB --ranks 8 --hardware h100-sxm-80gb", "all_reduce"),
    ],
)  # fmt: skip
def test_a_name_that_is_nearly_right(
    command: str, offered: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["--no-config", *command.split()]) == 2
    captured = capsys.readouterr()
    hints = captured.err.partition("hint:")[2] or captured.err.partition("Did you mean")[2]
    assert offered in hints
    assert captured.out == ""
    assert "Traceback" not in captured.err


def test_keys_of_a_plan_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"plan": {"dp": 2, "micro_bach": 1}}))
    assert run_command(["simulate", *EIGHT_B.split(), "--plan", str(path)]) == 2
    assert "did you mean 'micro_batch'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("parsim plan --model tiny-l", {"tiny-llama-8l", "tiny-llama-16l"}),
        ("parsim capacity --hardware h100-sxm-80gb,h2", {"h100-sxm-80gb,h200-sxm-141gb"}),
        ("parsim simulate --stack torcht", {"torchtitan", "torchtitan-2024"}),
        ("parsim plan --schedule 1f1b,zb-", {"1f1b,zb-h1", "1f1b,zb-h2"}),
    ],
)
def test_bash_completes_names(typed: str, offered: set[str]) -> None:
    assert completed("bash", typed) == offered


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_complete_names(shell: str) -> None:
    assert {"zb-h1", "zb-h2"} <= completed(shell, "parsim simulate --schedule zb-")


def completed(shell: str, typed: str) -> set[str]:
    """What the shell is offered, by the protocol of the script that --show-completion prints."""
    heavy = ("numpy", "parsim.config", "rich")
    code = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print(sorted(set({heavy}) & set(sys.modules)), file=sys.stderr))\n"
        "from parsim.cli.main import run_command; run_command([])"
    )
    protocol = {
        "bash": {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)},
        "zsh": {"_TYPER_COMPLETE_ARGS": typed},
        "fish": {"_TYPER_COMPLETE_ARGS": typed, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **protocol, "_PARSIM_COMPLETE": f"complete_{shell}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.strip().endswith("[]"), done.stderr
    words = done.stdout.replace('"', " ").replace("'", " ").split()
    return {word for word in words if word not in ("_arguments", "*:", ":", "((", "))")}


DOCUMENT = Path(__file__).parents[2] / "docs" / "errors.md"
BLOCKS = [block.partition("```")[0] for block in DOCUMENT.read_text().split("```console\n$ parsim ")[1:]]


@pytest.fixture
def _folder_of_a_new_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the documented mistakes are made with: an answer of another command, a folder of weights."""
    row = {"plan": {"dp": 1}}
    answers = {
        "capacity": {"rows": [row]},
        "validate": {"rows": [{"id": "1"}]},
        "models": {"models": []},
    }
    for command, answer in answers.items():
        text = json.dumps({"schema_version": 1, "command": command} | answer)
        (tmp_path / f"{command}.json").write_text(text)
    (tmp_path / "Llama-3.1-8B").mkdir()
    (tmp_path / "Llama-3.1-8B" / "model.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_folder_of_a_new_user")
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split()[0])
def test_the_documented_messages(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, _, message = block.partition("\n")
    assert run_command(["--no-config", *command.split()]) == 2
    assert _own_words(capsys.readouterr().err) == _own_words(message)


def _own_words(message: str) -> list[str]:
    """The lines that are not click's, whose words differ from release to release."""
    lines = message.strip().splitlines()
    return [line for line in lines if line and not line.startswith(("Usage:", "Try ", "Error: "))]


def test_all_mistakes_are_documented() -> None:
    assert len(BLOCKS) == 16


def test_a_folder_of_hugging_face_is_a_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = json.loads((Path(__file__).parent / "huggingface_configs.json").read_text())
    config = configs["llama-2-7b"]["config"]
    (tmp_path / "my-llama").mkdir()
    (tmp_path / "my-llama" / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    for name in ("my-llama", "./my-llama/", str(tmp_path / "my-llama" / "config.json")):
        assert run_command(["models", name, "--json"]) == 0
        (model,) = json.loads(capsys.readouterr().out)["models"]
        assert (model["name"], model["layers"]) == ("my-llama", config["num_hidden_layers"])


@pytest.mark.parametrize("command", ["run dp=1 --model tiny-llama-8l", "calibrate -o here.toml"])
def test_without_torch_one_is_told_how_to_install_it(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    absent = lambda name, *rest: None if name == "torch" else found(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    monkeypatch.chdir(tmp_path)
    assert run_command(["--no-config", *command.split()]) == 2
    assert "hint:     pip install 'parsim[torch]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_more_ranks_than_cores_are_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parsim.execute.launch.attempts.usable_cores", lambda: [0, 1])
    how, plan = Launch(device="cpu"), ParallelPlan(dp=8)
    job = Job(model=load_model("tiny-llama-8l"), seq_len=128, global_batch=16)
    say_shared_cores(Case(job=job, plan=plan, schedule=make_schedule(plan, 2), steps=1), how)
    assert "8 ranks share 2 cores" in capsys.readouterr().err
    few = ParallelPlan(dp=2)
    say_shared_cores(Case(job=job, plan=few, schedule=make_schedule(few, 8), steps=1), how)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("gpus", "said"),
    [
        ("12", "12 GPUs are 1 node of 8 and 4 GPUs of another"),
        ("17", "17 GPUs are 2 nodes of 8 and 1 GPU of another"),
    ],
)
def test_gpus_that_are_no_whole_nodes_are_said(
    capsys: pytest.CaptureFixture[str], gpus: str, said: str
) -> None:
    command = f"plan {EIGHT_B} --global-batch {gpus} --schedule 1f1b --budget-s 1 --top 1 --gpus {gpus}"
    assert run_command(["--no-config", *command.split()]) == 0
    assert said in capsys.readouterr().err
