"""Collectives as algorithms: what each takes between domains, and closed forms in alpha and beta.

alpha is the latency of a message, beta what a link gets through a second, p the ranks and S the bytes of
the full buffer. Sources: R. Thakur, R. Rabenseifner and W. Gropp, "Optimization of collective
communication operations in MPICH", IJHPCA 19(1), 2005; P. Patarasuk and X. Yuan, "Bandwidth optimal
all-reduce algorithms", JPDC 69, 2009; P. Sanders, J. Speck and J. L. Träff, "Two-tree algorithms for
full bandwidth broadcast, reduction and scan", Parallel Computing 35, 2009; R. L. Graham et al.,
"Scalable hierarchical aggregation protocol (SHARP)", COMHPC 2016.
"""

from __future__ import annotations

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
