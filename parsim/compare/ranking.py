"""Does parsim like the plans that were measured to be fast? Regret and rank correlation by group."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from scipy.stats import kendalltau

MIN_ROWS = 3
"""Fewer rows than this are no ranking."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """How the plans of one group were ranked."""

    group: str
    rows: int
    regret: float
    """Measured time of the plan that parsim likes best over the best measured time, less 1."""
    kendall_tau: float | None
    """Rank correlation of predicted and measured times, -1 to 1; None where all of either are equal.

    Source: Kendall 1938, "A new measure of rank correlation", Biometrika 30 (tau-b, with ties).
    """

    def to_data(self) -> dict[str, Any]:
        return asdict(self)


def rank_groups(rows: Iterable[tuple[str, float, float]]) -> tuple[Ranking, ...]:
    """The ranking of each group of at least three of the (group, measured_s, predicted_s) rows.

    Of plans with the same prediction the first is the one parsim likes.

    >>> rank_groups([("a", 1.0, 2.0), ("a", 3.0, 6.0), ("a", 2.0, 4.0), ("b", 1.0, 1.0)])
    (Ranking(group='a', rows=3, regret=0.0, kendall_tau=1.0),)
    """
    groups: dict[str, list[tuple[float, float]]] = {}
    for group, measured_s, predicted_s in rows:
        groups.setdefault(group, []).append((measured_s, predicted_s))
    return tuple(_rank(group, pairs) for group, pairs in groups.items() if len(pairs) >= MIN_ROWS)


def _rank(group: str, pairs: list[tuple[float, float]]) -> Ranking:
    chosen_s, _ = min(pairs, key=lambda pair: pair[1])
    best_s = min(measured_s for measured_s, _ in pairs)
    measured, predicted = zip(*pairs, strict=True)
    alike = len(set(measured)) == 1 or len(set(predicted)) == 1
    return Ranking(
        group=group,
        rows=len(pairs),
        regret=chosen_s / best_s - 1,
        kendall_tau=None if alike else float(kendalltau(measured, predicted).statistic),
    )
