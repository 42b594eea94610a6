"""Time of one collective over one group of ranks.

Inside a scale-up domain: constants fitted to nccl-tests, or a table measured on this machine. Across
domains: closed forms of the ring and the double binary tree, in which every device injects through its
own network interface, so that a group with `local` ranks in a domain has `local` of them. Sources:
Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", JPDC 69, 2009; Sanders, Speck and Träff,
"Two-tree algorithms for full bandwidth broadcast, reduction and scan", Parallel Computing 35, 2009;
NCCL's tuning.cc for what each algorithm's latency is made of.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

from parsim.cost.interpolation import along_line
from parsim.errors import ParsimError, did_you_mean
from parsim.hardware import Cluster, Link
from parsim.kernels import CollectiveFit, MeasuredCollective, Protocol
from parsim.mesh import Axis, group_size

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")

DEFAULT_LINK_EFFICIENCY = 0.8
"""Share of a link's bandwidth that a large message reaches where nothing was measured."""
NETWORK_EFFICIENCY = 0.93
"""The same of network interfaces: all_reduce of 16 GiB reaches 0.985 of 8 x 400 Gb/s on four B200 nodes,
0.93 on sixteen H200 nodes, 0.84 of 4 x 100 Gb/s on two A100 nodes (see docs/kernels.md)."""
NETWORK_HOP_S = 5e-6
"""What the host's proxy adds to each hop: 32 KiB over four A100 nodes in 68 us, 26 us of it inside."""
TREE_EXPONENT = 0.8
"""Between a tree's latency and its transfer time: more chunks in flight cost more latencies."""


@dataclass(frozen=True, slots=True)
class Group:
    """The ranks of one collective, as far as its time depends on them."""

    size: int
    """Ranks in the group."""
    local: int
    """How many of them share one scale-up domain."""

    def __post_init__(self) -> None:
        if not 1 <= self.local <= self.size:
            raise ParsimError("a group has 1 ≤ local ≤ size", where="group", got=(self.size, self.local))

    @property
    def domains(self) -> int:
        """Scale-up domains that the group touches."""
        return -(-self.size // self.local)


def group_of(cluster: Cluster, *, size: int, stride: int, gpus: int | None = None) -> Group:
    """The worst group of `size` ranks that lie `stride` global ranks apart, of all in `gpus` ranks."""
    return Group(size, cluster.domain_ranks(size=size, stride=stride, gpus=gpus))


def group_over(cluster: Cluster, axes: tuple[Axis, ...], *, gpus: int) -> Group:
    """The worst group over `axes` of a mesh of `gpus` ranks.

    Several axes lie in whole blocks, which domains hold whole or cut evenly (check_plan sees to it).
    """
    if len(axes) <= 1:
        size, stride = axes[0] if axes else (1, 1)
        return group_of(cluster, size=size, stride=stride, gpus=gpus)
    domain = cluster.scale_up_domain
    local = math.prod(max(1, min(axis.size, domain // axis.stride)) for axis in axes)
    return Group(group_size(axes), local)


def wire_factor(kind: str, size: int) -> float:
    """Bytes each rank sends, over the bytes of the full buffer, with the best algorithm on a ring.

    2(n−1)/n for all_reduce, (n−1)/n for the others, 1 for broadcast. Sources: Patarasuk and Yuan 2009;
    nccl-tests, doc/PERFORMANCE.md.

    >>> wire_factor("all_reduce", 4), wire_factor("all_gather", 4), wire_factor("broadcast", 4)
    (1.5, 0.75, 1.0)
    """
    if kind not in KINDS:
        raise ParsimError(
            "unknown collective", got=kind, expected=", ".join(KINDS), hint=did_you_mean(kind, KINDS)
        )
    if kind == "broadcast":
        return 1.0
    return (2.0 if kind == "all_reduce" else 1.0) * (size - 1) / size


def collective_s(cluster: Cluster, kind: str, num_bytes: float, group: Group) -> float:
    """Seconds of a collective of `num_bytes` (nccl-tests convention: the full buffer)."""
    wire = wire_factor(kind, group.size)
    if group.size == 1 or num_bytes <= 0:
        return 0.0
    tables = [t for t in cluster.kernels.measured_collective if t.kind == kind]
    if tables:
        return _from_tables(tables, kind, num_bytes, group.size)
    if group.domains == 1:
        fit = collective_fit(cluster, kind, group.size)
        return fitted_s(fit, cluster.intra_node, num_bytes, wire * num_bytes)
    if kind == "all_reduce":
        return min(tree_s(cluster, num_bytes, group), ring_s(cluster, kind, num_bytes, group))
    if kind == "all_to_all":
        return _exchange_s(cluster, num_bytes, group)
    return ring_s(cluster, kind, num_bytes, group)


def send_recv_s(cluster: Cluster, num_bytes: float, *, local: bool) -> float:
    """Seconds of a point-to-point message inside (`local`) or between scale-up domains.

    Inside it is half of an all_to_all between two ranks, which send each other half of their buffers.
    """
    if num_bytes <= 0:
        return 0.0
    for table in cluster.kernels.measured_collective:
        if table.kind == "send_recv":
            return along_line(table.points, num_bytes)
    if not local:
        network = cluster.inter_node
        return _hop_s(network) + num_bytes / (NETWORK_EFFICIENCY * network.bandwidth_bytes_per_s)
    fit = collective_fit(cluster, "all_to_all", 2)
    return fitted_s(fit, cluster.intra_node, 2 * num_bytes, num_bytes)


def fitted_s(fit: CollectiveFit, link: Link, num_bytes: float, wire_bytes: float) -> float:
    """Seconds by a fit; never less for more bytes, also where the library switches protocol.

    What lies below a border takes at most as long as the first message above it.
    """
    wire_per_byte = wire_bytes / num_bytes
    seconds = protocol_s(fit.long, link, wire_per_byte * max(num_bytes, fit.switch_bytes))
    if fit.short is not None and num_bytes < fit.switch_bytes:
        seconds = min(
            seconds, protocol_s(fit.short, link, wire_per_byte * max(num_bytes, fit.tiny_bytes))
        )
    if fit.tiny is not None and num_bytes < fit.tiny_bytes:
        seconds = min(seconds, protocol_s(fit.tiny, link, wire_bytes))
    return seconds


def protocol_s(protocol: Protocol, link: Link, wire_bytes: float) -> float:
    """(latency^p + (bytes on the wire / bandwidth)^p)^(1/p)."""
    wire_s = wire_bytes / (protocol.bus_efficiency * link.bandwidth_bytes_per_s)
    return _joined(protocol.latency_s, wire_s, protocol.exponent)


def collective_fit(cluster: Cluster, kind: str, size: int) -> CollectiveFit:
    """The fit for a kind and group size; between and beyond fitted sizes straight lines over log size.

    Beyond the largest size the latency goes on growing, the rest stays. Without a fit: every step of the
    ring costs the link's latency, and the link gives DEFAULT_LINK_EFFICIENCY.
    """
    for known in (kind, "all_gather" if kind == "broadcast" else kind):
        fits = sorted((f for f in cluster.kernels.collective if f.kind == known), key=lambda f: f.gpus)
        if fits:
            break
    else:
        steps = (2 if kind == "all_reduce" else 1) * (size - 1)
        default = Protocol(
            latency_s=steps * cluster.intra_node.latency_s,
            bus_efficiency=DEFAULT_LINK_EFFICIENCY,
            exponent=1.0,
        )
        return CollectiveFit(kind=kind, gpus=size, long=default, source="", date="", fitted_to="")
    place = bisect_left([f.gpus for f in fits], size)
    if place == 0 or len(fits) == 1:
        return fits[0]
    if place < len(fits) and fits[place].gpus == size:
        return fits[place]
    high = min(place, len(fits) - 1)
    return _between(fits[high - 1], fits[high], size)


def _between(low: CollectiveFit, high: CollectiveFit, size: int) -> CollectiveFit:
    share = math.log(size / low.gpus) / math.log(high.gpus / low.gpus)

    def line(a: float, b: float, *, onwards: bool = False) -> float:
        return a + (b - a) * (share if onwards else min(share, 1.0))

    def mixed(a: Protocol, b: Protocol) -> Protocol:
        return Protocol(
            latency_s=max(
                b.latency_s if share > 1 else 0.0, line(a.latency_s, b.latency_s, onwards=True)
            ),
            bus_efficiency=line(a.bus_efficiency, b.bus_efficiency),
            exponent=line(a.exponent, b.exponent),
        )

    both = low.short is not None and high.short is not None
    tiny = mixed(low.tiny, high.tiny) if low.tiny and high.tiny else None
    return CollectiveFit(
        kind=high.kind,
        gpus=size,
        tiny_bytes=line(low.tiny_bytes, high.tiny_bytes) if tiny else 0.0,
        tiny=tiny,
        switch_bytes=line(low.switch_bytes, high.switch_bytes) if both else 0.0,
        short=mixed(low.short, high.short) if low.short and high.short else None,
        long=mixed(low.long, high.long),
        source=high.source,
        date=high.date,
        fitted_to=high.fitted_to,
    )


def _inside(cluster: Cluster, kind: str, size: int) -> tuple[float, float]:
    """(latency of a small message, bus bandwidth of long ones) among `size` ranks of one domain."""
    bandwidth = cluster.intra_node.bandwidth_bytes_per_s
    if size == 1:
        return 0.0, bandwidth
    fit = collective_fit(cluster, kind, size)
    return (fit.tiny or fit.short or fit.long).latency_s, fit.long.bus_efficiency * bandwidth


def _hop_s(network: Link) -> float:
    return network.latency_s + NETWORK_HOP_S


def ring_s(cluster: Cluster, kind: str, num_bytes: float, group: Group) -> float:
    """One ring through all ranks, cut into `local` rings that cross the network on different devices.

    Each link carries wire_factor(n) · bytes at min(ring's bus bandwidth, local · network interface); the
    first byte passes every rank and every border between domains, for an all-reduce twice.
    """
    latency_s, bus = _inside(cluster, "all_gather", group.local)
    next_domain_s = _hop_s(cluster.inter_node) + (group.local - 1) * cluster.intra_node.latency_s
    latency_s += (group.domains - 1) * next_domain_s
    wire_bytes = wire_factor(kind, group.size) * num_bytes
    transfer_s = _slower(wire_bytes / bus, wire_bytes / _network_bytes_per_s(cluster, group.local))
    return (2 if kind == "all_reduce" else 1) * latency_s + transfer_s


def tree_s(cluster: Cluster, num_bytes: float, group: Group) -> float:
    """all_reduce inside each domain, and over a double binary tree of the domains.

    Up and down the tree every domain sends its data twice, with two domains once; the latency is
    2 · log2(domains) hops.
    """
    latency_s, bus = _inside(cluster, "all_reduce", group.local)
    latency_s += 2 * math.ceil(math.log2(group.domains)) * _hop_s(cluster.inter_node)
    inside_s = wire_factor("all_reduce", group.local) * num_bytes / bus
    sent = 1 if group.domains == 2 else 2
    network_s = sent * num_bytes / _network_bytes_per_s(cluster, group.local)
    return _joined(latency_s, _slower(inside_s, network_s), TREE_EXPONENT)


def in_switch_s(cluster: Cluster, num_bytes: float, group: Group) -> float:
    """all_reduce inside each domain, and by switches that sum what all domains send (SHARP).

    Every domain sends its data once and receives the sum once, at the same time; a hop up and one down.
    """
    latency_s, bus = _inside(cluster, "all_reduce", group.local)
    inside_s = wire_factor("all_reduce", group.local) * num_bytes / bus
    network_s = num_bytes / _network_bytes_per_s(cluster, group.local)
    return latency_s + 2 * _hop_s(cluster.inter_node) + _slower(inside_s, network_s)


def _exchange_s(cluster: Cluster, num_bytes: float, group: Group) -> float:
    """all_to_all: each rank sends 1/n of its buffer to every other, through its own interface."""
    latency_s, bus = _inside(cluster, "all_to_all", group.local)
    each = num_bytes / group.size
    network_s = (group.size - group.local) * each / _network_bytes_per_s(cluster, 1)
    inside_s = (group.local - 1) * each / bus
    return latency_s + _hop_s(cluster.inter_node) + _slower(inside_s, network_s)


def dispatch_s(cluster: Cluster, num_bytes: float, top_k: int, group: Group) -> float:
    """Seconds to send a rank's tokens of `num_bytes` to top_k ranks each, one copy a domain and a rank.

    A token crosses the network once for each other domain that holds any of its ranks and is handed on
    there; routing is balanced, as independent draws. Sources: DeepSeek-AI, DeepEP (kernels that forward
    from the network to NVLink); DeepSeek-V3, arXiv 2412.19437, section 3.2.2.
    """
    if group.size == 1 or num_bytes <= 0:
        return 0.0
    latency_s, bus = _inside(cluster, "all_to_all", group.local)
    inside, between = _dispatch_copies(top_k, group)
    if group.domains == 1:
        return latency_s + inside * num_bytes / bus
    network_s = between * num_bytes / _network_bytes_per_s(cluster, 1)
    return latency_s + _hop_s(cluster.inter_node) + _slower(inside * num_bytes / bus, network_s)


def network_share(group: Group, top_k: int = 0) -> float:
    """Part of what a rank sends in an all_to_all (or a dispatch to top_k ranks) that leaves its domain.

    >>> network_share(Group(16, 8)), network_share(Group(4, 2), top_k=1)
    (0.5333333333333333, 0.5)
    """
    if not top_k:
        return (group.size - group.local) / (group.size - 1)
    inside, between = _dispatch_copies(top_k, group)
    return between / (inside + between)


def dispatch_wire_factor(top_k: int, group: Group) -> float:
    """Bytes that each rank sends in a dispatch over the bytes of its tokens: copies over the network,
    and those that are handed on (or sent directly) inside its domain.

    >>> dispatch_wire_factor(1, Group(4, 4)), dispatch_wire_factor(1, Group(4, 2))
    (0.75, 1.0)
    """
    return sum(_dispatch_copies(top_k, group))


def _dispatch_copies(top_k: int, group: Group) -> tuple[float, float]:
    """Copies of a token that go over links inside domains, and over the network."""
    inside = expected_distinct(group.size, top_k) * (group.local - 1) / group.local
    between = expected_distinct(group.domains, top_k) * (group.domains - 1) / group.domains
    return inside, between


def expected_distinct(places: int, draws: int) -> float:
    """How many of `places` a number of independent uniform draws hits: n(1 − (1 − 1/n)^k).

    >>> expected_distinct(1, 8), expected_distinct(2, 2)
    (1.0, 1.5)
    """
    return places * (1 - (1 - 1 / places) ** draws)


def _network_bytes_per_s(cluster: Cluster, interfaces: int) -> float:
    return NETWORK_EFFICIENCY * interfaces * cluster.inter_node.bandwidth_bytes_per_s


def _slower(one_s: float, other_s: float) -> float:
    """Two stages of one pipeline: the slower one's time, a little more where they are alike."""
    return _joined(one_s, other_s, 4.0)


def _joined(a: float, b: float, p: float) -> float:
    """(a^p + b^p)^(1/p), without overflow."""
    greater = max(a, b)
    if greater == 0:
        return 0.0
    return float(greater * ((a / greater) ** p + (b / greater) ** p) ** (1 / p))


def _from_tables(tables: list[MeasuredCollective], kind: str, num_bytes: float, size: int) -> float:
    """From this machine's tables: over bytes in each, then between the two nearest group sizes."""
    times = sorted((t.gpus, along_line(t.points, num_bytes)) for t in tables)
    if len(times) == 1:
        gpus, time = times[0]
        return time * wire_factor(kind, size) / wire_factor(kind, gpus)
    return along_line([(float(gpus), time) for gpus, time in times], float(size))
