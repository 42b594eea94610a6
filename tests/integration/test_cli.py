"""The command line as a user types it: contracts, exit statuses, messages."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from parsim.cli.main import run_command

ITEM_KEYS = {
    "plan", "step_time_s", "interval_s", "tokens_per_s_per_gpu", "model_tflops_per_gpu", "mfu",
    "bubble_fraction", "memory_bytes", "breakdown_s", "fits", "model", "hardware", "job",
}  # fmt: skip
PLAN_KEYS = {
    "dp", "tp", "pp", "cp", "ep", "vpp", "micro_batch", "schedule", "zero", "sequence_parallel",
    "recompute",
}  # fmt: skip
EIGHT_B = "--model llama-3.1-8b --hardware h100-sxm-80gb"
PLAN_8B = f"plan {EIGHT_B} --gpus 8 --global-batch 32".split()
SIMULATE = "simulate --model gpt3-175b --hardware a100-sxm-80gb --plan".split()


def answer(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> dict:  # type: ignore[type-arg]
    assert run_command([*arguments, "--json"]) == status
    document = json.loads(capsys.readouterr().out)
    assert document["schema_version"] == 1
    assert {"version", "inputs", "seed"} <= set(document)
    return document


def refusal(capsys: pytest.CaptureFixture[str], command: str, status: int = 2) -> str:
    assert run_command(command.split()) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


def test_plans_of_several_precisions_are_ranked_together(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    narrow = "--schedule 1f1b --tp 1,2 --zero 2".split()
    both, *alone = (
        answer(capsys, *PLAN_8B, *narrow, "--top", "300", "--precision", precision)
        for precision in ("bf16,fp8", "bf16", "fp8")
    )
    found = {item["job"]["precision"] for item in both["plans"]}
    assert found == {"bf16", "fp8"}
    for key in ("enumerated", "legal", "fits"):
        assert both["space"][key] == sum(one["space"][key] for one in alone)
    times = [item["step_time_s"] for item in both["plans"]]
    assert times == sorted(item["step_time_s"] for one in alone for item in one["plans"])
    for item in (both["plans"][0], both["plans"][-1]):
        path = tmp_path / "plan.json"
        path.write_text(json.dumps(item))
        again = answer(capsys, "simulate", "--plan", str(path))
        assert again["step_time_s"] == pytest.approx(item["step_time_s"])
        assert again["job"] == item["job"]


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    document = answer(capsys, *PLAN_8B, "--top", "3")
    space = document["space"]
    assert space["enumerated"] == space["fits"] + sum(space["rejected"].values())
    assert document["optimal"] is True
    assert len(document["plans"]) == 3
    times = [item["step_time_s"] for item in document["plans"]]
    assert times == sorted(times)
    advice = document["recommended"]
    assert advice["item"]["ties_with_fastest"]
    assert "plan" in advice["reason"]
    if advice["index"] < 3:
        assert advice["item"] == document["plans"][advice["index"]]
    first = document["plans"][0]
    assert first["probability_fastest_is_faster"] == 0.5
    worst_s = [each["robust"]["worst_step_time_s"] for each in (advice["item"], first)]
    assert worst_s[1] == max(first["robust"]["step_time_s"].values()) > first["step_time_s"]
    assert worst_s[0] <= worst_s[1] or first["memory_headroom"] < 0.05
    for item in document["plans"]:
        assert set(item) >= ITEM_KEYS
        assert set(item["plan"]) >= PLAN_KEYS
        plan = item["plan"]
        assert plan["dp"] * plan["tp"] * plan["pp"] * plan["cp"] == 8
        low, high = item["interval_s"]
        assert low < item["step_time_s"] < high
        assert sum(item["breakdown_s"].values()) == pytest.approx(item["step_time_s"])
        parts = {k: v for k, v in item["memory_bytes"].items() if k not in ("peak", "context")}
        assert sum(parts.values()) == pytest.approx(item["memory_bytes"]["peak"])
        assert item["memory_bytes"]["peak"] < 80e9


def test_plan_twice_gives_the_same_bytes_but_for_the_clock(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = (answer(capsys, *PLAN_8B, "--tp", "2") for _ in range(2))
    assert first | {"search_s": 0} == second | {"search_s": 0}


def test_a_plan_from_plan_can_be_simulated_and_exported(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    document = answer(capsys, *PLAN_8B, "--top", "2", "--pp", "2")
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document["plans"][1]))
    item = answer(capsys, "simulate", "--plan", str(path))
    assert item["step_time_s"] == pytest.approx(document["plans"][1]["step_time_s"], rel=1e-9)
    csv = tmp_path / "schedule.csv"
    assert run_command(["export", str(path), "--to", "schedule-csv", "-o", str(csv)]) == 0
    assert len(csv.read_text().splitlines()) == 2
    replayed = answer(capsys, "simulate", "--plan", str(path), "--schedule-csv", str(csv))
    assert replayed["step_time_s"] == pytest.approx(item["step_time_s"], rel=1e-12)


def test_simulate_writes_chart_trace_and_schedule(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    files = {
        "--chart": "step.png", "--memory-chart": "memory.svg", "--trace": "step.json",
        "--schedule-csv": "schedule.csv",
    }  # fmt: skip
    flags = [text for flag, name in files.items() for text in (flag, str(tmp_path / name))]
    item = answer(capsys, *SIMULATE, "dp=8,tp=8,pp=4,zero=1", *flags)
    assert item["fits"] is True
    assert all((tmp_path / name).stat().st_size > 100 for name in files.values())
    assert json.loads((tmp_path / "step.json").read_text())["traceEvents"]


def test_default_batch_of_simulate(capsys: pytest.CaptureFixture[str]) -> None:
    item = answer(capsys, *SIMULATE, "dp=8,tp=8,pp=8,micro_batch=2")
    assert item["job"]["global_batch"] == 2 * 8 * 8 * 2


def test_a_plan_that_does_not_fit_is_answered_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    item = answer(capsys, *SIMULATE, "dp=8", status=1)
    assert item["fits"] is False


def test_half_the_network_makes_the_step_longer(capsys: pytest.CaptureFixture[str]) -> None:
    plan = "dp=16,tp=8,pp=4,zero=1"
    usual = answer(capsys, *SIMULATE, plan)
    slow = answer(capsys, *SIMULATE, plan, "--inter-node", "100Gb/s")
    assert slow["step_time_s"] > usual["step_time_s"]
    assert slow["breakdown_s"]["dp_exposed"] > usual["breakdown_s"]["dp_exposed"]


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    models = {m["name"]: m for m in answer(capsys, "models")["models"]}
    assert {"gpt3-175b", "llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b"} <= set(models)
    tiny = [m for name, m in models.items() if "tiny" in name]
    assert tiny
    assert all(m["layers"] >= 8 and m["kv_heads"] % 4 == 0 for m in tiny)
    hardware = {h["name"] for h in answer(capsys, "hardware")["hardware"]}
    assert {"local-cpu", "h100-sxm-80gb", "a100-sxm-80gb", "gb200-nvl72"} <= hardware
    assert answer(capsys, "doctor")["checks"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("plan --model llama-3.1-7b --hardware h100-sxm-80gb --gpus 8 --global-batch 8", "did you mean"),
        ("plan --model llama-3.1-8b --hardware h100 --gpus 8 --global-batch 8", "unknown hardware"),
        (f"plan {EIGHT_B} --gpus 8 --global-batch 8 --precision bf16,nvfp4", "nvfp4"),
        (f"plan {EIGHT_B} --gpus 8 --global-batch 8 --precision bf16,", "a dtype is missing"),
        (f"plan {EIGHT_B} --gpus 8 --global-batch 8 --placement tp-dp", "unknown placement"),
        (f"plan {EIGHT_B} --gpus 7 --tp 2 --global-batch 8", "does not divide 7"),
        (f"plan {EIGHT_B} --gpus 0 --global-batch 8", "out of range"),
        (f"plan {EIGHT_B} --gpus 8", "--global-batch is missing"),
        (f"plan {EIGHT_B} --global-batch 8", "--gpus"),
        (f"simulate {EIGHT_B} --plan tp=16", "KV heads"),
        (f"simulate {EIGHT_B} --plan dp=3 --global-batch 8", "global batch"),
        (f"simulate {EIGHT_B} --plan dp=2 --precision int8", "int8"),
        (f"simulate {EIGHT_B} --plan missing.json", "no such plan file"),
        (f"simulate {EIGHT_B} --plan dp=8 --chart x.bmp", "bmp"),
        ("models no/such.toml", "no such model file"),
        (f"plan {EIGHT_B} --gpus 8 --global-batch 8 --schedule 1f1", "1f1b"),
        (f"plan {EIGHT_B} --gpus 8 --global-batch 8 --dp 4 --tp 4", "--tp and --dp contradict"),
        (f"plan {EIGHT_B} --gpus 8 --global-batch 8 --vpp 2 --schedule 1f1b", "--schedule contradict"),
        (f"plan {EIGHT_B} --gpus 8 --global-batch 8 --zero 3 --schedule pipedream", "--schedule contra"),
        (f"plan {EIGHT_B} --gpus 8 --global-batch 8 --tp 1 --sequence-parallel true", "--tp contradict"),
        (f"plan {EIGHT_B} --gpus 1000001 --global-batch 8", "1 to 1000000"),
        ("validate", "compares one thing"),
        ("frobnicate", "No such command"),
    ],
)  # fmt: skip
def test_bad_input(capsys: pytest.CaptureFixture[str], command: str, words: str) -> None:
    assert words in refusal(capsys, command)


def test_a_model_that_fits_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    command = f"plan {EIGHT_B} --gpus 1 --global-batch 8"
    words = refusal(capsys, command, status=1)
    assert "the least that one of them needs is" in words
    assert "on 2 GPUs: " in words


def test_misspelt_key_and_negative_bandwidth(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from parsim.shipped import data_folder

    text = (data_folder("hardware_profiles") / "h100-sxm-80gb.toml").read_text()
    path = tmp_path / "bad.toml"
    path.write_text(text.replace("gpus_per_node", "gpus_per_nod").replace('"450 GB/s"', '"-450 GB/s"'))
    command = f"simulate --model llama-3.1-8b --plan dp=8 --hardware {path}"
    message = refusal(capsys, command)
    assert "did you mean 'gpus_per_node'?" in message
    assert "intra_node.bandwidth_bytes_per_s" in message


def test_a_defect_is_not_blamed_on_the_user(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parsim.config.load_model", lambda name: 1 / 0)
    message = refusal(capsys, "models llama-3.1-8b")
    assert "a defect in parsim" in message
    assert "--debug" in message


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from parsim.cli.main import run_command; run_command(['--help']); "
        "heavy = 'numpy pydantic torch scipy matplotlib simpy networkx rich'.split(); "
        "print(sorted(set(heavy) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip().splitlines()[-1] == "[]"
    assert "quickstart" in done.stdout


def test_validate_one_step(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prediction = answer(capsys, *SIMULATE, "dp=8,tp=8,pp=4,zero=1")
    paths = tmp_path / "prediction.json", tmp_path / "measurement.json"
    paths[0].write_text(json.dumps(prediction))
    slower = {key: 1.25 * seconds for key, seconds in prediction["breakdown_s"].items()}
    measured = prediction | {"step_time_s": 1.25 * prediction["step_time_s"], "breakdown_s": slower}
    paths[1].write_text(json.dumps(measured))
    found = answer(capsys, "validate", *map(str, paths))
    assert found["error"] == pytest.approx(-0.2)
    assert sum(part["share_of_error"] for part in found["parts"]) == pytest.approx(-0.2)
    assert run_command(["validate", *map(str, paths), "--tolerance", "0.1"]) == 1
    assert run_command(["validate", *map(str, paths), "--tolerance", "0.3"]) == 0


def test_a_plan_file_keeps_what_the_user_knew_better(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ["--inter-node", "25Gb/s", "--memory", "70GB"]
    document = answer(capsys, *PLAN_8B, "--gpus", "16", "--top", "1", *flags)
    path = tmp_path / "plans.json"
    path.write_text(json.dumps(document))
    item = answer(capsys, "simulate", "--plan", str(path))
    assert item["step_time_s"] == pytest.approx(document["plans"][0]["step_time_s"], rel=1e-9)
    faster = answer(capsys, "simulate", "--plan", str(path), "--inter-node", "400Gb/s")
    assert faster["step_time_s"] < item["step_time_s"]


def test_a_flag_replaces_only_what_it_names(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    path.write_text(json.dumps(answer(capsys, *PLAN_8B, "--seq-len", "2048", "--top", "1")))
    item = answer(capsys, "simulate", "--plan", str(path), "--model", "llama-2-7b")
    assert (item["job"]["seq_len"], item["job"]["global_batch"]) == (2048, 32)
    assert item["model"]["name"] == "llama-2-7b"


def test_no_legal_plan_says_what_rules_them_out(capsys: pytest.CaptureFixture[str]) -> None:
    document = answer(capsys, *PLAN_8B, "--ep", "2", status=1)
    assert document["plans"] == []
    command = "plan --model tiny-llama-8l --hardware h100-sxm-80gb --gpus 8 --global-batch 8 --tp 8"
    assert "tp does not divide the KV heads" in refusal(capsys, command, status=1)


def test_gpus_and_batches_that_nothing_divides(capsys: pytest.CaptureFixture[str]) -> None:
    prime = refusal(capsys, f"plan {EIGHT_B} --gpus 997 --global-batch 512", status=1)
    assert "--global-batch 997" in prime
    assert "more stages than layers" in prime
    batch = refusal(capsys, f"plan {EIGHT_B} --gpus 64 --pp 1 --global-batch 127", status=1)
    assert "--pp 1 leaves no legal plan" in batch
    assert "--global-batch 128" in batch


def test_a_batch_of_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "global_batch" in refusal(capsys, f"simulate {EIGHT_B} --plan dp=2 --global-batch 0")


def explained(capsys: pytest.CaptureFixture[str], plan: str, code: int) -> dict[str, Any]:
    command = (
        f"plan {EIGHT_B} --gpus 8 --global-batch 32 --schedule 1f1b --zero 0,1 --json --explain {plan}"
    )
    assert run_command(command.split()) == code
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)["explain"]
    return answer


def test_explain_says_why_a_plan_is_not_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    illegal = explained(capsys, "tp=8,sequence_parallel=yes,cp=1,micro_batch=3", 1)
    assert illegal["verdict"] == "illegal"
    assert "dp·micro_batch does not divide the global batch" in illegal["problems"][0]
    too_large = explained(capsys, "dp=8,micro_batch=4", 1)
    assert too_large["verdict"] == "does not fit"
    needs = sum(too_large["memory_bytes"].values())
    assert needs - 80e9 * 1.08 < too_large["over_bytes"] < needs
    assert next(iter(too_large["memory_bytes"])) in ("optimizer", "activations")
    slower = explained(capsys, "tp=8", 0)
    assert slower["verdict"] == "fits"
    more_s = slower["step_time_s"] - slower["best"]["step_time_s"]
    assert more_s == pytest.approx(sum(slower["slower_by_s"].values()))
    assert more_s > 0
    assert next(iter(slower["slower_by_s"])) == "tp_exposed"
    best = ",".join(f"{k}={v}" for k, v in slower["best"]["plan"].items() if k in ("dp", "tp", "pp"))
    settings = {k: slower["best"]["plan"][k] for k in ("micro_batch", "zero", "recompute")}
    itself = explained(capsys, ",".join([best, *(f"{k}={v}" for k, v in settings.items())]), 0)
    assert itself["step_time_s"] == itself["best"]["step_time_s"]


def test_explain_chooses_the_stages_it_is_asked_to_and_takes_a_plan_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    usual = explained(capsys, "dp=2,pp=4,zero=1", 0)
    chosen = explained(capsys, "dp=2,pp=4,zero=1,stage_split=auto", 0)
    layers = chosen["partition"]["after"]["stage_layers"]
    assert chosen["plan"]["stage_split"] == layers
    assert layers[-1] < 8  # the last rank has the head
    assert chosen["step_time_s"] < usual["step_time_s"]
    assert explained(capsys, "dp=2,pp=4,stage_split=auto,micro_batch=3", 1)["verdict"] == "illegal"

    file = tmp_path / "plan.json"
    file.write_text(json.dumps(chosen["best"]), encoding="utf-8")
    best = explained(capsys, str(file), 0)
    assert best["step_time_s"] == chosen["best"]["step_time_s"]
    command = f"plan {EIGHT_B} --gpus 8 --global-batch 64 --explain {file}"
    assert "another job" in refusal(capsys, command)


def test_sizes_are_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    bounds = "--max-tp 2 --max-pp 2 --max-micro-batch 1 --max-cp 2 --max-vpp 2"
    assert run_command([*PLAN_8B, *bounds.split(), "--json", "--top", "400", "--zero", "1"]) == 0
    plans = [item["plan"] for item in json.loads(capsys.readouterr().out)["plans"]]
    for key, most in (("tp", 2), ("pp", 2), ("cp", 2), ("vpp", 2), ("micro_batch", 1)):
        assert {plan[key] for plan in plans} == set(range(1, most + 1)), key
    assert "contradict" in refusal(capsys, f"plan {EIGHT_B} --gpus 8 --global-batch 8 --tp 4 --max-tp 2")
    assert "true" in refusal(capsys, f"plan {EIGHT_B} --gpus 8 --global-batch 8 --tp-overlap maybe")


def test_what_a_compiled_solver_prints_does_not_reach_the_answer() -> None:
    code = """
import ctypes, sys
from parsim.cli import main, models

def noisy(data, answer=models.print_json):
    ctypes.CDLL(None).puts(b"a line of the solver's own")
    answer(data)

models.print_json = noisy
sys.argv = ["parsim", "models", "--json"]
main.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["models"]
    assert "a line of the solver's own" in done.stderr


def test_an_answer_that_nobody_reads_is_no_error() -> None:
    command = f"{sys.executable} -m parsim models >&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
