"""The order in which a schedule's actions can run, and the cycle of actions where there is none."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from parsim.errors import ParsimError
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


def in_running_order(schedule: Schedule) -> list[tuple[int, Action]]:
    """(rank, action) for all actions, each after everything that it needs.

    Raises ParsimError with the cycle of actions that wait for each other where no such order exists.
    """
    needs = Needs(schedule)
    position = [0] * schedule.pp
    done: set[Action] = set()
    blocked: dict[Action, list[int]] = {}
    order: list[tuple[int, Action]] = []
    ready = deque(range(schedule.pp))
    while ready:
        rank = ready.popleft()
        actions = schedule.ranks[rank]
        while position[rank] < len(actions):
            action = actions[position[rank]]
            missing = next((need for need in needs.of(action) if need not in done), None)
            if missing is not None:
                blocked.setdefault(missing, []).append(rank)
                break
            order.append((rank, action))
            position[rank] += 1
            for one in (action, *action.parts):
                done.add(one)
                ready.extend(blocked.pop(one, ()))
    if blocked:
        stuck = {rank: missing for missing, ranks in blocked.items() for rank in ranks}
        raise _deadlock(schedule, position, stuck)
    return order


@dataclass(slots=True)
class Needs:
    """What each action of a schedule must wait for, beside what stands before it on its rank."""

    schedule: Schedule
    explicit: bool = field(init=False)
    rank_of: dict[int, int] = field(init=False)
    backward: dict[tuple[int, int], Action] = field(init=False)
    """The action that hands a micro-batch's gradient on, by stage and micro-batch."""

    def __post_init__(self) -> None:
        self.explicit = self.schedule.is_explicit()
        self.rank_of = self.schedule.stage_ranks()
        self.backward = {
            (action.stage, action.micro_batch): action
            for action in self.schedule.actions()
            if action.kind in (BACKWARD, INPUT_GRAD)
        }

    def of(self, action: Action) -> Iterator[Action]:
        """The actions that must be over before this one starts.

        A receive waits for its send, as torch's own check of schedules has it.
        """
        stage, kind, i, parts = action
        if kind == WEIGHT_GRAD:
            yield Action(stage, INPUT_GRAD, i)
        elif kind in KINDS:
            yield from self._inputs(action)
        elif parts:
            yield from (need for part in parts for need in self.of(part) if need not in parts)
        elif kind == SEND_FORWARD:
            yield Action(stage, FORWARD, i)
        elif kind == SEND_BACKWARD:
            yield self.handed_back(stage, i)
        elif kind == RECEIVE_FORWARD and (before := self.schedule.previous_stage(stage)) is not None:
            yield Action(before, SEND_FORWARD, i)
        elif kind == RECEIVE_BACKWARD and (after := self.schedule.next_stage(stage)) is not None:
            yield Action(after, SEND_BACKWARD, i)

    def handed_back(self, stage: int, micro_batch: int) -> Action:
        """The backward of a stage that makes the gradient of its input: B, or I where it is split."""
        whole = Action(stage, BACKWARD, micro_batch)
        return self.backward.get((stage, micro_batch), whole)

    def _inputs(self, action: Action) -> Iterator[Action]:
        stage, kind, i, _ = action
        if kind == FORWARD:
            source = self.schedule.previous_stage(stage)
            if source is not None:
                local = Action(source, FORWARD, i)
                yield Action(stage, RECEIVE_FORWARD, i) if self._is_received(source, stage) else local
            return
        yield Action(stage, FORWARD, i)
        source = self.schedule.next_stage(stage)
        if source is not None:
            local = self.handed_back(source, i)
            yield Action(stage, RECEIVE_BACKWARD, i) if self._is_received(source, stage) else local

    def _is_received(self, source: int, stage: int) -> bool:
        return self.explicit and self.rank_of.get(source) != self.rank_of.get(stage)


def _deadlock(schedule: Schedule, position: list[int], stuck: dict[int, Action]) -> ParsimError:
    """The cycle among the actions that are next on the ranks that are stuck.

    Each waits for an action that stands behind the next one of its own rank: following them from any
    rank comes back to one that was seen, for ranks are finite; or ends at an action that no rank runs.
    """
    homes = {
        one: rank
        for rank, actions in enumerate(schedule.ranks)
        for action in actions
        for one in (action, *action.parts)
    }
    rank, seen = min(stuck), list[int]()
    while rank not in seen:
        seen.append(rank)
        missing = stuck[rank]
        if missing not in homes:
            return ParsimError(
                f"schedule {schedule.name!r} waits for an action that no rank runs",
                where=f"rank {rank}: {schedule.ranks[rank][position[rank]]} waits for {missing}",
            )
        rank = homes[missing]
    steps = []
    for waiting in seen[seen.index(rank) :]:
        action, missing = schedule.ranks[waiting][position[waiting]], stuck[waiting]
        home = homes[missing]
        following = schedule.ranks[home][position[home]]
        behind = "" if missing in (following, *following.parts) else f", which stands behind {following}"
        steps.append(f"rank {waiting}: {action} waits for {missing} of rank {home}{behind}")
    return ParsimError(
        f"schedule {schedule.name!r} deadlocks: its actions wait for each other in a cycle",
        where="; ".join(steps),
        hint="an action can only follow what it needs, on its own rank too",
    )
