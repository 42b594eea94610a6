"""The timed steps of one case on one rank, and which of them nothing else disturbed."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

import torch
import torch.distributed as dist

from parsim.execute.launch.clocks import clock_offset_ns, ranks_per_node
from parsim.execute.request import Case
from parsim.execute.steps import NotFinite, Speeds, StepRecord, median_step
from parsim.execute.training.checkpoint import load_checkpoint, save_checkpoint
from parsim.execute.training.finite import FiniteWatch, Origin
from parsim.execute.training.recorder import Row
from parsim.execute.training.trainer import Trainer
from parsim.timeline import COMPUTE, HOST

SPANS_KEPT = 200
"""Last steps of which one may be shown: a long run would fill the memory with spans."""
LAST_MESSAGE_S = 0.5
"""How long ranks stay before they end on purpose: a connection that is reset loses what is under way."""
CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def time_case(case: Case, trainer: Trainer, progress: TextIO, index: int) -> dict[str, Any]:
    """Step times, losses, the median step's spans and the memory peak of this rank.

    All ranks know all step times, so all give the spans of the same step. A run that begins at a
    checkpoint has its steps before it from there.
    """
    saved = load_checkpoint(trainer)
    steps = list(saved.steps) if saved is not None else []
    begin = len(steps)
    same_plan = saved is not None and saved.plan == case.plan.short()
    plan_since = saved.plan_since if saved is not None and same_plan else begin
    watch = FiniteWatch(trainer.stages)
    speeds = Speeds(case.plan.gpus // case.plan.pp)
    spans: deque[list[list[Any]]] = deque(maxlen=SPANS_KEPT)
    for step in range(begin, case.total_steps):
        settling = step - begin < case.warmup
        if step - begin == case.warmup and trainer.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        done = run_step(trainer, step, watch)
        steps.append(done.record._replace(settling=settling))
        spans.append(done.spans)
        if dist.get_rank() == 0:
            slow = {} if settling else speeds.slow(done.working_s)
            tell(progress, {
                "case": index, "step": step - case.warmup, "time_s": done.record.time_s,
                "loss": done.record.loss, "slow": slow,
            })  # fmt: skip
        if _checkpoint_is_due(case, step + 1):
            save_checkpoint(trainer, steps, plan_since)
    counted = steps[case.warmup :]
    timed_from = max(0, plan_since - case.warmup)  # what other plans took is no measurement
    timed = counted[timed_from:]
    median = median_step(timed, among=len(spans))
    return about_device(trainer.device) | {
        "steps": [record._asdict() for record in counted],
        "timed_from": timed_from,
        "spans": spans[median - len(timed)],
        "loss_scale": _loss_scale(trainer),
        "gradient_payload_bytes": _payload_bytes(trainer, case.total_steps - begin),
    }


def _loss_scale(trainer: Trainer) -> dict[str, float]:
    """Of fp16 training: steps that were left out since the ranks were started, and the scale now."""
    scale = trainer.loss_scale
    return {} if scale is None else {"skipped_steps": scale.skipped_steps, "final": scale.value}


def about_device(device: torch.device) -> dict[str, Any]:
    """What a measurement says of the device it was made on."""
    return {
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "device": device_name(device),
        "torch": torch.__version__,
    }


def _payload_bytes(trainer: Trainer, steps: int) -> dict[str, float]:
    """What compressed gradients were handed to each kind of collective with, a step."""
    if trainer.compressor is None:
        return {}
    return {kind: num_bytes / steps for kind, num_bytes in trainer.compressor.payload_bytes.items()}


def tell(progress: TextIO, line: dict[str, Any]) -> None:
    """Hand a line of the run's progress to the parent."""
    progress.write(json.dumps(line) + "\n")
    progress.flush()


def _checkpoint_is_due(case: Case, done: int) -> bool:
    policy = case.checkpoint
    return policy is not None and (done % policy.every == 0 or done == case.total_steps)


class Reading(NamedTuple):
    """Clocks of this rank around a step."""

    cpu_s: float
    machine_busy_s: float

    def since(self, before: Reading) -> list[float]:
        """What both have counted since an earlier reading."""
        return [self.cpu_s - before.cpu_s, self.machine_busy_s - before.machine_busy_s]


class Done(NamedTuple):
    """What is known of a step after it."""

    record: StepRecord
    spans: list[list[Any]]
    """This rank's, in seconds from the start of the step."""
    working_s: list[float]
    """How long each rank computed, without what it waited for."""


def run_step(trainer: Trainer, step: int, watch: FiniteWatch) -> Done:
    """One step of training; `step` counts from the very first one."""
    tokens, targets = trainer.batch(step)
    recorder = trainer.recorder
    recorder.say("waiting: start of a step")
    to_shared_ns = clock_offset_ns(trainer.control)
    watch.clear()
    dist.barrier(group=trainer.control)
    before = reading()
    start_ns = recorder.begin_step(step)
    loss = trainer.forward_backward(tokens, targets)
    trainer.update()
    end_ns = recorder.end_step()
    after = reading()
    rows = recorder.rows()
    recorder.say("waiting: end of a step")
    everyone = gathered(
        trainer.control,
        [
            start_ns + to_shared_ns,
            end_ns + to_shared_ns,
            *after.since(before),
            0.0 if loss is None else loss.item(),
            loss is not None,
            sum(row.end_ns - row.begin_ns for row in rows if row.label.stream in (COMPUTE, HOST)) * 1e-9,
        ],
    )
    zero_ns = min(row[0] for row in everyone)
    losses = [row[4] for row in everyone if row[5]]
    if not all(map(math.isfinite, losses)):
        _blame_infinity(trainer, step, losses, watch.first())
    record = StepRecord(
        time_s=(max(row[1] for row in everyone) - zero_ns) * 1e-9,
        loss=sum(losses) / len(losses) if losses else math.nan,  # one rank alone may have no head
        foreign_cpu_s=foreign_cpu_s([row[2:4] for row in everyone]),
    )
    return Done(record, _relative(rows, zero_ns - to_shared_ns), [row[6] for row in everyone])


def foreign_cpu_s(since: list[list[float]]) -> float:
    """CPU time that other processes used, on the machine where it was most, from all ranks' clocks."""
    size = ranks_per_node()
    nodes = [since[first : first + size] for first in range(0, len(since), size)]
    return max(0.0, *(max(row[1] for row in node) - sum(row[0] for row in node) for node in nodes))


def _blame_infinity(trainer: Trainer, step: int, losses: list[float], mine: Origin | None) -> NoReturn:
    """Stop for a loss that is not finite, with the ranks and the layer where it came up.

    All ranks say the same, so that every machine of several knows.
    """
    nowhere = Origin(sys.maxsize, 0)
    found = gathered(trainer.control, list(map(float, mine or nowhere)))
    first = min(found)
    ranks = [rank for rank, origin in enumerate(found) if origin == first]
    known = first[0] < nowhere.stage
    time.sleep(LAST_MESSAGE_S)
    raise NotFinite(
        "the loss is no longer finite",
        where=f"step {step}"
        + (f", rank {', '.join(map(str, ranks))}, {Origin(*map(int, first))}" if known else ""),
        got=", ".join(f"{loss:g}" for loss in losses[:8]),
        hint=None if known else "every layer's output was finite: it came up in the head or the loss",
    )


def gathered(control: dist.ProcessGroup, mine: list[float]) -> list[list[float]]:
    """Numbers of every rank, on every rank; outside what is timed."""
    own = torch.tensor(mine, dtype=torch.float64)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(control))]
    dist.all_gather(everyone, own, group=control)
    return [row.tolist() for row in everyone]


def reading() -> Reading:
    """The clocks now."""
    return Reading(time.process_time(), _machine_busy_s())


def _machine_busy_s() -> float:
    """CPU time that everything on this machine has used, of all cores, without waiting for disks."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / CLOCK_TICKS_PER_S


def _relative(rows: list[Row], zero_ns: float) -> list[list[Any]]:
    """Spans with times in seconds from the start of the step."""
    return [[*row.label, (row.begin_ns - zero_ns) * 1e-9, (row.end_ns - zero_ns) * 1e-9] for row in rows]


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown processor"
