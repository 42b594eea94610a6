"""Commands that are stopped or find the disk full: nothing half-written, nobody left behind.

PARSIM_KILLS=20 stops each command so often (default 1), by one signal after another, at other moments.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("torch")

KILLS = int(os.environ.get("PARSIM_KILLS", "1"))
SETTLED_S = 20.0
"""How long processes may take to notice that nobody needs them; a busy machine is slow to tell them."""
RUN = "run dp=2 --model tiny-llama-8l --seq-len 64 -o m.json --checkpoint ck --checkpoint-every 3"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
COMMANDS = {
    # Longest moment of the kill, in seconds, and the words. Each takes longer than that.
    "run": (16.0, f"{RUN} --steps 100000"),
    "calibrate": (20.0, "calibrate -o p.toml --budget-s 60"),
    "quickstart": (40.0, "quickstart --folder q --calibration-s 20"),
    "sweep": (12.0, "sweep --model gpt3-175b,llama-3.1-405b --hardware h100-sxm-80gb,a100-sxm-80gb "
                    "--gpus 1024,2048,4096 --global-batch 2048 --jobs 2"),
    "plan": (12.0, "plan --model llama-3.1-405b --hardware h100-sxm-80gb --gpus 16384 "
                   "--global-batch 2048 --report rep"),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What is left of a command that was stopped."""

    status: int
    stderr: str
    orphans: list[str]
    temporary: list[str]
    was_over: bool
    """It had ended by itself."""


def stopped(
    words: str,
    folder: Path,
    sent: signal.Signals,
    after_s: float,
    *,
    until: str = "",
    to_group: bool = False,
) -> Ended:
    """Start a command in a folder; so long after a file is there, signal it if it still runs."""
    mark, temporary = uuid.uuid4().hex, folder.parent / f"{folder.name}-tmp"
    folder.mkdir(exist_ok=True)
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "parsim", *words.split()],
        cwd=folder, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "PARSIM_TEST_MARK": mark, "TMPDIR": str(temporary)},
        # A shell starts what runs in the background with Ctrl-C ignored, and so its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not (folder / until).exists() and process.poll() is None:
        time.sleep(0.05)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(after_s)
    was_over = process.poll() is not None
    if not was_over:
        (os.killpg if to_group else os.kill)(process.pid, sent)
    _, stderr = process.communicate(timeout=60)
    end = time.monotonic() + SETTLED_S
    while (orphans := marked(mark)) and time.monotonic() < end:
        time.sleep(0.2)
    left = [path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor")]
    shutil.rmtree(temporary)
    return Ended(
        status=process.returncode, stderr=stderr, orphans=orphans, temporary=left, was_over=was_over
    )


def marked(mark: str) -> list[str]:
    """Processes whose environment has this mark."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " ")[:120])
        except OSError:
            continue  # it has ended, or is another user's
    return [words for words in found if words]


def check_files(folder: Path) -> None:
    """Every file that has its own name is whole."""
    for path in folder.rglob("*"):
        if not path.is_file() or path.name.startswith("."):
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            *rows, _ = path.read_text().split("\n")  # the last line counts when it has ended
            assert all(json.loads(row) for row in rows)
        elif path.suffix == ".toml":
            tomllib.loads(path.read_text())
        elif path.suffix == ".png":
            assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_is_stopped_leaves_nobody_and_no_half_file(name: str, tmp_path: Path) -> None:
    longest_s, words = COMMANDS[name]
    moments = random.Random(name)
    for kill in range(KILLS):
        # quickstart begins with Ctrl-C, sweep with SIGTERM, plan with SIGKILL: each once left something.
        sent = SIGNALS[(kill + list(COMMANDS).index(name) + 1) % len(SIGNALS)]
        # Ctrl-C reaches all processes of a terminal at once.
        ended = stopped(
            words, tmp_path / str(kill), sent, moments.uniform(3.0, longest_s),
            to_group=sent is signal.SIGINT,
        )  # fmt: skip
        assert ended.orphans == []
        check_files(tmp_path / str(kill))
        if sent is signal.SIGKILL:
            continue
        assert ended.temporary == []
        assert "Traceback" not in ended.stderr
        if ended.was_over:
            continue
        partial = (0, 130) if name in ("plan", "calibrate") else (130,)  # the best so far is an answer
        assert ended.status in (partial if sent is signal.SIGINT else (143,)), ended.stderr[-2000:]
        assert not list((tmp_path / str(kill)).rglob(".*.*"))  # nor a temporary name


@pytest.mark.slow
def test_runs_that_are_killed_at_any_moment_resume_with_equal_losses(tmp_path: Path) -> None:
    steps = 18
    whole = finished(f"{RUN} --steps {steps}", tmp_path / "whole")
    moments, resumed = random.Random(7), 0
    for kill in range(KILLS):
        folder = tmp_path / str(kill)
        sent = moments.choice(SIGNALS)
        # The first after its first checkpoint, the others at any moment.
        until = "ck/step-00000003" if kill == 0 else ""
        stopped(f"{RUN} --steps {steps}", folder, sent, moments.uniform(0.0, 8.0), until=until)
        begun = any((folder / "ck").glob("step-????????"))
        resumed += begun
        if not (folder / "m.json").exists():
            again = finished(f"{RUN} --steps {steps}{' --resume' if begun else ''}", folder)
            assert again["loss"] == whole["loss"]
    assert resumed


def finished(words: str, folder: Path) -> dict[str, object]:
    """The measurement of a run that nobody disturbs."""
    folder.mkdir(exist_ok=True)
    run_here(words, folder)
    return dict(json.loads((folder / "m.json").read_text()))


def run_here(words: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "parsim", *words.split()], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_to_the_same_rows(tmp_path: Path) -> None:
    words = (
        "sweep --model tiny-llama-8l --hardware a100-sxm-80gb --gpus 8-512 --global-batch 512 --jobs 2"
    )
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    run_here(words, tmp_path / "whole")
    assert stopped(words, tmp_path / "killed", signal.SIGKILL, 6.0).orphans == []
    run_here(f"{words} --resume", tmp_path / "killed")
    whole, killed = (
        sorted((tmp_path / name / "sweep.jsonl").read_text().splitlines())
        for name in ("whole", "killed")
    )
    assert answers(killed) == answers(whole)


def answers(rows: list[str]) -> list[object]:
    return [(row["scenario"], row["plans"]) for row in map(json.loads, rows)]


def on_a_full_disk(words: str, size: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command whose folder `full` is a disk of this size, in a mount namespace of its own."""
    full = folder / "full"
    full.mkdir()
    inside = f"mount -t tmpfs -o size={size} tmpfs full && exec {sys.executable} -m parsim {words}"
    after = "; status=$?; ls -A full full/* ; exit $status"
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f"({inside}){after}"],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip


def mounts_are_allowed() -> bool:
    words = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return (
        shutil.which("unshare") is not None and not subprocess.run(words, capture_output=True).returncode
    )


needs_mounts = pytest.mark.skipif(
    not mounts_are_allowed(), reason="this machine lets no user mount a small disk"
)


@needs_mounts
@pytest.mark.parametrize(
    "flag", ["--chart full/a.png", "--trace full/a.json", "--report full/r", "--memory-chart full/a.svg"]
)
def test_a_full_disk_is_said_and_holds_no_half_file(flag: str, tmp_path: Path) -> None:
    words = f"simulate --plan tp=2,pp=4 --model tiny-llama-8l --hardware local-cpu {flag}"
    done = on_a_full_disk(words, "8k", tmp_path)
    assert done.returncode == 2
    assert "cannot write this file" in done.stderr
    assert "No space left on device" in done.stderr
    assert "a." not in done.stdout
    assert "html" not in done.stdout


@pytest.mark.slow
@needs_mounts
def test_a_disk_that_is_full_at_a_checkpoint_is_said_and_the_ones_before_it_stay(tmp_path: Path) -> None:
    # Weights and two moments of 8 million parameters are 96 MB: there is room for one checkpoint.
    words = "run dp=2 --model tiny-llama-8l --seq-len 64 --steps 8 --max-restarts 2"
    done = on_a_full_disk(f"{words} --checkpoint full --checkpoint-every 3", "150m", tmp_path)
    assert done.returncode == 2
    assert "the disk is full: this checkpoint could not be written" in done.stderr
    assert "--resume goes on from step-00000003" in done.stderr
    assert "restart" not in done.stderr
    assert "step-00000003" in done.stdout
    assert ".part" not in done.stdout


@pytest.mark.slow
@needs_mounts
def test_a_measurement_that_cannot_be_written_is_still_said(tmp_path: Path) -> None:
    words = "run dp=2 --model tiny-llama-8l --seq-len 64 --steps 2 -o full/m.json"
    done = on_a_full_disk(words, "4k", tmp_path)
    assert done.returncode == 2
    assert "No space left on device" in done.stderr
    assert "measured" in done.stdout
    assert "m.json" not in done.stdout
