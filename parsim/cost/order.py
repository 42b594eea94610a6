"""How sure the order of two plans is, given their predicted step times on one job and cluster.

What is wrong with both predictions alike (a kernel that is slower in training, a network that was called
faster than it is) does not change their order, so the error of a ratio is smaller than that of a time.
"""

from __future__ import annotations

import math

from parsim.cost.cell import cell_of
from parsim.plan import Job, ParallelPlan

SAME_LAYERS = 0.02
OTHER_LAYERS = 0.035
"""Scale of the logistic distribution of log(measured ratio / predicted ratio), of two plans whose
layers run the same kernels, and of others.

Greatest likelihood of the order of 6,518 pairs of published runs in 87 groups that differ in the plan
alone, each predicted by a fit that had not seen its model, each group weighing alike: 0.018 and 0.035
(reports/accuracy.md, "How sure an order is", 2026-11-21). Dense models in 16 bits on A100s, 2021 to
2024: vTrain, BLOOM, InternEvo. Experts, narrow precision and other devices are in no such group.
"""
SURE = 0.9
"""Two plans tie where neither is faster with this probability."""


def order_scale(job: Job, first: ParallelPlan, second: ParallelPlan) -> float:
    """The scale that applies to two plans: layers lie in the same cell, or do not."""
    alike = cell_of(job, first) == cell_of(job, second)
    alike = alike and first.recompute_layers == second.recompute_layers
    return SAME_LAYERS if alike else OTHER_LAYERS


def probability_faster(first_s: float, second_s: float, scale: float) -> float:
    """Probability that a plan predicted to take first_s is faster than one predicted to take second_s.

    P = 1 / (1 + (first_s / second_s)^(1 / scale)): Bradley and Terry 1952, "Rank analysis of incomplete
    block designs", Biometrika 39, equation 1, with strengths that are powers of the speeds.

    >>> probability_faster(1.0, 1.0, 0.03), round(probability_faster(1.0, 1.1, 0.03), 3)
    (0.5, 0.96)
    """
    exponent = math.log(first_s / second_s) / scale
    return 1 / (1 + math.exp(min(exponent, 700.0)))


def tie_ratio(scale: float) -> float:
    """Ratio of predicted times below which the order is less than SURE.

    >>> round(tie_ratio(0.03), 3)
    1.068
    """
    return math.exp(scale * math.log(SURE / (1 - SURE)))
