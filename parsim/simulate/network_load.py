"""NetworkLoad: what the transfers of a Program put on the links of a fabric.

A Program holds one replica of each pipeline rank, and all of them do the same at the same time. So a
transfer stands for a class of flows, one for each replica that sends (every ring of a reduction, every
pipeline's send), which start together, have the same rate, and end together: where links are not alike
the class goes at the pace of its slowest member. Its load on a link is a count of flows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

from parsim.cost.algorithms import all_reduce_s
from parsim.cost.collective import collective_s, group_over, wire_factor
from parsim.cost.stage import CostModel
from parsim.cost.step import step_cost
from parsim.plan import Job, ParallelPlan
from parsim.schedule.program import Program, Task
from parsim.simulate.fabric import Fabric, Link
from parsim.simulate.patterns import Load, Patterns
from parsim.simulate.uneven import Replica
from parsim.timeline import DP


class Carried(NamedTuple):
    """One transfer as a class of flows."""

    crossings: Mapping[int, float]
    """Kinds of links, and how many flows of the class cross one."""
    num_bytes: float
    """Of the largest flow; a smaller one counts as a part of a flow."""


class LinkKind(NamedTuple):
    """Links that the same flows cross."""

    example: Link
    """The one with the least capacity."""
    alike: int
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkLoad:
    """The transfers of a program that leave their scale-up domain."""

    program: Program
    """With the durations that its transfers have where nothing else is on their links."""
    carried: Mapping[int, Carried]
    """By the index of the task."""
    together: Mapping[int, int]
    """Copies of a transfer among replicas that differ: the task whose flows stand for all of them."""
    links: tuple[LinkKind, ...]
    """The kinds of links that anything crosses."""


def network_load_of(
    program: Program,
    job: Job,
    plan: ParallelPlan,
    costs: CostModel,
    fabric: Fabric,
    replicas: Sequence[Replica] = (),
) -> NetworkLoad:
    """What the tasks of a program send over a fabric; those that stay in a domain are left out.

    `replicas`: the groups that the program was unfolded into, where its ranks are not alike.

    Where the fabric's settings name an algorithm, gradients are summed by it instead of by what the cost
    model finds fastest.
    """
    stages = step_cost(job, plan, costs).stages
    patterns = Patterns(plan=plan, costs=costs, stages=stages, fabric=fabric)
    program = replace(
        program, tasks=tuple(_by_algorithm(task, plan.pp, patterns) for task in program.tasks)
    )
    loads: dict[_Key, Load] = {}
    keys: dict[int, _Key] = {}
    together: dict[int, int] = {}
    leaders: dict[int, int] = {}
    for index, task in enumerate(program.tasks):
        if task.num_bytes <= 0 or task.duration_s <= 0 or task.rank < 0:
            continue
        members = None
        if task.joins_replicas and len(replicas) > 1:
            # All copies wait for one task, and for nothing else.
            leader = leaders.setdefault(task.after[0], index)
            if leader != index:
                together[index] = leader
                continue
        elif replicas:
            members = replicas[task.rank // plan.pp].members
        key = _key(task)
        if key not in loads:
            loads[key] = patterns.load(_folded(task, plan.pp), members)
        if loads[key]:
            keys[index] = key
    together = {index: leader for index, leader in together.items() if leader in keys}
    return _merged(program, loads, keys, together, fabric)


def _folded(task: Task, pp: int) -> Task:
    """A task of some replica's rank as one of the pipeline rank that it is."""
    receiver = task.receiver and (task.receiver[0] % pp, task.receiver[1])
    return task._replace(rank=task.rank % pp, receiver=receiver)


def _by_algorithm(task: Task, pp: int, patterns: Patterns) -> Task:
    """A reduction of gradients with the duration that it has by the fabric's algorithm."""
    algorithm = patterns.fabric.settings["algorithm"]
    if algorithm == "auto" or task.stream != DP or task.receiver is not None or task.num_bytes <= 0:
        return task
    cluster, plan = patterns.costs.cluster, patterns.plan
    parts = [
        (part, group_over(cluster, part.axes, gpus=plan.gpus))
        for part in patterns.parts(_folded(task, pp))
    ]
    sent = sum(wire_factor(part.kind, group.size) * part.num_bytes for part, group in parts)
    usual_s = chosen_s = 0.0
    for part, group in parts:
        num_bytes = part.num_bytes * task.num_bytes / sent
        seconds = collective_s(cluster, part.kind, num_bytes, group)
        usual_s += seconds
        if part.kind == "all_reduce" and group.domains > 1:
            seconds = all_reduce_s(cluster, algorithm, num_bytes, group)
        chosen_s += seconds
    return task._replace(duration_s=task.duration_s * chosen_s / usual_s) if usual_s else task


_Key: TypeAlias = tuple[int, str, int, int, bool, float]
"""What transfers with the same load have in common: rank, stream, other rank, stage, whether parameters
are gathered, bytes."""


def _key(task: Task) -> _Key:
    there = task.receiver[0] if task.receiver is not None else -1
    if task.stream != DP:
        return task.rank, task.stream, there, -1, False, 0.0
    # Whether a tree or a ring sums them depends on their size.
    return task.rank, task.stream, there, task.stage, task.gathers, task.num_bytes


def _merged(
    program: Program,
    loads: Mapping[_Key, Load],
    keys: Mapping[int, _Key],
    together: Mapping[int, int],
    fabric: Fabric,
) -> NetworkLoad:
    """NetworkLoad over kinds of links instead of links."""
    largest = [load.largest_flow for load in loads.values()]
    flows: dict[Link, list[tuple[int, float]]] = {}
    for number, load in enumerate(loads.values()):
        for link, share in load.items():
            # Rounded, so that links whose loads were added up in another order are alike.
            flows.setdefault(link, []).append((number, round(share / largest[number], 12)))
    kinds: dict[tuple[tuple[int, float], ...], list[Link]] = {}
    for link, crossing in flows.items():
        kinds.setdefault(tuple(crossing), []).append(link)
    crossings: list[dict[int, float]] = [{} for _ in loads]
    for kind, crossing_flows in enumerate(kinds):
        for number, times in crossing_flows:
            crossings[number][kind] = times
    numbers = {key: number for number, key in enumerate(loads)}
    carried = {
        index: Carried(crossings[numbers[key]], program.tasks[index].num_bytes * largest[numbers[key]])
        for index, key in keys.items()
    }
    links = tuple(_kind(alike, fabric) for alike in kinds.values())
    return NetworkLoad(program=program, carried=carried, together=together, links=links)


def _kind(alike: Sequence[Link], fabric: Fabric) -> LinkKind:
    rates = [fabric.bytes_per_s((link,)) for link in alike]
    least = min(rates)
    return LinkKind(alike[rates.index(least)], len(alike), least)
