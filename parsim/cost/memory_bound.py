"""Time of a kernel that only moves memory: norms, activations, the optimizer."""

from __future__ import annotations

from parsim.cost.gemm import DEFAULT_LAUNCH_S, DEFAULT_MEMORY_EFFICIENCY
from parsim.cost.interpolation import along_line
from parsim.hardware import Cluster


def memory_bound_s(cluster: Cluster, num_bytes: float) -> float:
    """Seconds of a kernel that moves `num_bytes` (read plus written) through device memory."""
    if num_bytes <= 0:
        return 0.0
    table = cluster.kernels.measured_memory_bound
    if table is not None:
        return along_line(table.points, num_bytes)
    fit = cluster.kernels.memory_bound
    launch_s = fit.launch_s if fit else DEFAULT_LAUNCH_S
    efficiency = fit.efficiency if fit else DEFAULT_MEMORY_EFFICIENCY
    return launch_s + num_bytes / (efficiency * cluster.device.memory_bandwidth_bytes_per_s)
