"""A parameter server: what its workers and servers take for a step, and what bounds their throughput.

Sources: M. Li et al., "Scaling Distributed Machine Learning with the Parameter Server", OSDI 2014; Q. Ho
et al., "More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server", NIPS 2013.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from parsim.cost.collective import NETWORK_EFFICIENCY, NETWORK_HOP_S
from parsim.cost.memory import gradient_bytes, optimizer_bytes, weight_bytes
from parsim.cost.memory_bound import memory_bound_s
from parsim.cost.stage import CostModel
from parsim.cost.step import step_cost
from parsim.errors import ParsimError
from parsim.hardware import Cluster
from parsim.model import num_parameters
from parsim.plan import Job, ParallelPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What one server holds of the model, by what a step of one worker does to it."""

    pull_bytes: float
    push_bytes: float
    add_s: float = 0.0
    """Adding one worker's gradient to a sum, where an update waits for all of them."""
    update_s: float = 0.0
    """Applying one gradient, or a sum of them, to the parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterServer:
    """Workers that pull parameters, compute and push gradients; servers that apply them.

    A worker at clock c (it has done c steps) may go on once every other has done c − `bound`: 0 is
    synchronous, infinite asynchronous, what lies between stale synchronous (Ho et al. 2013).
    """

    compute_s: tuple[float, ...]
    """Compute of a step on each worker."""
    shards: tuple[Shard, ...]
    """One a server; together they are the model."""
    worker_bytes_per_s: tuple[float, ...]
    """Of each worker's link, per direction."""
    server_bytes_per_s: float
    """The same of every server."""
    bound: float = 0.0
    latency_s: float = 0.0
    """A request and its answer, of each pull and each push."""
    jitter: float = 0.0
    """Standard deviation of the logarithm of a step's compute."""

    def __post_init__(self) -> None:
        if not self.compute_s or not self.shards:
            raise ParsimError("this takes a worker and a server", where="workers, servers", got=0)
        if len(self.worker_bytes_per_s) != len(self.compute_s):
            raise ParsimError("every worker has a link", got=len(self.worker_bytes_per_s))
        if not min(*self.worker_bytes_per_s, self.server_bytes_per_s) > 0:
            raise ParsimError("a link has a bandwidth", got=self.server_bytes_per_s)
        if not self.bound >= 0 or (math.isfinite(self.bound) and self.bound != int(self.bound)):
            raise ParsimError("a bound is a number of clocks", where="bound", got=self.bound)
        if not 0 <= self.jitter <= 1 or min(self.compute_s) < 0 or self.latency_s < 0:
            raise ParsimError("times are not negative, and jitter is a share", where="jitter")

    @property
    def is_synchronous(self) -> bool:
        """Nobody reads between two steps, so servers sum all gradients and update once."""
        return self.bound == 0


def server_limit(ps: ParameterServer) -> float:
    """Worker steps a second that the servers let through at most, with their links always full.

    Links carry both directions at once. Workers that pull and push in step use one direction at a
    time, which leaves B / (pull + push).
    """
    workers = len(ps.compute_s)
    limits = [math.inf]
    for shard in ps.shards:
        applied_s = shard.add_s + shard.update_s / workers if ps.is_synchronous else shard.update_s
        busy_s = max(shard.pull_bytes, shard.push_bytes) / ps.server_bytes_per_s
        limits += [1 / seconds for seconds in (busy_s, applied_s) if seconds]
    return min(limits)


def worker_limit(ps: ParameterServer) -> float:
    """Worker steps a second in the long run with servers that keep nobody waiting.

    The sum over workers of 1 / (compute + pull + push + update), or all at the slowest one's pace where
    they wait for it; without jitter.
    """
    pull_bytes = math.fsum(shard.pull_bytes for shard in ps.shards)
    push_bytes = math.fsum(shard.push_bytes for shard in ps.shards)
    applied_s = max(shard.update_s + shard.add_s * ps.is_synchronous for shard in ps.shards)
    steps_s = [
        compute_s + 2 * ps.latency_s + (pull_bytes + push_bytes) / bytes_per_s + applied_s
        for compute_s, bytes_per_s in zip(ps.compute_s, ps.worker_bytes_per_s, strict=True)
    ]
    if math.isfinite(ps.bound):
        return len(steps_s) / max(steps_s)
    return math.fsum(1 / step_s for step_s in steps_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Servers:
    """The servers that a job's parameters are put on."""

    shares: tuple[float, ...]
    """How much of the model each holds, in relation to each other."""
    bytes_per_s: float
    """Of a server's link, per direction."""
    memory_bytes_per_s: float | None = None
    """Of a server's memory; None for that of a node's devices."""

    def __post_init__(self) -> None:
        if not self.shares or not all(0 < share < math.inf for share in self.shares):
            raise ParsimError("every server holds a part of the model", where="shards", got=self.shares)


def parameter_server(
    job: Job,
    plan: ParallelPlan,
    costs: CostModel,
    servers: Servers,
    *,
    compute_s: tuple[float, ...],
    slow_links: tuple[float, ...],
    bound: float = 0.0,
    jitter: float = 0.0,
) -> ParameterServer:
    """Workers that each are one replica of `plan`, and servers with a part of the model each.

    Workers pull weights and push gradients as data-parallel ranks would reduce them; every device of a
    worker moves its own part, through its own network interface. `compute_s` has one entry a worker;
    `slow_links` are the factors by which a worker's transfers take longer.
    """
    cluster, stack, whole = costs.cluster, costs.stack, math.fsum(servers.shares)
    gradient, weight = gradient_bytes(job.precision, stack), weight_bytes(job.precision)

    def moved_s(num_bytes: float) -> float:
        if servers.memory_bytes_per_s is not None:
            return num_bytes / servers.memory_bytes_per_s
        return memory_bound_s(cluster, num_bytes / cluster.gpus_per_node)

    def shard(parameters: float) -> Shard:
        return Shard(
            pull_bytes=parameters * weight,
            push_bytes=parameters * gradient,
            # A sum is read and written, the gradient read; an update reads a gradient, reads and writes
            # every state, and writes the weights.
            add_s=moved_s(parameters * 3 * gradient),
            update_s=moved_s(parameters * (gradient + 2 * optimizer_bytes(job, stack) + weight)),
        )

    return ParameterServer(
        compute_s=compute_s,
        shards=tuple(shard(num_parameters(job.model) * share / whole) for share in servers.shares),
        worker_bytes_per_s=tuple(plan.tp * plan.pp * nic_bytes_per_s(cluster) / k for k in slow_links),
        server_bytes_per_s=servers.bytes_per_s,
        bound=bound,
        latency_s=2 * (cluster.inter_node.latency_s + NETWORK_HOP_S),
        jitter=jitter,
    )


def nic_bytes_per_s(cluster: Cluster) -> float:
    """What one device's network interface gives to long messages, per direction."""
    return NETWORK_EFFICIENCY * cluster.inter_node.bandwidth_bytes_per_s


def all_reduce_s(job: Job, plan: ParallelPlan, costs: CostModel, *, slow_link: float = 1.0) -> float:
    """Reduction of all gradients and update of a data-parallel plan, nothing of it beside compute."""
    by_rank = [0.0] * plan.pp
    for stage, sync in enumerate(step_cost(job, plan, costs).syncs):
        by_rank[plan.stage_rank(stage)] += slow_link * sync.reduce_s + sync.optimizer_s
    return max(by_rank)
