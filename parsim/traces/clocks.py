"""Clocks of several ranks' traces, set against each other by the communication that they share.

A collective ends on all its ranks at about the same time, for none can end before the last has begun.
Between two ranks that only send to each other the delay is taken to be the same in both directions
(Mills 1991, "Internet time synchronization: the Network Time Protocol", IEEE Trans. Commun. 39(10)),
with the fastest transfer of each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from statistics import median

from parsim.traces.kineto import RankTrace, Work

Shared = tuple[str, tuple[int, ...], str]
"""What tells a sequence of collectives: stream, ranks, name."""


def clock_offsets_ns(
    traces: Sequence[RankTrace], groups: Mapping[tuple[int, str], tuple[int, ...]]
) -> dict[int, int]:
    """How far each rank's clock is ahead of the first one's.

    Nothing but zeros where all clocks are of one host, or say so by agreeing on what came before what.
    `groups` are the ranks that a rank shares a stream with, where its work does not name them.
    """
    ranks = sorted(trace.rank for trace in traces)
    matched = list(_matched(traces, groups))
    sent = _sent(traces)
    one_host = len({trace.host for trace in traces}) == 1 and all(trace.base_ns for trace in traces)
    if one_host and not _contradicts(matched, sent):
        return dict.fromkeys(ranks, 0)
    ahead: dict[tuple[int, int], list[float]] = defaultdict(list)
    for same in matched:
        for a, b in combinations(sorted(same), 2):
            ahead[a, b].append(same[b].end_ns - same[a].end_ns)
    edges = {pair: median(differences) for pair, differences in ahead.items()}
    for a, b in combinations(ranks, 2):
        if (a, b) not in edges and (a, b) in sent and (b, a) in sent:
            edges[a, b] = (min(sent[a, b]) - min(sent[b, a])) / 2
    return _spread(ranks, edges)


def _spread(ranks: Sequence[int], edges: Mapping[tuple[int, int], float]) -> dict[int, int]:
    """Offsets of all ranks against the first that they are connected with."""
    neighbours: dict[int, dict[int, float]] = defaultdict(dict)
    for (a, b), ahead_ns in edges.items():
        neighbours[a][b] = ahead_ns
        neighbours[b][a] = -ahead_ns
    offsets: dict[int, float] = {}
    for first in ranks:
        if first in offsets:
            continue
        offsets[first] = 0.0
        waiting = [first]
        while waiting:
            rank = waiting.pop(0)
            for other, ahead_ns in sorted(neighbours[rank].items()):
                if other not in offsets:
                    offsets[other] = offsets[rank] + ahead_ns
                    waiting.append(other)
    return {rank: round(offset) for rank, offset in offsets.items()}


def _matched(
    traces: Iterable[RankTrace], groups: Mapping[tuple[int, str], tuple[int, ...]]
) -> Iterator[dict[int, Work]]:
    """Collectives that several ranks have, each with every rank's view of it."""
    found: dict[Shared, dict[int, list[Work]]] = defaultdict(dict)
    for trace in traces:
        for work in _shifted(trace):
            if work.kind in ("tp", "cp", "ep", "dp"):
                ranks = work.group or groups.get((trace.rank, work.stream), ())
                own = found[work.stream, ranks, work.name].setdefault(trace.rank, [])
                own.append(work)
    for by_rank in found.values():
        if len(by_rank) > 1 and len({len(own) for own in by_rank.values()}) == 1:
            for same in zip(*by_rank.values(), strict=True):
                yield dict(zip(by_rank, same, strict=True))


def _sent(traces: Iterable[RankTrace]) -> dict[tuple[int, int], list[int]]:
    """Nanoseconds from each send to the end of its receive, by (sender, receiver)."""
    begins: dict[str, list[Work]] = defaultdict(list)
    ends: dict[str, list[Work]] = defaultdict(list)
    rank_of: dict[Work, int] = {}
    for trace in traces:
        for work in _shifted(trace):
            if work.kind == "pp":
                (ends if work.stream.startswith("pp_recv") else begins)[work.name].append(work)
                rank_of[work] = trace.rank
    delays: dict[tuple[int, int], list[int]] = defaultdict(list)
    for name, sends in begins.items():
        receives = ends[name]
        alone = len({rank_of[work] for work in sends}) == len({rank_of[work] for work in receives}) == 1
        if alone and len(sends) == len(receives):
            for send, receive in zip(sends, receives, strict=True):
                delays[rank_of[send], rank_of[receive]].append(receive.end_ns - send.start_ns)
    return delays


def _shifted(trace: RankTrace) -> Iterator[Work]:
    """A trace's work on the clock that all traces' zeros are given in."""
    for work in trace.work:
        yield work._replace(start_ns=work.start_ns + trace.base_ns, end_ns=work.end_ns + trace.base_ns)


def _contradicts(
    matched: Iterable[Mapping[int, Work]], sent: Mapping[tuple[int, int], Sequence[int]]
) -> bool:
    """Whether something ended before someone who takes part had begun."""
    early = any(
        min(work.end_ns for work in same.values()) < max(work.start_ns for work in same.values())
        for same in matched
    )
    return early or any(min(delays) < 0 for delays in sent.values())
