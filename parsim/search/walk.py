"""A tighter lower bound: a walk through a schedule's actions, for many plans at once.

Plans with the same schedule, ranks, chunks and micro-batches run the same actions in the same order.
Their step times differ only in how long those take, so one walk along the order serves them all, with an
array over P plans in place of each time. Left out is what delays an action further: gathers of FSDP that
come late and lie in the way of reductions, and what overlapped pairs hide less than they might.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import count
from typing import NamedTuple

import numpy as np

from parsim.plan import ParallelPlan
from parsim.schedule import make_schedule
from parsim.schedule.action import BACKWARD, FORWARD, INPUT_GRAD, WEIGHT_GRAD, Action, Schedule
from parsim.search.bound_arrays import end_s
from parsim.search.layout import Floats, Layout
from parsim.search.passes import Passes
from parsim.stack import Stack

PAIRED = "paired "
"""Before the kind of a pass that is one of an overlapped pair."""
REDUCED = BACKWARD, WEIGHT_GRAD, PAIRED + BACKWARD, PAIRED + WEIGHT_GRAD
"""Passes behind which gradients may be reduced."""


FIRST, LAST = 1, 2


class Output(NamedTuple):
    """What an action hands on."""

    number: int
    boundary: int
    """The stage before it, of those two that it goes between; −1 where both are on one rank."""
    stream: tuple[int, bool]
    """The stream that carries it: of which rank, and whether to the next one."""


class Step(NamedTuple):
    """An action, or an overlapped pair."""

    rank: int
    passes: tuple[tuple[str, int, int], ...]
    """Kind and stage of each, and whether it is the FIRST forward or the LAST gradient of its stage."""
    sources: tuple[int, ...]
    """Numbers of the outputs that it waits for."""
    outputs: tuple[Output, ...]


@lru_cache(maxsize=64)
def walk_of(
    schedule: str, pp: int, vpp: int, num_micro_batches: int, *, pairs: bool
) -> tuple[Step, ...]:
    """The actions of a schedule in an order in which they can run; without `pairs` the passes of an
    overlapped pair run in turn.
    """
    made = make_schedule(ParallelPlan(schedule=schedule, pp=pp, vpp=vpp), num_micro_batches)
    return tuple(_steps(made, pairs=pairs))


def _steps(schedule: Schedule, *, pairs: bool) -> Iterator[Step]:
    """Rank by rank as far as each can go; a rank that waits goes on when what it waits for is there."""
    rank_of, actions, numbers = schedule.stage_ranks(), list(schedule.actions()), count()
    first = {a.stage: a for a in reversed(actions) if a.kind == FORWARD}
    last = {a.stage: a for a in actions if a.kind in (BACKWARD, WEIGHT_GRAD)}
    once = dict.fromkeys(first.values(), FIRST) | dict.fromkeys(last.values(), LAST)
    before = [schedule.previous_stage(stage) for stage in range(schedule.num_stages)]
    after = [schedule.next_stage(stage) for stage in range(schedule.num_stages)]
    left = [deque(_groups(actions, pairs=pairs)) for actions in schedule.ranks]
    made: dict[tuple[int, bool, int], int] = {}
    blocked: dict[tuple[int, bool, int], int] = {}
    ready = deque(range(schedule.pp))
    while ready:
        rank = ready.popleft()
        mine = left[rank]
        while mine:
            parts = mine[0]
            needs = [
                (stage, kind == FORWARD, i)
                for stage, kind, i, _ in parts
                if kind != WEIGHT_GRAD and (before if kind == FORWARD else after)[stage] is not None
            ]
            missing = next((need for need in needs if need not in made), None)
            if missing is not None:
                blocked[missing] = rank
                break
            mine.popleft()
            outputs = []
            for stage, kind, i, _ in parts:
                target = (after if kind == FORWARD else before)[stage]
                if kind == WEIGHT_GRAD or target is None:
                    continue
                key, to = (target, kind == FORWARD, i), rank_of[target]
                number = made[key] = next(numbers)
                boundary = -1 if to == rank else min(stage, target)
                outputs.append(Output(number, boundary, (rank, (to - rank) % schedule.pp == 1)))
                if key in blocked:
                    ready.append(blocked.pop(key))
            mark = PAIRED if len(parts) > 1 else ""
            passes = tuple((mark + part.kind, part.stage, once.get(part, 0)) for part in parts)
            yield Step(rank, passes, tuple(made.pop(need) for need in needs), tuple(outputs))


def _groups(actions: Sequence[Action], *, pairs: bool) -> Iterator[tuple[Action, ...]]:
    """The passes that run at once, in order."""
    for action in actions:
        if pairs or not action.parts:
            yield action.parts or (action,)
        else:
            yield from ((part,) for part in action.parts)


def walked_bounds_s(plan: ParallelPlan, layout: Layout, passes: Passes, stack: Stack) -> Floats:
    """(P,): no step of these plans is shorter, without the host's part; `plan` is any of them, and all
    have its micro-batches.
    """
    m, columns = int(passes.num_micro_batches[0]), passes.forward_s.shape[1]
    kind, replicas, maximum = layout.kind.tolist(), passes.replicas, np.maximum
    seconds = _seconds(passes)
    gathered = _gathered_s(layout, replicas.gather_s)
    reduces_each = bool(replicas.reduce_pass_s.any())
    free, reduced = np.zeros((2, plan.pp, columns))
    streams: dict[tuple[int, bool], Floats] = {}
    there: dict[int, Floats] = {}
    steps = walk_of(plan.schedule, plan.pp, plan.vpp, m, pairs=stack.pair_overlap)
    for rank, parts, sources, outputs in steps:
        end = free[rank]
        for source in sources:
            end = maximum(end, there.pop(source))
        begun = end
        for what, stage, once in parts:
            d = kind[stage]
            end = end + seconds[what][d]
            if once == FIRST:
                end = maximum(end + replicas.first_s[d], gathered[stage])
            elif once == LAST:
                end = end + replicas.last_s[d]
                # Its pieces are reduced one after the other, none before this pass has begun.
                after = maximum(end + replicas.last_bucket_s[d], begun + replicas.reduce_s[d])
                reduced[rank] = maximum(reduced[rank] + replicas.reduce_s[d], after)
            elif reduces_each and what in REDUCED:
                # Of plans that reduce once a step this says no more than that this pass has begun.
                reduced[rank] = maximum(reduced[rank], begun) + replicas.reduce_pass_s[d]
        free[rank] = end
        for number, boundary, stream in outputs:
            if boundary < 0:
                there[number] = end
                continue
            begin = maximum(free[rank], streams[stream]) if stream in streams else free[rank]
            there[number] = streams[stream] = arrived = begin + passes.send_s[boundary]
            if not stack.pp_overlap:
                free[rank] = arrived
    return end_s(layout, passes, free, reduced, m / plan.chains)


def _seconds(passes: Passes) -> dict[str, Floats]:
    """(D, P) by kind of pass."""
    return {
        FORWARD: passes.forward_s,
        INPUT_GRAD: passes.input_grad_s,
        WEIGHT_GRAD: passes.weight_grad_s,
        BACKWARD: passes.backward_s,
        PAIRED + FORWARD: passes.paired_forward_s,
        PAIRED + INPUT_GRAD: passes.paired_input_grad_s,
        PAIRED + BACKWARD: passes.paired_backward_s,
    }


def _gathered_s(layout: Layout, gather_s: Floats) -> Floats:
    """(n, P): when what is gathered for a stage at the start of the step is there."""
    ends = np.empty((layout.kind.size, gather_s.shape[1]))
    ends[layout.own] = gather_s[layout.kind[layout.own]].cumsum(axis=1)
    return ends
