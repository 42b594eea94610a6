"""DeviceMesh: where the groups of a plan lie among the global ranks.

A group of ranks is a product of axes, each so many ranks so far apart; neighbouring axes that continue
each other are one. Standard library only: the executor's workers import it with the plan.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from parsim.errors import ParsimError
from parsim.plan import ParallelPlan


class Axis(NamedTuple):
    """`size` ranks that lie `stride` global ranks apart."""

    size: int
    stride: int


def mesh_axes(plan: ParallelPlan, *dimensions: str) -> tuple[Axis, ...]:
    """The axes of the group of all ranks that differ in `dimensions` only, the fastest first.

    >>> mesh_axes(ParallelPlan(tp=8, cp=2, dp=4, pp=2), "cp", "dp")
    (Axis(size=8, stride=8),)
    >>> mesh_axes(ParallelPlan(tp=4, cp=2, dp=4, pp=2, placement="tp-cp-pp-dp"), "cp", "dp")
    (Axis(size=2, stride=4), Axis(size=4, stride=16))
    """
    strides = plan.strides
    found = (Axis(getattr(plan, name), getattr(strides, name)) for name in plan.placement.split("-")
             if name in dimensions)  # fmt: skip
    joined: list[Axis] = []
    for axis in found:
        if axis.size == 1:
            continue
        if joined and axis.stride == joined[-1].size * joined[-1].stride:
            joined[-1] = Axis(joined[-1].size * axis.size, joined[-1].stride)
        else:
            joined.append(axis)
    return tuple(joined)


def group_size(axes: tuple[Axis, ...]) -> int:
    """Ranks of the group."""
    return prod(axis.size for axis in axes)


def part_of(axes: tuple[Axis, ...], *, size: int, skip: int = 1) -> tuple[Axis, ...]:
    """The axes of the groups that take `size` of a group's ranks, each `skip` of them after the last.

    Raises ParsimError where that is no product of axes.

    >>> part_of((Axis(2, 4), Axis(4, 16)), size=4, skip=2)
    (Axis(size=4, stride=16),)
    """
    if len(axes) == 1:
        return (Axis(size, axes[0].stride * skip),) if size > 1 else ()
    parts = []
    for axis in axes:
        passed = min(skip, axis.size)
        left = axis.size // passed
        taken = min(size, left)
        if axis.size % passed or skip % passed or left % taken or size % taken:
            raise ParsimError(
                "this placement tears a group into pieces that are not alike",
                where="placement",
                got=f"groups of {size} among {' × '.join(str(axis.size) for axis in axes)} ranks",
            )
        skip //= passed
        size //= taken
        if taken > 1:
            parts.append(Axis(taken, axis.stride * passed))
    return tuple(parts)
