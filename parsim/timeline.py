"""Span and Timeline: what happened when, on which stream of which rank.

Simulated and measured steps are the same type, so charts, traces, statistics and comparison are
written once. Time is in seconds from the start of the step.
Standard library only: the executor's workers import it where nothing but torch is installed.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

COMPUTE = "compute"
TP = "tp"
DP = "dp"
EP = "ep"
CP = "cp"
HOST = "host"
PP_STREAMS = ("pp_send_next", "pp_send_prev", "pp_recv_next", "pp_recv_prev")
"""Pipeline transfers, one stream a peer and direction: a link is full duplex, and peers differ."""
STREAMS = (COMPUTE, TP, CP, EP, DP, *PP_STREAMS, HOST)
"""Every stream a rank may have, in the order charts and traces show them."""
TIED_EMBEDDING = "tied embedding"
"""The name of the sum of its gradients, by both ends of each pipeline."""
EXPERTS = "expert "
"""What measured names on the data-parallel stream begin with where only ranks with the same experts take
part."""


class Span(NamedTuple):
    """One task on one stream of one rank, from start_s to end_s."""

    rank: int
    stream: str
    name: str
    """For reading: an Action such as "2F0", or what a collective carries."""
    start_s: float
    end_s: float
    kind: str
    """What the time is for: forward, backward, input_grad, weight_grad, recompute, optimizer, tp,
    cp, ep, dp, pp, host."""
    stage: int = -1
    micro_batch: int = -1

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


class MemorySample(NamedTuple):
    """Bytes that a rank holds from `time_s` until its next sample."""

    rank: int
    time_s: float
    num_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """All spans of one step, in order of (rank, stream, start)."""

    spans: tuple[Span, ...]
    memory: tuple[MemorySample, ...] = ()
    source: str = "simulated"
    """"simulated" or "measured"."""
    rank_names: tuple[str, ...] = ()
    """What each rank is, by its number, where the number does not say it."""
    copies: tuple[int, ...] = ()
    """How many times each rank counts in means over ranks, by its number; empty: once."""
    title: str = ""

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({span.rank for span in self.spans}))

    @property
    def end_s(self) -> float:
        """The end of the last span: the step time, where time starts at 0."""
        return max((span.end_s for span in self.spans), default=0.0)

    def rank_name(self, rank: int) -> str:
        """What to call a rank."""
        return self.rank_names[rank] if rank < len(self.rank_names) else f"rank {rank}"

    def only(self, ranks: Container[int]) -> Timeline:
        """The same step with nothing but some of its ranks."""
        return replace(
            self,
            spans=tuple(span for span in self.spans if span.rank in ranks),
            memory=tuple(sample for sample in self.memory if sample.rank in ranks),
        )

    def lanes(self) -> Iterator[tuple[int, str, tuple[Span, ...]]]:
        """(rank, stream, spans in order of start) for each stream that has spans."""
        ordered = sorted(self.spans, key=lambda s: (s.rank, STREAMS.index(s.stream), s.start_s))
        for (rank, stream), spans in groupby(ordered, key=attrgetter("rank", "stream")):
            yield rank, stream, tuple(spans)


def busy_s(spans: Iterable[Span]) -> float:
    """Time covered by at least one of the spans.

    >>> busy_s([Span(0, "compute", "a", 0.0, 2.0, "forward"), Span(0, "tp", "b", 1.0, 3.0, "tp")])
    3.0
    """
    return sum(end - start for start, end in merged((s.start_s, s.end_s) for s in spans))


def merged(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Intervals united where they touch or overlap, in order.

    >>> merged([(2, 3), (0, 1), (1, 1.5)])
    [(0, 1.5), (2, 3)]
    """
    united: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if united and start <= united[-1][1]:
            united[-1] = (united[-1][0], max(united[-1][1], end))
        else:
            united.append((start, end))
    return united


# Where several kinds of work run at once, wall time is given to the first of these.
_BREAKDOWN = (
    ("compute", ("forward", "backward", "input_grad", "weight_grad", "recompute")),
    ("tp_exposed", ("tp",)),
    ("cp_exposed", ("cp",)),
    ("ep_exposed", ("ep",)),
    ("pp_exposed", ("pp",)),
    ("dp_exposed", ("dp",)),
    ("optimizer", ("optimizer",)),
    ("overhead", ("host",)),
)


def rank_breakdowns_s(timeline: Timeline) -> dict[int, dict[str, float]]:
    """Wall time of each rank by what it is spent on; every rank's parts add up to the step time.

    Each instant is given to one key: compute first, then communication by kind (so only its exposed part
    counts), then optimizer and host overhead; what is left is the bubble.
    """
    by_rank: dict[int, list[Span]] = {}
    for span in timeline.spans:
        by_rank.setdefault(span.rank, []).append(span)
    step_s = timeline.end_s
    found: dict[int, dict[str, float]] = {}
    for rank, spans in sorted(by_rank.items()):
        parts = found[rank] = dict.fromkeys((key for key, _ in _BREAKDOWN), 0.0)
        covered: list[tuple[float, float]] = []
        covered_s = 0.0
        for key, kinds in _BREAKDOWN:
            own = [(span.start_s, span.end_s) for span in spans if span.kind in kinds]
            if own:
                covered = merged([*covered, *own])
                now_s = sum(end - start for start, end in covered)
                parts[key] = now_s - covered_s
                covered_s = now_s
        parts["bubble"] = max(0.0, step_s - covered_s)
    return found


def breakdown_s(timeline: Timeline) -> dict[str, float]:
    """Step time by what it is spent on: means over ranks of `rank_breakdowns_s`, adding up to it."""
    copies = dict(enumerate(timeline.copies))
    by_rank = rank_breakdowns_s(timeline)
    num_ranks = max(1, sum(copies.get(rank, 1) for rank in by_rank))
    means = {
        key: sum(copies.get(rank, 1) * parts[key] for rank, parts in by_rank.items()) / num_ranks
        for key, _ in _BREAKDOWN
    }
    return means | {"bubble": max(0.0, timeline.end_s - sum(means.values()))}


def transfers(spans: Iterable[Span]) -> list[tuple[Span, Span]]:
    """The two ends of each pipeline transfer: (send, receive), in order of the send.

    Both ends bear the name of the action whose result travels. A measured end may show as several spans,
    such as the call and the wait for it: a send begins with its first, a receive ends with its last.
    Replicas of the pipeline have the same names; they pair in order of rank, since the ranks of every
    stage count their replicas alike.
    """
    sends: dict[str, dict[int, Span]] = {}
    receives: dict[str, dict[int, Span]] = {}
    for span in sorted(spans, key=attrgetter("start_s")):
        if span.stream.startswith("pp_send"):
            sends.setdefault(span.name, {}).setdefault(span.rank, span)
        elif span.stream.startswith("pp_recv"):
            receives.setdefault(span.name, {})[span.rank] = span
    pairs: list[tuple[Span, Span]] = []
    for name, senders in sends.items():
        receivers = receives.get(name, {})
        if len(senders) == len(receivers):
            pairs += zip(
                (span for _, span in sorted(senders.items())),
                (span for _, span in sorted(receivers.items())),
                strict=True,
            )
    return sorted(pairs)
