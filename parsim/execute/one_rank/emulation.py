"""One rank of a plan alone on one device: it computes for real, and nobody answers.

Under torch's fake process group a collective returns at once: a gather has copies of the rank's own part
for the others', a sum has no other terms, and what comes from another stage is noise of the right shape.
So what is computed has the work of training and none of its meaning.
"""

from __future__ import annotations

from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import fake_pg

from parsim.execute.one_rank.counting import StepCounter
from parsim.execute.one_rank.emulation_work import work_of
from parsim.execute.one_rank.peak_memory import PeakMemory
from parsim.execute.request import Case
from parsim.execute.training.finite import FiniteWatch
from parsim.execute.training.timing import device_name, run_step, tell
from parsim.execute.training.trainer import Trainer


def join_alone(rank: int, world_size: int) -> dist.ProcessGroup:
    """Be one rank of a world that is not there; the group of those that are, for what is no training."""
    assert fake_pg is not None  # importing it is what makes torch know the backend
    dist.init_process_group("fake", store=dist.HashStore(), rank=rank, world_size=world_size)
    return dist.new_group([rank], backend="gloo")


def emulate_case(case: Case, trainer: Trainer, progress: TextIO, index: int) -> dict[str, Any]:
    """Durations of what this rank does in each step, then what it counts and holds in one more."""
    watch = FiniteWatch(trainer.stages)
    on_gpu = trainer.device.type == "cuda"
    steps, work = [], []
    for step in range(case.total_steps):
        if step == case.warmup and on_gpu:
            torch.cuda.reset_peak_memory_stats()
        done = run_step(trainer, step, watch)
        if step >= case.warmup:
            steps.append(done.record._asdict())
            work.append(work_of(done.spans, done.record.time_s))
        tell(progress, {
            "case": index, "step": step - case.warmup, "time_s": done.record.time_s,
            "loss": done.record.loss, "slow": {},
        })  # fmt: skip
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    trainer.recorder.say("counting operations")
    context = trainer.share.context.ranks
    with StepCounter(trainer.mesh, context and context.group, trainer.tied_group) as counted:
        _step(trainer, case.total_steps)
    if peak is None:
        trainer.recorder.say("tracking memory")
        with PeakMemory(trainer.device) as held:
            _step(trainer, case.total_steps + 1)
        peak = held.peak_bytes
    return {
        "steps": steps,
        "work": work,
        "counted": counted.to_data(),
        "peak_bytes": peak,
        "device": device_name(trainer.device),
        "torch": torch.__version__,
    }


def _step(trainer: Trainer, step: int) -> None:
    """A step that nobody times."""
    trainer.forward_backward(*trainer.batch(step))
    trainer.update()
