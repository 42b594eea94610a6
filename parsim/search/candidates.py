"""Candidates: the plans that fit, in order of how fast each can be at best."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from parsim.plan import ParallelPlan
from parsim.search.chosen_bounds import walked_plans_s
from parsim.search.examine import Examiner
from parsim.search.layout import Bools, Floats, Ints
from parsim.search.space import Family
from parsim.search.workers import Workers

FAMILIES = 128
"""Families whose plans are bounded at once."""
PLANS = 16
"""Plans that are walked at once, and then twice as many each time."""

Chosen = list[tuple[Family, Ints]]
"""Some plans of some families, by number."""
Bounded = tuple[float, ParallelPlan]
"""A plan, and seconds that no step of it falls below."""
Number = tuple[int, int]
"""A plan's family, and its place in that: smaller ones come first in the space."""


@dataclass(slots=True, kw_only=True)
class Candidates:
    """Plans of a space, which come near the front in three steps: a family with the rough floor of its
    plans, a plan with its bound, a plan with its stages and recomputed layers and the bound of a walk.
    Every step is taken only for what may still be among the best.
    """

    workers: Workers
    enough: int
    """How many are asked for."""
    families: Sequence[Family]
    floors_s: Floats
    """(F,): no step of a family's plans that fit is shorter; infinite where none fits."""
    _closed: list[int] = field(init=False)
    """Families whose plans are not bounded yet, that with the least floor last."""
    _rough: list[tuple[float, Number]] = field(default_factory=list)
    """Bounded plans: a heap."""
    _tight: list[tuple[float, Number, int, ParallelPlan]] = field(default_factory=list)
    """Plans that have been walked: a heap."""
    _walked_s: list[float] = field(default_factory=list)
    """Of all plans that have been walked the least bounds, as many as are asked for: a heap, negated."""

    def __post_init__(self) -> None:
        order = np.argsort(self.floors_s, kind="stable")
        self._closed = order[np.isfinite(self.floors_s[order])][::-1].tolist()

    def in_order(
        self, most_s: Callable[[], float]
    ) -> Iterator[list[tuple[float, Number, ParallelPlan]]]:
        """Bound, number and plan, the least bound first; of equal ones the first in the space. Ends
        where no bound that is left is below `most_s()`.

        Plans come one by one, or, where there are several processes to replay them, as many as are next.
        """
        num_plans = PLANS
        while True:
            limit_s = most_s()
            family_s = self.floors_s[self._closed[-1]] if self._closed else math.inf
            plan_s = self._rough[0][0] if self._rough else math.inf
            next_s = min(family_s, plan_s)
            ready: list[tuple[float, Number, ParallelPlan]] = []
            while (
                self._tight
                and self._tight[0][0] < min(next_s, limit_s)
                and len(ready) < self.workers.processes
            ):
                bound_s, number, _, plan = heapq.heappop(self._tight)
                ready.append((bound_s, number, plan))
            if ready:
                yield ready
                continue
            if next_s >= limit_s:
                return
            if len(self._walked_s) == self.enough and next_s < -self._walked_s[0]:
                limit_s = min(limit_s, -self._walked_s[0])  # as it will be, if no better one is found
            if family_s <= plan_s:
                self._open(limit_s)
            else:
                self._tighten(num_plans, limit_s)
                num_plans *= 2

    def _open(self, limit_s: float) -> None:
        """Bound the plans of the next families. Those with cells in common go to one process."""
        alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for _ in range(min(FAMILIES, len(self._closed))):
            if self.floors_s[self._closed[-1]] >= limit_s:
                break
            number = self._closed.pop()
            alike[self.families[number].cells].append(number)
        groups = [[self.families[number] for number in numbers] for numbers in alike.values()]
        for numbers, found in zip(alike.values(), self.workers.answers(bound, groups), strict=True):
            for number, (index, bounds_s) in zip(numbers, found, strict=True):
                self._rough += (
                    (b, (number, i)) for b, i in zip(bounds_s.tolist(), index.tolist(), strict=True)
                )
        heapq.heapify(self._rough)

    def _tighten(self, most: int, limit_s: float) -> None:
        """Walk the next plans. Those that run the same actions are walked at once."""
        alike: dict[tuple[int, str, int, int], list[tuple[Number, float]]] = defaultdict(list)
        for _ in range(min(most, len(self._rough))):
            if self._rough[0][0] >= limit_s:
                break
            bound_s, number = heapq.heappop(self._rough)
            family = self.families[number[0]]
            base, m = family.base, family.num_micro_batches(self.workers.job, number[1])
            alike[m, base.schedule, base.pp, base.vpp].append((number, bound_s))
        # The longest walks come first, lest a process begins the last one when the others are done.
        groups = [
            sorted(alike[key]) for key in sorted(alike, key=lambda key: (-key[0] * key[2] * key[3], key))
        ]
        walked = self.workers.answers(walk, [self._chosen([n for n, _ in group]) for group in groups])
        for group, options in zip(groups, walked, strict=True):
            for (number, rough_s), chosen in zip(group, options, strict=True):
                self._remember(max(rough_s, min(walked_s for walked_s, _ in chosen)))
                for place, (walked_s, plan) in enumerate(chosen):
                    heapq.heappush(self._tight, (max(walked_s, rough_s), number, place, plan))

    def _remember(self, walked_s: float) -> None:
        heapq.heappush(self._walked_s, -walked_s)
        if len(self._walked_s) > self.enough:
            heapq.heappop(self._walked_s)

    def _chosen(self, numbers: Sequence[Number]) -> Chosen:
        """Plans, in order, by family."""
        places: dict[int, list[int]] = defaultdict(list)
        for family, place in numbers:
            places[family].append(place)
        return [(self.families[family], np.array(found)) for family, found in places.items()]


def bound(examiner: Examiner, families: Sequence[Family]) -> list[tuple[Ints, Floats]]:
    """The plans of each family that fit, and their lower bounds."""
    return [examiner.bounded(family) for family in families]


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
