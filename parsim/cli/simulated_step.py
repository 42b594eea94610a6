"""The step that `parsim simulate` is about, from its flags to its Timeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from parsim.cli.options import require_flush
from parsim.cli.output import Section, say
from parsim.setup import Setup

if TYPE_CHECKING:
    from parsim.cost.stage import CostModel
    from parsim.plan import Job, ParallelPlan
    from parsim.schedule.action import Schedule
    from parsim.simulate.contention import Contention
    from parsim.simulate.prediction import Prediction
    from parsim.simulate.uneven import Unevenness
    from parsim.timeline import Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRequest:
    """What is to be simulated."""

    setup: Setup
    plan: ParallelPlan
    schedule: Schedule
    costs: CostModel
    rank_hardware: Sequence[str] = ()
    """Other devices of some pipeline ranks, as given."""
    costs_by_rank: Sequence[CostModel] = ()
    """Of every pipeline rank, where their devices are not all of one kind."""
    uneven: Unevenness | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedStep:
    """What came out."""

    request: StepRequest
    prediction: Prediction
    timeline: Timeline
    contention: Contention | None = None
    """What sharing the network did, where a fabric was given."""


def simulate_step(request: StepRequest, fabric: str | None) -> SimulatedStep:
    """Replay the step, over a fabric where `fabric` describes one."""
    from parsim.simulate.prediction import predict

    if fabric is not None:
        from parsim.cli.simulate_network import simulate_over

        prediction, timeline, contention = simulate_over(fabric, request)
        return SimulatedStep(
            request=request, prediction=prediction, timeline=timeline, contention=contention
        )
    prediction, timeline = predict(
        request.setup.job,
        request.plan,
        request.costs,
        request.schedule,
        uneven=request.uneven,
        costs_by_rank=request.costs_by_rank,
    )
    return SimulatedStep(request=request, prediction=prediction, timeline=timeline)


def read_schedule(path: Path | None, plan: ParallelPlan, job: Job) -> Schedule:
    """The schedule from an existing CSV file, or the plan's own, written to a new one."""
    from parsim.config import read_text, write_file
    from parsim.errors import ParsimError
    from parsim.schedule import make_schedule
    from parsim.schedule.check_actions import check_schedule
    from parsim.schedule.csv_file import schedule_from_csv, schedule_to_csv

    num_micro_batches = plan.num_micro_batches(job)
    if path is not None:
        require_flush(plan, "--schedule-csv")
    if path is None or not path.exists():
        schedule = make_schedule(plan, num_micro_batches)
        if path is not None:
            write_file(path, schedule_to_csv(schedule))
            say(f"wrote {path}")
        return schedule
    schedule = schedule_from_csv(read_text(path), name=path.stem, where=str(path), chains=plan.chains)
    found = (schedule.pp, schedule.num_stages, schedule.num_micro_batches)
    wanted = (plan.pp, plan.num_stages, num_micro_batches)
    if found != wanted:
        raise ParsimError(
            "the schedule is for another plan",
            where=str(path),
            got="{} ranks, {} stages, {} micro-batches".format(*found),
            expected="{} ranks, {} stages, {} micro-batches".format(*wanted),
        )
    check_schedule(schedule)
    for stage, rank in schedule.stage_ranks().items():
        if rank != plan.stage_rank(stage):
            raise ParsimError(
                "the schedule places stages elsewhere than the plan",
                where=str(path),
                got=f"stage {stage} on rank {rank}",
                expected=f"stage {stage} on rank {plan.stage_rank(stage)}",
            )
    return schedule


def pictures_section(
    step: SimulatedStep,
    timeline: Timeline,
    *,
    chart: Path | None,
    memory_chart: Path | None,
    trace: Path | None,
) -> Section:
    """Charts and the trace; `timeline` is the step's, perhaps with operations in it."""
    section = Section()
    drawn = worth_drawing(step.timeline, step.request.plan.pp)
    if chart is not None:
        from parsim.charts.gantt import draw_gantt

        draw_gantt(drawn, chart)
        section.written.append(chart)
    if memory_chart is not None:
        from parsim.charts.memory import draw_memory

        prediction = step.prediction
        capacity = prediction.device_memory_bytes - prediction.context_bytes
        draw_memory(drawn, memory_chart, capacity_bytes=capacity)
        section.written.append(memory_chart)
    if trace is not None:
        from parsim.export.chrome_trace import write_chrome_trace

        write_chrome_trace(trace, [timeline])
        section.written.append(trace)
    return section


def worth_drawing(timeline: Timeline, pp: int, *, max_ranks: int = 64) -> Timeline:
    """The timeline, or of many groups of pipelines the one that stands for most and the slowest."""
    if len(timeline.copies) <= max_ranks:
        return timeline
    busy_s = dict.fromkeys(timeline.ranks, 0.0)
    for span in timeline.spans:
        if span.stream == "compute":
            busy_s[span.rank] += span.duration_s
    groups = range(len(timeline.copies) // pp)
    usual = max(groups, key=lambda k: timeline.copies[k * pp])
    others = [k for k in groups if k != usual]
    slowest = max(others, key=lambda k: max(busy_s[k * pp + p] for p in range(pp)))
    ranks = {k * pp + p for k in (usual, slowest) for p in range(pp)}
    return timeline.only(ranks)
