"""Contention: a Program replayed with its transfers as flows that share the links of a fabric.

Alone on its links a transfer takes what the Program says: its flows start with it, at no more than its
bytes over its duration. With others on a link that cannot carry them all, rates are max-min fair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import simpy

from parsim.cost.stage import CostModel
from parsim.errors import ParsimError
from parsim.plan import ASYNCHRONOUS_SCHEDULES, Job, ParallelPlan
from parsim.schedule.action import Schedule
from parsim.schedule.program import TaskTimes, timeline_of
from parsim.simulate.fabric import Fabric, describe_link
from parsim.simulate.flows import FlowNetwork
from parsim.simulate.network_load import LinkKind, NetworkLoad, network_load_of
from parsim.simulate.prediction import Prediction, prediction_of, program_of
from parsim.simulate.replay import no_garbage_collection, replayed_times
from parsim.simulate.uneven import Unevenness, replicas_of, uneven_program
from parsim.timeline import PP_STREAMS, Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkUse:
    """How full the links of one kind are over the step."""

    kind: LinkKind
    points: tuple[tuple[float, float], ...]
    """(time_s, load over capacity from then on), whenever it changes."""
    mean: float
    """Over the whole step."""

    @property
    def name(self) -> str:
        """For reading: one of the links, and how many are alike."""
        more = f" and {self.kind.alike - 1} alike" if self.kind.alike > 1 else ""
        return describe_link(self.kind.example) + more


@dataclass(frozen=True, slots=True, kw_only=True)
class Contention:
    """What sharing the fabric's links does to a step."""

    fabric: Fabric
    times: TaskTimes
    alone_s: float
    """The step, had every transfer its links for itself."""
    step_s: float
    contended_s: Mapping[str, float]
    """By kind of communication: what its transfers over the network take beyond their time alone, mean
    over pipeline ranks; not all of it makes the step longer."""
    links: tuple[LinkUse, ...]
    """The busiest first."""

    def to_data(self, *, links: int = 5) -> dict[str, Any]:
        """For the JSON item, with so many of the busiest kinds of links."""
        graph = self.fabric.graph
        kinds: dict[str, int] = {}
        for kind, _ in graph.nodes:
            kinds[kind] = kinds.get(kind, 0) + 1
        return {
            "name": self.fabric.name,
            "settings": dict(self.fabric.settings),
            "nodes": kinds,
            "links": graph.number_of_edges(),
            "step_time_alone_s": self.alone_s,
            "slowdown": self.step_s / self.alone_s if self.alone_s else 1.0,
            "contended_s": dict(self.contended_s),
            "busiest_links": [
                {
                    "link": describe_link(use.kind.example),
                    "alike": use.kind.alike,
                    "bytes_per_s": use.kind.bytes_per_s,
                    "mean_utilization": use.mean,
                    "peak_utilization": max(load for _, load in use.points),
                }
                for use in self.links[:links]
            ],
        }


def predict_over(
    fabric: Fabric,
    job: Job,
    plan: ParallelPlan,
    costs: CostModel,
    schedule: Schedule | None = None,
    *,
    uneven: Unevenness | None = None,
) -> tuple[Prediction, Timeline, Contention]:
    """Simulate one step of a legal plan whose transfers share the links of a fabric.

    Raises ParsimError for schedules without a flush, of which no single step can be replayed.
    """
    if plan.schedule in ASYNCHRONOUS_SCHEDULES:
        raise ParsimError(
            "links are shared within steps that end in a flush", where="schedule", got=plan.schedule
        )
    program, memory = program_of(job, plan, costs, schedule)
    with no_garbage_collection():
        replicas = () if uneven is None else replicas_of(plan, uneven)
        if uneven is not None:
            program = uneven_program(program, plan, uneven)
        sent = network_load_of(program, job, plan, costs, fabric, replicas)
        contention = replay_over(sent, fabric)
        timeline = timeline_of(sent.program, contention.times)
    return prediction_of(job, plan, costs, timeline, memory), timeline, contention


def replay_over(sent: NetworkLoad, fabric: Fabric) -> Contention:
    """Replay a program whose transfers share the links of a fabric."""
    tasks = sent.program.tasks
    env = simpy.Environment()
    capacities = {kind: link.bytes_per_s for kind, link in enumerate(sent.links)}
    network = FlowNetwork(env, capacities, record=True)
    begin: dict[int, Callable[[], simpy.Event]] = {
        index: partial(
            network.transfer,
            way.crossings,
            way.num_bytes,
            cap_bytes_per_s=way.num_bytes / tasks[index].duration_s,
        )
        for index, way in sent.carried.items()
    }
    for leader in dict.fromkeys(sent.together.values()):
        begin[leader] = _Together(env, begin[leader]).begin
    begin |= {index: begin[leader] for index, leader in sent.together.items()}
    times = replayed_times(sent.program, begin, env)
    step_s = max(times.end_s, default=0.0)
    return Contention(
        fabric=fabric,
        times=times,
        alone_s=max(replayed_times(sent.program).end_s, default=0.0),
        step_s=step_s,
        contended_s=_contended_s(sent, times),
        links=_link_uses(sent, network, step_s),
    )


@dataclass(slots=True)
class _Together:
    """One transfer that several tasks stand for: they start at one instant, and end with it."""

    env: simpy.Environment
    transfer: Callable[[], simpy.Event]
    ends: list[simpy.Event] = field(default_factory=list)

    def begin(self) -> simpy.Event:
        """An event for one more of the tasks; the first of them starts the transfer."""
        if not self.ends:
            self.transfer().callbacks.append(self._end)
        self.ends.append(self.env.event())
        return self.ends[-1]

    def _end(self, _: simpy.Event) -> None:
        for end in self.ends:
            end.succeed()


def _contended_s(sent: NetworkLoad, times: TaskTimes) -> dict[str, float]:
    tasks, copies = sent.program.tasks, sent.program.copies
    total: dict[str, float] = {}
    for index in (*sent.carried, *sent.together):
        kind = "pp" if tasks[index].stream in PP_STREAMS else tasks[index].stream
        more_s = times.end_s[index] - times.start_s[index] - tasks[index].duration_s
        count = copies[tasks[index].rank] if copies else 1
        total[kind] = total.get(kind, 0.0) + count * more_s
    # What is left of the rounding of sums of times is no contention.
    ranks = sum(copies) or len(sent.program.ranks)
    return {kind: 0.0 if more_s < 1e-9 else more_s / ranks for kind, more_s in sorted(total.items())}


def _link_uses(sent: NetworkLoad, network: FlowNetwork, step_s: float) -> tuple[LinkUse, ...]:
    uses = []
    for number, kind in enumerate(sent.links):
        points = tuple((at, load / kind.bytes_per_s) for at, load in network.loads.get(number, ()))
        if not points:
            continue
        busy = sum(load * (until - at) for (at, load), (until, _) in pairwise(points))
        uses.append(LinkUse(kind=kind, points=points, mean=busy / step_s))
    return tuple(sorted(uses, key=lambda use: -use.mean))
