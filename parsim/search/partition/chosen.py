"""A plan with its stages chosen, and why: the loads of its ranks before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from parsim.cost.cell import cell_of
from parsim.cost.memory import ENOUGH_HEADROOM, rank_memory
from parsim.cost.stage import CostModel, StageCost
from parsim.plan import Job, ParallelPlan, recomputed_layers, stage_layers
from parsim.schedule import ONE_CHUNK_SCHEDULES
from parsim.schedule.in_flight import in_flight
from parsim.schedule.pipedream import weight_versions
from parsim.schedule.program import step_time_s
from parsim.search.partition.plan import Partitioner
from parsim.simulate.prediction import program_of

MOST_ACTIONS = 50_000
"""Forwards and backwards of a step that is walked and estimated to choose its stages: a few seconds.
With more of them the fill of the pipeline, which is what the walk knows better, no longer matters."""


class Load(NamedTuple):
    """What a pipeline rank has to do and to hold."""

    seconds: float
    """Forwards and backwards of a micro-batch on all its stages."""
    num_bytes: float
    """At its fullest moment, context included."""
    limit_bytes: float
    """Memory of its device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loads:
    """The stages of a plan, and the loads of its ranks."""

    layers: tuple[int, ...]
    """Of every stage of the model."""
    recomputed: tuple[int, ...]
    """Of these; multi-token prediction modules count."""
    ranks: tuple[Load, ...]

    @property
    def slowest(self) -> int:
        """The rank that takes longest."""
        return max(range(len(self.ranks)), key=lambda rank: self.ranks[rank].seconds)

    @property
    def fullest(self) -> int:
        """The rank that has least to spare."""
        spare = [load.limit_bytes - load.num_bytes for load in self.ranks]
        return spare.index(min(spare))

    @property
    def fits(self) -> bool:
        """Whether every rank fits its device."""
        return all(load.num_bytes <= load.limit_bytes for load in self.ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Partitioned:
    """A plan with its stages chosen."""

    plan: ParallelPlan
    split: bool
    """Whether its stage split was to be chosen."""
    counts: bool
    """Whether its recomputed layers were."""
    before: Loads
    """Of the usual split, with all layers recomputed in the plan's way."""
    after: Loads


def partitioned(
    job: Job, plan: ParallelPlan, costs_by_rank: Sequence[CostModel], *, split: bool, counts: bool
) -> Partitioned:
    """The plan with the stage split (where `split`) and recomputed layers (where `counts`) that make its
    step shortest within the memory of its ranks; costs_by_rank: of every pipeline rank.

    Of the usual split, the best one by formula and what a walk through the schedule makes of it, the one
    with the shortest step, the usual one where it is as short. Counts leave ENOUGH_HEADROOM of every
    device free if they can. Where nothing fits, the one that comes nearest to fitting.
    """
    for headroom in (ENOUGH_HEADROOM, 0.0) if counts else (0.0,):
        options = _options(Partitioner(job, headroom), plan, costs_by_rank, split=split, counts=counts)
        chosen = _shortest(job, options, costs_by_rank)
        after = loads_of(job, chosen, costs_by_rank)
        if after.fits:
            break
    before = loads_of(job, plan, costs_by_rank)
    return Partitioned(plan=chosen, split=split, counts=counts, before=before, after=after)


def _options(
    partitioner: Partitioner,
    plan: ParallelPlan,
    costs_by_rank: Sequence[CostModel],
    *,
    split: bool,
    counts: bool,
) -> list[ParallelPlan]:
    """The plan with the usual split, the best one by formula, and what a walk makes of that."""
    options = [partitioner.partition(plan, costs_by_rank, split=False, counts=counts)]
    if split and plan.pp > 1 and _one_chunk(plan):
        options.append(partitioner.partition(plan, costs_by_rank, split=True, counts=counts))
        if _actions(partitioner.job, plan) <= MOST_ACTIONS:
            options.append(
                partitioner.partition(plan, costs_by_rank, split=True, counts=counts, walk=True)
            )
    return options


def _shortest(
    job: Job, options: Sequence[ParallelPlan], costs_by_rank: Sequence[CostModel]
) -> ParallelPlan:
    """The first of those that fit whose step is shortest; without any that fits the last."""
    fitting = list(dict.fromkeys(plan for plan in options if loads_of(job, plan, costs_by_rank).fits))
    if len(fitting) < 2 or _actions(job, fitting[0]) > MOST_ACTIONS:
        return fitting[-1] if fitting else options[-1]
    return min(
        fitting,
        key=lambda plan: step_time_s(
            program_of(job, plan, costs_by_rank[0], costs_by_rank=costs_by_rank)[0]
        ),
    )


def _one_chunk(plan: ParallelPlan) -> bool:
    return plan.schedule in ONE_CHUNK_SCHEDULES or plan.vpp == 1


def _actions(job: Job, plan: ParallelPlan) -> int:
    return 2 * plan.num_stages * plan.num_micro_batches(job)


def loads_of(job: Job, plan: ParallelPlan, costs_by_rank: Sequence[CostModel]) -> Loads:
    """What every pipeline rank of a plan has to do and to hold."""
    layers, cell = stage_layers(job.model, plan), cell_of(job, plan)
    kinds = list(costs_by_rank[0].kinds(layers, plan.recompute_layers)) * plan.chains
    m, ranks = plan.num_micro_batches(job), []
    for rank, (costs, own) in enumerate(zip(costs_by_rank, plan.rank_stages(), strict=True)):
        stages: list[StageCost] = [costs.stage(cell, kinds[s]) for s in own]
        kept = in_flight(plan, rank, m, [stage.saved_bytes for stage in stages])
        versions = weight_versions(plan, rank)
        memory = rank_memory(stages, kept, job, plan, costs.stack, weight_versions=versions)
        times = (stage.time for stage in stages)
        ranks.append(
            Load(
                sum(time.forward.total_s + time.backward.total_s for time in times),
                memory.peak + costs.stack.context_bytes,
                costs.cluster.device.memory_bytes,
            )
        )
    return Loads(layers=layers, recomputed=recomputed_layers(job.model, plan), ranks=tuple(ranks))
