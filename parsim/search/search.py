"""The search: every legal plan bounded, the promising ones replayed, the best ranked."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np

from parsim.cost.stage import CostModel
from parsim.errors import NothingFits
from parsim.plan import Job, ParallelPlan
from parsim.search.best import Best
from parsim.search.candidates import Candidates, Number
from parsim.search.examine import Examined, Examiner
from parsim.search.space import Constraints, Family, check_constraints, families
from parsim.search.workers import Workers, cores
from parsim.simulate.prediction import Prediction, estimate
from parsim.simulate.replay import no_garbage_collection
from parsim.units import format_bytes

LARGE_SPACE = 100_000
"""Plans that take longer than other processes take to start."""

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
    processes: int | None = 1,
) -> SearchResult:
    """The `top` fastest plans that fit.

    Plans are replayed in order of their lower bound until none that is left can be among the best; a
    search that runs out of `budget_s` (or is interrupted) returns what it has, with optimal false.
    A large space is shared among so many `processes` (None: one a core), with the same answer.

    Raises NoPlan, with the least memory that any plan needs, where none fits, and ParsimError where the
    constraints leave no plan at all.
    """
    started = time.monotonic()
    constraints = constraints or Constraints()
    check_constraints(gpus, constraints)
    report = progress or (lambda what, done, total: None)
    overlap, cluster = costs.stack.default_tp_overlap, costs.cluster
    listed = list(families(job, gpus, constraints, tp_overlap=overlap, cluster=cluster))
    is_large = sum(prod(family.shape) for family in listed) >= LARGE_SPACE
    workers = Workers(job=job, costs=costs, processes=(processes or cores()) if is_large else 1)
    candidates, space = _fitting(workers, listed, top, report)
    best, optimal, replayed = Best(top), True, 0
    try:
        for replay, number in _replays(candidates, best.slowest_s):
            if time.monotonic() - started > budget_s and len(best) >= min(top, space.fits):
                optimal = False
                break
            replayed += 1
            best.keep(replay(), number)
            report("replaying", replayed, 0)
    except KeyboardInterrupt:
        optimal = False
        if not len(best):
            raise
    return SearchResult(
        space=space,
        plans=best.plans(),
        optimal=optimal,
        replayed=replayed,
        search_s=time.monotonic() - started,
    )


def together(results: Sequence[SearchResult], top: int) -> SearchResult:
    """The best plans of several spaces, fastest first; of equal ones those of the first space."""
    rejected: Counter[str] = Counter()
    for result in results:
        rejected.update(result.space.rejected)
    space = SpaceCount(
        enumerated=sum(result.space.enumerated for result in results),
        legal=sum(result.space.legal for result in results),
        fits=sum(result.space.fits for result in results),
        rejected=dict(sorted(rejected.items(), key=lambda item: (-item[1], item[0]))),
    )
    plans = sorted((p for result in results for p in result.plans), key=lambda p: p.step_time_s)
    return SearchResult(
        space=space,
        plans=tuple(plans[:top]),
        optimal=all(result.optimal for result in results),
        replayed=sum(result.replayed for result in results),
        search_s=sum(result.search_s for result in results),
    )


def _fitting(
    workers: Workers, listed: Sequence[Family], top: int, report: Progress
) -> tuple[Candidates, SpaceCount]:
    """The families with plans that are legal and fit, and the count of all plans."""
    examined = _examined(workers, listed, report)
    rejected: Counter[str] = Counter()
    legal = fits = 0
    least: tuple[float, ParallelPlan] | None = None
    for family, of in zip(listed, examined, strict=True):
        rejected.update(of.rejected)
        legal += of.legal
        fits += of.fits
        if of.legal and (least is None or of.least_bytes < least[0]):
            least = of.least_bytes, family.plan(of.least)
    if legal > fits:
        rejected[OUT_OF_MEMORY] = legal - fits
    space = SpaceCount(
        enumerated=sum(prod(family.shape) for family in listed) - sum(of.same for of in examined),
        legal=legal,
        fits=fits,
        rejected=dict(sorted(rejected.items(), key=lambda item: (-item[1], item[0]))),
    )
    if not fits:
        error = _no_plan(space, least, workers.costs)
        error.space = space
        raise error
    floors_s = np.array([of.floor_s for of in examined])
    return Candidates(workers=workers, enough=top, families=listed, floors_s=floors_s), space


def _examined(workers: Workers, listed: Sequence[Family], report: Progress) -> list[Examined]:
    """What became of the plans of every family. Those with cells in common are examined together."""
    alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for number, family in enumerate(listed):
        alike[family.cells].append(number)
    total = sum(prod(family.shape) for family in listed)
    groups = [[listed[number] for number in numbers] for numbers in alike.values()]
    found: dict[int, Examined] = {}
    done = 0
    for numbers, of in zip(alike.values(), workers.answers(_examine, groups), strict=True):
        found.update(zip(numbers, of, strict=True))
        done += sum(prod(listed[number].shape) for number in numbers)
        report("examining plans", done, total)
    return [found[number] for number in range(len(listed))]


def _examine(examiner: Examiner, group: Sequence[Family]) -> list[Examined]:
    return [examiner.examine(family) for family in group]


def _replays(
    candidates: Candidates, limit_s: Callable[[], float]
) -> Iterator[tuple[Callable[[], Prediction], Number]]:
    """Replay and number of the plans that may take less than the limit, in order of their bounds.
    Several processes replay the next few at once, of which the last ones may turn out not to be needed.
    """
    for ready in candidates.in_order(limit_s):
        predictions = candidates.workers.answers(_replay, [plan for _, _, plan in ready])
        for bound_s, number, _ in ready:
            if bound_s >= limit_s():
                return
            yield partial(next, predictions), number


def _replay(examiner: Examiner, plan: ParallelPlan) -> Prediction:
    with no_garbage_collection():
        return estimate(examiner.job, plan, examiner.costs)


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
