"""What every stage that a pipeline may have takes: seconds and bytes by stage, first layer and number of
layers, as arrays.

The prices of the parts of the model, and the memory of parameters and optimizer, come from the functions
that the replay uses; arrays only add them up. One chunk a rank: stage s lies on pipeline rank s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parsim.cost.cell import Cell, cell_of
from parsim.cost.memory import boundary_bytes, model_states, receive_buffers, working_bytes
from parsim.cost.stage import CostModel, StageCost
from parsim.cost.step import is_local, send_between
from parsim.cost.sync import StageSync, stage_sync
from parsim.mesh import mesh_axes
from parsim.plan import ASYNCHRONOUS_SCHEDULES, Job, ParallelPlan
from parsim.schedule.in_flight import full_moments
from parsim.schedule.pipedream import weight_versions
from parsim.search.bound import updates_a_step
from parsim.search.partition.runs import Ends, Runs, runs_of
from parsim.search.replicas import replica_time

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NO_MORE_ROOM = 1 - 1e-12
"""Of a device's memory: sums in another order differ in their last digits."""


class Counts(NamedTuple):
    """How many layers of a stage are recomputed."""

    auto: bool = False
    """As few as fit."""
    fixed: tuple[int, ...] = ()
    """So many, by stage; empty: all."""


class Rows(NamedTuple):
    """(S, G) each: of S stages with each of G runs of layers."""

    seconds: Floats
    """Forward and backward of a micro-batch; infinite where the stage does not fit."""
    forward_s: Floats
    """Of these, the forward."""
    stream_s: Floats
    """Gathers and reductions of a micro-batch, which run beside that."""
    num_bytes: Floats
    """What its rank needs, context included; infinite where there is no such stage."""
    recomputed: Ints
    """Its layers that are recomputed, and were when its bytes were counted."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StageTable:
    """Every stage that each rank may hold."""

    index: Ints
    """(L + 1, C + 1): the run of so many layers from one on; −1 where there are not so many."""
    rows: Rows
    limits: Floats
    """(S,): memory of each rank's device."""

    @property
    def longest(self) -> int:
        """C: layers of the longest stage."""
        return int(self.index.shape[1]) - 1

    @property
    def whole(self) -> bool:
        """Whether it has every stage there may be."""
        return bool(self.longest == self.index.shape[0] - 1)

    def spread(self, figures: Floats) -> Floats:
        """(S, L + 1, C + 1), by stage, first layer and number of layers, of figures (S, G)."""
        spread: Floats = np.where(self.index >= 0, figures[:, self.index], np.inf)
        return spread

    def along(self, figures: NDArray[np.generic], layers: Sequence[int]) -> list[float]:
        """The figures (S, G) of the stages of a split."""
        first = np.cumsum([0, *layers[:-1]])
        return list(figures[np.arange(len(layers)), self.index[first, layers]].tolist())


class _Figures(NamedTuple):
    """(G, R + 1) each: of a stage whose first r parts are recomputed."""

    forward_s: Floats
    seconds: Floats
    saved_bytes: Floats
    again_bytes: Floats
    """Activations that live only while a part is recomputed."""


@dataclass(slots=True)
class TableMaker:
    """Makes tables for the plans of one job; remembers what they have in common."""

    job: Job
    costs: CostModel
    _parts: dict[tuple[Cell, str], Floats] = field(default_factory=dict)
    _runs: dict[int, Runs] = field(default_factory=dict)
    _stages: dict[tuple[object, ...], StageCost] = field(default_factory=dict)
    _states: dict[tuple[object, ...], Floats] = field(default_factory=dict)
    _replicas: dict[tuple[object, ...], Floats] = field(default_factory=dict)

    def runs(self, longest: int) -> Runs:
        """The runs of up to so many layers."""
        if longest not in self._runs:
            self._runs[longest] = runs_of(self.costs, longest)
        return self._runs[longest]

    def rows(self, plan: ParallelPlan, ranks: list[int], runs: Runs, ends: Ends, counts: Counts) -> Rows:
        """Stages with these ends on pipeline ranks that have the devices of this cost model."""
        device, stack = self.costs.cluster.device, self.costs.stack
        figures = self._figures(plan, runs, ends)
        m = plan.num_micro_batches(self.job)
        kept = np.array([
            max(sum(moment) for moment in full_moments(plan.schedule, plan.pp, 1, rank, m))
            for rank in ranks
        ])  # fmt: skip
        moving = kept[:, None, None] * figures.saved_bytes + figures.again_bytes
        cell = cell_of(self.job, plan)
        passing = working_bytes(self.job.model, cell)
        passing += receive_buffers(plan) * boundary_bytes(self.job.model, cell)
        states = np.array([self._state_bytes(plan, runs, ends, rank) for rank in ranks])
        needed = (1 + stack.allocator_slack) * (states[..., None] + passing + moving)
        needed += stack.context_bytes  # (ranks, G, R + 1)
        fits = needed <= device.memory_bytes * NO_MORE_ROOM
        chosen = self._chosen(plan, ranks, runs, ends, counts, fits, needed)
        places, columns = np.indices(chosen.shape)
        takes = self._replica_s(plan, runs, ends)
        blocked = np.array([self._blocked_s(plan, rank) for rank in ranks])[..., None]
        seconds = figures.seconds[columns, chosen] + takes[1] + blocked[:, 1]
        return Rows(
            seconds=np.where(fits[places, columns, chosen], seconds, np.inf),
            forward_s=figures.forward_s[columns, chosen] + takes[0] + blocked[:, 0],
            stream_s=np.broadcast_to(takes[2], chosen.shape),
            num_bytes=needed[places, columns, chosen],
            recomputed=chosen,
        )

    def _chosen(
        self,
        plan: ParallelPlan,
        ranks: list[int],
        runs: Runs,
        ends: Ends,
        counts: Counts,
        fits: NDArray[np.bool_],
        needed: Floats,
    ) -> Ints:
        """(len(ranks), G): parts that are recomputed: the fewest that fit, or those that need least."""
        _, parts = runs.parts(ends)
        if counts.auto and plan.recompute != "none":
            fewest = np.where(fits.any(axis=2), fits.argmax(axis=2), needed.argmin(axis=2))
            return np.asarray(fewest)
        if counts.fixed:  # no more than there are: `figures` is infinite beyond
            asked = np.array([counts.fixed[rank] for rank in ranks])
            return np.broadcast_to(asked[:, None], (len(ranks), len(parts)))
        return np.broadcast_to(parts, (len(ranks), len(parts)))

    def _figures(self, plan: ParallelPlan, runs: Runs, ends: Ends) -> _Figures:
        """Sums over the parts of a stage."""
        again = cell_of(self.job, plan)
        once = again._replace(recompute="none")
        numbers, parts = runs.parts(ends)
        ranges = np.arange(numbers.shape[1] + 1)
        nothing = np.zeros(4)
        begin = sum((self.part(once, kind) for kind in ends.kinds), start=nothing)

        def along(cell: Cell) -> Floats:
            """(G, R, 4) of the parts one by one."""
            of_kind = [self.part(cell, kind) for kind in runs.kinds]
            found: Floats = np.array([*of_kind, nothing])[numbers]
            return found

        zero = np.zeros((len(parts), 1, 4))
        recomputed, kept = along(again), along(once)
        so_far = np.concatenate([zero, recomputed.cumsum(axis=1)], axis=1)
        kept_so_far = np.concatenate([zero, kept.cumsum(axis=1)], axis=1)
        total = so_far + (kept_so_far[:, -1:] - kept_so_far) + begin
        largest = np.concatenate([zero, np.maximum.accumulate(recomputed, axis=1)], axis=1)[..., 3]
        total[ranges > parts[:, None]] = np.inf
        return _Figures(total[..., 0], total[..., 1], total[..., 2], largest)

    def part(self, cell: Cell, kind: str) -> Floats:
        """(4,): seconds of a micro-batch's forward, and with its backward; bytes kept, bytes that live
        while it is recomputed.
        """
        if (cell, kind) not in self._parts:
            part = self.costs.part(cell, kind)
            forward_s = part.time.forward.total_s
            times = forward_s, forward_s + part.time.backward.total_s
            self._parts[cell, kind] = np.array([*times, part.saved_bytes, part.recomputed_bytes])
        return self._parts[cell, kind]

    def seconds(self, cell: Cell, kind: str) -> float:
        """A part's forward and backward of a micro-batch."""
        return float(self.part(cell, kind)[1])

    def _state_bytes(self, plan: ParallelPlan, runs: Runs, ends: Ends, rank: int) -> Floats:
        """(G,): what a stage keeps whatever its micro-batches are, without slack."""
        versions = weight_versions(plan, rank)
        key = (
            len(runs.runs), ends, versions, plan.zero, plan.shard_group, plan.dp, plan.cp, plan.tp,
            plan.ep, plan.expert_tp, plan.compression,
        )  # fmt: skip
        if key not in self._states:
            stages = (self._stage(plan, runs, g, ends) for g in range(len(runs.runs)))
            stack = self.costs.stack
            self._states[key] = np.array([
                model_states([stage], self.job, plan, stack, weight_versions=versions).peak
                for stage in stages
            ])  # fmt: skip
        return self._states[key]

    def _stage(self, plan: ParallelPlan, runs: Runs, g: int, ends: Ends) -> StageCost:
        """A stage of this run, for its parameters and layers, which no micro-batch changes."""
        key = runs.runs[g], ends, plan.tp, plan.ep, plan.expert_tp
        if key not in self._stages:
            cell = cell_of(self.job, plan)
            self._stages[key] = self.costs.stage(cell, runs.stage_kinds(g, ends))
        return self._stages[key]

    def _blocked_s(self, plan: ParallelPlan, rank: int) -> tuple[float, float]:
        """What a forward, and it with its backward, take of a rank whatever it holds: the host, and
        transfers where they are in the way of compute.
        """
        if plan.pp == 1:
            return 0.0, 0.0
        there = back = self.costs.stack.action_host_s
        if not self.costs.stack.pp_overlap:
            there += self._send_s(plan, rank, rank + 1)
            back += self._send_s(plan, rank, rank - 1)
        return there, there + back

    def _send_s(self, plan: ParallelPlan, rank: int, other: int) -> float:
        """A micro-batch's activations from a pipeline rank to another; nothing past the ends."""
        if not 0 <= other < plan.pp:
            return 0.0
        cell, local = cell_of(self.job, plan), is_local(rank, other, plan, self.costs)
        return send_between(cell, mesh_axes(plan, "tp"), self.costs, local=local)[0]

    def _sync(self, plan: ParallelPlan, stage: StageCost) -> StageSync:
        """What keeps replicas of a stage alike, where messages are neither cut otherwise nor compressed:
        no other replicas wait for every micro-batch.
        """
        usual = replace(plan, aggregation="bucket", compression="none")
        return stage_sync(stage, self.job, usual, self.costs.cluster, self.costs.stack)

    def _replica_s(self, plan: ParallelPlan, runs: Runs, ends: Ends) -> Floats:
        """(3, G): what gathers, reductions and updates of every micro-batch take of a stage's forward,
        and of it with its backward; and how long gathers and reductions run beside them.
        """
        stale = plan.schedule in ASYNCHRONOUS_SCHEDULES
        if plan.zero < 2 and not stale:
            return np.zeros((3, len(runs.runs)))
        m = plan.num_micro_batches(self.job)
        updates = updates_a_step(plan, m) / m if stale else 0.0
        key = (
            len(runs.runs), ends, plan.zero, plan.zero_group, plan.dp, plan.cp, plan.tp, plan.ep,
            plan.pp, plan.expert_tp, plan.placement, updates,
        )  # fmt: skip
        if key not in self._replicas:
            found = []
            for g in range(len(runs.runs)):
                stage = self._stage(plan, runs, g, ends)
                times = replica_time(self._sync(plan, stage), plan.zero, self.costs.stack)
                takes_s = 2 * times.gather_each_s + times.reduce_each_s
                takes_s += updates * times.update_s
                found.append((times.gather_each_s, takes_s, times.stream_s))
            self._replicas[key] = np.array(found).T
        return self._replicas[key]


def table_of(
    plan: ParallelPlan, makers: Sequence[TableMaker], longest: int, counts: Counts
) -> StageTable:
    """The table of a plan whose pipeline ranks have devices of these makers' cost models, one a rank;
    no stage gets more layers than `longest`.

    The first and the last stage may have 0 layers: they have the embedding and the head.
    """
    runs = makers[0].runs(longest)
    alike: dict[tuple[int, Ends], list[int]] = {}
    for rank, maker in enumerate(makers):
        alike.setdefault((id(maker), Ends(rank == 0, rank == plan.pp - 1)), []).append(rank)
    shape = plan.pp, len(runs.runs)
    seconds, forward_s, stream_s, num_bytes = np.empty((4, *shape))
    rows = Rows(seconds, forward_s, stream_s, num_bytes, np.empty(shape, int))
    for (_, ends), ranks in alike.items():
        found = makers[ranks[0]].rows(plan, ranks, runs, ends, counts)
        for whole, part in zip(rows, found, strict=True):
            whole[ranks] = part
    empty = runs.lengths == 0
    rows.seconds[1:-1, empty] = rows.num_bytes[1:-1, empty] = np.inf
    limits = [maker.costs.cluster.device.memory_bytes for maker in makers]
    return StageTable(index=runs.index, rows=rows, limits=np.array(limits))
