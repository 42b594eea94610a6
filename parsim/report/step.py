"""The step behind an ITEM, simulated again: its timeline and costs, which a document does not hold."""

from __future__ import annotations

from dataclasses import dataclass

from parsim.config import load_cluster, load_stack
from parsim.cost.stage import CostModel
from parsim.errors import ParsimError
from parsim.hardware import peak_flops_per_s, with_overrides
from parsim.plan import ParallelPlan
from parsim.plan_file import PlanFile, plan_from_data
from parsim.report.document import Node
from parsim.report.memory import memory_picture
from parsim.report.page import Lines, Part, Section
from parsim.report.schedule import MOST_SPANS, schedule_of
from parsim.schedule.check import check_plan
from parsim.search.sensitivity import speed_gains, what_binds
from parsim.simulate.prediction import Prediction, predict
from parsim.timeline import Timeline

SAME = 1e-6
"""Relative difference of two step times that are the same but for rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What is known of a predicted step beside its ITEM."""

    file: PlanFile
    costs: CostModel | None = None
    """None where the hardware or the stack is not at hand, or devices differ."""
    prediction: Prediction | None = None
    timelines: tuple[Timeline, ...] = ()
    why_not: str = ""
    """Why something of it is missing."""

    @property
    def binds(self) -> str:
        """What holds the step back, in a sentence; empty where nobody knows."""
        if self.prediction is None or self.costs is None:
            return ""
        return what_binds(speed_gains(self.prediction, self.costs), self.prediction.breakdown_s)

    @property
    def capacity_bytes(self) -> float | None:
        """What a device's memory offers to the allocator."""
        if self.costs is None:
            return None
        return self.costs.cluster.device.memory_bytes - self.costs.stack.context_bytes


def step_of(item: Node, timelines: tuple[Timeline, ...] = ()) -> Step:
    """The step of an ITEM, with the given timelines or, without them, simulated again.

    The schedule is left out where another simulation would be of another step, as with stragglers.
    """
    file = plan_from_data(dict(item.data), where=item.where)
    if file.job is None:
        raise ParsimError("this item does not say what is trained", where=item.where)
    costs, why_not = costs_of(file)
    if costs is None:
        return Step(file=file, timelines=timelines, why_not=why_not)
    check_plan(file.job, file.plan, costs.cluster)
    prediction, timeline = predict(file.job, file.plan, costs)
    step_s = item.positive("step_time_s")
    if abs(prediction.step_time_s / step_s - 1) <= SAME:
        return Step(file=file, costs=costs, prediction=prediction, timelines=timelines or (timeline,))
    return Step(
        file=file,
        costs=costs,
        timelines=timelines,
        why_not=""
        if timelines
        else "the plan alone gives another step: more was asked of it, such as "
        "a straggler or a fabric, or parsim has changed since",
    )


def costs_of(file: PlanFile) -> tuple[CostModel | None, str]:
    """The costs of what a plan file names; None, and why, where that is not at hand."""
    if file.job is None or file.hardware is None:
        return None, "no hardware is named"
    try:
        cluster = with_overrides(load_cluster(file.hardware), **file.hardware_overrides)  # type: ignore[arg-type]
        stack = load_stack(file.stack or cluster.default_stack)
        peak_flops_per_s(cluster.device, file.job.precision)  # refuses a dtype that it has not
    except ParsimError as error:
        why = f"{error.what} ({error.where})" if error.where else error.what
        return None, f"not at hand: {why}"
    return CostModel(file.job.model, cluster, stack), ""


def timeline_sections(
    step: Step, memory: tuple[Part, ...] = (), *, of: str = "", most_spans: int = MOST_SPANS
) -> list[Section]:
    """The schedule `of` something, and its memory over time after other `memory` parts."""
    of = f" of {of}" if of else ""
    sections = []
    drawn = tuple(timeline for timeline in step.timelines if timeline.spans and timeline.end_s > 0)
    if drawn:
        caption = f"{drawn[0].title}: who does what when"
        if len(drawn) > 1:
            caption = f"{drawn[0].title}: {' and '.join(t.source for t in drawn)}, rank by rank"
        caption += _alike(step.file.plan, drawn[0])
        chart = schedule_of(drawn, caption=caption, most_spans=most_spans)
        sections.append(Section(title=f"Schedule{of}", parts=(chart,)))
        over_time = memory_picture(drawn[0], capacity_bytes=step.capacity_bytes)
        memory = (*memory, over_time) if over_time else memory
    elif step.why_not:
        why = Lines(lines=(f"Not shown: {step.why_not}.",))
        sections.append(Section(title=f"Schedule{of}", parts=(why,)))
    if memory:
        sections.append(Section(title=f"Memory{of}", parts=memory))
    return sections


def _alike(plan: ParallelPlan, timeline: Timeline) -> str:
    """That each row stands for many devices, where replicas and tensor-parallel ranks are folded."""
    folded = plan.gpus > plan.pp == len(timeline.ranks) and not timeline.copies
    if not folded:
        return ""
    return f"; rank p is pipeline rank p, {plan.gpus // plan.pp:,} devices that do the same"
