"""The Python API: the command line's answers, and names that modules have too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import parsim
from parsim.cli.main import run_command
from parsim.config import load_stack
from parsim.cost.host import stack_on
from parsim.errors import ParsimError
from parsim.search.space import Constraints
from parsim.setup import Flags, load_machine

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_answers_are_those_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    text = "dp=2,tp=4,zero=1"
    prediction, timeline = parsim.simulate(text, model="llama-3.1-8b", hardware="h100-sxm-80gb")
    command = f"--no-config simulate --plan {text} --model llama-3.1-8b --hardware h100-sxm-80gb --json"
    assert run_command(command.split()) == 0
    item = json.loads(capsys.readouterr().out)
    mine = json.loads(parsim.to_json(prediction))
    assert {key: item[key] for key in mine} == mine
    assert timeline.end_s == pytest.approx(prediction.step_time_s)
    result = parsim.plan(
        model="llama-3.1-8b", hardware="h100-sxm-80gb", gpus=4, global_batch=8, top=2, budget_s=5
    )
    assert len(parsim.to_data(result)["plans"]) == 2
    with pytest.raises(ParsimError, match="unknown model"):
        parsim.simulate("dp=2", model="lama", hardware="h100-sxm-80gb")


def test_capacity_is_the_command_lines(capsys: pytest.CaptureFixture[str]) -> None:
    found = parsim.capacity(
        model="llama-3.1-8b", hardware="h100-sxm-80gb", gpus=[8, 16], tokens="1B", budget_usd=1e5,
        global_batch=16, constraints=Constraints(schedule=("1f1b",)),
    )  # fmt: skip
    command = (
        "--no-config capacity --model llama-3.1-8b --hardware h100-sxm-80gb --gpus 8,16 --tokens 1B "
        "--budget 100k --global-batch 16 --schedule 1f1b --json"
    )
    assert run_command(command.split()) == 0
    document = json.loads(capsys.readouterr().out)
    mine = json.loads(parsim.to_json(found))
    assert {key: document[key] for key in mine} == mine
    (answers,) = found.answers.values()
    assert answers[0].objective == "cheapest"
    assert mine["answers"]["llama-3.1-8b"][0]["row"] == found.options.index(answers[0].choice)


def test_a_plan_file_says_model_hardware_and_job(tmp_path: Path) -> None:
    given = {"model": "tiny-llama-8l", "hardware": "local-cpu", "global_batch": 4}
    prediction, _ = parsim.simulate("dp=2", **given)  # type: ignore[arg-type]
    path = tmp_path / "plan.json"
    origin = {"hardware": "local-cpu", "stack": "parsim-executor"}
    path.write_text(json.dumps(parsim.to_data(prediction) | origin))
    again, _ = parsim.simulate(str(path))
    assert parsim.to_data(again) == parsim.to_data(prediction)
    other, _ = parsim.simulate(path, global_batch=8)
    assert other.job.global_batch == 8
    noun, _ = parsim.simulate(prediction.plan, **given)  # type: ignore[arg-type]
    assert noun.step_time_s == prediction.step_time_s


@pytest.mark.parametrize(
    ("change", "where"),
    [({"gpus": [0, 8]}, "gpus"), ({"gpus": 2_000_000}, "gpus"), ({"deadline_s": -5.0}, "deadline_s"),
     ({"budget_usd": 0.0}, "budget_usd")],
)  # fmt: skip
def test_impossible_capacities(change: dict[str, object], where: str) -> None:
    given = {"model": "tiny-llama-8l", "hardware": "h100-sxm-80gb", "gpus": 8, "tokens": "1M"}
    with pytest.raises(ParsimError) as caught:
        parsim.capacity(**given | change)  # type: ignore[arg-type]
    assert caught.value.where == where


def test_hosts_run_the_software_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """The stack of a host has that host's own times, wherever it is loaded."""
    command = "--no-config simulate --plan dp=2 --model tiny-llama-8l --hardware local-cpu --json"
    assert run_command(command.split()) == 0
    item = json.loads(capsys.readouterr().out)
    prediction, _ = parsim.simulate("dp=2", model="tiny-llama-8l", hardware="local-cpu")
    assert item["step_time_s"] == prediction.step_time_s
    cluster, stack = load_machine(Flags(hardware="local-cpu"))
    assert stack == stack_on(load_stack("parsim-executor"), cluster) != load_stack("parsim-executor")


def test_functions_keep_their_names_and_loading_is_lazy() -> None:
    code = (
        "import sys, parsim; assert 'numpy' not in sys.modules and 'pydantic' not in sys.modules\n"
        "import parsim.plan; from parsim.simulate.prediction import predict; import parsim.simulate\n"
        "from parsim.plan import ParallelPlan\n"
        "import pickle; assert pickle.loads(pickle.dumps(ParallelPlan())) == ParallelPlan()\n"
        "assert parsim.plan.__name__ == 'plan' and callable(parsim.plan) and callable(parsim.simulate)\n"
        "assert not hasattr(parsim, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def lines_of(name: str, folder: Path) -> list[str]:
    """What an example prints; it may write into a folder of its own."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"],
        cwd=folder, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent)},
    )  # fmt: skip
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", ["best_plan", "slower_network"])
def test_examples(name: str, tmp_path: Path) -> None:
    lines = lines_of(name, tmp_path)
    assert len(lines) == 3
    at = 0 if name == "best_plan" else 1
    times_s = [float(line.split()[at]) for line in lines]
    assert times_s == sorted(times_s)
    assert times_s[0] > 0


def test_the_example_that_draws(tmp_path: Path) -> None:
    one, zero_bubble = lines_of("draw_schedule", tmp_path)
    assert float(zero_bubble.split()[0]) < float(one.split()[0])
    for name in ("1f1b.png", "zb-h1.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_example_of_a_cluster(tmp_path: Path) -> None:
    lines = lines_of("cheapest_cluster", tmp_path)
    assert [line.split(":")[0] for line in lines[2:]] == ["smallest", "cheapest", "fastest"]


def test_all_examples_are_run() -> None:
    mine, ranks = Path(__file__), EXAMPLES.parent / "tests/integration/test_execute_docs.py"
    texts = mine.read_text() + ranks.read_text()
    assert all(f'"{path.stem}' in texts for path in EXAMPLES.glob("*.py")), "a new example has no test"
