"""Which rows are left out together when a fit is tested: whole models, never single rows.

Rows of one model under neighbouring plans say nearly the same; a row left out alone would be predicted
by its neighbours, and its error would tell nothing of a new model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from parsim.compare.measured_steps import MeasuredStep

FOLDS = 6
"""Fits in which each has some groups left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Rows by fold."""

    names: tuple[str, ...]
    """The group of each row: its model."""
    split: str
    """The model, if any, that holds most of the rows: its groups are configurations (cluster and plan),
    because without it there would be little left to fit."""
    folds: tuple[frozenset[int], ...]
    """Indices of the rows that are left out together; each holds one group or more."""

    @property
    def groups(self) -> int:
        return len(set(self.names))

    @property
    def by(self) -> str:
        """What groups are, in words."""
        return f"models, and configurations of {self.split}" if self.split else "models"


def held_out(steps: Sequence[MeasuredStep]) -> HeldOut | None:
    """The folds of some rows, about as many rows in each; None where all are of one configuration."""
    models = Counter(step.model for step in steps)
    most, count = models.most_common(1)[0]
    split = most if count > len(steps) / 2 else ""
    names = [f"{s.model}, {s.configuration}" if s.model == split else s.model for s in steps]
    counts = Counter(names)
    if len(counts) < 2:
        return None
    folds: list[set[int]] = [set() for _ in range(min(FOLDS, len(counts)))]
    for name in sorted(counts, key=lambda name: (-counts[name], name)):
        smallest = min(folds, key=len)
        smallest.update(i for i, other in enumerate(names) if other == name)
    return HeldOut(names=tuple(names), split=split, folds=tuple(map(frozenset, folds)))


def halves(steps: Sequence[MeasuredStep]) -> tuple[list[MeasuredStep], list[MeasuredStep]]:
    """Rows of the smaller half of the models, by parameters, and those of the larger half."""
    sizes: dict[str, int] = {}
    for step in steps:
        sizes[step.model] = max(sizes.get(step.model, 0), step.parameters)
    ordered = sorted(sizes, key=lambda model: (sizes[model], model))
    small = set(ordered[: len(ordered) // 2])
    return [s for s in steps if s.model in small], [s for s in steps if s.model not in small]
