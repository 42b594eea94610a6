"""The memory of all plans of a family at once.

Shapes are (Z, M, C): ZeRO stages, sizes of micro-batches, all other choices of a family; H, D, K as in a
Layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from parsim.cost.memory import model_states, receive_buffers
from parsim.cost.stage import StageCost
from parsim.plan import Job
from parsim.schedule.pipedream import weight_versions
from parsim.search.cells import Priced
from parsim.search.layout import Floats, Layout, stage_sums
from parsim.search.space import Family
from parsim.stack import Stack


def fixed_bytes(
    job: Job, family: Family, layout: Layout, priced: Priced, stages: Sequence[StageCost], stack: Stack
) -> Floats:
    """(Z, H, M, C): what each holding needs beside what its micro-batches leave behind."""
    base = family.base
    holders = [(h.stages, weight_versions(base, h.rank)) for h in layout.holdings]
    distinct = list(dict.fromkeys(holders))
    states = np.array([
        [
            model_states([stages[d] for d in of], job, plan, stack, weight_versions=versions).peak
            for of, versions in distinct
        ]
        for plan in (replace(base, zero=zero) for zero in family.zero)
    ])[:, [distinct.index(holder) for holder in holders]]  # fmt: skip
    recomputed = np.array([priced.parts.recomputed_bytes[has].max(axis=0) for has in layout.has])
    moving = np.array([recomputed[list(h.stages)].max(axis=0) for h in layout.holdings])
    cells = priced.cells
    passing = cells.working_bytes + receive_buffers(base) * cells.boundary_bytes
    return np.asarray(states[:, :, None, None] + (moving + passing))


def needed_bytes(
    job: Job, family: Family, layout: Layout, priced: Priced, fixed: Floats, stack: Stack
) -> Floats:
    """(Z, M, C): memory of the fullest rank, with what lies outside the allocator."""
    saved = stage_sums(layout, priced.parts.saved_bytes)
    left = np.full(fixed.shape[1:], np.nan)
    for i, size in enumerate(family.micro_batch):
        if not np.isnan(saved[0, i]).all():
            moments = layout.moments(job.global_batch // (family.base.dp * size))
            left[:, i] = (moments @ saved[:, i]).max(axis=1)
    needed: Floats = (1 + stack.allocator_slack) * (fixed + left).max(axis=1) + stack.context_bytes
    return needed


def room_bytes(fixed: Floats, memory_bytes: float, stack: Stack) -> Floats:
    """(Z, H, M, C): what micro-batches may leave behind on a device."""
    return np.asarray((memory_bytes - stack.context_bytes) / (1 + stack.allocator_slack) - fixed)
