"""A long run with failures and checkpoints, by discrete-event simulation.

The events are failures, repairs and restarts. Checkpoints change none of them, only how much of the run
before a failure is lost: so a history is simulated once, and `time_split` says what any checkpoint
interval would have made of it.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import simpy

from parsim.cost.checkpoint import Checkpointing, Failures, best_interval_s, expected_goodput

Phase = Literal["running", "restarting", "waiting"]

MAX_FAILURES = 5000
"""A simulated history is cut after about so many failures, where the shares of the time are settled."""
INTERVALS = 161
"""Checkpoint intervals that are tried for the best one, over two decades."""


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What failures made of a long run, whatever its checkpoints."""

    duration_s: float
    runs_s: tuple[float, ...]
    """Uninterrupted runs, each ended by a failure."""
    last_run_s: float
    """The run that was going on at the end; 0 where the job was restarting or waiting."""
    restarting_s: float
    waiting_s: float
    failures: int
    """Also those that struck a restart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeSplit:
    """Where the wall time of a long run went; the parts add up to it."""

    training: float
    """Work that was kept, in seconds like all parts."""
    lost_work: float
    checkpointing: float
    """Training stopped by checkpoints, also by those that were never finished."""
    restarting: float
    waiting: float
    """Stopped until a node is repaired."""

    @property
    def total_s(self) -> float:
        return sum(self.seconds().values())

    @property
    def goodput(self) -> float:
        """Effective training time ratio."""
        return self.training / self.total_s

    def seconds(self) -> dict[str, float]:
        """The parts by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def simulate_history(failures: Failures, duration_s: float, rng: np.random.Generator) -> History:
    """One run of `duration_s`: failures struck, nodes replaced or repaired, the job restarted.

    Nodes fail while they work, not while they stand by or the job waits for one; one fails at a time. A
    failure during a restart begins it anew.
    """
    env = simpy.Environment()
    phases: list[tuple[Phase, float]] = []
    env.process(_job(env, failures, _gaps(failures.mtbf_s, rng), phases))
    env.run(until=duration_s)
    ends = [start_s for _, start_s in phases[1:]] + [duration_s]
    lengths: dict[Phase, list[float]] = {"running": [], "restarting": [], "waiting": []}
    for (phase, start_s), end_s in zip(phases, ends, strict=True):
        lengths[phase].append(end_s - start_s)
    last_run_s = lengths["running"].pop() if phases[-1][0] == "running" else 0.0
    return History(
        duration_s=duration_s,
        runs_s=tuple(lengths["running"]),
        last_run_s=last_run_s,
        restarting_s=math.fsum(lengths["restarting"]),
        waiting_s=math.fsum(lengths["waiting"]),
        failures=len(lengths["waiting"]),
    )


def _gaps(mtbf_s: float, rng: np.random.Generator) -> Iterator[float]:
    while True:
        yield mtbf_s * rng.standard_exponential()


def _job(
    env: simpy.Environment, failures: Failures, gaps: Iterator[float], phases: list[tuple[Phase, float]]
) -> Generator[simpy.Event, None, None]:
    """The job from phase to phase; each is noted when it begins.

    Every failure takes a node away, so a phase of waiting follows, without length where one stands by.
    """
    standby = simpy.Container(env, init=math.inf if failures.spares is None else failures.spares)
    gap_s = next(gaps)
    while True:
        phases.append(("running", env.now))
        yield env.timeout(gap_s)
        while True:
            phases.append(("waiting", env.now))
            env.process(_repair(env, failures.repair_s, standby))
            yield standby.get(1)
            phases.append(("restarting", env.now))
            gap_s = next(gaps)
            yield env.timeout(min(gap_s, failures.restart_s))
            if gap_s >= failures.restart_s:
                gap_s -= failures.restart_s
                break


def _repair(
    env: simpy.Environment, repair_s: float, standby: simpy.Container
) -> Generator[simpy.Event, None, None]:
    yield env.timeout(repair_s)
    yield standby.put(1)


def time_split(history: History, checkpointing: Checkpointing) -> TimeSplit:
    """Where the time of a history went, under some checkpoints.

    A run of t seconds begins at a checkpoint just loaded and goes through cycles of training and
    checkpoint. At a failure it keeps the work up to the last checkpoint whose background write was
    done too. What the last run did is kept: nothing fails at the end.
    """
    train_s, block_s = checkpointing.between_s, checkpointing.blocking_s
    cycle_s = train_s + block_s
    runs_s = np.append(history.runs_s, history.last_run_s)
    cycles = np.floor(runs_s / cycle_s)
    worked_s = cycles * train_s + np.minimum(train_s, runs_s - cycles * cycle_s)
    kept_s = train_s * np.maximum(0.0, np.floor((runs_s - checkpointing.background_s) / cycle_s))
    kept_s[-1] = worked_s[-1]
    return TimeSplit(
        training=math.fsum(kept_s),
        lost_work=math.fsum(worked_s - kept_s),
        checkpointing=math.fsum(runs_s - worked_s),
        restarting=history.restarting_s,
        waiting=history.waiting_s,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """Goodput at one checkpoint interval."""

    interval_s: float
    expected: float
    """By the closed form."""
    simulated: float
    """Mean over the histories."""
    low: float
    high: float
    """5th and 95th percentile over the histories."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRun:
    """What simulated histories of a long run come to."""

    checkpointing: Checkpointing
    failures: Failures
    histories: tuple[History, ...]
    split: TimeSplit
    """Mean over the histories."""
    point: CurvePoint
    """Goodput at the interval that was asked for."""
    curve: tuple[CurvePoint, ...]
    """Goodput over the checkpoint interval, on the same histories."""

    @property
    def best(self) -> CurvePoint:
        """The point of the curve with the greatest simulated goodput."""
        return max(self.curve, key=lambda point: point.simulated)

    @property
    def failures_per_history(self) -> float:
        """Mean number of failures."""
        return sum(history.failures for history in self.histories) / len(self.histories)


def simulate_long_run(
    checkpointing: Checkpointing,
    failures: Failures,
    *,
    duration_s: float,
    runs: int,
    seed: int,
    shortest_interval_s: float = 0.0,
) -> LongRun:
    """`runs` histories from one seed, and what checkpoint intervals around the best make of them.

    No interval of the curve is shorter than `shortest_interval_s` (a step) or than the background part
    of a checkpoint, and none longer than the run. A history ends early, after about MAX_FAILURES.
    """
    duration_s = min(duration_s, MAX_FAILURES * failures.mtbf_s)
    histories = tuple(
        simulate_history(failures, duration_s, np.random.default_rng([seed, run])) for run in range(runs)
    )
    splits = [time_split(history, checkpointing) for history in histories]
    sums = {key: math.fsum(split.seconds()[key] for split in splits) for key in splits[0].seconds()}
    floor_s = max(shortest_interval_s, checkpointing.background_s)
    centre_s = max(best_interval_s(checkpointing.blocking_s, failures.mtbf_s), floor_s)
    intervals = {
        min(max(centre_s * 10 ** (2 * i / (INTERVALS - 1) - 1), floor_s), duration_s)
        for i in range(INTERVALS)
    }
    return LongRun(
        checkpointing=checkpointing,
        failures=failures,
        histories=histories,
        split=TimeSplit(**{key: seconds / runs for key, seconds in sums.items()}),
        point=_point(checkpointing, failures, histories),
        curve=tuple(
            _point(replace(checkpointing, interval_s=interval_s), failures, histories)
            for interval_s in sorted(intervals)
            if interval_s > 0
        ),
    )


def _point(checkpointing: Checkpointing, failures: Failures, histories: Sequence[History]) -> CurvePoint:
    goodputs = [time_split(history, checkpointing).goodput for history in histories]
    low, high = np.quantile(goodputs, (0.05, 0.95))
    return CurvePoint(
        interval_s=checkpointing.interval_s,
        expected=expected_goodput(checkpointing, failures),
        simulated=math.fsum(goodputs) / len(goodputs),
        low=float(low),
        high=float(high),
    )
