"""Measured compute of one pipeline rank in place of modelled, and what follows for the others.

Ranks are measured one at a time, with nobody to communicate with. A stage of the same parts as a
measured one takes the same time. Of other stages the parts that are like those of the measured rank
(layers, most of all) take as many times their modelled time as these did, and parts that it has none of
(the embedding, or the head) take their modelled time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from parsim.cost.cell import Cell, cell_of
from parsim.cost.price import NO_TIME, PartTime, PassTime
from parsim.cost.stage import CostModel, bare
from parsim.cost.step import StepCost
from parsim.plan import Job, ParallelPlan, stage_layers
from parsim.schedule.lower import pass_times

StageKind = tuple[int, str]
"""A stage, and a kind of action: F, B, I or W."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredWork:
    """What the work of one pipeline rank takes, without communication."""

    compute_s: Mapping[StageKind, float]
    """Of one action of each of its stages."""
    optimizer_s: float
    """Of all its stages together."""


class MeasuredCost(NamedTuple):
    """The costs of a step of which one rank was measured."""

    cost: StepCost
    """With the optimizers' times."""
    compute_s: dict[StageKind, float]
    """Of every stage, for lower()."""
    ratios: dict[str, float]
    """Measured over modelled compute of the measured rank's stages, by kind of action; `optimizer`."""


def measured_cost(
    work: MeasuredWork, cost: StepCost, job: Job, plan: ParallelPlan, costs: CostModel
) -> MeasuredCost:
    """Every stage's compute, from what one rank's was."""
    cell = cell_of(job, plan)
    kinds = list(costs.kinds(stage_layers(job.model, plan), plan.recompute_layers)) * plan.chains
    own = sorted({stage for stage, _ in work.compute_s})
    ratios = _ratios(work, cost)
    known = {bare(kind) for stage in own for kind in kinds[stage]}
    compute_s = {}
    for stage, parts in enumerate(kinds):
        like = next((s for s in ([stage] if stage in own else own) if kinds[s] == parts), None)
        for kind, ratio in ratios.items():
            if like is not None and (like, kind) in work.compute_s:
                compute_s[stage, kind] = work.compute_s[like, kind]
            else:
                compute_s[stage, kind] = _scaled_s(parts, kind, ratio, known, cell, costs)
    modelled_s = sum(cost.syncs[stage].optimizer_s for stage in own)
    pace = work.optimizer_s / modelled_s if modelled_s else 1.0
    syncs = tuple(replace(sync, optimizer_s=pace * sync.optimizer_s) for sync in cost.syncs)
    return MeasuredCost(replace(cost, syncs=syncs), compute_s, ratios | {"optimizer": pace})


def _ratios(work: MeasuredWork, cost: StepCost) -> dict[str, float]:
    """Measured over modelled, by kind of action, over all stages of the rank."""
    sums: dict[str, list[float]] = {}
    for (stage, kind), seconds in work.compute_s.items():
        measured_and_modelled = sums.setdefault(kind, [0.0, 0.0])
        measured_and_modelled[0] += seconds
        measured_and_modelled[1] += pass_times(cost.stages[stage].time, PassTime())[kind].compute_s
    return {kind: one / other if other else 1.0 for kind, (one, other) in sums.items()}


def _scaled_s(
    parts: tuple[str, ...], kind: str, ratio: float, known: set[str], cell: Cell, costs: CostModel
) -> float:
    """One action of a stage that was not measured."""
    like, unlike = NO_TIME, NO_TIME
    for part in parts:
        time: PartTime = costs.part(cell, part).time
        if bare(part) in known:
            like = like.plus(time)
        else:
            unlike = unlike.plus(time)
    return sum(
        factor * pass_times(time, PassTime())[kind].compute_s
        for factor, time in ((ratio, like), (1.0, unlike))
    )
