"""What is wrong with a list of actions, whoever wrote it."""

from __future__ import annotations

from collections import Counter
from itertools import zip_longest

from parsim.errors import ParsimError
from parsim.schedule.action import (
    BACKWARD,
    FORWARD,
    INPUT_GRAD,
    KINDS,
    RECEIVE_BACKWARD,
    RECEIVE_FORWARD,
    REDUCE_GRAD,
    SEND_BACKWARD,
    SEND_FORWARD,
    TRANSFER_KINDS,
    WEIGHT_GRAD,
    Action,
    Schedule,
    computations,
)
from parsim.schedule.order import in_running_order


def check_schedule(schedule: Schedule) -> None:
    """Raises ParsimError where a list of actions is no training step.

    Every stage runs every micro-batch's forward and backward (B, or I and W) once, all on one rank.
    Where transfers are actions, each has a send and a receive, in the same order at both ends. And no
    action waits for itself through others.
    """
    count = Counter(schedule.actions())
    transfers = (a for rank in schedule.ranks for a in rank if a.kind in TRANSFER_KINDS)
    for action, times in (*count.items(), *Counter(transfers).items()):
        if times > 1:
            raise ParsimError("an action stands twice in the schedule", where=str(action))
    homes: dict[int, int] = {}
    for rank, actions in enumerate(schedule.ranks):
        for action in computations(actions):
            if homes.setdefault(action.stage, rank) != rank:
                raise ParsimError(
                    f"stage {action.stage} has actions on two ranks",
                    where=str(action),
                    got=f"ranks {homes[action.stage]} and {rank}",
                )
    if schedule.num_stages % schedule.chains or schedule.num_micro_batches % schedule.chains:
        raise ParsimError(
            f"{schedule.chains} chains share stages and micro-batches equally",
            got=f"{schedule.num_stages} stages, {schedule.num_micro_batches} micro-batches",
        )
    for stage in range(schedule.num_stages):
        for i in schedule.micro_batches(stage):
            _check_micro_batch(count, stage, i)
    expected = schedule.num_stages // schedule.chains * schedule.num_micro_batches
    found = sum(action.kind == FORWARD for action in count)
    if found > expected:
        raise ParsimError(
            "a micro-batch runs through the stages of one chain",
            got=f"{found} forwards",
            expected=f"{expected}",
        )
    _check_reductions(schedule)
    if schedule.is_explicit():
        _check_transfers(schedule, homes)
    in_running_order(schedule)


def _check_micro_batch(count: Counter[Action], stage: int, i: int) -> None:
    present = {kind for kind in KINDS if count[Action(stage, kind, i)]}
    if present not in ({FORWARD, BACKWARD}, {FORWARD, INPUT_GRAD, WEIGHT_GRAD}):
        raise ParsimError(
            f"stage {stage} does not run micro-batch {i} forward and backward exactly once",
            got=", ".join(f"{stage}{kind}{i}" for kind in sorted(present)) or "no action",
            expected=f"{stage}F{i} and {stage}B{i}, or {stage}F{i}, {stage}I{i} and {stage}W{i}",
        )


def _check_reductions(schedule: Schedule) -> None:
    """Gradients that an action reduces are complete."""
    for actions in schedule.ranks:
        reduced: set[int] = set()
        for action in actions:
            if action.kind == REDUCE_GRAD:
                reduced.add(action.stage)
            for one in computations([action]):
                if one.stage in reduced:
                    raise ParsimError(
                        "a stage's gradients are reduced before all of them are there",
                        where=f"{one.stage}{REDUCE_GRAD} stands before {action}",
                        hint="it belongs behind the last backward of its stage",
                    )


def _check_transfers(schedule: Schedule, homes: dict[int, int]) -> None:
    """Sends and receives between two ranks stand in the same order at both: transports pair them so."""
    sent: dict[tuple[int, int], list[Action]] = {}
    received: dict[tuple[int, int], list[Action]] = {}
    for rank, actions in enumerate(schedule.ranks):
        for action in actions:
            if action.kind not in TRANSFER_KINDS:
                continue
            receive = _receive_of(schedule, action)
            peer = None if receive is None else _peer(schedule, action, homes)
            if receive is None or peer is None or homes.get(action.stage) != rank or peer == rank:
                raise ParsimError(
                    "a transfer runs between neighbouring stages on different ranks",
                    where=f"rank {rank}: {action}",
                )
            if action == receive:
                received.setdefault((peer, rank), []).append(action)
            else:
                sent.setdefault((rank, peer), []).append(receive)
    for pair in sorted(sent.keys() | received.keys()):
        out, into = sent.get(pair, []), received.get(pair, [])
        if out != into:
            k = next(k for k, (a, b) in enumerate(zip_longest(out, into)) if a != b)
            raise ParsimError(
                "sends and receives of two ranks do not match",
                where=f"transfer {k + 1} from rank {pair[0]} to rank {pair[1]}",
                got=f"{_listed(into, k)} where the sends ask for {_listed(out, k)}",
            )


def _listed(receives: list[Action], k: int) -> str:
    return str(receives[k]) if k < len(receives) else "no receive"


def _receive_of(schedule: Schedule, action: Action) -> Action | None:
    """The receive at the other end of a send (a receive is its own), or None at the end of a chain."""
    stage, kind, i, _ = action
    if kind == SEND_FORWARD:
        target = schedule.next_stage(stage)
        return None if target is None else Action(target, RECEIVE_FORWARD, i)
    if kind == SEND_BACKWARD:
        target = schedule.previous_stage(stage)
        return None if target is None else Action(target, RECEIVE_BACKWARD, i)
    source = schedule.previous_stage(stage) if kind == RECEIVE_FORWARD else schedule.next_stage(stage)
    return None if source is None else action


def _peer(schedule: Schedule, action: Action, homes: dict[int, int]) -> int | None:
    up = action.kind in (SEND_FORWARD, RECEIVE_BACKWARD)
    stage = schedule.next_stage(action.stage) if up else schedule.previous_stage(action.stage)
    return None if stage is None else homes.get(stage)
