"""The timed steps of a pipeline without a flush on one rank: steps that no barrier parts."""

from __future__ import annotations

import json
from statistics import fmean
from typing import Any, TextIO

import torch.distributed as dist

from parsim.execute.asynchronous.stale_pipeline import StalePipeline, mean_losses
from parsim.execute.launch.clocks import clock_offset_ns
from parsim.execute.request import Case
from parsim.execute.steps import StepRecord, median_step
from parsim.execute.training.recorder import Row
from parsim.execute.training.timing import about_device, foreign_cpu_s, gathered, reading
from parsim.execute.training.trainer import Trainer
from parsim.schedule.pipedream import measured_steps


def time_stale_case(case: Case, trainer: Trainer, progress: TextIO, index: int) -> dict[str, Any]:
    """As timing.time_case, with the time of a step from its ranks' last updates.

    Neighbouring steps differ where micro-batches under way do not divide a step's, so a step's time is
    the mean over as many steps as the pattern has. Steps of all ranks together take as long as those of
    the slowest one.
    """
    count, control, recorder = trainer.num_micro_batches, trainer.control, trainer.recorder

    def tell(step: int) -> None:
        """On the first replica's last stage, which knows the loss: its own steps."""
        pp, *others = trainer.mesh.get_coordinate()
        if pp < case.plan.pp - 1 or any(others) or step >= case.total_steps:
            return
        began_ns = pipeline.updated_ns[-1 - per_step] if step else start_ns
        loss = fmean(pipeline.losses[i] for i in range(step * count, (step + 1) * count))
        time_s = (pipeline.updated_ns[-1] - began_ns) * 1e-9
        line = {"case": index, "step": step - case.warmup, "time_s": time_s, "loss": loss, "slow": {}}
        progress.write(json.dumps(line) + "\n")
        progress.flush()

    pipeline, per_step = StalePipeline(trainer, tell), count // case.schedule.update_every
    to_shared_ns = clock_offset_ns(control)
    recorder.say("waiting: start of the run")
    dist.barrier(group=control)
    before = reading()
    start_ns = recorder.begin_step(0)
    pipeline.run()
    end_ns = recorder.end_step()
    after = reading()
    recorder.say("waiting: end of the run")
    ends_ns = [start_ns, *pipeline.updated_ns[per_step - 1 :: per_step]]
    everyone = gathered(control, [ns + to_shared_ns for ns in ends_ns])
    window = measured_steps(case.plan.pp, count)
    foreign_s = foreign_cpu_s(gathered(control, after.since(before))) / ((end_ns - start_ns) * 1e-9)
    losses = _losses(pipeline, control)
    steps = []
    for step in range(case.warmup, case.total_steps):
        back = min(window, step + 1)
        time_s = max(own[step + 1] - own[step + 1 - back] for own in everyone) * 1e-9 / back
        steps.append(StepRecord(time_s, losses[step], foreign_s * time_s))
    median = median_step(steps)
    last_ns = max(own[case.warmup + median + 1] for own in everyone) - to_shared_ns
    length_ns = window * steps[median].time_s * 1e9
    return about_device(trainer.device) | {
        "steps": [record._asdict() for record in steps],
        "timed_from": 0,
        "spans": _clipped(recorder.rows(), last_ns - length_ns, last_ns),
        "gradient_payload_bytes": {},
        "weight_versions": pipeline.most_versions,
        "staleness": dict(pipeline.staleness),
    }


def _losses(pipeline: StalePipeline, control: dist.ProcessGroup) -> list[float]:
    """Mean loss over the micro-batches and replicas of every step, on every rank; collective."""
    schedule = pipeline.trainer.case.schedule
    by_step: list[float] = mean_losses(pipeline, control).view(schedule.steps, -1).mean(1).tolist()
    return by_step


def _clipped(rows: list[Row], begin_ns: float, end_ns: float) -> list[list[Any]]:
    """What happened between two instants, in seconds from the first of them on."""
    spans: list[list[Any]] = []
    for row in rows:
        first, last = max(row.begin_ns, begin_ns), min(row.end_ns, end_ns)
        if first < last:
            spans.append([*row.label, (first - begin_ns) * 1e-9, (last - begin_ns) * 1e-9])
    return spans
