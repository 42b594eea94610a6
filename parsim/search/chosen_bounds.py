"""Lower bounds of plans whose stages and recomputed layers are chosen: each has stages of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from parsim.cost.stage import CostModel
from parsim.cost.step import StepCost, step_cost
from parsim.plan import ASYNCHRONOUS_SCHEDULES, Job, ParallelPlan
from parsim.search.bound_arrays import lower_bounds_s
from parsim.search.cells import PartFigures, figures_of
from parsim.search.layout import Floats, separate_layout
from parsim.search.passes import Passes, joined, passes_of
from parsim.search.replicas import ReplicaTime, replica_time
from parsim.search.walk import walked_bounds_s


def walked_plans_s(job: Job, plans: Sequence[ParallelPlan], costs: CostModel) -> Floats:
    """(P,): lower bounds of the step times of legal plans that run the same actions."""
    if not plans:
        return np.zeros(0)
    plan = plans[0]
    layout = separate_layout(plan)
    passes = joined([_passes(job, plan, costs) for plan in plans])
    bounds_s = lower_bounds_s(plan, layout, passes, np.zeros((plan.pp, len(plans))))
    if plan.schedule not in ASYNCHRONOUS_SCHEDULES:
        bounds_s = np.maximum(bounds_s, walked_bounds_s(plan, layout, passes, costs.stack))
    return bounds_s + costs.stack.step_overhead_s


def _passes(job: Job, plan: ParallelPlan, costs: CostModel) -> Passes:
    """(n, 1) each: the passes of one plan."""
    cost: StepCost = step_cost(job, plan, costs)
    place = {id(stage): i for i, stage in enumerate(cost.stages)}  # stages of the same parts are one
    distinct = list(place.values())
    of = [distinct.index(place[id(stage)]) for stage in cost.stages]
    stages = np.array([figures_of(cost.stages[i], cost.stages[i]) for i in distinct])[of].T[:, :, None]
    replicas = np.array([replica_time(cost.syncs[i], plan.zero, costs.stack) for i in distinct])[of]
    return passes_of(
        plan,
        np.array([plan.num_micro_batches(job)]),
        PartFigures(*stages),
        np.array(cost.send_s).reshape(-1, 1),
        ReplicaTime(*replicas.T[:, :, None]),
        costs.stack,
    )
