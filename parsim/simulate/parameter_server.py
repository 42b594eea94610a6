"""Workers and parameter servers, by discrete-event simulation.

A worker waits until its clock allows a step, pulls the parameters of all servers at once, computes, and
pushes its gradients to all servers at once; a server applies what has arrived in order of arrival.
Transfers are flows that share the links of workers and servers max-min fairly, so that many workers at
one server slow each other down (incast).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import simpy

from parsim.cost.parameter_server import ParameterServer, Shard
from parsim.cost.stage import CostModel
from parsim.plan import Job, ParallelPlan
from parsim.schedule.action import Schedule
from parsim.simulate.flows import FlowNetwork
from parsim.simulate.prediction import predict
from parsim.simulate.uneven import Straggler, Unevenness


class WorkerStep(NamedTuple):
    """One step of one worker; each time is when the part before it was over."""

    worker: int
    clock: int
    """Steps that the worker had done before."""
    ready_s: float
    allowed_s: float
    """The clocks of the others let it go on."""
    pulled_s: float
    computed_s: float
    applied_s: float
    """All servers have its gradients."""
    staleness: tuple[int, ...]
    """Updates that each class of alike servers applied since the worker pulled, before its own."""
    lead: int
    """Clocks that the worker was ahead of the slowest, once it was done."""


@dataclass(frozen=True, slots=True)
class Staleness:
    """How many updates old gradients were, one counted at every server that applied it."""

    histogram: dict[int, int]

    @property
    def mean(self) -> float:
        """0 where no gradient was applied."""
        total = sum(self.histogram.values())
        return sum(s * count for s, count in self.histogram.items()) / total if total else 0.0

    def to_data(self) -> dict[str, Any]:
        """For JSON."""
        histogram = {str(staleness): count for staleness, count in self.histogram.items()}
        return {"mean": self.mean, "max": max(self.histogram, default=0), "histogram": histogram}


@dataclass(frozen=True, slots=True, kw_only=True)
class PsRun:
    """A simulated run of workers and servers."""

    ps: ParameterServer
    steps: tuple[WorkerStep, ...]
    """In order of end."""

    @property
    def steps_per_s(self) -> float:
        """Worker steps a second: for each worker those it has done until it may begin the next."""
        return math.fsum((last.clock + 1) / self._free_s(last) for last in self._last_steps())

    def _last_steps(self) -> list[WorkerStep]:
        return list({step.worker: step for step in self.steps}.values())

    def _free_s(self, last: WorkerStep) -> float:
        """When the clocks of the others let a worker go on after its last step, or the run ended."""
        needed = last.clock + 1 - self.ps.bound
        if needed <= 0:
            return last.applied_s
        ends_s = [step.applied_s for step in self.steps if step.clock == needed - 1]
        if len(ends_s) < len(self.ps.compute_s):
            return self.steps[-1].applied_s
        return max(last.applied_s, *ends_s)

    def staleness(self, worker: int | None = None) -> Staleness:
        """How old gradients were when they were applied: those of a worker, or of all."""
        alike = tuple(server_classes(self.ps).values())
        counts: Counter[int] = Counter()
        for step in self.steps:
            if worker is None or worker == step.worker:
                for staleness, servers in zip(step.staleness, alike, strict=True):
                    counts[staleness] += servers
        return Staleness(dict(sorted(counts.items())))

    def worker_time(self) -> dict[str, float]:
        """Shares of the workers' time: computing, communicating (servers' work included), waiting.

        Steps that the end of the run cut off are left out, the waits before them are not.
        """
        last_waits_s = [self._free_s(last) - last.applied_s for last in self._last_steps()]
        computing = math.fsum(step.computed_s - step.pulled_s for step in self.steps)
        waiting = math.fsum(step.allowed_s - step.ready_s for step in self.steps)
        total = math.fsum(step.applied_s - step.ready_s for step in self.steps)
        waiting, total = waiting + math.fsum(last_waits_s), total + math.fsum(last_waits_s)
        communicating = max(0.0, total - computing - waiting)
        parts = {"computing": computing, "communicating": communicating, "waiting": waiting}
        return {key: seconds / total for key, seconds in parts.items()}

    def link_utilisation(self) -> dict[str, float]:
        """Mean use of the busiest server's link and of all workers' links, by direction."""
        pulls = [shard.pull_bytes for shard in self.ps.shards]
        pushes = [shard.push_bytes for shard in self.ps.shards]
        by_server = self.steps_per_s / self.ps.server_bytes_per_s
        by_worker = self.steps_per_s / math.fsum(self.ps.worker_bytes_per_s)
        return {
            "server_send": by_server * max(pulls),
            "server_receive": by_server * max(pushes),
            "worker_send": by_worker * math.fsum(pushes),
            "worker_receive": by_worker * math.fsum(pulls),
        }


def server_classes(ps: ParameterServer) -> dict[Shard, int]:
    """Servers whose shards are alike, and how many: they do the same at the same time."""
    return dict(Counter(ps.shards))


@dataclass(slots=True)
class _Server:
    """One of a class of alike servers."""

    name: int
    shard: Shard
    alike: int
    queue: simpy.Resource
    version: int = 0
    """Updates applied so far."""
    added: int = 0
    """Gradients summed since the last update, in synchronous mode."""


@dataclass(slots=True)
class _Run:
    """What the workers of a run share."""

    env: simpy.Environment
    ps: ParameterServer
    network: FlowNetwork
    servers: list[_Server]
    clocks: list[int]
    left: int
    """Worker steps until the run ends."""
    done: simpy.Event
    gates: dict[float, simpy.Event] = field(default_factory=dict)
    """Who waits until all clocks have reached some value, by that value."""
    steps: list[WorkerStep] = field(default_factory=list)

    def gate(self, clock: int) -> simpy.Event | None:
        """What a worker at this clock waits for, or None."""
        needed = clock - self.ps.bound
        if min(self.clocks) >= needed:
            return None
        return self.gates.setdefault(needed, self.env.event())

    def commit(self, step: WorkerStep) -> None:
        """A worker has done a step."""
        self.clocks[step.worker] += 1
        slowest = min(self.clocks)
        self.steps.append(step._replace(lead=self.clocks[step.worker] - slowest))
        for needed in [needed for needed in self.gates if needed <= slowest]:
            self.gates.pop(needed).succeed()
        self.left -= 1
        if self.left == 0:
            self.done.succeed()


def simulate_parameter_server(ps: ParameterServer, *, steps: int, seed: int = 0) -> PsRun:
    """A run of `steps` for each worker, on average: fast ones do more where nothing holds them."""
    env = simpy.Environment()
    servers = [
        _Server(k, shard, alike, simpy.Resource(env))
        for k, (shard, alike) in enumerate(server_classes(ps).items())
    ]
    capacities: dict[tuple[str, int], float] = {}
    for way in ("up", "down"):
        capacities |= {(f"worker {way}", i): rate for i, rate in enumerate(ps.worker_bytes_per_s)}
        capacities |= {(f"server {way}", server.name): ps.server_bytes_per_s for server in servers}
    run = _Run(
        env=env,
        ps=ps,
        network=FlowNetwork(env, capacities),
        servers=servers,
        clocks=[0] * len(ps.compute_s),
        left=steps * len(ps.compute_s),
        done=env.event(),
    )
    for worker in range(len(ps.compute_s)):
        env.process(_worker(run, worker, compute_times(ps, worker, seed)))
    env.run(until=run.done)
    return PsRun(ps=ps, steps=tuple(run.steps))


def worker_compute_s(
    job: Job,
    plan: ParallelPlan,
    costs: CostModel,
    schedule: Schedule | None = None,
    *,
    stragglers: Sequence[Straggler] = (),
    costs_by_rank: Sequence[CostModel] = (),
) -> tuple[float, ...]:
    """What each data-parallel replica of a plan takes for its gradients, by the replay of it alone.

    A worker's devices lie next to each other, so stages may be nearer than in the whole plan.
    """
    alone = replace(plan, dp=1)
    own_job = replace(job, global_batch=job.global_batch // plan.dp)
    known: dict[tuple[Straggler, ...], float] = {}

    def gradients_s(own: tuple[Straggler, ...]) -> float:
        uneven = Unevenness(stragglers=own) if own else None
        _, timeline = predict(
            own_job, alone, costs, schedule, uneven=uneven, costs_by_rank=costs_by_rank
        )
        spans = [span.end_s for span in timeline.spans if span.kind not in ("optimizer", "host")]
        return max(spans) + costs.stack.step_overhead_s

    by_worker: list[list[Straggler]] = [[] for _ in range(plan.dp)]
    for straggler in stragglers:
        at = plan.coordinate(straggler.rank)
        by_worker[at.dp].append(straggler._replace(rank=alone.rank(at._replace(dp=0))))
    for own in set(map(tuple, by_worker)):
        known[own] = gradients_s(own)
    return tuple(known[tuple(own)] for own in by_worker)


def compute_times(ps: ParameterServer, worker: int, seed: int) -> Iterator[float]:
    """Compute of one step of a worker after the other, drawn log-normally around its mean."""
    rng = np.random.default_rng([seed, worker])
    while True:
        factor = math.exp(ps.jitter * rng.standard_normal() - ps.jitter**2 / 2) if ps.jitter else 1.0
        yield ps.compute_s[worker] * factor


def all_reduce_steps_per_s(ps: ParameterServer, reduce_s: float, *, steps: int, seed: int = 0) -> float:
    """Worker steps a second of the same workers with all-reduces: each waits for the slowest."""
    workers = range(len(ps.compute_s))
    times = zip(*(islice(compute_times(ps, i, seed), steps) for i in workers), strict=True)
    return steps * len(workers) / math.fsum(max(step) + reduce_s for step in times)


def _worker(run: _Run, worker: int, compute_s: Iterator[float]) -> Generator[simpy.Event, None, None]:
    env, ps = run.env, run.ps
    for clock in count():
        ready_s = env.now
        gate = run.gate(clock)
        if gate is not None:
            yield gate
        allowed_s = env.now
        versions = [server.version for server in run.servers]
        yield env.all_of(
            [
                run.network.transfer(
                    {("server up", server.name): 1, ("worker down", worker): server.alike},
                    server.shard.pull_bytes,
                    ps.latency_s,
                )
                for server in run.servers
            ]
        )
        pulled_s = env.now
        yield env.timeout(next(compute_s))
        computed_s = env.now
        pushes = [
            env.process(_push(run, worker, server, version))
            for server, version in zip(run.servers, versions, strict=True)
        ]
        yield env.all_of(pushes)
        staleness = tuple(push.value for push in pushes)
        run.commit(
            WorkerStep(
                worker, clock, ready_s, allowed_s, pulled_s, computed_s, env.now, staleness, lead=0
            )
        )


def _push(run: _Run, worker: int, server: _Server, version: int) -> Generator[simpy.Event, None, int]:
    """A gradient on its way into one server; its value is the staleness with which it was applied."""
    yield run.network.transfer(
        {("worker up", worker): server.alike, ("server down", server.name): 1},
        server.shard.push_bytes,
        run.ps.latency_s,
    )
    with server.queue.request() as turn:
        yield turn
        staleness = server.version - version
        if run.ps.is_synchronous:
            yield run.env.timeout(server.shard.add_s)
            server.added += 1
            if server.added < len(run.clocks):
                return staleness
            server.added = 0
        yield run.env.timeout(server.shard.update_s)
        server.version += 1
    return staleness
