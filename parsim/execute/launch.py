"""Running plans on real ranks: execute() times one, verify() compares one with single-process training.

The ranks are started by torchrun on this machine, with a c10d rendezvous on the loopback interface. The
parent needs no torch of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import parsim
from parsim.errors import ParsimError
from parsim.execute.devices import available_gpus
from parsim.execute.measurement import (
    Measurement,
    Verification,
    measurement_of,
    verification_of,
)
from parsim.execute.request import Case, encode_case
from parsim.execute.support import check_executable
from parsim.execute.watch import Ranks
from parsim.plan import Job, ParallelPlan
from parsim.schedule.action import Schedule

TIMEOUT_S = 300.0
"""A rank that gives no sign of life for so long counts as hung."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A step that all ranks have finished."""

    step: int
    """From 0; negative during warm-up."""
    time_s: float
    loss: float


OnStep = Callable[[Progress], None]


def execute(
    job: Job,
    plan: ParallelPlan,
    schedule: Schedule,
    *,
    steps: int = 10,
    warmup: int = 2,
    seed: int = 0,
    device: str = "cpu",
    dtype: str | None = None,
    timeout_s: float = TIMEOUT_S,
    on_step: OnStep | None = None,
) -> Measurement:
    """Train `steps` steps of a plan on real ranks of this machine and time them.

    `dtype` is fp32 (the default on a CPU), fp64 or bf16 (with fp32 optimizer states; the default on a
    GPU). Ranks may exceed the cores of a CPU, which they then share, but not the GPUs.
    Raises ParsimError for a plan that the executor refuses, and with the rank where one fails or hangs.
    """
    case = Case(
        job=job, plan=plan, schedule=schedule, steps=steps, warmup=warmup, seed=seed,
        dtype=dtype or ("fp32" if device == "cpu" else "bf16"),
    )  # fmt: skip
    (result,) = run_cases([case], device=device, timeout_s=timeout_s, on_step=on_step)
    assert isinstance(result, Measurement)
    return result


def verify(
    job: Job,
    plan: ParallelPlan,
    schedule: Schedule,
    *,
    steps: int = 3,
    seed: int = 0,
    device: str = "cpu",
    timeout_s: float = TIMEOUT_S,
) -> Verification:
    """Train a plan in float64 on real ranks beside a single process, and compare every gradient.

    A model of more than some millions of parameters is better `shrunken` first.
    """
    case = verification_case(job, plan, schedule, steps=steps, seed=seed)
    (result,) = run_cases([case], device=device, timeout_s=timeout_s)
    assert isinstance(result, Verification)
    return result


def verification_case(
    job: Job, plan: ParallelPlan, schedule: Schedule, *, steps: int = 3, seed: int = 0
) -> Case:
    """What verify() runs, for run_cases()."""
    return Case(job=job, plan=plan, schedule=schedule, steps=steps, seed=seed, dtype="fp64", verify=True)


def run_cases(
    cases: Sequence[Case],
    *,
    device: str = "cpu",
    timeout_s: float = TIMEOUT_S,
    on_step: OnStep | None = None,
) -> list[Measurement | Verification]:
    """Run cases of equal world size one after another on the same ranks, in one launch."""
    _check(cases, device)
    ranks = _launch(cases, device, timeout_s, on_step)
    return [
        verification_of([rank[i] for rank in ranks])
        if case.verify
        else measurement_of(case, [rank[i] for rank in ranks], device)
        for i, case in enumerate(cases)
    ]


def _check(cases: Sequence[Case], device: str) -> None:
    if importlib.util.find_spec("torch") is None:
        raise ParsimError(
            "running a plan needs PyTorch", hint="install it with: pip install 'parsim[torch]'"
        )
    if not hasattr(os, "pidfd_open"):
        raise ParsimError("running a plan needs Linux", got=sys.platform)
    if device not in ("cpu", "cuda"):
        raise ParsimError("unknown device", where="device", got=device, expected="cpu, cuda")
    for case in cases:
        if case.steps < 1 or case.warmup < 0:
            raise ParsimError(
                "a run has at least one step", where="steps", got=f"{case.steps}, warm-up {case.warmup}"
            )
        check_executable(case.job, case.plan, case.schedule, case.dtype)
    sizes = {case.plan.gpus for case in cases}
    if len(sizes) != 1:
        raise ParsimError("plans run together need equal numbers of ranks", got=sorted(sizes))
    if device == "cuda":
        _check_gpus(sizes.pop())


def _check_gpus(world_size: int) -> None:
    gpus = available_gpus()
    if gpus < world_size:
        raise ParsimError(
            "the plan has more ranks than this machine has GPUs",
            where="plan",
            got=f"{world_size} ranks, {gpus} GPUs",
            hint="NCCL gives each rank a GPU of its own; on a CPU ranks may share cores",
        )


def _launch(
    cases: Sequence[Case], device: str, timeout_s: float, on_step: OnStep | None
) -> list[list[dict[str, Any]]]:
    """What each rank left for each case. No process and no file outlives this."""
    world_size = cases[0].plan.gpus
    request = {
        "device": device,
        "cases": [encode_case(case) for case in cases],
        # The watcher knows who hangs, torch only who waits: let the watcher be first.
        "library_timeout_s": 2 * timeout_s + 60,
    }
    with _ended_by_terminate(), _temporary_folder() as folder:
        (folder / "request.json").write_text(json.dumps(request))
        command, environment = _command(world_size, folder), _environment(device)
        with Ranks(command, environment, folder, world_size) as ranks:
            ranks.watch(timeout_s=timeout_s, on_line=_reporter(on_step))
        return [
            json.loads((folder / f"rank-{rank}.json").read_text())["results"]
            for rank in range(world_size)
        ]


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="parsim-run-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@contextmanager
def _ended_by_terminate() -> Iterator[None]:
    """Let SIGTERM, by which `timeout` and job schedulers end a program, end it as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _command(world_size: int, folder: Path) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run",
        "--nnodes=1",
        f"--nproc-per-node={world_size}",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",  # torchrun finds a free port
        f"--rdzv-id={uuid.uuid4().hex}",
        "--local-addr=127.0.0.1",
        "--max-restarts=0",
        "-m", "parsim.execute.worker", str(folder),
    ]  # fmt: skip


def _environment(device: str) -> dict[str, str]:
    environment = dict(os.environ)
    package = str(Path(parsim.__file__).parents[1])
    before = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = package if not before else f"{package}{os.pathsep}{before}"
    environment["OMP_NUM_THREADS"] = "1"
    if device == "cpu":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def _reporter(on_step: OnStep | None) -> Callable[[dict[str, Any]], None]:
    def report(line: dict[str, Any]) -> None:
        if on_step is not None:
            on_step(Progress(step=line["step"], time_s=line["time_s"], loss=line["loss"]))

    return report
