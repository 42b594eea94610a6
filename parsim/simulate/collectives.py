"""Collectives over a fabric: their messages as flows that share its links.

Between domains a message takes the latency of its route and a hop of the host's proxy, then its bytes at
what the links leave it. Inside a domain the library's own protocol is what the cost model knows: there a
message of a ring or an exchange takes an equal share of what the fitted collective takes as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import simpy

from parsim.cost.algorithms import ALGORITHMS, double_tree_s, pipeline_s, rounds_s
from parsim.cost.collective import KINDS, NETWORK_HOP_S, Group, collective_fit, collective_s
from parsim.errors import ParsimError
from parsim.simulate.fabric import Fabric, Link, Node
from parsim.simulate.flows import FlowNetwork
from parsim.simulate.messages import (
    Between,
    Message,
    chain,
    double_binary_tree,
    exchange,
    ring_between,
    rings,
    tree,
    two_levels,
)
from parsim.simulate.patterns import summing_tree

MAX_MESSAGES = 200_000
"""Of one collective; more take minutes."""
ALGORITHMS_OF: Mapping[str, tuple[str, ...]] = {
    "all_reduce": ALGORITHMS,
    "all_gather": ("ring",),
    "reduce_scatter": ("ring",),
    "all_to_all": ("pairwise",),
    "broadcast": ("chain",),
}
"""Algorithms by the kind of collective."""
_INSIDE = ("reduce_scatter", "all_gather")
"""What a hierarchical all-reduce does inside domains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """What is to be done, among which devices."""

    kind: str
    algorithm: str
    num_bytes: float
    """Of the full buffer, as nccl-tests counts."""
    gpus: tuple[int, ...]
    chunks: int = 64
    """Pieces that a tree, a chain and switches pass on one behind the other."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.algorithm not in ALGORITHMS_OF[self.kind]:
            known = ALGORITHMS_OF.get(self.kind, KINDS)
            raise ParsimError(
                "no such algorithm for this collective",
                where=self.kind,
                got=self.algorithm,
                expected=", ".join(known),
            )
        if len(set(self.gpus)) < max(2, len(self.gpus)) or not self.num_bytes > 0 or self.chunks < 1:
            raise ParsimError(
                "a collective has bytes, and two ranks or more that are all different",
                got=f"{self.num_bytes} bytes in {self.chunks} chunks among {len(self.gpus)} ranks",
            )


class _Way(NamedTuple):
    links: tuple[Link, ...]
    latency_s: float
    cap_bytes_per_s: float


def messages_of(collective: Collective, fabric: Fabric) -> list[Message]:
    """The messages of a collective; places are devices and switches of the fabric's graph.

    Raises ParsimError for an algorithm that cannot run there: in switches without any, in two levels
    among domains that hold unlike numbers of ranks; and for more messages than can be simulated.
    """
    kind, num_bytes, chunks = collective.kind, collective.num_bytes, collective.chunks
    places: list[Node] = [("gpu", gpu) for gpu in collective.gpus]
    domains = list(_domains(collective, fabric).values())
    _check_count(collective, len(places), len(domains))
    if collective.algorithm == "pairwise":
        return exchange(places, num_bytes)
    if collective.algorithm == "chain":
        return chain(places, num_bytes, chunks)
    if len({len(ranks) for ranks in domains}) > 1:
        raise ParsimError(
            "this needs as many ranks in every domain",
            where=collective.algorithm,
            got=[len(ranks) for ranks in domains],
        )
    if collective.algorithm == "ring":
        # Inside one domain the ring is what was measured as a whole.
        return rings(domains if len(domains) > 1 else [[place] for place in places], num_bytes,
                     twice=kind == "all_reduce")  # fmt: skip
    if len(domains) == 1 and collective.algorithm == "tree":
        return double_binary_tree(places, num_bytes, chunks)
    if len(domains) == 1 and collective.algorithm == "in-switch":
        return tree(_switch_tree(places, fabric), num_bytes, chunks)
    return two_levels(domains, num_bytes, _between(collective, fabric))


def _check_count(collective: Collective, ranks: int, domains: int) -> None:
    """Raises ParsimError where there are more messages than can be simulated one by one."""
    local = -(-ranks // domains)
    count = {
        "ring": 2 * ranks**2 * (local if domains > 1 else 1),
        "pairwise": ranks**2,
        "hierarchical": 2 * ranks * (local + domains),
    }.get(collective.algorithm, 4 * ranks * collective.chunks)
    if count > MAX_MESSAGES:
        raise ParsimError(
            "too many messages to simulate one by one",
            where=collective.algorithm,
            got=f"about {count:,} among {ranks} ranks",
            expected=f"at most {MAX_MESSAGES:,}",
            hint="fewer ranks, or fewer chunks where data is passed on in chunks",
        )


def _between(collective: Collective, fabric: Fabric) -> Between:
    """How shards are summed among domains."""
    if collective.algorithm == "tree":
        return lambda rail, size, ready, start: double_binary_tree(
            rail, size, collective.chunks, ready, start
        )
    if collective.algorithm == "in-switch":
        return lambda rail, size, ready, start: tree(
            _switch_tree(rail, fabric), size, collective.chunks, ready, start=start
        )
    return ring_between


def simulated_s(collectives: Sequence[Collective], fabric: Fabric) -> list[float]:
    """When each of some collectives ends that start at once, in seconds."""
    env = simpy.Environment()
    network = FlowNetwork(env, fabric.capacities())
    ends = [0.0] * len(collectives)
    for number, collective in enumerate(collectives):
        messages = messages_of(collective, fabric)
        env.process(_run(env, network, messages, _ways(collective, messages, fabric), ends, number))
    env.run()
    return ends


def _run(
    env: simpy.Environment,
    network: FlowNetwork,
    messages: Sequence[Message],
    ways: Sequence[_Way],
    ends: list[float],
    number: int,
) -> Any:
    """Send each message when those that it waits for have come."""
    missing = [len(message.after) for message in messages]
    waiting: list[list[int]] = [[] for _ in messages]
    for index, message in enumerate(messages):
        for before in message.after:
            waiting[before].append(index)
    left = len(messages)
    all_done = env.event()

    def send(index: int) -> None:
        links, latency_s, cap_bytes_per_s = ways[index]
        done = network.transfer(links, messages[index].num_bytes, latency_s, cap_bytes_per_s)
        done.callbacks.append(lambda _: arrived(index))

    def arrived(index: int) -> None:
        nonlocal left
        left -= 1
        if not left:
            all_done.succeed()
        for other in waiting[index]:
            missing[other] -= 1
            if not missing[other]:
                send(other)

    for index, count in enumerate(missing):
        if not count:
            send(index)
    yield all_done
    ends[number] = env.now


def closed_form_s(collective: Collective, fabric: Fabric) -> float | None:
    """What the collective takes alone, by its closed form; None where its ways are not all alike.

    They are alike among ranks of one domain, among ranks each in a domain of its own, and on the levels
    of a hierarchy.
    """
    p, size, chunks = len(collective.gpus), collective.num_bytes, collective.chunks
    domains = list(_domains(collective, fabric).values())
    local, kind, algorithm = len(domains[0]), collective.kind, collective.algorithm
    if len(domains) == 1:
        if algorithm == "hierarchical":
            return sum(_fitted_s(fabric, part, "ring", p, size, 1) for part in _INSIDE)
        return _fitted_s(fabric, kind, algorithm, p, size, chunks) if algorithm != "tree" else None
    inside_s, ranks = 0.0, p
    if kind == "all_reduce" and algorithm != "ring":
        inside_s = sum(_fitted_s(fabric, part, "ring", local, size, 1) for part in _INSIDE)
        ranks, size = len(domains), size / local
    elif local > 1:
        return None
    messages = messages_of(collective, fabric)
    if algorithm == "in-switch":
        hops = {_hops_up(rail, fabric, size / chunks) for rail in zip(*domains, strict=True)}
        hops_s = next(iter(hops))
        return inside_s + pipeline_s([*hops_s, *hops_s], chunks) if len(hops) == 1 else None
    alike = {
        (way.latency_s, fabric.bytes_per_s(way.links))
        for message, way in zip(messages, _ways(collective, messages, fabric), strict=True)
        if not _is_inside(message, fabric)
    }
    if len(alike) > 1:
        return None
    ((alpha_s, beta),) = alike
    if algorithm == "tree":
        return inside_s + double_tree_s(ranks, chunks, size, alpha_s, beta)
    if algorithm == "chain":
        return pipeline_s([alpha_s + size / chunks / beta] * (p - 1), chunks)
    count = (2 if kind == "all_reduce" else 1) * (ranks - 1)
    return inside_s + rounds_s(ranks, count, size, alpha_s, beta)


def _hops_up(gpus: Sequence[Node], fabric: Fabric, num_bytes: float) -> tuple[float, ...]:
    """Seconds of every hop of so many bytes from a device up to the switch at the root.

    All devices are as many hops below it: fabrics with switches above them have levels.
    """
    parents = _switch_tree(gpus, fabric)
    place, way_up = gpus[0], []
    while place in parents:
        link = place, parents[place]
        way_up.append(_latency_s((link,), fabric) + num_bytes / fabric.bytes_per_s((link,)))
        place = parents[place]
    return tuple(way_up)


def _latency_s(links: Sequence[Link], fabric: Fabric) -> float:
    """Of a message: between domains a hop of the host's proxy comes on top where a device takes part."""
    kinds = {links[0][0][0], links[-1][1][0]}
    inside = all("nvswitch" in (a[0], b[0]) for a, b in links)
    return fabric.latency_s(links) + (NETWORK_HOP_S if "gpu" in kinds and not inside else 0.0)


def _steps(kind: str, algorithm: str, ranks: int, chunks: int) -> int:
    """Messages that follow each other in a collective among ranks that are all alike."""
    if algorithm == "chain":
        return ranks - 2 + chunks
    if algorithm == "in-switch":
        return 1 + chunks
    return (2 if kind == "all_reduce" else 1) * (ranks - 1)


def _fitted_s(
    fabric: Fabric, kind: str, algorithm: str, ranks: int, num_bytes: float, chunks: int
) -> float:
    """A collective among ranks of one domain: as the cost model knows it, unless no link is that fast.

    (On eight H100s NCCL sums in the switch, which a ring cannot keep up with.)
    """
    if ranks == 1:
        return 0.0
    cluster = fabric.cluster
    steps = _steps(kind, algorithm, ranks, chunks)
    least_s = _message_bytes(algorithm, ranks, num_bytes, chunks) * steps
    least_s /= cluster.intra_node.bandwidth_bytes_per_s
    return max(collective_s(cluster, kind, num_bytes, Group(ranks, ranks)), least_s)


def _message_bytes(algorithm: str, ranks: int, num_bytes: float, chunks: int) -> float:
    return num_bytes / (chunks if algorithm in ("chain", "in-switch") else ranks)


def _is_inside(message: Message, fabric: Fabric) -> bool:
    """Whether a message stays in a scale-up domain, its switch included."""
    (kind, source), (other, target) = message.source, message.target
    if "nvswitch" in (kind, other):
        return True
    return kind == other == "gpu" and fabric.cluster.same_domain(source, target)


def _domains(collective: Collective, fabric: Fabric) -> dict[int, list[Node]]:
    domains: dict[int, list[Node]] = {}
    for gpu in collective.gpus:
        domains.setdefault(gpu // fabric.cluster.scale_up_domain, []).append(("gpu", gpu))
    return domains


def _switch_tree(gpus: Sequence[Node], fabric: Fabric) -> dict[Node, Node]:
    """The parent of every device and switch that sums; in one domain that is the domain's own switch."""
    domains = {number // fabric.cluster.scale_up_domain for _, number in gpus}
    if len(domains) == 1:
        (domain,) = domains
        return dict.fromkeys(gpus, ("nvswitch", domain))
    return dict(summing_tree(fabric, [number for _, number in gpus]))


def _ways(collective: Collective, messages: Sequence[Message], fabric: Fabric) -> list[_Way]:
    """The links of every message, its latency, and the greatest rate that its protocol allows."""
    domains = _domains(collective, fabric)
    local, chunks = len(next(iter(domains.values()))), collective.chunks
    # Messages inside a domain belong to a whole collective that was measured, or to a part of one.
    whole = len(domains) == 1 and collective.algorithm in ("ring", "pairwise", "chain", "in-switch")
    levels = collective.algorithm in ("tree", "hierarchical", "in-switch") and not whole
    levels = levels and (len(domains) > 1 or collective.algorithm == "hierarchical")
    ways = []
    for number, message in enumerate(messages):
        (kind, source), (other, target) = message.source, message.target
        direct = ((message.source, message.target),)
        links = fabric.route(source, target) if kind == other == "gpu" else direct
        latency_s, cap_bytes_per_s = _latency_s(links, fabric), math.inf
        if (whole or levels) and _is_inside(message, fabric):
            # A reduce-scatter comes in the first half of the messages, an all-gather in the second.
            part = collective.kind if whole else _INSIDE[2 * number >= len(messages)]
            algorithm = collective.algorithm if whole else "ring"
            pace_s = _fitted_s(fabric, part, algorithm, local, collective.num_bytes, chunks)
            latency_s, cap_bytes_per_s = (
                0.0,
                message.num_bytes * _steps(part, algorithm, local, chunks) / pace_s,
            )
        elif collective.algorithm == "ring" and local > 1 and _is_inside(message, fabric):
            # Rings through all domains share what the library gets out of a domain's links.
            fit = collective_fit(fabric.cluster, "all_gather", local)
            cap_bytes_per_s = fit.long.bus_efficiency * fabric.bytes_per_s(links) / local
        if message.width > 1:
            cap_bytes_per_s = fabric.bytes_per_s(links) / message.width
        ways.append(_Way(links, latency_s, cap_bytes_per_s))
    return ways
