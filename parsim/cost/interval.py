"""How wide the 90% interval of a step time is, and what makes it wider.

A stack's `relative_error` is measured on models that its constants had not seen: dense, in 16 bits, on
devices whose kernels were measured. A prediction that leans on something else gets a named width on top.
Widths are of the log of the time and add up as independent errors do, in quadrature. They were found as
docs/decisions/0007-intervals.md says, by `python benchmarks/left_out.py`.
"""

from __future__ import annotations

import math

from parsim.hardware import DTYPE_BYTES, Cluster
from parsim.kernels import Kernels
from parsim.model import num_parameters
from parsim.plan import Job
from parsim.stack import Stack

WIDTHS = {
    "experts": 0.23,
    "narrow precision": 0.05,
    "device without kernel measurements": 0.05,
    "larger model than any fitted": 0.13,
}
"""Half width of log(measured / predicted) that each adds, where it applies."""


def leans_on(job: Job, cluster: Cluster, stack: Stack) -> tuple[str, ...]:
    """The keys of WIDTHS that apply to a prediction."""
    applies = {
        "experts": job.model.moe is not None,
        "narrow precision": DTYPE_BYTES[job.precision] < 2,
        "device without kernel measurements": not _is_measured(cluster.kernels),
        "larger model than any fitted": 0 < stack.fitted_parameters < num_parameters(job.model),
    }
    return tuple(name for name in WIDTHS if applies[name])


def _is_measured(kernels: Kernels) -> bool:
    """Whether matrix products were timed on this very device."""
    return not kernels.relative and bool(kernels.gemm or kernels.measured_gemm)


def log_half_width(job: Job, cluster: Cluster, stack: Stack) -> float:
    """Half width of the 90% interval of log(measured / predicted)."""
    return math.hypot(stack.relative_error, *(WIDTHS[name] for name in leans_on(job, cluster, stack)))


def interval_s(step_s: float, job: Job, cluster: Cluster, stack: Stack) -> tuple[float, float]:
    """90% interval of a predicted step time."""
    spread = math.exp(log_half_width(job, cluster, stack))
    return step_s / spread, step_s * spread
