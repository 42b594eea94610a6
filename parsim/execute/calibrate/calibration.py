"""`parsim calibrate`: microbenchmarks of this machine, as a hardware profile.

calibrate() starts one worker a rank (parsim.execute.calibrate.worker), all busy at once as in training,
merges what they timed and builds the Cluster that predictions for this machine use.
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from parsim.errors import ParsimError
from parsim.execute.calibrate.host import TYPICAL_S, measure_host
from parsim.execute.calibrate.points import DTYPES, ESSENTIAL, Point, points
from parsim.execute.calibrate.profile import TimedPoint, cluster_of, cpu_facts
from parsim.execute.calibrate.ranks import listen
from parsim.execute.devices import require_torch, usable_cores
from parsim.hardware import Cluster

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A measured machine."""

    cluster: Cluster
    timed: tuple[TimedPoint, ...]
    torch_version: str
    date: str
    elapsed_s: float
    complete: bool
    """Whether every point was timed; False when the time was spent or the run interrupted before."""


def calibrate(
    *,
    device: Literal["cpu", "cuda"],
    ranks: int,
    budget_s: float = 90.0,
    progress: Progress | None = None,
) -> Calibration:
    """Time this machine's kernels and collectives with `ranks` devices busy at once.

    `budget_s` is for everything; a small one gives a coarser profile, never less than the essential
    points. `progress` is told what is timed and the share done. Ctrl-C gives what there is so far, as
    long as the essential points are in; else KeyboardInterrupt goes on.

    Raises ParsimError for impossible arguments, and when a rank dies or hangs.
    """
    _check(device, ranks, budget_s)
    start = time.monotonic()
    cores = usable_cores()
    # The executor on CPUs computes on the host, so there its host times count as much as kernels.
    host_budget_s = TYPICAL_S if device == "cpu" and budget_s >= 2 * TYPICAL_S else 0.0
    deadline = start + 0.95 * (budget_s - host_budget_s)
    config = {"device": device, "dtypes": DTYPES[device], "deadline": deadline}
    configs = [{**config, "core": cores[rank % len(cores)]} for rank in range(ranks)]
    plan = points(device, ranks, DTYPES[device])
    lines: dict[int, list[dict[str, Any]]] = defaultdict(list)
    head: dict[str, Any] = {}
    interrupted = False
    try:
        for rank, line in listen(configs):
            if "point" not in line:
                head = line if rank == 0 else head
                continue
            lines[line["point"]].append(line)
            if progress is not None and rank == 0:
                done = max(line["point"] / len(plan), (time.monotonic() - start) / budget_s)
                progress(_label(plan[line["point"]]), min(done, 1.0))
    except KeyboardInterrupt:
        interrupted = True
        essential = sum(point.level == ESSENTIAL for point in plan)
        if sum(len(lines[at]) == ranks for at in range(essential)) < essential:
            raise
    timed = tuple(_merged(plan[at], lines[at]) for at in sorted(lines) if len(lines[at]) == ranks)
    facts = head["facts"] or cpu_facts(ranks)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    cluster = cluster_of(device, ranks, facts, timed, torch_version=head["torch"], date=date)
    host_timed = host_budget_s == 0.0
    if host_budget_s and not interrupted:
        if progress is not None:
            progress("host", 1 - host_budget_s / budget_s)
        with suppress(KeyboardInterrupt):  # the kernels are in
            cluster, host_timed = with_host(cluster), True
    return Calibration(
        cluster=cluster,
        timed=timed,
        torch_version=head["torch"],
        date=date,
        elapsed_s=time.monotonic() - start,
        complete=len(timed) == len(plan) and host_timed,
    )


def with_host(cluster: Cluster) -> Cluster:
    """The profile with this machine's host times in every mode of the executor."""
    measured = cluster.kernels.measured_host
    assert measured is not None
    source = ", ".join(measured.source.split(", ")[:2])
    host = measure_host(measured.op_s, source, measured.date, cluster=cluster)
    return replace(cluster, kernels=replace(cluster.kernels, measured_host=host))


def _check(device: str, ranks: int, budget_s: float) -> None:
    require_torch()
    if device not in DTYPES:
        raise ParsimError("unknown device", where="device", got=device, expected="cpu or cuda")
    if ranks < 1:
        raise ParsimError("at least one rank is needed", where="ranks", got=ranks)
    if not budget_s > 0:
        raise ParsimError("the time to spend must be positive", where="budget_s", got=budget_s)
    cores = len(usable_cores())
    if device == "cpu" and ranks > cores:
        raise ParsimError(
            "more ranks than cores would time each other's waiting",
            where="ranks",
            got=ranks,
            expected=f"at most {cores}",
        )
    if device == "cuda":
        import torch

        if torch.cuda.device_count() < ranks:
            raise ParsimError(
                "there are fewer GPUs than ranks",
                where="ranks",
                got=ranks,
                expected=f"at most {torch.cuda.device_count()}",
            )


def _label(point: Point) -> str:
    return " ".join(filter(None, (point.family, point.variant, point.dtype)))


def _merged(point: Point, lines: Sequence[Mapping[str, Any]]) -> TimedPoint:
    return TimedPoint(
        point=point,
        # Four digits are more than the repeats agree on, and keep the profile readable.
        seconds=float(f"{statistics.fmean(line['seconds'] for line in lines):.4g}"),
        spread=round(max(line["spread"] for line in lines), 4),
        repeats=min(line["repeats"] for line in lines),
        disturbed=sum(line["disturbed"] for line in lines),
    )
