"""Which plans of a family are legal, by the checks of one plan, each run once for all it depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from parsim.errors import ParsimError
from parsim.hardware import Cluster
from parsim.plan import ASYNCHRONOUS_SCHEDULES, USUAL_PLACEMENT, Job, ParallelPlan
from parsim.schedule.check import (
    batch_problems,
    group_problems,
    pipeline_problems,
    placement_problems,
    stack_problems,
    tensor_problems,
)
from parsim.search.layout import Bools
from parsim.search.space import Family
from parsim.stack import Stack

Problems = Iterator[ParsimError]


@dataclass(slots=True)
class Legality:
    """The legality of one job's plans on a cluster; remembers what families have in common."""

    job: Job
    cluster: Cluster
    stack: Stack
    _reasons: dict[tuple[object, ...], str] = field(default_factory=dict)

    def of(self, family: Family) -> tuple[dict[str, int], Bools]:
        """How many plans are illegal for which reason (the first that a check of one finds), and which
        are legal, (Z, M, C).
        """
        base, names = family.base, [""]
        reasons = np.zeros(
            (len(family.zero), len(family.micro_batch), len(family.sequence_parallel)), int
        )

        def mark(what: str, zero: int | slice, size: int | slice, parallel: int | slice) -> None:
            if what:
                if what not in names:
                    names.append(what)
                reasons[zero, size, parallel] = names.index(what)

        # From the last check to the first: what an earlier one finds stands.
        every, sizes = slice(None), (base.dp, base.tp, base.cp)
        for z, zero in enumerate(family.zero):
            runs = base.schedule, base.pp, base.vpp, base.dp * base.cp > 1, zero
            mark(self._reason(self._software, runs, base, zero=zero), z, every, every)
        for s, parallel in enumerate(family.sequence_parallel):
            alike = *sizes, base.ep, base.pp, base.placement, parallel
            mark(self._reason(self._groups, alike, base, sequence_parallel=parallel), every, every, s)
        stale = base.schedule in ASYNCHRONOUS_SCHEDULES
        for z, zero in enumerate(family.zero if stale else family.zero[:1]):
            for i, size in enumerate(family.micro_batch):
                m = self.job.global_batch // (base.dp * size)
                stages = base.stage_split, base.recompute_layers
                depends = base.schedule, base.pp, base.vpp, stages, m, zero
                what = self._reason(pipeline_problems, depends, base, micro_batch=size, zero=zero)
                mark(what, z if stale else every, i, every)
        for s, parallel in enumerate(family.sequence_parallel):
            what = self._reason(tensor_problems, (*sizes, parallel), base, sequence_parallel=parallel)
            mark(what, every, every, s)
        for i, size in enumerate(family.micro_batch):
            mark(self._reason(batch_problems, (base.dp, size), base, micro_batch=size), every, i, every)
        others = family.shape[2] // len(family.sequence_parallel)
        count = np.bincount(reasons.ravel(), minlength=len(names)) * others
        rejected = {name: int(n) for name, n in zip(names, count, strict=True) if name and n}
        return rejected, np.repeat(reasons == 0, others, axis=2)

    def _groups(self, job: Job, plan: ParallelPlan) -> Problems:
        yield from group_problems(job, plan)
        if plan.placement != USUAL_PLACEMENT:
            yield from placement_problems(plan, self.cluster)

    def _software(self, job: Job, plan: ParallelPlan) -> Problems:
        return stack_problems(job, plan, self.stack)

    def _reason(
        self,
        check: Callable[[Job, ParallelPlan], Problems],
        depends: tuple[object, ...],
        base: ParallelPlan,
        **choice: Any,
    ) -> str:
        """What a check finds first in a plan, or nothing; once for all that it depends on."""
        key = check.__name__, *depends
        if key not in self._reasons:
            problem = next(check(self.job, replace(base, **choice)), None)
            self._reasons[key] = "" if problem is None else problem.what
        return self._reasons[key]
