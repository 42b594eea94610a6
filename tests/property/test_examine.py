"""Families examined by arrays against each of their plans looked at by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parsim.cost.step import step_cost
from parsim.plan import ASYNCHRONOUS_SCHEDULES, ParallelPlan
from parsim.schedule.check import plan_problems
from parsim.search.bound import lower_bound_s
from parsim.search.examine import Examiner
from parsim.search.fullest import fullest_rank
from parsim.search.space import Family
from tests.strategies import CASES, RECOMPUTE, Case


def family_of(plan: ParallelPlan, data: st.DataObject) -> Family:
    """Plans around one: with some other choices of everything that arrays range over."""

    def some(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(data.draw(st.lists(st.sampled_from(values), min_size=1, unique=True)))

    if plan.vpp == 1 and data.draw(st.booleans()):
        plan = replace(plan, schedule=data.draw(st.sampled_from(ASYNCHRONOUS_SCHEDULES)))
    counted = bool(plan.recompute_layers)  # they count nothing where nothing is recomputed
    base = replace(
        plan, zero=0, zero_group=0, micro_batch=1, sequence_parallel=False, tp_overlap=False,
        recompute=plan.recompute if counted else "none", aggregation="bucket", compression="none",
        weighted=False,
    )  # fmt: skip
    return Family(
        base=base,
        zero=some([0, 1, 2, 3]),
        micro_batch=some([1, 2, 3, 4]),
        sequence_parallel=some([False, True]),
        tp_overlap=some([False, True]) if plan.tp > 1 else (False,),
        recompute=some(RECOMPUTE[1:] if counted else RECOMPUTE),
    )


@given(CASES, st.data())
@settings(max_examples=120, deadline=None)
def test_arrays_say_of_every_plan_what_the_scalar_functions_say(case: Case, data: st.DataObject) -> None:
    job, plan, costs = case
    family = family_of(plan, data)
    rejected, legal = Examiner(job, costs).legality(family)
    first = [next(plan_problems(job, p, costs.cluster), None) for p in family.plans()]
    assert rejected == Counter(problem.what for problem in first if problem is not None)
    assert legal.ravel().tolist() == [problem is None for problem in first]
    if not legal.any():
        return
    needed, bounds_s = (array.ravel() for array in Examiner(job, costs).figures(family, legal))
    for index, p in enumerate(family.plans()):
        if not legal.flat[index]:
            assert needed[index] == bounds_s[index] == np.inf
            continue
        peak = fullest_rank(job, p, costs).peak + costs.stack.context_bytes
        assert needed[index] == pytest.approx(peak, rel=1e-12)
        bound_s = lower_bound_s(step_cost(job, p, costs), job, p, costs.stack)
        assert bounds_s[index] == pytest.approx(bound_s, rel=1e-12)


@given(CASES)
@settings(max_examples=80, deadline=None)
def test_plans_that_reduce_otherwise_share_an_examiner(case: Case) -> None:
    # What it remembers of the replicas of one is not taken for those of the next.
    job, plan, costs = case
    examiner = Examiner(job, costs)
    plain: dict[str, Any] = {"aggregation": "bucket", "compression": "none"}
    others: list[dict[str, Any]] = [
        {"zero": 0, "zero_group": 0, "aggregation": "tensor", "weighted": True},
        {"zero": 0, "zero_group": 0, "aggregation": "layer", "compression": "powersgd-2"},
        plain | {"zero": 1, "zero_group": 0},
        plain | {"zero": 1, "zero_group": 1},
        plain | {"zero": 0, "zero_group": 0},
    ]
    for p in (plan, *(replace(plan, **changes) for changes in others)):
        if next(plan_problems(job, p, costs.cluster), None) is not None:
            continue
        family = Family(
            base=p,
            zero=(p.zero,),
            micro_batch=(p.micro_batch,),
            sequence_parallel=(p.sequence_parallel,),
            tp_overlap=(p.tp_overlap,),
            recompute=(p.recompute,),
        )
        _, bounds_s = examiner.figures(family, np.ones(family.shape, bool))
        bound_s = lower_bound_s(step_cost(job, p, costs), job, p, costs.stack)
        assert bounds_s.item() == pytest.approx(bound_s, rel=1e-12)


@given(CASES, st.data())
@settings(max_examples=40, deadline=None)
def test_what_does_not_fit_has_no_bound(case: Case, data: st.DataObject) -> None:
    job, plan, costs = case
    family = family_of(plan, data)
    _, legal = Examiner(job, costs).legality(family)
    if not legal.any():
        return
    needed, _ = Examiner(job, costs).figures(family, legal)
    middle = float(np.median(needed[legal]))
    device = replace(costs.cluster.device, memory_bytes=middle)
    smaller = replace(costs, cluster=replace(costs.cluster, device=device))
    examined = Examiner(job, smaller).examine(family)
    fits = [
        index
        for index, p in enumerate(family.plans())
        if legal.flat[index] and fullest_rank(job, p, costs).peak + costs.stack.context_bytes <= middle
    ]
    index, bounds_s = Examiner(job, smaller).bounded(family)
    assert index.tolist() == fits
    assert examined.fits == len(fits)
    assert np.isfinite(bounds_s).all()
    # Of each family one figure says whether its plans are worth a bound: none may be lost.
    assert examined.floor_s <= bounds_s.min(initial=np.inf) * (1 + 1e-12)
    assert examined.floor_s > 0
    assert examined.legal == legal.sum()
    assert examined.least_bytes == pytest.approx(needed[legal].min())
