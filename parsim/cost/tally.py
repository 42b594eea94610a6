"""What the cost model says a rank computes and communicates in one step, in numbers that can be counted.

The same operations that parsim.cost.price turns into seconds. A rank of an executor counts the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from parsim.cost.attention import BACKWARD_FLOPS_RATIO
from parsim.cost.cell import cell_of
from parsim.cost.operation import Attention, Gemm, Operation, Transfer
from parsim.cost.recompute import recomputed, recomputed_shares
from parsim.cost.stage import CostModel
from parsim.plan import Job, ParallelPlan, stage_layers
from parsim.stack import Stack


class Collectives(NamedTuple):
    """Collectives of one kind among the ranks of one mesh dimension."""

    number: float
    num_bytes: float
    """Of the full buffers together, as nccl-tests counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Compute and communication inside the layers of some stages, for one micro-batch on one rank."""

    flops: float
    """Hardware FLOPs: what is recomputed counts again, and attention under its causal mask in full, but
    for what ranks that gather a sequence leave out of it: chunks behind their own."""
    collectives: dict[tuple[str, str], Collectives]
    """By stream (tp, cp, ep) and kind."""


def micro_batch_tally(job: Job, plan: ParallelPlan, costs: CostModel, stages: Iterable[int]) -> Tally:
    """Forward and backward of one micro-batch through these stages of the model."""
    cell = cell_of(job, plan)
    kinds = list(costs.kinds(stage_layers(job.model, plan), plan.recompute_layers))
    flops = 0.0
    number: defaultdict[tuple[str, str], float] = defaultdict(float)
    num_bytes: defaultdict[tuple[str, str], float] = defaultdict(float)
    for stage in stages:
        for kind in kinds[stage]:
            priced, operations = costs.operations(cell, kind)
            again = recomputed_shares(
                operations,
                recomputed(priced, costs.stack),
                stops_early=costs.stack.recompute_stops_early,
            )
            flops += sum(_flops(*each, costs.stack) for each in zip(operations, again, strict=True))
            for op, share in zip(operations, again, strict=True):
                if isinstance(op, Transfer):
                    times = 1 + (share if op.when == "forward" else 0)
                    number[op.stream, op.kind] += times
                    num_bytes[op.stream, op.kind] += times * op.num_bytes
    return Tally(
        flops=flops,
        collectives={key: Collectives(n, num_bytes[key]) for key, n in sorted(number.items())},
    )


def _flops(op: Operation, again: float, stack: Stack) -> float:
    """Forward, backward, and the share of the forward that runs again."""
    if isinstance(op, Gemm):
        return (3 + again) * op.flops
    if isinstance(op, Attention):
        # Without a fused kernel the backward has two products for each of the forward's two.
        backward = BACKWARD_FLOPS_RATIO if op.fused else 2.0
        ranks, seen = op.context_ranks, 1.0
        if ranks > 1 and stack.context_exchange == "all_gather":
            # Chunks i and 2·cp − 1 − i see i + 1 and 2·cp − i of 2·cp chunks, whatever i is.
            seen = (2 * ranks + 1) / (4 * ranks)
        return (1 + backward + again) * op.flops * seen
    return 0.0
