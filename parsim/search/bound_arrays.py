"""The lower bound of parsim.search.bound for many plans at once."""

from __future__ import annotations

import numpy as np

from parsim.plan import ASYNCHRONOUS_SCHEDULES, ParallelPlan
from parsim.search.bound import updates_a_step
from parsim.search.layout import Floats, Layout
from parsim.search.passes import Passes, of_ranks


def lower_bounds_s(plan: ParallelPlan, layout: Layout, passes: Passes) -> Floats:
    """(P,): no step of these plans is shorter, without the host's part; all are of one layout."""
    m, (forward, hand_back, backward) = passes.num_micro_batches, passes.least_s(plan)
    replicas = passes.replicas
    if plan.schedule in ASYNCHRONOUS_SCHEDULES:
        updates = np.array([updates_a_step(plan, int(n)) for n in m])
        work = m * (forward + backward) + updates * replicas.update_s
        return np.asarray(work.max(axis=0))
    chain = layout.kind[: plan.model_stages][:-1]
    zero, send = np.zeros((1, len(m))), passes.send_s[: len(chain)]
    there = np.cumsum((forward + replicas.first_s)[chain] + send, axis=0)
    back = np.cumsum(hand_back[chain] + send, axis=0)
    # The last gradient that reaches a first stage is followed by its weight gradient there.
    back += (backward - hand_back)[layout.kind[0]]
    head = np.concatenate([zero, there] * plan.chains)[layout.own].min(axis=1)
    tail = np.concatenate([zero, back] * plan.chains)[layout.own].min(axis=1)
    runs, once = m / plan.chains, replicas.first_s + replicas.last_s
    busy = of_ranks(layout, runs * (forward + backward) + once)
    later = of_ranks(layout, runs * (backward - hand_back))
    late = of_ranks(layout, replicas.late_s)
    bucket = replicas.last_bucket_s[layout.kind[layout.own]].min(axis=1)
    own = head + busy + np.maximum(late + bucket, tail - later)
    stream = of_ranks(layout, runs * replicas.stream_s)
    update = of_ranks(layout, replicas.update_s)
    return np.asarray(np.maximum(own, stream).max(axis=0) + update.max(axis=0))


def end_s(layout: Layout, passes: Passes, free_s: Floats, reduced_s: Floats, runs: float) -> Floats:
    """(P,): the end of a step without the host's part, whose ranks have run their passes at `free_s` and
    reduced at `reduced_s`, (pp, P).
    """
    replicas = passes.replicas
    late = free_s + of_ranks(layout, replicas.late_s)
    stream = runs * of_ranks(layout, replicas.stream_s)
    ready = np.maximum(np.maximum(late, reduced_s), stream).max(axis=0)
    return np.asarray(ready + of_ranks(layout, replicas.update_s).max(axis=0))
