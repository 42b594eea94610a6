"""Pareto fronts against brute force."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from parsim.search.pareto import dominates, pareto_front

values = st.integers(0, 4) | st.none()
points = st.lists(st.tuples(values, values, values), max_size=14)


def beats(one: tuple[int | None, ...], other: tuple[int | None, ...]) -> bool:
    """By the definition: the same objectives known, none worse, one better."""
    if [x is None for x in one] != [x is None for x in other]:
        return False
    pairs = [(x, y) for x, y in zip(one, other, strict=True) if x is not None and y is not None]
    return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)


@given(points)
def test_the_front_is_what_nothing_dominates(found: list[tuple[int | None, ...]]) -> None:
    expected = [i for i, point in enumerate(found) if not any(beats(other, point) for other in found)]
    assert list(pareto_front(found)) == expected


@given(points)
def test_what_is_left_out_is_beaten_by_the_front(found: list[tuple[int | None, ...]]) -> None:
    front = pareto_front(found)
    for i, point in enumerate(found):
        assert (i in front) != any(dominates(found[kept], point) for kept in front)


def test_equal_points_stay_together() -> None:
    assert pareto_front([(1, 2), (1, 2), (2, 2)]) == (0, 1)
