"""Time of one bare GEMM on one device."""

from __future__ import annotations

from parsim.cost.interpolation import among_points
from parsim.errors import ParsimError
from parsim.hardware import DTYPE_BYTES, Cluster, Device
from parsim.kernels import MeasuredGemm

LAYOUTS = ("TN", "NN", "NT")
"""Forward, gradient of the input, gradient of the weight."""

DEFAULT_GEMM_EFFICIENCY = 0.7
"""Share of the data sheet's peak that a large GEMM reaches where nothing was measured."""
DEFAULT_MEMORY_EFFICIENCY = 0.8
"""The same for memory bandwidth."""

_SAME_RATE = {"fp16": "bf16", "bf16": "fp16", "mxfp8": "fp8", "fp8": "mxfp8", "tf32": "fp32"}


def peak_flops_per_s(device: Device, dtype: str) -> float:
    """The data sheet's dense rate for a dtype; fp16 and bf16 stand in for each other, as do fp8 kinds.

    Raises ParsimError where the device has no matrix unit for the dtype.
    """
    for name in (dtype, _SAME_RATE.get(dtype, dtype)):
        if name in device.peak_flops_per_s:
            return device.peak_flops_per_s[name]
    raise ParsimError(
        f"{device.name} has no {dtype} matrix rate",
        where="precision",
        got=dtype,
        expected=", ".join(device.peak_flops_per_s),
    )


def gemm_s(
    cluster: Cluster, m: int, n: int, k: int, *, dtype: str, layout: str = "TN", batch: int = 1
) -> float:
    """Seconds of `batch` bare GEMMs C[m,n] = A[m,k] B[k,n] that run as one kernel.

    Raises ParsimError for an unknown layout or a dtype that the device does not have.
    """
    if layout not in LAYOUTS:
        raise ParsimError("unknown layout", got=layout, expected=", ".join(LAYOUTS))
    table = _measured(cluster, dtype, layout)
    if table is not None:
        rates = [((m_, n_, k_), 2.0 * m_ * n_ * k_ / s) for m_, n_, k_, s in table.points]
        return 2.0 * batch * m * n * k / among_points(rates, (m * batch, n, k))
    return _roofline_s(cluster, m, n, k, dtype=dtype, batch=batch)


def _measured(cluster: Cluster, dtype: str, layout: str) -> MeasuredGemm | None:
    """This machine's table for a layout, or its forward table where the layout was not timed."""
    tables = [t for t in cluster.kernels.measured_gemm if t.dtype == dtype]
    for wanted in (layout, "TN"):
        for table in tables:
            if table.layout == wanted:
                return table
    return None


def _roofline_s(cluster: Cluster, m: int, n: int, k: int, *, dtype: str, batch: int) -> float:
    device = cluster.device
    compute_s = 2.0 * batch * m * n * k / (DEFAULT_GEMM_EFFICIENCY * peak_flops_per_s(device, dtype))
    moved = batch * (m * k + k * n + m * n) * DTYPE_BYTES[dtype]
    memory_s = moved / (DEFAULT_MEMORY_EFFICIENCY * device.memory_bandwidth_bytes_per_s)
    return max(compute_s, memory_s)
