"""Regret and rank correlation of the plans of a group."""

from __future__ import annotations

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
