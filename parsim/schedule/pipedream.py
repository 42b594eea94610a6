"""PipeDream and PipeDream-2BW: pipelines without a flush, whose backwards use weights of the past.

Sources: Narayanan et al. 2019 (PipeDream, SOSP), section 3.3, and before it Harlap et al. 2018, arXiv
1806.03377: a stage updates its weights after every micro-batch's backward, and stashes the version that
each forward in flight used.
Narayanan et al. 2021 (PipeDream-2BW, arXiv 2006.09503), section 3.1: gradients of m micro-batches are
accumulated, and two versions do. Both run 1F1B for as long as training lasts: no step ends with a
bubble, at the price of other training than one process would do.
"""

from __future__ import annotations

import math

from parsim.errors import ParsimError
from parsim.plan import ParallelPlan
from parsim.schedule.action import Schedule
from parsim.schedule.one_f_one_b import one_f_one_b


def pipedream(plan: ParallelPlan, num_micro_batches: int) -> Schedule:
    """The schedule of PipeDream or PipeDream-2BW over several steps: until the pipeline runs at its
    steady pace, then the steps to measure, then until nothing of the end is left in them.

    Raises ParsimError for fewer micro-batches than two versions of the weights can serve.
    """
    check_stale(plan, num_micro_batches)
    before = math.ceil(4 * plan.pp / num_micro_batches)
    return endless(plan, num_micro_batches, before + measured_steps(plan.pp, num_micro_batches))


def endless(plan: ParallelPlan, num_micro_batches: int, steps: int) -> Schedule:
    """So many steps of PipeDream, or of PipeDream-2BW, and those in which the pipeline runs empty."""
    m = num_micro_batches
    after = math.ceil(plan.pp / m)
    return Schedule(
        name=plan.schedule,
        ranks=one_f_one_b(plan.pp, (steps + after) * m).ranks,
        steps=steps + after,
        update_every=1 if plan.schedule == "pipedream" else m,
        steps_after=after,
    )


def measured_steps(pp: int, num_micro_batches: int) -> int:
    """Steps that are looked at together: pp micro-batches are under way at once, and where their round
    trip sets the pace it repeats with every pp of them.
    """
    return pp // math.gcd(pp, num_micro_batches)


def weight_versions(plan: ParallelPlan, rank: int) -> int:
    """Versions of its weights that a pipeline rank keeps: 1 where every step ends with a flush."""
    if plan.schedule == "pipedream":
        return plan.pp - rank
    return 2 if plan.schedule == "pipedream-2bw" else 1


def version_of(plan: ParallelPlan, rank: int, micro_batch: int, num_micro_batches: int) -> int:
    """How many updates the weights have had that a rank takes for a micro-batch of a run.

    Forward and backward take the same. PipeDream: the newest that the rank has, w(t − n + 1 + rank) for
    micro-batch t on n ranks (section 3.3). PipeDream-2BW: on every rank the last but one, W(t − 1) for
    all micro-batches of batch t.

    >>> [version_of(ParallelPlan(pp=3, schedule="pipedream"), 0, t, 4) for t in range(5)]
    [0, 0, 0, 1, 2]
    >>> [version_of(ParallelPlan(pp=3, schedule="pipedream-2bw"), 0, t, 4) for t in (0, 4, 8, 12)]
    [0, 0, 1, 2]
    """
    if plan.schedule == "pipedream":
        return max(0, micro_batch - staleness(plan, rank))
    return max(0, micro_batch // num_micro_batches - staleness(plan, rank))


def staleness(plan: ParallelPlan, rank: int) -> int:
    """Updates of a rank's weights between the version that a gradient is computed with and the one that
    it is added to.
    """
    return weight_versions(plan, rank) - 1


def check_stale(plan: ParallelPlan, num_micro_batches: int) -> None:
    """Raises ParsimError for what PipeDream cannot run."""
    if plan.pp == 1:
        raise ParsimError(
            f"{plan.schedule} needs a pipeline",
            where="pp",
            got=1,
            expected="pp of 2 or more",
            hint="schedule=1f1b is the same on one rank",
        )
    if plan.zero:
        raise ParsimError(
            "ZeRO's shards are of one version of the weights",
            where="zero",
            got=f"zero {plan.zero}, schedule {plan.schedule}",
            expected="zero=0",
        )
    if plan.schedule == "pipedream-2bw" and num_micro_batches < plan.pp:
        raise ParsimError(
            "two versions of the weights serve as many micro-batches in flight as a step has",
            where="num_micro_batches",
            got=num_micro_batches,
            expected=f"pp = {plan.pp} or more",
            hint="a smaller micro_batch or dp gives more micro-batches; pipedream takes any number",
        )
