"""Max-min fairness, on random flows over random links."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from parsim.simulate.flows import Demand, FlowNetwork, fair_rates


class Load(NamedTuple):
    """A network and what is sent over it."""

    capacities: dict[int, float]
    demands: list[Demand]
    starts_s: list[float]
    sizes: list[float]


@st.composite
def loads(draw: st.DrawFn) -> Load:
    positive = st.floats(0.1, 10)
    capacities = dict(enumerate(draw(st.lists(positive, min_size=1, max_size=6))))
    demand = st.builds(
        lambda crossings, cap: Demand(crossings=crossings, cap_bytes_per_s=cap),
        st.dictionaries(st.sampled_from(sorted(capacities)), st.integers(1, 4), min_size=1),
        st.one_of(st.just(math.inf), positive),
    )
    demands = draw(st.lists(demand, min_size=1, max_size=8))
    n = len(demands)
    starts = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.5]), min_size=n, max_size=n))
    sizes = draw(st.lists(positive, min_size=n, max_size=n))
    return Load(capacities, demands, starts, sizes)


def used(load: Load, rates: list[float]) -> dict[int, float]:
    total = dict.fromkeys(load.capacities, 0.0)
    for demand, rate in zip(load.demands, rates, strict=True):
        for link, times in demand.crossings.items():
            total[link] += times * rate
    return total


@given(loads())
def test_no_link_is_overfull_and_every_flow_has_its_bottleneck(load: Load) -> None:
    rates = fair_rates(load.demands, load.capacities)
    total = used(load, rates)
    for link, capacity in load.capacities.items():
        assert total[link] <= capacity * (1 + 1e-9)
    for demand, rate in zip(load.demands, rates, strict=True):
        greatest = {
            link: max(r for d, r in zip(load.demands, rates, strict=True) if link in d.crossings)
            for link in demand.crossings
        }
        bottleneck = any(
            total[link] >= load.capacities[link] * (1 - 1e-9) and rate >= greatest[link] * (1 - 1e-9)
            for link in demand.crossings
        )
        assert bottleneck or rate == pytest.approx(demand.cap_bytes_per_s, rel=1e-9)


@given(loads(), st.randoms(use_true_random=False))
def test_the_order_of_flows_does_not_matter(load: Load, random: Any) -> None:
    order = list(range(len(load.demands)))
    random.shuffle(order)
    rates = fair_rates(load.demands, load.capacities)
    again = fair_rates([load.demands[i] for i in order], load.capacities)
    assert again == pytest.approx([rates[i] for i in order], rel=1e-9)


def run(load: Load) -> tuple[list[float], FlowNetwork]:
    env = simpy.Environment()
    network = FlowNetwork(env, load.capacities, record=True)
    ends = [math.nan] * len(load.demands)

    def sender(i: int) -> Any:
        yield env.timeout(load.starts_s[i])
        demand = load.demands[i]
        yield network.transfer(demand.crossings, load.sizes[i], cap_bytes_per_s=demand.cap_bytes_per_s)
        ends[i] = env.now

    for i in range(len(load.demands)):
        env.process(sender(i))
    env.run()
    return ends, network


@given(loads())
@settings(max_examples=60)
def test_bytes_are_conserved_on_every_link(load: Load) -> None:
    ends, network = run(load)
    assert not any(math.isnan(end) for end in ends)
    for link in load.capacities:
        points = network.loads.get(link, [(0.0, 0.0)])
        carried = sum(rate * (later - time) for (time, rate), (later, _) in pairwise(points))
        sent = sum(n * size for demand, size in zip(load.demands, load.sizes, strict=True)
                   for k, n in demand.crossings.items() if k == link)  # fmt: skip
        assert carried == pytest.approx(sent, rel=1e-9, abs=1e-9)
        assert points[-1][1] == 0
        assert all(rate <= load.capacities[link] * (1 + 1e-9) for _, rate in points)


@given(loads())
@settings(max_examples=60)
def test_rates_in_time_are_those_of_all_flows_at_once(load: Load) -> None:
    """Sharing only what a change reaches gives what sharing everything anew gives."""
    ends, _ = run(load)
    assert ends == pytest.approx(run_naively(load), rel=1e-9)


def run_naively(load: Load) -> list[float]:
    """The same, step by step: all rates anew at every start and end."""
    n = len(load.demands)
    left, ends, now = list(load.sizes), [math.nan] * n, 0.0
    while any(math.isnan(end) for end in ends):
        active = [i for i in range(n) if load.starts_s[i] <= now and math.isnan(ends[i])]
        rates = fair_rates([load.demands[i] for i in active], load.capacities)
        waits = [left[i] / rate for i, rate in zip(active, rates, strict=True)]
        waits += [start - now for start in load.starts_s if start > now]
        step = min(waits)
        now += step
        for i, rate in zip(active, rates, strict=True):
            left[i] -= rate * step
            if left[i] <= 1e-12 * load.sizes[i]:
                ends[i] = now
    return ends


@given(loads(), st.integers(0, 5), st.floats(1, 10))
def test_more_bandwidth_never_slows_a_lone_flow(load: Load, which: int, factor: float) -> None:
    link = which % len(load.capacities)
    faster = load.capacities | {link: load.capacities[link] * factor}
    for demand in load.demands:
        assert fair_rates([demand], faster)[0] >= fair_rates([demand], load.capacities)[0]
