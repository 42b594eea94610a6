"""The lower bound of parsim.search.bound for many plans at once, and one that holds for every split."""

from __future__ import annotations

import numpy as np

from parsim.plan import ASYNCHRONOUS_SCHEDULES, ParallelPlan
from parsim.schedule import SPLIT_SCHEDULES
from parsim.search.bound import updates_a_step
from parsim.search.cells import PartFigures
from parsim.search.layout import Floats, Layout
from parsim.search.passes import Passes, of_ranks


def lower_bounds_s(plan: ParallelPlan, layout: Layout, passes: Passes, again_s: Floats) -> Floats:
    """(P,): no step of these plans is shorter, without the host's part; all are of one layout.

    again_s, (pp, P), is what a rank at least recomputes of a micro-batch beside its passes.
    """
    m, (forward, hand_back, backward) = passes.num_micro_batches, passes.least_s(plan)
    replicas = passes.replicas
    if plan.schedule in ASYNCHRONOUS_SCHEDULES:
        updates = np.array([updates_a_step(plan, int(n)) for n in m])
        work = m * (of_ranks(layout, forward + backward) + again_s)
        return np.asarray((work + updates * of_ranks(layout, replicas.update_s)).max(axis=0))
    chain = layout.kind[: plan.model_stages][:-1]
    zero, send = np.zeros((1, len(m))), passes.send_s[: len(chain)]
    there = np.cumsum((forward + replicas.first_s)[chain] + send, axis=0)
    back = np.cumsum(hand_back[chain] + send, axis=0)
    # The last gradient that reaches a first stage is followed by its weight gradient there.
    back += (backward - hand_back)[layout.kind[0]]
    head = np.concatenate([zero, there] * plan.chains)[layout.own].min(axis=1)
    tail = np.concatenate([zero, back] * plan.chains)[layout.own].min(axis=1)
    runs, once = m / plan.chains, replicas.first_s + replicas.last_s
    busy = of_ranks(layout, runs * (forward + backward) + once) + runs * again_s
    last = replicas.last_s if plan.schedule in SPLIT_SCHEDULES else 0.0
    later = of_ranks(layout, runs * (backward - hand_back) + last)
    late = of_ranks(layout, replicas.late_s)
    bucket = replicas.last_bucket_s[layout.kind[layout.own]].min(axis=1)
    own = head + busy + np.maximum(late + bucket, tail - later)
    stream = of_ranks(layout, runs * replicas.stream_s)
    update = of_ranks(layout, replicas.update_s)
    return np.asarray(np.maximum(own, stream).max(axis=0) + update.max(axis=0))


def free_bounds_s(plan: ParallelPlan, layout: Layout, passes: Passes, parts: PartFigures) -> Floats:
    """(P,): no step of these plans is shorter however the layers are split over the ranks, one stage
    each; `parts` are (K, P). Without the host's part, replicas, transfers and what is recomputed by
    choice.

    Some rank does at least its share of all the work; it has the layers that it has whole. And a rank
    starts after the forwards of those before it (and ends before their backwards, unless they are split
    up): with w_r the passes of rank r, h_r ≥ φ·w_r what it delays the next by and W all work, the least
    step v has Σ_{s<r} h_s + m·w_r = v on every rank, so that v = φ·W / (1 − (1 − φ/m)ⁿ).
    """
    m, replicas, n = passes.num_micro_batches, passes.replicas, plan.pp
    each = passes.forward_s + passes.backward_s
    each = each - 2 * replicas.gather_each_s - replicas.reduce_each_s
    work = of_ranks(layout, each).sum(axis=0)
    slowest = work / n
    if len(layout.layer_parts) == 1:
        slowest = np.maximum(slowest, _slowest_whole_s(layout, parts, each, n))
    if plan.schedule in ASYNCHRONOUS_SCHEDULES:
        return np.asarray(m * slowest)
    share = np.ones(len(m))
    if plan.schedule in SPLIT_SCHEDULES:
        of_part = parts.forward_s / (parts.forward_s + parts.hand_back_s + parts.weight_grad_s)
        share = np.minimum(of_part.min(axis=0), 1 / 3)  # the host launches three passes alike
    together = share * work / (1 - (1 - share / m) ** n)
    return np.asarray(np.maximum(m * slowest, together))


def _slowest_whole_s(layout: Layout, parts: PartFigures, each: Floats, n: int) -> Floats:
    """(P,): the least that the slowest rank takes for a micro-batch, where all layers are alike: the
    last one has the head too, and all others at least what the rank with least has beside its layers.
    """
    (kind,) = layout.layer_parts
    layer = parts.forward_s[kind] + parts.hand_back_s[kind] + parts.weight_grad_s[kind]
    beside = each - layout.layers[:, None] * layer
    num_layers = int(layout.layers[layout.kind[:n]].sum())
    last = np.arange(-(-num_layers // n) + 1)[:, None]
    others = -(-(num_layers - last) // (n - 1)) * layer + beside.min(axis=0)
    return np.asarray(np.maximum(last * layer + beside[layout.kind[n - 1]], others).min(axis=0))


def end_s(layout: Layout, passes: Passes, free_s: Floats, reduced_s: Floats, runs: float) -> Floats:
    """(P,): the end of a step without the host's part, whose ranks have run their passes at `free_s` and
    reduced at `reduced_s`, (pp, P).
    """
    replicas = passes.replicas
    late = free_s + of_ranks(layout, replicas.late_s)
    stream = runs * of_ranks(layout, replicas.stream_s)
    ready = np.maximum(np.maximum(late, reduced_s), stream).max(axis=0)
    return np.asarray(ready + of_ranks(layout, replicas.update_s).max(axis=0))
