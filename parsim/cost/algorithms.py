"""Collectives as algorithms: what each takes between domains, and closed forms in alpha and beta.

alpha is the latency of a message, beta what a link gets through a second, p the ranks and S the bytes of
the full buffer. Sources: R. Thakur, R. Rabenseifner and W. Gropp, "Optimization of collective
communication operations in MPICH", IJHPCA 19(1), 2005; P. Patarasuk and X. Yuan, "Bandwidth optimal
all-reduce algorithms", JPDC 69, 2009; P. Sanders, J. Speck and J. L. Träff, "Two-tree algorithms for
full bandwidth broadcast, reduction and scan", Parallel Computing 35, 2009; R. L. Graham et al.,
"Scalable hierarchical aggregation protocol (SHARP)", COMHPC 2016.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from parsim.cost.collective import Group, collective_s, in_switch_s, ring_s, tree_s
from parsim.hardware import Cluster

ALGORITHMS = ("ring", "tree", "hierarchical", "in-switch")
"""Ways to sum a buffer over ranks of several domains."""


def all_reduce_algorithm(cluster: Cluster, num_bytes: float, group: Group) -> str:
    """The one that collective_s takes for an all-reduce between domains, the faster as NCCL's tuning is.

    >>> from parsim.config import load_cluster
    >>> h100 = load_cluster("h100-sxm-80gb")
    >>> all_reduce_algorithm(h100, 1e9, Group(16, 1)), all_reduce_algorithm(h100, 1e6, Group(16, 1))
    ('ring', 'tree')
    """
    tree, ring = tree_s(cluster, num_bytes, group), ring_s(cluster, "all_reduce", num_bytes, group)
    return "tree" if tree <= ring else "ring"


def all_reduce_s(cluster: Cluster, algorithm: str, num_bytes: float, group: Group) -> float:
    """Seconds of an all-reduce between domains by one of ALGORITHMS.

    hierarchical: a reduce-scatter inside each domain, a ring all-reduce of every shard among the ranks
    that hold it, an all-gather inside. in-switch: as Graham et al., one message up and one down.
    """
    if num_bytes <= 0:
        return 0.0
    if algorithm == "ring":
        return ring_s(cluster, "all_reduce", num_bytes, group)
    if algorithm == "tree":
        return tree_s(cluster, num_bytes, group)
    if algorithm == "in-switch":
        return in_switch_s(cluster, num_bytes, group)
    inside = Group(group.local, group.local)
    return (
        collective_s(cluster, "reduce_scatter", num_bytes, inside)
        + ring_s(cluster, "all_reduce", num_bytes / group.local, Group(group.domains, 1))
        + collective_s(cluster, "all_gather", num_bytes, inside)
    )


def rounds_s(ranks: int, rounds: int, num_bytes: float, alpha_s: float, beta: float) -> float:
    """`rounds` rounds in which every rank sends S/p to one other: rounds · (alpha + S/(p·beta)).

    2(p − 1) rounds of a ring all-reduce, p − 1 of a ring all-gather or reduce-scatter and of a pairwise
    all-to-all (Thakur et al. 2005, sections 4.1 to 4.5; Patarasuk and Yuan 2009, section 3).

    >>> rounds_s(4, 6, 1e9, 1e-5, 1e9)
    1.50006
    """
    return rounds * (alpha_s + num_bytes / ranks / beta)


def pipeline_s(hops_s: Sequence[float], chunks: int) -> float:
    """Chunks one behind the other over hops in a row: the sum of all hops, and the slowest k − 1 times.

    >>> pipeline_s([1.0, 2.0, 1.0], 3)
    8.0
    """
    return sum(hops_s) + (chunks - 1) * max(hops_s)


def double_tree_s(ranks: int, chunks: int, num_bytes: float, alpha_s: float, beta: float) -> float:
    """An all-reduce up and down two binary trees of ceil(log2 p) levels with half of the bytes each.

    A rank has at most one parent and two children in one tree and a parent in the other, so each of its
    tree links has a quarter of its network link (a half among two ranks, a third among three):
    (2h + k − 1)(alpha + 2S/(k·beta)) with k chunks (after Sanders et al. 2009, section 4).

    >>> double_tree_s(8, 1, 1e9, 0.0, 1e9)
    12.0
    """
    hop_s = alpha_s + tree_width(ranks) * num_bytes / 2 / chunks / beta
    return pipeline_s([hop_s] * 2 * math.ceil(math.log2(ranks)), chunks)


def tree_width(ranks: int) -> int:
    """The most links that a rank has in both trees of a double tree together."""
    return min(4, ranks)
