"""The stage split and the recomputed layers that make a plan fastest within its ranks' memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from parsim.cost.cell import cell_of
from parsim.cost.stage import CostModel
from parsim.plan import ASYNCHRONOUS_SCHEDULES, Job, ParallelPlan, recomputed_layers, stage_layers
from parsim.schedule import ONE_CHUNK_SCHEDULES
from parsim.search.partition.chunks import counts_of_chunks
from parsim.search.partition.split import EVENNESS, Floats, Split, best_split, least_slowest, split_of
from parsim.search.partition.table import Counts, Rows, StageTable, TableMaker, table_of
from parsim.search.partition.walk import Stages, Walker, improved

AHEAD_SHARE = {"1f1b": 0.5, "zb-h1": 0.25, "zb-h2": 0.25}
"""How much of the forwards that a rank runs ahead of its first backward counts as gained, in the choice
of a split: between none, as on equal stages, and all, as in the bound of 1F1B. Of steps of a quarter
those with the least mean regret, on short and long pipelines, against the best split found
(docs/partition.md)."""


@dataclass(slots=True)
class Partitioner:
    """Partitions the plans of one job; remembers what they have in common."""

    job: Job
    headroom: float = 0.0
    """Share of its memory that every device keeps free where counts are chosen, if it can."""
    _makers: dict[int, TableMaker] = field(default_factory=dict)
    _with_less: dict[int, tuple[CostModel, CostModel]] = field(default_factory=dict)

    def partition(
        self,
        plan: ParallelPlan,
        costs_by_rank: Sequence[CostModel],
        *,
        split: bool,
        counts: bool,
        walk: bool = False,
    ) -> ParallelPlan:
        """The plan with the fastest stage split (where `split`) and the fewest recomputed layers that
        fit (where `counts`); costs_by_rank: of every pipeline rank.

        Exact for (m − 1)·max + Σ of a micro-batch's times on the stages, where each rank has one chunk;
        `walk` changes that split further, for as long as a walk through the schedule gets shorter. With
        several chunks a rank the split stays as it is. Where nothing fits, the stages whose fullest rank
        lacks least.
        """
        if counts and plan.recompute != "none" and self.headroom:
            costs_by_rank = [self._roomy(costs) for costs in costs_by_rank]
        if plan.schedule not in ONE_CHUNK_SCHEDULES and plan.vpp > 1:
            if not counts or plan.recompute == "none":
                return plan
            makers = [self._maker(costs) for costs in costs_by_rank]
            own = stage_layers(self.job.model, plan)
            found = Stages(own, counts_of_chunks(self.job, plan, makers))
            return self._with(plan, found, counts=True)
        stages = self._stages(plan, costs_by_rank, split, counts, walk)
        return self._with(plan, stages, counts=counts)

    def _objective(self, plan: ParallelPlan, rows: Rows, ahead_share: float) -> tuple[Floats, Floats]:
        """(S, G) each: of a split the largest of the first and the sum of the second shall be small.

        A rank's first backward comes when the first micro-batch has passed the stages behind it, and the
        last one ends before that micro-batch has passed those before it: Σ T. In between are m − 1 more
        backwards, and the forwards but those that ran ahead of the first backward, of which ahead_share
        counts: (m − 1)·max T + Σ T where none does. Without a flush: max T.
        """
        fits, m = np.isfinite(rows.seconds), plan.num_micro_batches(self.job)
        seconds = np.where(fits, rows.seconds, 0.0)
        if plan.schedule in ASYNCHRONOUS_SCHEDULES:
            others_s = np.maximum(seconds, rows.stream_s)
            added_s = np.zeros_like(seconds)
        else:
            ahead = np.array([min(m, plan.pp - rank) - 1 for rank in range(plan.pp)])
            forward_s = np.where(fits, rows.forward_s, 0.0)
            others_s = (m - 1) * seconds - ahead_share * ahead[:, None] * forward_s
            others_s, added_s = np.maximum(others_s, (m - 1) * rows.stream_s), seconds
        return np.where(fits, others_s, np.inf), np.where(fits, added_s, np.inf)

    def _least_s(self, plan: ParallelPlan, makers: Sequence[TableMaker]) -> float:
        """The least that a micro-batch takes on all stages together, each layer on its fastest device;
        nothing without a flush, where that does not count.
        """
        if plan.schedule in ASYNCHRONOUS_SCHEDULES:
            return 0.0
        cell = cell_of(self.job, plan)._replace(recompute="none")
        (kinds,) = makers[0].costs.kinds((self.job.model.layers,))
        different = {id(maker): maker for maker in makers}.values()
        return sum(min(maker.seconds(cell, kind) for maker in different) for kind in kinds)

    def _stages(
        self,
        plan: ParallelPlan,
        costs_by_rank: Sequence[CostModel],
        split: bool,
        counts: bool,
        walk: bool,
    ) -> Stages:
        """Of one chunk a rank."""
        makers = [self._maker(costs) for costs in costs_by_rank]
        own, asked = stage_layers(self.job.model, plan), _counts(plan, counts)
        if not split:
            return _stages(table_of(plan, makers, max(own), asked), own)
        table, best = self._best(plan, makers, asked)
        if best is None:
            table = table_of(plan, makers, self.job.model.layers, asked)
            lacking = least_slowest(table.spread(table.rows.num_bytes - table.limits[:, None]))
            return _stages(table, lacking.layers if lacking else own)
        found = _stages(table, best.layers)
        if not walk or plan.pp == 1 or plan.schedule in ASYNCHRONOUS_SCHEDULES:
            return found
        begin = [stages for layers in (own, best.layers) if (stages := _fitting(table, layers))]
        walker = Walker(self.job, plan, costs_by_rank)
        return improved(begin, lambda layers: _fitting(table, layers), walker.steps_s)

    def _best(
        self, plan: ParallelPlan, makers: Sequence[TableMaker], counts: Counts
    ) -> tuple[StageTable, Split | None]:
        """The fastest split, the plan's own where none is faster; and the table that has it."""
        layers, own = self.job.model.layers, stage_layers(self.job.model, plan)
        least_s, share = self._least_s(plan, makers), AHEAD_SHARE.get(plan.schedule, 0.0)
        longest = self._longest(plan)
        while True:
            table = table_of(plan, makers, longest, counts)
            slowest, added = map(table.spread, self._objective(plan, table.rows, share))
            best = best_split(slowest, added)
            # A stage takes no less, and needs no less, with more layers than the table has.
            longer_s = float(slowest[:, :, -1].min())
            if table.whole or longer_s + least_s >= (best.value if best else np.inf):
                break
            longest = min(layers, 2 * longest)
        if best is None:
            return table, None
        usual = split_of(slowest, added, own)
        return table, usual if usual.value <= best.value * (1 + 2 * EVENNESS) else best

    def _longest(self, plan: ParallelPlan) -> int:
        """Layers of the longest stage that is looked at first."""
        layers = self.job.model.layers
        own, again = stage_layers(self.job.model, plan), plan.recompute_layers
        return min(layers, max(2 * math.ceil(layers / plan.pp) + 2, *own, *again))

    def _with(self, plan: ParallelPlan, stages: Stages, *, counts: bool) -> ParallelPlan:
        """The plan with these stages, and without counts where they say what `recompute` does alone."""
        plan = replace(plan, stage_split=stages.layers)
        if not counts or plan.recompute == "none":
            return plan
        if not any(stages.recomputed):
            return replace(plan, recompute="none", recompute_layers=())
        whole = recomputed_layers(self.job.model, replace(plan, recompute_layers=()))
        return replace(plan, recompute_layers=() if stages.recomputed == whole else stages.recomputed)

    def _roomy(self, costs: CostModel) -> CostModel:
        """The same devices with less memory; what is priced for one is priced for both."""
        if id(costs) not in self._with_less:
            device = costs.cluster.device
            device = replace(device, memory_bytes=device.memory_bytes * (1 - self.headroom))
            less = replace(costs, cluster=replace(costs.cluster, device=device))
            self._with_less[id(costs)] = costs, less
        return self._with_less[id(costs)][1]

    def _maker(self, costs: CostModel) -> TableMaker:
        if id(costs) not in self._makers:
            self._makers[id(costs)] = TableMaker(self.job, costs)
        return self._makers[id(costs)]


def _counts(plan: ParallelPlan, auto: bool) -> Counts:
    return Counts(auto=auto, fixed=() if auto else plan.recompute_layers)


def _stages(table: StageTable, layers: tuple[int, ...]) -> Stages:
    return Stages(layers, tuple(map(int, table.along(table.rows.recomputed, layers))))


def _fitting(table: StageTable, layers: tuple[int, ...]) -> Stages | None:
    """The stages of a split that the table has, if all fit."""
    if max(layers) >= table.index.shape[1] or not all(
        map(math.isfinite, table.along(table.rows.seconds, layers))
    ):
        return None
    return _stages(table, layers)
