"""Fabrics: graphs of links, and routes over them."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import networkx as nx
import pytest

from parsim.config import load_cluster
from parsim.cost.collective import NETWORK_EFFICIENCY
from parsim.errors import ParsimError
from parsim.simulate.fabric import Fabric, describe_link, fabric_of
from parsim.simulate.torus import torus_way
from tests.builders import round_cluster

NIC = NETWORK_EFFICIENCY * 1e10
TEXTS = ("switch", "rail", "fat-tree", "fat-tree,leaf=16,oversubscription=4,routing=hash", "rail,leaf=2",
         "torus", "torus,dims=2x2x4")  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_routes_are_paths_of_the_graph_as_short_as_they_can_be(text: str) -> None:
    fabric = fabric_of(text, round_cluster(), 128)
    draw = random.Random(0)
    for _ in range(200):
        source, target = draw.sample(range(128), 2)
        links = fabric.route(source, target)
        assert links[0][0] == ("gpu", source)
        assert links[-1][1] == ("gpu", target)
        assert all(fabric.graph.has_edge(*link) for link in links)
        assert all(a[1] == b[0] for a, b in pairwise(links))
        same_domain = source // 8 == target // 8
        shortest = nx.shortest_path_length(fabric.graph, ("gpu", source), ("gpu", target))
        # Over to another rail there is a switch inside the domain in the way, or a spine outside.
        assert len(links) == 2 if same_domain else shortest <= len(links) <= shortest + 2
        if fabric.name != "rail":
            assert len(links) == shortest


@pytest.mark.parametrize("text", TEXTS)
def test_every_device_reaches_every_other_with_its_whole_interface(text: str) -> None:
    fabric = fabric_of(text, round_cluster(), 128)
    assert nx.is_strongly_connected(fabric.graph)
    capacities = fabric.capacities()
    for gpu in range(128):
        links = fabric.graph.out_edges(("gpu", gpu))
        out = sum(capacities[link] for link in links if link[1][0] != "nvswitch")
        assert out == pytest.approx(NIC)
        assert capacities[("gpu", gpu), ("nvswitch", gpu // 8)] == 1e11


def cut_bytes_per_s(fabric: Fabric, gpus: int) -> float:
    """What gets from one half of the devices to the other over the network (maximum flow)."""
    graph = fabric.graph.copy()
    for a, b, data in list(graph.edges(data=True)):
        data["capacity"] = 0.0 if "nvswitch" in (a[0], b[0]) else data["bytes_per_s"]
    for gpu in range(gpus):
        ends = (("from", 0), ("gpu", gpu)) if gpu < gpus // 2 else (("gpu", gpu), ("to", 0))
        graph.add_edge(*ends)
    value, _ = nx.maximum_flow(graph, ("from", 0), ("to", 0))
    return float(value)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("switch", 1),
        ("fat-tree,leaf=16", 1),
        ("fat-tree,leaf=16,oversubscription=4", 1 / 4),
        ("fat-tree,leaf=16,oversubscription=3", 1 / 3),
        ("rail,leaf=4", 1),
        ("rail,leaf=4,oversubscription=2", 1 / 2),
        ("rail,leaf=8", 1),
        # 8 domains in a ring: two of the cables, each half of a domain's interfaces, cross the middle.
        ("torus,dims=8", 2 * 0.5 * 8 / 32),
        # In 2 x 4, two rings cross it, each cable a quarter of a domain's interfaces.
        ("torus,dims=2x4", 2 * 2 * 0.25 * 8 / 32),
    ],
)
def test_bisection_by_maximum_flow(text: str, share: float) -> None:
    fabric = fabric_of(text, round_cluster(), 64)
    assert cut_bytes_per_s(fabric, 64) == pytest.approx(share * 32 * NIC, rel=1e-9)


@pytest.mark.parametrize("text", ["fat-tree,leaf=16", "rail,leaf=4"])
@pytest.mark.parametrize("shift", [8, 16, 24, 64])
def test_shifts_by_whole_domains_meet_on_no_link_where_nothing_is_oversubscribed(
    text: str, shift: int
) -> None:
    fabric = fabric_of(text, round_cluster(), 128)
    load = Counter(link for gpu in range(128) for link in fabric.route(gpu, (gpu + shift) % 128))
    assert max(load.values()) == 1


def test_hashed_routes_do_meet() -> None:
    fabric = fabric_of("fat-tree,leaf=16,routing=hash", round_cluster(), 128)
    load = Counter(link for gpu in range(128) for link in fabric.route(gpu, (gpu + 64) % 128))
    assert max(load.values()) > 1


def test_rails_keep_a_device_among_its_kind() -> None:
    """Device i of every node is on leaf i: to another rail is one more hop."""
    fabric = fabric_of("rail", round_cluster(), 64)
    assert fabric.route(3, 11) == ((("gpu", 3), ("leaf", 3)), (("leaf", 3), ("gpu", 11)))
    assert [link[1] for link in fabric.route(3, 12)] == [
        ("nvswitch", 0), ("gpu", 4), ("leaf", 4), ("gpu", 12),
    ]  # fmt: skip


def test_a_torus_goes_the_shorter_way_round() -> None:
    for source in range(60):
        for target in range(60):
            way = torus_way((3, 4, 5), source, target)
            hops = 0
            for stride, size in ((1, 3), (3, 4), (12, 5)):
                apart = abs(source // stride % size - target // stride % size)
                hops += min(apart, size - apart)
            assert (way[0], way[-1], len(way)) == (source, target, hops + 1)


def test_a_profile_s_latency_is_that_of_the_whole_way() -> None:
    cluster = load_cluster("h100-sxm-80gb")
    network = replace(cluster.inter_node, latency_s=4e-6)
    fabric = fabric_of("fat-tree,leaf=8", replace(cluster, inter_node=network), 64)
    assert fabric.latency_s(fabric.route(0, 63)) == pytest.approx(4e-6)
    assert fabric.latency_s(fabric.route(0, 7)) == pytest.approx(cluster.intra_node.latency_s)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fattree", "did you mean 'fat-tree'?"),
        ("fat-tree,leafs=3", "did you mean 'leaf'?"),
        ("fat-tree,oversubscription=0.5", "from 1"),
        ("fat-tree,oversubscription=inf", "from 1"),
        ("rail,leaf=0", "a count from 1"),
        ("torus,dims=3x3", "multiply to 16"),
        ("torus,leaf=3", "unknown setting 'leaf'"),
        ("rail,routing=random", "modulo, hash"),
        ("switch,algorithm=rings", "did you mean 'ring'?"),
    ],
)
def test_what_is_no_fabric(text: str, words: str) -> None:
    with pytest.raises(ParsimError) as caught:
        fabric_of(text, round_cluster(), 128)
    assert words in str(caught.value)


def test_links_are_named_for_reading() -> None:
    assert describe_link((("leaf", 3), ("spine", 0))) == "leaf 3 → spine 0"
