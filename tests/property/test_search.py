"""Branch and bound against a replay of every plan, on random small cases."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parsim.cost.memory import ENOUGH_HEADROOM
from parsim.cost.stage import CostModel
from parsim.errors import NothingFits
from parsim.model import ModelSpec
from parsim.plan import Job, ParallelPlan
from parsim.schedule import SYNCHRONOUS_SCHEDULES
from parsim.schedule.check import plan_problems
from parsim.search import candidates
from parsim.search.chosen_bounds import walked_plans_s
from parsim.search.examine import Examiner
from parsim.search.fullest import fullest_rank
from parsim.search.layout import Bools, Floats, Ints
from parsim.search.placements import ANY_PLACEMENT
from parsim.search.search import OUT_OF_MEMORY, search
from parsim.search.space import RECOMPUTE_CHOICES, Constraints, Family, families
from parsim.simulate.prediction import Prediction, estimate
from tests.builders import round_cluster
from tests.strategies import models, stacks

EXAMPLES = int(os.environ.get("PARSIM_SEARCH_EXAMPLES", "150"))


class Space(NamedTuple):
    job: Job
    gpus: int
    costs: CostModel
    constraints: Constraints
    top: int


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    """A few dozen plans of a small model on up to 8 GPUs, with memory for some of them."""
    model: ModelSpec = draw(models())
    gpus = draw(st.sampled_from([1, 2, 4, 4, 8]))
    job = Job(model=model, seq_len=256, global_batch=draw(st.sampled_from([4, 6, 8])))

    def some(values: tuple[object, ...], most: int) -> tuple[object, ...]:
        return tuple(draw(st.lists(st.sampled_from(values), min_size=1, max_size=most, unique=True)))

    recompute = some(RECOMPUTE_CHOICES, 3)
    split = draw(st.sampled_from([(), (), ("even",)]))
    limits = draw(st.sampled_from([{}, {"vpp": 3}, {"tp": 2, "vpp": 2}, {"pp": 2}, {"cp": 2, "vpp": 2}]))
    constraints = Constraints(
        schedule=some(SYNCHRONOUS_SCHEDULES, 3),  # type: ignore[arg-type]
        zero=tuple(sorted(some((0, 1, 2, 3), 2))),  # type: ignore[arg-type]
        recompute=recompute,  # type: ignore[arg-type]
        stage_split=split,  # type: ignore[arg-type]
        sequence_parallel=some((True, False), 2),  # type: ignore[arg-type]
        tp_overlap=some((True, False), 1),  # type: ignore[arg-type]
        micro_batch=some((1, 2), 1),  # type: ignore[arg-type]
        placement=draw(st.sampled_from([(), (), (ANY_PLACEMENT,), ("dp-tp-cp-pp", "pp-tp-cp-dp")])),
        max_sizes=limits,
    )
    # Domains that the GPUs do not all fit into, so that placements differ.
    domain = draw(st.sampled_from([2, 4, 6, 8]))
    cluster = round_cluster(gpus_per_node=domain, scale_up_domain=domain)
    costs = CostModel(model, cluster, draw(stacks()))
    space = Space(job, gpus, costs, constraints, draw(st.sampled_from([1, 3, 10, 1000])))
    needs = sorted(
        fullest_rank(job, plan, costs).peak + costs.stack.context_bytes
        for family in families(job, gpus, constraints, cluster=cluster)
        for plan in family.plans()
        if next(plan_problems(job, plan, costs.cluster), None) is None
    )
    memory_bytes = needs[int(draw(st.floats(0, 1)) * (len(needs) - 1))] if needs else 1e9
    device = replace(
        costs.cluster.device, memory_bytes=memory_bytes * draw(st.sampled_from([1.0, 1.01]))
    )
    cluster = replace(costs.cluster, device=device)
    return space._replace(costs=CostModel(model, cluster, costs.stack))


def replayed(of: Space) -> tuple[list[Prediction], Counter[str]]:
    """Every plan that fits, fastest first, and why the others do not count."""
    found, rejected = [], Counter[str]()
    examiner = Examiner(of.job, of.costs)
    for family in families(of.job, of.gpus, of.constraints, cluster=of.costs.cluster):
        fitting = set()
        for index, plan in enumerate(family.plans()):
            problem = next(plan_problems(of.job, plan, of.costs.cluster), None)
            if problem is not None:
                rejected[problem.what] += 1
            elif not fits(of, plan, partial=family.is_partial(index)):
                rejected[OUT_OF_MEMORY] += 1
            else:
                fitting.add(index)
        for index in sorted(fitting):
            if family.is_partial(index) and any(
                fits(of, family.plan(i), partial=True) for i in fitting & set(kept(family, index))
            ):
                continue
            made = [estimate(of.job, plan, of.costs) for plan in examiner.choices(family, index)]
            assert all(prediction.fits for prediction in made)
            found.append(min(made, key=lambda p: p.step_time_s))
    return sorted(found, key=lambda p: p.step_time_s), rejected


def fits(of: Space, plan: ParallelPlan, *, partial: bool) -> bool:
    needed = fullest_rank(of.job, plan, of.costs).peak + of.costs.stack.context_bytes
    room = 1 - ENOUGH_HEADROOM if partial else 1.0
    return needed <= of.costs.cluster.device.memory_bytes * room


def kept(family: Family, index: int) -> list[int]:
    """The plan that recomputes nothing and has all other choices of this one, if there is one."""
    first = index - index % len(family.recompute)
    return [first + i for i, choice in enumerate(family.recompute) if choice == "none"]


def check(of: Space) -> None:
    """The search's answer is the first of all plans that were replayed."""
    truth, rejected = replayed(of)
    if not truth:
        with pytest.raises(NothingFits):
            search(of.job, of.gpus, of.costs, constraints=of.constraints)
        return
    result = search(of.job, of.gpus, of.costs, constraints=of.constraints, top=of.top)
    assert result.optimal
    assert result.space.rejected == rejected
    assert result.space.fits == len(truth)
    distinct = list({p.plan: p for p in reversed(truth)}.values())
    best = sorted(distinct, key=lambda p: p.step_time_s)[: of.top]
    times = [p.step_time_s for p in result.plans]
    assert times == pytest.approx([p.step_time_s for p in best], rel=1e-12)
    assert times == sorted(times)
    plans = {p.plan for p in result.plans}
    assert len(plans) == len(best)  # none twice
    # Of plans that tie with the last any may be there; all that are faster are.
    assert {p.plan for p in best if p.step_time_s < times[-1] * (1 - 1e-12)} <= plans
    assert plans <= {p.plan for p in truth}


@contextmanager
def small_steps() -> Iterator[pytest.MonkeyPatch]:
    """In spaces so small plans are left out only where few of them come near the front at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "FAMILIES", 1)
        patch.setattr(candidates, "PLANS", 1)
        yield patch


@given(spaces())
@settings(max_examples=EXAMPLES, deadline=None)
def test_the_search_finds_what_a_replay_of_every_plan_finds(of: Space) -> None:
    with small_steps():
        check(of)


@given(spaces(), st.integers(0, 2**32 - 1))
@settings(max_examples=EXAMPLES // 3, deadline=None)
def test_loose_bounds_cost_replays_and_not_the_proof(of: Space, seed: int) -> None:
    # Whatever is below the true bounds is a bound too, in whatever order it puts the plans.
    rng, figures, tighter = np.random.default_rng(seed), Examiner.figures, Examiner.tighter_bounds_s
    floor_s: Callable[..., float] = Examiner._floor_s

    def loose_figures(self: Examiner, family: Family, legal: Bools) -> tuple[Floats, Floats]:
        needed, bounds_s = figures(self, family, legal)
        return needed, bounds_s * rng.uniform(0.2, 1.0, bounds_s.shape)

    def loose_walks(self: Examiner, chosen: Sequence[tuple[Family, Ints]]) -> list[Floats]:
        return [bounds * rng.uniform(0.2, 1.0, bounds.shape) for bounds in tighter(self, chosen)]

    def loose_plans(job: Job, plans: Sequence[ParallelPlan], costs: CostModel) -> Floats:
        return walked_plans_s(job, plans, costs) * rng.uniform(0.2, 1.0, len(plans))

    def loose_floor_s(self: Examiner, *args: object) -> float:
        return floor_s(self, *args) * rng.uniform(0.2, 1.0)

    with small_steps() as patch:
        patch.setattr(Examiner, "_floor_s", loose_floor_s)
        patch.setattr(Examiner, "figures", loose_figures)
        patch.setattr(Examiner, "tighter_bounds_s", loose_walks)
        patch.setattr(candidates, "walked_plans_s", loose_plans)
        check(of)
