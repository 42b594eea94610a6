"""What a few changes of a stage split make of the step, by a walk through the plan's schedule.

(m − 1)·max + Σ knows stages by their forward and backward together, and no transfers, no update. Splits
that it takes for equal, or nearly so, differ by some percent in the step where micro-batches are few. So
the split that it finds is changed by a layer at a time for as long as the walk gets shorter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from parsim.cost.cell import cell_of
from parsim.cost.stage import CostModel
from parsim.cost.step import mixed_step_cost
from parsim.cost.sync import stage_sync
from parsim.plan import Job, ParallelPlan
from parsim.search.cells import PartFigures, figures_of
from parsim.search.layout import Floats, separate_layout
from parsim.search.passes import passes_of
from parsim.search.replicas import ReplicaTime, replica_time
from parsim.search.walk import walked_bounds_s

SHORTER = 1e-6
"""A step that is shorter by less of it is as long."""
MOST_CHANGES = 100


class Stages(NamedTuple):
    """Layers of every stage, and how many of them are recomputed."""

    layers: tuple[int, ...]
    recomputed: tuple[int, ...]


def improved(
    begin: Sequence[Stages],
    stages_of: Callable[[tuple[int, ...]], Stages | None],
    steps_s: Callable[[Sequence[Stages]], Floats],
) -> Stages:
    """The best of `begin`, changed by one layer from a stage to another for as long as the step gets
    shorter; the first of those that are as short. `stages_of` says of a split what of it is recomputed,
    or None where it does not fit.
    """
    times = steps_s(begin)
    best = begin[int(np.argmax(times <= times.min() * (1 + SHORTER)))]
    best_s = float(times.min())
    for _ in range(MOST_CHANGES):
        options = [stages for layers in _moves(best.layers) if (stages := stages_of(layers)) is not None]
        if not options:
            break
        times = steps_s(options)
        if times.min() >= best_s * (1 - SHORTER):
            break
        best, best_s = options[int(times.argmin())], float(times.min())
    return best


def _moves(layers: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Splits with one layer on another stage."""
    found = []
    for source in range(len(layers)):
        for target in range(len(layers)):
            if source != target and layers[source]:
                moved = list(layers)
                moved[source] -= 1
                moved[target] += 1
                found.append(tuple(moved))
    return found


class Walker:
    """Steps of one plan with other stages; its devices are those of costs_by_rank, one for a rank."""

    def __init__(self, job: Job, plan: ParallelPlan, costs_by_rank: Sequence[CostModel]) -> None:
        self._job, self._plan, self._costs = job, plan, costs_by_rank
        self._stages: dict[tuple[object, ...], tuple[tuple[float, ...], ReplicaTime[float]]] = {}
        # How gradients are cut and compressed differs little between stages of another split.
        self._usual = replace(plan, aggregation="bucket", compression="none")
        self._layout = separate_layout(plan)
        self._send_s = np.array(mixed_step_cost(job, plan, costs_by_rank).send_s)

    def steps_s(self, options: Sequence[Stages]) -> Floats:
        """(P,): the step with each of these stages, without the host's part and without what reductions
        that come late add.
        """
        plan, columns = self._plan, len(options)
        rows = [self._stages_of(stages) for stages in options]
        figures = np.array([[stage[0] for stage in row] for row in rows]).transpose(2, 1, 0)
        replicas = np.array([[stage[1] for stage in row] for row in rows]).transpose(2, 1, 0)
        passes = passes_of(
            plan,
            np.full(columns, plan.num_micro_batches(self._job)),
            PartFigures(*figures),
            np.repeat(self._send_s[:, None], columns, axis=1),
            ReplicaTime(*replicas),
            self._costs[0].stack,
        )
        return walked_bounds_s(plan, self._layout, passes, self._costs[0].stack)

    def _stages_of(self, stages: Stages) -> list[tuple[tuple[float, ...], ReplicaTime[float]]]:
        """Figures and replicas of every stage."""
        plan, costs = self._plan, self._costs[0]
        again = stages.recomputed if plan.recompute != "none" else ()
        kinds = list(costs.kinds(stages.layers, again)) * plan.chains
        found = []
        for s, parts in enumerate(kinds):
            of_rank = self._costs[plan.stage_rank(s)]
            key = id(of_rank), parts
            if key not in self._stages:
                stage = of_rank.stage(cell_of(self._job, plan), parts)
                sync = stage_sync(stage, self._job, self._usual, of_rank.cluster, of_rank.stack)
                times = replica_time(sync, plan.zero, of_rank.stack)
                self._stages[key] = figures_of(stage, stage), times
            found.append(self._stages[key])
        return found
