"""What operations cost together: the passes of a layer, on a cluster and under a stack.

A pass is a list of timed operations in the order they run. Its time is their sum by stream, but for what
runs beside others; the same list is what a timeline in detail shows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from parsim.cost.cell import Cell
from parsim.cost.host import LAUNCHED_AGAIN, HostTime
from parsim.cost.operation import Attention, Beside, Gemm, Operation, Pass, Transfer
from parsim.cost.operation_time import (
    forward_s,
    input_grad_s,
    straggling_s,
    transfer_bytes,
    transfer_group,
    transfer_s,
    weight_grad_s,
)
from parsim.cost.recompute import recomputed, recomputed_shares
from parsim.hardware import Cluster
from parsim.stack import Stack


class PassTime(NamedTuple):
    """One pass over some layers for one micro-batch, by stream; communication as far as exposed."""

    compute_s: float = 0.0
    tp_s: float = 0.0
    cp_s: float = 0.0
    ep_s: float = 0.0
    tp_bytes: float = 0.0
    """What each device sends in that time."""
    cp_bytes: float = 0.0
    ep_bytes: float = 0.0
    host_bound_s: float = 0.0
    """Of its communication, what would save nothing if it were hidden: the host is waited for then."""

    def plus(self, other: PassTime) -> PassTime:
        """Both, one after the other."""
        return PassTime(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, factor: float) -> PassTime:
        """The same, `factor` times over."""
        return PassTime(*(factor * part for part in self))

    @property
    def total_s(self) -> float:
        return self.compute_s + self.tp_s + self.cp_s + self.ep_s


class PartTime(NamedTuple):
    """One part of the model (a layer, the embedding, the head) for one micro-batch."""

    forward: PassTime
    input_grad: PassTime
    weight_grad: PassTime
    recompute: PassTime
    apart: PassTime = PassTime()
    """What the weights' gradients take more where they are a pass of their own, in stages that hand the
    gradient of their input back."""

    @property
    def backward(self) -> PassTime:
        """The whole backward: recomputation, then both gradients."""
        return self.recompute.plus(self.input_grad).plus(self.weight_grad)

    def plus(self, other: PartTime) -> PartTime:
        """Both, one after the other."""
        return PartTime(*(a.plus(b) for a, b in zip(self, other, strict=True)))


NO_TIME = PartTime(PassTime(), PassTime(), PassTime(), PassTime())


class TimedOperation(NamedTuple):
    """One operation in a pass, or the part of one that does (or does not) run beside others."""

    name: str
    stream: Literal["compute", "tp", "cp", "ep"]
    seconds: float
    num_bytes: float = 0.0
    """What each device sends."""
    beside: bool = False
    """Runs beside the operations that follow, and adds nothing to the pass."""


class PartPasses(NamedTuple):
    """The passes of one part of the model for one micro-batch, each in the order it runs.

    With the gradients of weights stand the transfers that run beside them.
    """

    forward: tuple[TimedOperation, ...]
    input_grad: tuple[TimedOperation, ...]
    weight_grad: tuple[TimedOperation, ...]
    recompute: tuple[TimedOperation, ...]
    host_s: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """What the host takes to launch each, where it is not the device itself."""

    @property
    def time(self) -> PartTime:
        """The sums of the passes."""
        return PartTime(
            *(_with_host(pass_time(timed), s) for timed, s in zip(self[:4], self.host_s, strict=True))
        )


_Product = Literal["forward", "input_grad", "weight_grad"]
_SECONDS: dict[_Product, Callable[[Operation, Cell, Cluster, Stack], float]] = {
    "forward": forward_s,
    "input_grad": input_grad_s,
    "weight_grad": weight_grad_s,
}


class _Transfers(NamedTuple):
    """The transfers of one pass, by the place of an operation in the list of all."""

    exposed: Mapping[int, TimedOperation]
    beside: Mapping[tuple[_Product, int], Sequence[TimedOperation]]
    """What runs beside a product of an operation."""


def part_time(
    operations: tuple[Operation, ...],
    cell: Cell,
    cluster: Cluster,
    stack: Stack,
    *,
    host: HostTime | None = None,
) -> PartTime:
    """Seconds of one part of the model: the sums of its passes."""
    return part_passes(operations, cell, cluster, stack, host=host).time


def pass_time(timed: Iterable[TimedOperation]) -> PassTime:
    """The sum by stream of what is in the way of a pass."""
    seconds: dict[str, float] = defaultdict(float)
    sent: dict[str, float] = defaultdict(float)
    for operation in timed:
        if not operation.beside:
            seconds[operation.stream] += operation.seconds
            sent[operation.stream] += operation.num_bytes
    return PassTime(
        seconds["compute"], seconds["tp"], seconds["cp"], seconds["ep"],
        sent["tp"], sent["cp"], sent["ep"],
    )  # fmt: skip


def _with_host(time: PassTime, host_s: float) -> PassTime:
    """A pass that takes no less than its launches."""
    communication_s = time.total_s - time.compute_s
    return time._replace(host_bound_s=max(0.0, communication_s - max(0.0, time.total_s - host_s)))


def part_passes(
    operations: tuple[Operation, ...],
    cell: Cell,
    cluster: Cluster,
    stack: Stack,
    *,
    host: HostTime | None = None,
) -> PartPasses:
    """What one part of the model does in each pass.

    A pass takes max(host, device): the host runs ahead of a busy device and is waited for by an idle
    one. Where the device is itself the host, both times add up.
    """
    host = host or HostTime()
    there = _transfers(operations, "forward", cell, cluster, stack)
    back = _transfers(operations, "backward", cell, cluster, stack)
    forward = list(_timed(operations, "forward", there, cell, cluster, stack))
    input_grad = list(_timed(operations, "input_grad", back, cell, cluster, stack))
    gradients = back._replace(exposed={})  # what is left of them is in the way of the input gradient
    weight_grad = list(_timed(operations, "weight_grad", gradients, cell, cluster, stack))
    behind_s = pass_time(weight_grad).compute_s
    if _overlaps_exchange(cell, cluster, stack):
        forward = list(_exchange_beside(forward, stack))
        input_grad = list(_exchange_beside(input_grad, stack, also_s=behind_s))
    forward = _launched(forward, host, host.forward_s, cluster)
    input_grad = _launched(input_grad, host, host.backward_s, cluster, beside_s=behind_s)
    recompute = _recompute(operations, forward, cell, cluster, stack, host)
    passes = tuple(forward), tuple(input_grad), tuple(weight_grad), tuple(recompute)
    if cluster.device.is_host:
        return PartPasses(*passes)
    launches_s = host.forward_s, max(0.0, host.backward_s - behind_s), 0.0, host.again_s
    return PartPasses(*passes, host_s=launches_s)


def _timed(
    operations: tuple[Operation, ...],
    product: _Product,
    transfers: _Transfers,
    cell: Cell,
    cluster: Cluster,
    stack: Stack,
    shares: Sequence[float] | None = None,
) -> Iterator[TimedOperation]:
    """One pass in the order it runs; `shares` of the operations, or all of them."""
    order = range(len(operations))
    for i in order if product == "forward" else reversed(order):
        op, share = operations[i], 1.0 if shares is None else shares[i]
        yield from transfers.beside.get((product, i), ())
        seconds = share * _SECONDS[product](op, cell, cluster, stack) if share else 0.0
        if seconds:
            yield TimedOperation(op.name, "compute", seconds)
        if i in transfers.exposed:
            yield transfers.exposed[i]


def _overlaps_exchange(cell: Cell, cluster: Cluster, stack: Stack) -> bool:
    """Whether tokens travel to and from their experts beside another micro-batch's compute."""
    leaves_domain = transfer_group(cell, cluster, "ep").domains > 1
    return stack.fused_experts or (stack.ep_overlap == "network" and leaves_domain)


def _exchange_beside(
    timed: Sequence[TimedOperation], stack: Stack, *, also_s: float = 0.0
) -> Iterator[TimedOperation]:
    """A pass whose exchange of tokens has compute beside it: its own, and `also_s` of another pass."""
    cover_s = pass_time(timed).compute_s + also_s
    for operation in timed:
        if operation.stream != "ep":
            yield operation
            continue
        hidden_s = min(operation.seconds, cover_s)
        cover_s -= hidden_s
        yield from _parted(operation, hidden_s, stack.overlap_cost)


def _parted(operation: TimedOperation, hidden_s: float, cost: float) -> Iterator[TimedOperation]:
    """A transfer cut in two: what runs beside compute, and in the way the rest and `cost` of that."""
    share = hidden_s / operation.seconds if operation.seconds else 0.0
    exposed_s = operation.seconds - hidden_s + cost * hidden_s
    if hidden_s:
        yield operation._replace(seconds=hidden_s, num_bytes=share * operation.num_bytes, beside=True)
    if exposed_s:
        yield operation._replace(seconds=exposed_s, num_bytes=(1 - share) * operation.num_bytes)


def _launched(
    timed: list[TimedOperation],
    host: HostTime,
    host_s: float,
    cluster: Cluster,
    *,
    beside_s: float = 0.0,
) -> list[TimedOperation]:
    """A pass with what its host adds: all of its time on a device that is the host, else what is left
    of it after the device's work (`beside_s`: of another pass that the host launches with this one).
    """
    if not cluster.device.is_host:
        time = pass_time(timed)
        busy_s = time.compute_s + host.lead_s if host.lead_s else time.total_s
        host_s = host.lead_s + max(0.0, host_s - busy_s - beside_s)
    return [TimedOperation("launches", "compute", host_s), *timed] if host_s else timed


def _recompute(
    operations: tuple[Operation, ...],
    forward: list[TimedOperation],
    cell: Cell,
    cluster: Cluster,
    stack: Stack,
    host: HostTime,
) -> list[TimedOperation]:
    """The part of the forward that the backward runs again."""
    what = recomputed(cell, stack)
    if what == "nothing":
        return []
    if what == "everything" and not stack.recompute_stops_early:
        return forward
    shares = recomputed_shares(operations, what, stops_early=stack.recompute_stops_early)
    transfers = _transfers(operations, "forward", cell, cluster, stack, shares)
    timed = list(_timed(operations, "forward", transfers, cell, cluster, stack, shares))
    again = what in LAUNCHED_AGAIN or host.again_s > 0
    return _launched(timed, host, host.again_s, cluster) if again else timed


def _transfers(
    operations: tuple[Operation, ...],
    when: Pass,
    cell: Cell,
    cluster: Cluster,
    stack: Stack,
    shares: Sequence[float] | None = None,
) -> _Transfers:
    """Communication of one pass; `shares` of the operations, or all of them."""
    exposed: dict[int, TimedOperation] = {}
    beside: dict[tuple[_Product, int], list[TimedOperation]] = defaultdict(list)
    own: _Product = "forward" if when == "forward" else "input_grad"
    # The first of cp chunks is local, so a ring has (cp − 1)/cp of the attention to hide behind.
    ring_cover_s: float | None = None
    for i, op in enumerate(operations):
        share = 1.0 if shares is None else shares[i]
        if not isinstance(op, Transfer) or op.when != when or not share:
            continue
        seconds = share * transfer_s(op, cell, cluster, stack)
        sent = share * transfer_bytes(op, cell, cluster, stack)
        timed = TimedOperation(op.name, op.stream, seconds, sent)
        if op.beside is None:
            late_s = share * straggling_s(op, cell, stack)
            exposed[i] = timed._replace(seconds=seconds + late_s)
            continue
        if op.beside == "attention":
            product, place, cost = own, _attention_at(operations), 0.0
            if ring_cover_s is None:
                whole_s = _SECONDS[own](operations[place], cell, cluster, stack)
                ring_cover_s = whole_s * (cell.cp - 1) / cell.cp
            hidden_s = min(seconds, ring_cover_s)
            ring_cover_s -= hidden_s
        else:
            product, place = _cover(operations, i, op.beside)
            cost = stack.overlap_cost
            cover_s = share * _SECONDS[product](operations[place], cell, cluster, stack)
            hidden_s = min(seconds, cover_s)
        for part in _parted(timed, hidden_s, cost):
            if part.beside:
                beside[product, place].append(part)
            else:
                exposed[i] = part
    return _Transfers(exposed, beside)


def _attention_at(operations: tuple[Operation, ...]) -> int:
    return next(i for i, op in enumerate(operations) if isinstance(op, Attention))


def _cover(operations: tuple[Operation, ...], i: int, beside: Beside) -> tuple[_Product, int]:
    """The matrix product that transfer `i` runs beside."""
    where, product = beside.split()
    order = range(i + 1, len(operations)) if where == "next" else range(i - 1, -1, -1)
    place = next(j for j in order if isinstance(operations[j], Gemm))
    return product, place  # type: ignore[return-value]
