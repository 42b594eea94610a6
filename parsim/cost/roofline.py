"""The kernels of a model on one rank against the device's roofline.

Source of the model: Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance
model for multicore architectures", Commun. ACM 52(4). A kernel's attainable rate is
min(peak, intensity · bandwidth), with the intensity its FLOPs over the bytes that it must move at the
least: each operand once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from parsim.cost.attention import BACKWARD_FLOPS_RATIO, attention_flops
from parsim.cost.cell import Cell, cell_of
from parsim.cost.layer import head_operations, layer_operations
from parsim.cost.operation import Attention, Elementwise, Gemm, Operation
from parsim.cost.operation_time import forward_s, input_grad_s, weight_grad_s
from parsim.cost.stage import CostModel
from parsim.hardware import DTYPE_BYTES, peak_flops_per_s
from parsim.plan import Job, ParallelPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineKernel:
    """One operation of the model in one pass, over all layers that have it."""

    name: str
    family: str
    """gemm, attention or memory."""
    backward: bool
    flops: float
    """Of one layer and micro-batch; 0 for memory-bound kernels, whose arithmetic nobody counts."""
    num_bytes: float
    """What must be moved at the least."""
    seconds: float
    layers: int
    """Layers of the model (or its one head) that run it."""
    dtype: str

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.num_bytes

    @property
    def flops_per_s(self) -> float:
        """The rate that it comes to."""
        return self.flops / self.seconds


def roofline_kernels(job: Job, plan: ParallelPlan, costs: CostModel) -> tuple[RooflineKernel, ...]:
    """The model's compute on one rank, kernel by kernel; the longest of all layers together first."""
    model, cell = job.model, cell_of(job, plan)
    kinds: dict[bool, list[int]] = {}
    for layer in range(model.layers):
        kinds.setdefault(model.is_moe_layer(layer), []).append(layer)
    kernels: list[RooflineKernel] = []
    for layers in kinds.values():
        operations = layer_operations(model, layers[0], cell, costs.stack)
        kernels += _kernels(operations, cell, costs, len(layers))
    kernels += _kernels(head_operations(model, cell, costs.stack), cell, costs, 1)
    return tuple(sorted(kernels, key=lambda k: (-k.seconds * k.layers, k.name, k.backward)))


def attainable_flops_per_s(costs: CostModel, intensity: float, dtype: str) -> float:
    """The roof: min(peak, intensity · bandwidth), in FLOP/s, at so many FLOPs a byte."""
    device = costs.cluster.device
    return min(peak_flops_per_s(device, dtype), intensity * device.memory_bandwidth_bytes_per_s)


def _kernels(
    operations: tuple[Operation, ...], cell: Cell, costs: CostModel, layers: int
) -> Iterator[RooflineKernel]:
    for op in operations:
        times = _times_s(op, cell, costs)
        for backward, seconds in enumerate(times):
            if seconds <= 0:
                continue
            family, flops, num_bytes = _work(op, cell, backward=bool(backward))
            narrow = isinstance(op, Gemm) and op.low_precision
            yield RooflineKernel(
                name=op.name,
                family=family,
                backward=bool(backward),
                flops=flops,
                num_bytes=num_bytes,
                seconds=seconds,
                layers=layers,
                dtype=cell.precision if narrow else cell.activation_dtype,
            )


def _times_s(op: Operation, cell: Cell, costs: CostModel) -> tuple[float, float]:
    """Forward and backward."""
    of = cell, costs.cluster, costs.stack
    return forward_s(op, *of), input_grad_s(op, *of) + weight_grad_s(op, *of)


def _work(op: Operation, cell: Cell, *, backward: bool) -> tuple[str, float, float]:
    """Family, FLOPs and least bytes of an operation's pass.

    A backward product is two, each as large as the forward; one of attention reads Q, K, V, the output
    and its gradient and writes three gradients.
    """
    if isinstance(op, Gemm):
        width = DTYPE_BYTES[cell.precision] if op.low_precision else cell.activation_bytes
        products = 2 if backward else 1
        values = op.batch * (op.m * op.k + op.k * op.n + op.m * op.n)
        return "gemm", products * op.flops, products * values * width
    if isinstance(op, Attention):
        flops = attention_flops(
            batch=op.batch,
            seq_q=op.seq_len,
            seq_kv=op.seq_len,
            heads=op.heads,
            head_dim=op.head_dim,
            v_head_dim=op.v_head_dim,
            window=op.window,
        )
        queries = op.batch * op.seq_len * op.heads / op.context_ranks
        keys = op.batch * op.seq_len * op.kv_heads / op.context_ranks
        query_side = queries * (op.head_dim + op.v_head_dim)
        key_side = keys * (op.head_dim + op.v_head_dim)
        passes = 2 if backward else 1
        ratio = BACKWARD_FLOPS_RATIO if backward else 1.0
        num_bytes = passes * (query_side + key_side) * cell.activation_bytes
        return "attention", ratio * flops / op.context_ranks, num_bytes
    assert isinstance(op, Elementwise)
    return "memory", 0.0, op.backward_bytes if backward else op.forward_bytes
