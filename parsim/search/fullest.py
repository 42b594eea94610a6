"""The pipeline rank of a plan that needs most memory."""

from __future__ import annotations

from parsim.cost.cell import cell_of
from parsim.cost.memory import MemoryUse, rank_memory
from parsim.cost.stage import CostModel
from parsim.plan import Job, ParallelPlan, stage_layers
from parsim.schedule.in_flight import in_flight
from parsim.schedule.pipedream import weight_versions

FULLER_LATER = ("zbv", "dualpipe", "dualpipev")
"""Schedules whose later ranks may keep more than the first, or other numbers of each chunk."""


def fullest_rank(job: Job, plan: ParallelPlan, costs: CostModel) -> MemoryUse:
    """Memory of the pipeline rank that needs most.

    Of ranks with the same stages only the first is looked at, where no later one keeps more in flight.
    """
    split = stage_layers(job.model, plan)
    stages = costs.stages(cell_of(job, plan), split, plan.recompute_layers) * plan.chains
    num_micro_batches = plan.num_micro_batches(job)
    uses: dict[tuple[int, ...], MemoryUse] = {}
    for rank, own in enumerate(plan.rank_stages()):
        mine = [stages[s] for s in own]
        key = (*map(id, mine), rank if plan.schedule in FULLER_LATER else 0)
        if key not in uses:
            kept = in_flight(plan, rank, num_micro_batches, [stage.saved_bytes for stage in mine])
            versions = weight_versions(plan, rank)
            uses[key] = rank_memory(mine, kept, job, plan, costs.stack, weight_versions=versions)
    return max(uses.values(), key=lambda use: use.peak)
