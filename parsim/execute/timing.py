"""The timed steps of one case on one rank, and which of them nothing else disturbed."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
import torch.distributed as dist

from parsim.errors import ParsimError
from parsim.execute.recorder import Row
from parsim.execute.request import Case
from parsim.execute.steps import StepRecord, median_step
from parsim.execute.trainer import Trainer
from parsim.execute.transformer import synthetic_tokens

CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def time_case(case: Case, trainer: Trainer, progress: TextIO, index: int) -> dict[str, Any]:
    """Step times, losses, the median step's spans and the memory peak of this rank.

    All ranks know all step times, so all give the spans of the same step.
    """
    steps: list[StepRecord] = []
    spans: list[list[list[Any]]] = []
    for step in range(-case.warmup, case.steps):
        if step == 0 and trainer.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        record, zero_ns = _run_step(case, trainer, step)
        if step >= 0:
            steps.append(record)
            spans.append(_relative(trainer.recorder.rows(), zero_ns))
        if dist.get_rank() == 0:
            line = {"case": index, "step": step, "time_s": record.time_s, "loss": record.loss}
            progress.write(json.dumps(line) + "\n")
            progress.flush()
    median = median_step(steps)
    peak = torch.cuda.max_memory_allocated() if trainer.device.type == "cuda" else None
    return {
        "steps": [record._asdict() for record in steps],
        "median": median,
        "spans": spans[median],
        "peak_bytes": peak,
        "device": _device_name(trainer.device),
        "torch": torch.__version__,
    }


class _Reading(NamedTuple):
    """Clocks of this rank around a step."""

    cpu_s: float
    machine_busy_s: float


def _run_step(case: Case, trainer: Trainer, step: int) -> tuple[StepRecord, float]:
    """One step of training, and the clock's reading at its start in ns."""
    job = case.job
    number = step + case.warmup
    tokens, targets = (
        trainer.share(batch)
        for batch in synthetic_tokens(
            job.model.vocab, job.seq_len, job.global_batch, seed=case.seed, step=number
        )
    )
    recorder = trainer.recorder
    recorder.say("waiting: start of a step")
    dist.barrier(group=trainer.control)
    before = _reading()
    start_ns = recorder.begin_step(number)
    loss = trainer.forward_backward(tokens, targets)
    trainer.update()
    end_ns = recorder.end_step()
    after = _reading()
    recorder.say("waiting: end of a step")
    everyone = _gathered(
        trainer,
        [
            start_ns,
            end_ns,
            after.cpu_s - before.cpu_s,
            after.machine_busy_s - before.machine_busy_s,
            0.0 if loss is None else loss.item(),
            loss is not None,
        ],
    )
    zero_ns = min(row[0] for row in everyone)
    losses = [row[4] for row in everyone if row[5]]
    if not all(map(math.isfinite, losses)):
        raise ParsimError("the loss is no longer finite", where=f"step {number}", got=losses)
    return StepRecord(
        time_s=(max(row[1] for row in everyone) - zero_ns) * 1e-9,
        loss=sum(losses) / len(losses),
        foreign_cpu_s=max(0.0, max(row[3] for row in everyone) - sum(row[2] for row in everyone)),
    ), zero_ns


def _gathered(trainer: Trainer, mine: list[float]) -> list[list[float]]:
    """Numbers of every rank, on every rank; outside what is timed."""
    own = torch.tensor(mine, dtype=torch.float64)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own, group=trainer.control)
    return [row.tolist() for row in everyone]


def _reading() -> _Reading:
    return _Reading(time.process_time(), _machine_busy_s())


def _machine_busy_s() -> float:
    """CPU time that everything on this machine has used, of all cores, without waiting for disks."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / CLOCK_TICKS_PER_S


def _relative(rows: list[Row], zero_ns: float) -> list[list[Any]]:
    """Spans with times in seconds from the start of the step."""
    return [[*row.label, (row.begin_ns - zero_ns) * 1e-9, (row.end_ns - zero_ns) * 1e-9] for row in rows]


def _device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown processor"
