"""Collectives message by message: closed forms where nothing is shared, SimGrid where links are."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from parsim.cli.main import app
from parsim.config import load_cluster
from parsim.cost.algorithms import double_tree_s, pipeline_s, rounds_s
from parsim.cost.collective import (
    KINDS,
    NETWORK_EFFICIENCY,
    NETWORK_HOP_S,
    Group,
    collective_s,
    ring_s,
)
from parsim.errors import ParsimError
from parsim.hardware import Cluster
from parsim.simulate.collectives import (
    ALGORITHMS_OF,
    Collective,
    closed_form_s,
    messages_of,
    simulated_s,
)
from parsim.simulate.fabric import fabric_of
from parsim.simulate.trees import double_tree
from tests.builders import round_cluster
from tests.simgrid import simgrid_ends

MB = 1e6
NIC = NETWORK_EFFICIENCY * 1e10
SIZES = (1e3, 1e9)
BY_KIND = [(kind, algorithm) for kind, names in ALGORITHMS_OF.items() for algorithm in names]


def alone(domain: int = 1) -> Cluster:
    """Domains of so many devices, with a latency of 2 us between them."""
    cluster = round_cluster(gpus_per_node=domain, scale_up_domain=domain)
    return replace(cluster, inter_node=replace(cluster.inter_node, latency_s=2e-6))


def expected_s(kind: str, algorithm: str, p: int, size: float, chunks: int) -> float:
    """Closed forms, with a hop of 2 us on the link and 5 us of the host."""
    alpha = 2e-6 + NETWORK_HOP_S
    if algorithm == "tree":
        return double_tree_s(p, chunks, size, alpha, NIC)
    if algorithm == "chain":
        return pipeline_s([alpha + size / chunks / NIC] * (p - 1), chunks)
    if algorithm == "in-switch":
        # Up to the switch and down from it, half of the latency and a hop of the host each.
        return pipeline_s([1e-6 + NETWORK_HOP_S + size / chunks / NIC] * 2, chunks)
    return rounds_s(p, (2 if kind == "all_reduce" else 1) * (p - 1), size, alpha, NIC)


@pytest.mark.parametrize("p", [2, 3, 4, 8, 13])
@pytest.mark.parametrize(("kind", "algorithm"), BY_KIND)
def test_on_a_switch_every_algorithm_takes_its_closed_form(kind: str, algorithm: str, p: int) -> None:
    fabric = fabric_of("switch", alone(), p)
    for size in SIZES:
        for chunks in (1, 7):
            collective = Collective(
                kind=kind, algorithm=algorithm, num_bytes=size, gpus=tuple(range(p)), chunks=chunks
            )
            expected = expected_s(kind, algorithm, p, size, chunks)
            assert simulated_s([collective], fabric)[0] == pytest.approx(expected, rel=1e-9)
            assert closed_form_s(collective, fabric) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["h100-sxm-80gb", "a100-sxm-80gb", "b200-sxm-180gb", "v100-sxm-32gb"])
@pytest.mark.parametrize("kind", KINDS)
def test_inside_a_domain_a_collective_takes_what_was_measured(name: str, kind: str) -> None:
    cluster = load_cluster(name)
    fabric = fabric_of("switch", cluster, 8)
    for p in (2, 3, 8):
        for size in (1e4, 1e6, 1e9):
            found = [
                simulated_s([Collective(kind=kind, algorithm=algorithm, num_bytes=size,
                                        gpus=tuple(range(p)))], fabric)[0]
                for algorithm in ALGORITHMS_OF[kind] if algorithm not in ("tree", "hierarchical")
            ]  # fmt: skip
            expected = collective_s(cluster, kind, size, Group(p, p))
            assert min(found) == pytest.approx(expected, rel=1e-9)


def test_a_ring_cannot_keep_up_with_sums_in_the_switch() -> None:
    """Eight H100s reach 1.05 of their links by NCCL's count, which no ring could."""
    cluster = load_cluster("h100-sxm-80gb")
    fabric, gpus = fabric_of("switch", cluster, 8), tuple(range(8))
    one = Collective(kind="all_reduce", algorithm="ring", num_bytes=4e9, gpus=gpus)
    least = 2 * 7 / 8 * 4e9 / cluster.intra_node.bandwidth_bytes_per_s
    assert collective_s(cluster, "all_reduce", 4e9, Group(8, 8)) < least
    assert simulated_s([one], fabric)[0] == pytest.approx(least, rel=1e-9)
    assert closed_form_s(one, fabric) == pytest.approx(least, rel=1e-9)


@pytest.mark.parametrize("algorithm", ["hierarchical", "in-switch", "tree"])
@pytest.mark.parametrize("text", ["rail", "switch", "fat-tree"])
@pytest.mark.parametrize(("domain", "gpus"), [(2, 8), (3, 9), (8, 16)])
def test_levels_add_up(algorithm: str, text: str, domain: int, gpus: int) -> None:
    """Inside as measured; between by the closed form of the algorithm on each device's shard."""
    cluster, chunks, domains = alone(domain), 5, gpus // domain
    fabric = fabric_of(text, cluster, gpus)
    for size in SIZES:
        collective = Collective(
            kind="all_reduce",
            algorithm=algorithm,
            num_bytes=size,
            gpus=tuple(range(gpus)),
            chunks=chunks,
        )
        inside = Group(domain, domain)
        parts = sum(collective_s(cluster, k, size, inside) for k in ("reduce_scatter", "all_gather"))
        between = expected_s("all_reduce", algorithm, domains, size / domain, chunks)
        assert simulated_s([collective], fabric)[0] == pytest.approx(parts + between, rel=1e-9)
        assert closed_form_s(collective, fabric) == pytest.approx(parts + between, rel=1e-9)


def test_rings_side_by_side_fill_all_interfaces_as_the_cost_model_says() -> None:
    """The slower of the network and the domain's own links; the cost model joins both with an exponent
    of 4, which is at most 2^(1/4) times as much.
    """
    cluster = load_cluster("h100-sxm-80gb")
    fabric = fabric_of("rail", cluster, 32)
    collective = Collective(kind="all_reduce", algorithm="ring", num_bytes=8e9, gpus=tuple(range(16)))
    expected = ring_s(cluster, "all_reduce", 8e9, Group(16, 8))
    assert expected / 2**0.25 <= simulated_s([collective], fabric)[0] <= expected


def test_a_ring_over_the_network_takes_what_the_cost_model_says() -> None:
    """Beside the network the cost model sees each domain's own links: (9.3 / 100)^4 / 4 of the time."""
    cluster = alone()
    fabric = fabric_of("fat-tree,leaf=4", cluster, 16)
    for kind in ("all_reduce", "all_gather", "reduce_scatter"):
        collective = Collective(kind=kind, algorithm="ring", num_bytes=1e9, gpus=tuple(range(16)))
        expected = ring_s(cluster, kind, 1e9, Group(16, 1))
        assert simulated_s([collective], fabric)[0] == pytest.approx(expected, rel=3e-5)


def test_two_rings_over_an_oversubscribed_uplink_share_it_and_simgrid_agrees() -> None:
    """Ranks 0 2 4 6 and 1 3 5 7 on two leaves of four, joined by one link of an interface's width.

    Each ring crosses the link once in each direction: every round takes twice the transfer.
    """
    cluster = alone()
    fabric = fabric_of("fat-tree,leaf=4,oversubscription=4", cluster, 8)
    odd_and_even = (0, 2, 4, 6), (1, 3, 5, 7)
    rings = [
        Collective(kind="all_reduce", algorithm="ring", num_bytes=80 * MB, gpus=gpus)
        for gpus in odd_and_even
    ]
    both = simulated_s(rings, fabric)
    assert simulated_s(rings[:1], fabric)[0] == pytest.approx(
        rounds_s(4, 6, 80 * MB, 7e-6, NIC), rel=1e-9
    )
    assert both == pytest.approx([rounds_s(4, 6, 160 * MB, 7e-6, NIC)] * 2, rel=1e-9)
    assert both == pytest.approx(
        by_simgrid(rings, cluster, "fat-tree,leaf=4,oversubscription=4"), rel=1e-6
    )


def by_simgrid(collectives: list[Collective], cluster: Cluster, text: str) -> list[float]:
    """Ends of collectives whose messages SimGrid sends."""
    fabric = fabric_of(text, cluster, 8)
    flows, owners, first = [], [], 0
    for number, collective in enumerate(collectives):
        messages = messages_of(collective, fabric)
        for message in messages:
            path = [str(link) for link in fabric.route(message.source[1], message.target[1])]
            after = [first + i for i in message.after]
            flows.append((7e-6, path, message.num_bytes, after))
            owners.append(number)
        first += len(messages)
    capacities = {str(link): rate for link, rate in fabric.capacities().items()}
    ends = [0.0] * len(collectives)
    for owner, end in zip(
        owners, simgrid_ends([{"capacities": capacities, "flows": flows}])[0], strict=True
    ):
        ends[owner] = max(ends[owner], end)
    return ends


def test_contended_exchanges_end_as_simgrid_says() -> None:
    text = "fat-tree,leaf=2,oversubscription=2,routing=hash"
    cluster = alone()
    collectives = [
        Collective(kind="all_to_all", algorithm="pairwise", num_bytes=40 * MB, gpus=(0, 3, 5, 6)),
        Collective(kind="all_reduce", algorithm="ring", num_bytes=64 * MB, gpus=(7, 1, 2, 4)),
        Collective(kind="broadcast", algorithm="chain", num_bytes=20 * MB, gpus=(0, 4, 1), chunks=4),
    ]
    found = simulated_s(collectives, fabric_of(text, cluster, 8))
    alone_s = [simulated_s([one], fabric_of(text, cluster, 8))[0] for one in collectives]
    assert found == pytest.approx(by_simgrid(collectives, cluster, text), rel=1e-6)
    assert all(together > 1.05 * apart for together, apart in zip(found, alone_s, strict=True))


@pytest.mark.parametrize("n", [2, 3, 4, 6, 7, 16, 33, 64, 100])
def test_double_trees_are_trees_of_log_height_that_share_out_the_work(n: int) -> None:
    for parents in (trees := double_tree(n)):
        assert sum(parent < 0 for parent in parents) == 1
        for rank in range(n):
            way = [rank]
            while parents[way[-1]] >= 0:
                way.append(parents[way[-1]])
            assert len(way) - 1 <= math.ceil(math.log2(n))
    both = [rank for rank in range(n) if all(rank in parents for parents in trees)]
    assert both == ([0] if n % 2 else [])
    degrees = [sum(parents.count(rank) + (parents[rank] >= 0) for parents in trees) for rank in range(n)]
    assert max(degrees) == min(4, n)


def test_what_is_known_about_large_buffers() -> None:
    """Bandwidth terms: 2(p-1)/p of a ring (Patarasuk and Yuan), 2 of two trees (Sanders et al.: 2 for an
    all-reduce), 1 of a chain."""
    size, chunks = 1e12, 10**6
    once_s = size / NIC
    assert rounds_s(16, 30, size, 0.0, NIC) == pytest.approx(2 * 15 / 16 * once_s, rel=1e-9)
    assert double_tree_s(16, chunks, size, 0.0, NIC) == pytest.approx(2 * once_s, rel=1e-4)
    assert pipeline_s([once_s / chunks] * 15, chunks) == pytest.approx(once_s, rel=1e-4)


@pytest.mark.parametrize(("kind", "algorithm"), BY_KIND)
def test_messages_come_in_order_and_bring_every_rank_its_bytes(kind: str, algorithm: str) -> None:
    """All but its own part: 50 of 60 bytes on six ranks; an all-reduce once down and once round."""
    fabric, gpus = fabric_of("switch", alone(), 6), tuple(range(6))
    messages = messages_of(
        Collective(kind=kind, algorithm=algorithm, num_bytes=60.0, gpus=gpus, chunks=3), fabric
    )
    assert all(before < number for number, m in enumerate(messages) for before in m.after)
    if algorithm in ("ring", "hierarchical"):
        # What a rank passes on has come to it before.
        passed_on = messages[len(gpus) :]
        assert all(m.source in {messages[i].target for i in m.after} for m in passed_on)
    received = [sum(m.num_bytes for m in messages if m.target == ("gpu", gpu)) for gpu in gpus]
    if algorithm == "tree":
        assert sum(received) == pytest.approx(2 * 5 * 60)
    elif algorithm == "chain":
        assert received == pytest.approx([0, 60, 60, 60, 60, 60])
    else:
        whole = {"ring": 100 if kind == "all_reduce" else 50, "hierarchical": 100, "in-switch": 60}
        assert received == pytest.approx([whole.get(algorithm, 50)] * 6)


def test_the_command_times_every_algorithm() -> None:
    words = "collective --bytes 256MB --ranks 8 --stride 8 --chunks 4 --hardware h100-sxm-80gb"
    arguments = [*words.split(), "--fabric", "fat-tree,leaf=16,oversubscription=4"]
    one = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)["algorithms"]
    assert [row["algorithm"] for row in one] == list(ALGORITHMS_OF["all_reduce"])
    for row in one[:2]:
        assert row["alone_s"] == row["seconds"] >= row["closed_form_s"] * (1 - 1e-9)
    eight = json.loads(CliRunner().invoke(app, [*arguments, "--groups", "8", "--json"]).stdout)
    ring = eight["algorithms"][0]
    # Eight rings leave a leaf of two nodes over four uplinks: two on each.
    assert ring["seconds"] > 1.9 * ring["alone_s"]
    torus = CliRunner().invoke(app, [*arguments, "--fabric", "torus"]).stdout
    assert "no switches" in torus


@pytest.mark.parametrize(
    ("kind", "algorithm", "gpus", "words"),
    [
        ("all_gather", "tree", (0, 1), "no such algorithm"),
        ("all_reduce", "ring", (0,), "two ranks or more"),
        ("all_reduce", "ring", (0, 0), "all different"),
        ("all_reduce", "hierarchical", (0, 1, 2, 4), "as many ranks in every domain"),
        ("all_to_all", "pairwise", tuple(range(1000)), "too many messages"),
    ],
)
def test_what_is_no_collective(kind: str, algorithm: str, gpus: tuple[int, ...], words: str) -> None:
    fabric = fabric_of("switch", alone(4), 1000)
    with pytest.raises(ParsimError, match=words):
        messages_of(Collective(kind=kind, algorithm=algorithm, num_bytes=1e6, gpus=gpus), fabric)


def test_the_cost_model_of_a_group_that_one_node_holds_is_that_of_the_node() -> None:
    """Seven devices from the first on lie in one node of eight, though later groups of seven do not."""
    words = "collective --bytes 1GB --ranks 7 --hardware h100-sxm-80gb --json"
    found = json.loads(CliRunner().invoke(app, words.split()).stdout)["algorithms"]
    inside_s = collective_s(load_cluster("h100-sxm-80gb"), "all_reduce", 1e9, Group(7, 7))
    assert [row["cost_model_s"] for row in found] == pytest.approx([inside_s] * len(found), rel=1e-12)
    (ring,) = (row for row in found if row["algorithm"] == "ring")
    assert ring["alone_s"] == pytest.approx(ring["cost_model_s"], rel=0.1)
