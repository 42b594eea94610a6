"""A predicted step against a measured one, span by span: by part, cause, kind, rank and action."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from parsim.compare.causes import IMBALANCE, REST, Cause, causes_of
from parsim.compare.steps import Difference, StepComparison, compare_steps
from parsim.compare.waiting import fair_breakdowns_s, without_waiting
from parsim.plan import ParallelPlan
from parsim.schedule.program import Program
from parsim.timeline import COMPUTE, Timeline, rank_breakdowns_s
from parsim.units import format_duration

_ACTION = re.compile(r"(\d+[FBIW])\d+$")
"""An action without its micro-batch."""
ENOUGH, NEARLY_ALL, MOST_NAMED = 0.75, 0.95, 3
"""A sentence names causes until they explain this share of an error, and so many at most."""
SMALL = 0.005
"""An error below this share of the step needs no cause."""
WORDS = {
    "compute": "compute",
    "tp": "tensor-parallel communication",
    "cp": "context-parallel communication",
    "ep": "expert-parallel communication",
    "pp": "pipeline transfers",
    "dp": "data-parallel communication",
    "optimizer": "optimizer",
    "overhead": "host overhead",
    IMBALANCE: "waiting for slower peers",
    REST: "order and gaps",
}
"""What the keys of causes are called in a sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KindRow:
    """All spans of a kind, mean over ranks."""

    kind: str
    predicted_s: float
    measured_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRow:
    """One rank's step by the keys of the breakdown."""

    rank: int
    parts: tuple[Difference, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionRow:
    """Actions of one kind of one stage, over micro-batches and replicas."""

    name: str
    """Such as "2F", or "optimizer 2" for pipeline rank 2."""
    number: int
    predicted_s: float
    """Mean of one."""
    measured_s: float
    fastest_s: float
    slowest_s: float
    slowest: str
    """Which one that was, such as "rank 3 2F7"."""

    @property
    def difference_s(self) -> float:
        return self.predicted_s - self.measured_s


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemisedComparison:
    """A step's error, itemised in several ways."""

    whole: StepComparison
    causes: tuple[Cause, ...] = ()
    """In order of replay. They and the following are empty where the spans of a step are not known."""
    kinds: tuple[KindRow, ...] = ()
    ranks: tuple[RankRow, ...] = ()
    actions: tuple[ActionRow, ...] = ()
    """Those that cost or save most in all, the most first."""

    @property
    def verdict(self) -> str:
        """Both step times, and how far the prediction is off."""
        whole = self.whole
        error = f"{abs(whole.error):.1%} too {'long' if whole.error > 0 else 'short'}"
        return (
            f"predicted {format_duration(whole.predicted_s)}, measured "
            f"{format_duration(whole.measured_s)}: {error}"
        )

    @property
    def finding(self) -> str:
        """The answer in a sentence."""
        return ", ".join(filter(None, (self.verdict, self.because)))

    @property
    def because(self) -> str:
        """What makes the step time err, in words; empty where nothing needs to be said."""
        return _because(self.whole, self.causes)

    def to_data(self) -> dict[str, Any]:
        """The answer of `validate PREDICTION MEASUREMENT --json`."""
        return self.whole.to_data() | {
            "finding": self.finding,
            "causes": [
                asdict(cause) | {"share_of_error": cause.difference_s / self.whole.measured_s}
                for cause in self.causes
            ],
            "kinds": [asdict(row) for row in self.kinds],
            "ranks": [
                {
                    "rank": row.rank,
                    "predicted_s": {part.what: part.predicted_s for part in row.parts},
                    "measured_s": {part.what: part.measured_s for part in row.parts},
                }
                for row in self.ranks
            ],
            "actions": [asdict(row) | {"difference_s": row.difference_s} for row in self.actions],
        }


def itemise(
    predicted: Timeline,
    measured: Timeline,
    plan: ParallelPlan,
    *,
    predicted_s: float,
    measured_s: float,
    program: Program,
) -> ItemisedComparison:
    """Compare two timelines of the same plan; both have global ranks.

    The measured timeline is that of one step and `measured_s` the median of many: its times are scaled
    to that. `program` is the prediction's, with a rank for each pipeline rank.
    """
    ranks = sorted(set(predicted.ranks) & set(measured.ranks))
    measured = _scaled(measured, measured_s / measured.end_s)
    by_rank = rank_breakdowns_s(predicted), fair_breakdowns_s(measured, plan)
    means = [_mean([found[rank] for rank in ranks]) for found in by_rank]
    return ItemisedComparison(
        whole=compare_steps(predicted_s, means[0], measured_s, means[1]),
        causes=causes_of(program, plan, measured, measured_s),
        kinds=_kinds(predicted, without_waiting(measured, plan), ranks),
        ranks=tuple(
            RankRow(rank=rank, parts=_differences(by_rank[0][rank], by_rank[1][rank])) for rank in ranks
        ),
        actions=_actions(predicted, measured, plan),
    )


def _because(whole: StepComparison, causes: Sequence[Cause]) -> str:
    """The largest causes that make the prediction err the way it does, and the one that hides most."""
    if not causes or abs(whole.error) < SMALL:
        return ""
    difference_s = whole.predicted_s - whole.measured_s
    by_share = sorted(causes, key=lambda cause: -cause.difference_s / difference_s)
    named: list[Cause] = []
    for cause in by_share[:MOST_NAMED]:
        explained = sum(other.difference_s for other in named) / difference_s
        if explained < ENOUGH and cause.difference_s / difference_s > 0:
            named.append(cause)
    share = sum(cause.difference_s for cause in named) / difference_s
    text = "because of " if share > NEARLY_ALL else "mostly because of "
    text += ", then ".join(_in_words(cause, whole) for cause in named)
    against = by_share[-1]
    if against.difference_s / difference_s < 0 and abs(against.difference_s) > SMALL * whole.measured_s:
        of_step = against.difference_s / whole.measured_s
        text += f"; {WORDS[against.what]} hides some of it ({of_step:+.1%})"
    return text


def _in_words(cause: Cause, whole: StepComparison) -> str:
    text = f"{WORDS[cause.what]} ({cause.difference_s / whole.measured_s:+.1%} of the step"
    if cause.predicted_work_s and cause.measured_work_s:
        text += f", {cause.measured_work_s / cause.predicted_work_s:.2f} times what was predicted"
    return text + ")"


def _scaled(timeline: Timeline, factor: float) -> Timeline:
    """The same spans, all so much longer."""
    spans = tuple(
        span._replace(start_s=factor * span.start_s, end_s=factor * span.end_s)
        for span in timeline.spans
    )
    return replace(timeline, spans=spans)


def _mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    keys = {key: None for row in rows for key in row}
    return {key: fmean(row.get(key, 0.0) for row in rows) for key in keys}


def _differences(predicted: dict[str, float], measured: dict[str, float]) -> tuple[Difference, ...]:
    keys = list(dict.fromkeys((*predicted, *measured)))
    return tuple(
        Difference(what=key, predicted_s=predicted.get(key, 0.0), measured_s=measured.get(key, 0.0))
        for key in keys
    )


def _kinds(predicted: Timeline, measured: Timeline, ranks: Iterable[int]) -> tuple[KindRow, ...]:
    """Time of the spans of each kind on the mean rank, one span beside another or not."""
    wanted = frozenset(ranks)
    totals: list[dict[str, float]] = []
    for timeline in (predicted, measured):
        total_s: dict[str, float] = defaultdict(float)
        for span in timeline.spans:
            if span.rank in wanted:
                total_s[span.kind] += span.duration_s / len(wanted)
        totals.append(total_s)
    return tuple(
        KindRow(kind=kind, predicted_s=totals[0].get(kind, 0.0), measured_s=totals[1].get(kind, 0.0))
        for kind in dict.fromkeys((*totals[0], *totals[1]))
    )


def _actions(predicted: Timeline, measured: Timeline, plan: ParallelPlan) -> tuple[ActionRow, ...]:
    """Work on compute streams that both name, by stage and kind."""
    totals = [_compute_s(timeline) for timeline in (predicted, measured)]
    groups: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for rank, name in totals[0].keys() & totals[1].keys():
        match = _ACTION.match(name)
        kind = match[1] if match else f"{name} {plan.coordinate(rank).pp}"
        groups[kind].append((rank, name))
    rows = []
    for kind, members in groups.items():
        rank, name = max(members, key=lambda member: (totals[1][member], member))
        measured_s = [totals[1][member] for member in members]
        rows.append(
            ActionRow(
                name=kind,
                number=len(members),
                predicted_s=fmean(totals[0][member] for member in sorted(members)),
                measured_s=fmean(sorted(measured_s)),
                fastest_s=min(measured_s),
                slowest_s=max(measured_s),
                slowest=f"rank {rank} {name}",
            )
        )
    return tuple(sorted(rows, key=lambda row: (-abs(row.number * row.difference_s), row.name)))


def _compute_s(timeline: Timeline) -> dict[tuple[int, str], float]:
    """What each rank computed, by name."""
    total_s: dict[tuple[int, str], float] = defaultdict(float)
    for span in timeline.spans:
        if span.stream == COMPUTE:
            total_s[span.rank, span.name] += span.duration_s
    return total_s
