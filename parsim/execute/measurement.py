"""What a run on real ranks found: Measurement and Verification."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from parsim.cost.collective import wire_factor
from parsim.errors import NothingFits
from parsim.execute.request import Case
from parsim.execute.steps import StepRecord, clean_steps
from parsim.plan import Job, ParallelPlan
from parsim.timeline import STREAMS, Span, Timeline

TOLERANCE = 1e-10
"""Relative error in float64 up to which two trainings count as equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a run on parameter servers found beside its steps."""

    servers: int
    worker_steps_per_s: float
    """Of all workers together."""
    worker_time: dict[str, float]
    """Shares of the workers' time: computing, communicating (servers' work included), waiting."""
    max_lead: int
    """Clocks that a worker was ahead of the slowest at most, once a server had its gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Timed steps of a plan on real ranks."""

    job: Job
    plan: ParallelPlan
    step_time_s: float
    """Median of this plan's steps that nothing disturbed, without warm-up."""
    steps_s: tuple[float, ...]
    """Every step after the warm-up: from the first rank's start to the last one's end. A run that began
    at a checkpoint has the steps before it too, even where another plan took them."""
    loss: tuple[float, ...]
    """Mean over the global batch, of the same steps."""
    disturbed: tuple[bool, ...]
    """Steps during which other processes used this machine's cores."""
    foreign_cpu_s: tuple[float, ...]
    """CPU time they used, of all cores."""
    spread: float
    """(slowest − fastest) / median of the undisturbed steps."""
    timeline: Timeline
    """Of the step nearest to the median; rank is the global rank."""
    gradient_sent_bytes: tuple[float, ...]
    """What each rank sent in a step to sum compressed gradients, counted; empty without compression."""
    weight_versions: tuple[int, ...]
    """The most that each rank kept at once, without a flush; else empty."""
    staleness: tuple[dict[int, int], ...]
    """How often each rank's gradients were so many updates old when they were applied; else empty."""
    loss_scale: dict[str, float]
    """In fp16 the steps left out (`skipped_steps`) and the scale at the end (`final`); else empty."""
    served: Served | None = None
    """With parameter servers."""
    peak_memory_bytes: tuple[int, ...]
    """The CUDA allocator's peak on each rank; empty on a CPU."""
    world_size: int
    warmup: int
    seed: int
    dtype: str
    device: str
    """cpu or cuda."""
    machine: str
    torch_version: str
    resumed_at: int
    """Steps, warm-up counted, of the checkpoint that the run began at; 0: none."""
    failures: tuple[str, ...]
    """Why ranks were started again, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """A plan against training of which the result is known, in float64."""

    max_gradient_error: float
    """max |Δg| / max |g| of the worst parameter in any step."""
    parameter: str
    """Which parameter that was."""
    max_loss_error: float
    """|Δloss| / loss of the worst step."""
    steps: int
    against: str
    """What the plan was compared with."""

    @property
    def equal(self) -> bool:
        """Whether both trainings are the same, but for rounding."""
        return all(error <= TOLERANCE for error in (self.max_gradient_error, self.max_loss_error))


def measurement_of(
    case: Case, ranks: Sequence[dict[str, Any]], device: str, failures: tuple[str, ...]
) -> Measurement:
    """The Measurement of a case, from what each rank left."""
    first = ranks[0]
    steps = [StepRecord(**step) for step in first["steps"]]
    timed = steps[first["timed_from"] :]
    clean = [timed[i].time_s for i in clean_steps(timed)]
    middle = statistics.median(clean)
    return Measurement(
        job=case.job,
        plan=case.plan,
        step_time_s=middle,
        steps_s=tuple(step.time_s for step in steps),
        loss=tuple(step.loss for step in steps),
        disturbed=tuple(step.disturbed for step in steps),
        foreign_cpu_s=tuple(step.foreign_cpu_s for step in steps),
        spread=(max(clean) - min(clean)) / middle,
        timeline=_timeline(ranks, case),
        gradient_sent_bytes=tuple(
            _sent_bytes(r["gradient_payload_bytes"], case.plan.dp * case.plan.cp)
            for r in ranks
            if r["gradient_payload_bytes"]
        ),
        weight_versions=tuple(r["weight_versions"] for r in ranks if "weight_versions" in r),
        staleness=tuple(
            {int(age): count for age, count in r["staleness"].items()} for r in ranks if "staleness" in r
        ),
        loss_scale=first.get("loss_scale", {}),
        peak_memory_bytes=tuple(r["peak_bytes"] for r in ranks if r["peak_bytes"] is not None),
        world_size=len(ranks),
        warmup=case.warmup,
        seed=case.seed,
        dtype=case.dtype,
        device=device,
        machine=f"{first['device']}, {os.cpu_count()} cores",
        torch_version=first["torch"],
        resumed_at=case.checkpoint.start if case.checkpoint is not None else 0,
        failures=failures,
    )


def _sent_bytes(payload_bytes: dict[str, float], ranks: int) -> float:
    """What a rank sends in collectives of so many bytes (of the full buffers) by kind."""
    return sum(wire_factor(kind, ranks) * num_bytes for kind, num_bytes in payload_bytes.items())


def _timeline(ranks: Sequence[dict[str, Any]], case: Case) -> Timeline:
    """The median step of all ranks."""
    return Timeline(spans=tuple(spans_of(ranks)), source="measured", title=case.plan.short())


def spans_of(ranks: Sequence[dict[str, Any]]) -> list[Span]:
    """The spans that all ranks left, in order."""
    spans = [
        Span(rank, stream, name, start_s, end_s, kind, stage, micro_batch)
        for rank, found in enumerate(ranks)
        for stream, name, kind, stage, micro_batch, start_s, end_s in found["spans"]
    ]
    return sorted(
        spans, key=lambda span: (span.rank, STREAMS.index(span.stream), span.start_s, span.end_s)
    )


def worst(errors: Iterable[tuple[float, str]]) -> tuple[float, str]:
    """The largest of some errors and what it is of; what is not a number is larger than all numbers.

    max() alone would pass over a NaN, which is neither larger nor smaller than anything.

    >>> worst([(1e-16, "a"), (float("nan"), "b"), (0.5, "c")])
    (nan, 'b')
    """
    return max(errors, key=lambda found: (math.isnan(found[0]), found[0]))


def verification_of(ranks: Sequence[dict[str, Any]]) -> Verification:
    """The Verification of a case, from what each rank left.

    Raises NothingFits where an error is not finite: nothing equals what is not a number.
    """
    error, parameter = worst((found["max_gradient_error"], found["parameter"]) for found in ranks)
    loss_error, _ = worst((found["max_loss_error"], "loss") for found in ranks)
    if not (math.isfinite(error) and math.isfinite(loss_error)):
        raise NothingFits(
            "the plan cannot be called equal: gradients or losses are no longer finite",
            where=parameter,
            got=f"gradients off by {error:g}, loss by {loss_error:g}",
            expected=f"at most {TOLERANCE:g} in float64",
        )
    return Verification(
        max_gradient_error=error,
        parameter=parameter,
        max_loss_error=loss_error,
        steps=ranks[0]["steps"],
        against=ranks[0]["against"],
    )
