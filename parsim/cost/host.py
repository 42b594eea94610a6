"""Host time of the passes of a model: as measured on a machine, or as a stack says."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from parsim.cost.cell import Cell
from parsim.cost.recompute import recomputed
from parsim.hardware import Cluster
from parsim.kernels import HostExperts, HostMode, MeasuredHost
from parsim.stack import Stack

LAUNCHED_AGAIN = ("everything", "every_other_gemm")
"""What of a layer is recomputed by launching it again; an attention kernel alone is no matter."""


class HostTime(NamedTuple):
    """Seconds that the host takes to launch the passes of one part of the model."""

    forward_s: float = 0.0
    backward_s: float = 0.0
    lead_s: float = 0.0
    """Before the device's first work of a pass, where parts are timed one by one: a pass then begins
    with nothing queued, and its collectives, timed by themselves, are not beside the launches."""
    again_s: float = 0.0
    """For what the backward recomputes."""


class ShardHost(NamedTuple):
    """What FSDP's hooks take on the host of each layer, in every pass, and in the update."""

    forward_s: float = 0.0
    backward_s: float = 0.0
    update_s: float = 0.0


def stack_on(stack: Stack, cluster: Cluster) -> Stack:
    """The stack with this machine's own host times in place of its constants, where they were measured.

    What a collective costs beyond itself was then found between real ranks.
    """
    measured = cluster.kernels.measured_host
    plain = measured.mode("plain") if measured is not None else None
    if measured is None or plain is None:
        return stack
    return replace(
        stack,
        action_host_s=measured.action_s,
        step_overhead_s=plain.step_s,
        collective_overhead_s=measured.wait_s,
    )


def layer_host(cell: Cell, cluster: Cluster, stack: Stack, *, experts: int | None) -> HostTime:
    """Of one layer: as measured here, or as the stack says, where the backward launches as much.

    `experts`: those on the rank, routed or shared; None: a dense layer.
    """
    is_moe = experts is not None
    measured, again = cluster.kernels.measured_host, recomputed(cell, stack)
    if measured is not None:
        return _measured_layer(measured, cell, experts, relaunched=again in LAUNCHED_AGAIN)
    host_s = stack.layer_host_s
    graphed = stack.graphs_for_slow_hosts and cluster.device.host_slowdown > 1
    if not (is_moe and (stack.fused_experts or graphed)):
        host_s += (cell.cp - 1) * stack.ring_host_s + cell.low_precision * stack.narrow_host_s
        host_s += is_moe * stack.moe_host_s
    host_s *= cluster.device.host_slowdown
    again_s = host_s if again in LAUNCHED_AGAIN else 0.0
    return HostTime(host_s, host_s, stack.layer_lead_s, again_s)


def _measured_layer(
    measured: MeasuredHost, cell: Cell, experts: int | None, *, relaunched: bool
) -> HostTime:
    """A layer as split over tp, and what keeping track of a recomputation adds to both passes."""
    mode, plain = _mode(measured, cell), measured.mode("plain")
    more = HostTime()
    if experts is not None and measured.experts is not None:
        more = _beyond_dense(measured, measured.experts, experts)
    if mode is None or plain is None:
        forward_s = measured.layer_forward_s + more.forward_s
        backward_s = measured.layer_backward_s + more.backward_s
        return HostTime(forward_s, backward_s, again_s=forward_s if relaunched else 0.0)
    again = measured.mode(f"recompute {cell.recompute}")
    forward_s, again_s = mode.layer_forward_s + more.forward_s, 0.0
    if again is not None:
        again_s = max(0.0, again.layer_backward_s - plain.layer_backward_s)
        if relaunched:  # what runs again is as dear as the first time, split over tp or not
            again_s += forward_s - plain.layer_forward_s
        forward_s += max(0.0, again.layer_forward_s - plain.layer_forward_s)
    return HostTime(forward_s, mode.layer_backward_s + more.backward_s, again_s=again_s)


def _beyond_dense(measured: MeasuredHost, each: HostExperts, experts: int) -> HostTime:
    """What a layer with so many experts takes more than a dense one."""
    forward_s = each.layer_forward_s + experts * each.expert_forward_s
    backward_s = each.layer_backward_s + experts * each.expert_backward_s
    return HostTime(
        max(0.0, forward_s - measured.layer_forward_s), max(0.0, backward_s - measured.layer_backward_s)
    )


def _mode(measured: MeasuredHost, cell: Cell) -> HostMode | None:
    """The mode of a layer that is not recomputed."""
    if cell.tp == 1:
        return measured.mode("plain")
    return measured.mode("sequence parallel" if cell.sequence_parallel else "tensor parallel")


def ends_host(cell: Cell, cluster: Cluster, stack: Stack) -> HostTime:
    """Of embedding, final norm, head and loss together, as far as it was measured."""
    measured = cluster.kernels.measured_host
    mode = _mode(measured, cell) if measured is not None else None
    if mode is None:
        return HostTime(lead_s=stack.layer_lead_s)
    return HostTime(mode.ends_forward_s, mode.ends_backward_s)


def shard_host(zero: int, cell_ranks: int, cluster: Cluster) -> ShardHost:
    """Of parameters sharded over so many ranks at a ZeRO stage, as far as it was measured."""
    measured = cluster.kernels.measured_host
    if measured is None or zero < 2 or cell_ranks == 1:
        return ShardHost()
    mode, plain = measured.mode(f"zero {zero}"), measured.mode("plain")
    if mode is None or plain is None:
        return ShardHost()
    return ShardHost(
        max(0.0, mode.layer_forward_s - plain.layer_forward_s),
        max(0.0, mode.layer_backward_s - plain.layer_backward_s),
        mode.layer_step_s,
    )


def split_host_s(layers: int, cluster: Cluster) -> float:
    """What the host takes more where the backward of so many layers runs as two passes."""
    measured = cluster.kernels.measured_host
    return layers * (measured.split_s + layers * measured.split_walk_s) if measured is not None else 0.0


def layer_step_s(tp: int, *, sequence_parallel: bool, cluster: Cluster) -> float:
    """What each layer of replicas adds to a step outside its passes, as far as it was measured."""
    measured = cluster.kernels.measured_host
    if measured is None:
        return 0.0
    name = "plain" if tp == 1 else "sequence parallel" if sequence_parallel else "tensor parallel"
    mode = measured.mode(name)
    return mode.layer_step_s if mode is not None else 0.0
