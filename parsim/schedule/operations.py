"""What an action does, operation by operation.

A Program knows an action as compute and the communication that is left in its way. Here are the
operations that these are sums of, laid out one after another, and beside them what they hide.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from parsim.cost.cell import Cell
from parsim.cost.price import PartPasses, PassTime, TimedOperation
from parsim.cost.stage import EMBEDDING, HEAD, MTP, CostModel, bare
from parsim.schedule.action import BACKWARD, FORWARD, INPUT_GRAD, WEIGHT_GRAD

Part = tuple[str, PartPasses]
"""A part of the model by its name, and its passes."""


class Step(NamedTuple):
    """One operation of an action."""

    part: str
    """The part of the model: "layer 3", "embedding", "head"."""
    kind: str
    """What its compute is for, as in Span.kind."""
    operation: TimedOperation


class LaidOut(NamedTuple):
    """A step with its place in the action, in seconds from its start."""

    step: Step
    start_s: float
    end_s: float


def stage_parts(
    costs: CostModel,
    cell: Cell,
    split: tuple[int, ...],
    stage: int,
    recompute_layers: tuple[int, ...] = (),
) -> tuple[Part, ...]:
    """The parts of a stage of the model in the order of the forward."""
    layer = sum(split[:stage])
    parts = []
    for kind in list(costs.kinds(split, recompute_layers))[stage]:
        name = bare(kind)
        if name not in (EMBEDDING, MTP, HEAD):
            name, layer = f"layer {layer}", layer + 1
        parts.append((name, costs.passes(cell, kind)))
    return tuple(parts)


def action_steps(parts: Sequence[Part], kind: str, host: PassTime) -> list[Step]:
    """Everything that an action does, in order; `host` is what comes with every action.

    A backward goes through the parts from the last to the first and runs each one's recomputation, then
    the gradient of its input, then those of its weights.
    """
    passes = {
        FORWARD: ("forward",),
        BACKWARD: ("recompute", "input_grad", "weight_grad"),
        INPUT_GRAD: ("recompute", "input_grad"),
        WEIGHT_GRAD: ("weight_grad",),
    }[kind]
    steps = []
    for name, part in parts if kind == FORWARD else reversed(parts):
        for when in passes:
            steps += [Step(name, when, operation) for operation in getattr(part, when)]
    last = passes[-1]
    if host.compute_s:
        steps.append(Step("schedule", last, TimedOperation("host", "compute", host.compute_s)))
    if host.tp_s and kind != WEIGHT_GRAD:
        extremes = TimedOperation("fp8 extremes", "tp", host.tp_s, host.tp_bytes)
        steps.append(Step("schedule", last, extremes))
    return steps


def total_s(steps: Sequence[Step]) -> float:
    """Seconds of an action: of all but what runs beside others."""
    return sum(step.operation.seconds for step in steps if not step.operation.beside)


def laid_out(steps: Sequence[Step]) -> list[LaidOut]:
    """Steps at their times: one after another, and what is beside others from where it stands.

    On its stream such a transfer makes way for those that are in the way of compute, so it may come in
    pieces; where the rest of the action has no room for all of it, some moves before its place.
    """
    places: list[LaidOut] = []
    busy: dict[str, list[tuple[float, float]]] = {}
    beside: list[tuple[Step, float]] = []
    now = 0.0
    for step in steps:
        if step.operation.beside:
            beside.append((step, now))
            continue
        end = now + step.operation.seconds
        places.append(LaidOut(step, now, end))
        if step.operation.stream != "compute":
            busy.setdefault(step.operation.stream, []).append((now, end))
        now = end
    for step, earliest in beside:
        taken = busy.setdefault(step.operation.stream, [])
        for start, end in _free(taken, earliest, step.operation.seconds, now):
            insort(taken, (start, end))
            places.append(LaidOut(step, start, end))
    return sorted(places, key=lambda place: (place.start_s, place.end_s))


def _free(
    busy: Sequence[tuple[float, float]], earliest: float, seconds: float, end_s: float
) -> list[tuple[float, float]]:
    """So many seconds of a stream's free time: from `earliest` on, then before it."""
    gaps = list(_gaps(busy, end_s))
    later = [(max(start, earliest), end) for start, end in gaps if end > earliest]
    before = [(start, min(end, earliest)) for start, end in reversed(gaps) if start < earliest]
    found = []
    for start, end in (*later, *before):
        part_s = min(seconds, end - start)
        if part_s > 0:
            found.append((start, start + part_s))
            seconds -= part_s
    return found


def _gaps(busy: Sequence[tuple[float, float]], end_s: float) -> Iterator[tuple[float, float]]:
    free_from = 0.0
    for start, end in busy:
        if start > free_from:
            yield free_from, start
        free_from = max(free_from, end)
    if free_from < end_s:
        yield free_from, end_s
