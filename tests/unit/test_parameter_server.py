"""Parameter servers: closed forms, the guarantees of bounded staleness, and what cannot be exceeded."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parsim.cost.collective import NETWORK_HOP_S
from parsim.cost.memory import optimizer_bytes
from parsim.cost.memory_bound import memory_bound_s
from parsim.cost.parameter_server import (
    ParameterServer,
    Servers,
    Shard,
    all_reduce_s,
    parameter_server,
    server_limit,
    worker_limit,
)
from parsim.cost.stage import CostModel
from parsim.errors import ParsimError
from parsim.model import num_parameters
from parsim.plan import Job, ParallelPlan
from parsim.simulate.parameter_server import (
    PsRun,
    all_reduce_steps_per_s,
    simulate_parameter_server,
    worker_compute_s,
)
from parsim.simulate.prediction import predict
from parsim.simulate.uneven import Straggler, Unevenness
from tests.builders import plain_stack, round_cluster, small_model

EXACT = 1e-9
ASYNC = math.inf


def servers(
    workers: int,
    shards: int,
    *,
    pull: float = 2.0,
    push: float = 4.0,
    compute_s: float = 1.0,
    **changes: Any,
) -> ParameterServer:
    """Equal workers and shards; links of 10 bytes a second."""
    shard = Shard(
        pull_bytes=pull / shards,
        push_bytes=push / shards,
        add_s=changes.pop("add_s", 0.0),
        update_s=changes.pop("update_s", 0.0),
    )
    fields: dict[str, Any] = {
        "compute_s": (compute_s,) * workers,
        "shards": (shard,) * shards,
        "worker_bytes_per_s": (10.0,) * workers,
        "server_bytes_per_s": 10.0,
    }
    return ParameterServer(**(fields | changes))


def run(ps: ParameterServer, steps: int = 12) -> PsRun:
    return simulate_parameter_server(ps, steps=steps, seed=3)


@pytest.mark.parametrize("bound", [0.0, 2.0, ASYNC])
@pytest.mark.parametrize(("workers", "shards"), [(4, 1), (16, 4), (8, 3)])
def test_server_bound(workers: int, shards: int, bound: float) -> None:
    """Workers without compute go in step, and use one direction at a time: s·B / (pull + push)."""
    result = run(servers(workers, shards, compute_s=0.0, bound=bound))
    assert result.steps_per_s == pytest.approx(shards * 10.0 / (2 + 4), rel=EXACT)
    use = result.link_utilisation()
    assert use["server_send"] + use["server_receive"] == pytest.approx(1.0, rel=EXACT)
    # As many bytes leave the servers as reach the workers, and the other way round.
    assert use["worker_receive"] * workers == pytest.approx(use["server_send"] * shards, rel=EXACT)
    assert use["worker_send"] * workers == pytest.approx(use["server_receive"] * shards, rel=EXACT)


@pytest.mark.parametrize("bound", [0.0, ASYNC])
def test_worker_bound(bound: float) -> None:
    """Links that take no time: w / compute time."""
    ps = servers(16, 2, compute_s=0.25, bound=bound)
    free = replace(ps, worker_bytes_per_s=(1e300,) * 16, server_bytes_per_s=1e300)
    assert run(free).steps_per_s == pytest.approx(16 / 0.25, rel=EXACT)
    assert worker_limit(free) == pytest.approx(16 / 0.25, rel=EXACT)


@pytest.mark.parametrize(("workers", "shards"), [(1, 1), (2, 4), (4, 4), (12, 4), (6, 1)])
def test_synchronous_step(workers: int, shards: int) -> None:
    """Both transfers go at the pace of the busier side, then every server adds all and updates once."""
    ps = servers(workers, shards, add_s=0.01, update_s=0.2, latency_s=0.003)
    busier = max(workers / shards, 1.0)
    step_s = 2 * 0.003 + busier * (2 + 4) / 10 + 1.0 + workers * 0.01 + 0.2
    assert run(ps).steps_per_s == pytest.approx(workers / step_s, rel=EXACT)


def test_the_fullest_server_decides() -> None:
    """Contiguous shards of 4, 1 and 1: the first one's link is the bottleneck."""
    uneven = [Shard(pull_bytes=2 * share / 6, push_bytes=4 * share / 6) for share in (4, 1, 1)]
    ps = replace(servers(8, 3, compute_s=0.0), shards=tuple(uneven))
    assert run(ps).steps_per_s == pytest.approx(10.0 / 4, rel=EXACT)


def test_alike_servers_are_folded_exactly() -> None:
    """Shards that differ by nothing that matters are simulated one by one, with the same result."""
    ps = servers(6, 4, jitter=0.3, bound=ASYNC, update_s=0.05, worker_bytes_per_s=(7.0,) * 6)
    apart = tuple(
        replace(shard, pull_bytes=shard.pull_bytes * (1 + k * 1e-13))
        for k, shard in enumerate(ps.shards)
    )
    assert run(replace(ps, shards=apart)).steps_per_s == pytest.approx(run(ps).steps_per_s, rel=1e-9)


def test_bound_zero_is_a_barrier() -> None:
    result = run(servers(6, 2, jitter=0.5, add_s=0.01, update_s=0.1))
    ends = [max(s.applied_s for s in result.steps if s.clock == clock) for clock in range(12)]
    for step in result.steps:
        if step.clock:
            assert step.allowed_s == ends[step.clock - 1]
    assert result.staleness().histogram == {0: 6 * 12 * 2}


def test_a_bound_that_nobody_reaches_is_asynchronous() -> None:
    ps = servers(6, 2, jitter=0.5, update_s=0.1)
    assert run(replace(ps, bound=12.0)).steps == run(replace(ps, bound=ASYNC)).steps
    assert run(replace(ps, bound=1.0)).steps != run(replace(ps, bound=ASYNC)).steps


@st.composite
def parameter_servers(draw: st.DrawFn) -> ParameterServer:
    """Any workers, shards, links and bounds."""
    workers = draw(st.integers(1, 6))
    times = st.sampled_from([0.0, 0.1, 1.0, 3.0])
    shard = st.builds(
        Shard,
        pull_bytes=st.floats(0.1, 5.0),
        push_bytes=st.floats(0.1, 5.0),
        add_s=times.map(lambda s: s / 10),
        update_s=times.map(lambda s: s / 10),
    )
    each = {"min_size": workers, "max_size": workers}
    return ParameterServer(
        compute_s=tuple(draw(st.lists(times, **each))),
        shards=tuple(draw(st.lists(shard, min_size=1, max_size=3))),
        worker_bytes_per_s=tuple(draw(st.lists(st.sampled_from([1.0, 10.0]), **each))),
        server_bytes_per_s=draw(st.sampled_from([1.0, 10.0])),
        bound=draw(st.sampled_from([0.0, 1.0, 3.0, ASYNC])),
        latency_s=draw(st.sampled_from([0.0, 0.01])),
        jitter=draw(st.sampled_from([0.0, 0.5])),
    )


@settings(max_examples=60)
@given(parameter_servers())
def test_what_always_holds(ps: ParameterServer) -> None:
    workers, steps = len(ps.compute_s), 6
    result = simulate_parameter_server(ps, steps=steps)
    assert len(result.steps) == workers * steps
    assert result.steps_per_s <= server_limit(ps) * (1 + steps * EXACT)
    # Ho et al. 2013: nobody is further ahead than the bound allows, once its own step is done; so while
    # a gradient is made every other worker applies 2·bound + 1 at most.
    assert max(step.lead for step in result.steps) <= ps.bound + 1
    assert max(result.staleness().histogram) <= (workers - 1) * (2 * ps.bound + 1 if ps.bound else 0)
    assert sum(result.worker_time().values()) == pytest.approx(1.0)
    assert all(0 <= share <= 1 + EXACT for share in result.worker_time().values())
    for step in result.steps:
        times = step.ready_s, step.allowed_s, step.pulled_s, step.computed_s, step.applied_s
        assert list(times) == sorted(times)
    if math.isinf(ps.bound):
        assert result.worker_time()["waiting"] == 0.0
    assert simulate_parameter_server(ps, steps=steps) == result


@settings(max_examples=30)
@given(parameter_servers().filter(lambda ps: len(ps.shards) == 1 and math.isinf(ps.bound)))
def test_an_asynchronous_worker_sees_every_update_of_the_others_pass(ps: ParameterServer) -> None:
    """Its steps follow each other at once, so each update of another falls into one of them."""
    result = simulate_parameter_server(ps, steps=8)
    done = Counter[int]()
    seen = Counter[int]()
    for place, step in enumerate(result.steps):
        done[step.worker] += 1
        seen[step.worker] += step.staleness[0]
        # Updates are applied in the order in which steps end; at one instant either may come first.
        others = place + 1 - done[step.worker]
        same = [s for s in result.steps if s.applied_s == step.applied_s]
        assert abs(seen[step.worker] - others) < len(same)


def test_mean_staleness_is_that_of_all_others() -> None:
    """Each of w − 1 equal workers applies one update while a gradient is made."""
    result = run(servers(8, 1, jitter=0.2, bound=ASYNC, update_s=0.01), steps=100)
    assert result.staleness().mean == pytest.approx(7, rel=0.02)
    by_worker = [result.staleness(worker) for worker in range(8)]
    assert all(own.mean == pytest.approx(7, rel=0.05) for own in by_worker)
    for staleness, number in result.staleness().histogram.items():
        assert number == sum(own.histogram.get(staleness, 0) for own in by_worker)


def test_a_straggler_holds_only_those_who_wait_for_it() -> None:
    """One of eight takes three times as long: synchronous 8/3c, asynchronous 7/c + 1/3c."""
    ps = servers(8, 2, pull=0.0, push=0.0, compute_s=0.5)
    ps = replace(ps, compute_s=(0.5,) * 7 + (1.5,))
    synchronous, free = run(ps), run(replace(ps, bound=ASYNC), steps=50)
    assert synchronous.steps_per_s == pytest.approx(8 / 1.5, rel=EXACT)
    assert free.steps_per_s == pytest.approx(7 / 0.5 + 1 / 1.5, rel=EXACT)
    assert worker_limit(ps) == pytest.approx(8 / 1.5)
    assert worker_limit(replace(ps, bound=ASYNC)) == pytest.approx(7 / 0.5 + 1 / 1.5)
    assert synchronous.worker_time()["waiting"] == pytest.approx(7 / 8 * 2 / 3, rel=EXACT)
    # In the long run a bound only buys a head start (Ho et al. 2013, section 2).
    stale = run(replace(ps, bound=3.0), steps=200)
    assert stale.steps_per_s == pytest.approx(8 / 1.5, rel=0.03)


def test_a_bound_absorbs_jitter() -> None:
    """The slowest of a step is another one each time: more slack, more steps."""
    ps = servers(8, 8, pull=0.01, push=0.01, jitter=0.3)
    rates = [run(replace(ps, bound=bound), steps=60).steps_per_s for bound in (0.0, 1.0, 4.0, ASYNC)]
    assert rates == sorted(rates)
    assert rates[0] < 0.75 * rates[-1]
    assert rates[2] > 0.95 * rates[-1]


def test_all_reduce_waits_for_the_slowest_too() -> None:
    ps = servers(8, 2)
    assert all_reduce_steps_per_s(ps, 0.6, steps=5) == pytest.approx(8 / 1.6, rel=EXACT)
    slow = replace(ps, compute_s=(1.0,) * 7 + (2.0,))
    assert all_reduce_steps_per_s(slow, 0.6, steps=5) == pytest.approx(8 / 2.6, rel=EXACT)
    jittered = replace(ps, jitter=0.3, worker_bytes_per_s=(1e9,) * 8, server_bytes_per_s=1e9)
    barrier = simulate_parameter_server(jittered, steps=30, seed=5).steps_per_s
    assert all_reduce_steps_per_s(jittered, 0.0, steps=30, seed=5) == pytest.approx(barrier, rel=1e-6)


MODEL = small_model()
JOB = Job(model=MODEL, seq_len=256, global_batch=16)
COSTS = CostModel(MODEL, round_cluster(), plain_stack())


def test_a_job_on_servers() -> None:
    """Weights in 16 bits come, gradients in 32 go, over every device's interface of 10 GB/s."""
    plan = ParallelPlan(dp=4, tp=2, pp=2)
    layout = Servers(shares=(3.0, 1.0), bytes_per_s=8e10, memory_bytes_per_s=1e12)
    ps = parameter_server(
        JOB, plan, COSTS, layout, compute_s=(1.0,) * 4, slow_links=(1.0, 1.0, 2.0, 1.0)
    )
    parameters = num_parameters(MODEL)
    first, second = ps.shards
    assert first.pull_bytes + second.pull_bytes == pytest.approx(2 * parameters)
    assert first.push_bytes + second.push_bytes == pytest.approx(4 * parameters)
    assert first.pull_bytes == pytest.approx(3 * second.pull_bytes)
    per_parameter = 4 + 2 * optimizer_bytes(JOB, COSTS.stack) + 2
    assert first.update_s == pytest.approx(0.75 * parameters * per_parameter / 1e12)
    assert first.add_s == pytest.approx(0.75 * parameters * 12 / 1e12)
    whole = 4 * 0.93 * 1e10
    assert ps.worker_bytes_per_s == pytest.approx((whole, whole, whole / 2, whole))
    assert ps.latency_s == pytest.approx(2 * NETWORK_HOP_S)  # there and back, over links without latency
    nodes = parameter_server(
        JOB, plan, COSTS, replace(layout, memory_bytes_per_s=None),
        compute_s=(1.0,) * 4, slow_links=(1.0,) * 4,
    )  # fmt: skip
    # All eight devices of a node read and write their part.
    assert nodes.shards[0].add_s == pytest.approx(
        memory_bound_s(COSTS.cluster, 0.75 * parameters * 12 / 8)
    )


def test_compute_of_workers_is_the_replay_of_one_replica() -> None:
    """A data-parallel step is compute, then all-reduce and update: nothing overlaps in this stack."""
    plan = ParallelPlan(dp=4, tp=2)
    for stragglers in ((), (Straggler(5, slow=2.0),), (Straggler(5, slow=2.0), Straggler(4, slow=3.0))):
        times = worker_compute_s(JOB, plan, COSTS, stragglers=stragglers)
        assert times[0] == times[1] == times[3]
        assert (times[2] > times[0]) is bool(stragglers)
        update_s = all_reduce_s(JOB, plan, COSTS, slow_link=0.0)
        reduce_s = all_reduce_s(JOB, plan, COSTS) - update_s
        slowest = max((straggler.slow for straggler in stragglers), default=1.0)
        prediction, _ = predict(JOB, plan, COSTS, uneven=Unevenness(stragglers=stragglers))
        assert max(times) + reduce_s + slowest * update_s == pytest.approx(
            prediction.step_time_s, rel=EXACT
        )


def test_a_worker_s_host_takes_its_time_once_a_step() -> None:
    plan = ParallelPlan(dp=4, tp=2)
    busy = CostModel(MODEL, round_cluster(), plain_stack(step_overhead_s=0.5))
    (more_s,), (less_s,) = (set(worker_compute_s(JOB, plan, costs)) for costs in (busy, COSTS))
    assert more_s == pytest.approx(less_s + 0.5)


def test_one_worker_whom_nobody_holds_goes_at_its_limit() -> None:
    ps = servers(1, 1, add_s=0.01, update_s=0.2, latency_s=0.05)
    for bound in (0.0, ASYNC):
        alone = replace(ps, bound=bound, server_bytes_per_s=1e15)
        assert run(alone).steps_per_s == pytest.approx(worker_limit(alone), rel=EXACT)


def test_a_slow_stage_slows_its_own_pipeline_only() -> None:
    plan = ParallelPlan(dp=4, tp=2, pp=2)
    slow = [Straggler(plan.rank(plan.coordinate(0)._replace(dp=2, pp=1)), slow=2.0)]
    times = worker_compute_s(JOB, plan, COSTS, stragglers=slow)
    assert times[0] == times[1] == times[3] < times[2] < 2 * times[0]


@pytest.mark.parametrize(
    "change",
    [
        {"bound": -1.0}, {"bound": 0.5}, {"jitter": 2.0}, {"compute_s": ()}, {"shards": ()},
        {"worker_bytes_per_s": (1.0,)}, {"server_bytes_per_s": 0.0}, {"latency_s": -1.0},
    ],
)  # fmt: skip
def test_nonsense_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ParsimError):
        replace(servers(2, 2), **change)
    with pytest.raises(ParsimError):
        Servers(shares=(1.0, math.nan), bytes_per_s=1.0)
