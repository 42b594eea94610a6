"""Which orders of mesh dimensions differ on a cluster."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import permutations

from parsim.cost.collective import group_over
from parsim.cost.sync import replica_axes
from parsim.hardware import Cluster
from parsim.mesh import mesh_axes, part_of
from parsim.plan import USUAL_PLACEMENT, ParallelPlan
from parsim.schedule.check import placement_problems

ANY_PLACEMENT = "any"
"""Among a user's placements: every order of the mesh dimensions."""


def orders(wanted: Sequence[str]) -> tuple[str, ...]:
    """The placements that a user asks for; the usual one where nothing is asked for.

    >>> orders(())
    ('tp-cp-dp-pp',)
    >>> len(orders((ANY_PLACEMENT,)))
    24
    """
    if ANY_PLACEMENT not in wanted:
        return tuple(wanted) or (USUAL_PLACEMENT,)
    every = map("-".join, permutations(USUAL_PLACEMENT.split("-")))
    return tuple(dict.fromkeys([USUAL_PLACEMENT, *every]))


def placed(plan: ParallelPlan, wanted: Sequence[str], cluster: Cluster | None) -> Iterator[ParallelPlan]:
    """The plan in those of some placements that mean something, the first of those that are the same.

    The same are two that order the dimensions of more than one rank alike; and, on a known cluster, two
    that put as many ranks of every group into a scale-up domain: the cost model knows no other level.
    """
    if len(wanted) == 1:
        yield replace(plan, placement=wanted[0])
        return
    found: set[Hashable] = set()
    for placement in wanted:
        order = tuple(name for name in placement.split("-") if getattr(plan, name) > 1)
        if order in found:
            continue
        found.add(order)
        chosen = replace(plan, placement=placement)
        if cluster is not None:
            where = _groups(chosen, cluster)
            if where in found:
                continue
            found.add(where)
        yield chosen


def _groups(plan: ParallelPlan, cluster: Cluster) -> Hashable:
    """How all groups of ranks lie, those of every transfer and collective of a step; of a placement that
    is not legal, nothing but its name.
    """
    usual = plan.placement == USUAL_PLACEMENT
    if not usual and next(placement_problems(plan, cluster), None) is not None:
        return plan.placement
    stage = mesh_axes(plan, "tp", "cp", "dp")
    axes = (
        mesh_axes(plan, "tp"),
        mesh_axes(plan, "cp"),
        part_of(stage, size=plan.ep, skip=plan.expert_tp),
        *replica_axes(plan),
        stage,
    )
    groups = tuple(group_over(cluster, of, gpus=plan.gpus) for of in axes)
    # Pipeline ranks, each a block: so many of them that follow each other share a domain.
    domain, block = cluster.scale_up_domain, plan.strides.pp
    is_whole = domain % block == 0 or block % domain == 0
    return groups, min(plan.pp, max(1, domain // block)) if is_whole else -block
