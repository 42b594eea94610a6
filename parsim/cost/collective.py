"""Time of one collective over one group of ranks."""

from __future__ import annotations

from dataclasses import dataclass

from parsim.cost.interpolation import along_line
from parsim.errors import ParsimError, did_you_mean
from parsim.hardware import Cluster
from parsim.kernels import MeasuredCollective

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")

DEFAULT_LINK_EFFICIENCY = 0.8
"""Share of a link's bandwidth that a large message reaches where nothing was measured."""


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


def group_of(cluster: Cluster, *, size: int, stride: int) -> Group:
    """The group of `size` ranks that lie `stride` global ranks apart."""
    domain = cluster.scale_up_domain
    return Group(size, max(1, min(size, domain // stride)))


def wire_factor(kind: str, size: int) -> float:
    """Bytes each rank sends, over the bytes of the full buffer, with the best algorithm on a ring.

    2(n−1)/n for all_reduce, (n−1)/n for the others, 1 for broadcast. Source: Patarasuk and Yuan,
    "Bandwidth optimal all-reduce algorithms", JPDC 2009; nccl-tests doc/PERFORMANCE.md.

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
    steps = 2 if kind == "all_reduce" else 1
    intra, inter = cluster.intra_node, cluster.inter_node
    bandwidth = intra.bandwidth_bytes_per_s
    latency = steps * (group.local - 1) * intra.latency_s
    if group.domains > 1:
        bandwidth = min(bandwidth, group.local * inter.bandwidth_bytes_per_s)
        latency += steps * (group.domains - 1) * inter.latency_s
    return latency + wire * num_bytes / (DEFAULT_LINK_EFFICIENCY * bandwidth)


def _from_tables(tables: list[MeasuredCollective], kind: str, num_bytes: float, size: int) -> float:
    """From this machine's tables: over bytes in each, then between the two nearest group sizes."""
    times = sorted((t.gpus, along_line(t.points, num_bytes)) for t in tables)
    if len(times) == 1:
        gpus, time = times[0]
        return time * wire_factor(kind, size) / wire_factor(kind, gpus)
    return along_line([(float(gpus), time) for gpus, time in times], float(size))


def send_recv_s(cluster: Cluster, num_bytes: float, *, local: bool) -> float:
    """Seconds of a point-to-point message inside (`local`) or between scale-up domains."""
    if num_bytes <= 0:
        return 0.0
    for table in cluster.kernels.measured_collective:
        if table.kind == "send_recv":
            return along_line(table.points, num_bytes)
    link = cluster.intra_node if local else cluster.inter_node
    return link.latency_s + num_bytes / (DEFAULT_LINK_EFFICIENCY * link.bandwidth_bytes_per_s)
