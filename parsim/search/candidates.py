"""Candidates: the plans that fit, in order of how fast each can be at best."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from parsim.plan import ParallelPlan
from parsim.search.examine import Examined, Examiner
from parsim.search.layout import Floats, Ints
from parsim.search.space import Family
from parsim.search.workers import Workers

BATCH = 16
"""Plans whose bounds are made tighter at once, and then twice as many each time."""

Chosen = list[tuple[Family, Ints]]
"""Some plans of some families, by number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Plans that are legal and fit."""

    families: tuple[Family, ...]
    family: Ints
    """(N,): the family of each plan."""
    index: Ints
    """(N,): its place in that."""
    bound_s: Floats
    """(N,): no step of it is shorter."""

    def in_order(self, workers: Workers) -> Iterator[list[tuple[float, int, ParallelPlan]]]:
        """Bound, number and plan, the least bound first; of equal ones the first in the space.

        Bounds are made tighter batch by batch, as plans come near the front. Plans come one by one, or,
        where there are several processes to replay them, as many as are next without another batch.
        """
        rough = np.argsort(self.bound_s, kind="stable")
        tight: list[tuple[float, int]] = []
        taken, size = 0, BATCH
        while tight or taken < len(rough):
            next_s = self.bound_s[rough[taken]] if taken < len(rough) else math.inf
            ready: list[tuple[float, int, ParallelPlan]] = []
            while tight and tight[0][0] < next_s and len(ready) < workers.processes:
                bound_s, i = heapq.heappop(tight)
                ready.append((bound_s, i, self.families[self.family[i]].plan(int(self.index[i]))))
            if ready:
                yield ready
                continue
            batch = np.sort(rough[taken : taken + size])
            taken, size = taken + len(batch), 2 * size
            for i, bound_s in self._tighter(batch, workers):
                heapq.heappush(tight, (max(bound_s, float(self.bound_s[i])), i))

    def _tighter(self, batch: Ints, workers: Workers) -> Iterator[tuple[int, float]]:
        """Number and tighter bound of some plans. Those that run the same actions are walked at once."""
        alike: dict[tuple[int, str, int, int], list[int]] = defaultdict(list)
        for i in batch.tolist():
            base = self.families[self.family[i]].base
            m = self.families[self.family[i]].num_micro_batches(workers.job, int(self.index[i]))
            alike[m, base.schedule, base.pp, base.vpp].append(i)
        # The longest walks come first, lest a process begins the last one when the others are done.
        groups = [alike[key] for key in sorted(alike, key=lambda key: (-key[0] * key[2] * key[3], key))]
        walked = workers.answers(walk, [self._chosen(group) for group in groups])
        for group, bounds_s in zip(groups, walked, strict=True):
            yield from zip(group, bounds_s.tolist(), strict=True)

    def _chosen(self, numbers: Sequence[int]) -> Chosen:
        of_family, first = np.unique(self.family[numbers], return_index=True)
        parts = np.split(self.index[numbers], first[1:])
        return [(self.families[f], part) for f, part in zip(of_family, parts, strict=True)]


def walk(examiner: Examiner, chosen: Chosen) -> Floats:
    """Tighter bounds of plans that run the same actions."""
    return np.concatenate(examiner.tighter_bounds_s(chosen))


def candidates_of(families: Sequence[Family], examined: Sequence[Examined]) -> Candidates:
    """The plans of these families that fit."""
    found = [(family, e) for family, e in zip(families, examined, strict=True) if len(e.index)]
    return Candidates(
        families=tuple(family for family, _ in found),
        family=np.repeat(np.arange(len(found)), [len(e.index) for _, e in found]),
        index=np.concatenate([e.index for _, e in found]),
        bound_s=np.concatenate([e.bound_s for _, e in found]),
    )
