"""Timed steps: which were disturbed, and which one stands for all. Standard library only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from parsim.errors import ParsimError

MIN_CLEAN_STEPS = 3
FOREIGN_SHARE = 0.05
"""Share of a step that other processes may keep one core busy before the step counts as disturbed."""
FOREIGN_FLOOR_S = 0.03
"""Three ticks of /proc/stat, in which CPU time is counted: less than that tells nothing."""

SLOW_FACTOR = 3.0
"""How many times as long as others a rank computes before it is called slow."""
SLOW_FLOOR_S = 0.02
"""Two ticks of a scheduler: less than that more is nothing to speak of."""
REMEMBERED_STEPS = 20


class StepRecord(NamedTuple):
    """One step over all ranks."""

    time_s: float
    """From the first rank's start to the last one's end."""
    loss: float
    """Mean over the global batch."""
    foreign_cpu_s: float
    """CPU time that processes other than the ranks used meanwhile, on all cores."""
    settling: bool = False
    """One of the first steps after the ranks were started, which take longer."""

    @property
    def disturbed(self) -> bool:
        """Whether others used enough of the machine to have slowed the step down."""
        return self.foreign_cpu_s > max(FOREIGN_FLOOR_S, FOREIGN_SHARE * self.time_s)


def clean_steps(steps: Sequence[StepRecord]) -> list[int]:
    """Steps that nothing disturbed; all of them where fewer than three are clean."""
    clean = [i for i, step in enumerate(steps) if not step.disturbed and not step.settling]
    return clean if len(clean) >= MIN_CLEAN_STEPS else list(range(len(steps)))


def median_step(steps: Sequence[StepRecord], *, among: int | None = None) -> int:
    """The step nearest to the median time of the clean ones, of the last `among` steps.

    >>> median_step([StepRecord(t, 0.0, 0.0) for t in (3.0, 1.0, 2.0)])
    2
    """
    clean = clean_steps(steps)
    middle = statistics.median(steps[i].time_s for i in clean)
    last = range(0 if among is None else max(0, len(steps) - among), len(steps))
    eligible = [i for i in clean if i in last] or last
    return min(eligible, key=lambda i: (abs(steps[i].time_s - middle), i))


class NotFinite(ParsimError):  # noqa: N818 - as in "the loss is not finite"
    """A loss that is not finite; all ranks raise it alike."""


class Speeds:
    """Tells ranks that compute far slower than others with the same work, or than they did before."""

    def __init__(self, peers: int) -> None:
        """`peers`: ranks that follow one another and have the same work, those of a pipeline stage."""
        self._peers = peers
        self._history: list[tuple[float, ...]] = []

    def slow(self, working_s: Sequence[float]) -> dict[int, float]:
        """By how much, for each rank that is slow in this step, from the time that each computed.

        >>> Speeds(2).slow([1.0, 9.0, 4.0, 4.0])
        {1: 9.0}
        """
        usual_s = [self._usual_s(rank, working_s) for rank in range(len(working_s))]
        found = {
            rank: mine / usual
            for rank, (mine, usual) in enumerate(zip(working_s, usual_s, strict=True))
            if mine - usual > SLOW_FLOOR_S and mine > SLOW_FACTOR * usual
        }
        self._history = [*self._history[1 - REMEMBERED_STEPS :], tuple(working_s)]
        return found

    def _usual_s(self, rank: int, working_s: Sequence[float]) -> float:
        first = rank - rank % self._peers
        others = [working_s[r] for r in range(first, first + self._peers) if r != rank]
        others = others or [before[rank] for before in self._history]
        return statistics.median(others) if others else math.inf
