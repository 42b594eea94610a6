"""Candidates: the plans that fit, in order of how fast each can be at best."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from parsim.plan import ParallelPlan
from parsim.search.chosen_bounds import walked_plans_s
from parsim.search.examine import Examined, Examiner
from parsim.search.layout import Bools, Floats, Ints
from parsim.search.space import Family
from parsim.search.workers import Workers

BATCH = 16
"""Plans whose bounds are made tighter at once, and then twice as many each time."""

Chosen = list[tuple[Family, Ints]]
"""Some plans of some families, by number."""
Bounded = tuple[float, ParallelPlan]
"""A plan, and seconds that no step of it falls below."""


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
        tight: list[tuple[float, int, int, ParallelPlan]] = []
        taken, size = 0, BATCH
        while tight or taken < len(rough):
            next_s = self.bound_s[rough[taken]] if taken < len(rough) else math.inf
            ready: list[tuple[float, int, ParallelPlan]] = []
            while tight and tight[0][0] < next_s and len(ready) < workers.processes:
                bound_s, i, _, plan = heapq.heappop(tight)
                ready.append((bound_s, i, plan))
            if ready:
                yield ready
                continue
            batch = np.sort(rough[taken : taken + size])
            taken, size = taken + len(batch), 2 * size
            for i, chosen in self._tighter(batch, workers):
                for place, (bound_s, plan) in enumerate(chosen):
                    heapq.heappush(tight, (max(bound_s, float(self.bound_s[i])), i, place, plan))

    def _tighter(self, batch: Ints, workers: Workers) -> Iterator[tuple[int, list[Bounded]]]:
        """Of some plans their number, and the plans that they may become with their tighter bounds.
        Those that run the same actions are walked at once.
        """
        alike: dict[tuple[int, str, int, int], list[int]] = defaultdict(list)
        for i in batch.tolist():
            base = self.families[self.family[i]].base
            m = self.families[self.family[i]].num_micro_batches(workers.job, int(self.index[i]))
            alike[m, base.schedule, base.pp, base.vpp].append(i)
        # The longest walks come first, lest a process begins the last one when the others are done.
        groups = [alike[key] for key in sorted(alike, key=lambda key: (-key[0] * key[2] * key[3], key))]
        walked = workers.answers(walk, [self._chosen(group) for group in groups])
        for group, plans in zip(groups, walked, strict=True):
            yield from zip(group, plans, strict=True)

    def _chosen(self, numbers: Sequence[int]) -> Chosen:
        of_family, first = np.unique(self.family[numbers], return_index=True)
        parts = np.split(self.index[numbers], first[1:])
        return [(self.families[f], part) for f, part in zip(of_family, parts, strict=True)]


def walk(examiner: Examiner, chosen: Chosen) -> list[list[Bounded]]:
    """The plans that each of some plans may become, with tighter bounds; all run the same actions."""
    bounds: dict[tuple[int, int], list[Bounded]] = {}
    closed = [(f, index[~is_open]) for f, index in chosen if not (is_open := _is_open(f, index)).all()]
    for (family, index), bounds_s in zip(closed, examiner.tighter_bounds_s(closed), strict=True):
        for i, bound_s in zip(index.tolist(), bounds_s.tolist(), strict=True):
            bounds[id(family), i] = [(bound_s, family.plan(i))]
    points = [(f, i) for f, index in chosen for i in index[_is_open(f, index)].tolist()]
    options = [examiner.choices(family, i) for family, i in points]
    plans = [plan for of in options for plan in of]
    walked = iter(walked_plans_s(examiner.job, plans, examiner.costs).tolist())
    for (family, i), of in zip(points, options, strict=True):
        bounds[id(family), i] = [(next(walked), plan) for plan in of]
    return [bounds[id(family), i] for family, index in chosen for i in index.tolist()]


def _is_open(family: Family, index: Ints) -> Bools:
    """Whether stages or recomputed layers of a family's plans at `index` are left to be chosen."""
    partial = np.array(family.recompute)[index % len(family.recompute)] == "partial"
    return np.asarray(partial | family.free_split)


def candidates_of(families: Sequence[Family], examined: Sequence[Examined]) -> Candidates:
    """The plans of these families that fit."""
    found = [(family, e) for family, e in zip(families, examined, strict=True) if len(e.index)]
    return Candidates(
        families=tuple(family for family, _ in found),
        family=np.repeat(np.arange(len(found)), [len(e.index) for _, e in found]),
        index=np.concatenate([e.index for _, e in found]),
        bound_s=np.concatenate([e.bound_s for _, e in found]),
    )
