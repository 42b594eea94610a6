"""What keeping replicas alike adds to a step at least, as parsim.schedule.sync runs it."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

from parsim.cost.sync import StageSync
from parsim.stack import Stack

T = TypeVar("T")


class ReplicaTime(NamedTuple, Generic[T]):
    """Of a stage, a float; or of many, in arrays of the same shape."""

    gather_each_s: T
    """Compute that gathers take from every pass that they are for."""
    reduce_each_s: T
    """Compute that reductions take from every backward."""
    first_s: T
    """What the first forward takes more."""
    last_s: T
    """What the last gradient takes more."""
    gather_s: T
    """Gathered from the start of the step on, before the first forward can end."""
    reduce_s: T
    """Reduced beside compute, behind the last gradient or its pieces."""
    reduce_pass_s: T
    """That, where it follows every backward and not only the last."""
    last_bucket_s: T
    """Of that: what comes after the end of the last gradient."""
    late_s: T
    """Reduced after all gradients of a rank."""
    stream_s: T
    """Gathers and reductions of every micro-batch."""
    update_s: T
    """The optimizer, and a gather that follows it."""


def replica_time(sync: StageSync, zero: int, stack: Stack) -> ReplicaTime[float]:
    """Of one stage under a ZeRO stage."""
    takes_s = sync.reduce_takes_s + sync.reduce_kernels_s if sync.reduce_s > 0 else 0.0
    gather_takes_s = sync.gather_takes_s if sync.gather_s > 0 else 0.0
    each = zero >= 2 and not sync.accumulates
    beside = each or (zero < 2 and stack.dp_overlap)
    ahead = zero in (1, 2) and stack.dp_overlap and not stack.zero_broadcast_s
    at_once = ahead and stack.zero_prefetch is None
    behind = zero in (1, 2) and not ahead
    return ReplicaTime(
        # Where gradients accumulate, many passes find their parameters there; the bound counts none.
        gather_each_s=gather_takes_s if zero == 3 and each else 0.0,
        reduce_each_s=takes_s if each else 0.0,
        first_s=gather_takes_s if ahead else 0.0,
        last_s=takes_s if beside and not each else 0.0,
        gather_s=sync.gather_s if at_once else 0.0,
        reduce_s=sync.reduce_s if beside else 0.0,
        reduce_pass_s=sync.reduce_s if each else 0.0,
        last_bucket_s=sync.reduce_s / sync.buckets if beside else 0.0,
        late_s=0.0 if beside else sync.reduce_s,
        stream_s=each * sync.reduce_s + (2 * sync.gather_s if zero == 3 and each else 0.0),
        update_s=sync.optimizer_s + (sync.gather_s if behind else 0.0),
    )
