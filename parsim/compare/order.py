"""How often parsim puts two measured plans in the right order, by how far apart it puts them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar

from parsim.cost.order import OTHER_LAYERS, SAME_LAYERS, tie_ratio

SCALE_BOUNDS = 1e-4, 10.0
"""A scale is looked for between these."""


class RankedRow(NamedTuple):
    """A measured plan among others of its group."""

    group: str
    measured_s: float
    predicted_s: float
    layers: object
    """Equal for plans whose layers run the same kernels."""


class Pair(NamedTuple):
    """Two plans of a group."""

    group: str
    predicted: float
    """Log of the ratio of their predicted times, above 0 where the order is right."""
    same_layers: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderError:
    """How sure the order of pairs of one kind is."""

    pairs: str
    """Of which kind."""
    number: int
    groups: int
    scale: float
    """Logistic scale of the error of the log of their ratio, of greatest likelihood."""
    assumed_ratio: float
    """Below this predicted ratio parsim says that two plans tie (cost.order)."""
    tied: int
    """Pairs below it."""
    right_tied: float | None
    """Share of these in the right order."""
    right_apart: float | None
    """The same of the others."""

    def to_data(self) -> dict[str, Any]:
        return asdict(self)

    def to_line(self) -> str:
        """The same for reading."""

        def share(right: float | None) -> str:
            return "–" if right is None else f"{right:.0%}"

        return (
            f"{self.pairs}: {self.number} pairs in {self.groups} groups; of the {self.tied} within "
            f"{self.assumed_ratio - 1:.1%} {share(self.right_tied)} in the right order, of the others "
            f"{share(self.right_apart)}; scale {self.scale:.3f}"
        )


def order_errors(rows: Iterable[RankedRow], *, fewest: int = 3) -> tuple[OrderError, ...]:
    """How sure the order of plans is in groups of at least `fewest` rows; nothing without a pair."""
    pairs = list(_pairs(rows, fewest))
    kinds: tuple[tuple[str, float, Callable[[Pair], bool]], ...] = (
        ("plans with the same layers", SAME_LAYERS, lambda pair: pair.same_layers),
        ("other plans", OTHER_LAYERS, lambda pair: not pair.same_layers),
    )
    of_kind = [(name, scale, [pair for pair in pairs if wanted(pair)]) for name, scale, wanted in kinds]
    return tuple(_error(name, own, scale) for name, scale, own in of_kind if own)


def _pairs(rows: Iterable[RankedRow], fewest: int) -> Iterable[Pair]:
    """Pairs within a group; repeats of one run, and runs that took exactly as long, have no order."""
    groups: dict[str, list[RankedRow]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    for group, members in groups.items():
        if len(members) < fewest:
            continue
        for first, second in combinations(members, 2):
            predicted = math.log(first.predicted_s / second.predicted_s)
            if predicted and first.measured_s != second.measured_s:
                right = math.copysign(1, first.measured_s - second.measured_s)
                yield Pair(group, predicted * right, first.layers == second.layers)


def _error(name: str, pairs: Sequence[Pair], assumed: float) -> OrderError:
    ratio = tie_ratio(assumed)
    tied = [pair.predicted > 0 for pair in pairs if abs(pair.predicted) < math.log(ratio)]
    apart = [pair.predicted > 0 for pair in pairs if abs(pair.predicted) >= math.log(ratio)]
    return OrderError(
        pairs=name,
        number=len(pairs),
        groups=len({pair.group for pair in pairs}),
        scale=order_scale_of(pairs),
        assumed_ratio=ratio,
        tied=len(tied),
        right_tied=float(np.mean(tied)) if tied else None,
        right_apart=float(np.mean(apart)) if apart else None,
    )


def order_scale_of(pairs: Sequence[Pair]) -> float:
    """The scale s of greatest likelihood of the pairs' orders, P(right) = 1 / (1 + exp(-x / s)) at a log
    ratio x, every group weighing alike.

    Source: Bradley and Terry 1952, Biometrika 39, with one parameter for all pairs.
    """
    count = Counter(pair.group for pair in pairs)
    weight = np.array([1 / count[pair.group] for pair in pairs])
    predicted = np.array([pair.predicted for pair in pairs])

    def loss(log_scale: float) -> float:
        return float(weight @ np.logaddexp(0.0, -predicted / math.exp(log_scale)))

    low, high = map(math.log, SCALE_BOUNDS)
    return math.exp(minimize_scalar(loss, bounds=(low, high), method="bounded").x)
