"""The lower bound of parsim.search.bound for many plans at once.

Plans are columns: P cells of a family, each with every one of its Z ZeRO stages.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from parsim.cost.sync import StageSync
from parsim.plan import ASYNCHRONOUS_SCHEDULES
from parsim.schedule import OVERLAPPED_SCHEDULES, SPLIT_SCHEDULES
from parsim.search.bound import last_reduction_s, updates_a_step
from parsim.search.cells import PartFigures
from parsim.search.layout import Floats, Ints, Layout
from parsim.search.space import Family
from parsim.stack import Stack


class Columns(NamedTuple):
    """Some cells of a family."""

    num_micro_batches: Ints
    """(P,)"""
    stages: PartFigures
    """(D, P) each: sums over the parts of each kind of stage."""
    send_s: Floats
    """(n − 1, P): between the stages of the model."""


def stage_sums(layout: Layout, parts: Floats) -> Floats:
    """(D, …): sums over the parts of each kind of stage, of figures (K, …) of each kind of part."""
    sums: Floats = np.tensordot(layout.counts, parts, axes=1)
    return sums


def lower_bounds_s(
    family: Family, layout: Layout, columns: Columns, syncs: list[list[StageSync]], stack: Stack
) -> Floats:
    """(Z, P): no step is shorter; syncs are (Z, D)."""
    plan = family.base
    forward, hand_back, backward = _pass_times(family, columns.stages, stack)
    if plan.schedule in ASYNCHRONOUS_SCHEDULES:
        rows = [_stale_bounds_s(family, columns, row, forward + backward) for row in syncs]
        return np.array(rows) + stack.step_overhead_s
    first, last = layout.kind[0], layout.kind[: plan.model_stages][:-1]
    zero = np.zeros((1, len(columns.num_micro_batches)))
    there = np.cumsum(forward[last] + columns.send_s, axis=0)
    back = np.cumsum(hand_back[last] + columns.send_s, axis=0)
    # The last gradient that reaches a first stage is followed by its weight gradient there.
    back += backward[first] - hand_back[first]
    head = np.concatenate([zero, there] * plan.chains)[layout.own].min(axis=1)
    tail = np.concatenate([zero, back] * plan.chains)[layout.own].min(axis=1)
    runs = columns.num_micro_batches / plan.chains
    mine = layout.kind[layout.own]
    busy = runs * (forward + backward)[mine].sum(axis=1)
    later = runs * (backward - hand_back)[mine].sum(axis=1)
    before, after = head + busy, tail - later
    bounds = []
    for zero_stage, row in zip(family.zero, syncs, strict=True):
        own = [[row[d] for d in holding.stages] for holding in layout.holdings]
        reduce_s = np.array([last_reduction_s(of, zero_stage, stack) for of in own])
        most = (before + np.maximum(reduce_s[layout.holding_of, None], after)).max(axis=0)
        optimizer_s = max(sum(sync.optimizer_s for sync in of) for of in own)
        bounds.append(most + optimizer_s + stack.step_overhead_s)
    return np.array(bounds)


def _stale_bounds_s(family: Family, columns: Columns, syncs: list[StageSync], work_s: Floats) -> Floats:
    """(P,): without a flush, the work of the slowest rank; work_s, (D, P), is that of a micro-batch."""
    m = columns.num_micro_batches
    updates = np.array([updates_a_step(family.base, int(n)) for n in m])
    optimizer_s = np.array([sync.optimizer_s for sync in syncs])
    slowest: Floats = (m * work_s + updates * optimizer_s[:, None]).max(axis=0)
    return slowest


def _pass_times(family: Family, stages: PartFigures, stack: Stack) -> tuple[Floats, Floats, Floats]:
    """(D, P) each, the least that a stage's passes take: forward, gradient of its input, backward."""
    plan = family.base
    host_s = stack.action_host_s if plan.pp > 1 else 0.0
    forward, hand_back, weight_grad = stages[:3]
    if plan.schedule in OVERLAPPED_SCHEDULES:
        hidden = 1 - stack.overlap_cost
        forward = forward - hidden * stages.forward_exchange_s
        hand_back = hand_back - hidden * stages.hand_back_exchange_s
        weight_grad = weight_grad - hidden * stages.weight_grad_exchange_s
    backward = hand_back + weight_grad + host_s
    split = plan.schedule in SPLIT_SCHEDULES
    return forward + host_s, hand_back + host_s if split else backward, backward
