"""`parsim run` under somebody else's torchrun: all ranks take part, the first one answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

SHORT = "--model tiny-llama-8l --seq-len 32 --global-batch 2 --steps 2 --warmup 1"


def torchrun(ranks: int, command: str, *, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """parsim as every rank of a launch on this machine."""
    return subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}",
            "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1",
            f"--max-restarts={restarts}", "-m", "parsim", *command.split(),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )  # fmt: skip


def test_the_first_rank_answers_for_all(tmp_path: Path) -> None:
    written = tmp_path / "measurement.json"
    done = torchrun(2, f"run dp=2 {SHORT} --verify --json -o {written}")
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout)  # one document: the other rank says nothing
    assert answer["world_size"] == 2
    assert len(answer["steps_s"]) == len(answer["loss"]) == 2
    assert answer["verify"]["equal"]
    assert set(answer["timeline"]["spans"]["rank"]) == {0, 1}
    assert json.loads(written.read_text()) == answer
    assert done.stderr.count("step 1:") == 1


@pytest.mark.slow
def test_a_rank_that_torchrun_starts_again_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    """The run ends itself once, behind its first checkpoint; torchrun starts all ranks again."""
    folder, mark = tmp_path / "checkpoints", tmp_path / "died"
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os, threading, time\n"
        "def end():\n"
        f"    while not os.path.exists({str(folder / 'step-00000003')!r}): time.sleep(0.01)\n"
        f"    open({str(mark)!r}, 'w').close()\n"
        "    os.kill(os.getpid(), 9)\n"
        f"if os.environ.get('RANK') == '1' and not os.path.exists({str(mark)!r}):\n"
        "    threading.Thread(target=end, daemon=True).start()\n"
    )
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = f"{site}{os.pathsep}{before}"
    try:
        command = f"run dp=2 {SHORT} --steps 40 --checkpoint {folder} --checkpoint-every 3 --json"
        done = torchrun(2, command.replace("--steps 2 ", ""), restarts=1)
    finally:
        os.environ["PYTHONPATH"] = before
    assert mark.exists()
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout)
    assert answer["resumed_at"] >= 3
    assert len(answer["loss"]) == 40


def test_ranks_that_see_different_memory_run_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rank sees too little to time the plan, the other one enough."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '0':\n"
        "    import parsim.execute.devices as devices\n"
        "    devices.available_memory_bytes = lambda: 1e6\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    done = torchrun(2, f"run dp=2 {SHORT} --verify --json --timeout-s 60")
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout)
    assert answer["steps_s"] == []
    assert answer["verify"]["equal"]


def test_torchrun_does_not_make_a_resumption_of_a_refusal(tmp_path: Path) -> None:
    """It starts ranks again that refused a folder with an earlier run's checkpoints."""
    command = f"run dp=2 {SHORT} --checkpoint {tmp_path}"
    assert torchrun(2, command).returncode == 0
    again = torchrun(2, command, restarts=1)
    assert again.returncode != 0
    assert again.stderr.count("error: this folder holds checkpoints of an earlier run") == 2
    assert again.stdout == ""


def test_another_number_of_ranks_is_said_once() -> None:
    done = torchrun(2, f"run dp=4 --global-batch 4 {SHORT.replace('--global-batch 2', '')}")
    assert done.returncode != 0
    assert done.stderr.count("error: the plan has another number of ranks") == 1
    assert "2 ranks, 4 in the plan" in done.stderr
