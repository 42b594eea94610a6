"""Reading between the points of a measured table.

Every function gives a table's own points back exactly.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

from parsim.kernels import Residuals

NEAR = 0.1
"""A residual fades out over this distance, in the log of a size (10%)."""


def along_line(points: Sequence[tuple[float, float]], x: float) -> float:
    """Time at size x from (size, time) points: straight lines, as latency + size / bandwidth is one.

    Past the last point the time grows linearly with the size at the slope of the last two; below the
    first it shrinks at the slope of the first two but never under half the first time, which is latency.

    >>> along_line([(1.0, 2.0), (5.0, 6.0)], 2.0)
    3.0
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
    return t0 + (t1 - t0) * (x - x0) / (x1 - x0)


def among_points(points: Sequence[tuple[tuple[float, ...], float]], at: tuple[float, ...]) -> float:
    """Value at a place among scattered points, by inverse distance in log space.

    The mean of log value with weights 1/d⁴, so near points decide; outside the box that the points span
    the value is that of the nearest place on it. Source: D. Shepard, "A two-dimensional interpolation
    function for irregularly-spaced data", Proc. 23rd ACM National Conference, 1968.

    >>> points = [((1.0, 1.0), 2.0), ((4.0, 1.0), 8.0)]
    >>> round(among_points(points, (2.0, 1.0)), 12), among_points(points, (64.0, 1.0))
    (4.0, 8.0)
    """
    axes = list(zip(*(place for place, _ in points), strict=True))
    inside = (min(max(value, min(axis)), max(axis)) for value, axis in zip(at, axes, strict=True))
    where = [math.log(value) for value in inside]
    total = weighted = 0.0
    for place, value in points:
        distance = sum((math.log(p) - w) ** 2 for p, w in zip(place, where, strict=True))
        if distance < 1e-24:
            return value
        weight = 1.0 / distance**2
        total += weight
        weighted += weight * math.log(value)
    return math.exp(weighted / total)


def residual_factor(table: Residuals | None, row: float, column: float, knot: float) -> float:
    """Factor on a fitted form's time from its table of residuals; 1 away from what was measured.

    >>> table = Residuals(rows=(8,), columns=(64, 128), knots=(16, 256), percent=(((10, 30), (0, 0)),))
    >>> round(residual_factor(table, 8, 64, 64), 12), residual_factor(table, 12, 64, 64)
    (1.2, 1.0)
    """
    if table is None:
        return 1.0
    rows, columns = _near(table.rows, row), _near(table.columns, column)
    if not rows or not columns:
        return 1.0
    (low, low_weight), (high, high_weight) = _between(table.knots, knot)
    percent = 0.0
    for r, row_weight in rows:
        for c, column_weight in columns:
            cell = table.percent[r][c]
            percent += row_weight * column_weight * (low_weight * cell[low] + high_weight * cell[high])
    return 1.0 + percent / 100.0


def _near(sizes: tuple[int, ...], x: float) -> list[tuple[int, float]]:
    """Indices of the sizes on both sides of x with weights that fade out; a size itself has it all."""
    at = bisect_left(sizes, x)
    if at < len(sizes) and sizes[at] == x:
        return [(at, 1.0)]
    found = []
    for i in (at - 1, at):
        if 0 <= i < len(sizes):
            weight = 1.0 - abs(math.log(x / sizes[i])) / NEAR
            if weight > 0:
                found.append((i, weight))
    total = max(1.0, sum(weight for _, weight in found))
    return [(i, weight / total) for i, weight in found]


def _between(knots: tuple[int, ...], x: float) -> tuple[tuple[int, float], tuple[int, float]]:
    """The two knots around x with weights linear in log x; past the ends the end knot alone."""
    at = bisect_left(knots, x)
    if at == 0:
        return (0, 1.0), (0, 0.0)
    if at == len(knots):
        return (at - 1, 1.0), (at - 1, 0.0)
    share = math.log(x / knots[at - 1]) / math.log(knots[at] / knots[at - 1])
    return (at - 1, 1.0 - share), (at, share)
