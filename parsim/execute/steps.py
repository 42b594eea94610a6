"""Timed steps: which were disturbed, and which one stands for all. Standard library only."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

MIN_CLEAN_STEPS = 3
FOREIGN_SHARE = 0.05
"""Share of a step that other processes may keep one core busy before the step counts as disturbed."""
FOREIGN_FLOOR_S = 0.03
"""Three ticks of /proc/stat, in which CPU time is counted: less than that tells nothing."""


class StepRecord(NamedTuple):
    """One step over all ranks."""

    time_s: float
    """From the first rank's start to the last one's end."""
    loss: float
    """Mean over the global batch."""
    foreign_cpu_s: float
    """CPU time that processes other than the ranks used meanwhile, on all cores."""

    @property
    def disturbed(self) -> bool:
        """Whether others used enough of the machine to have slowed the step down."""
        return self.foreign_cpu_s > max(FOREIGN_FLOOR_S, FOREIGN_SHARE * self.time_s)


def clean_steps(steps: Sequence[StepRecord]) -> list[int]:
    """Steps that nothing disturbed; all of them where fewer than three are clean."""
    clean = [i for i, step in enumerate(steps) if not step.disturbed]
    return clean if len(clean) >= MIN_CLEAN_STEPS else list(range(len(steps)))


def median_step(steps: Sequence[StepRecord]) -> int:
    """The step nearest to the median time of the clean ones.

    >>> median_step([StepRecord(t, 0.0, 0.0) for t in (3.0, 1.0, 2.0)])
    2
    """
    clean = clean_steps(steps)
    middle = statistics.median(steps[i].time_s for i in clean)
    return min(clean, key=lambda i: (abs(steps[i].time_s - middle), i))
