"""What nvidia-smi says of a node: its GPUs, their NVLinks, and the network adapters beside them.

Read are the answers of `nvidia-smi --query-gpu=name,memory.total --format=csv,noheader` and of
`nvidia-smi topo -m`, whose legend is in nvidia-smi's manual page: NV# is a bonded set of # NVLinks, PIX
and PXB stay on PCIe switches, PHB, NODE and SYS cross the host.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from parsim.errors import NothingFits, ParsimError, did_you_mean
from parsim.hardware import Cluster, Link
from parsim.units import format_bandwidth, parse_bandwidth, parse_bytes

QUERY = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
TOPOLOGY = ("nvidia-smi", "topo", "-m")
_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;]*m")
_GPU, _NIC = re.compile(r"GPU\d+"), re.compile(r"(?:NIC|mlx|bnxt|rocep|ib)[\w-]*\d")
_CELL = re.compile(r"X|NV\d{1,3}|PIX|PXB|PHB|NODE|SYS")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU, by nvidia-smi's name for it."""

    name: str
    memory_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Which devices of a node meet over what."""

    nvlinks: tuple[tuple[int, ...], ...]
    """NVLinks between each two GPUs; 0 where they meet over PCIe or the host."""
    near_nics: tuple[tuple[str, ...], ...]
    """Of every GPU, the network adapters that it reaches over PCIe switches alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Detected:
    """A node, as a shipped profile with what was found instead."""

    cluster: Cluster
    profile: str
    differs: tuple[str, ...]
    """What was found to be otherwise than the profile says; a sentence each."""
    unknown: tuple[str, ...]
    """What was not found out; the profile's figure stands."""


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """GPUs from the answer to QUERY. Raises ParsimError for a line that is none.

    >>> parse_gpus("NVIDIA H100 80GB HBM3, 81559 MiB\\n")
    (Gpu(name='NVIDIA H100 80GB HBM3', memory_bytes=85520809984.0),)
    """
    gpus = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        name, comma, memory = line.rpartition(",")
        try:
            gpus.append(Gpu(name=name.strip(), memory_bytes=parse_bytes(memory.strip())))
        except ParsimError:
            comma = ""
        if not comma:
            raise ParsimError(
                "this line tells no GPU", where=f"line {number}", got=line.strip(),
                expected=f"NAME, MEMORY MiB, as {' '.join(QUERY)} prints",
            )  # fmt: skip
    return tuple(gpus)


def parse_topology(text: str) -> Topology:
    """The matrix of `nvidia-smi topo -m`. Raises ParsimError where there is none or a row is cut off."""
    lines = _TERMINAL_CODES.sub("", text).splitlines()
    header = next((i for i, line in enumerate(lines) if line.split()[:1] == ["GPU0"]), None)
    if header is None:
        raise ParsimError("this is no topology", expected=f"what {' '.join(TOPOLOGY)} prints")
    columns = []
    for word in lines[header].split():
        if not (_GPU.fullmatch(word) or _NIC.fullmatch(word)):
            break
        columns.append(word)
    gpus = [word for word in columns if _GPU.fullmatch(word)]
    names = dict(re.findall(r"^\s*(NIC\d+):\s*(\S+)", "\n".join(lines), re.MULTILINE))
    rows = {}
    for line in lines[header + 1 :]:
        word, *cells = line.split() or [""]
        if word in columns:
            rows[word] = cells[: len(columns)]
    nvlinks, near = [], []
    for gpu in gpus:
        cells = rows.get(gpu, [])
        if len(cells) != len(columns) or not all(_CELL.fullmatch(cell) for cell in cells):
            raise ParsimError("a row of the topology is not whole", where=gpu, got=" ".join(cells))
        by_name = dict(zip(columns, cells, strict=True))
        nvlinks.append(tuple(int(by_name[g].removeprefix("NV")) if by_name[g].startswith("NV") else 0
                             for g in gpus))  # fmt: skip
        near.append(tuple(names.get(c, c) for c in columns
                          if c not in gpus and by_name[c] in ("PIX", "PXB")))  # fmt: skip
    return Topology(nvlinks=tuple(nvlinks), near_nics=tuple(near))


def nvlinks_of(row: Sequence[int], ports: int) -> int:
    """NVLinks that a GPU of so many ports uses, from its row of the matrix.

    Behind a switch every pair shows all links of the GPU; in a mesh each pair has some of its own.

    >>> nvlinks_of((0, 18, 18, 18), 18), nvlinks_of((0, 4, 4, 4), 12), nvlinks_of((0, 0), 18)
    (18, 12, 0)
    """
    return ports if max(row, default=0) >= ports else min(ports, sum(row))


def detect(
    gpus: Sequence[Gpu],
    topology: Topology | None,
    nic_rates: Mapping[str, float],
    clusters: Mapping[str, Cluster],
) -> Detected:
    """The shipped profile of these GPUs, with what this node has instead.

    `nic_rates` are bytes/s of adapters by name, as far as they are known.

    Raises ParsimError where GPUs are of several kinds or the topology is of other ones; NothingFits
    where there are none, or no profile is for them.
    """
    if not gpus:
        raise NothingFits("no NVIDIA GPU is here", hint="`parsim hardware` lists profiles to plan with")
    kinds = sorted({gpu.name for gpu in gpus})
    if len(kinds) > 1:
        raise ParsimError("GPUs of several kinds are in this node", got=", ".join(kinds),
                          hint="parsim simulate --rank-hardware mixes profiles")  # fmt: skip
    by_name = {name: key for key, c in clusters.items() for name in c.device.driver_names}
    if kinds[0] not in by_name:
        raise NothingFits(
            "no shipped profile is for this GPU", got=kinds[0],
            hint=did_you_mean(kinds[0], by_name) or "docs/hardware.md says how to write one",
        )  # fmt: skip
    if topology is not None and len(topology.nvlinks) != len(gpus):
        raise ParsimError("the topology is of another node", got=f"{len(topology.nvlinks)} GPUs",
                          expected=f"{len(gpus)}")  # fmt: skip
    profile = by_name[kinds[0]]
    found = Detected(cluster=clusters[profile], profile=profile, differs=(), unknown=())
    return _with_network(_with_nvlinks(_with_node(found, gpus), topology), topology, nic_rates)


def _with_node(found: Detected, gpus: Sequence[Gpu]) -> Detected:
    """How many GPUs there are, and their memory where it is less than the profile's."""
    cluster, differs = found.cluster, list(found.differs)
    if len(gpus) != cluster.gpus_per_node:
        differs.append(f"{len(gpus)} GPUs a node, not {cluster.gpus_per_node}")
        one_node = cluster.scale_up_domain == cluster.gpus_per_node
        domain = len(gpus) if one_node else cluster.scale_up_domain // len(gpus) * len(gpus)
        cluster = replace(
            cluster, gpus_per_node=len(gpus), scale_up_domain=max(domain, len(gpus)),
            source=f"{cluster.source}; gpus_per_node: nvidia-smi",
        )  # fmt: skip
    memory = min(gpu.memory_bytes for gpu in gpus)
    if memory < 0.97 * cluster.device.memory_bytes:
        differs.append(f"{memory / 2**30:.1f} GiB of memory, not "
                       f"{cluster.device.memory_bytes / 2**30:.1f} GiB")  # fmt: skip
        device = replace(cluster.device, memory_bytes=memory,
                         source=f"{cluster.device.source}; memory: nvidia-smi")  # fmt: skip
        cluster = replace(cluster, device=device)
    return replace(found, cluster=cluster, differs=tuple(differs))


def _with_nvlinks(found: Detected, topology: Topology | None) -> Detected:
    ports, usual = found.cluster.device.nvlinks, found.cluster.intra_node
    if topology is None:
        return replace(found, unknown=(*found.unknown, "NVLinks: no topology"))
    if not ports or len(topology.nvlinks) == 1:
        return found
    fewest = min(nvlinks_of(row, ports) for row in topology.nvlinks)
    if fewest == ports:
        return found
    if fewest == 0:
        return replace(found, unknown=(*found.unknown,
                       "a GPU without NVLink: what PCIe carries is not in this profile "
                       "(parsim calibrate measures it)"))  # fmt: skip
    bandwidth = usual.bandwidth_bytes_per_s * fewest / ports
    text = f"{fewest} NVLinks a GPU, not {ports}: {format_bandwidth(bandwidth)} a direction"
    intra = _measured(usual, bandwidth, f"{fewest} of {ports} NVLinks in nvidia-smi topo -m")
    return replace(
        found, cluster=replace(found.cluster, intra_node=intra), differs=(*found.differs, text)
    )


def _with_network(found: Detected, topology: Topology | None, rates: Mapping[str, float]) -> Detected:
    """The adapters' share of the GPU that has least; they are shared by the GPUs that are near them."""
    usual = found.cluster.inter_node
    near = () if topology is None else topology.near_nics
    used = {nic for nics in near for nic in nics}
    if not used or not all(near) or not used <= rates.keys():
        what = "no adapter on the PCIe switch of every GPU" if near else "no topology"
        if used and not used <= rates.keys():
            what = f"the rate of {', '.join(sorted(used - rates.keys()))} is not known"
        return replace(found, unknown=(*found.unknown, f"network: {what}"))
    sharers = {nic: sum(nic in nics for nics in near) for nic in used}
    least = min(sum(rates[nic] / sharers[nic] for nic in nics) for nics in near)
    if abs(least / usual.bandwidth_bytes_per_s - 1) < 0.01:
        return found
    text = (
        f"network: {format_bandwidth(least)} a GPU, not {format_bandwidth(usual.bandwidth_bytes_per_s)}"
    )
    inter = _measured(usual, least, f"rates of {len(used)} adapters beside {len(near)} GPUs")
    return replace(
        found, cluster=replace(found.cluster, inter_node=inter), differs=(*found.differs, text)
    )


def _measured(link: Link, bandwidth_bytes_per_s: float, how: str) -> Link:
    source = f"{link.source}; bandwidth: {how}"
    return replace(link, bandwidth_bytes_per_s=bandwidth_bytes_per_s, source=source)


def parse_nic_rate(text: str) -> float:
    """Bytes/s from a port's `rate` under /sys/class/infiniband.

    >>> parse_nic_rate("400 Gb/sec (4X NDR)\\n")
    50000000000.0
    """
    number, _, rest = text.strip().partition(" ")
    return parse_bandwidth(f"{number} {rest.split(' ')[0].replace('b/sec', 'b/s')}")
