"""All plans of a family at once: which are legal, which fit, and how fast each can be at best.

Every figure comes from the scalar functions that check, price and lower a single plan, called once for
each distinct set of what it depends on; arrays only combine them. Shapes are (Z, M, C): ZeRO stages,
sizes of micro-batches, all other choices of a family; H, D, K as in a Layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from parsim.cost.cell import cell_of
from parsim.cost.memory import ENOUGH_HEADROOM
from parsim.cost.stage import CostModel, StageCost
from parsim.cost.step import is_local
from parsim.cost.sync import StageSync, stage_sync
from parsim.cost.weights import NO_WEIGHTS, StageWeights
from parsim.hardware import peak_flops_per_s
from parsim.plan import ASYNCHRONOUS_SCHEDULES, Job, ParallelPlan, stage_layers
from parsim.search.bound_arrays import free_bounds_s, lower_bounds_s
from parsim.search.cells import CellTable, PartFigures, Priced
from parsim.search.fullest import fullest_rank
from parsim.search.layout import Bools, Floats, Ints, Layout, layout_of, stage_sums
from parsim.search.least_recompute import least_recompute_s
from parsim.search.legality import Legality
from parsim.search.memory_arrays import fixed_bytes, needed_bytes, room_bytes
from parsim.search.partition.plan import Partitioner
from parsim.search.passes import Passes, joined, passes_of
from parsim.search.replicas import ReplicaTime, replica_time
from parsim.search.space import Family
from parsim.search.walk import walked_bounds_s

NEAR = 1e-9
"""Plans whose memory is so near to the device's are looked at one by one: sums of floats in another
order differ in their last digits."""

_BESIDE_REPLICAS: dict[str, Any] = {
    "schedule": "1f1b", "stage_split": (), "recompute": "none", "recompute_layers": (),
}  # fmt: skip
"""Of a plan, what replicas of a stage do not depend on once the stage is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """What became of a family's plans."""

    rejected: dict[str, int]
    """Illegal ones, by reason."""
    legal: int = 0
    same: int = 0
    """Plans that are the same as others: where everything is kept that need not be recomputed."""
    fits: int = 0
    floor_s: float = np.inf
    """No step of one that fits is shorter: a rough figure, for the whole family."""
    least_bytes: float = np.inf
    """The least that a legal plan needs."""
    least: int = 0
    """That plan."""


class _Parts(NamedTuple):
    """What a family's stages are made of."""

    layout: Layout
    priced: Priced
    stages: list[StageCost]


class _Memory(NamedTuple):
    """What a family's plans need."""

    fixed: Floats
    """(Z, H, M, C): bytes beside what micro-batches leave behind."""
    needed: Floats
    """(Z, M, C): bytes of the fullest device; infinite for illegal plans."""


@dataclass(slots=True)
class Examiner:
    """Examines families of plans of one job; remembers what they have in common."""

    job: Job
    costs: CostModel
    _legality: Legality = field(init=False)
    _cells: CellTable = field(init=False)
    _partitioner: Partitioner = field(init=False)
    _layouts: dict[tuple[object, ...], Layout] = field(default_factory=dict)
    _syncs: dict[tuple[object, ...], StageSync] = field(default_factory=dict)

    def __post_init__(self) -> None:
        peak_flops_per_s(self.costs.cluster.device, self.job.precision)  # refuses a dtype it has not
        self._legality = Legality(self.job, self.costs.cluster, self.costs.stack)
        self._cells = CellTable(self.job, self.costs)
        self._partitioner = Partitioner(self.job, ENOUGH_HEADROOM)

    def examine(self, family: Family) -> Examined:
        """Legality and memory of all its plans, and how fast the fastest can be at best."""
        rejected, legal = self.legality(family)
        if not legal.any():
            return Examined(rejected=rejected)
        of = self._parts_of(family, legal)
        needed = self._memory(family, of, legal).needed
        same = self._same(family, needed)
        fits = self._fits(family, needed) & ~same
        least = int(needed.argmin())
        return Examined(
            rejected=rejected,
            legal=int((legal & ~same).sum()),
            same=int(same.sum()),
            fits=int(fits.sum()),
            floor_s=self._floor_s(family, of, fits),
            least_bytes=float(needed.flat[least]),
            least=least,
        )

    def bounded(self, family: Family) -> tuple[Ints, Floats]:
        """The plans that fit, by their places in the family, and a lower bound of the step time of each,
        whatever is left to be chosen for it.
        """
        _, legal = self.legality(family)
        needed, bounds_s = self.figures(family, legal)
        index = np.flatnonzero(np.isfinite(bounds_s) & ~self._same(family, needed))
        return index, bounds_s.flat[index]

    def legality(self, family: Family) -> tuple[dict[str, int], Bools]:
        """How many plans are illegal for which reason, and which are legal, (Z, M, C)."""
        return self._legality.of(family)

    def figures(self, family: Family, legal: Bools) -> tuple[Floats, Floats]:
        """Bytes that each plan needs on its fullest device, and a lower bound of its step time in
        seconds; infinite for illegal plans, the bound for those that do not fit too.
        """
        of = self._parts_of(family, legal)
        memory = self._memory(family, of, legal)
        index = np.flatnonzero(self._fits(family, memory.needed))
        bounds_s = np.full(family.shape, np.inf)
        if index.size:
            bounds_s.flat[index] = self._bounds_s(family, of, memory.fixed, index)
        return memory.needed, bounds_s

    def _parts_of(self, family: Family, legal: Bools) -> _Parts:
        layout = self._layout(family.base)
        priced = self._cells.priced(family, layout.parts, np.asarray(legal.any(axis=0)))
        return _Parts(layout, priced, self._stages(family, layout, legal))

    def _memory(self, family: Family, of: _Parts, legal: Bools) -> _Memory:
        stack, needed = self.costs.stack, np.full(family.shape, np.inf)
        fixed = fixed_bytes(self.job, family, of.layout, of.priced, of.stages, stack)
        filled = needed_bytes(self.job, family, of.layout, of.priced, fixed, stack)
        needed[legal] = filled[legal]
        return _Memory(fixed, needed)

    def _floor_s(self, family: Family, of: _Parts, fits: Bools) -> float:
        """No step of the plans that fit is shorter: what their passes take without replicas, transfers
        and what is recomputed by choice.
        """
        cell = np.flatnonzero(fits.any(axis=0))
        if not cell.size:
            return np.inf
        layout = of.layout
        sends, stages = (np.zeros((n, cell.size)) for n in (layout.kind.size - 1, len(layout.stages)))
        replicas = ReplicaTime(*[stages] * len(ReplicaTime._fields))
        passes = self._cell_passes(family, of, cell, sends, replicas)
        again_s = np.zeros((family.base.pp, cell.size))
        return float(self._passes_bound_s(family, of, cell, passes, again_s).min())

    def _bounds_s(self, family: Family, of: _Parts, fixed: Floats, index: Ints) -> Floats:
        """(P,): lower bounds of the plans of a family at `index`, all legal."""
        cell = index % (family.shape[1] * family.shape[2])
        passes = self._passes(family, of, index)
        again_s = self._least_recompute_s(family, of, fixed, index)
        return self._passes_bound_s(family, of, cell, passes, again_s)

    def _passes_bound_s(
        self, family: Family, of: _Parts, cell: Ints, passes: Passes, again_s: Floats
    ) -> Floats:
        """(P,): lower bounds of plans of these cells whose passes take so long."""
        if family.free_split:
            parts = PartFigures(*(p.reshape(len(p), -1)[:, cell] for p in of.priced.parts))
            bounds_s = free_bounds_s(family.base, of.layout, passes, parts)
        else:
            bounds_s = lower_bounds_s(family.base, of.layout, passes, again_s)
        return bounds_s + self.costs.stack.step_overhead_s

    def _least_recompute_s(self, family: Family, of: _Parts, fixed: Floats, index: Ints) -> Floats:
        """(pp, P): what each rank recomputes of a micro-batch at least, where that is chosen for it and
        the stages are not.
        """
        layout, priced, _ = of
        base, (_, sizes, others) = family.base, family.shape
        found = np.zeros((base.pp, len(index)))
        zero, cell = np.divmod(index, sizes * others)
        partial = np.array(family.recompute)[index % len(family.recompute)] == "partial"
        if family.free_split or not partial.any():
            return found
        memory_bytes = self.costs.cluster.device.memory_bytes * (1 - ENOUGH_HEADROOM)
        room = room_bytes(fixed, memory_bytes, self.costs.stack)
        for i, size in enumerate(family.micro_batch):
            which = np.flatnonzero(partial & (cell // others == i))
            if not which.size:
                continue
            parts = PartFigures(*(p[:, i, cell[which] % others] for p in priced.parts))
            moments = layout.fullest_moments(self.job.global_batch // (base.dp * size))
            for h, (holding, moment) in enumerate(zip(layout.holdings, moments, strict=True)):
                free = room[zero[which], h, i, cell[which] % others]
                found[holding.rank, which] = least_recompute_s(layout, holding, moment, parts, free)
        return found

    def tighter_bounds_s(self, chosen: Sequence[tuple[Family, Ints]]) -> list[Floats]:
        """Tighter lower bounds of the step times of some legal plans of each of these families, by a
        walk through the schedule: all have the same, with as many micro-batches.
        """
        if not chosen:
            return []
        layout = self._layout(chosen[0][0].base)
        if layout.plan.schedule in ASYNCHRONOUS_SCHEDULES:
            return [np.zeros(len(index)) for _, index in chosen]
        found = []
        for family, index in chosen:
            legal = np.zeros(family.shape, bool)
            legal.flat[index] = True
            found.append(self._passes(family, self._parts_of(family, legal), index))
        walked = walked_bounds_s(layout.plan, layout, joined(found), self.costs.stack)
        ends = np.cumsum([len(index) for _, index in chosen])[:-1]
        return np.split(walked + self.costs.stack.step_overhead_s, ends)

    def choices(self, family: Family, index: int) -> list[ParallelPlan]:
        """What a plan of a family may become: with even stages, and with those that suit it best; with
        everything recomputed that must be, where that is chosen for it.
        """
        plan, partial = family.plan(index), family.is_partial(index)
        on = [self.costs] * plan.pp
        splits = (False, True) if family.free_split else (False,)
        made = [
            self._partitioner.partition(plan, on, split=split, counts=partial)
            if split or partial
            else plan
            for split in splits
        ]
        return list(dict.fromkeys(map(self._plainly, made)))

    def _plainly(self, plan: ParallelPlan) -> ParallelPlan:
        """Without a split that is the usual one."""
        plain = replace(plan, stage_split=())
        return plain if stage_layers(self.job.model, plain) == plan.stage_split else plan

    def _layout(self, plan: ParallelPlan) -> Layout:
        key = plan.schedule, plan.pp, plan.vpp, plan.stage_split, plan.recompute_layers
        if key not in self._layouts:
            self._layouts[key] = layout_of(plan, self.costs)
        return self._layouts[key]

    def _stages(self, family: Family, layout: Layout, legal: Bools) -> list[StageCost]:
        """The stages of each kind, for what no choice of the family changes: parameters and layers."""
        plan = family.plan(int(legal.argmax()))
        return [self.costs.stage(cell_of(self.job, plan), kinds) for kinds in layout.stages]

    def _stage_syncs(
        self, family: Family, layout: Layout, stages: list[StageCost]
    ) -> list[list[StageSync]]:
        """(Z, D): replicas of each kind of stage."""
        weights, found = self._stage_weights(family.base, layout), []
        for zero in family.zero:
            plan = replace(family.base, zero=zero, **_BESIDE_REPLICAS)
            row = []
            for stage, tensors in zip(stages, weights, strict=True):
                sizes = stage.dense_parameters, stage.expert_parameters, stage.num_layers
                key = *sizes, tensors, plan
                if key not in self._syncs:
                    self._syncs[key] = stage_sync(
                        stage, self.job, plan, self.costs.cluster, self.costs.stack, tensors
                    )
                row.append(self._syncs[key])
            found.append(row)
        return found

    def _stage_weights(self, plan: ParallelPlan, layout: Layout) -> list[StageWeights]:
        """The tensors of each kind of stage, where gradients are reduced or compressed one by one."""
        if plan.aggregation != "tensor" and plan.compression == "none":
            return [NO_WEIGHTS] * len(layout.stages)
        split = stage_layers(self.job.model, plan)
        weights = self.costs.stage_weights(cell_of(self.job, plan), split) * plan.chains
        kind = layout.kind.tolist()
        return [weights[kind.index(d)] for d in range(len(layout.stages))]

    def _fits(self, family: Family, needed: Floats) -> Bools:
        limits = self._limits(family)
        fits = needed <= limits
        for index in np.flatnonzero(np.abs(needed - limits) < NEAR * limits):
            use = fullest_rank(self.job, family.plan(int(index)), self.costs)
            limit = limits[index % len(limits)]
            fits.flat[index] = use.peak + self.costs.stack.context_bytes <= limit
        return fits

    def _limits(self, family: Family) -> Floats:
        """(C,): the memory that a plan may fill. Where what it recomputes is chosen for it, enough is
        left free for a prediction that is somewhat too low.
        """
        share = [1 - ENOUGH_HEADROOM if choice == "partial" else 1.0 for choice in family.recompute]
        limits = self.costs.cluster.device.memory_bytes * np.array(share)
        return np.tile(limits, family.shape[2] // len(share))

    def _same(self, family: Family, needed: Floats) -> Bools:
        """(Z, M, C): plans that may recompute some layers, where there is room to keep them all."""
        by_choice = needed.reshape(*family.shape[:2], -1, len(family.recompute))
        same = np.zeros(by_choice.shape, bool)
        if {"none", "partial"} <= set(family.recompute):
            none, partial = family.recompute.index("none"), family.recompute.index("partial")
            limit = self.costs.cluster.device.memory_bytes * (1 - ENOUGH_HEADROOM)
            same[..., partial] = by_choice[..., none] <= limit
        return same.reshape(family.shape)

    def _passes(self, family: Family, of: _Parts, index: Ints) -> Passes:
        """The passes of the plans of a family at `index`, all legal."""
        zero, cell = np.divmod(index, family.shape[1] * family.shape[2])
        syncs = self._stage_syncs(family, of.layout, of.stages)
        replicas = np.array([
            [replica_time(sync, stage, self.costs.stack) for sync in row]
            for stage, row in zip(family.zero, syncs, strict=True)
        ])  # fmt: skip
        times = ReplicaTime(*replicas[zero].transpose(2, 1, 0))
        return self._cell_passes(family, of, cell, self._send_s(family.base, of.priced, cell), times)

    def _cell_passes(
        self, family: Family, of: _Parts, cell: Ints, send_s: Floats, replicas: ReplicaTime[Floats]
    ) -> Passes:
        """The passes of plans of these cells."""
        micro_batches = [self.job.global_batch // (family.base.dp * size) for size in family.micro_batch]
        parts = (p.reshape(len(p), -1)[:, cell] for p in of.priced.parts)
        return passes_of(
            family.base,
            np.array(micro_batches)[cell // family.shape[2]],
            PartFigures(*(stage_sums(of.layout, p) for p in parts)),
            send_s,
            replicas,
            self.costs.stack,
        )

    def _send_s(self, plan: ParallelPlan, priced: Priced, cell: Ints) -> Floats:
        """(n − 1, P): transfers between stages."""
        pairs = [(plan.stage_rank(s), plan.stage_rank(s + 1)) for s in range(plan.num_stages - 1)]
        ways = {pair: _way(pair, plan, self.costs) for pair in set(pairs)}
        local, far = priced.cells.send_local_s.flat[cell], priced.cells.send_far_s.flat[cell]
        seconds = np.array([np.zeros_like(far), local, far])
        return np.asarray(seconds[np.array([ways[pair] for pair in pairs], int)])


def _way(pair: tuple[int, int], plan: ParallelPlan, costs: CostModel) -> int:
    """How stages on two ranks send to each other: not at all, inside a scale-up domain, or beyond."""
    if pair[0] == pair[1]:
        return 0
    return 1 if is_local(*pair, plan, costs) else 2
