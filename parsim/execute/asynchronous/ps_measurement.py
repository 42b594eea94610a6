"""A run on parameter servers, from what its ranks left: the same figures as `simulate --ps` gives."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from parsim.execute.asynchronous.ps_ledger import PUSH
from parsim.execute.measurement import Measurement, Served, spans_of
from parsim.execute.request import Case
from parsim.execute.steps import StepRecord, clean_steps
from parsim.timeline import Timeline

READY, ALLOWED, PULLED, COMPUTED, APPLIED = range(5)
"""Of the times of a worker's step."""


def served_measurement(
    case: Case, ranks: Sequence[dict[str, Any]], failures: tuple[str, ...]
) -> Measurement:
    """The Measurement of workers and servers.

    A step's time is that in which every worker does one on average: workers over the sum of their rates,
    each worker's step from its beginning to that of its next.
    """
    workers, servers = ranks[: case.plan.dp], ranks[case.plan.dp :]
    counted = slice(case.warmup, None)
    times = [worker["times_ns"][counted] for worker in workers]
    lengths_s = [_lengths_s(own) for own in times]
    run_s = (max(r["end_ns"] for r in ranks) - min(r["start_ns"] for r in ranks)) * 1e-9
    busy_s = max(r["cpu_since_s"][1] for r in ranks)
    foreign = max(0.0, busy_s - sum(r["cpu_since_s"][0] for r in ranks)) / run_s
    losses = [statistics.fmean(step) for step in zip(*(w["losses"] for w in workers), strict=True)]
    steps = [
        StepRecord(step_s, loss, foreign * step_s)
        for step_s, loss in zip(
            (len(own) / sum(1 / s for s in own) for own in zip(*lengths_s, strict=True)),
            losses[counted],
            strict=True,
        )
    ]
    clean = [steps[i].time_s for i in clean_steps(steps)]
    middle = statistics.median(clean)
    first = ranks[0]
    return Measurement(
        job=case.job,
        plan=case.plan,
        step_time_s=middle,
        steps_s=tuple(step.time_s for step in steps),
        loss=tuple(losses[counted]),
        disturbed=tuple(step.disturbed for step in steps),
        foreign_cpu_s=tuple(step.foreign_cpu_s for step in steps),
        spread=(max(clean) - min(clean)) / middle,
        timeline=_timeline(ranks, times[0], lengths_s[0], case),
        gradient_sent_bytes=(),
        weight_versions=(),
        staleness=tuple(_staleness(servers, worker) for worker in range(case.plan.dp)),
        loss_scale={},
        peak_memory_bytes=(),
        served=Served(
            servers=len(servers),
            worker_steps_per_s=sum(len(own) / sum(own) for own in lengths_s),
            worker_time=_worker_time(times, lengths_s),
            max_lead=max(server["max_lead"] for server in servers),
        ),
        world_size=len(ranks),
        resumed_at=0,
        failures=failures,
        warmup=case.warmup,
        seed=case.seed,
        dtype=case.dtype,
        device="cpu",
        machine=f"{first['device']}, {os.cpu_count()} cores",
        torch_version=first["torch"],
    )


def _lengths_s(times: Sequence[Sequence[int]]) -> list[float]:
    """Of a worker's steps, each to the beginning of the next, the last one to its end."""
    ready = [step[READY] for step in times] + [times[-1][APPLIED]]
    return [(later - earlier) * 1e-9 for earlier, later in pairwise(ready)]


def _worker_time(
    times: Sequence[Sequence[Sequence[int]]], lengths_s: Sequence[Sequence[float]]
) -> dict[str, float]:
    """Shares of the workers' time, as the simulation has them."""
    steps = [step for own in times for step in own]
    total_s = sum(map(sum, lengths_s))
    computing = sum(step[COMPUTED] - step[PULLED] for step in steps) * 1e-9 / total_s
    waiting = sum(step[ALLOWED] - step[READY] for step in steps) * 1e-9 / total_s
    return {"computing": computing, "communicating": 1 - computing - waiting, "waiting": waiting}


def _staleness(servers: Sequence[dict[str, Any]], worker: int) -> dict[int, int]:
    """How old a worker's gradients were, counted at every server."""
    ages = Counter(
        age
        for server in servers
        for kind, who, age in server["events"]
        if kind == PUSH and who == worker
    )
    return dict(sorted(ages.items()))


def _timeline(
    ranks: Sequence[dict[str, Any]],
    times: Sequence[Sequence[int]],
    lengths_s: Sequence[float],
    case: Case,
) -> Timeline:
    """What all ranks did during the first worker's step of median length."""
    middle = statistics.median_low(lengths_s)
    began_ns = times[lengths_s.index(middle)][READY]
    spans = []
    for span in spans_of(ranks):
        start_s, end_s = ((at - began_ns) * 1e-9 for at in (span.start_s, span.end_s))
        start_s, end_s = max(0.0, start_s), min(middle, end_s)
        if start_s < end_s:
            spans.append(span._replace(start_s=start_s, end_s=end_s))
    servers = case.world_size - case.plan.dp
    title = f"{case.plan.short()}, {servers} parameter server{'s' * (servers > 1)}"
    return Timeline(spans=tuple(spans), source="measured", title=title)
