"""Unevenness: stragglers and jitter, and the replicas of a pipeline that are no longer alike.

A Program holds one replica of each pipeline rank. Where ranks differ, each group of replicas that are
still alike gets tasks of its own; what runs among all replicas starts when the last of them is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

from parsim.errors import ParsimError
from parsim.plan import Coordinate, ParallelPlan
from parsim.schedule.program import Program, Task
from parsim.timeline import COMPUTE, EP, PP_STREAMS


class Straggler(NamedTuple):
    """A device that is slower than the others."""

    rank: int
    """Global rank."""
    slow: float = 1.0
    """Time of its compute over a healthy device's."""
    link: float = 1.0
    """Time of its transfers to other stages and replicas over a healthy device's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unevenness:
    """What makes the ranks of a step differ."""

    stragglers: tuple[Straggler, ...] = ()
    jitter: float = 0.0
    """Standard deviation of the logarithm of a device's compute time, drawn for every action."""
    seed: int = 0

    @property
    def is_even(self) -> bool:
        return not self.stragglers and self.jitter == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """Pipelines that are alike: those of some data-parallel indices."""

    members: tuple[int, ...]
    """Data-parallel indices, in order."""
    slow: tuple[float, ...]
    """Time of compute over a healthy device's, by pipeline rank."""
    link: tuple[float, ...]
    """The same of transfers to other stages and replicas."""
    exchange: tuple[float, ...]
    """The same of exchanges with experts, which may lie in other replicas."""


def check_unevenness(uneven: Unevenness, plan: ParallelPlan) -> None:
    """Raises ParsimError for a rank that the plan does not have, or a factor that makes no sense."""
    for straggler in uneven.stragglers:
        if not 0 <= straggler.rank < plan.gpus:
            raise ParsimError(
                "there is no such rank",
                where="--straggler",
                got=straggler.rank,
                expected=f"0 to {plan.gpus - 1}",
            )
        for key in ("slow", "link"):
            if not 1 <= getattr(straggler, key) <= 1000:
                raise ParsimError(
                    "a straggler takes longer than the others",
                    where=f"--straggler {key}",
                    got=getattr(straggler, key),
                    expected="a factor from 1 to 1000",
                )
    if not 0 <= uneven.jitter <= 1:
        raise ParsimError(
            "jitter is a relative standard deviation",
            where="--jitter",
            got=uneven.jitter,
            expected="0 to 1, such as 0.02",
        )


def replicas_of(plan: ParallelPlan, uneven: Unevenness) -> tuple[Replica, ...]:
    """The pipelines of a plan, those that are alike together, in order of their first member.

    The tp·cp devices of a stage in one pipeline wait for each other in every layer, and with experts so
    do all that exchange tokens: the slowest sets the pace. With jitter no two pipelines are alike.
    """
    slow = [[1.0] * plan.pp for _ in range(plan.dp)]
    link = [[1.0] * plan.pp for _ in range(plan.dp)]
    exchange = [[1.0] * plan.pp for _ in range(plan.dp)]
    for straggler in uneven.stragglers:
        at = plan.coordinate(straggler.rank)
        for dp_i in _waiting_with(plan, at):
            slow[dp_i][at.pp] = max(slow[dp_i][at.pp], straggler.slow)
            exchange[dp_i][at.pp] = max(exchange[dp_i][at.pp], straggler.link)
        link[at.dp][at.pp] = max(link[at.dp][at.pp], straggler.link)
    alike: dict[tuple[object, ...], list[int]] = {}
    for dp_i in range(plan.dp):
        factors = tuple(map(tuple, (slow[dp_i], link[dp_i], exchange[dp_i])))
        key = (*factors, dp_i if uneven.jitter else 0)
        alike.setdefault(key, []).append(dp_i)
    return tuple(
        Replica(
            members=tuple(members),
            slow=tuple(slow[members[0]]),
            link=tuple(link[members[0]]),
            exchange=tuple(exchange[members[0]]),
        )
        for members in alike.values()
    )


def _waiting_with(plan: ParallelPlan, at: Coordinate) -> Sequence[int]:
    """Data-parallel indices of the pipelines whose layers wait for this device's."""
    if plan.ep == 1:
        return (at.dp,)
    places = product(range(plan.dp), range(plan.cp), range(plan.tp))
    stage = sorted((Coordinate(at.pp, *place) for place in places), key=plan.rank)
    first = stage.index(at) // plan.expert_ranks * plan.expert_ranks
    return sorted({other.dp for other in stage[first : first + plan.expert_ranks]})


def uneven_program(program: Program, plan: ParallelPlan, uneven: Unevenness) -> Program:
    """The Program of a step whose ranks differ, from that of one whose ranks are alike."""
    program = unfolded_program(program, replicas_of(plan, uneven))
    return _jittered(program, plan, uneven) if uneven.jitter else program


def unfolded_program(program: Program, replicas: Sequence[Replica]) -> Program:
    """The Program with a copy of its tasks for each group of replicas.

    Rank k·pp + p of the result is pipeline rank p of the k-th group. Tasks that join replicas wait for
    what all their copies wait for, those before them on their streams included.
    """
    pp = len(program.ranks)
    link_of_all = [max(replica.link[p] for replica in replicas) for p in range(pp)]
    tasks: list[Task] = []
    first: list[int] = []
    """Index of the first copy of each task of `program`."""
    latest: dict[tuple[int, str], int] = {}
    """The first copy of the last task of each stream of `program`."""
    for task in program.tasks:
        rank, stream, name, kind, duration_s, after, stage, i, receiver, *rest = task
        joins = task.joins_replicas and len(replicas) > 1
        if joins:
            before = [*after, *((latest[rank, stream],) if (rank, stream) in latest else ())]
            needed = {first[j] + k for j in before for k in range(len(replicas))}
            # Every join has a "stream" of its own, for they wait for nothing but `after`.
            join = Task(-1 - len(tasks), "", "replicas", "join", 0.0, tuple(sorted(needed)))
            tasks.append(join)
        latest[rank, stream] = len(first)
        first.append(len(tasks))
        for k, replica in enumerate(replicas):
            copy_after = (len(tasks) - 1 - k,) if joins else tuple(first[j] + k for j in after)
            copy_s = duration_s * _factor(task, replica, link_of_all)
            copy_receiver = receiver and (k * pp + receiver[0], receiver[1])
            copy = (k * pp + rank, stream, name, kind, copy_s, copy_after, stage, i, copy_receiver)
            tasks.append(Task._make((*copy, *rest)))
    return replace(
        program,
        tasks=tuple(tasks),
        static_bytes=program.static_bytes * len(replicas),
        rank_names=tuple(_name(replica, p) for replica in replicas for p in range(pp)),
        copies=tuple(len(replica.members) for replica in replicas for _ in range(pp)),
    )


def _factor(task: Task, replica: Replica, link_of_all: Sequence[float]) -> float:
    """Time of a task in this replica over that in a healthy one."""
    if task.stream == COMPUTE:
        return replica.slow[task.rank]
    if task.stream == EP:
        return replica.exchange[task.rank]
    if task.kind == "dp" and task.joins_replicas:
        return link_of_all[task.rank]
    if task.receiver is not None and task.stream in (*PP_STREAMS, "dp"):
        return max(replica.link[task.rank], replica.link[task.receiver[0]])
    return 1.0


def _name(replica: Replica, pp_i: int) -> str:
    alike = len(replica.members)
    return f"×{alike} pp {pp_i}" if alike > 1 else f"dp {replica.members[0]} pp {pp_i}"


def _jittered(program: Program, plan: ParallelPlan, uneven: Unevenness) -> Program:
    """Every compute task drawn from a log-normal distribution around its time.

    The tp·cp devices of a rank draw apart and wait for each other: their slowest is the n-th root of a
    uniform number, through the quantile function.
    """
    import numpy as np
    from scipy.special import ndtri

    computes = [index for index, task in enumerate(program.tasks) if task.stream == COMPUTE]
    uniform = np.random.default_rng(uneven.seed).random(len(computes))
    slowest = ndtri(uniform ** (1.0 / (plan.tp * plan.cp)))
    factors = np.exp(uneven.jitter * slowest - uneven.jitter**2 / 2)
    tasks = list(program.tasks)
    for index, factor in zip(computes, factors.tolist(), strict=True):
        task = tasks[index]
        tasks[index] = task._replace(duration_s=task.duration_s * factor)
    return replace(program, tasks=tuple(tasks))
