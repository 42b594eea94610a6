"""Places of a torus, numbered with the first dimension fastest, and the ways between them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def neighbour(sizes: Sequence[int], place: int, dimension: int, step: int = 1) -> int:
    """The place one step on along a dimension, round the end of it.

    >>> neighbour((4, 3), 3, 0), neighbour((4, 3), 3, 1)
    (0, 7)
    """
    stride = math.prod(sizes[:dimension])
    here = place // stride % sizes[dimension]
    return place + ((here + step) % sizes[dimension] - here) * stride


def torus_way(sizes: Sequence[int], source: int, target: int) -> tuple[int, ...]:
    """Places from source to target, both included: the shorter way along one dimension after the other.

    Where both ways are as long it goes up. (Dimension-order routing: Dally and Seitz, "Deadlock-free
    message routing in multiprocessor interconnection networks", IEEE ToC C-36(5), 1987.)

    >>> torus_way((4, 3), 0, 7)
    (0, 3, 7)
    """
    way = [source]
    for dimension, size in enumerate(sizes):
        stride = math.prod(sizes[:dimension])
        ahead = (target // stride - source // stride) % size
        step, count = (1, ahead) if 2 * ahead <= size else (-1, size - ahead)
        for _ in range(count):
            way.append(neighbour(sizes, way[-1], dimension, step))
    return tuple(way)


def most_even(count: int, dimensions: int = 2) -> tuple[int, ...]:
    """Sizes of a torus of `count` places that are as alike as can be, the smallest first.

    >>> most_even(32), most_even(64, 3)
    ((4, 8), (4, 4, 4))
    """
    if dimensions == 1:
        return (count,)
    root = round(count ** (1 / dimensions))
    first = next(size for size in range(root, 0, -1) if count % size == 0)
    return (first, *most_even(count // first, dimensions - 1))
