"""Days, dollars and energy by their definitions; which option is chosen; what binds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from parsim.config import load_cluster, load_model
from parsim.cost.checkpoint import Checkpointing, Failures, expected_goodput
from parsim.cost.energy import training_energy
from parsim.cost.stage import CostModel
from parsim.hardware import Cluster, Price
from parsim.model import MoeSpec, expert_parameters, num_parameters
from parsim.plan import Job, ParallelPlan
from parsim.search.capacity import (
    Answer,
    Case,
    Limits,
    NoOption,
    Option,
    answers,
    chinchilla_tokens,
    front,
    options_of,
    probability_within,
    recommended,
    usual_batch,
)
from parsim.search.scaling import gpu_seconds_per_token, scaling_curve
from parsim.search.search import search
from parsim.search.sensitivity import RESOURCES, SPEEDS, sensitivities, speed_gains, with_more
from parsim.search.space import Constraints
from parsim.simulate.prediction import Prediction, estimate
from parsim.stack import Stack
from tests.builders import plain_stack, round_cluster, small_model

DOLLARS = Price(usd_per_gpu_hour=2.0, source="round numbers", date="2026-01")
FAILURES = Failures(mtbf_s=1e5, restart_s=600.0)
CHECKPOINTS = Checkpointing(interval_s=3000.0, blocking_s=30.0)


def never_fails(prediction: Prediction, stack: Stack) -> tuple[Checkpointing, Failures]:
    return Checkpointing(interval_s=1e9, blocking_s=0.0), Failures(mtbf_s=math.inf, restart_s=0.0)


def fails_often(prediction: Prediction, stack: Stack) -> tuple[Checkpointing, Failures]:
    return CHECKPOINTS, FAILURES


def small_case(gpus: int = 8, *, memory_bytes: float = 80e9, price: Price | None = DOLLARS) -> Case:
    cluster = round_cluster(price=price)
    cluster = replace(cluster, device=replace(cluster.device, memory_bytes=memory_bytes))
    model = small_model(hidden=2048, ffn_hidden=8192)
    job = Job(model=model, seq_len=256, global_batch=16)
    stack = plain_stack(context_bytes=1e6, pp_overlap=False, relative_error=0.2)
    costs = CostModel(model, cluster, stack)
    return Case(job=job, tokens=10**9, costs=costs, hardware="round", gpus=gpus)


def best_option(case: Case) -> Option:
    options = options_of(case, never_fails)
    assert isinstance(options, tuple)
    return options[0]


def test_days_are_tokens_over_tokens_a_second() -> None:
    option = best_option(small_case())
    tokens_per_s = option.case.job.tokens / option.prediction.step_time_s
    assert option.ideal_s == pytest.approx(1e9 / tokens_per_s, rel=1e-12)
    assert option.goodput == 1.0
    assert option.wall_s == pytest.approx(option.ideal_s, rel=1e-12)
    assert option.usd == pytest.approx(8 * option.wall_s / 3600 * 2.0, rel=1e-12)
    busy = option.prediction.breakdown_s["compute"] + option.prediction.breakdown_s["optimizer"]
    assert option.energy.high_kwh == pytest.approx(500 * 8 * option.wall_s / 3.6e6, rel=1e-12)
    assert option.energy.low_kwh == pytest.approx(
        option.energy.high_kwh * busy / option.prediction.step_time_s, rel=1e-12
    )


def test_failures_stretch_the_time_by_the_goodput() -> None:
    case = small_case()
    options = options_of(case, fails_often)
    assert isinstance(options, tuple)
    expected = expected_goodput(CHECKPOINTS, FAILURES)
    assert 0.9 < expected < 0.99
    assert options[0].wall_s == pytest.approx(best_option(case).wall_s / expected, rel=1e-9)


def test_spare_nodes_are_paid_for() -> None:
    option = best_option(small_case())
    with_spares = replace(option, failures=replace(FAILURES, spares=2))
    assert with_spares.rented_gpus == 8 + 2 * 8
    assert with_spares.energy == option.energy


def test_energy_bounds() -> None:
    energy = training_energy(power_w=1000.0, gpus=36, seconds=3600.0, busy_share=0.5)
    assert (energy.low_kwh, energy.kwh, energy.high_kwh) == (18.0, 27.0, 36.0)
    assert energy.facility_kwh(1.2) == pytest.approx(27.0 * 1.5 * 1.2)


def test_without_a_price_there_is_no_cost() -> None:
    option = best_option(small_case(price=None))
    assert option.usd is None
    assert [answer.objective for answer in answers([option], Limits())] == ["smallest", "fastest"]
    assert not Limits(budget_usd=1e12).met_by(option)


def test_tokens_of_chinchilla() -> None:
    """Hoffmann et al. 2022: 70 billion parameters, 1.4 trillion tokens."""
    assert chinchilla_tokens(load_model("llama-3.1-70b"), 20) == pytest.approx(1.4e12, rel=0.01)
    experts = small_model(moe=MoeSpec(experts=8, top_k=2, ffn_hidden=512))
    unused = 8 * (8 - 2) * expert_parameters(experts)
    assert chinchilla_tokens(experts, 20) == 20 * (num_parameters(experts) - unused)


@pytest.mark.parametrize(
    ("tokens", "seq_len", "batch_tokens"),
    [(15_600_000_000_000, 8192, 2**24), (300_000_000_000, 2048, 2**21), (1000, 8192, 8192)],
)
def test_the_usual_batch(tokens: int, seq_len: int, batch_tokens: int) -> None:
    assert usual_batch(tokens, seq_len) * seq_len == batch_tokens


def test_a_cluster_that_is_too_small_says_so() -> None:
    none = options_of(small_case(1, memory_bytes=1e9), never_fails)
    assert isinstance(none, NoOption)
    assert "no plan fits" in none.why
    odd = options_of(small_case(7), never_fails, constraints=Constraints(pp=(1,)))
    assert isinstance(odd, NoOption)
    assert "a global batch that 7 divides" in odd.why
    constrained = options_of(small_case(4), never_fails, constraints=Constraints(tp=(8,)))
    assert isinstance(constrained, NoOption)
    assert "tp=8 does not divide 4 GPUs" in constrained.why


def changed(
    option: Option,
    *,
    gpus: int,
    days: float,
    headroom: float = 0.5,
    usd: float = 1.0,
    spread: float = 1.2,
) -> Option:
    """The same option with other figures."""
    prediction = option.prediction
    step_s = days * 86400 * prediction.job.tokens / option.case.tokens
    used = (1 - headroom) * prediction.device_memory_bytes - prediction.context_bytes
    cluster = option.case.costs.cluster
    per_hour = usd / (gpus * days * 24)
    cluster = replace(cluster, price=replace(DOLLARS, usd_per_gpu_hour=per_hour))
    costs = CostModel(option.case.job.model, cluster, option.case.costs.stack)
    return replace(
        option,
        case=replace(option.case, gpus=gpus, costs=costs),
        prediction=replace(
            prediction,
            step_time_s=step_s,
            interval_s=(step_s / spread, step_s * spread),
            memory=replace(
                prediction.memory,
                activations=prediction.memory.activations + used - prediction.memory.peak,
            ),
        ),
    )


@pytest.fixture(scope="module")
def three() -> Sequence[Option]:
    """Few GPUs, more GPUs for the same money, and many that cost much."""
    option = best_option(small_case())
    return (
        changed(option, gpus=8, days=10, usd=100),
        changed(option, gpus=16, days=6, usd=130),
        changed(option, gpus=64, days=2, usd=300, headroom=0.01),
    )


def by_objective(found: Sequence[Answer]) -> dict[str, Answer]:
    return {answer.objective: answer for answer in found}


def test_changed_options_are_what_they_say(three: Sequence[Option]) -> None:
    assert three[2].wall_s == pytest.approx(2 * 86400)
    assert three[2].usd == pytest.approx(300)
    assert three[2].headroom == pytest.approx(0.01)


def test_answers_by_their_definitions(three: Sequence[Option]) -> None:
    found = by_objective(answers(three, Limits()))
    assert found["smallest"].choice is three[0]
    assert found["cheapest"].best is three[0]
    assert found["fastest"].choice is three[2]
    in_time = by_objective(answers(three, Limits(deadline_s=7 * 86400)))
    assert in_time["smallest"].choice is three[1]
    assert answers(three, Limits(deadline_s=86400)) == ()
    cheap = by_objective(answers(three, Limits(budget_usd=150)))
    assert cheap["fastest"].choice is three[1]


def test_what_is_recommended(three: Sequence[Option]) -> None:
    for limits, objective in (
        (Limits(), "cheapest"),
        (Limits(deadline_s=7 * 86400), "smallest"),
        (Limits(deadline_s=7 * 86400, budget_usd=1e3), "cheapest"),
    ):
        answer = recommended(answers(three, limits), limits)
        assert answer is not None
        assert answer.objective == objective
    assert recommended((), Limits()) is None


def test_what_cannot_be_told_apart_goes_to_the_more_robust(three: Sequence[Option]) -> None:
    few, more, _ = three
    # 100 and 130 dollars, each known to 20%: the intervals overlap; 300 dollars is another matter.
    cheapest = by_objective(answers(three, Limits()))["cheapest"]
    assert cheapest.tied == (more,)
    assert cheapest.choice is few
    assert "most robust" in cheapest.reason
    # A cheaper option that fills the memory to the brim loses to one that leaves room.
    tight = changed(few, gpus=8, days=10, usd=90, headroom=0.01)
    against = by_objective(answers((tight, few), Limits()))["cheapest"]
    assert (against.best, against.choice) == (tight, few)
    assert "leaves 50% of the memory free instead of 1%" in against.reason
    # With room enough in both, fewer GPUs fail less often.
    cheaper = changed(more, gpus=16, days=6, usd=95)
    fewer = by_objective(answers((few, cheaper), Limits()))["cheapest"]
    assert (fewer.best, fewer.choice) == (cheaper, few)
    assert "needs 8 GPUs instead of 16" in fewer.reason
    # Exact figures tie with nothing.
    exact = tuple(
        changed(few, gpus=gpus, days=10, usd=usd, spread=1.0) for gpus, usd in ((16, 99), (8, 100))
    )
    assert by_objective(answers(exact, Limits()))["cheapest"].tied == ()


def test_probability_of_a_limit(three: Sequence[Option]) -> None:
    option, middle = three[0], 10 * 86400.0
    assert probability_within(option, middle, middle) == pytest.approx(0.5)
    assert probability_within(option, middle, middle * 1.2) == pytest.approx(0.95)
    assert probability_within(option, middle, middle / 1.2) == pytest.approx(0.05)
    assert probability_within(option, None, 1.0) is None
    assert probability_within(option, math.inf, 1.0) == 0.0


def test_the_front_is_of_one_model(three: Sequence[Option]) -> None:
    few, *_ = three
    worse = changed(few, gpus=16, days=11, usd=110)
    assert front((*three, worse)) == (0, 1, 2)
    another = replace(few.case.job.model, name="another")
    other = replace(worse, case=replace(worse.case, job=replace(worse.case.job, model=another)))
    assert front((*three, other)) == (0, 1, 2, 3)


def test_more_of_a_resource_never_hurts_and_never_gives_more_than_itself() -> None:
    case = small_case(16)
    option = best_option(case)
    gains = speed_gains(option.prediction, case.costs)
    assert set(gains) == set(SPEEDS)
    assert all(-1e-12 <= gain <= 0.1 + 1e-12 for gain in gains.values())
    assert gains["compute"] == max(gains.values()) > 0.02


def test_without_overheads_ten_per_cent_more_of_everything_is_ten_per_cent() -> None:
    case = small_case(16)
    costs = case.costs
    # A cluster without kernels of its own has launches of 3 µs and no other constant in it.
    cluster = costs.cluster
    for resource in SPEEDS:
        cluster = with_more(cluster, resource, 1.1)
    plan = best_option(case).prediction.plan
    before = estimate(case.job, plan, costs).step_time_s
    after = estimate(case.job, plan, CostModel(costs.model, cluster, costs.stack)).step_time_s
    assert 1.05 < before / after <= 1.1 + 1e-12


def test_resources_of_a_profile_that_was_measured_on_the_machine() -> None:
    cluster = load_cluster("local-cpu")
    model = load_model("tiny-llama-8l")
    job = Job(model=model, seq_len=256, global_batch=8, precision="fp32")
    stack = plain_stack()
    plan = ParallelPlan(dp=2, tp=2)
    before = estimate(job, plan, CostModel(model, cluster, stack)).step_time_s
    for resource in ("compute", "memory_bandwidth", "intra_node"):
        faster = with_more(cluster, resource, 1.1)
        gain = before / estimate(job, plan, CostModel(model, faster, stack)).step_time_s - 1
        assert 0 < gain < 0.1
    assert with_more(cluster, "memory_size", 2.0).device.memory_bytes == 2 * cluster.device.memory_bytes


def tight_case() -> Case:
    """A cluster on which the best plan of a roomier one does not fit."""
    roomy = small_case(8)
    best = search(roomy.job, 8, roomy.costs, top=1).plans[0]
    needed = best.memory.peak + best.context_bytes
    return small_case(8, memory_bytes=needed * 0.96)


def test_sensitivities_search_anew() -> None:
    case = tight_case()
    option = best_option(case)
    effects = sensitivities(option.prediction, case.costs)
    assert {(effect.resource, effect.change) for effect in effects} == {
        (resource, change) for resource in RESOURCES for change in (0.1, -0.1)
    }
    by_key = {(effect.resource, effect.change): effect for effect in effects}
    for (resource, change), effect in by_key.items():
        if effect.gain is None:
            assert (resource, change) == ("memory_size", -0.1)
            continue
        assert effect.gain * change >= -1e-9
        if resource != "memory_size":
            assert -0.1 - 1e-9 <= effect.gain <= 0.1 + 1e-9
    # With 10% more memory the better plan fits, and it is that of the roomy cluster.
    more = by_key["memory_size", 0.1]
    roomy = small_case(8)
    best_s = search(roomy.job, 8, roomy.costs, top=1).plans[0].step_time_s
    assert more.replanned
    assert more.gain is not None
    assert more.gain == pytest.approx(option.prediction.step_time_s / best_s - 1)
    assert more.gain > 0
    assert option.gains["memory_size"] == pytest.approx(more.gain)


def test_less_memory_may_leave_nothing() -> None:
    roomy = small_case(1)
    least = min(
        p.memory.peak + p.context_bytes for p in search(roomy.job, 1, roomy.costs, top=1000).plans
    )
    case = small_case(1, memory_bytes=least)
    effects = sensitivities(best_option(case).prediction, case.costs)
    lost = [(e.resource, e.change) for e in effects if e.gain is None]
    assert lost == [("memory_size", -0.1)]


def test_memory_that_rejects_nothing_does_not_bind() -> None:
    assert best_option(small_case(8)).gains["memory_size"] == 0.0


def test_a_network_that_is_slow_binds() -> None:
    cluster = round_cluster(price=DOLLARS)
    slow: Cluster = replace(cluster, inter_node=replace(cluster.inter_node, bandwidth_bytes_per_s=1e8))
    case = small_case(16)
    case = replace(case, costs=CostModel(case.job.model, slow, case.costs.stack))
    options = options_of(case, never_fails, constraints=Constraints(tp=(1,), pp=(1,)))
    assert isinstance(options, tuple)
    assert options[0].binds.startswith("network between domains first: 10% more gives ")
    assert "exposed data-parallel communication" in options[0].binds


def test_scaling_curves_account_for_what_is_lost() -> None:
    case = small_case(4)
    predictions = [estimate(case.job, ParallelPlan(dp=2, pp=pp), case.costs) for pp in (4, 2, 8)]
    points = scaling_curve(predictions)
    assert [point.prediction.plan.gpus for point in points] == [4, 8, 16]
    assert points[0].efficiency == 1.0
    assert points[0].reason == ""
    first_s = sum(gpu_seconds_per_token(points[0].prediction).values())
    for before, point in pairwise(points):
        speedup = point.tokens_per_s / points[0].tokens_per_s
        assert point.efficiency == pytest.approx(
            speedup * points[0].prediction.plan.gpus / point.prediction.plan.gpus
        )
        # Only the pipeline is longer: 8 micro-batches fill it less and less.
        assert point.grew == "bubble"
        grown = {
            key: seconds - gpu_seconds_per_token(before.prediction)[key]
            for key, seconds in gpu_seconds_per_token(point.prediction).items()
        }
        assert sum(grown.values()) == pytest.approx(
            first_s / point.efficiency - first_s / before.efficiency
        )
        assert point.grew_by == pytest.approx(grown["bubble"] / first_s)
    assert scaling_curve([]) == ()


def test_recomputation_is_named_where_it_is_the_reason() -> None:
    case = small_case(4)
    fast = replace(round_cluster().intra_node, bandwidth_bytes_per_s=1e15)
    costs = CostModel(case.job.model, round_cluster(intra_node=fast), case.costs.stack)
    plans = (ParallelPlan(dp=2), ParallelPlan(dp=4, recompute="full"))
    points = scaling_curve([estimate(case.job, plan, costs) for plan in plans])
    assert points[1].grew == "compute"
    assert "recompute full instead of none" in points[1].reason
