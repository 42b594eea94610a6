"""What keeps data-parallel replicas alike, as tasks of a Program.

Gradients are reduced behind the last backward of each stage (with ZeRO-2 and 3 behind every one),
parameters gathered ahead of the passes that read them, and every rank updates its own once all gradients
are there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from parsim.cost.step import StepCost
from parsim.cost.traffic import Traffic
from parsim.plan import ParallelPlan
from parsim.schedule.action import (
    BACKWARD,
    FORWARD,
    REDUCE_GRAD,
    RESHARD,
    UNSHARD,
    WEIGHT_GRAD,
    Action,
    Schedule,
)
from parsim.schedule.program import Task
from parsim.stack import Stack
from parsim.timeline import COMPUTE, DP, HOST, TIED_EMBEDDING, TP


@dataclass(slots=True)
class Work:
    """The tasks so far, in order."""

    chain: dict[int, list[int]]
    """The last task of every piece of work of each rank; the next piece starts after the last."""
    tasks: list[Task] = field(default_factory=list)

    def add(self, task: Task) -> int:
        """Append a task; returns its index."""
        self.tasks.append(task)
        return len(self.tasks) - 1


class Cut(NamedTuple):
    """How an action is cut up, so that communication runs beside its pieces."""

    pieces: int
    takes_s: float
    """What that communication, and adding gradients to those before, takes from the whole action's
    compute."""
    waits_for_update: bool
    """The pieces wait for parameters that were gathered at the start of the step (ZeRO-1 and 2)."""
    gathers: bool
    """The pieces' parameters are gathered for this pass, so many pieces ahead."""
    reduces: bool
    """The pieces' gradients are reduced behind them."""


@dataclass(slots=True)
class ReplicaSync:
    """Adds the data-parallel tasks of a step to `work`, around those of its actions."""

    schedule: Schedule
    cost: StepCost
    plan: ParallelPlan
    stack: Stack
    work: Work
    gathered: dict[int, list[int]] = field(default_factory=dict)
    """Tasks that gather the parameters of a stage at the start of the step, by bucket."""
    ahead: dict[int, list[int]] = field(default_factory=dict)
    """Gathers of a rank's next pieces that were sent out ahead of them."""
    reduced: dict[int, int] = field(default_factory=dict)
    """Last reduction of gradients on each rank."""
    unsharded: dict[int, int] = field(default_factory=dict)
    """The gather of a stage's parameters that an action asked for, until another lets them go."""
    kept: set[int] = field(default_factory=set)
    """Stages whose parameters are still there from a backward, where gradients accumulate."""
    rank_of: dict[int, int] = field(init=False)
    """The pipeline rank of every stage, in order of stage."""
    last_gradient: dict[int, Action] = field(init=False)
    first_gradient: dict[int, Action] = field(init=False)
    first_forward: dict[int, Action] = field(init=False)
    reduced_when_told: set[int] = field(init=False)
    """Stages whose gradients are reduced where an action says so."""

    def __post_init__(self) -> None:
        actions = list(self.schedule.actions())
        self.rank_of = dict(sorted(self.schedule.stage_ranks().items()))
        self.last_gradient = {a.stage: a for a in actions if a.kind in (BACKWARD, WEIGHT_GRAD)}
        first = (a for a in reversed(actions) if a.kind in (BACKWARD, WEIGHT_GRAD))
        self.first_gradient = {a.stage: a for a in first}
        self.first_forward = {a.stage: a for a in reversed(actions) if a.kind == FORWARD}

        told = (a for rank in self.schedule.ranks for a in rank if a.kind == REDUCE_GRAD)
        self.reduced_when_told = {action.stage for action in told}

    def begin(self) -> None:
        """What comes before the first action: parameters that ZeRO-1 and 2 updated elsewhere."""
        if not self._gathers_after_update() or self.stack.zero_prefetch is not None:
            return
        for stage, rank in self.rank_of.items():
            sync = self.cost.syncs[stage]
            if sync.gather_s > 0:
                task = self._parameters(rank, stage, sync.buckets, ())
                self.gathered[stage] = [self.work.add(task) for _ in range(sync.buckets)]

    def cut(self, action: Action) -> Cut:
        """The pieces that an action runs in."""
        sync = self.cost.syncs[action.stage]
        first = action == self.first_forward.get(action.stage)
        waits = first and action.stage in self.gathered
        gathers = self.plan.zero == 3 and action.kind != WEIGHT_GRAD
        gathers |= first and self._gathers_after_update() and not waits
        there = action.stage in self.unsharded or action.stage in self.kept
        gathers &= sync.gather_s > 0 and not there
        reduces = self._reduces(action)
        takes_s = sync.forward_takes_s if action.kind == FORWARD else 0.0
        if action.kind in (BACKWARD, WEIGHT_GRAD):
            takes_s = sync.backward_takes_s
            takes_s += sync.add_s * (action != self.first_gradient[action.stage])
        takes_s += (waits or gathers) * sync.gather_takes_s
        return Cut(
            pieces=sync.buckets if waits or gathers or reduces else 1,
            takes_s=takes_s + reduces * (sync.reduce_takes_s + sync.reduce_kernels_s),
            waits_for_update=waits,
            gathers=gathers,
            reduces=reduces,
        )

    def parameters(
        self, rank: int, action: Action, cut: Cut, piece: int, after: tuple[int, ...]
    ) -> tuple[int, ...]:
        """The tasks that bring the parameters of a piece; `after` is what else the piece waits for."""
        if self.plan.zero == 3 and action.stage in self.unsharded:
            return (self.unsharded[action.stage],)
        if cut.waits_for_update:
            return (self.gathered[action.stage][piece],)
        if not cut.gathers:
            return ()
        depth = self.stack.fsdp_prefetch if self.plan.zero == 3 else self.stack.zero_prefetch
        if not depth:
            return (self._gather(rank, action, after),)
        chain, ahead = self.work.chain[rank], self.ahead.setdefault(rank, [])
        while len(ahead) <= depth and piece + len(ahead) < cut.pieces:
            # From when the piece `depth` before starts, that is from the end of the one before that.
            place = len(chain) + len(ahead) - depth - 1
            ahead.append(self._gather(rank, action, (chain[place],) if place >= 0 else ()))
        return (ahead.pop(0),)

    def gradients(self, rank: int, action: Action, cut: Cut, end: int) -> None:
        """Reduce a piece's gradients once it ends.

        What is gathered ahead of the next pieces goes out before: it waits for less.
        """
        if cut.reduces:
            self._reduce(rank, action.stage, cut.pieces, (end,))

    def of_stage(self, rank: int, action: Action) -> None:
        """UNSHARD, RESHARD and REDUCE_GRAD, as torch's runtime runs them: the first two move parameters
        under ZeRO-3 alone, and none of them waits.
        """
        stage, sync, after = action.stage, self.cost.syncs[action.stage], self.work.chain[rank][-1:]
        if action.kind == UNSHARD and self.plan.zero == 3 and sync.gather_s > 0:
            self.unsharded[stage] = self.work.add(self._parameters(rank, stage, 1, tuple(after)))
        elif action.kind == RESHARD:
            self.unsharded.pop(stage, None)
        elif action.kind == REDUCE_GRAD and sync.reduce_s > 0:
            if sync.reduce_kernels_s > 0:
                self._prepare(rank, stage, sync.reduce_kernels_s)
            self._reduce(rank, stage, 1, tuple(self.work.chain[rank][-1:]))

    def done(self, rank: int, action: Action) -> None:
        """What follows an action and its send at once."""
        stage, sync = action.stage, self.cost.syncs[action.stage]
        if self.plan.zero == 3 and sync.accumulates:
            (self.kept.discard if action.kind == FORWARD else self.kept.add)(stage)
        if self._reduces_each(stage) and action.kind in (BACKWARD, WEIGHT_GRAD):
            self._sum_norms(rank, stage)

    def finish(self) -> None:
        """What follows the last backward: what is left to reduce, then the optimizer, then the host."""
        chain = self.work.chain
        for stage, rank in self.rank_of.items():
            sync = self.cost.syncs[stage]
            late = sync.accumulates or (self.plan.zero < 2 and not self.stack.dp_overlap)
            if not self._reduces_each(stage):
                self._sum_norms(rank, stage)
            if sync.reduce_s > 0 and late and stage not in self.reduced_when_told:
                if sync.reduce_kernels_s > 0:
                    self._prepare(rank, stage, sync.reduce_kernels_s)
                self._reduce(rank, stage, 1, (chain[rank][-1],))
        if self.cost.tied_reduce_s > 0:
            last = self.rank_of[len(self.cost.stages) - 1]
            traffic = Traffic(self.cost.tied_reduce_s, self.cost.tied_reduce_bytes)
            self._reduce_between(TIED_EMBEDDING, self.rank_of[0], last, traffic)
        for stage, traffic in enumerate(self.cost.copies_reduce):
            copy = self.rank_of[len(self.cost.copies_reduce) + stage]
            one, other = sorted((self.rank_of[stage], copy))
            self._reduce_between(f"copies {stage}", one, other, traffic)
        # The norm of all gradients is needed before any is applied, so every rank waits for all.
        ends = {*self.reduced.values(), *(ends[-1] for ends in chain.values() if ends)}
        for rank in range(self.schedule.pp):
            self._update(rank, tuple(sorted(ends)))

    def _gathers_after_update(self) -> bool:
        """Whether parameters that ZeRO-1 and 2 updated elsewhere come back beside the next forwards."""
        stack = self.stack
        return self.plan.zero in (1, 2) and stack.dp_overlap and not stack.zero_broadcast_s

    def _parameters(
        self, rank: int, stage: int, pieces: int, after: tuple[int, ...], micro_batch: int = -1
    ) -> Task:
        """Gather one of so many pieces of a stage's parameters."""
        sync = self.cost.syncs[stage]
        return Task(
            rank,
            DP,
            f"parameters {stage}",
            "dp",
            sync.gather_s / pieces,
            after,
            stage,
            micro_batch,
            joins_replicas=True,
            num_bytes=sync.gather_bytes / pieces,
            gathers=True,
        )

    def _gather(self, rank: int, action: Action, after: tuple[int, ...]) -> int:
        """Gather one piece's parameters for one pass."""
        buckets = self.cost.syncs[action.stage].buckets
        return self.work.add(self._parameters(rank, action.stage, buckets, after, action.micro_batch))

    def _reduces(self, action: Action) -> bool:
        """Whether gradients are reduced piece by piece behind this action."""
        if action.kind not in (BACKWARD, WEIGHT_GRAD) or self.cost.syncs[action.stage].reduce_s <= 0:
            return False
        if action.stage in self.reduced_when_told:
            return False
        if self.plan.zero >= 2:
            return not self.cost.syncs[action.stage].accumulates
        return self.stack.dp_overlap and action == self.last_gradient[action.stage]

    def _reduces_each(self, stage: int) -> bool:
        """Whether a stage's gradients are reduced after every backward, not once a step."""
        sharded = self.plan.zero >= 2 and self.plan.shard_group > 1
        return sharded and not self.cost.syncs[stage].accumulates

    def _sum_norms(self, rank: int, stage: int) -> None:
        """Sum the gradients that every tp rank has a part of; whatever follows waits for them."""
        traffic = self.cost.syncs[stage].norms
        if traffic.seconds > 0:
            name, after = "gradients of norms", tuple(self.work.chain[rank][-1:])
            sent = traffic.num_bytes
            task = Task(rank, TP, name, "tp", traffic.seconds, after, stage, num_bytes=sent)
            self.work.chain[rank].append(self.work.add(task))

    def _reduce(self, rank: int, stage: int, pieces: int, after: tuple[int, ...]) -> None:
        """Reduce one of so many pieces of a stage's gradients."""
        sync = self.cost.syncs[stage]
        task = Task(
            rank,
            DP,
            f"gradients {stage}",
            "dp",
            sync.reduce_s / pieces,
            after,
            stage,
            joins_replicas=True,
            num_bytes=sync.reduce_bytes / pieces,
        )
        self.reduced[rank] = self.work.add(task)

    def _prepare(self, rank: int, stage: int, seconds: float) -> None:
        """Kernels that a reduction needs, where none of a backward's pieces has them."""
        after = tuple(self.work.chain[rank][-1:])
        task = Task(rank, COMPUTE, f"gradients {stage}", "dp", seconds, after, stage)
        self.work.chain[rank].append(self.work.add(task))

    def _reduce_between(self, name: str, one: int, other: int, traffic: Traffic) -> None:
        """Sum gradients that two pipeline ranks both hold, after all of their own are there."""
        chain = self.work.chain
        after: tuple[int, ...] = (chain[one][-1], chain[other][-1])
        if other in self.reduced:
            after += (self.reduced[other],)
        task = Task(
            one,
            DP,
            name,
            "dp",
            traffic.seconds,
            after,
            receiver=(other, DP),
            num_bytes=traffic.num_bytes,
        )
        self.reduced[one] = self.work.add(task)

    def _update(self, rank: int, ready: tuple[int, ...]) -> None:
        syncs = [self.cost.syncs[s] for s, r in self.rank_of.items() if r == rank]
        seconds = sum(sync.optimizer_s for sync in syncs)
        update = Task(rank, COMPUTE, "optimizer", "optimizer", seconds, ready, joins_replicas=True)
        end = self.work.add(update)
        gather_s = sum(sync.gather_s for sync in syncs)
        if gather_s > 0 and self.plan.zero in (1, 2) and not self._gathers_after_update():
            sent = sum(sync.gather_bytes for sync in syncs)
            gather = Task(
                rank,
                DP,
                "parameters",
                "dp",
                gather_s,
                (end,),
                joins_replicas=True,
                num_bytes=sent,
                gathers=True,
            )
            end = self.work.add(gather)
        if self.stack.step_overhead_s > 0:
            self.work.add(Task(rank, HOST, "host", "host", self.stack.step_overhead_s, (end,)))
