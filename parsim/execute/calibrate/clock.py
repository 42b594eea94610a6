"""Timing a call well on a machine that others use too.

A call is repeated; repeats in which this process had to wait for its core are told by the scheduler's
own count and left out; what remains is summed up by its median. Standard library and torch only.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch

SAMPLE_S = 1e-3
"""Short calls are put together until a repeat lasts this long: the clock's own cost is nothing then."""
MIN_REPEATS = 5
MAX_REPEATS = 40
MAX_ROUNDS = 3
"""Rounds of repeats that a disturbed measurement may take …"""
MOST_S = 0.3
"""… as long as they take no longer than this together."""
MOST_WAITING = 0.02
"""Share of a repeat spent waiting for a core above which the repeat is disturbed."""
MOST_WAITING_ON_PEERS = 0.5
"""The same for calls between ranks: gloo's own threads take turns on a core, 0.2–0.45 undisturbed."""

Agree = Callable[[list[float]], list[float]]
"""The largest of the values that the ranks give, one by one: all ranks leave it together."""


class Timing(NamedTuple):
    """What the repeats of one call say."""

    seconds: float
    """Median over undisturbed repeats; where nearly all were disturbed, over the least disturbed quarter
    with the time spent waiting taken off (calls between ranks: over the fastest tenth)."""
    spread: float
    """Interquartile range of those repeats over their median."""
    repeats: int
    disturbed: int
    """Repeats left out because something else held the core."""


class Sample(NamedTuple):
    """One repeat: seconds of one call in it, and the share of its time spent waiting for a core."""

    seconds: float
    waiting: float


def time_call(
    call: Callable[[], object], *, agree: Agree, cuda: bool, peers: bool, target_s: float = 0.06
) -> Timing:
    """Time `call`, with the same number of calls on every rank so that all stay busy together.

    `peers`: the call waits for other ranks. `target_s`: how long the repeats of a round should take.
    """
    call()
    with _scheduler(peers) as waited_s:

        def take(inner: int) -> Sample:
            return _take_cuda(call, inner) if cuda else _take_cpu(call, inner, waited_s)

        once_s = agree([take(2).seconds])[0]
        inner = max(1, math.ceil(SAMPLE_S / once_s))
        repeats = min(MAX_REPEATS, max(MIN_REPEATS, int(target_s / (inner * once_s))))
        rounds = max(1, min(MAX_ROUNDS, int(MOST_S / (repeats * inner * once_s))))
        samples: list[Sample] = []
        for _ in range(rounds):
            agree([0.0])
            taken = [take(inner) for _ in range(repeats)]
            if peers:  # who waits for a peer that has no core is disturbed as well
                waiting = agree([sample.waiting for sample in taken])
                taken = [Sample(s.seconds, w) for s, w in zip(taken, waiting, strict=True)]
            samples += taken
            clean = sum(sample.waiting <= _limit(peers) for sample in samples)
            if agree([float(clean < MIN_REPEATS)]) == [0.0]:
                break
    return summary(samples, peers=peers)


def _limit(peers: bool) -> float:
    return MOST_WAITING_ON_PEERS if peers else MOST_WAITING


def summary(samples: Sequence[Sample], *, peers: bool) -> Timing:
    """Median and spread of the undisturbed samples, or the best that disturbed ones can tell.

    >>> quiet, loaded = [Sample(t, 0.0) for t in (1.0, 2.0, 3.0, 4.0, 5.0)], Sample(9.0, 0.5)
    >>> summary([*quiet, loaded], peers=False)
    Timing(seconds=3.0, spread=0.6666666666666666, repeats=5, disturbed=1)
    >>> summary([loaded] * 8, peers=False).seconds, summary([loaded] * 8, peers=True).seconds
    (4.5, 9.0)
    """
    kept = sorted(sample.seconds for sample in samples if sample.waiting <= _limit(peers))
    disturbed = len(samples) - len(kept)
    if len(kept) < MIN_REPEATS:
        if peers:
            kept = sorted(sample.seconds for sample in samples)[: max(2, len(samples) // 10)]
        else:
            least = sorted(samples, key=lambda sample: sample.waiting)[: max(2, len(samples) // 4)]
            kept = [sample.seconds * (1 - sample.waiting) for sample in least]
    median = statistics.median(kept)
    low, _, high = statistics.quantiles(kept, n=4, method="inclusive")
    return Timing(median, (high - low) / median, len(kept), disturbed)


def _take_cpu(call: Callable[[], object], inner: int, waited_s: Callable[[], float]) -> Sample:
    waited = waited_s()
    start = time.perf_counter()
    for _ in range(inner):
        call()
    spent = time.perf_counter() - start
    return Sample(spent / inner, min(1.0, (waited_s() - waited) / spent))


def _take_cuda(call: Callable[[], object], inner: int) -> Sample:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(inner):
        call()
    end.record()
    end.synchronize()
    return Sample(start.elapsed_time(end) * 1e-3 / inner, 0.0)


@contextmanager
def _scheduler(peers: bool) -> Iterator[Callable[[], float]]:
    """Gives the seconds so far that this thread was ready to run but had no core.

    With `peers` the sum over the threads of this process: gloo sends and receives in its own.

    Source: Linux Documentation/scheduler/sched-stats.rst, /proc/<pid>/schedstat: time on the CPU, time
    waiting on a run queue (both ns), time slices. Where there is no such file, nothing is ever waited.
    """
    tasks = "self/task/*/schedstat" if peers else "thread-self/schedstat"
    with ExitStack() as stack:
        files = []
        for path in sorted(Path("/proc").glob(tasks)):
            with suppress(OSError):  # a thread may end between being listed and being opened
                files.append(os.open(path, os.O_RDONLY))
                stack.callback(os.close, files[-1])

        def waited_s() -> float:
            waited_ns = 0
            for file in files:
                with suppress(OSError):  # or before being read
                    waited_ns += int(os.pread(file, 64, 0).split()[1])
            return waited_ns * 1e-9

        yield waited_s
