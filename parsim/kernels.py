"""Constants of the kernel models: what a device really reaches, beyond its data sheet.

Two kinds of each kernel stand side by side. A *fit* is a compact physical form with constants fitted to
published measurements (see docs/kernels.md); a *measured* table holds what `parsim calibrate` timed on
one machine and is interpolated. Where both are given the machine's own table wins; where neither is,
parsim.cost falls back to a roofline with a stated efficiency. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass

from parsim.errors import ParsimError


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredGemm:
    """Times of bare GEMMs C[m,n] = A[m,k] B[k,n] of one dtype and layout, timed on this machine."""

    dtype: str
    layout: str = "TN"
    """TN: forward, NN: gradient of the input, NT: gradient of the weight."""
    points: tuple[tuple[int, int, int, float], ...]
    """(m, n, k, seconds)."""
    source: str = ""
    date: str = ""

    def __post_init__(self) -> None:
        _need_points(self.points)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredAttention:
    """Times of the fused attention kernel, forward or backward, timed on this machine."""

    dtype: str
    backward: bool = False
    causal: bool = True
    points: tuple[tuple[int, int, int, int, int, float], ...]
    """(batch, seq_len, heads, kv_heads, head_dim, seconds)."""
    source: str = ""
    date: str = ""

    def __post_init__(self) -> None:
        _need_points(self.points)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredMemoryBound:
    """Times of a kernel that does nothing but move memory, timed on this machine."""

    points: tuple[tuple[float, float], ...]
    """(bytes read and written, seconds)."""
    source: str = ""
    date: str = ""

    def __post_init__(self) -> None:
        _need_points(self.points)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredCollective:
    """Times of one collective over one group size, timed on this machine."""

    kind: str
    """all_reduce, all_gather, reduce_scatter, all_to_all, broadcast or send_recv."""
    gpus: int
    """Ranks in the group (2 for send_recv)."""
    points: tuple[tuple[float, float], ...]
    """(bytes of the full buffer as nccl-tests counts them, seconds)."""
    source: str = ""
    date: str = ""

    def __post_init__(self) -> None:
        _need_points(self.points)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Fitted or measured behaviour of one device's kernels and collectives."""

    measured_gemm: tuple[MeasuredGemm, ...] = ()
    measured_attention: tuple[MeasuredAttention, ...] = ()
    measured_memory_bound: MeasuredMemoryBound | None = None
    measured_collective: tuple[MeasuredCollective, ...] = ()


def _need_points(points: tuple[tuple[float, ...], ...]) -> None:
    if not points:
        raise ParsimError("a measured table needs at least one point", where="points")
    for point in points:
        if not all(value > 0 for value in point):
            raise ParsimError("sizes and times are greater than zero", where="points", got=point)
