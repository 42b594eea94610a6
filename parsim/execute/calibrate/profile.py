"""From timed points to a Cluster, and from a Cluster to the TOML that load_cluster reads back."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parsim.config import to_data, to_toml, write_file
from parsim.execute.calibrate.points import DTYPES, Point
from parsim.hardware import Cluster, Device, Link
from parsim.kernels import (
    Kernels,
    MeasuredAttention,
    MeasuredCollective,
    MeasuredGemm,
    MeasuredHost,
    MeasuredMemoryBound,
    MeasuredOptimizer,
)

CPU_CORE_W = 10.0
"""Power put down for a core of a server CPU (EPYC 9554: 360 W for 64 cores, Xeon 8480+: 350 W for 56,
their data sheets, and the rest of the board): no meter is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedPoint:
    """One point as all ranks together timed it."""

    point: Point
    seconds: float
    """Mean over ranks of each one's median."""
    spread: float
    """Largest over ranks of the interquartile range of the repeats over their median."""
    repeats: int
    """Fewest over ranks."""
    disturbed: int
    """Repeats left out, over all ranks, because something else held a core."""


class _Tables:
    """Timed points by table, and what each table says of its origin."""

    def __init__(self, timed: Sequence[TimedPoint], chip: str, torch_version: str) -> None:
        self.origin = f"measured by parsim calibrate on {chip}, torch {torch_version}"
        self.rows: dict[tuple[str, ...], list[TimedPoint]] = defaultdict(list)
        for row in timed:
            point = row.point
            group = (str(point.size[1]),) if point.family == "collective" else ()
            self.rows[point.family, point.dtype, point.variant, *group].append(row)

    def of(self, family: str) -> list[tuple[tuple[str, ...], list[TimedPoint]]]:
        """(rest of the key, rows in order of size) for each table of a family."""
        return [
            (key[1:], sorted(rows, key=lambda row: row.point.size))
            for key, rows in sorted(self.rows.items())
            if key[0] == family
        ]

    def source(self, rows: Sequence[TimedPoint]) -> str:
        """Where one table comes from."""
        repeats = round(statistics.median(row.repeats for row in rows))
        spread = statistics.median(row.spread for row in rows)
        disturbed = sum(row.disturbed for row in rows)
        text = f"{self.origin}, {repeats} repeats, interquartile range {100 * spread:.1f}%"
        if disturbed:
            text += f", {disturbed} disturbed repeats left out"
        return text


def cluster_of(
    device: str,
    ranks: int,
    facts: dict[str, Any],
    timed: Sequence[TimedPoint],
    *,
    torch_version: str,
    date: str,
) -> Cluster:
    """The hardware profile that timed points make: one node of `ranks` devices."""
    tables = _Tables(timed, facts["name"], torch_version)
    kernels = _kernels(tables, date)
    link = _link(tables, kernels, date)
    return Cluster(
        name=f"local-{device}-" + re.sub(r"[^a-z0-9]+", "-", facts["name"].lower()).strip("-"),
        device=_device(device, facts, kernels, tables.source(timed), date),
        gpus_per_node=ranks,
        scale_up_domain=ranks,
        intra_node=link,
        inter_node=dataclasses.replace(
            link, source=f"no second node: the same as inside; {link.source}"
        ),
        kernels=kernels,
        default_stack="parsim-executor",
        description=_description(device, ranks),
    )


def _kernels(tables: _Tables, date: str) -> Kernels:
    """Every table of a profile."""
    (_, moved), *_ = tables.of("memory_bound")
    ((_, optimizer), updated), *_ = tables.of("optimizer")
    host = {variant: rows for (_, variant), rows in tables.of("host")}
    return Kernels(
        measured_gemm=tuple(
            MeasuredGemm(
                dtype=dtype,
                layout=layout,
                points=tuple((*row.point.size, row.seconds) for row in rows),  # type: ignore[misc]
                source=tables.source(rows),
                date=date,
            )
            for (dtype, layout), rows in tables.of("gemm")
        ),
        measured_attention=tuple(
            MeasuredAttention(
                dtype=dtype,
                backward=variant == "backward",
                points=tuple((*row.point.size, row.seconds) for row in rows),  # type: ignore[misc]
                source=tables.source(rows),
                date=date,
            )
            for (dtype, variant), rows in tables.of("attention")
        ),
        measured_memory_bound=MeasuredMemoryBound(
            points=_by_size(moved), source=tables.source(moved), date=date
        ),
        measured_collective=tuple(
            MeasuredCollective(
                kind=kind,
                gpus=int(gpus),
                points=_by_size(rows),
                source=tables.source(rows),
                date=date,
            )
            for (_, kind, gpus), rows in tables.of("collective")
        ),
        measured_optimizer=MeasuredOptimizer(
            optimizer=optimizer, points=_by_size(updated), source=tables.source(updated), date=date
        ),
        measured_host=MeasuredHost(
            op_s=host["op"][0].seconds,
            layer_forward_s=host["forward"][0].seconds,
            layer_backward_s=host["backward"][0].seconds,
            source=tables.source([rows[0] for rows in host.values()]),
            date=date,
        ),
    )


def _by_size(rows: Sequence[TimedPoint]) -> tuple[tuple[float, float], ...]:
    """(size, seconds) of the rows, in order of size, without those that only a disturbance explains.

    More bytes take no less time: a point that was mostly disturbed and came out slower than a larger one
    tells nothing.
    """
    return tuple(
        (float(row.point.size[0]), row.seconds)
        for at, row in enumerate(rows)
        if row.disturbed <= row.repeats
        or all(row.seconds <= larger.seconds for larger in rows[at + 1 :])
    )


def _device(device: str, facts: dict[str, Any], kernels: Kernels, source: str, date: str) -> Device:
    """Peaks are the best rates seen: over the GEMMs of a dtype, over kernels that no L2 cache holds."""
    peaks: dict[str, float] = {}
    for table in kernels.measured_gemm:
        best = max(2.0 * m * n * k / seconds for m, n, k, seconds in table.points)
        peaks[table.dtype] = max(peaks.get(table.dtype, 0.0), float(f"{best:.4g}"))
    assert kernels.measured_memory_bound is not None
    streamed = [p for p in kernels.measured_memory_bound.points if p[0] > 4 * facts["l2_bytes"]]
    bandwidth = max(moved / seconds for moved, seconds in streamed)
    return Device(
        name=facts["name"],
        peak_flops_per_s={dtype: peaks[dtype] for dtype in DTYPES[device] if dtype in peaks},
        memory_bytes=facts["memory_bytes"],
        memory_bandwidth_bytes_per_s=float(f"{bandwidth:.4g}"),
        num_sms=facts["num_sms"],
        l2_bytes=facts["l2_bytes"],
        power_w=facts["power_w"],
        is_host=device == "cpu",
        source=source,
        date=date,
    )


def _link(tables: _Tables, kernels: Kernels, date: str) -> Link:
    """Latency and bandwidth of the shortest and the longest message between two ranks."""
    for _, rows in tables.of("collective"):
        if rows[0].point.variant == "send_recv":
            shortest, longest = rows[0], rows[-1]
            return Link(
                latency_s=shortest.seconds,
                bandwidth_bytes_per_s=float(f"{longest.point.size[0] / longest.seconds:.4g}"),
                source=tables.source(rows),
                date=date,
            )
    assert kernels.measured_memory_bound is not None
    moved, seconds = kernels.measured_memory_bound.points[-1]
    source = "one rank: nothing to measure, so a copy through memory"
    return Link(
        latency_s=0.0,
        bandwidth_bytes_per_s=float(f"{moved / seconds:.4g}"),
        source=source,
        date=date,
    )


def _description(device: str, ranks: int) -> str:
    if device == "cpu":
        return (
            f"{ranks} cores of this machine, one a rank with one thread, all busy at once; gloo over "
            f"loopback. Power is put down as {CPU_CORE_W:.0f} W a core, not measured."
        )
    return f"{ranks} GPUs of this machine, all busy at once; NCCL. Peaks are the best rates measured."


def cpu_facts(ranks: int) -> dict[str, Any]:
    """What the system says about one core's worth of this host, its memory shared among `ranks`."""
    return {
        "name": cpu_model(),
        "memory_bytes": float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks),
        "num_sms": 1,
        "l2_bytes": _l2_bytes(),
        "power_w": CPU_CORE_W,
    }


def cpu_model() -> str:
    """The processor's name as /proc/cpuinfo gives it, else the architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.machine()


def _l2_bytes() -> float:
    """Second-level cache of a core as Linux reports it; 1 MiB, today's usual size, where it does not."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text(encoding="utf-8")
        return float(text.strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 2.0**20


def write_profile(cluster: Cluster, path: Path) -> None:
    """Write a profile as TOML that parsim.config.load_cluster reads back to an equal Cluster."""
    write_file(path, to_toml(to_data(cluster)))
