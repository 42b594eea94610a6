"""The search: every legal plan bounded, the promising ones replayed, the best ranked."""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from parsim.cost.cell import cell_of
from parsim.cost.memory import MemoryUse, rank_memory
from parsim.cost.stage import CostModel, StageCost
from parsim.cost.step import step_cost
from parsim.errors import NothingFits
from parsim.plan import Job, ParallelPlan, stage_layers
from parsim.schedule.check import plan_problems
from parsim.schedule.in_flight import in_flight
from parsim.schedule.pipedream import weight_versions
from parsim.search.bound import lower_bound_s
from parsim.search.space import Constraints, check_constraints, enumerate_plans
from parsim.simulate.prediction import Prediction, estimate, step_seconds
from parsim.units import format_bytes

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how far it is, and how far it will go (0: not known)."""

FULLER_LATER = ("interleaved-zb", "zbv", "dualpipe", "dualpipev")
"""Schedules whose later ranks may keep more than the first, or other numbers of each chunk."""

OUT_OF_MEMORY = "does not fit in device memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceCount:
    """How many plans there were, and what became of them."""

    enumerated: int
    legal: int
    fits: int
    rejected: dict[str, int]
    """By reason: illegal, or out of memory."""


class NoPlan(NothingFits):
    """No plan of the space is legal, or none fits; `space` says what became of them."""

    space: SpaceCount


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """The best plans of a space, fastest first."""

    space: SpaceCount
    plans: tuple[Prediction, ...]
    optimal: bool
    """No plan in the space can be faster than the first, under this cost model."""
    replayed: int
    search_s: float


def search(
    job: Job,
    gpus: int,
    costs: CostModel,
    *,
    constraints: Constraints | None = None,
    top: int = 10,
    budget_s: float = 60.0,
    progress: Progress | None = None,
) -> SearchResult:
    """The `top` fastest plans that fit.

    Plans are replayed in order of their lower bound until none that is left can be among the best; a
    search that runs out of `budget_s` (or is interrupted) returns what it has, with optimal false.

    Raises NoPlan, with the least memory that any plan needs, where none fits, and ParsimError where the
    constraints leave no plan at all.
    """
    started = time.monotonic()
    constraints = constraints or Constraints()
    check_constraints(gpus, constraints)
    report = progress or (lambda what, done, total: None)
    candidates, space = _bounded(job, gpus, costs, constraints, report)
    best: list[tuple[float, int, ParallelPlan]] = []  # a heap, the slowest kept plan on top
    optimal, replayed = True, 0
    try:
        for order, (bound_s, plan) in enumerate(candidates):
            if len(best) == top and bound_s >= -best[0][0]:
                break
            if time.monotonic() - started > budget_s and len(best) >= min(top, len(candidates)):
                optimal = False
                break
            entry = (-step_seconds(job, plan, costs), -order, plan)
            replayed += 1
            heapq.heappush(best, entry) if len(best) < top else heapq.heappushpop(best, entry)
            report("replaying", order + 1, 0)
    except KeyboardInterrupt:
        optimal = False
        if not best:
            raise
    ranked = [plan for _, _, plan in sorted(best, key=lambda entry: (-entry[0], -entry[1]))]
    return SearchResult(
        space=space,
        plans=tuple(estimate(job, plan, costs) for plan in ranked),
        optimal=optimal,
        replayed=replayed,
        search_s=time.monotonic() - started,
    )


def _bounded(
    job: Job, gpus: int, costs: CostModel, constraints: Constraints, report: Progress
) -> tuple[list[tuple[float, ParallelPlan]], SpaceCount]:
    """Plans that are legal and fit, in order of their lower bound, and the count of the others."""
    rejected: Counter[str] = Counter()
    candidates: list[tuple[float, ParallelPlan]] = []
    legal = enumerated = 0
    least: tuple[float, ParallelPlan] | None = None
    overlap = costs.stack.default_tp_overlap
    for plan in enumerate_plans(job, gpus, constraints, tp_overlap=overlap):
        enumerated += 1
        if enumerated % 2000 == 0:
            report("examining plans", enumerated, 0)
        problem = next(plan_problems(job, plan, costs.cluster), None)
        if problem is not None:
            rejected[problem.what] += 1
            continue
        legal += 1
        needed = fullest_rank(job, plan, costs).peak + costs.stack.context_bytes
        if least is None or needed < least[0]:
            least = needed, plan
        if needed > costs.cluster.device.memory_bytes:
            rejected[OUT_OF_MEMORY] += 1
            continue
        candidates.append((lower_bound_s(step_cost(job, plan, costs), job, plan, costs.stack), plan))
    candidates.sort(key=lambda candidate: candidate[0])
    space = SpaceCount(
        enumerated=enumerated,
        legal=legal,
        fits=len(candidates),
        rejected=dict(sorted(rejected.items(), key=lambda item: (-item[1], item[0]))),
    )
    if not candidates:
        error = _no_plan(space, least, costs)
        error.space = space
        raise error
    return candidates, space


def _no_plan(space: SpaceCount, least: tuple[float, ParallelPlan] | None, costs: CostModel) -> NoPlan:
    """Why the answer is no: every plan is illegal, or the smallest is too large."""
    if least is None:
        reasons = "; ".join(f"{count} × {reason}" for reason, count in space.rejected.items())
        return NoPlan(
            f"no plan is legal: {space.enumerated} were tried",
            where="the constraints and the number of GPUs",
            got=reasons or "constraints that leave nothing to try",
            hint="relax what rules most of them out",
        )
    device = costs.cluster.device
    return NoPlan(
        f"no plan fits: of {space.enumerated} plans {space.legal} are legal; the least that one of them "
        f"needs is {format_bytes(least[0])} on a device",
        where=least[1].short(),
        expected=f"at most {format_bytes(device.memory_bytes)}, the memory of {device.name}",
        hint="more GPUs, a shorter sequence" + ("" if least[1].zero == 3 else ", or --zero 3"),
    )


def fullest_rank(job: Job, plan: ParallelPlan, costs: CostModel) -> MemoryUse:
    """Memory of the pipeline rank that needs most.

    Of ranks with the same stages only the first is looked at, where no later one keeps more in flight.
    """
    stages = costs.stages(cell_of(job, plan), stage_layers(job.model, plan)) * plan.chains
    num_micro_batches = plan.num_micro_batches(job)
    own: list[list[StageCost]] = [[] for _ in range(plan.pp)]
    for s, stage in enumerate(stages):
        own[plan.stage_rank(s)].append(stage)
    uses: dict[tuple[int, ...], MemoryUse] = {}
    for rank, mine in enumerate(own):
        key = (*map(id, mine), rank if plan.schedule in FULLER_LATER else 0)
        if key not in uses:
            kept = in_flight(plan, rank, num_micro_batches, [stage.saved_bytes for stage in mine])
            versions = weight_versions(plan, rank)
            uses[key] = rank_memory(mine, kept, job, plan, costs.stack, weight_versions=versions)
    return max(uses.values(), key=lambda use: use.peak)
