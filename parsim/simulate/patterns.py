"""Patterns: which links a transfer of a Program crosses, all replicas of its pipeline rank counted.

A group's ranks that share a scale-up domain cut its data up among their network interfaces: with `local`
of them a domain, as many rings (or trees) run side by side, each over one rank a domain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import NamedTuple

from parsim.cost.algorithms import all_reduce_algorithm
from parsim.cost.collective import Group, group_over, network_share, wire_factor
from parsim.cost.stage import CostModel, StageCost
from parsim.cost.sync import replica_axes, shard_ranks
from parsim.errors import ParsimError
from parsim.mesh import Axis, group_size, mesh_axes, part_of
from parsim.plan import ParallelPlan, parse_compression
from parsim.schedule.program import Task
from parsim.simulate.fabric import Fabric, Link
from parsim.simulate.trees import double_tree
from parsim.timeline import CP, DP, EP, TP

_EXCHANGED = ("int8", "topk")
"""Compressions whose values cannot be added up on the way."""


class Load(Counter[Link]):
    """Bytes on each link for every byte that a device sends in a transfer."""

    largest_flow: float = 0.0
    """Of these, what the largest of its flows carries: links share by flows, however many a link has."""

    def add(self, links: Iterable[Link], share: float) -> None:
        """One more flow."""
        self.largest_flow = max(self.largest_flow, share)
        for link in links:
            self[link] += share  # type: ignore[assignment]


class SyncPart(NamedTuple):
    """One collective that reduces gradients or gathers parameters."""

    kind: str
    num_bytes: float
    """Of the full buffer."""
    axes: tuple[Axis, ...]
    """Of the group it runs in."""


@dataclass(slots=True)
class Patterns:
    """Loads of the transfers of a plan on a fabric."""

    plan: ParallelPlan
    costs: CostModel
    stages: tuple[StageCost, ...]
    fabric: Fabric
    _replicas: tuple[Axis, ...] = field(init=False)

    def __post_init__(self) -> None:
        self._replicas = mesh_axes(self.plan, "tp", "cp", "dp")

    def load(self, task: Task, members: Sequence[int] | None = None) -> Load:
        """What a transfer puts on links between domains; empty where it stays inside them.

        `members`: the data-parallel indices of the replicas that it is a transfer of, where not of all.
        """
        offsets = self._offsets_of(members)
        if task.receiver is not None:
            both_ways = task.stream == DP  # gradients of a tied embedding, summed by two
            return self._sends(task.rank, task.receiver[0], offsets, both_ways=both_ways)
        if task.stream == EP:
            return self._exchanges(task.rank, offsets)
        if task.stream in (TP, CP):
            axes = mesh_axes(self.plan, task.stream)
            return self._summed((SyncPart("all_gather", task.num_bytes, axes),), task, offsets)
        return self._summed(self.parts(task), task, offsets)

    def _offsets_of(self, members: Sequence[int] | None) -> list[int]:
        """The ranks of some pipelines' first stage."""
        if members is None:
            return _offsets(self._replicas)
        pipeline = _offsets(mesh_axes(self.plan, "tp", "cp"))
        return sorted(dp_i * self.plan.strides.dp + offset for dp_i in members for offset in pipeline)

    def parts(self, task: Task) -> tuple[SyncPart, ...]:
        """The collectives of a data-parallel task, with bytes that are right among each other.

        With ZeRO gradients are summed in each shard group first, then between those. Compressed ones
        that no all-reduce can sum go round in a ring, as an all-gather.
        """
        stages = [task.stage] if task.stage >= 0 else self.plan.rank_stages()[task.rank]
        parts = []
        for axes, parameters in zip(
            replica_axes(self.plan),
            (
                sum(self.stages[s].dense_parameters for s in stages),
                sum(self.stages[s].expert_parameters for s in stages),
            ),
            strict=True,
        ):
            ranks, size = group_size(axes), shard_ranks(axes, self.plan)
            shards, between = part_of(axes, size=size), part_of(axes, size=ranks // size, skip=size)
            if task.gathers:
                parts.append(SyncPart("all_gather", parameters, shards))
            elif self.plan.zero == 0:
                kind = parse_compression(self.plan.compression).kind
                parts.append(
                    SyncPart("all_gather" if kind in _EXCHANGED else "all_reduce", parameters, axes)
                )
            else:
                parts.append(SyncPart("reduce_scatter", parameters, shards))
                parts.append(SyncPart("all_reduce", parameters / size, between))
        return tuple(parts)

    def _sends(self, source: int, target: int, offsets: list[int], *, both_ways: bool) -> Load:
        """Every replica of one pipeline rank sends to its like of another."""
        load = Load()
        stride = self.plan.strides.pp
        for offset in offsets:
            ends = offset + source * stride, offset + target * stride
            for a, b in (ends, ends[::-1]) if both_ways else (ends,):
                if not self.fabric.cluster.same_domain(a, b) or self.costs.stack.pp_over_network:
                    load.add(self.fabric.route(a, b, over_network=True), 1.0)
        return load

    def _exchanges(self, rank: int, offsets: list[int]) -> Load:
        """Tokens to and from experts, evenly among the group's ranks.

        Where one copy a domain travels, it goes to the device in the sender's own place there.
        """
        plan, moe = self.plan, self.costs.model.moe
        axes = part_of(self._replicas, size=plan.ep, skip=plan.expert_tp)
        group = group_over(self.fabric.cluster, axes, gpus=plan.gpus)
        once = self.costs.stack.moe_dispatch == "deduplicated" and moe is not None
        share = network_share(group, moe.top_k if once and moe is not None else 0)
        load = Load()
        own = {rank * plan.strides.pp + offset for offset in offsets}
        for domains in self._groups(rank, axes, offsets):
            for here in domains:
                for place, source in enumerate(here):
                    if source not in own:  # of a replica that sends on its own account
                        continue
                    others = (there for there in domains if there is not here)
                    if once:
                        targets = [there[place % len(there)] for there in others]
                    else:
                        targets = [target for there in others for target in there]
                    for target in targets:
                        load.add(self.fabric.route(source, target), share / len(targets))
        return load

    def _summed(self, parts: Sequence[SyncPart], task: Task, offsets: list[int]) -> Load:
        """Loads of several collectives that one task stands for, by their shares of its bytes.

        They run one after the other; here each has its share of the links all the time.
        """
        groups = [group_over(self.fabric.cluster, p.axes, gpus=self.plan.gpus) for p in parts]
        sent = [
            wire_factor(part.kind, group.size) * part.num_bytes
            for part, group in zip(parts, groups, strict=True)
        ]
        load = Load()
        for part, group, wire_bytes in zip(parts, groups, sent, strict=True):
            if group.domains == 1 or not wire_bytes:
                continue
            share = wire_bytes / sum(sent)
            algorithm = "ring"
            if part.kind == "all_reduce":
                buffer_bytes = share * task.num_bytes / wire_factor(part.kind, group.size)
                algorithm = self.algorithm(buffer_bytes, group)
            for domains in self._groups(task.rank, part.axes, offsets):
                local = min(len(ranks) for ranks in domains)
                for rail in zip(*(ranks[:local] for ranks in domains), strict=True):
                    self._add_rail(load, algorithm, rail, share / local, group)
        return load

    def algorithm(self, num_bytes: float, group: Group) -> str:
        """How a buffer is summed over a group that several domains share."""
        chosen: str = self.fabric.settings["algorithm"]
        if chosen != "auto":
            return chosen
        return all_reduce_algorithm(self.fabric.cluster, num_bytes, group)

    def _add_rail(
        self, load: Load, algorithm: str, rail: Sequence[int], share: float, group: Group
    ) -> None:
        """Add what the ranks of one rail, one a domain, send each other; `share` goes round a ring."""
        if algorithm == "ring":
            for a, b in pairwise((*rail, rail[0])):
                load.add(self.fabric.route(a, b), share)
            return
        whole = share / wire_factor("all_reduce", group.size)
        if algorithm == "hierarchical":
            between = whole * wire_factor("all_reduce", len(rail))
            self._add_rail(load, "ring", rail, between, group)
        elif algorithm == "tree":
            for parents in double_tree(len(rail)):
                for child, parent in enumerate(parents):
                    if parent >= 0:
                        load.add(self.fabric.route(rail[child], rail[parent]), whole / 2)
                        load.add(self.fabric.route(rail[parent], rail[child]), whole / 2)
        else:
            for low, high in summing_tree(self.fabric, rail):
                load.add(((low, high), (high, low)), whole)

    def _groups(
        self, rank: int, axes: tuple[Axis, ...], offsets: list[int]
    ) -> Iterator[list[list[int]]]:
        """The ranks of every group over `axes` with some of a pipeline rank's `offsets`, by domain."""
        own, seen, wanted = _offsets(axes), set(), set(offsets)
        first = rank * self.plan.strides.pp
        for base in _offsets(self._replicas):
            if base in seen:
                continue
            members = [base + offset for offset in own]
            seen.update(members)
            if wanted.isdisjoint(members):
                continue
            domains: dict[int, list[int]] = {}
            for member in members:
                place = (first + member) // self.fabric.cluster.scale_up_domain
                domains.setdefault(place, []).append(first + member)
            yield list(domains.values())


def summing_tree(fabric: Fabric, gpus: Sequence[int]) -> list[Link]:
    """Links up from devices to the lowest switch above all of them, each once.

    Raises ParsimError where the fabric has no switches over its devices.
    """
    if fabric.rise is None:
        raise ParsimError(
            "this fabric has no switches that could sum",
            where="--fabric algorithm",
            got=f"in-switch on {fabric.name}",
            hint="rail, fat-tree and switch do",
        )
    ways = [fabric.rise(gpu, gpus[0]) for gpu in gpus]
    height = next(i for i in range(len(ways[0])) if len({way[i] for way in ways}) == 1)
    return list(dict.fromkeys(link for way in ways for link in pairwise(way[: height + 1])))


def _offsets(axes: tuple[Axis, ...]) -> list[int]:
    """Ranks of a group relative to its first, in order."""
    steps = (range(0, axis.size * axis.stride, axis.stride) for axis in axes)
    return sorted(sum(at) for at in product(*steps))
