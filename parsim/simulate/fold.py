"""Folding: a Program holds one replica of each pipeline rank; here it is spread over all ranks again."""

from __future__ import annotations

from parsim.plan import ParallelPlan
from parsim.timeline import MemorySample, Timeline


def unfolded(timeline: Timeline, plan: ParallelPlan) -> Timeline:
    """The timeline of every global rank, from one whose ranks are pipeline ranks.

    All dp·cp·tp ranks of a stage do the same at the same time.
    """
    replicas = plan.dp * plan.cp * plan.tp
    spans = tuple(
        span._replace(rank=span.rank * replicas + i) for span in timeline.spans for i in range(replicas)
    )
    memory = tuple(
        MemorySample(sample.rank * replicas + i, sample.time_s, sample.num_bytes)
        for sample in timeline.memory
        for i in range(replicas)
    )
    return Timeline(spans=spans, memory=memory, source=timeline.source, title=timeline.title)
