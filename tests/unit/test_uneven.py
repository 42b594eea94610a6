"""Stragglers, jitter and unequal devices, against closed forms."""

from dataclasses import replace

import numpy as np
import pytest

from parsim.cost.stage import CostModel
from parsim.cost.step import mixed_step_cost, step_cost
from parsim.errors import ParsimError
from parsim.plan import Job, ParallelPlan
from parsim.schedule import make_schedule
from parsim.schedule.lower import lower
from parsim.schedule.program import Program, Task
from parsim.simulate.prediction import predict
from parsim.simulate.replay import replay
from parsim.simulate.uneven import (
    Straggler,
    Unevenness,
    check_unevenness,
    replicas_of,
    uneven_program,
    unfolded_program,
)
from parsim.timeline import COMPUTE, breakdown_s
from tests.builders import flat_cost, plain_stack, round_cluster, small_model

M = 8
"""Micro-batches."""


def flat_program(plan: ParallelPlan, **cost: float) -> Program:
    costs = flat_cost(plan.num_stages, **cost)  # type: ignore[arg-type]
    return lower(make_schedule(plan, M), costs, plan, plain_stack())


def step_s(plan: ParallelPlan, *stragglers: Straggler, **cost: float) -> float:
    program = flat_program(plan, **cost)
    return replay(uneven_program(program, plan, Unevenness(stragglers=stragglers))).end_s


def test_a_slow_last_stage_paces_one_forward_one_backward() -> None:
    # T = Σ over stages (f + b) + (m − 1) · max over stages (f + b); stages of 1 + 2, one 1.5 times that.
    assert step_s(ParallelPlan(pp=4), Straggler(3, 1.5)) == pytest.approx(3 * 3 + 4.5 + (M - 1) * 4.5)


def test_a_slow_first_stage_warms_up_while_the_others_fill() -> None:
    # Always busy but for the way of the first micro-batch through the others, less three more forwards.
    assert step_s(ParallelPlan(pp=4), Straggler(0, 1.5)) == pytest.approx(M * 4.5 + 3 * 3 - 3 * 1.5)


def test_healthy_pipelines_wait_for_the_slow_one_in_the_reduction() -> None:
    plan = ParallelPlan(dp=4, pp=2)
    slow = Straggler(plan.dp + 2, 2.0)  # pipeline rank 1 of replica 2
    assert step_s(plan, slow, reduce_s=5.0) == pytest.approx(3 + 6 + (M - 1) * 6 + 5)
    program = uneven_program(flat_program(plan, reduce_s=5.0), plan, Unevenness(stragglers=(slow,)))
    assert program.copies == (3, 3, 1, 1)
    assert program.rank_names == ("×3 pp 0", "×3 pp 1", "dp 2 pp 0", "dp 2 pp 1")
    spans = [s for s in replay(program).spans if s.kind == "dp" and s.rank % 2 == 1]
    assert {(s.start_s, s.end_s) for s in spans} == {(49.0, 54.0)}  # the last stage's, all at once


def test_a_slow_link_slows_sends_of_its_pipeline_and_reductions_of_all() -> None:
    plan = ParallelPlan(dp=2, pp=2)
    even = step_s(plan, send_s=0.25, reduce_s=4.0)
    # Blocking or not, the first and the last transfer of a step show: 0.25 more each.
    slow = step_s(plan, Straggler(0, link=2.0), send_s=0.25, reduce_s=4.0)
    assert slow > even + 4.0
    compute_only = step_s(plan, Straggler(0, link=2.0))
    assert compute_only == step_s(plan)


def test_a_transfer_is_as_slow_as_the_slower_of_its_ends() -> None:
    plan = ParallelPlan(pp=2)
    everywhere = step_s(plan, send_s=0.5)
    for rank in (0, 1):
        assert step_s(plan, Straggler(rank, link=2.0), send_s=0.25) == pytest.approx(everywhere)


def test_experts_wait_for_all_that_exchange_tokens_with_them() -> None:
    alone = ParallelPlan(dp=8, tp=2, sequence_parallel=True)
    slow = Unevenness(stragglers=(Straggler(5, 1.5),))
    assert [r.members for r in replicas_of(alone, slow)] == [(0, 1, 3, 4, 5, 6, 7), (2,)]
    together = replace(alone, ep=8)  # ranks 0 to 7 share the experts: replicas 0 to 3
    assert [r.members for r in replicas_of(together, slow)] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    behind = replicas_of(together, Unevenness(stragglers=(Straggler(13, 1.5),)))
    assert {r.members: r.slow for r in behind} == {(0, 1, 2, 3): (1.0,), (4, 5, 6, 7): (1.5,)}


def test_a_slow_link_slows_the_exchanges_of_all_that_share_experts_with_it() -> None:
    together = ParallelPlan(dp=8, tp=2, ep=8, sequence_parallel=True)
    task = Task(0, "ep", "0F0", "ep", 1.0, (), 0, 0, num_bytes=1.0)
    replicas = replicas_of(together, Unevenness(stragglers=(Straggler(5, link=3.0),)))
    copies = unfolded_program(Program(tasks=(task,)), replicas).tasks
    took_s = {dp_i: copies[k].duration_s for k, r in enumerate(replicas) for dp_i in r.members}
    assert took_s == dict.fromkeys(range(4), 3.0) | dict.fromkeys(range(4, 8), 1.0)


def test_what_joins_replicas_waits_for_what_stands_before_it_on_all_streams() -> None:
    tasks = (
        Task(0, COMPUTE, "0F0", "forward", 1.0, (), 0, 0),
        Task(0, COMPUTE, "optimizer", "optimizer", 1.0, (), joins_replicas=True),
    )
    plan = ParallelPlan(dp=2)
    replicas = replicas_of(plan, Unevenness(stragglers=(Straggler(1, 4.0),)))
    timeline = replay(unfolded_program(Program(tasks=tasks), replicas))
    assert [s.start_s for s in timeline.spans if s.kind == "optimizer"] == [4.0, 4.0]


def test_the_worst_of_a_group_sets_the_pace() -> None:
    plan = ParallelPlan(tp=4, pp=2, dp=1)
    both = Unevenness(stragglers=(Straggler(2, 1.5), Straggler(1, 1.2), Straggler(7, 1.1)))
    (replica,) = replicas_of(plan, both)
    assert replica.slow == (1.5, 1.1)


def test_jitter_is_log_normal_and_its_slowest_of_eight_is_slower() -> None:
    # Spread widely, so that the mean of the logarithms is seen to lie below zero.
    sigma, plan = 1.0, ParallelPlan(pp=16)
    program = flat_program(plan)

    def factors(tp: int, cp: int) -> np.ndarray:
        wide = replace(plan, tp=tp, cp=cp)
        drawn = uneven_program(program, wide, Unevenness(jitter=sigma, seed=3))
        pairs = zip(drawn.tasks, program.tasks, strict=True)
        return np.array([a.duration_s / b.duration_s for a, b in pairs if b.duration_s])

    logs = np.log(factors(1, 1))
    spread = sigma / np.sqrt(len(logs))
    assert logs.mean() == pytest.approx(-(sigma**2) / 2, abs=4 * spread)
    assert logs.std() == pytest.approx(sigma, rel=0.2)
    # Mean of the greatest of eight standard normals: 1.4236 (Teichroew 1956).
    assert np.log(factors(4, 2)).mean() == pytest.approx(1.4236 * sigma - sigma**2 / 2, abs=4 * spread)


def mixed_case() -> tuple[Job, ParallelPlan, CostModel, CostModel]:
    cluster, model = round_cluster(), small_model()
    device = replace(cluster.device, peak_flops_per_s={"bf16": 5e13}, memory_bytes=40e9, name="slow")
    slow = replace(cluster, name="slow", device=device)
    job = Job(model=model, seq_len=256, global_batch=16)
    costs = [CostModel(model, c, plain_stack()) for c in (cluster, slow)]
    return job, ParallelPlan(pp=4, micro_batch=2), costs[0], costs[1]


def test_unequal_devices_in_one_pipeline() -> None:
    job, plan, fast, slow = mixed_case()
    times = {}
    for name, by_rank in {
        "fast": (fast,) * 4, "slow": (slow,) * 4, "mixed": (fast, fast, slow, fast),
    }.items():  # fmt: skip
        prediction, _ = predict(job, plan, fast, costs_by_rank=by_rank)
        times[name] = prediction.step_time_s
    assert times["fast"] == predict(job, plan, fast)[0].step_time_s
    assert times["slow"] == predict(job, plan, slow)[0].step_time_s
    assert times["fast"] < times["mixed"] < times["slow"]
    whole = mixed_step_cost(job, plan, (fast, fast, slow, fast))
    assert whole.stages[2] == step_cost(job, plan, slow).stages[2]
    assert whole.stages[3] == step_cost(job, plan, fast).stages[3]


def test_memory_of_unequal_devices_is_that_of_the_one_with_least_to_spare() -> None:
    job, plan, fast, slow = mixed_case()
    prediction, _ = predict(job, plan, fast, costs_by_rank=(fast, fast, slow, fast))
    assert prediction.device_memory_bytes == 40e9
    assert prediction.hardware == "round + slow"
    assert prediction.peak_flops_per_s == pytest.approx((3 * 1e14 + 5e13) / 4)


def test_means_count_every_pipeline() -> None:
    plan = ParallelPlan(dp=4, pp=2)
    program = flat_program(plan)
    slow = uneven_program(program, plan, Unevenness(stragglers=(Straggler(0, 2.0),)))
    compute_s = breakdown_s(replay(slow))["compute"]
    # Of eight ranks seven compute 3 seconds a micro-batch, one 6.
    assert compute_s == pytest.approx(M * (7 * 3 + 6) / 8)
    assert all(s.stream == COMPUTE or s.kind == "pp" for s in replay(slow).spans)


@pytest.mark.parametrize(
    ("uneven", "where"),
    [
        (Unevenness(stragglers=(Straggler(8, 1.5),)), "--straggler"),
        (Unevenness(stragglers=(Straggler(0, 0.5),)), "--straggler slow"),
        (Unevenness(stragglers=(Straggler(0, 2.0, float("nan")),)), "--straggler link"),
        (Unevenness(jitter=-0.1), "--jitter"),
    ],
)
def test_what_makes_no_sense_is_refused(uneven: Unevenness, where: str) -> None:
    with pytest.raises(ParsimError) as error:
        check_unevenness(uneven, ParallelPlan(dp=4, pp=2))
    assert error.value.where == where
