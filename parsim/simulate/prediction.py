"""Prediction: what parsim says of a plan, and how it gets there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from parsim.cost.flops import model_flops
from parsim.cost.interval import interval_s
from parsim.cost.memory import MemoryUse, rank_memory
from parsim.cost.stage import CostModel, StageCost
from parsim.cost.step import StepCost, mixed_step_cost, step_cost
from parsim.hardware import peak_flops_per_s
from parsim.plan import ASYNCHRONOUS_SCHEDULES, Job, ParallelPlan, stage_layers
from parsim.schedule import make_schedule
from parsim.schedule.action import Schedule
from parsim.schedule.in_flight import peak_in_flight
from parsim.schedule.lower import lower
from parsim.schedule.measured import MeasuredWork, StageKind, measured_cost
from parsim.schedule.pipedream import staleness, weight_versions
from parsim.schedule.program import Program, task_times, timeline_of
from parsim.simulate.replay import replay
from parsim.simulate.shared_cores import times_on_cores
from parsim.simulate.steady import steady_steps, steps_shown
from parsim.simulate.uneven import Unevenness, uneven_program
from parsim.timeline import Timeline, breakdown_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A simulated step."""

    job: Job
    plan: ParallelPlan
    hardware: str
    stack: str
    step_time_s: float
    interval_s: tuple[float, float]
    """90% interval."""
    breakdown_s: dict[str, float]
    """Adds up to step_time_s."""
    memory: MemoryUse
    """Of the rank with least to spare."""
    context_bytes: float
    device_memory_bytes: float
    peak_flops_per_s: float
    """Dense peak of the GEMMs' dtype on one device (mean over devices of several kinds)."""

    @property
    def fits(self) -> bool:
        """Whether the fullest rank fits on its device, context and communication buffers included."""
        return self.memory.peak + self.context_bytes <= self.device_memory_bytes

    @property
    def mfu(self) -> float:
        """Model FLOPs over the peak (PaLM appendix B: attention counted in full)."""
        return self.model_flops_per_s_per_gpu() / self.peak_flops_per_s

    def model_flops_per_s_per_gpu(self, *, causal: bool = False) -> float:
        """Model FLOPs a second on each GPU."""
        return model_flops(self.job, causal=causal) / (self.step_time_s * self.plan.gpus)

    def to_item(self) -> dict[str, Any]:
        """The ITEM of the JSON contract, with all that is needed to run the plan."""
        job = asdict(self.job)
        model = {k: v for k, v in job.pop("model").items() if v is not None}
        return {
            "model": model,
            "hardware": self.hardware,
            "stack": self.stack,
            "job": job,
            "plan": asdict(self.plan),
            "stage_layers": list(stage_layers(self.job.model, self.plan)),
            "gpus": self.plan.gpus,
            "num_micro_batches": self.plan.num_micro_batches(self.job),
            "step_time_s": self.step_time_s,
            "interval_s": list(self.interval_s),
            "tokens_per_s_per_gpu": self.job.tokens / (self.step_time_s * self.plan.gpus),
            "model_tflops_per_gpu": self.model_flops_per_s_per_gpu() / 1e12,
            "mfu": self.mfu,
            "mfu_causal": self.model_flops_per_s_per_gpu(causal=True) / self.peak_flops_per_s,
            "bubble_fraction": self.breakdown_s["bubble"] / self.step_time_s,
            "fits": self.fits,
            "memory_bytes": self.memory.to_data(self.context_bytes),
            "breakdown_s": self.breakdown_s,
        } | self._stale_item()

    def stale_weights(self) -> list[str]:
        """How training differs from that of one process, for reading; nothing where it does not."""
        item = self._stale_item()
        if not item:
            return []
        late, versions = (", ".join(map(str, numbers)) for numbers in item.values())
        return [
            "not those of synchronous training: no flush ends a step",
            f"gradients come {late} updates late, by stage; {versions} versions of the weights are kept",
        ]

    def _stale_item(self) -> dict[str, list[int]]:
        """What only schedules without a flush have, by stage."""
        if self.plan.schedule not in ASYNCHRONOUS_SCHEDULES:
            return {}
        stages = range(self.plan.pp)
        return {
            "staleness": [staleness(self.plan, stage) for stage in stages],
            "weight_versions": [weight_versions(self.plan, stage) for stage in stages],
        }


def memory_by_rank(
    cost: StepCost, schedule: Schedule, job: Job, plan: ParallelPlan, costs: CostModel
) -> list[MemoryUse]:
    """Memory of every pipeline rank at its fullest moment."""
    own: list[dict[int, StageCost]] = [{} for _ in schedule.ranks]
    for stage, rank in sorted(schedule.stage_ranks().items()):
        own[rank][stage] = cost.stages[stage]
    uses = []
    for rank, (actions, stages) in enumerate(zip(schedule.ranks, own, strict=True)):
        _, held = peak_in_flight(actions, {s: stage.saved_bytes for s, stage in stages.items()})
        use = rank_memory(
            tuple(stages.values()),
            tuple(held[s] for s in stages),
            job,
            plan,
            costs.stack,
            weight_versions=weight_versions(plan, rank),
        )
        uses.append(use)
    return uses


def program_of(
    job: Job,
    plan: ParallelPlan,
    costs: CostModel,
    schedule: Schedule | None = None,
    *,
    costs_by_rank: Sequence[CostModel] = (),
    work: MeasuredWork | None = None,
) -> tuple[Program, list[MemoryUse]]:
    """The Program of a plan's step, and the memory of each of its ranks.

    costs_by_rank: of every pipeline rank, where their devices are not all of one kind. work: what that
    of one rank took, where it was measured.
    """
    schedule = schedule or make_schedule(plan, plan.num_micro_batches(job))
    cost = mixed_step_cost(job, plan, costs_by_rank) if costs_by_rank else step_cost(job, plan, costs)
    memory = memory_by_rank(cost, schedule, job, plan, costs)
    compute_s: dict[StageKind, float] = {}
    if work is not None:
        cost, compute_s, _ = measured_cost(work, cost, job, plan, costs)
    static = tuple(use.peak - use.activations for use in memory)
    title = f"{job.model.name}, {plan.short()}"
    program = lower(
        schedule, cost, plan, costs.stack, compute_s=compute_s, static_bytes=static, title=title
    )
    return program, memory


def predict(
    job: Job,
    plan: ParallelPlan,
    costs: CostModel,
    schedule: Schedule | None = None,
    *,
    uneven: Unevenness | None = None,
    costs_by_rank: Sequence[CostModel] = (),
    work: MeasuredWork | None = None,
    cores: int | None = None,
) -> tuple[Prediction, Timeline]:
    """Simulate one step of a legal plan; `schedule` replaces the one that the plan names, `work` the
    modelled compute. `cores`: of the one machine that all ranks run on, where they may be fewer.
    """
    schedule = schedule or make_schedule(plan, plan.num_micro_batches(job))
    program, memory = program_of(job, plan, costs, schedule, costs_by_rank=costs_by_rank, work=work)
    if uneven is not None:
        program = uneven_program(program, plan, uneven)
    if cores is None or cores >= plan.gpus:
        timeline = replay(program)
    else:
        timeline = timeline_of(program, times_on_cores(program, plan, cores))
    if schedule.update_every:
        timeline = steady_steps(timeline, schedule)
    return prediction_of(job, plan, costs, timeline, memory, costs_by_rank=costs_by_rank), timeline


def estimate(
    job: Job, plan: ParallelPlan, costs: CostModel, *, uneven: Unevenness | None = None
) -> Prediction:
    """The same prediction from the longest path through the Program, without a discrete-event replay."""
    schedule = make_schedule(plan, plan.num_micro_batches(job))
    program, memory = program_of(job, plan, costs, schedule)
    if uneven is not None:
        program = uneven_program(program, plan, uneven)
    timeline = timeline_of(program, task_times(program))
    if schedule.update_every:
        timeline = steady_steps(timeline, schedule)
    return prediction_of(job, plan, costs, timeline, memory)


def prediction_of(
    job: Job,
    plan: ParallelPlan,
    costs: CostModel,
    timeline: Timeline,
    memory: list[MemoryUse],
    *,
    costs_by_rank: Sequence[CostModel] = (),
) -> Prediction:
    """What a simulated timeline says of a plan; its memory is that of the rank with least to spare."""
    steps = steps_shown(plan, plan.num_micro_batches(job))
    step_s = timeline.end_s / steps
    clusters = [c.cluster for c in costs_by_rank] or [costs.cluster] * len(memory)
    room = [c.device.memory_bytes - use.peak for c, use in zip(clusters, memory, strict=True)]
    fullest = room.index(min(room))
    kinds = {cluster.name: cluster for cluster in clusters}.values()
    intervals = [interval_s(step_s, job, cluster, costs.stack) for cluster in kinds]
    return Prediction(
        job=job,
        plan=plan,
        hardware=" + ".join(cluster.name for cluster in kinds),
        stack=costs.stack.name,
        step_time_s=step_s,
        interval_s=(min(low for low, _ in intervals), max(high for _, high in intervals)),
        breakdown_s={key: seconds / steps for key, seconds in breakdown_s(timeline).items()},
        memory=memory[fullest],
        context_bytes=costs.stack.context_bytes,
        device_memory_bytes=clusters[fullest].device.memory_bytes,
        peak_flops_per_s=fmean(peak_flops_per_s(c.device, job.precision) for c in clusters),
    )
