"""Reading between the points of a measured table.

Every function gives a table's own points back exactly.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

LINE_POINTS = Sequence[tuple[float, float]]


def along_line(points: LINE_POINTS, x: float) -> float:
    """Time at size x from (size, time) points: straight lines over log size.

    Past the last point the time grows linearly with the size at the slope of the last two; below the
    first it shrinks at the slope of the first two but never under half the first time, which is latency.

    >>> along_line([(1.0, 2.0), (4.0, 6.0)], 2.0)
    4.0
    >>> along_line([(1.0, 2.0), (4.0, 8.0)], 8.0)
    16.0
    """
    ordered = sorted(points)
    sizes = [size for size, _ in ordered]
    at = bisect_left(sizes, x)
    if at < len(sizes) and sizes[at] == x:
        return ordered[at][1]
    if len(ordered) == 1:
        size, time = ordered[0]
        return time * max(x / size, 0.5)
    if at == 0:
        (x0, t0), (x1, t1) = ordered[0], ordered[1]
        return max(t0 + (t1 - t0) / (x1 - x0) * (x - x0), t0 / 2)
    if at == len(sizes):
        (x0, t0), (x1, t1) = ordered[-2], ordered[-1]
        slope = max((t1 - t0) / (x1 - x0), 0.0)
        return t1 + slope * (x - x1)
    (x0, t0), (x1, t1) = ordered[at - 1], ordered[at]
    weight = math.log(x / x0) / math.log(x1 / x0)
    return t0 + weight * (t1 - t0)


def among_points(points: Sequence[tuple[tuple[float, ...], float]], at: tuple[float, ...]) -> float:
    """Value at a place among scattered points, by inverse distance in log space (Shepard 1968).

    The mean of log value with weights 1/d⁴, so near points decide and the far field is the nearest
    point's. Source: D. Shepard, "A two-dimensional interpolation function for irregularly-spaced
    data", Proc. 23rd ACM National Conference, 1968.

    >>> round(among_points([((1.0, 1.0), 2.0), ((4.0, 1.0), 8.0)], (2.0, 1.0)), 12)
    4.0
    """
    where = [math.log(value) for value in at]
    total = weighted = 0.0
    for place, value in points:
        distance = sum((math.log(p) - w) ** 2 for p, w in zip(place, where, strict=True))
        if distance < 1e-24:
            return value
        weight = 1.0 / distance**2
        total += weight
        weighted += weight * math.log(value)
    return math.exp(weighted / total)
