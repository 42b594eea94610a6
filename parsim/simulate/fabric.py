"""Fabric: the network of a cluster as a graph of devices, switches and links, and the routes over it.

Devices of a scale-up domain meet in its own switch; each device has one network interface. Links are
directed edges with what gets through them a second (`bytes_per_s`: the bandwidth of the profile times
the share that the cost model says large messages reach) and `latency_s`. A profile's latency is that of
a whole way between two devices: half of it lies on the first link and half on the last.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import networkx as nx

from parsim.cost.algorithms import ALGORITHMS
from parsim.cost.collective import NETWORK_EFFICIENCY
from parsim.errors import ParsimError, did_you_mean
from parsim.hardware import Cluster
from parsim.settings_text import choice, parse_settings
from parsim.simulate.torus import most_even, neighbour, torus_way

Node: TypeAlias = tuple[str, int]
"""What a node is, and its number among those of its kind: ("gpu", 3)."""
Link: TypeAlias = tuple[Node, Node]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fabric:
    """A network, and how it routes."""

    name: str
    settings: Mapping[str, Any]
    """As given, with what was left out."""
    cluster: Cluster
    graph: nx.DiGraph[Node]
    way: Callable[[int, int], tuple[Node, ...]]
    """Nodes from a device to one in another domain, both included."""
    rise: Callable[[int, int], tuple[Node, ...]] | None = None
    """Nodes from a device up to a root that could sum what all send, of the tree of some device (trees
    have different roots); None where there are no such switches."""

    def route(self, source: int, target: int, *, over_network: bool = False) -> tuple[Link, ...]:
        """The links from one device to another: inside a domain over its switch, unless told not to."""
        if not over_network and self.cluster.same_domain(source, target):
            domain = source // self.cluster.scale_up_domain
            return tuple(pairwise((("gpu", source), ("nvswitch", domain), ("gpu", target))))
        return tuple(pairwise(self.way(source, target)))

    def latency_s(self, links: Iterable[Link]) -> float:
        """Seconds until the first byte of a message is over all links."""
        return float(sum(self.graph.edges[link]["latency_s"] for link in links))

    def bytes_per_s(self, links: Iterable[Link]) -> float:
        """What gets over all links, were nothing else on them."""
        return float(min(self.graph.edges[link]["bytes_per_s"] for link in links))

    def capacities(self) -> dict[Link, float]:
        """Bytes per second of every link."""
        return {(a, b): data["bytes_per_s"] for a, b, data in self.graph.edges(data=True)}


def fabric_of(text: str, cluster: Cluster, gpus: int) -> Fabric:
    """The fabric that `name,key=value,…` describes, for a cluster of so many devices.

    Raises ParsimError for an unknown name or setting, and for sizes that make no fabric.
    """
    name = text.partition(",")[0].strip()
    if name not in _KINDS:
        raise ParsimError(
            f"unknown fabric {name!r}",
            where="--fabric",
            expected=", ".join(_KINDS),
            hint=did_you_mean(name, _KINDS),
        )
    make, readers, defaults = _KINDS[name]
    # How gradients are summed over the network; auto is what the cost model finds fastest.
    known = readers | {"algorithm": choice("auto", *ALGORITHMS)}
    given = parse_settings(text, known, where="--fabric", named=True).values
    # Devices that fill up the last domain are there, whether the job uses them or not.
    whole = -(-gpus // cluster.scale_up_domain) * cluster.scale_up_domain
    return make(name, {**defaults, "algorithm": "auto", **given}, cluster, whole)


def describe_link(link: Link) -> str:
    """A link for reading: "leaf 3 → spine 0"."""
    (kind, number), (other, there) = link
    return f"{kind} {number} → {other} {there}"


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ParsimError("this is a count from 1", got=value)
    return value


def _oversubscription(text: str) -> float:
    value = float(text)
    if not 1 <= value < math.inf:
        raise ParsimError("bandwidth of the ports down over that of the ports up, from 1", got=value)
    return value


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split("x"))


def _base(cluster: Cluster, gpus: int) -> nx.DiGraph[Node]:
    """Devices and the switches of their scale-up domains."""
    graph: nx.DiGraph[Node] = nx.DiGraph()
    inside = cluster.intra_node
    for gpu in range(gpus):
        switch: Node = ("nvswitch", gpu // cluster.scale_up_domain)
        _join(graph, ("gpu", gpu), switch, inside.bandwidth_bytes_per_s, inside.latency_s / 2)
    return graph


def _join(graph: nx.DiGraph[Node], a: Node, b: Node, bytes_per_s: float, latency_s: float = 0.0) -> None:
    """A cable: a link in either direction."""
    graph.add_edge(a, b, bytes_per_s=bytes_per_s, latency_s=latency_s)
    graph.add_edge(b, a, bytes_per_s=bytes_per_s, latency_s=latency_s)


def _interface(cluster: Cluster) -> tuple[float, float]:
    """What a network interface gets through a second, and its share of the latency."""
    network = cluster.inter_node
    return NETWORK_EFFICIENCY * network.bandwidth_bytes_per_s, network.latency_s / 2


def _single_switch(name: str, settings: dict[str, Any], cluster: Cluster, gpus: int) -> Fabric:
    """One switch that joins all network interfaces."""
    graph = _base(cluster, gpus)
    root: Node = ("switch", 0)
    for gpu in range(gpus):
        _join(graph, ("gpu", gpu), root, *_interface(cluster))
    return Fabric(
        name=name,
        settings=settings,
        cluster=cluster,
        graph=graph,
        way=lambda a, b: (("gpu", a), root, ("gpu", b)),
        rise=lambda gpu, tree: (("gpu", gpu), root),
    )


def _leaves_and_spines(name: str, settings: dict[str, Any], cluster: Cluster, gpus: int) -> Fabric:
    """Two levels: leaf switches with `leaf` interfaces each, every one joined to every spine.

    fat-tree: neighbouring devices share a leaf. rail: device i of `leaf` domains does (NVIDIA, "DGX
    SuperPOD reference architecture", 2023), and a message to another rail first goes over to it inside
    the domain (NCCL's PXN). A leaf's links up carry those down over `oversubscription`. Which spine:
    the port of the target modulo the spines, which keeps shifts apart (E. Zahavi, "D-Mod-K routing
    providing non-blocking traffic for shift permutations", 2010), or a hash of both ends (ECMP).
    """
    domain, ports = cluster.scale_up_domain, settings["leaf"]
    bytes_per_s, latency_s = _interface(cluster)
    spines = math.ceil(ports / settings["oversubscription"])
    rails = domain if name == "rail" else 1

    def place(gpu: int) -> tuple[Node, int]:
        """The leaf of a device's interface, and its port there."""
        unit, rail = divmod(gpu, rails)
        group, port = divmod(unit, ports)
        return ("leaf", group * rails + rail), port

    def spine(source: int, target: int) -> Node:
        if settings["routing"] == "hash":
            return "spine", zlib.crc32(f"{source} {target}".encode()) % spines
        return "spine", place(target)[1] % spines

    def way(source: int, target: int) -> tuple[Node, ...]:
        start: tuple[Node, ...] = (("gpu", source),)
        if source % rails != target % rails:
            source += target % rails - source % rails
            start += ("nvswitch", source // domain), ("gpu", source)
        here, there = place(source)[0], place(target)[0]
        middle = (here,) if here == there else (here, spine(source, target), there)
        return (*start, *middle, ("gpu", target))

    def rise(gpu: int, tree: int) -> tuple[Node, ...]:
        root: tuple[Node, ...] = (("spine", place(tree)[1] % spines),) if len(leaves) > 1 else ()
        return (("gpu", gpu), place(gpu)[0], *root)

    graph = _base(cluster, gpus)
    leaves = dict.fromkeys(place(gpu)[0] for gpu in range(gpus))
    for gpu in range(gpus):
        _join(graph, ("gpu", gpu), place(gpu)[0], bytes_per_s, latency_s)
    up = bytes_per_s * ports / (settings["oversubscription"] * spines)
    for leaf in leaves if len(leaves) > 1 else ():
        for number in range(spines):
            _join(graph, leaf, ("spine", number), up)
    return Fabric(
        name=name,
        settings=settings,
        cluster=cluster,
        graph=graph,
        way=way,
        rise=rise,
    )


def _torus(name: str, settings: dict[str, Any], cluster: Cluster, gpus: int) -> Fabric:
    """Domains on a torus: each shares its interfaces out evenly over the cables to its neighbours.

    Both cables of a dimension of two places lead to the same neighbour.
    """
    domains = gpus // cluster.scale_up_domain
    sizes = settings["dims"] or most_even(domains)
    if math.prod(sizes) != domains:
        raise ParsimError(
            "the torus has another number of places than there are scale-up domains",
            where="--fabric dims",
            got="x".join(map(str, sizes)),
            expected=f"sizes that multiply to {domains}",
            hint=f"such as {'x'.join(map(str, most_even(domains)))}",
        )
    graph = _base(cluster, gpus)
    bytes_per_s, latency_s = _interface(cluster)
    for gpu in range(gpus):
        router: Node = ("router", gpu // cluster.scale_up_domain)
        _join(graph, ("gpu", gpu), router, bytes_per_s, latency_s)
    cables = 2 * sum(size > 1 for size in sizes)
    cable = bytes_per_s * cluster.scale_up_domain / max(1, cables)
    for place in range(domains):
        for dimension, size in enumerate(sizes):
            if size > 1:
                other: Node = ("router", neighbour(sizes, place, dimension))
                _join(graph, ("router", place), other, cable * (2 if size == 2 else 1))

    def way(source: int, target: int) -> tuple[Node, ...]:
        ends = source // cluster.scale_up_domain, target // cluster.scale_up_domain
        passed = (("router", place) for place in torus_way(sizes, *ends))
        return ("gpu", source), *passed, ("gpu", target)

    settings = {**settings, "dims": "x".join(map(str, sizes))}
    return Fabric(name=name, settings=settings, cluster=cluster, graph=graph, way=way)


_Make: TypeAlias = Callable[[str, dict[str, Any], Cluster, int], Fabric]
_TWO_LEVELS: dict[str, Callable[[str], Any]] = {
    "leaf": _count,
    "oversubscription": _oversubscription,
    "routing": choice("modulo", "hash"),
}
_USUAL = {"leaf": 32, "oversubscription": 1.0, "routing": "modulo"}
# What makes each kind, how its settings are read, and what they are where they are left out.
_KINDS: dict[str, tuple[_Make, dict[str, Callable[[str], Any]], dict[str, Any]]] = {
    "rail": (_leaves_and_spines, _TWO_LEVELS, _USUAL),
    "fat-tree": (_leaves_and_spines, _TWO_LEVELS, _USUAL),
    "torus": (_torus, {"dims": _sizes}, {"dims": ()}),
    "switch": (_single_switch, {}, {}),
}
