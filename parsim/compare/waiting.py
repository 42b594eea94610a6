"""Waiting inside measured communication: how long a rank was there before its peers were.

A measured collective or receive begins when its rank arrives and ends with the data, so it holds the
wait for others. A prediction tells the two apart; so must a measurement that is compared with it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import replace

from parsim.plan import ParallelPlan
from parsim.timeline import (
    CP,
    DP,
    EP,
    EXPERTS,
    TIED_EMBEDDING,
    TP,
    Span,
    Timeline,
    rank_breakdowns_s,
    transfers,
)

COLLECTIVE_STREAMS = (TP, CP, EP, DP)


def without_waiting(timeline: Timeline, plan: ParallelPlan, *, collectives: bool = True) -> Timeline:
    """The timeline with communication that begins when the last one who takes part is there.

    Receives begin no earlier than their sends; with `collectives`, so do collectives: no earlier than
    their last rank. What cannot be matched with the other ranks' stays as it is.
    """
    begins_s = dict(_receives(timeline.spans))
    if collectives:
        begins_s |= dict(_collectives(timeline.spans, plan))
    spans = tuple(
        span._replace(start_s=min(span.end_s, begins_s[span])) if span in begins_s else span
        for span in timeline.spans
    )
    return replace(timeline, spans=spans)


def fair_breakdowns_s(timeline: Timeline, plan: ParallelPlan) -> dict[int, dict[str, float]]:
    """Each rank's measured step by what it is spent on, in a prediction's terms.

    Waiting for another stage's result is bubble, as it is in a prediction. Waiting for peers with the
    same work (a tensor-parallel neighbour, a replica) has a key of its own, "imbalance": in a prediction
    they are alike.
    """
    step_s = timeline.end_s
    staged = rank_breakdowns_s(without_waiting(timeline, plan, collectives=False))
    alone = rank_breakdowns_s(without_waiting(timeline, plan))
    found = {}
    for rank, parts in alone.items():
        bubble_s = staged[rank]["bubble"]
        others_s = sum(seconds for key, seconds in parts.items() if key != "bubble")
        found[rank] = parts | {"imbalance": step_s - others_s - bubble_s, "bubble": bubble_s}
    return found


def _receives(spans: Iterable[Span]) -> Iterator[tuple[Span, float]]:
    """Receives that began before their sends, with when the send began."""
    for send, receive in transfers(spans):
        if send.start_s > receive.start_s:
            yield receive, send.start_s


def _collectives(spans: Iterable[Span], plan: ParallelPlan) -> Iterator[tuple[Span, float]]:
    """Collectives that began before their last rank was there, with when it was.

    The k-th collective of a name on each rank of a group is the same one.
    """
    taking_part: dict[tuple[str, Hashable, str], dict[int, list[Span]]] = defaultdict(dict)
    for span in sorted(spans, key=lambda s: s.start_s):
        if span.stream in COLLECTIVE_STREAMS and span.rank < plan.gpus:
            key = span.stream, _group_of(plan, span), span.name
            taking_part[key].setdefault(span.rank, []).append(span)
    for by_rank in taking_part.values():
        if len({len(own) for own in by_rank.values()}) != 1:
            continue
        for same in zip(*by_rank.values(), strict=True):
            last_s = max(span.start_s for span in same)
            for span in same:
                if last_s > span.start_s:
                    yield span, last_s


def _group_of(plan: ParallelPlan, span: Span) -> Hashable:
    """What is equal for all ranks that take part in a span's collective.

    On the data-parallel stream are not only sums over replicas: both ends of a pipeline sum the
    gradients of a tied embedding, and those of experts are summed by the ranks that hold the same ones.
    """
    at = plan.coordinate(span.rank)
    in_stage = (at.dp * plan.cp + at.cp) * plan.tp + at.tp
    if span.stream == TP:
        return at.pp, at.dp, at.cp
    if span.stream == CP:
        return at.pp, at.dp, at.tp
    if span.stream == EP:
        return at.pp, in_stage // plan.expert_ranks
    if span.name == TIED_EMBEDDING:
        return at.dp, at.cp, at.tp
    if span.name.startswith(EXPERTS):
        return at.pp, in_stage % plan.expert_ranks
    return at.pp, at.tp
