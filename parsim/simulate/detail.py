"""A timeline in detail: actions of one rank shown as the operations that they are made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from parsim.cost.cell import cell_of
from parsim.cost.stage import CostModel
from parsim.cost.step import StepCost, mixed_step_cost, step_cost
from parsim.errors import ParsimError
from parsim.plan import ASYNCHRONOUS_SCHEDULES, Job, ParallelPlan, stage_layers
from parsim.schedule.action import Action, Schedule
from parsim.schedule.lower import KIND_NAMES, action_host
from parsim.schedule.operations import LaidOut, action_steps, laid_out, stage_parts, total_s
from parsim.schedule.sync import ReplicaSync, Work
from parsim.timeline import COMPUTE, CP, EP, TP, Span, Timeline

SHARED = "data parallel: its share of compute"
"""The time that communication beside compute takes from it."""
MAX_SPANS = 200_000
"""More operations than this are neither read nor opened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionDetail:
    """One action of one rank, operation by operation."""

    action: Action
    start_s: float
    end_s: float
    spans: tuple[Span, ...]
    """Named "layer 3: fc1": the part of the model, then the operation."""
    hidden_s: Mapping[str, float]
    """Communication beside compute, by stream."""


@dataclass(slots=True)
class StepOperations:
    """The operations of a step's actions, laid out when they are asked for."""

    job: Job
    plan: ParallelPlan
    costs: CostModel
    schedule: Schedule
    costs_by_rank: Sequence[CostModel] = ()
    """Of every pipeline rank, where their devices are not all of one kind."""
    _cost: StepCost = field(init=False)
    _sync: ReplicaSync = field(init=False)
    _paired: frozenset[Action] = field(init=False)
    _shapes: dict[tuple[int, str], list[LaidOut]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        by_rank = self.costs_by_rank
        cost = mixed_step_cost if by_rank else step_cost
        self._cost = cost(self.job, self.plan, by_rank or self.costs)  # type: ignore[arg-type]
        self._sync = ReplicaSync(
            schedule=self.schedule,
            cost=self._cost,
            plan=self.plan,
            stack=self.costs.stack,
            work=Work(chain={rank: [] for rank in range(self.plan.pp)}),
        )
        self._sync.begin()
        ranks = self.schedule.ranks
        self._paired = frozenset(part for actions in ranks for a in actions for part in a.parts)

    def shape(self, stage: int, kind: str) -> list[LaidOut]:
        """The operations of an action, in seconds from its start."""
        if (stage, kind) not in self._shapes:
            rank = self.schedule.stage_ranks()[stage]
            costs = self.costs_by_rank[rank] if self.costs_by_rank else self.costs
            split = stage_layers(self.job.model, self.plan)
            again, at = self.plan.recompute_layers, stage % len(split)
            parts = stage_parts(costs, cell_of(self.job, self.plan), split, at, again)
            host = action_host(self._cost, costs.stack, pp=self.plan.pp)
            self._shapes[stage, kind] = laid_out(action_steps(parts, kind, host))
        return self._shapes[stage, kind]

    def is_paired(self, action: Action) -> bool:
        """Whether an action is half of an overlapped pair, whose operations run in no fixed order."""
        return action in self._paired

    def takes_s(self, action: Action) -> float:
        """What data-parallel communication takes from the compute of an action."""
        return self._sync.cut(action).takes_s


def action_details(
    timeline: Timeline, operations: StepOperations, *, rank: int, micro_batches: int
) -> list[ActionDetail]:
    """The actions of a rank's first micro-batches, in order of start, but for those in overlapped pairs.

    Raises ParsimError for a rank that the timeline does not have, or more than MAX_SPANS operations.
    """
    if rank not in timeline.ranks:
        raise ParsimError(
            "the timeline has no such rank",
            where="--detail-rank",
            got=rank,
            expected=f"one of the {len(timeline.ranks)} ranks from {min(timeline.ranks, default=0)}",
        )
    pieces = {
        action: spans
        for action, spans in _pieces(timeline, operations, rank, micro_batches).items()
        if not operations.is_paired(action)
    }
    expected = sum(len(operations.shape(a.stage, a.kind)) for a in pieces)
    if expected > MAX_SPANS:
        raise ParsimError(
            "these are more operations than anybody reads",
            where="--detail-micro-batches",
            got=f"{expected} operations in {len(pieces)} actions",
            expected=f"at most {MAX_SPANS}",
            hint="take fewer micro-batches",
        )
    waits: dict[str, list[Span]] = defaultdict(list)
    for span in timeline.spans:
        if span.rank == rank and span.stream in (TP, CP, EP):
            waits[span.name].append(span)
    found = [_detail(a, spans, waits[str(a)], operations) for a, spans in pieces.items()]
    # An embedding alone on its stage has no gradient of weights by a product, and no time in W.
    return sorted((detail for detail in found if detail.spans), key=lambda detail: detail.start_s)


def left_out(
    timeline: Timeline, operations: StepOperations, *, rank: int, micro_batches: int
) -> list[Action]:
    """The actions of these micro-batches that are halves of overlapped pairs."""
    found = _pieces(timeline, operations, rank, micro_batches)
    return [action for action in found if operations.is_paired(action)]


def _pieces(
    timeline: Timeline, operations: StepOperations, rank: int, micro_batches: int
) -> dict[Action, list[Span]]:
    """The compute of a rank's first micro-batches, by action.

    A step out of the middle of many begins with any micro-batch, and its ends cut through actions, which
    are left out.
    """
    torn = set()
    if operations.plan.schedule in ASYNCHRONOUS_SCHEDULES:
        end_s = timeline.end_s
        torn = {
            s.name for s in timeline.spans if s.rank == rank and (s.start_s <= 0 or s.end_s >= end_s)
        }
    letters = {name: letter for letter, name in KIND_NAMES.items()}
    compute = [
        span
        for span in timeline.spans
        if span.rank == rank
        and span.stream == COMPUTE
        and span.kind in letters
        and span.name not in torn
    ]
    first = set(sorted({span.micro_batch for span in compute})[:micro_batches])
    pieces: dict[Action, list[Span]] = defaultdict(list)
    for span in compute:
        if span.micro_batch in first:
            pieces[Action(span.stage, letters[span.kind], span.micro_batch)].append(span)
    return pieces


def detailed(timeline: Timeline, details: Sequence[ActionDetail], *, rank: int) -> Timeline:
    """The timeline with the operations of some of a rank's actions in the actions' place."""
    names = {str(detail.action) for detail in details}
    kept = [
        span
        for span in timeline.spans
        if span.rank != rank or span.stream not in (COMPUTE, TP, CP, EP) or span.name not in names
    ]
    spans = [*kept, *(span for detail in details for span in detail.spans)]
    spans.sort(key=lambda span: (span.rank, span.stream, span.start_s, span.end_s))
    return replace(timeline, spans=tuple(spans))


def _detail(
    action: Action, compute: list[Span], waits: list[Span], operations: StepOperations
) -> ActionDetail:
    """Operations at the times of an action that may run in pieces, at another pace than planned."""
    compute = sorted(compute, key=lambda span: span.start_s)
    ends = [span.end_s for span in compute]
    for span in waits:
        piece = max(k for k, one in enumerate(compute) if one.start_s <= span.start_s)
        ends[piece] = max(ends[piece], span.end_s)
    places = operations.shape(action.stage, action.kind)
    windows = [(span.start_s, end) for span, end in zip(compute, ends, strict=True)]
    spans: list[Span] = []
    hidden_s: dict[str, float] = defaultdict(float)
    whole_s = total_s([place.step for place in places])
    takes_s = operations.takes_s(action)
    for place in places:
        step = place.step
        kind = step.kind if step.operation.stream == COMPUTE else step.operation.stream
        name = f"{step.part}: {step.operation.name}"
        like = compute[0]._replace(stream=step.operation.stream, name=name, kind=kind)
        for start, end in _in_pieces(place, windows, whole_s, takes_s):
            spans.append(like._replace(start_s=start, end_s=end))
            if step.operation.beside:
                hidden_s[step.operation.stream] += end - start
    if takes_s:
        for start, end in windows:
            shared_s = (end - start) * takes_s / (whole_s + takes_s)
            share = compute[0]._replace(name=SHARED, kind="dp", start_s=end - shared_s, end_s=end)
            spans.append(share)
    return ActionDetail(
        action=action,
        start_s=windows[0][0],
        end_s=windows[-1][1],
        spans=tuple(spans),
        hidden_s=dict(hidden_s),
    )


def _in_pieces(
    place: LaidOut, windows: Sequence[tuple[float, float]], whole_s: float, takes_s: float
) -> Iterator[tuple[float, float]]:
    """Where an operation runs in an action of `whole_s` that is cut into equal pieces.

    Each piece ends with its share of `takes_s`, what communication beside it takes from its compute.
    """
    each_s = whole_s / len(windows)
    for k, (start, end) in enumerate(windows):
        first, last = max(place.start_s, k * each_s), min(place.end_s, (k + 1) * each_s)
        if last - first > 1e-9 * each_s:
            pace = (end - start) / (each_s + takes_s / len(windows))
            yield start + pace * (first - k * each_s), start + pace * (last - k * each_s)
