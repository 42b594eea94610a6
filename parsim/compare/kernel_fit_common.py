"""What the fits of all kernels share: hold-out errors, and tables of residuals."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from parsim.kernels import Residuals

Vector = NDArray[np.float64]
Row = TypeVar("Row")
Fit = TypeVar("Fit")

FOLDS = 5
"""Rows, or groups of rows, are held out in as many parts while the error of a fit is measured."""
SOURCE = "ai-dynamo/aiconfigurator (Apache-2.0, August 2026), medians over inference frameworks"
DATE = "2026-08"

_LARGEST_LOG = 0.9
"""Largest log of a whole cell's residual."""
_OUTLIER_LOG = 0.4
"""Further than this from its cell's median a row is an outlier and pulls no more."""


def errors(fit: Fit, rows: Sequence[Row], predict: Callable[[Fit, Row], float]) -> Vector:
    """|predicted / measured - 1| of every row."""
    return np.array([abs(predict(fit, row) / row.measured_s - 1) for row in rows])  # type: ignore[attr-defined]


def held_out_text(
    rows: Sequence[Row],
    make: Callable[[list[Row]], Fit],
    predict: Callable[[Fit, Row], float],
    *,
    group: Callable[[Row], Hashable],
    name: str,
    counts: Callable[[Row], bool],
    folds: int = 1,
) -> str:
    """Median and 90th percentile of the error on a fifth of the groups, which a fit has not seen.

    `group` tells which rows are held out together, `counts` the rows whose error is told; with 5 `folds`
    every row is held out once.
    """
    keys = [group(row) for row in rows]
    names = sorted(set(keys), key=repr)
    drawn = np.random.default_rng(1).integers(FOLDS, size=len(names))
    fold_of = {key: int(fold) for key, fold in zip(names, drawn, strict=True)}
    found: list[float] = []
    for fold in range(folds):
        seen = [row for row, key in zip(rows, keys, strict=True) if fold_of[key] != fold]
        unseen = [
            row for row, key in zip(rows, keys, strict=True) if fold_of[key] == fold and counts(row)
        ]
        if seen and unseen:
            found.extend(errors(make(seen), unseen, predict))
    if not found:
        return f"too few rows to hold out {name}"
    return f"{100 * np.median(found):.1f} / {100 * np.percentile(found, 90):.1f}% on {name}"


def fit_residuals(
    rows: Vector,
    columns: Vector,
    sizes: Vector,
    log_ratio: Vector,
    weight: Vector,
    *,
    knots: tuple[int, ...],
) -> Residuals:
    """The table of log(measured / form) by (row, column) over knots in the log of a third size.

    Each cell is a ridge regression on hat functions: pulled towards 0 as by one more row that has no
    residual, and neighbouring knots towards each other, so that a cell with few rows says little.
    """
    names_r, names_c = np.unique(rows), np.unique(columns)
    log_knots = np.log(np.array(knots, dtype=np.float64))
    hats = np.stack([np.interp(np.log(sizes), log_knots, hat) for hat in np.eye(len(knots))], axis=1)
    steps = np.diff(np.eye(len(knots)), axis=0)
    prior = np.eye(len(knots)) / len(knots) + 0.3 * steps.T @ steps
    percent = []
    for r in names_r:
        line = []
        for c in names_c:
            here = (rows == r) & (columns == c)
            middle = float(np.median(log_ratio[here])) if here.any() else 0.0
            near = np.clip(log_ratio[here], middle - _OUTLIER_LOG, middle + _OUTLIER_LOG)
            weighted = hats[here] * weight[here, None]
            found = np.linalg.solve(weighted.T @ hats[here] + prior, weighted.T @ near)
            found = np.clip(found, -_LARGEST_LOG, _LARGEST_LOG)
            line.append(tuple(round(100 * float(np.expm1(value))) for value in found))
        percent.append(tuple(line))
    return Residuals(
        rows=tuple(int(r) for r in names_r),
        columns=tuple(int(c) for c in names_c),
        knots=knots,
        percent=tuple(percent),
    )
