"""Pareto fronts: the options that no other beats in everything.

Objectives are numbers to make small; one may be unknown (None), and is then compared with none but
another unknown.
"""

from __future__ import annotations

from collections.abc import Sequence

Objectives = Sequence[float | None]


def dominates(one: Objectives, other: Objectives) -> bool:
    """Whether `one` is nowhere worse and somewhere better, and both know the same objectives.

    >>> dominates((1, 2), (1, 3)), dominates((1, 2), (1, 2)), dominates((0, 3), (1, 2))
    (True, False, False)
    >>> dominates((1, None), (2, None)), dominates((1, None), (2, 5))
    (True, False)
    """
    better = False
    for mine, theirs in zip(one, other, strict=True):
        if mine is None or theirs is None:
            if mine is not theirs:
                return False
            continue
        if mine > theirs:
            return False
        better = better or mine < theirs
    return better


def pareto_front(points: Sequence[Objectives]) -> tuple[int, ...]:
    """Indices, ascending, of the points that none of the others dominates; equal points stay together.

    What a point dominates it also outranks in lexicographic order, so candidates in that order only
    need to be compared with the front found so far.
    """
    order = sorted(range(len(points)), key=lambda i: [(x is None, x or 0.0) for x in points[i]])
    front: list[int] = []
    for i in order:
        if not any(dominates(points[kept], points[i]) for kept in front):
            front.append(i)
    return tuple(sorted(front))
