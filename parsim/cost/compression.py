"""Gradient compression: bytes that a reduction sends, and the kernels that it costs.

All of them replace the all-reduce of whole gradients (ZeRO 0). Kernels are bound by memory traffic:

- fp16, bf16: gradients are cast, summed in 16 bits and cast back (PyTorch's fp16_compress_hook).
- int8: an all-reduce in int8 would overflow. Gradients are quantised in blocks with a scale each and
  exchanged all-to-all, inside a scale-up domain first and then, what is left, between domains; each rank
  sums its part in fp32 and quantises the sum, and an all-gather hands it out. Wang et al. 2023 (ZeRO++),
  arXiv 2306.10209, section 3.3, there with a reduce-scatter alone.
- topk-P: each rank sends the P % of its values that are largest, with their places, to all others
  by an all-gather; the rest waits for the next step in a residual. Lin et al. 2018 (Deep Gradient
  Compression), arXiv 1712.01887, without its momentum correction.
- powersgd-R: a matrix M of m × n becomes P = M Q and Q = Mᵀ P of R columns each, P made orthogonal; both
  are all-reduced, and M − P Qᵀ waits for the next step. Vectors are summed whole. Vogels et al. 2019,
  arXiv 1905.13727, algorithm 1.
"""

from __future__ import annotations

from typing import NamedTuple

from parsim.cost.collective import Group
from parsim.cost.memory_bound import memory_bound_s
from parsim.cost.traffic import NO_TRAFFIC, Traffic, collective
from parsim.cost.weights import Gradients, Matrix
from parsim.hardware import Cluster, Device, default_precision, peak_flops_per_s
from parsim.plan import Compression
from parsim.stack import Stack

INT8_BLOCK = 256
"""Values that share an fp32 scale."""
INDEX_BYTES = 4
"""A value's place in a flat buffer, for top-k."""
POWERSGD_LEAST_RATE = 2.0
"""A matrix is compressed where that saves at least this factor (min_compression_rate of PyTorch's
powerSGD_hook)."""


class Reduced(NamedTuple):
    """What summing some gradients over their replicas takes."""

    traffic: Traffic = NO_TRAFFIC
    device_s: float = 0.0
    """Kernels before and after."""

    def plus(self, other: Reduced) -> Reduced:
        """Both, one after the other."""
        return Reduced(self.traffic.plus(other.traffic), self.device_s + other.device_s)

    def times(self, count: float) -> Reduced:
        """The same, `count` times over."""
        return Reduced(self.traffic.times(count), count * self.device_s)


NOTHING_REDUCED = Reduced()


def keeps_residual(compression: Compression) -> bool:
    """Whether what was not sent is kept for the next step, as one more copy of the gradients."""
    return compression.kind in ("topk", "powersgd")


def reduced_over(
    group: Group,
    gradients: Gradients,
    compression: Compression,
    width: float,
    cluster: Cluster,
    stack: Stack,
) -> Reduced:
    """The sum over a group of gradients of `width` bytes a value."""
    kind, values = compression.kind, gradients.values
    if kind == "none" or group.size == 1:
        return Reduced(collective(cluster, "all_reduce", values * width, group))
    if kind in ("fp16", "bf16"):
        traffic = collective(cluster, "all_reduce", 2 * values, group)
        return Reduced(traffic, 2 * _pass_s(values * (width + 2), cluster, stack))
    if kind == "int8":
        return _int8(group, values, width, cluster, stack)
    if kind == "topk":
        return _topk(group, values, compression.amount / 100, width, cluster, stack)
    return _powersgd(group, gradients, int(compression.amount), width, cluster, stack)


def _pass_s(num_bytes: float, cluster: Cluster, stack: Stack) -> float:
    return stack.memory_bound_slowdown * memory_bound_s(cluster, num_bytes)


def _int8(group: Group, values: float, width: float, cluster: Cluster, stack: Stack) -> Reduced:
    """Quantise all; after each exchange sum what came and quantise it; read all of the result."""
    narrow = 1 + 4 / INT8_BLOCK
    hops = [group]
    if group.domains > 1 and group.size % group.local == 0:
        hops = [Group(group.local, group.local), Group(group.domains, 1)]
    traffic, device_s, left = NO_TRAFFIC, _pass_s(values * (width + narrow), cluster, stack), values
    for hop in hops:
        if hop.size > 1:
            traffic = traffic.plus(collective(cluster, "all_to_all", left * narrow, hop))
            device_s += _pass_s(left * narrow * (1 + 1 / hop.size), cluster, stack)
        left /= hop.size
    traffic = traffic.plus(collective(cluster, "all_gather", values * narrow, group))
    return Reduced(traffic, device_s + _pass_s(values * (narrow + width), cluster, stack))


def _topk(
    group: Group, values: float, share: float, width: float, cluster: Cluster, stack: Stack
) -> Reduced:
    """Add to the residual, pick what is above a threshold, gather, add up what came from all ranks.

    The threshold comes from a sample of 0.1 to 1% of the values (DGC), which costs next to nothing.
    """
    picked = share * values
    entry = INDEX_BYTES + width
    traffic = collective(cluster, "all_gather", group.size * picked * entry, group)
    accumulate_s = _pass_s(3 * values * width, cluster, stack)
    pick_s = _pass_s(values * width + picked * (entry + width), cluster, stack)
    scatter_s = _pass_s(values * width + group.size * picked * (entry + 2 * width), cluster, stack)
    return Reduced(traffic, accumulate_s + pick_s + scatter_s)


def _powersgd(
    group: Group, gradients: Gradients, rank: int, width: float, cluster: Cluster, stack: Stack
) -> Reduced:
    """All P in one all-reduce, all Q in another, what is not compressed in a third."""
    matrices = [m for m in gradients.matrices if _pays(m, rank)]
    left = sum(m.rows * m.copies for m in matrices) * rank
    right = sum(m.columns * m.copies for m in matrices) * rank
    whole = gradients.values - sum(m.values for m in matrices)
    traffic = NO_TRAFFIC
    for values in (left, right, whole):
        traffic = traffic.plus(collective(cluster, "all_reduce", values * width, group))
    return Reduced(traffic, sum(_low_rank_s(m, rank, width, cluster, stack) for m in matrices))


def _product_flops_per_s(device: Device, width: float) -> float:
    """Rate of products of gradients of so many bytes: of the units for their dtype, or where the device
    has none (V100: no bf16) of those that it trains on.
    """
    usual = ("fp64",) if width >= 8 else ("fp32",) if width >= 4 else ("bf16", "fp16")
    known = (dtype for dtype in usual if dtype in device.peak_flops_per_s)
    return peak_flops_per_s(device, next(known, default_precision(device)))


def _pays(matrix: Matrix, rank: int) -> bool:
    low = (matrix.rows + matrix.columns) * rank
    return low * POWERSGD_LEAST_RATE < matrix.rows * matrix.columns


def _low_rank_s(matrix: Matrix, rank: int, width: float, cluster: Cluster, stack: Stack) -> float:
    """Residual added (3 values moved a number), P = M Q and Q = Mᵀ P (1 each), M ≈ P Qᵀ (1), residual
    (3); the three products of 2·m·n·R FLOPs on the units for the gradients' dtype. Gram-Schmidt scales
    a column of P and takes its share from those after it, one column after another.
    """
    moved_s = _pass_s(6 * matrix.values * width, cluster, stack)
    flops_s = 6 * matrix.values * rank / _product_flops_per_s(cluster.device, width)
    products_s = max(_pass_s(3 * matrix.values * width, cluster, stack), flops_s)
    column = matrix.rows * matrix.copies * width
    orthogonal_s = sum(_pass_s(2 * column * (rank - i), cluster, stack) for i in range(rank))
    return moved_s + products_s + orthogonal_s
