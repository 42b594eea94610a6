"""Lowering: a Schedule and the costs of its stages become a Program.

Communication is added here, as a pass over the actions: tensor-, context- and expert-parallel parts
after the compute they belong to, and transfers between stages; what keeps replicas alike is added by
parsim.schedule.sync. Ranks of a Program are pipeline ranks: their dp·cp·tp replicas do the same at the
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
from parsim.schedule.sync import ReplicaSync, Work
from parsim.stack import Stack
from parsim.timeline import COMPUTE, CP, EP, TP

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
    lowering.sync.finish()
    return Program(tasks=tuple(lowering.work.tasks), static_bytes=static_bytes, title=title)


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
    work: Work = field(init=False)
    sync: ReplicaSync = field(init=False)
    arrived: dict[Action, int] = field(default_factory=dict)
    """The task that brings an action's result to the rank that needs it."""
    times: dict[tuple[int, str], PassTime] = field(init=False)
    """What an action takes, by stage and kind."""
    rank_of: dict[int, int] = field(init=False)
    """The pipeline rank of every stage, in order of stage."""

    def __post_init__(self) -> None:
        self.times = {
            (stage, kind): time
            for stage, cost in enumerate(self.cost.stages)
            for kind, time in _times(cost.time, self._host()).items()
        }
        self.rank_of = dict(sorted(self.schedule.stage_ranks().items()))
        self.work = Work(chain={rank: [] for rank in range(self.schedule.pp)})
        self.sync = ReplicaSync(
            schedule=self.schedule, cost=self.cost, plan=self.plan, stack=self.stack, work=self.work
        )
        self.sync.begin()

    def _host(self) -> PassTime:
        """What comes with every action: host time (a rank without a pipeline just runs its forwards and
        backwards), and the extremes of fp8 tensors.
        """
        host_s = self.stack.action_host_s if self.schedule.pp > 1 else 0.0
        return PassTime(host_s, self.cost.extremes_s, tp_bytes=self.cost.extremes_bytes)

    def add_action(self, rank: int, action: Action) -> None:
        """The tasks of one action: its compute, in pieces or whole, then the transfer of its result."""
        cut = self.sync.cut(action)
        time = self.times[action.stage, action.kind]
        part = time if cut.pieces == 1 else time.times(1 / cut.pieces)
        part = part.plus(PassTime(cut.takes_s / cut.pieces))
        for piece in range(cut.pieces):
            after = tuple(self.work.chain[rank][-1:])
            source = self._source(action)
            if piece == 0 and source is not None and source not in after:
                after += (source,)
            after += self.sync.parameters(rank, action, cut, piece, after)
            end = self._compute(rank, action, part, after, piece, cut.pieces)
            self.work.chain[rank].append(end)
            self.sync.gradients(rank, action, cut, end)
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
        end = self.work.add(
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
        for stream, seconds, sent in (
            (TP, time.tp_s, time.tp_bytes),
            (CP, time.cp_s, time.cp_bytes),
            (EP, time.ep_s, time.ep_bytes),
        ):
            if seconds > 0:
                task = Task(rank, stream, str(action), stream, seconds, (end,), stage, i, num_bytes=sent)
                end = self.work.add(task)
        return end

    def _send(self, rank: int, action: Action) -> None:
        """Carry the action's result to the stage that needs it."""
        stage, kind, i = action
        target_stage = stage + 1 if kind == FORWARD else stage - 1
        if kind == WEIGHT_GRAD or not 0 <= target_stage < len(self.cost.stages):
            return
        end = self.work.chain[rank][-1]
        target = self.rank_of[target_stage]
        if target != rank:
            forth = (target - rank) % self.schedule.pp == 1
            end = self.work.add(
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
                    num_bytes=self.cost.send_bytes[min(stage, target_stage)],
                )
            )
            if not self.stack.pp_overlap:
                self.work.chain[rank].append(end)
        self.arrived[action] = end


def _times(time: PartTime, host: PassTime) -> dict[str, PassTime]:
    """What each kind of action takes; the input gradient of a split backward recomputes first."""
    return {
        FORWARD: time.forward.plus(host),
        BACKWARD: time.backward.plus(host),
        INPUT_GRAD: time.recompute.plus(time.input_grad).plus(host),
        WEIGHT_GRAD: time.weight_grad.plus(PassTime(host.compute_s)),
    }
