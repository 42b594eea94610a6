"""Device, Link, Cluster: what a step runs on.

Peak numbers are the data sheet's; what kernels really reach is in `kernels` (see parsim.kernels).
Standard library only: the executor's workers import it where nothing but torch is installed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from parsim.errors import ParsimError
from parsim.kernels import Kernels

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


def _positive(owner: object, *keys: str) -> None:
    for key in keys:
        if not getattr(owner, key) > 0:
            raise ParsimError(
                "this must be greater than zero", where=key, got=getattr(owner, key)
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator (or one CPU core's worth of a host), by its data sheet."""

    name: str
    peak_flops_per_s: dict[str, float]
    """Dense matrix rate by dtype; sparsity is never counted."""
    memory_bytes: float
    memory_bandwidth_bytes_per_s: float
    num_sms: int
    """Streaming multiprocessors (compute units, cores) that share a kernel's tiles."""
    l2_bytes: float
    power_w: float
    """Board power limit, for energy."""
    source: str
    date: str

    def __post_init__(self) -> None:
        _positive(self, "memory_bytes", "memory_bandwidth_bytes_per_s", "num_sms", "power_w")
        for dtype, rate in self.peak_flops_per_s.items():
            if dtype not in DTYPE_BYTES:
                raise ParsimError(
                    "unknown dtype",
                    where="peak_flops_per_s",
                    got=dtype,
                    expected=", ".join(DTYPE_BYTES),
                )
            if not rate > 0:
                raise ParsimError("this must be greater than zero", where=dtype, got=rate)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One class of interconnect, as one device sees it."""

    latency_s: float
    """Time of an empty message between two devices."""
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

    def __post_init__(self) -> None:
        _positive(self, "gpus_per_node", "scale_up_domain")
        if self.scale_up_domain % self.gpus_per_node:
            raise ParsimError(
                "the scale-up domain holds whole nodes",
                where="scale_up_domain",
                got=self.scale_up_domain,
                expected=f"a multiple of gpus_per_node = {self.gpus_per_node}",
            )
