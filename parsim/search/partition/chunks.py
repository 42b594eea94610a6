"""Counts of recomputed layers of a plan whose pipeline ranks hold several chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from parsim.cost.cell import cell_of
from parsim.cost.memory import boundary_bytes, model_states, receive_buffers, working_bytes
from parsim.cost.stage import EMBEDDING, HEAD
from parsim.plan import Job, ParallelPlan, stage_layers
from parsim.schedule.in_flight import full_moments
from parsim.schedule.pipedream import weight_versions
from parsim.search.partition.counts import Chunk, Moments, least_recomputed
from parsim.search.partition.table import NO_MORE_ROOM, TableMaker


class _Sharing(NamedTuple):
    """Stages of the model whose memory is decided together, and the ranks that hold them."""

    stages: tuple[int, ...]
    ranks: tuple[int, ...]


def counts_of_chunks(job: Job, plan: ParallelPlan, makers: Sequence[TableMaker]) -> tuple[int, ...]:
    """The least recomputation with which each rank fits, in layers of every stage of the model; all
    layers of ranks that do not fit. `makers` are of every pipeline rank.
    """
    kinds = list(makers[0].costs.kinds(stage_layers(job.model, plan)))
    found = [sum(kind not in (EMBEDDING, HEAD) for kind in stage) for stage in kinds]
    for sharing in _sharing(plan):
        chunks = [_chunk(job, plan, makers[sharing.ranks[0]], kinds[stage]) for stage in sharing.stages]
        moments = _moments(job, plan, makers, kinds, sharing)
        counts = least_recomputed(chunks, moments)
        for stage, count in zip(sharing.stages, counts or (), strict=counts is not None):
            found[stage] = count
    return tuple(found)


def _sharing(plan: ParallelPlan) -> list[_Sharing]:
    """Ranks that hold the same stages of the model together: in DualPipe two each hold both copies."""
    ranks: dict[tuple[int, ...], list[int]] = {}
    for rank, own in enumerate(plan.rank_stages()):
        stages = sorted({stage % plan.model_stages for stage in own})
        ranks.setdefault(tuple(stages), []).append(rank)
    return [_Sharing(stages, tuple(those)) for stages, those in ranks.items()]


def _chunk(job: Job, plan: ParallelPlan, maker: TableMaker, kinds: Sequence[str]) -> Chunk:
    """A stage of these parts, by how many of its layers are recomputed."""
    again = cell_of(job, plan)
    once = again._replace(recompute="none")
    layers = [kind for kind in kinds if kind not in (EMBEDDING, HEAD)]
    nothing = np.zeros(4)
    ends = sum((maker.part(once, kind) for kind in kinds if kind in (EMBEDDING, HEAD)), start=nothing)
    recomputed = np.array([nothing, *(maker.part(again, kind) for kind in layers)])
    kept = np.array([nothing, *(maker.part(once, kind) for kind in layers)])
    total = recomputed.cumsum(axis=0) + kept.sum(axis=0) - kept.cumsum(axis=0) + ends
    return Chunk(total[:, 1], total[:, 2], np.maximum.accumulate(recomputed[:, 3]))


def _moments(
    job: Job,
    plan: ParallelPlan,
    makers: Sequence[TableMaker],
    kinds: Sequence[tuple[str, ...]],
    sharing: _Sharing,
) -> Moments:
    """The fullest moments of ranks, and the room that their parameters and buffers leave then."""
    kept: list[np.ndarray] = []
    room: list[float] = []
    cell, m = cell_of(job, plan), plan.num_micro_batches(job)
    for rank in sharing.ranks:
        costs = makers[rank].costs
        stack, device = costs.stack, costs.cluster.device
        own = [stage % plan.model_stages for stage in plan.rank_stages()[rank]]
        stages = [costs.stage(cell, kinds[stage]) for stage in own]
        versions = weight_versions(plan, rank)
        states = model_states(stages, job, plan, stack, weight_versions=versions).peak
        passing = working_bytes(job.model, cell) + receive_buffers(plan) * boundary_bytes(
            job.model, cell
        )
        whole = (device.memory_bytes * NO_MORE_ROOM - stack.context_bytes) / (1 + stack.allocator_slack)
        for moment in full_moments(plan.schedule, plan.pp, plan.vpp, rank, m):
            row = np.zeros(len(sharing.stages))
            for stage, count in zip(own, moment, strict=True):
                row[sharing.stages.index(stage)] += count
            kept.append(row)
            room.append(whole - states - passing)
    return Moments(np.array(kept), np.array(room))
