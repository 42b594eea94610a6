"""Device, Link, Cluster: what a step runs on.

Peak numbers are the data sheet's; what kernels really reach is in `kernels` (see parsim.kernels).
Standard library only: the executor's workers import it where nothing but torch is installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from statistics import NormalDist
from typing import NamedTuple, TypeVar

from parsim.errors import ParsimError, did_you_mean
from parsim.kernels import Kernels
from parsim.units import (
    format_bandwidth,
    format_bytes,
    format_duration,
    format_rate,
    parse_bandwidth,
    parse_bytes,
    parse_duration,
    require_range,
)

DTYPE_BYTES = {
    "fp64": 8,
    "fp32": 4,
    "tf32": 4,
    "bf16": 2,
    "fp16": 2,
    "fp8": 1,
    "mxfp8": 1,
    "nvfp4": 0.5625,  # four bits and one fp8 scale for each block of 16 values
}
"""Bytes of one stored value."""


MAX_NODE, MAX_DOMAIN = 1024, 100_000
"""Devices; what lies beyond is a slip of the pen, and patterns that repeat after so many would hang."""


def _positive(owner: object, *keys: str) -> None:
    wrong = {key: getattr(owner, key) for key in keys if not getattr(owner, key) > 0}
    if wrong:
        raise ParsimError(
            "this must be greater than zero",
            where=", ".join(wrong),
            got=next(iter(wrong.values())) if len(wrong) == 1 else wrong,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator (or one CPU core's worth of a host), by its data sheet."""

    name: str
    driver_names: tuple[str, ...] = ()
    """What the driver (nvidia-smi) calls it."""
    nvlinks: int = 0
    """NVLink ports of one device; 0: none, or not told."""
    peak_flops_per_s: dict[str, float]
    """Dense matrix rate by dtype; sparsity is never counted."""
    memory_bytes: float
    """What a training process can allocate, not what is printed on the box."""
    memory_bandwidth_bytes_per_s: float
    num_sms: int
    """Streaming multiprocessors (compute units, cores) that share a kernel's tiles."""
    l2_bytes: float
    power_w: float
    """Board power limit, for energy."""
    is_host: bool = False
    """The device is a core of the host itself: launching a kernel takes time from running one."""
    host_slowdown: float = 1.0
    """Time that the host beside the device takes to launch a layer, over an x86 server's."""
    training_slowdown: dict[str, float] = field(default_factory=dict)
    """Time of matrix products inside training over the kernels of the profile, by dtype: what the clock
    yields to the power limit under a load that never pauses and, where the profile's kernels are another
    library's or a relative's, what those are off (then it may be below 1). 1 where nothing is said."""
    clock_spread: float = 0.0
    """Relative standard deviation of the time that devices of this kind take for the same products:
    under a power limit each has a clock of its own."""
    source: str
    date: str

    def __post_init__(self) -> None:
        if not self.peak_flops_per_s:
            raise ParsimError(
                "a device needs a peak rate",
                where="peak_flops_per_s",
                expected='such as bf16 = "312 TFLOP/s"',
            )
        for dtype, rate in self.peak_flops_per_s.items():
            if dtype not in DTYPE_BYTES:
                raise ParsimError(
                    "unknown dtype",
                    where="peak_flops_per_s",
                    got=dtype,
                    expected=", ".join(DTYPE_BYTES),
                    hint=did_you_mean(dtype, DTYPE_BYTES),
                )
            if not rate > 0:
                raise ParsimError(
                    "this must be greater than zero", where=f"peak_flops_per_s.{dtype}", got=rate
                )
        for dtype, factor in self.training_slowdown.items():
            if dtype not in DTYPE_BYTES or not 0.5 <= factor <= 3:
                raise ParsimError(
                    "a slowdown is a factor near 1, by dtype",
                    where=f"training_slowdown.{dtype}",
                    got=factor,
                )
        if not 0 <= self.clock_spread <= 0.2:
            raise ParsimError("a spread is a small share", where="clock_spread", got=self.clock_spread)
        require_range(self, 0, MAX_NODE, "nvlinks")
        _positive(self, "host_slowdown")
        _positive(self, "memory_bytes", "memory_bandwidth_bytes_per_s", "num_sms", "l2_bytes", "power_w")


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One class of interconnect, as one device sees it."""

    latency_s: float
    """Time of an empty message between two devices, without the launch of the kernel that sends it."""
    bandwidth_bytes_per_s: float
    """Per direction and device."""
    source: str
    date: str

    def __post_init__(self) -> None:
        _positive(self, "bandwidth_bytes_per_s")
        if self.latency_s < 0:
            raise ParsimError("latency cannot be negative", where="latency_s", got=self.latency_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What one GPU costs to rent."""

    usd_per_gpu_hour: float
    source: str
    date: str

    def __post_init__(self) -> None:
        _positive(self, "usd_per_gpu_hour")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Nodes × devices with their links: one hardware profile."""

    name: str
    device: Device
    gpus_per_node: int
    scale_up_domain: int
    """Devices that reach each other over `intra_node` (GB200 NVL72: 72 with 4 a node)."""
    intra_node: Link
    inter_node: Link
    kernels: Kernels = field(default_factory=Kernels)
    price: Price | None = None
    default_stack: str = "megatron-core-2025"
    description: str = ""
    source: str = ""
    """Where the shape of a node comes from; the other tables name their own sources."""
    date: str = ""

    def __post_init__(self) -> None:
        require_range(self, 1, MAX_NODE, "gpus_per_node")
        require_range(self, 1, MAX_DOMAIN, "scale_up_domain")
        if self.scale_up_domain % self.gpus_per_node:
            raise ParsimError(
                "the scale-up domain holds whole nodes",
                where="scale_up_domain",
                got=self.scale_up_domain,
                expected=f"a multiple of gpus_per_node = {self.gpus_per_node}",
            )

    def __hash__(self) -> int:
        """Quick, for functions that remember what they found of a cluster; equality tells them apart."""
        return hash(self.name)

    def same_domain(self, rank: int, other: int) -> bool:
        """Whether two global ranks, which fill domain after domain, meet over `intra_node`."""
        return rank // self.scale_up_domain == other // self.scale_up_domain

    def domain_ranks(self, *, size: int, stride: int, gpus: int | None = None) -> int:
        """How many ranks of a group share each scale-up domain that it touches, at the least.

        The group has `size` ranks that lie `stride` global ranks apart: where a domain has 8 GPUs, the
        ranks 0, 4, 8, 12 meet in it two by two. Nodes are filled one after the other, which tears some
        groups of 6 into 2 and 4: the answer is that of the worst group among those of `gpus` ranks, or
        among as many as there can be. A domain of several nodes tears no group: where sizes do not
        divide it, jobs leave nodes of it empty (they take 64 GPUs of an NVL72).
        """
        domain = self.scale_up_domain
        whole = max(1, min(size, domain // stride))
        block = size * stride
        if whole == 1 or domain > self.gpus_per_node:
            return whole
        if domain % stride == 0 and (domain % block == 0 or block % domain == 0):
            return whole
        return _fewest_together(size, stride, domain, gpus)


@cache
def _fewest_together(size: int, stride: int, domain: int, gpus: int | None) -> int:
    """The least that a domain holds of a group, over the groups that ranks from 0 up are cut into."""
    block = size * stride
    ranks = math.lcm(block, domain) if gpus is None else min(gpus, math.lcm(block, domain))
    starts = {
        (first + offset) % domain
        for first in range(0, ranks, block)
        for offset in range(stride)
        if first + offset + block - stride < ranks
    }
    fewest = size
    for start in starts:
        left, at = size, start
        while left and fewest > 1:
            here = min(left, -(-(domain - at) // stride))
            fewest = min(fewest, here)
            left -= here
            at += here * stride - domain
    return fewest


def peak_flops_per_s(device: Device, dtype: str) -> float:
    """The device's dense matrix rate for a dtype.

    Raises ParsimError, naming the dtypes it does have, where the device has no such units.
    """
    if dtype in device.peak_flops_per_s:
        return device.peak_flops_per_s[dtype]
    if dtype in DTYPE_BYTES:
        hint: str | None = f"train in {default_precision(device)} instead"
    else:
        hint = did_you_mean(dtype, device.peak_flops_per_s)
    raise ParsimError(
        f"{device.name} has no matrix units for {dtype}",
        where="precision",
        got=dtype,
        expected=", ".join(device.peak_flops_per_s),
        hint=hint,
    )


@cache
def slowest_of(devices: int, clock_spread: float) -> float:
    """Expected time of the slowest of some devices over the mean one's.

    1 + spread · E[greatest of n standard normals], the latter as the normal quantile of
    (n − 0.375) / (n + 0.25). Source: G. Blom, "Statistical Estimates and Transformed Beta-Variables",
    Wiley, 1958.

    >>> round(slowest_of(8, 0.01), 4), slowest_of(1, 0.01)
    (1.0143, 1.0)
    """
    if devices == 1 or clock_spread == 0:
        return 1.0
    return 1.0 + clock_spread * NormalDist().inv_cdf((devices - 0.375) / (devices + 0.25))


def default_precision(device: Device) -> str:
    """The dtype to train in where nobody says: bf16, or the next best that the device has."""
    for dtype in ("bf16", "fp16", "fp32"):
        if dtype in device.peak_flops_per_s:
            return dtype
    return next(iter(device.peak_flops_per_s))


def machine_balance(device: Device, dtype: str) -> float:
    """FLOPs that the device can do in the time it takes to move one byte: peak rate over bandwidth.

    A kernel with fewer FLOPs per byte is bound by memory. Source: Williams, Waterman and Patterson,
    "Roofline", CACM 52(4), 2009.
    """
    return peak_flops_per_s(device, dtype) / device.memory_bandwidth_bytes_per_s


LEAST_MEMORY_BYTES = 1e5
"""Less is a size whose unit was forgotten."""


def with_overrides(
    cluster: Cluster,
    *,
    inter_node: str | float | None = None,
    inter_node_latency: str | float | None = None,
    intra_node: str | float | None = None,
    intra_node_latency: str | float | None = None,
    memory: str | float | None = None,
    gpus_per_node: int | None = None,
    scale_up_domain: int | None = None,
    usd_per_gpu_hour: float | None = None,
) -> Cluster:
    """The cluster with what the user knows better; None keeps what the profile says.

    inter_node and intra_node are bandwidths per direction and device, memory is what one device offers;
    each is text with a unit ("400Gb/s", "80 GB", "5 us") or a number in SI. A domain that is one node
    stays one node when gpus_per_node changes.

    Raises ParsimError naming the override that cannot be read or makes no sense.
    """
    device, price = cluster.device, cluster.price
    if memory is not None:
        memory_bytes = _si("memory", memory, parse_bytes)
        if 0 < memory_bytes < LEAST_MEMORY_BYTES:
            raise ParsimError(
                "no device has so little memory",
                where="memory",
                got=memory,
                expected="a size with its unit",
                hint=f"{memory}GB is {memory}·10⁹ bytes, {memory}GiB is {memory}·2³⁰",
            )
        device = _given(device, "memory", memory_bytes=memory_bytes)
    if usd_per_gpu_hour is not None:
        price = Price(usd_per_gpu_hour=usd_per_gpu_hour, source="given by the user", date="")
    node = cluster.gpus_per_node if gpus_per_node is None else gpus_per_node
    if scale_up_domain is None:
        one_node = cluster.scale_up_domain == cluster.gpus_per_node
        scale_up_domain = node if one_node else cluster.scale_up_domain
    return replace(
        cluster,
        device=device,
        price=price,
        gpus_per_node=node,
        scale_up_domain=scale_up_domain,
        intra_node=_link_given(cluster.intra_node, "intra_node", intra_node, intra_node_latency),
        inter_node=_link_given(cluster.inter_node, "inter_node", inter_node, inter_node_latency),
    )


def _link_given(
    link: Link, name: str, bandwidth: str | float | None, latency: str | float | None
) -> Link:
    if bandwidth is not None:
        value = _si(name, bandwidth, parse_bandwidth)
        link = _given(link, "bandwidth", where=name, bandwidth_bytes_per_s=value)
    if latency is not None:
        where = f"{name}_latency"
        link = _given(link, "latency", where=where, latency_s=_si(where, latency, parse_duration))
    return link


def _si(where: str, value: str | float, parse: Callable[[str], float]) -> float:
    """A number as it is, text by its unit."""
    if not isinstance(value, str):
        return value
    try:
        return parse(value)
    except ParsimError as error:
        raise error.at(where) from None


_Noun = TypeVar("_Noun", Device, Link)


def _given(noun: _Noun, what: str, *, where: str | None = None, **changes: float) -> _Noun:
    """A noun with one number replaced, saying so in its source."""
    try:
        return replace(noun, source=f"{noun.source}; {what}: given by the user", **changes)  # type: ignore[arg-type]
    except ParsimError as error:
        raise error.at(where or what) from None


class Fact(NamedTuple):
    """One line of a cluster's description."""

    what: str
    value: str
    source: str
    """Source and date of the table that holds the value."""


def describe(cluster: Cluster) -> tuple[Fact, ...]:
    """What a profile says, in units people read, each line with its source."""
    device = cluster.device
    shape = f"{cluster.gpus_per_node} a node, {cluster.scale_up_domain} a scale-up domain"
    facts = [
        Fact("device", device.name, _cite(device)),
        Fact("memory", _memory(device), _cite(device)),
        Fact("units", f"{device.num_sms}, {format_bytes(device.l2_bytes)} of L2", _cite(device)),
        Fact("power", f"{device.power_w:g} W", _cite(device)),
    ]
    for dtype, rate in device.peak_flops_per_s.items():
        balance = f"{machine_balance(device, dtype):.0f} FLOPs a byte"
        facts.append(Fact(f"peak {dtype}", f"{format_rate(rate)} ({balance})", _cite(device)))
    facts.append(Fact("devices", shape, _cite(cluster)))
    for what, link in (("inside the domain", cluster.intra_node), ("between", cluster.inter_node)):
        speed = format_bandwidth(link.bandwidth_bytes_per_s)
        facts.append(Fact(what, f"{speed}, {format_duration(link.latency_s)}", _cite(link)))
    if cluster.price is not None:
        dollars = f"{cluster.price.usd_per_gpu_hour:.2f} USD a GPU-hour"
        facts.append(Fact("price", dollars, _cite(cluster.price)))
    return tuple(facts)


def _memory(device: Device) -> str:
    return (
        f"{format_bytes(device.memory_bytes)} ({device.memory_bytes / 1e9:.1f} GB) "
        f"at {format_bandwidth(device.memory_bandwidth_bytes_per_s)}"
    )


def _cite(noun: Device | Link | Price | Cluster) -> str:
    return f"{noun.source} ({noun.date})" if noun.date else noun.source
