"""The search: every legal plan bounded, the promising ones replayed, the best ranked."""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from operator import itemgetter

import numpy as np

from parsim.cost.stage import CostModel
from parsim.errors import NothingFits
from parsim.plan import Job, ParallelPlan
from parsim.search.examine import Examined, Examiner
from parsim.search.layout import Floats, Ints
from parsim.search.space import Constraints, Family, check_constraints, families
from parsim.simulate.prediction import Prediction, estimate
from parsim.simulate.replay import no_garbage_collection
from parsim.units import format_bytes

BATCH = 16
"""Plans whose bounds are made tighter at once, and then twice as many each time."""
REPORT_EVERY = 2000
"""Plans between two reports of progress."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how far it is, and how far it will go (0: not known)."""

OUT_OF_MEMORY = "does not fit in device memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceCount:
    """How many plans there were, and what became of them."""

    enumerated: int
    legal: int
    fits: int
    rejected: dict[str, int]
    """By reason: illegal, or out of memory."""


class NoPlan(NothingFits):
    """No plan of the space is legal, or none fits; `space` says what became of them."""

    space: SpaceCount


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """The best plans of a space, fastest first."""

    space: SpaceCount
    plans: tuple[Prediction, ...]
    optimal: bool
    """No plan in the space can be faster than the first, under this cost model."""
    replayed: int
    search_s: float


def search(
    job: Job,
    gpus: int,
    costs: CostModel,
    *,
    constraints: Constraints | None = None,
    top: int = 10,
    budget_s: float = 60.0,
    progress: Progress | None = None,
) -> SearchResult:
    """The `top` fastest plans that fit.

    Plans are replayed in order of their lower bound until none that is left can be among the best; a
    search that runs out of `budget_s` (or is interrupted) returns what it has, with optimal false.

    Raises NoPlan, with the least memory that any plan needs, where none fits, and ParsimError where the
    constraints leave no plan at all.
    """
    started = time.monotonic()
    constraints = constraints or Constraints()
    check_constraints(gpus, constraints)
    report = progress or (lambda what, done, total: None)
    examiner = Examiner(job, costs)
    candidates, space = _bounded(job, gpus, examiner, constraints, report)
    best: list[tuple[float, int, Prediction]] = []  # a heap, the slowest kept plan on top
    optimal, replayed = True, 0
    try:
        for bound_s, number, plan in candidates.in_order(examiner):
            if len(best) == top and bound_s >= -best[0][0]:
                break
            if time.monotonic() - started > budget_s and len(best) >= min(top, space.fits):
                optimal = False
                break
            with no_garbage_collection():
                prediction = estimate(job, plan, costs)
            entry = (-prediction.step_time_s, -number, prediction)
            replayed += 1
            heapq.heappush(best, entry) if len(best) < top else heapq.heappushpop(best, entry)
            report("replaying", replayed, 0)
    except KeyboardInterrupt:
        optimal = False
        if not best:
            raise
    return SearchResult(
        space=space,
        plans=tuple(prediction for _, _, prediction in sorted(best, key=itemgetter(0, 1))[::-1]),
        optimal=optimal,
        replayed=replayed,
        search_s=time.monotonic() - started,
    )


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

    def in_order(self, examiner: Examiner) -> Iterator[tuple[float, int, ParallelPlan]]:
        """Bound, number and plan, the least bound first; of equal ones the first in the space.

        Bounds are made tighter batch by batch, as plans come near the front.
        """
        rough = np.argsort(self.bound_s, kind="stable")
        tight: list[tuple[float, int]] = []
        taken, size = 0, BATCH
        while tight or taken < len(rough):
            if taken == len(rough) or (tight and tight[0][0] < self.bound_s[rough[taken]]):
                bound_s, i = heapq.heappop(tight)
                yield bound_s, i, self.families[self.family[i]].plan(int(self.index[i]))
                continue
            batch = np.sort(rough[taken : taken + size])
            taken, size = taken + len(batch), 2 * size
            families, first = np.unique(self.family[batch], return_index=True)
            parts = np.split(batch, first[1:])
            chosen = [(self.families[f], self.index[p]) for f, p in zip(families, parts, strict=True)]
            walked = np.concatenate(examiner.tighter_bounds_s(chosen))
            for i, bound_s in zip(batch, np.maximum(walked, self.bound_s[batch]), strict=True):
                heapq.heappush(tight, (float(bound_s), int(i)))


def _bounded(
    job: Job, gpus: int, examiner: Examiner, constraints: Constraints, report: Progress
) -> tuple[Candidates, SpaceCount]:
    """Plans that are legal and fit, in order of their lower bound, and the count of the others."""
    rejected: Counter[str] = Counter()
    costs = examiner.costs
    found: list[tuple[Family, Examined]] = []
    legal = enumerated = reported = 0
    least: tuple[float, ParallelPlan] | None = None
    overlap = costs.stack.default_tp_overlap
    for family in families(job, gpus, constraints, tp_overlap=overlap):
        enumerated += prod(family.shape)
        if enumerated - reported >= REPORT_EVERY:
            reported = enumerated
            report("examining plans", enumerated, 0)
        examined = examiner.examine(family)
        rejected.update(examined.rejected)
        legal += examined.legal
        if (least is None and examined.legal) or (least is not None and examined.least_bytes < least[0]):
            least = examined.least_bytes, family.plan(examined.least)
        if len(examined.index):
            found.append((family, examined))
    fits = sum(len(examined.index) for _, examined in found)
    if legal > fits:
        rejected[OUT_OF_MEMORY] = legal - fits
    space = SpaceCount(
        enumerated=enumerated,
        legal=legal,
        fits=fits,
        rejected=dict(sorted(rejected.items(), key=lambda item: (-item[1], item[0]))),
    )
    if not found:
        error = _no_plan(space, least, costs)
        error.space = space
        raise error
    sizes = [len(examined.index) for _, examined in found]
    candidates = Candidates(
        families=tuple(family for family, _ in found),
        family=np.repeat(np.arange(len(found)), sizes),
        index=np.concatenate([examined.index for _, examined in found]),
        bound_s=np.concatenate([examined.bound_s for _, examined in found]),
    )
    return candidates, space


def _no_plan(space: SpaceCount, least: tuple[float, ParallelPlan] | None, costs: CostModel) -> NoPlan:
    """Why the answer is no: every plan is illegal, or the smallest is too large."""
    if least is None:
        reasons = "; ".join(f"{count} × {reason}" for reason, count in space.rejected.items())
        return NoPlan(
            f"no plan is legal: {space.enumerated} were tried",
            where="the constraints and the number of GPUs",
            got=reasons or "constraints that leave nothing to try",
            hint="relax what rules most of them out",
        )
    device = costs.cluster.device
    return NoPlan(
        f"no plan fits: of {space.enumerated} plans {space.legal} are legal; the least that one of them "
        f"needs is {format_bytes(least[0])} on a device",
        where=least[1].short(),
        expected=f"at most {format_bytes(device.memory_bytes)}, the memory of {device.name}",
        hint="more GPUs, a shorter sequence" + ("" if least[1].zero == 3 else ", or --zero 3"),
    )
