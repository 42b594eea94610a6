"""Lowering: a Schedule and the costs of its stages become a Program.

Communication is added here, as a pass over the actions: tensor-, context- and expert-parallel parts
after the compute they belong to, transfers between stages, and data-parallel reduction behind the last
backward of each stage. Ranks of a Program are pipeline ranks: their dp·cp·tp replicas do the same at the
same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from parsim.cost.price import PartTime, PassTime
from parsim.cost.step import StepCost
from parsim.errors import ParsimError
from parsim.plan import ParallelPlan
from parsim.schedule.action import (
    BACKWARD,
    FORWARD,
    INPUT_GRAD,
    WEIGHT_GRAD,
    Action,
    Schedule,
)
from parsim.schedule.program import Program, Task
from parsim.stack import Stack
from parsim.timeline import COMPUTE, CP, DP, EP, HOST, TP

KIND_NAMES = {
    FORWARD: "forward",
    BACKWARD: "backward",
    INPUT_GRAD: "input_grad",
    WEIGHT_GRAD: "weight_grad",
}


def lower(
    schedule: Schedule,
    cost: StepCost,
    plan: ParallelPlan,
    stack: Stack,
    *,
    order: Sequence[tuple[int, Action]] | None = None,
    static_bytes: tuple[float, ...] = (),
    title: str = "",
) -> Program:
    """The Program of one step; `order` is the schedule's running order where the caller has it already.

    Raises ParsimError naming the actions that wait for each other where the schedule deadlocks.
    """
    lowering = _Lowering(schedule=schedule, cost=cost, plan=plan, stack=stack)
    for rank, action in in_running_order(schedule) if order is None else order:
        lowering.add_action(rank, action)
    lowering.finish()
    return Program(tasks=tuple(lowering.tasks), static_bytes=static_bytes, title=title)


def in_running_order(schedule: Schedule) -> list[tuple[int, Action]]:
    """(rank, action) for all actions, each after everything that it needs.

    Raises ParsimError with what every stuck rank waits for where no such order exists.
    """
    position = [0] * schedule.pp
    last_stage = schedule.num_stages - 1
    done: set[Action] = set()
    order: list[tuple[int, Action]] = []
    remaining = sum(len(actions) for actions in schedule.ranks)
    while remaining:
        before = remaining
        for rank, actions in enumerate(schedule.ranks):
            while position[rank] < len(actions):
                action = actions[position[rank]]
                if missing(action, done, last_stage) is not None:
                    break
                done.add(action)
                order.append((rank, action))
                position[rank] += 1
                remaining -= 1
        if remaining == before:
            raise _deadlock(schedule, position, done, last_stage)
    return order


def missing(action: Action, done: set[Action], last_stage: int) -> Action | None:
    """An action that must run first and has not, or None."""
    stage, kind, i = action
    if kind == FORWARD:
        needed = [Action(stage - 1, FORWARD, i)] if stage else []
    elif kind == WEIGHT_GRAD:
        needed = [Action(stage, INPUT_GRAD, i)]
    else:
        needed = [Action(stage, FORWARD, i)]
        if stage < last_stage:
            above = Action(stage + 1, BACKWARD, i)
            if above not in done and Action(stage + 1, INPUT_GRAD, i) not in done:
                needed.append(above)
    return next((need for need in needed if need not in done), None)


def _deadlock(
    schedule: Schedule, position: list[int], done: set[Action], last_stage: int
) -> ParsimError:
    waits = []
    for rank, actions in enumerate(schedule.ranks):
        if position[rank] < len(actions):
            action = actions[position[rank]]
            waits.append(f"rank {rank}: {action} waits for {missing(action, done, last_stage)}")
    return ParsimError(
        f"schedule {schedule.name!r} deadlocks",
        where="; ".join(waits[:8]) + (" …" if len(waits) > 8 else ""),
        hint="an action can only follow what it needs, on its own rank too",
    )


@dataclass(slots=True)
class _Lowering:
    """The tasks so far, and what later ones must wait for."""

    schedule: Schedule
    cost: StepCost
    plan: ParallelPlan
    stack: Stack
    tasks: list[Task] = field(default_factory=list)
    chain: dict[int, list[int]] = field(default_factory=dict)
    """Last tasks of each rank's latest two pieces of work; the next piece starts after the last."""
    arrived: dict[Action, int] = field(default_factory=dict)
    """The task that brings an action's result to the rank that needs it."""
    gathered: dict[int, list[int]] = field(default_factory=dict)
    """Tasks that gather the parameters of a stage at the start of the step, by bucket."""
    reduced: dict[int, int] = field(default_factory=dict)
    """Last reduction of gradients on each rank."""
    times: dict[tuple[int, str], PassTime] = field(init=False)
    """What an action takes, by stage and kind."""
    rank_of: dict[int, int] = field(init=False)
    """The pipeline rank of every stage, in order of stage."""
    last_gradient: dict[int, Action] = field(init=False)
    first_forward: dict[int, Action] = field(init=False)

    def __post_init__(self) -> None:
        actions = list(self.schedule.actions())
        self.times = {
            (stage, kind): time
            for stage, cost in enumerate(self.cost.stages)
            for kind, time in _times(cost.time, self._action_s(), self.cost.extremes_s).items()
        }
        self.rank_of = dict(sorted(self.schedule.stage_ranks().items()))
        self.last_gradient = {a.stage: a for a in actions if a.kind in (BACKWARD, WEIGHT_GRAD)}
        self.first_forward = {a.stage: a for a in reversed(actions) if a.kind == FORWARD}
        self.chain = {rank: [] for rank in range(self.schedule.pp)}
        if self._gathers_ahead():
            for stage, rank in self.rank_of.items():
                self._gather_before_step(rank, stage)

    def _action_s(self) -> float:
        """Host time of an action; a rank without a pipeline just runs its forwards and backwards."""
        return self.stack.action_host_s if self.schedule.pp > 1 else 0.0

    def _gathers_ahead(self) -> bool:
        """Whether parameters that ZeRO-1 and 2 updated elsewhere come back beside the next forwards."""
        stack = self.stack
        return self.plan.zero in (1, 2) and stack.dp_overlap and not stack.zero_broadcast_s

    def _add(self, task: Task) -> int:
        self.tasks.append(task)
        return len(self.tasks) - 1

    def _gather_before_step(self, rank: int, stage: int) -> None:
        """Parameters that ZeRO-1 and 2 updated elsewhere, gathered beside the first forwards."""
        sync = self.cost.syncs[stage]
        if sync.gather_s > 0:
            task = Task(rank, DP, f"parameters {stage}", "dp", sync.gather_s / sync.buckets, (), stage)
            self.gathered[stage] = [self._add(task) for _ in range(sync.buckets)]

    def add_action(self, rank: int, action: Action) -> None:
        """The tasks of one action: its compute, in pieces or whole, then the transfer of its result."""
        time = self.times[action.stage, action.kind]
        sync = self.cost.syncs[action.stage]
        first_gather = action == self.first_forward.get(action.stage) and action.stage in self.gathered
        fully_sharded = self.plan.zero == 3 and action.kind != WEIGHT_GRAD and sync.gather_s > 0
        reduces = self._reduces(action)
        pieces = sync.buckets if first_gather or fully_sharded or reduces else 1
        ahead: int | None = None
        for piece in range(pieces):
            after = tuple(self.chain[rank][-1:])
            source = self._source(action)
            if piece == 0 and source is not None and source not in after:
                after += (source,)
            if first_gather:
                after += (self.gathered[action.stage][piece],)
            elif fully_sharded:
                after += (self._gather(rank, action, after) if ahead is None else ahead,)
            part = time if pieces == 1 else time.times(1 / pieces)
            gathers = first_gather or fully_sharded
            taken_s = gathers * sync.gather_takes_s + reduces * sync.reduce_takes_s
            part = part.plus(PassTime(taken_s / pieces))
            end = self._compute(rank, action, part, after, piece, pieces)
            self.chain[rank] = [*self.chain[rank][-1:], end]
            if reduces:
                # What is gathered ahead goes out before this piece's gradients are there to be reduced.
                gathers_next = fully_sharded and self.stack.fsdp_prefetch and piece + 1 < pieces
                ahead = self._gather(rank, action, ()) if gathers_next else None
                self._reduce(rank, action.stage, sync.reduce_s / pieces, (end,))
        self._send(rank, action)

    def _source(self, action: Action) -> int | None:
        """The task that brings the action's input from another stage."""
        stage, kind, i = action
        if kind == WEIGHT_GRAD:
            return None
        if kind == FORWARD:
            return self.arrived.get(Action(stage - 1, FORWARD, i))
        whole = self.arrived.get(Action(stage + 1, BACKWARD, i))
        return self.arrived.get(Action(stage + 1, INPUT_GRAD, i)) if whole is None else whole

    def _compute(
        self, rank: int, action: Action, time: PassTime, after: tuple[int, ...], piece: int, pieces: int
    ) -> int:
        """One piece of an action: compute, then its exposed communication. Returns the last task."""
        stage, kind, i = action
        saved = self.cost.stages[stage].saved_bytes
        end = self._add(
            Task(
                rank,
                COMPUTE,
                str(action),
                KIND_NAMES[kind],
                time.compute_s,
                after,
                stage,
                i,
                allocated_bytes=saved if kind == FORWARD and piece == 0 else 0.0,
                freed_bytes=saved if kind in (BACKWARD, WEIGHT_GRAD) and piece == pieces - 1 else 0.0,
            )
        )
        for stream, seconds in ((TP, time.tp_s), (CP, time.cp_s), (EP, time.ep_s)):
            if seconds > 0:
                end = self._add(Task(rank, stream, str(action), stream, seconds, (end,), stage, i))
        return end

    def _gather(self, rank: int, action: Action, after: tuple[int, ...]) -> int:
        """Gather one piece's parameters (FSDP), in the way of its compute or one piece ahead."""
        sync = self.cost.syncs[action.stage]
        if self.stack.fsdp_prefetch:
            # Ahead means from when the piece before starts, that is from the end of the one before it.
            after = tuple(self.chain[rank][:-1])
        name = f"parameters {action.stage}"
        seconds = sync.gather_s / sync.buckets
        return self._add(Task(rank, DP, name, "dp", seconds, after, action.stage, action.micro_batch))

    def _reduces(self, action: Action) -> bool:
        """Whether gradients are reduced piece by piece behind this action."""
        if action.kind not in (BACKWARD, WEIGHT_GRAD) or self.cost.syncs[action.stage].reduce_s <= 0:
            return False
        if self.plan.zero >= 2:
            return True
        return self.stack.dp_overlap and action == self.last_gradient[action.stage]

    def _reduce(self, rank: int, stage: int, seconds: float, after: tuple[int, ...]) -> None:
        task = Task(rank, DP, f"gradients {stage}", "dp", seconds, after, stage)
        self.reduced[rank] = self._add(task)

    def _send(self, rank: int, action: Action) -> None:
        """Carry the action's result to the stage that needs it."""
        stage, kind, i = action
        target_stage = stage + 1 if kind == FORWARD else stage - 1
        if kind == WEIGHT_GRAD or not 0 <= target_stage < len(self.cost.stages):
            return
        end = self.chain[rank][-1]
        target = self.rank_of[target_stage]
        if target != rank:
            forth = (target - rank) % self.schedule.pp == 1
            end = self._add(
                Task(
                    rank,
                    "pp_send_next" if forth else "pp_send_prev",
                    str(action),
                    "pp",
                    self.cost.send_s[min(stage, target_stage)],
                    (end,),
                    stage,
                    i,
                    receiver=(target, "pp_recv_prev" if forth else "pp_recv_next"),
                )
            )
            if not self.stack.pp_overlap:
                self.chain[rank].append(end)
        self.arrived[action] = end

    def finish(self) -> None:
        """What follows the last backward: what is left to reduce, then the optimizer, then the host."""
        for stage, rank in self.rank_of.items():
            sync = self.cost.syncs[stage]
            if sync.reduce_s > 0 and self.plan.zero < 2 and not self.stack.dp_overlap:
                self._reduce(rank, stage, sync.reduce_s, (self.chain[rank][-1],))
        if self.cost.tied_reduce_s > 0:
            self._reduce_tied()
        # The norm of all gradients is needed before any is applied, so every rank waits for all.
        ends = {*self.reduced.values(), *(chain[-1] for chain in self.chain.values() if chain)}
        for rank in range(self.schedule.pp):
            self._update(rank, tuple(sorted(ends)))

    def _reduce_tied(self) -> None:
        """Sum the gradients of the embedding that the first and the last stage both hold."""
        first, last = self.rank_of[0], self.rank_of[len(self.cost.stages) - 1]
        after: tuple[int, ...] = (self.chain[first][-1], self.chain[last][-1])
        if last in self.reduced:
            after += (self.reduced[last],)
        task = Task(
            first, DP, "tied embedding", "dp", self.cost.tied_reduce_s, after, receiver=(last, DP)
        )
        self.reduced[first] = self._add(task)

    def _update(self, rank: int, ready: tuple[int, ...]) -> None:
        syncs = [self.cost.syncs[s] for s, r in self.rank_of.items() if r == rank]
        seconds = sum(sync.optimizer_s for sync in syncs)
        end = self._add(Task(rank, COMPUTE, "optimizer", "optimizer", seconds, ready))
        gather_s = sum(sync.gather_s for sync in syncs)
        if gather_s > 0 and self.plan.zero in (1, 2) and not self._gathers_ahead():
            end = self._add(Task(rank, DP, "parameters", "dp", gather_s, (end,)))
        if self.stack.step_overhead_s > 0:
            self._add(Task(rank, HOST, "host", "host", self.stack.step_overhead_s, (end,)))


def _times(time: PartTime, action_s: float, extremes_s: float) -> dict[str, PassTime]:
    """What each kind of action takes; the input gradient of a split backward recomputes first."""
    host = PassTime(action_s, extremes_s)
    return {
        FORWARD: time.forward.plus(host),
        BACKWARD: time.backward.plus(host),
        INPUT_GRAD: time.recompute.plus(time.input_grad).plus(host),
        WEIGHT_GRAD: time.weight_grad.plus(PassTime(action_s)),
    }
