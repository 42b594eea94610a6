"""The search's own figure for one plan: what it orders plans by before it replays any."""

from __future__ import annotations

import numpy as np

from parsim.plan import ParallelPlan
from parsim.search.examine import Examiner
from parsim.search.space import Family


def score_s(examiner: Examiner, plan: ParallelPlan) -> float:
    """Seconds of a step of a legal plan with a flush by the walk along its schedule: at most what a
    replay finds, and less only where the reduction of gradients comes late.
    """
    family = Family(
        base=plan,
        zero=(plan.zero,),
        micro_batch=(plan.micro_batch,),
        sequence_parallel=(plan.sequence_parallel,),
        tp_overlap=(plan.tp_overlap,),
        recompute=(plan.recompute,),
    )
    (walked_s,) = examiner.tighter_bounds_s([(family, np.array([0]))])
    return float(walked_s[0])
