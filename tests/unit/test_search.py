"""The search against brute force: every plan of a small space replayed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import pytest

from parsim.cost.memory import ENOUGH_HEADROOM
from parsim.cost.stage import CostModel
from parsim.errors import NothingFits, ParsimError
from parsim.model import ModelSpec, MoeSpec
from parsim.plan import Job, ParallelPlan
from parsim.schedule import SCHEDULES
from parsim.schedule.check import plan_problems
from parsim.search.fullest import fullest_rank
from parsim.search.search import OUT_OF_MEMORY, SearchResult, search, together
from parsim.search.space import Constraints
from parsim.simulate.prediction import Prediction, predict
from tests.builders import plain_stack, round_cluster, small_model
from tests.strategies import RECOMPUTE

USUAL = Constraints(
    schedule=("1f1b", "interleaved"),
    zero=(0, 1),
    sequence_parallel=(True,),
    recompute=RECOMPUTE,
    stage_split=("even",),
)
"""A space that is small enough to replay all of it; wider ones are in tests/property/test_search.py."""


def find(of: Space, constraints: Constraints = USUAL, **options: Any) -> SearchResult:
    return search(of.job, of.gpus, of.costs, constraints=constraints, **options)


def factors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


class Space(NamedTuple):
    """A job on a few GPUs, with too little memory for some plans."""

    job: Job
    gpus: int
    costs: CostModel


def space(gpus: int, memory_bytes: float, model: ModelSpec | None = None, batch: int = 8) -> Space:
    model = model or small_model()
    cluster = round_cluster()
    cluster = replace(cluster, device=replace(cluster.device, memory_bytes=memory_bytes))
    # Recomputing, sending and reducing in the way of compute sets plans apart.
    stack = plain_stack(context_bytes=1e6, layer_host_s=1e-4, pp_overlap=False)
    job = Job(model=model, seq_len=256, global_batch=batch)
    return Space(job, gpus, CostModel(model, cluster, stack))


MOE = MoeSpec(experts=4, top_k=2, ffn_hidden=512)
SPACES = {
    "4 GPUs": space(4, 200e6),
    "8 GPUs": space(8, 120e6),
    "4 GPUs, experts": space(4, 300e6, small_model(layers=6, moe=MOE)),
}


def every_plan(of: Space) -> list[ParallelPlan]:
    """Every split of the GPUs with every option, written down anew; legal or not."""
    job, n = of.job, of.gpus
    layers = job.model.layers
    found = []
    for tp, pp in product(factors(n), factors(n)):
        if n % (tp * pp):
            continue
        dp = n // (tp * pp)
        chunks = [("1f1b", 1)]
        if pp > 1:
            even = [v for v in range(2, layers + 3) if 0 in (layers % (pp * v), (layers + 2) % (pp * v))]
            chunks += [("interleaved", v) for v in even if pp * v <= layers + 2]
        experts = factors(job.model.moe.experts) if job.model.moe else [1]
        for ep, (schedule, vpp), recompute, zero, micro_batch in product(
            [ep for ep in experts if dp * tp % ep == 0],
            chunks,
            RECOMPUTE,
            (0, 1) if dp > 1 else (0,),
            factors(max(1, job.global_batch // dp)),
        ):
            plan = ParallelPlan(
                dp=dp, tp=tp, pp=pp, ep=ep, vpp=vpp, schedule=schedule, recompute=recompute,
                zero=zero, micro_batch=micro_batch, sequence_parallel=tp > 1,
            )  # fmt: skip
            found.append(plan)
    return found


def is_legal(of: Space, plan: ParallelPlan) -> bool:
    return next(plan_problems(of.job, plan, of.costs.cluster), None) is None


class BruteForce(NamedTuple):
    fitting: list[Prediction]
    rejected: dict[str, int]


def brute_force(of: Space) -> BruteForce:
    """Every plan checked and simulated; the fastest first."""
    fitting, rejected = [], Counter[str]()
    for plan in every_plan(of):
        problem = next(plan_problems(of.job, plan, of.costs.cluster), None)
        if problem is not None:
            rejected[problem.what] += 1
            continue
        prediction, _ = predict(of.job, plan, of.costs)
        if prediction.fits:
            fitting.append(prediction)
        else:
            rejected[OUT_OF_MEMORY] += 1
    return BruteForce(sorted(fitting, key=lambda p: p.step_time_s), dict(rejected))


@pytest.mark.parametrize("name", SPACES)
def test_the_search_finds_what_brute_force_finds(name: str) -> None:
    of = SPACES[name]
    truth = brute_force(of)
    result = find(of, top=5)
    assert result.optimal
    assert result.replayed < len(truth.fitting)  # the bound spared some
    times = [p.step_time_s for p in result.plans]
    assert times == pytest.approx([p.step_time_s for p in truth.fitting[:5]], rel=1e-12)
    # The same plans too, as far as plans that tie with the fifth leave no choice.
    faster = [p.plan for p in truth.fitting if p.step_time_s < times[-1] * (1 - 1e-12)]
    assert set(faster) <= {p.plan for p in result.plans} <= {p.plan for p in truth.fitting}
    assert result.space.fits == len(truth.fitting)
    assert result.space.rejected == truth.rejected
    assert result.space.rejected[OUT_OF_MEMORY] > 0
    assert result.space.enumerated == len(truth.fitting) + sum(truth.rejected.values())
    assert result.space.legal == len(truth.fitting) + truth.rejected[OUT_OF_MEMORY]


def test_a_plan_that_two_choices_come_to_is_listed_once() -> None:
    # Where no layer can be kept, as few as fit are recomputed are all of them.
    of = space(1, 1e12)
    whole = ParallelPlan(recompute="full")
    needed = fullest_rank(of.job, whole, of.costs).peak + of.costs.stack.context_bytes
    tight = space(1, needed * 1.0001 / (1 - ENOUGH_HEADROOM))
    choices = Constraints(recompute=("full", "partial"), micro_batch=(1,))
    result = find(tight, choices)
    assert result.optimal
    assert result.space.fits == result.replayed == 2
    assert [p.plan for p in result.plans] == [whole]
    # With room for a layer they are two plans, and the one that keeps it is faster.
    kept = fullest_rank(of.job, ParallelPlan(), of.costs).peak + of.costs.stack.context_bytes
    roomy = space(1, (needed + kept) / 2 / (1 - ENOUGH_HEADROOM))
    first, second = (p.plan for p in find(roomy, choices).plans)
    assert first == replace(whole, recompute_layers=first.recompute_layers)
    assert 0 < first.recompute_layers[0] < of.job.model.layers
    assert second == whole


def test_reasons_are_named() -> None:
    of = space(8, 80e9, small_model(kv_heads=2), batch=9)
    result = find(of, top=1)
    assert set(result.space.rejected) == {
        "tp does not divide the KV heads",
        "dp·micro_batch does not divide the global batch",
        "interleaved 1F1B needs equal rounds of micro-batches",
    }
    assert result.space.enumerated == result.space.fits + sum(result.space.rejected.values())


def test_the_best_of_everything_is_every_plan_in_order() -> None:
    of = SPACES["4 GPUs"]
    truth = brute_force(of)
    result = find(of, top=10_000)
    assert result.optimal
    assert result.replayed == len(truth.fitting)
    assert [p.step_time_s for p in result.plans] == pytest.approx(
        [p.step_time_s for p in truth.fitting], rel=1e-12
    )
    assert {p.plan for p in result.plans} == {p.plan for p in truth.fitting}
    assert {p.plan.schedule for p in result.plans} == {"1f1b", "interleaved"}
    assert {p.plan.vpp for p in result.plans if p.plan.pp == 2} == {1, 2, 4, 5}


def test_what_the_search_says_of_a_plan_is_what_a_replay_says() -> None:
    of = SPACES["8 GPUs"]
    for found in find(of, top=3).plans:
        replayed, _ = predict(of.job, found.plan, of.costs)
        assert found.step_time_s == pytest.approx(replayed.step_time_s, rel=1e-12)
        assert found.breakdown_s == pytest.approx(replayed.breakdown_s, abs=1e-12)
        assert found.memory == replayed.memory


def test_parts_of_a_space_together_are_the_whole() -> None:
    of = SPACES["8 GPUs"]
    parts = [find(of, replace(USUAL, tp=(tp,)), top=20) for tp in (4, 2, 1)]
    whole, joined = find(of, replace(USUAL, tp=(1, 2, 4)), top=20), together(parts, 20)
    assert [p.step_time_s for p in joined.plans] == [p.step_time_s for p in whole.plans]
    assert joined.space == whole.space
    assert len({p.plan.tp for p in joined.plans[:6]}) > 1  # they lie among each other


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_best_plan_of_every_schedule_is_found(schedule: str) -> None:
    of = space(8, 80e9, small_model(layers=16), batch=16)
    only = Constraints(schedule=(schedule,), zero=(0,), recompute=("none",))
    everything = find(of, constraints=only, top=10_000)
    assert everything.plans
    assert {p.plan.schedule for p in everything.plans} == {schedule}
    best = find(of, constraints=only, top=1)
    assert best.optimal
    least_s = min(predict(of.job, p.plan, of.costs)[0].step_time_s for p in everything.plans)
    assert best.plans[0].step_time_s == pytest.approx(least_s, rel=1e-12)


def test_without_time_there_are_plans_but_no_proof() -> None:
    of = SPACES["8 GPUs"]
    # Where gradients are reduced beside compute, bounds leave something to be proven.
    stack = replace(of.costs.stack, dp_overlap=True, dp_bucket_parameters=1e6, zero_prefetch=1)
    of = of._replace(costs=CostModel(of.job.model, of.costs.cluster, stack))
    result = find(of, top=3, budget_s=0.0)
    assert not result.optimal
    assert len(result.plans) == result.replayed == 3
    everything = find(of, top=10_000, budget_s=0.0)
    assert everything.optimal
    assert len(everything.plans) == everything.space.fits


def stopping_at(count: int) -> Callable[[str, int, int], None]:
    def progress(what: str, done: int, total: int) -> None:
        if (what, done) == ("replaying", count):
            raise KeyboardInterrupt

    return progress


def test_an_interrupted_search_gives_what_it_has() -> None:
    of = SPACES["8 GPUs"]
    result = find(of, top=5, progress=stopping_at(2))
    assert not result.optimal
    assert len(result.plans) == result.replayed == 2
    assert result.plans[0].step_time_s <= result.plans[1].step_time_s


def test_nothing_fits_and_the_least_memory_is_told() -> None:
    of = space(4, 20e6)
    roomy = space(4, 80e9)
    needs = {p.plan.short(): p.memory.peak + p.context_bytes for p in find(roomy, top=10_000).plans}
    with pytest.raises(NothingFits) as caught:
        find(of)
    assert needs[str(caught.value.where)] == min(needs.values())
    assert f"{min(needs.values()) / 2**20:.1f} MiB" in caught.value.what
    assert f"{len(needs)} are legal" in caught.value.what


def test_the_last_plan_to_fit() -> None:
    roomy = space(4, 80e9)
    everything = find(roomy, top=10_000).plans
    least = min(p.memory.peak + p.context_bytes for p in everything)
    of = space(4, least)
    assert {p.plan for p in find(of).plans} == {
        p.plan for p in everything if p.memory.peak + p.context_bytes == least
    }
    with pytest.raises(NothingFits):
        find(space(4, least - 1))


@pytest.mark.parametrize(
    ("constraints", "holds"),
    [
        (replace(USUAL, tp=(2,)), lambda p: p.tp == 2),
        (replace(USUAL, pp=(2, 4)), lambda p: p.pp in (2, 4)),
        (replace(USUAL, dp=(1,)), lambda p: p.dp == 1),
        (replace(USUAL, cp=(2,)), lambda p: p.cp == 2),
        (replace(USUAL, vpp=(2,)), lambda p: p.vpp == 2 and p.schedule == "interleaved"),
        (replace(USUAL, micro_batch=(2,)), lambda p: p.micro_batch == 2),
        (replace(USUAL, zero=(3,)), lambda p: p.zero == 3),
        (replace(USUAL, recompute=("selective",)), lambda p: p.recompute == "selective"),
        (replace(USUAL, schedule=("gpipe",)), lambda p: p.schedule == "gpipe" and p.vpp == 1),
    ],
)
def test_constraints_are_obeyed(constraints: Constraints, holds: Callable[[ParallelPlan], bool]) -> None:
    of = space(8, 80e9, batch=4)
    result = find(of, constraints=constraints, top=10_000)
    assert result.plans
    assert all(holds(p.plan) for p in result.plans)
    inside = {plan for plan in every_plan(of) if holds(plan) and is_legal(of, plan)}
    assert inside <= {p.plan for p in result.plans}  # and nothing else is lost


def test_expert_parallelism_is_constrained_too() -> None:
    of = SPACES["4 GPUs, experts"]
    result = find(of, constraints=replace(USUAL, ep=(2, 4)), top=10_000)
    assert {p.plan.ep for p in result.plans} == {2, 4}


@pytest.mark.parametrize(
    ("gpus", "constraints", "message"),
    [
        (0, Constraints(), "number of GPUs"),
        (8, Constraints(tp=(3,)), "tp=3 does not divide 8"),
        (8, Constraints(pp=(3, 5)), "pp=3, 5 does not divide 8"),
        (8, Constraints(tp=(8,), pp=(2,)), "no plan"),
        (8, Constraints(tp=(8,)), "no plan"),  # four KV heads
    ],
)
def test_constraints_that_nothing_satisfies(gpus: int, constraints: Constraints, message: str) -> None:
    of = space(8, 80e9)
    with pytest.raises(ParsimError, match=message):
        search(of.job, gpus, of.costs, constraints=constraints)
