"""Flows over shared links: closed forms, and SimGrid."""

from __future__ import annotations

import random
from typing import Any

import pytest
import simpy

from parsim.errors import ParsimError
from parsim.simulate.flows import Demand, FlowNetwork, fair_rates
from tests.simgrid import simgrid_ends

GB = 1e9
Flow = tuple[float, list[str], float]


def ends_s(capacities: dict[str, float], flows: list[Flow], **options: Any) -> list[float]:
    """When flows (start, links, bytes) end."""
    env = simpy.Environment()
    network = FlowNetwork(env, capacities)
    ends = [0.0] * len(flows)

    def run(i: int, start_s: float, links: list[str], num_bytes: float) -> Any:
        yield env.timeout(start_s)
        yield network.transfer(links, num_bytes, **options)
        ends[i] = env.now

    for i, flow in enumerate(flows):
        env.process(run(i, *flow))
    env.run()
    return ends


def test_four_sizes_on_one_link() -> None:
    flows: list[Flow] = [(0.0, ["core"], k * GB) for k in (1, 2, 3, 4)]
    assert ends_s({"core": GB}, flows) == pytest.approx([4, 7, 9, 10], rel=1e-12)


def test_a_tree_of_two_leaves() -> None:
    """Two flows share an uplink at 0.4 GB/s each; a third has the rest of a host's interface."""
    capacities = {f"{way}{k}": GB for k in range(4) for way in "ud"} | {"upA": 8e8, "downB": 8e8}
    flows: list[Flow] = [
        (0.0, ["u0", "upA", "downB", "d2"], 4e8),
        (0.0, ["u1", "upA", "downB", "d3"], 4e8),
        (0.0, ["u0", "d1"], 6e8),
    ]
    assert ends_s(capacities, flows) == pytest.approx([1, 1, 1], rel=1e-12)


def test_a_flow_that_joins_and_one_that_leaves() -> None:
    """2 GB alone for 1 s, beside 0.5 GB for 1 s, alone again for 0.5 s."""
    flows: list[Flow] = [(0.0, ["l"], 2 * GB), (1.0, ["l"], 0.5 * GB)]
    assert ends_s({"l": GB}, flows) == pytest.approx([2.5, 2.0], rel=1e-12)


def test_latency_comes_first_and_empty_transfers_only_take_it() -> None:
    flows: list[Flow] = [(1.0, ["l"], GB), (1.0, ["l"], 0.0)]
    assert ends_s({"l": GB}, flows, latency_s=0.25) == pytest.approx([2.25, 1.25], rel=1e-12)


def test_a_capped_flow_leaves_the_rest_to_others() -> None:
    demands = [Demand(crossings={"l": 1}, cap_bytes_per_s=1.0), Demand(crossings={"l": 1})]
    assert fair_rates(demands, {"l": 10.0}) == [1.0, 9.0]


def test_a_class_of_n_flows_is_n_flows() -> None:
    """Three alike flows as one that crosses three times, beside a single one."""
    demands = [Demand(crossings={"l": 3}), Demand(crossings={"l": 1})]
    assert fair_rates(demands, {"l": 8.0}) == [2.0, 2.0]
    one_by_one: list[Flow] = [(0.0, ["l"], GB)] * 3 + [(0.5, ["l"], 2 * GB)]
    as_class: list[Flow] = [(0.0, ["l"] * 3, GB), (0.5, ["l"], 2 * GB)]
    apart, together = ends_s({"l": GB}, one_by_one), ends_s({"l": GB}, as_class)
    assert together == pytest.approx([apart[0], apart[3]], rel=1e-12)


def test_many_arrivals_ask_for_no_more_alarms_than_they_need() -> None:
    """Every later flow is shorter, so each arrival brings the next end forward."""
    env = simpy.Environment()
    network = FlowNetwork(env, {"l": GB})
    ended = []

    def run(i: int) -> Any:
        yield env.timeout(i * 1e-4)
        yield network.transfer(["l"], GB / 2**i)
        ended.append(i)

    for i in range(20):
        env.process(run(i))
    events = 0
    while env.peek() != float("inf"):
        env.step()
        events += 1
    assert sorted(ended) == list(range(20))
    assert events < 10 * 20


@pytest.mark.parametrize(
    ("links", "num_bytes", "words"),
    [(["x"], 1.0, "no such link"), ([], 1.0, "limits its rate"), (["l"], -1.0, "a size")],
)
def test_what_is_no_transfer(links: list[str], num_bytes: float, words: str) -> None:
    with pytest.raises(ParsimError, match=words):
        FlowNetwork(simpy.Environment(), {"l": 1.0}).transfer(links, num_bytes)


def test_what_a_link_carries_is_recorded() -> None:
    env = simpy.Environment()
    network = FlowNetwork(env, {"a": 2.0, "b": 8.0}, record=True)
    network.transfer(["a", "b"], 4.0)
    network.transfer(["a"], 2.0)
    env.run()
    assert network.loads == {
        "a": [(0.0, 2.0), (2.0, 2.0), (3.0, 0.0)],
        "b": [(0.0, 1.0), (2.0, 2.0), (3.0, 0.0)],
    }


def tree_case(seed: int) -> dict[str, Any]:
    """Random staggered flows between 16 hosts on 4 leaves."""
    draw = random.Random(seed)
    capacities = {f"{way}{host}": draw.choice([1, 2.5, 5]) * GB for host in range(16) for way in "ud"}
    capacities |= {f"{way}L{leaf}": draw.choice([2, 4, 8]) * GB for leaf in range(4) for way in "ud"}
    flows = []
    for _ in range(draw.randrange(2, 40)):
        a, b = draw.sample(range(16), 2)
        across = [] if a // 4 == b // 4 else [f"uL{a // 4}", f"dL{b // 4}"]
        flows.append((draw.randrange(4) * 0.25, [f"u{a}", *across, f"d{b}"], draw.randrange(1, 10**9)))
    return {"capacities": capacities, "flows": flows}


def shared_case(seed: int) -> dict[str, Any]:
    """Random staggered flows over any few of eight links."""
    draw = random.Random(seed)
    capacities = {f"l{i}": draw.uniform(0.5, 5) * GB for i in range(8)}
    flows = []
    for _ in range(draw.randrange(2, 30)):
        path = draw.sample(sorted(capacities), draw.randrange(1, 5))
        flows.append((draw.uniform(0, 1), path, draw.randrange(1, 10**9)))
    return {"capacities": capacities, "flows": flows}


def test_simgrid_agrees_on_staggered_flows() -> None:
    cases = [make(seed) for seed in range(25) for make in (tree_case, shared_case)]
    for case, expected in zip(cases, simgrid_ends(cases), strict=True):
        assert ends_s(case["capacities"], case["flows"]) == pytest.approx(expected, rel=1e-6)
