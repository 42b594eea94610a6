"""A step over a fabric: what is true of any plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parsim.cost.stage import CostModel
from parsim.hardware import Link
from parsim.plan import ASYNCHRONOUS_SCHEDULES
from parsim.simulate.contention import Contention, predict_over
from parsim.simulate.fabric import fabric_of
from parsim.simulate.network_load import NetworkLoad, network_load_of
from parsim.simulate.prediction import predict, program_of
from parsim.simulate.uneven import Unevenness, replicas_of, uneven_program, unfolded_program
from tests.strategies import CASES, Case, stragglers

FLUSHED = CASES.filter(lambda case: case[1].schedule not in ASYNCHRONOUS_SCHEDULES)
TEXTS = st.sampled_from(
    ["switch", "rail", "rail,leaf=1,oversubscription=4", "fat-tree,leaf=8", "torus",
     "fat-tree,leaf=4,oversubscription=3,routing=hash"]
)  # fmt: skip


def over(case: Case, text: str, *, wider: float = 1.0) -> Contention:
    job, plan, costs = case
    network = costs.cluster.inter_node
    faster = replace(network, bandwidth_bytes_per_s=wider * network.bandwidth_bytes_per_s)
    fabric = fabric_of(text, replace(costs.cluster, inter_node=faster), plan.gpus)
    return predict_over(fabric, job, plan, costs)[2]


@given(FLUSHED, TEXTS)
@settings(max_examples=40)
def test_with_wide_links_the_step_is_what_it_is_without_a_fabric(case: Case, text: str) -> None:
    found = over(case, text, wider=1000.0)
    assert found.step_s == pytest.approx(predict(*case)[0].step_time_s, rel=1e-9)
    assert set(found.contended_s.values()) <= {0.0}


@given(FLUSHED, TEXTS)
@settings(max_examples=40)
def test_sharing_links_only_slows(case: Case, text: str) -> None:
    found = over(case, text)
    assert found.step_s >= found.alone_s * (1 - 1e-9)
    assert found.alone_s == pytest.approx(predict(*case)[0].step_time_s, rel=1e-9)
    assert all(seconds >= 0 for seconds in found.contended_s.values())
    for use in found.links:
        assert 0 < use.mean <= 1 + 1e-9
        assert all(0 <= load <= 1 + 1e-9 for _, load in use.points)
        assert use.points[-1][1] == 0


@given(FLUSHED, TEXTS, st.data())
@settings(max_examples=40)
def test_stragglers_on_wide_links_are_what_they_are_without_a_fabric(
    case: Case, text: str, data: st.DataObject
) -> None:
    job, plan, costs = case
    uneven = Unevenness(stragglers=data.draw(stragglers(plan.gpus)))
    expected, _ = predict(job, plan, costs, uneven=uneven)
    network = costs.cluster.inter_node
    wide = replace(network, bandwidth_bytes_per_s=1000.0 * network.bandwidth_bytes_per_s)
    fabric = fabric_of(text, replace(costs.cluster, inter_node=wide), plan.gpus)
    found, timeline, contention = predict_over(fabric, job, plan, costs, uneven=uneven)
    assert found.step_time_s == pytest.approx(expected.step_time_s, rel=1e-9)
    assert found.breakdown_s == pytest.approx(expected.breakdown_s, rel=1e-9, abs=1e-12)
    assert set(contention.contended_s.values()) <= {0.0}
    assert timeline.copies == uneven_program(program_of(job, plan, costs)[0], plan, uneven).copies


@given(FLUSHED, TEXTS, st.data())
@settings(max_examples=40)
def test_replicas_that_differ_put_the_same_bytes_on_the_network(
    case: Case, text: str, data: st.DataObject
) -> None:
    job, plan, costs = case
    fabric = fabric_of(text, costs.cluster, plan.gpus)
    program, _ = program_of(job, plan, costs)
    replicas = replicas_of(plan, Unevenness(stragglers=data.draw(stragglers(plan.gpus))))
    apart = network_load_of(unfolded_program(program, replicas), job, plan, costs, fabric, replicas)
    together = network_load_of(program, job, plan, costs, fabric)

    def link_bytes(load: NetworkLoad) -> float:
        return sum(
            way.num_bytes * times * load.links[kind].alike
            for way in load.carried.values()
            for kind, times in way.crossings.items()
        )

    assert link_bytes(apart) == pytest.approx(link_bytes(together), rel=1e-9)


@given(FLUSHED)
@settings(max_examples=15)
def test_the_same_input_gives_the_same_answer(case: Case) -> None:
    one, other = (over(case, "fat-tree,leaf=4,oversubscription=2") for _ in range(2))
    assert one.times == other.times
    assert one.to_data() == other.to_data()


@given(FLUSHED, st.sampled_from(["switch", "rail", "fat-tree"]))
@settings(max_examples=60)
def test_alone_a_transfer_asks_no_more_of_an_interface_than_it_has(case: Case, text: str) -> None:
    """So that a network without oversubscription slows nothing that is alone on it."""
    job, plan, costs = case
    fabric = fabric_of(text, costs.cluster, plan.gpus)
    load = network_load_of(program_of(job, plan, costs)[0], job, plan, costs, fabric)
    for index, way in load.carried.items():
        task = load.program.tasks[index]
        for kind, times in way.crossings.items():
            ends = {node[0] for node in load.links[kind].example}
            if "gpu" in ends and "nvswitch" not in ends:
                asked = times * way.num_bytes / task.duration_s
                assert asked <= load.links[kind].bytes_per_s * (1 + 1e-9), task


@given(CASES, st.floats(1, 4))
@settings(max_examples=40)
def test_more_bandwidth_never_slows_a_step_that_shares_nothing(case: Case, factor: float) -> None:
    job, plan, costs = case

    def faster(link: Link) -> Link:
        return replace(link, bandwidth_bytes_per_s=factor * link.bandwidth_bytes_per_s)

    cluster = costs.cluster
    for wider in (
        replace(cluster, inter_node=faster(cluster.inter_node)),
        replace(cluster, intra_node=faster(cluster.intra_node)),
    ):
        quick = predict(job, plan, CostModel(costs.model, wider, costs.stack))[0].step_time_s
        assert quick <= predict(*case)[0].step_time_s * (1 + 1e-9)
