"""Which plan is recommended where several tie, and what adverse cases do to a step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from parsim.cost.memory import ENOUGH_HEADROOM
from parsim.cost.order import OTHER_LAYERS, SAME_LAYERS, tie_ratio
from parsim.cost.stage import CostModel
from parsim.plan import Job, ParallelPlan
from parsim.search.robust import NOTICED, adverse_times_s, recommend
from parsim.simulate.prediction import Prediction, estimate, predict
from parsim.simulate.uneven import Straggler, Unevenness
from tests.builders import plain_stack, round_cluster, small_model

MODEL = small_model(layers=16)
JOB = Job(model=MODEL, seq_len=256, global_batch=64)
# A tenth of a network: replicas on two nodes of four feel it.
CLUSTER = replace(round_cluster(gpus_per_node=4, scale_up_domain=4), name="two nodes")
COSTS = CostModel(MODEL, CLUSTER, plain_stack(layer_host_s=1e-4, action_host_s=1e-5))
NETWORK, LINKS, DEVICE, HOST = range(4)

ALONE = ParallelPlan()
PIPELINE = ParallelPlan(dp=4, pp=2, schedule="1f1b")
REPLICAS = ParallelPlan(dp=8)
TENSOR = ParallelPlan(dp=4, tp=2, sequence_parallel=True)


def shares(plan: ParallelPlan) -> list[float]:
    """How much longer a step takes in each adverse case."""
    step_s = estimate(JOB, plan, COSTS).step_time_s
    return [seconds / step_s - 1 for seconds in adverse_times_s(JOB, plan, COSTS).values()]


def test_who_does_not_use_a_link_does_not_mind_it() -> None:
    alone = shares(ALONE)
    assert alone[NETWORK] == alone[LINKS] == 0
    assert shares(REPLICAS)[NETWORK] > 0.01
    assert shares(TENSOR)[LINKS] > 0
    # Four replicas on four devices of one node need no network.
    assert shares(ParallelPlan(dp=4))[NETWORK] == 0


def test_a_slow_device_alone_is_a_slow_step() -> None:
    """All compute of a single device takes 5% longer: its launches are waited for too."""
    alone = ParallelPlan()
    costs = CostModel(MODEL, CLUSTER, plain_stack())
    times_s = list(adverse_times_s(JOB, alone, costs).values())
    assert times_s[DEVICE] / estimate(JOB, alone, costs).step_time_s == pytest.approx(1.05)


def test_the_slow_device_is_the_one_that_matters_most() -> None:
    """Of one device in each pipeline rank, that with head and loss, as a replay of each finds."""
    slowest_s = max(
        predict(JOB, PIPELINE, COSTS, uneven=Unevenness(stragglers=(Straggler(rank=rank, slow=1.05),)))[
            0
        ].step_time_s
        for rank in (0, 4)
    )
    assert list(adverse_times_s(JOB, PIPELINE, COSTS).values())[DEVICE] == pytest.approx(slowest_s)


def test_launches_matter_where_they_are_waited_for() -> None:
    """With a host that takes longer than the device the step is all launches, but for the update."""
    bound = CostModel(MODEL, CLUSTER, plain_stack(layer_host_s=1.0))
    step_s = estimate(JOB, ALONE, bound).step_time_s
    assert list(adverse_times_s(JOB, ALONE, bound).values())[HOST] / step_s == pytest.approx(
        1.5, rel=1e-2
    )


def at(plan: ParallelPlan, step_s: float, headroom: float = 0.5) -> Prediction:
    """A plan that is said to take so long and to leave so much memory."""
    found = estimate(JOB, plan, COSTS)
    memory_bytes = (found.memory.peak + found.context_bytes) / (1 - headroom)
    return replace(found, step_time_s=step_s, device_memory_bytes=memory_bytes)


def test_ties_are_by_the_error_of_the_ratio() -> None:
    same, other = tie_ratio(SAME_LAYERS), tie_ratio(OTHER_LAYERS)
    plans = [
        at(REPLICAS, 1.0),
        at(PIPELINE, same * 0.999),
        at(PIPELINE, same * 1.001),  # the same layers, so this much is sure
        at(TENSOR, same * 1.001),
        at(TENSOR, other * 1.001),
    ]
    standings = recommend(plans, COSTS).standings
    assert [standing.tied for standing in standings] == [True, True, False, True, False]
    assert all(standing.first_faster >= 0.5 for standing in standings)
    assert all((standing.first_faster < 0.9) == standing.tied for standing in standings)


def test_the_more_robust_of_two_is_taken() -> None:
    """Eight replicas over a network against a pipeline: the worst case decides, not the order."""
    plans = [at(REPLICAS, 1.0), at(PIPELINE, 1.01)]
    worst = [max(adverse_times_s(JOB, plan.plan, COSTS).values()) for plan in plans]
    first, second = recommend(plans, COSTS), recommend(plans[::-1], COSTS)
    assert worst[1] < worst[0] / (1 + NOTICED)
    assert (first.index, second.index) == (1, 0)
    assert "plan 2 is the most robust" in first.reason
    assert "plans 1–2 cannot be told apart" in first.reason
    assert "plan 1 is as robust as any" in second.reason
    assert first.standings[1].worst[1] == worst[1]


def test_a_plan_that_barely_fits_gives_way() -> None:
    tight, roomy = ENOUGH_HEADROOM - 0.01, ENOUGH_HEADROOM + 0.01
    advice = recommend([at(PIPELINE, 1.0, tight), at(REPLICAS, 1.01, roomy)], COSTS)
    assert advice.index == 1
    assert "leaves only 4.0% of the memory free" in advice.reason
    both = recommend([at(PIPELINE, 1.0, tight), at(REPLICAS, 1.01, tight)], COSTS)
    assert both.index == 0
    assert "but it leaves only 4.0%" in both.reason


def test_without_a_tie_the_fastest_is_taken_whatever_it_risks() -> None:
    advice = recommend([at(REPLICAS, 1.0, 0.01), at(PIPELINE, 2.0)], COSTS)
    assert advice.index == 0
    assert advice.reason.startswith("plan 1 is ahead of all others by more than the model's error, but")
    assert advice.standings[1].to_data()["robust"] is None


def test_a_hair_is_no_reason_to_leave_the_fastest() -> None:
    others = [replace(PIPELINE, schedule=name) for name in ("gpipe", "zb-h1", "zb-h2")]
    plans = [at(plan, 1.0) for plan in (PIPELINE, *others)]
    worst = [max(adverse_times_s(JOB, plan.plan, COSTS).values()) for plan in plans]
    pairs = [(i, j) for i in range(4) for j in range(4) if 1e-9 < worst[i] / worst[j] - 1 < NOTICED]
    assert pairs
    for i, j in pairs:
        assert recommend([plans[i], plans[j]], COSTS).index == 0
