"""Lowering: a Schedule and the costs of its stages become a Program.

Communication is added here, as a pass over the actions: tensor-, context- and expert-parallel parts
after the compute they belong to (beside it in an overlapped pair), and transfers between stages, where
the schedule does not say itself when to send and receive; what keeps replicas alike is added by
parsim.schedule.sync. Ranks of a Program are pipeline ranks: their dp·cp·tp replicas do the same at the
same time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from parsim.cost.price import PartTime, PassTime
from parsim.cost.step import StepCost
from parsim.plan import ParallelPlan
from parsim.schedule.action import (
    BACKWARD,
    FORWARD,
    INPUT_GRAD,
    KINDS,
    RECEIVE_BACKWARD,
    RECEIVE_FORWARD,
    SEND_BACKWARD,
    SEND_FORWARD,
    WEIGHT_GRAD,
    Action,
    Schedule,
)
from parsim.schedule.order import in_running_order
from parsim.schedule.program import Program, Task
from parsim.schedule.stale_sync import StaleSync
from parsim.schedule.sync import ReplicaSync, Work
from parsim.stack import Stack
from parsim.timeline import COMPUTE, CP, EP, TP

KIND_NAMES = {
    FORWARD: "forward",
    BACKWARD: "backward",
    INPUT_GRAD: "input_grad",
    WEIGHT_GRAD: "weight_grad",
}

Arrival = tuple[int, bool, int]
"""A stage's input of a micro-batch: (stage, whether it is the forward's, micro-batch)."""


def lower(
    schedule: Schedule,
    cost: StepCost,
    plan: ParallelPlan,
    stack: Stack,
    *,
    order: Sequence[tuple[int, Action]] | None = None,
    compute_s: Mapping[tuple[int, str], float] = MappingProxyType({}),
    static_bytes: tuple[float, ...] = (),
    title: str = "",
) -> Program:
    """The Program of one step; `order` is the schedule's running order where the caller has it already.

    `compute_s` replaces the compute of the actions of a stage and kind, where it was measured.

    Raises ParsimError naming the actions that wait for each other where the schedule deadlocks.
    """
    lowering = _Lowering(schedule=schedule, cost=cost, plan=plan, stack=stack, compute_s=compute_s)
    for rank, action in in_running_order(schedule) if order is None else order:
        lowering.add_action(rank, action)
    lowering.sync.finish()
    return Program(tasks=tuple(lowering.work.tasks), static_bytes=static_bytes, title=title)


@dataclass(slots=True)
class _Lowering:
    """The tasks so far, and what later ones must wait for."""

    schedule: Schedule
    cost: StepCost
    plan: ParallelPlan
    stack: Stack
    compute_s: Mapping[tuple[int, str], float]
    work: Work = field(init=False)
    sync: ReplicaSync = field(init=False)
    arrived: dict[Arrival, int] = field(default_factory=dict)
    """The task that brings an input to the rank that needs it."""
    made: dict[Arrival, tuple[Action, int]] = field(default_factory=dict)
    """The action, and its last task, that made an input; of transfers that are actions, what the sender
    has done when it sends."""
    times: dict[tuple[int, str], PassTime] = field(init=False)
    """What an action takes, by stage and kind."""
    rank_of: dict[int, int] = field(init=False)
    """The pipeline rank of every stage, in order of stage."""
    explicit: bool = field(init=False)
    """Whether transfers are actions."""

    def __post_init__(self) -> None:
        host = action_host(self.cost, self.stack, pp=self.schedule.pp)
        self.times = {
            (stage, kind): time
            for stage, cost in enumerate(self.cost.stages)
            for kind, time in pass_times(cost.time, host).items()
        }
        for stage, each in enumerate(self.cost.stages[1:], start=1):
            apart = self.times[stage, WEIGHT_GRAD].plus(each.time.apart)
            self.times[stage, WEIGHT_GRAD] = apart
        for key, seconds in self.compute_s.items():
            self.times[key] = self.times[key]._replace(compute_s=seconds + host.compute_s)
        self.rank_of = dict(sorted(self.schedule.stage_ranks().items()))
        self.explicit = self.schedule.is_explicit()
        self.work = Work(chain={rank: [] for rank in range(self.schedule.pp)})
        sync = StaleSync if self.schedule.update_every else ReplicaSync
        self.sync = sync(
            schedule=self.schedule, cost=self.cost, plan=self.plan, stack=self.stack, work=self.work
        )
        self.sync.begin()

    def add_action(self, rank: int, action: Action) -> None:
        """The tasks of one action."""
        if action.kind in KINDS:
            self._add_computation(rank, action, self.times[action.stage, action.kind])
            self._hand_on(rank, action)
            self.sync.done(rank, action)
        elif action.parts and self.stack.pair_overlap:
            self._add_pair(rank, action.parts)
        elif action.parts:
            for part in action.parts:
                self.add_action(rank, part)
        elif action.kind in (SEND_FORWARD, SEND_BACKWARD):
            arrival = self._goes_to(action)
            assert arrival is not None
            self.made[arrival] = self.made[arrival][0], self.work.chain[rank][-1]
        elif action.kind in (RECEIVE_FORWARD, RECEIVE_BACKWARD):
            self._receive(rank, action)
        else:
            self.sync.of_stage(rank, action)

    def _add_computation(
        self, rank: int, action: Action, time: PassTime, also_after: tuple[int, ...] = ()
    ) -> None:
        """The compute of one action, in pieces or whole, with its communication."""
        cut = self.sync.cut(action)
        part = time if cut.pieces == 1 else time.times(1 / cut.pieces)
        if cut.takes_s:
            part = part.plus(PassTime(cut.takes_s / cut.pieces))
        for piece in range(cut.pieces):
            after = tuple(self.work.chain[rank][-1:])
            if piece == 0:
                after = tuple(dict.fromkeys((*after, *self._source(action), *also_after)))
            after += self.sync.parameters(rank, action, cut, piece, after)
            end = self._compute(rank, action, part, after, piece, cut.pieces)
            self.work.chain[rank].append(end)
            self.sync.gradients(rank, action, cut, end)

    def _add_pair(self, rank: int, parts: tuple[Action, ...]) -> None:
        """Two passes at once: their compute adds up, and each one's exchanges run beside the other's.

        Tensor- and expert-parallel communication is hidden as far as the other pass has compute; the
        stack's overlap_cost of it slows that compute down. Both start when both inputs are there, and
        hand on what they made when both are over.
        """
        first, second = parts
        times = {part: self.times[part.stage, part.kind] for part in parts}
        sources = tuple(source for part in parts for source in self._source(part))
        for part, other in ((first, second), (second, first)):
            exposed, _ = self._beside(times[part], times[other].compute_s)
            _, hidden = self._beside(times[other], times[part].compute_s)
            after = tuple(dict.fromkeys((*self.work.chain[rank][-1:], *sources)))
            at = other.stage, other.micro_batch
            for stream, seconds, sent in _communication(hidden):
                task = Task(rank, stream, str(other), stream, seconds, after, *at, num_bytes=sent)
                self.work.add(task)
            paid = PassTime(self.stack.overlap_cost * hidden.total_s)
            self._add_computation(rank, part, exposed.plus(paid), sources)
        for part in parts:
            self._hand_on(rank, part)

    def _beside(self, time: PassTime, compute_s: float) -> tuple[PassTime, PassTime]:
        """What of a pass still shows beside so much compute of another, and its communication that does
        not. Exchanges of tokens that the stack hides anyway are not hidden twice, and nothing makes a
        pass shorter than its launches.
        """
        hides_anyway = self.stack.fused_experts or self.stack.ep_overlap != "never"
        room_s = max(0.0, min(compute_s, time.total_s - time.compute_s - time.host_bound_s))
        ep_s = 0.0 if hides_anyway else min(time.ep_s, room_s)
        tp_s = min(time.tp_s, room_s - ep_s)
        hidden = PassTime(
            tp_s=tp_s,
            ep_s=ep_s,
            tp_bytes=time.tp_bytes * tp_s / (time.tp_s or 1.0),
            ep_bytes=time.ep_bytes * ep_s / (time.ep_s or 1.0),
        )
        return time.plus(hidden.times(-1.0)), hidden

    def _source(self, action: Action) -> tuple[int, ...]:
        """The task that brings the action's input from another stage, if any does."""
        stage, kind, i, _ = action
        if kind == WEIGHT_GRAD:
            return ()
        source = self.arrived.get((stage, kind == FORWARD, i))
        return () if source is None else (source,)

    def _compute(
        self, rank: int, action: Action, time: PassTime, after: tuple[int, ...], piece: int, pieces: int
    ) -> int:
        """One piece of an action: compute, then its exposed communication. Returns the last task."""
        stage, kind, i, _ = action
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
        for stream, seconds, sent in _communication(time):
            task = Task(rank, stream, str(action), stream, seconds, (end,), stage, i, num_bytes=sent)
            end = self.work.add(task)
        return end

    def _goes_to(self, action: Action) -> Arrival | None:
        """What an action makes, or sends; None where no other stage needs it."""
        stage, kind, i, _ = action
        forth = kind in (FORWARD, SEND_FORWARD)
        target = self.schedule.next_stage(stage) if forth else self.schedule.previous_stage(stage)
        return None if target is None or kind == WEIGHT_GRAD else (target, forth, i)

    def _hand_on(self, rank: int, action: Action) -> None:
        """Carry the action's result to the stage that needs it, or have it ready to be sent."""
        arrival = self._goes_to(action)
        if arrival is None:
            return
        end = self.work.chain[rank][-1]
        if self.rank_of[arrival[0]] == rank:
            self.arrived[arrival] = end
        elif self.explicit:
            self.made[arrival] = action, end
        else:
            self.arrived[arrival] = end = self._transfer(action, arrival[0], (end,))
            if not self.stack.pp_overlap:
                self.work.chain[rank].append(end)

    def _receive(self, rank: int, action: Action) -> None:
        """The transfer of a send and a receive, from when both ranks have come to theirs.

        Where sends are in the way of compute, the receiver waits here.
        """
        arrival = action.stage, action.kind == RECEIVE_FORWARD, action.micro_batch
        source, sent = self.made[arrival]
        after = tuple(dict.fromkeys((sent, *self.work.chain[rank][-1:])))
        self.arrived[arrival] = end = self._transfer(source, action.stage, after)
        if not self.stack.pp_overlap:
            self.work.chain[rank].append(end)

    def _transfer(self, action: Action, target_stage: int, after: tuple[int, ...]) -> int:
        stage, _, i, _ = action
        rank, target = self.rank_of[stage], self.rank_of[target_stage]
        forth = (target - rank) % self.schedule.pp == 1
        return self.work.add(
            Task(
                rank,
                "pp_send_next" if forth else "pp_send_prev",
                str(action),
                "pp",
                self.cost.send_s[min(stage, target_stage)],
                after,
                stage,
                i,
                receiver=(target, "pp_recv_prev" if forth else "pp_recv_next"),
                num_bytes=self.cost.send_bytes[min(stage, target_stage)],
            )
        )


def _communication(time: PassTime) -> list[tuple[str, float, float]]:
    """The streams that a pass communicates on, with seconds and bytes."""
    parts = (
        (TP, time.tp_s, time.tp_bytes),
        (CP, time.cp_s, time.cp_bytes),
        (EP, time.ep_s, time.ep_bytes),
    )
    return [part for part in parts if part[1] > 0]


def action_host(cost: StepCost, stack: Stack, *, pp: int) -> PassTime:
    """What comes with every action: host time (a rank without a pipeline just runs its forwards and
    backwards), and the extremes of fp8 tensors.
    """
    host_s = stack.action_host_s if pp > 1 else 0.0
    return PassTime(host_s, cost.extremes_s, tp_bytes=cost.extremes_bytes)


def pass_times(time: PartTime, host: PassTime) -> dict[str, PassTime]:
    """What each kind of action takes; the input gradient of a split backward recomputes first."""
    return {
        FORWARD: time.forward.plus(host),
        BACKWARD: time.backward.plus(host),
        INPUT_GRAD: time.recompute.plus(time.input_grad).plus(host),
        WEIGHT_GRAD: time.weight_grad.plus(PassTime(host.compute_s)),
    }
