"""What is true of one collective on any machine."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from parsim.config import load_cluster
from parsim.cost.collective import (
    DEFAULT_LINK_EFFICIENCY,
    KINDS,
    NETWORK_EFFICIENCY,
    Group,
    collective_fit,
    collective_s,
    group_of,
    send_recv_s,
    wire_factor,
)
from parsim.errors import ParsimError
from parsim.hardware import Cluster
from parsim.kernels import CollectiveFit, Kernels, MeasuredCollective, Protocol

GB = 1e9


def machine(*fits: CollectiveFit, **kernels: Any) -> Cluster:
    """Eight GPUs a domain at 450 GB/s, each with 50 GB/s of network."""
    return replace(load_cluster("h100-sxm-80gb"), kernels=Kernels(collective=fits, **kernels))


def fit(
    kind: str, gpus: int, latency_s: float = 2e-5, bus: float = 0.8, p: float = 1.0
) -> CollectiveFit:
    long = Protocol(latency_s=latency_s, bus_efficiency=bus, exponent=p)
    return CollectiveFit(kind=kind, gpus=gpus, long=long, source="", date="", fitted_to="")


def test_groups_by_stride() -> None:
    cluster = machine()
    assert group_of(cluster, size=8, stride=1) == Group(8, 8)
    assert group_of(cluster, size=16, stride=1) == Group(16, 8)
    assert group_of(cluster, size=4, stride=2) == Group(4, 4)
    assert group_of(cluster, size=4, stride=4) == Group(4, 2)
    assert group_of(cluster, size=32, stride=8) == Group(32, 1)
    assert group_of(cluster, size=3, stride=64) == Group(3, 1)
    assert group_of(load_cluster("gb200-nvl72"), size=64, stride=1) == Group(64, 64)
    assert Group(12, 8).domains == 2
    with pytest.raises(ParsimError):
        Group(4, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_to_talk_to_costs_nothing(kind: str) -> None:
    assert collective_s(machine(), kind, 1 * GB, Group(1, 1)) == 0
    assert collective_s(machine(), kind, 0, Group(8, 8)) == 0


@pytest.mark.parametrize("n", [2, 4, 8])
def test_long_messages_inside_a_domain_go_round_a_ring(n: int) -> None:
    """Patarasuk and Yuan 2009: 2(n−1)/n of the bytes over each link for an all-reduce, half else."""
    bandwidth = DEFAULT_LINK_EFFICIENCY * 450 * GB
    for kind, factor in (("all_reduce", 2), ("all_gather", 1), ("reduce_scatter", 1), ("all_to_all", 1)):
        expected = factor * (n - 1) / n * 100 * GB / bandwidth
        assert collective_s(machine(), kind, 100 * GB, Group(n, n)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(2, 2), (3, 3), (4, 4), (6, 6), (8, 8), (16, 8), (64, 1), (24, 4)])
@pytest.mark.parametrize(
    "name",
    [
        "a100-sxm-80gb",
        "h100-sxm-80gb",
        "h200-sxm-141gb",
        "b200-sxm-180gb",
        "gb200-nvl72",
        "mi300x",
        "local-cpu",
    ],
)
def test_more_bytes_never_take_less_time(name: str, kind: str, size: tuple[int, int]) -> None:
    cluster = load_cluster(name)
    times = [collective_s(cluster, kind, 1000 * 1.15**i, Group(*size)) for i in range(112)]
    assert all(a < b * (1 + 1e-12) for a, b in itertools.pairwise(times))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [Group(8, 8), Group(32, 8), Group(16, 1)])
@pytest.mark.parametrize("name", ["a100-sxm-80gb", "b200-sxm-180gb"])
def test_twice_the_bandwidth_halves_long_messages(name: str, kind: str, group: Group) -> None:
    cluster = load_cluster(name)
    faster = replace(
        cluster,
        intra_node=replace(
            cluster.intra_node, bandwidth_bytes_per_s=2 * cluster.intra_node.bandwidth_bytes_per_s
        ),
        inter_node=replace(
            cluster.inter_node, bandwidth_bytes_per_s=2 * cluster.inter_node.bandwidth_bytes_per_s
        ),
    )
    ratio = collective_s(cluster, kind, 1e13, group) / collective_s(faster, kind, 1e13, group)
    assert ratio == pytest.approx(2, rel=0.02)


def test_exponents_span_from_best_cut_chunks_to_hidden_latency() -> None:
    alpha, beta = 4e-4, 9e-4
    num_bytes = beta * 0.8 * 450 * GB / wire_factor("all_gather", 4)

    def time(p: float) -> float:
        cluster = machine(fit("all_gather", 4, latency_s=alpha, p=p))
        return collective_s(cluster, "all_gather", num_bytes, Group(4, 4))

    assert time(1.0) == pytest.approx(alpha + beta)
    assert time(0.5) == pytest.approx((2e-2 + 3e-2) ** 2)  # (√α + √β)²: k chunks, k chosen best
    assert time(10.0) == pytest.approx(max(alpha, beta), rel=1e-3)


def test_the_library_switches_protocol_at_a_size() -> None:
    short = Protocol(latency_s=5e-6, bus_efficiency=0.1, exponent=1.0)
    switching = replace(fit("all_reduce", 8, latency_s=4e-5), short=short, switch_bytes=1e6)
    cluster = machine(switching)
    small = collective_s(cluster, "all_reduce", 1000, Group(8, 8))
    assert small == pytest.approx(5e-6, rel=0.02)
    large = collective_s(cluster, "all_reduce", 1e9, Group(8, 8))
    assert large == pytest.approx(4e-5 + 1.75e9 / (0.8 * 450e9))


def test_a_third_protocol_for_tiny_messages_never_makes_longer_ones_faster() -> None:
    """Below a border the time is the protocol's own, or the next one's at the border if that is less."""
    tiny = Protocol(latency_s=6e-6, bus_efficiency=0.01, exponent=1.0)
    short = Protocol(latency_s=1.4e-5, bus_efficiency=0.3, exponent=5.0)
    three = replace(
        fit("all_to_all", 8, latency_s=4e-5), tiny_bytes=2e5, tiny=tiny, short=short, switch_bytes=8e6
    )
    cluster = machine(three)

    def time(num_bytes: float) -> float:
        return collective_s(cluster, "all_to_all", num_bytes, Group(8, 8))

    assert time(1e3) == pytest.approx(6e-6, rel=0.05)
    assert time(1.9e5) == pytest.approx(time(2e5))  # by itself `tiny` would take 43 us
    assert time(1e6) == pytest.approx(1.4e-5, rel=0.01)
    assert time(9e6) == pytest.approx(4e-5 + 7 / 8 * 9e6 / (0.8 * 450e9))
    times = [time(1e3 * 1.1**i) for i in range(120)]
    assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(times))


def test_group_sizes_between_and_beyond_the_fitted_ones() -> None:
    fits = (fit("all_reduce", 2, 1e-5, 0.6), fit("all_reduce", 8, 3e-5, 0.8))
    cluster = machine(*fits)
    assert collective_fit(cluster, "all_reduce", 4).long.latency_s == pytest.approx(2e-5)
    assert collective_fit(cluster, "all_reduce", 4).long.bus_efficiency == pytest.approx(0.7)
    beyond = collective_fit(cluster, "all_reduce", 32).long
    assert beyond.latency_s == pytest.approx(5e-5)
    assert beyond.bus_efficiency == pytest.approx(0.8)
    assert collective_fit(cluster, "all_reduce", 8) is fits[1]


def test_a_ring_over_nodes_has_as_many_interfaces_as_ranks_in_a_node() -> None:
    """Eight ranks a node share eight interfaces, one rank a node has one."""
    cluster = machine()
    for local, size in ((8, 64), (4, 32), (1, 8)):
        expected = (size - 1) / size * 100 * GB / (NETWORK_EFFICIENCY * local * 50 * GB)
        if local == 8:  # 372 GB/s of network and 360 GB/s of NVLink hold each other up
            expected *= 1.21
        found = collective_s(cluster, "all_gather", 100 * GB, Group(size, local))
        assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [Group(16, 8), Group(64, 4), Group(8, 1)])
def test_no_collective_beats_the_network(kind: str, group: Group) -> None:
    cluster = load_cluster("h100-sxm-80gb")
    outside = (group.size - group.local) / group.size * GB  # what a domain must at least send out
    share = outside / group.size if kind == "all_to_all" else outside / group.local / group.domains
    assert collective_s(cluster, kind, GB, group) > share / (50 * GB)


def test_an_exchange_over_nodes_goes_through_each_ranks_own_interface() -> None:
    cluster = machine()
    found = collective_s(cluster, "all_to_all", 10 * GB, Group(64, 8))
    assert found == pytest.approx(56 / 64 * 10 * GB / (NETWORK_EFFICIENCY * 50 * GB), rel=0.02)


def test_messages_between_two_ranks() -> None:
    cluster = machine(fit("all_to_all", 2, 1e-5, 0.7))
    inside = send_recv_s(cluster, 1 * GB, local=True)
    assert inside == pytest.approx(1e-5 + GB / (0.7 * 450 * GB))
    outside = send_recv_s(cluster, 1 * GB, local=False)
    assert outside == pytest.approx(GB / (NETWORK_EFFICIENCY * 50 * GB), rel=0.01)
    assert send_recv_s(cluster, 0, local=True) == 0


def test_measured_tables_give_their_own_points_back_and_go_on_straight() -> None:
    two = MeasuredCollective(kind="all_reduce", gpus=2, points=((1e3, 1e-4), (1e5, 2e-4), (1e7, 9e-3)))
    four = MeasuredCollective(kind="all_reduce", gpus=4, points=((1e3, 3e-4), (1e7, 3e-2)))
    pair = MeasuredCollective(kind="send_recv", gpus=2, points=((8.0, 7e-5), (1e6, 3e-4)))
    cluster = machine(measured_collective=(two, four, pair))
    for table in (two, four):
        for num_bytes, expected in table.points:
            found = collective_s(cluster, "all_reduce", num_bytes, Group(table.gpus, table.gpus))
            assert found == pytest.approx(expected, rel=1e-12)
    assert send_recv_s(cluster, 8.0, local=True) == pytest.approx(7e-5, rel=1e-12)
    slope = (9e-3 - 2e-4) / (1e7 - 1e5)
    beyond = collective_s(cluster, "all_reduce", 1e8, Group(2, 2))
    assert beyond == pytest.approx(9e-3 + slope * 9e7)
    three = collective_s(cluster, "all_reduce", 1e7, Group(3, 3))
    assert 9e-3 < three < 3e-2


def test_unknown_collectives_are_named() -> None:
    with pytest.raises(ParsimError, match="unknown collective") as caught:
        collective_s(machine(), "allreduce", 1.0, Group(2, 2))
    assert "all_reduce" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "nodes", "num_bytes", "gb_per_s"),
    [
        ("b200-sxm-180gb", 4, 2**34, 197.1),  # stas00/ml-engineering, P6-B200, 8 x 400 Gb/s
        ("b200-sxm-180gb", 4, 2**30, 186.8),
        ("h200-sxm-141gb", 16, 2**34, 186.4),  # aws-samples, p5en.48xlarge
        ("h100-sxm-80gb", 2, 2**34, 259.8),  # aws-samples, p5.48xlarge
        ("h100-sxm-80gb", 2, 2**30, 239.7),  # oracle-quickstart/oci-hpc
    ],
)
def test_all_reduce_over_nodes_as_nccl_tests_measured_it(
    name: str, nodes: int, num_bytes: int, gb_per_s: float
) -> None:
    """algbw = bytes / time of eight GPUs a node."""
    seconds = collective_s(load_cluster(name), "all_reduce", num_bytes, Group(8 * nodes, 8))
    assert num_bytes / seconds / GB == pytest.approx(gb_per_s, rel=0.15)
