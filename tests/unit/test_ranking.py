"""Regret and rank correlation of the plans of a group."""

from __future__ import annotations

import itertools
import math

import pytest

from parsim.compare.ranking import rank_groups
from parsim.compare.runs import group_of

PERFECT = [("g", 1.0, 10.0), ("g", 2.0, 20.0), ("g", 4.0, 30.0)]


def test_the_same_order_has_no_regret() -> None:
    (ranking,) = rank_groups(PERFECT)
    assert (ranking.rows, ranking.regret, ranking.kendall_tau) == (3, 0.0, 1.0)


def test_the_opposite_order_picks_the_worst_plan() -> None:
    (ranking,) = rank_groups((group, measured, -predicted) for group, measured, predicted in PERFECT)
    assert ranking.regret == 3.0
    assert ranking.kendall_tau == -1.0


def test_tau_counts_pairs() -> None:
    """Of six pairs five stand in the same order: (5 - 1) / 6."""
    rows = [("g", 1.0, 1.0), ("g", 2.0, 3.0), ("g", 3.0, 2.0), ("g", 4.0, 4.0)]
    (ranking,) = rank_groups(rows)
    assert ranking.kendall_tau == pytest.approx(4 / 6)


def test_two_rows_are_no_ranking() -> None:
    assert rank_groups(PERFECT[:2]) == ()


def test_equal_predictions_have_no_order() -> None:
    (ranking,) = rank_groups([("g", 2.0, 1.0), ("g", 1.0, 1.0), ("g", 3.0, 1.0)])
    assert ranking.kendall_tau is None
    assert ranking.regret == 1.0  # the first of them


def test_rows_that_differ_only_in_the_plan_share_a_group() -> None:
    row = {
        "source": "a",
        "layers": "48.0",
        "gpus": "8",
        "tp": "1",
        "recompute": "full",
        "seq_len": "1024",
    }
    assert group_of(row) == group_of(row | {"tp": "2", "layers": "48", "recompute": "none"})
    assert group_of(row) != group_of(row | {"seq_len": "2048"})


def test_tau_with_ties_is_tau_b() -> None:
    """Kendall 1945: (concordant - discordant) / sqrt of the pairs untied in each order."""
    measured, predicted = [1.0, 2.0, 2.0, 3.0, 5.0, 4.0], [1.0, 1.0, 3.0, 2.0, 4.0, 4.0]
    (ranking,) = rank_groups(("g", m, p) for m, p in zip(measured, predicted, strict=True))
    pairs = list(itertools.combinations(zip(measured, predicted, strict=True), 2))
    order = sum(_sign(a[0] - b[0]) * _sign(a[1] - b[1]) for a, b in pairs)
    untied = [sum(a[i] != b[i] for a, b in pairs) for i in (0, 1)]
    assert ranking.kendall_tau == pytest.approx(order / math.sqrt(untied[0] * untied[1]))


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def test_regret_by_hand() -> None:
    """The plan predicted to be fastest took 17.1 s where the best took 15.5 s."""
    (ranking,) = rank_groups([("g", 15.5, 16.0), ("g", 17.1, 15.9), ("g", 21.9, 18.0)])
    assert ranking.regret == pytest.approx(1.6 / 15.5)
