"""Fitting the few constants of a Stack to measured runs, and testing them on models it has not seen.

The loss is robust (Cauchy) over log(predicted / measured), so that a few congested runs do not pull the
constants; a weak pull towards the starting values keeps constants that no row decides where they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from parsim.compare.csv_table import Row
from parsim.compare.held_out import HeldOut, halves, held_out
from parsim.compare.intervals import base_half_width
from parsim.compare.linear import Linear
from parsim.compare.measured_steps import LeftOut, MeasuredStep, QuickSteps, measured_steps
from parsim.compare.stack_constants import Bounds, check_bounds, told_by
from parsim.compare.statistics import Summary, summarize
from parsim.cost.interval import leans_on
from parsim.errors import ParsimError, shorten
from parsim.stack import MAX_RELATIVE_ERROR, Stack

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the steps that are done, and the most there will be."""

ROBUST_ERROR = 0.05
"""Errors below count squared, errors above ever less: a congested run says nothing of the constants."""
PULL = 0.2
"""Weight of the starting values: a constant at the other end of its bounds costs as much as one row that
is off by this much, times the square root of the rows."""
FEWEST_ROWS = 4
MOST_ROWS = 120
"""A fit looks at so many rows, drawn evenly over models and plans; errors are stated over all."""
WORST_ROWS = 6
"""Named where a fit is refused."""
MOST_ROUNDS = 12
"""Steps of the least-squares solver; it converges in fewer."""
DIFFERENCE = 0.02
"""Of a constant's range, for derivatives."""
HIDDEN = 1e-3
"""A constant whose whole range would move no step by more than this has no effect where it stands."""
ON_BOUND = 0.01
"""A constant within this share of its range from an end sits on the bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedConstant:
    """One constant before and after."""

    name: str
    before: float
    after: float
    low: float
    high: float

    @property
    def on_bound(self) -> bool:
        """Whether a bound decided it and not the rows."""
        margin = ON_BOUND * (self.high - self.low)
        return not self.low + margin < self.after < self.high - margin


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedRow:
    """A run, what the fitted stack says of it, and what a fit says that has not seen its model."""

    id: str
    group: str
    measured_s: float
    predicted_s: float
    held_out_s: float | None

    @property
    def error(self) -> float:
        return self.predicted_s / self.measured_s - 1

    @property
    def held_out_error(self) -> float | None:
        return None if self.held_out_s is None else self.held_out_s / self.measured_s - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StackFit:
    """A fitted stack and how far off it is."""

    stack: Stack
    constants: tuple[FittedConstant, ...]
    rows: tuple[FittedRow, ...]
    left_out: tuple[LeftOut, ...]
    """Rows of the table that were not fitted."""
    tested: HeldOut | None
    """What was left out in turn; None where nothing was."""
    larger: Summary | None
    """Over the larger half of the models, by parameters, fitted on the smaller half."""
    complete: bool
    """Whether the fit ran to its end; else it was interrupted and this is the best so far."""

    @property
    def fitted(self) -> Summary:
        """Over the rows that it was fitted to."""
        return summarize([row.error for row in self.rows])

    @property
    def held_out(self) -> Summary | None:
        """Over the same rows, each predicted by a fit that had not seen its group."""
        errors = [row.held_out_error for row in self.rows if row.held_out_s is not None]
        return summarize(errors) if errors else None

    def to_data(self) -> dict[str, Any]:
        """The answer of `calibrate --runs --json`; errors are fractions."""
        return {
            "stack": self.stack.name,
            "complete": self.complete,
            "constants": [
                {"name": c.name, "before": c.before, "after": c.after, "low": c.low, "high": c.high,
                 "on_bound": c.on_bound}
                for c in self.constants
            ],
            "fitted": self.fitted.to_data(),
            "held_out": None if self.held_out is None else self.held_out.to_data(),
            "groups": None if self.tested is None else self.tested.groups,
            "grouped_by": None if self.tested is None else self.tested.by,
            "larger_models": None if self.larger is None else self.larger.to_data(),
            "relative_error": self.stack.relative_error,
            "rows": [
                {"id": r.id, "group": r.group, "measured_s": r.measured_s, "predicted_s": r.predicted_s,
                 "error": r.error, "held_out_s": r.held_out_s, "held_out_error": r.held_out_error}
                for r in self.rows
            ],
            "left_out": [{"id": r.id, "reason": r.reason} for r in self.left_out],
        }  # fmt: skip


def fit_stack(
    rows: Sequence[Row],
    stack: Stack,
    bounds: Bounds | None = None,
    *,
    cross_validate: bool = True,
    progress: Progress | None = None,
) -> StackFit:
    """The stack with the constants named in `bounds` fitted to the rows that run on it.

    Without bounds those constants are fitted that the rows can tell of: the fewer rows, the fewer.
    Ctrl-C ends the fit with the best found so far. Raises ParsimError for an unknown constant, and where
    too few rows run on the stack.
    """
    steps, left_out = measured_steps(rows, stack)
    _check_rows(steps, left_out, stack, bounds)
    fitter = _Fitter(stack=stack, quick=QuickSteps(), progress=progress)
    chosen = told_by(_sample(steps), stack, fitter.quick) if bounds is None else bounds
    check_bounds(stack, chosen)
    best, complete = fitter.fit(steps, chosen, "fitting all rows")
    predicted = fitter.quick.predicted_s(steps, best)
    tested, larger = None, None
    unseen: list[float | None] = [None] * len(steps)
    if cross_validate and complete:
        try:
            tested, unseen = fitter.held_out(steps, chosen, best)
            larger = fitter.larger(steps, chosen, best)
        except KeyboardInterrupt:
            complete = False
    groups = tested.names if tested else [step.model for step in steps]
    found = tuple(
        FittedRow(
            id=step.id, group=group, measured_s=step.seconds, predicted_s=seconds, held_out_s=other
        )
        for step, group, seconds, other in zip(steps, groups, predicted, unseen, strict=True)
    )
    errors = [row.error if row.held_out_error is None else row.held_out_error for row in found]
    bare = replace(stack, fitted_parameters=0.0)
    leans = [bool(leans_on(step.run.job, step.run.cluster, bare)) for step in steps]
    return StackFit(
        stack=replace(
            best,
            relative_error=_width(found, errors, leans, stack),
            fitted_parameters=float(max(step.parameters for step in steps)),
        ),
        constants=tuple(
            FittedConstant(name=name, before=getattr(stack, name), after=getattr(best, name), low=low,
                           high=high)
            for name, (low, high) in chosen.items()
        ),
        rows=found,
        left_out=left_out,
        tested=tested,
        larger=larger,
        complete=complete,
    )  # fmt: skip


def _width(
    rows: Sequence[FittedRow], errors: Sequence[float], leans: Sequence[bool], stack: Stack
) -> float:
    """The half width of the interval, from the rows' errors.

    Raises ParsimError, naming the worst rows, where they are too far off for any.
    """
    width = base_half_width(errors, leans)
    if width <= MAX_RELATIVE_ERROR:
        return width
    pairs = sorted(zip(rows, errors, strict=True), key=lambda pair: -abs(math.log1p(pair[1])))
    worst, error = pairs[0]
    predicted_s = worst.measured_s * (1 + error)
    others = shorten(", ".join(row.id for row, _ in pairs[1:WORST_ROWS]), 400)
    raise ParsimError(
        "these runs are too far from the fitted stack for any interval",
        where=stack.name,
        got=f"{worst.measured_s:.4g} s measured, {predicted_s:.4g} s predicted for {worst.id}",
        expected=f"nine in ten within a factor of {math.exp(MAX_RELATIVE_ERROR):.1f}",
        hint=f"the next worst: {others}; are all times in seconds, of one step, and of this stack?",
    )


def _check_rows(
    steps: Sequence[MeasuredStep], left_out: Sequence[LeftOut], stack: Stack, bounds: Bounds | None
) -> None:
    needed = max(FEWEST_ROWS, len(bounds or ()))
    if len(steps) >= needed:
        return
    reasons = sorted({f"{row.framework or 'no framework'}: {row.reason}" for row in left_out})
    raise ParsimError(
        "too few runs to fit this stack",
        where=stack.name,
        got=f"{len(steps)} runs on it" + (f", and {len(left_out)} other rows" if left_out else ""),
        expected=f"at least {needed}",
        hint=(f"{'; '.join(reasons[:4])}" + (" …" if len(reasons) > 4 else "")) if reasons else None,
    )


def _sample(steps: Sequence[MeasuredStep]) -> Sequence[MeasuredStep]:
    """At most MOST_ROWS of the rows, evenly over models, clusters and plans."""
    if len(steps) <= MOST_ROWS:
        return steps
    ordered = sorted(steps, key=lambda step: (step.model, step.configuration, step.seconds, step.id))
    return [ordered[i * len(ordered) // MOST_ROWS] for i in range(MOST_ROWS)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fitter:
    """Fits of one stack to one set of rows after another."""

    stack: Stack
    quick: QuickSteps
    progress: Progress | None

    def fit(
        self, steps: Sequence[MeasuredStep], bounds: Bounds, what: str, begin: Stack | None = None
    ) -> tuple[Stack, bool]:
        """The stack fitted to the steps, and whether the fit was not interrupted.

        `begin` tells the solver where to look first; the pull is always to the stack itself.
        """
        if not bounds:
            return self.stack, True
        loss = _Loss(self, _sample(steps), bounds, what)
        try:
            least_squares(
                loss.residuals,
                loss.first(begin or self.stack),
                bounds=(0.0, 1.0),
                jac=loss.jacobian,
                loss="cauchy",
                f_scale=ROBUST_ERROR,
                xtol=1e-3,
                ftol=1e-3,
                max_nfev=MOST_ROUNDS,
            )
        except KeyboardInterrupt:
            if begin is not None:
                raise
            return loss.best(), False
        return loss.best(), True

    def held_out(
        self, steps: Sequence[MeasuredStep], bounds: Bounds, best: Stack
    ) -> tuple[HeldOut | None, list[float | None]]:
        """How rows were grouped, and each row's time by a fit that has not seen its group."""
        tested = held_out(steps)
        unseen: list[float | None] = [None] * len(steps)
        if tested is None:
            return None, unseen
        for number, fold in enumerate(tested.folds, start=1):
            seen = [step for i, step in enumerate(steps) if i not in fold]
            if len(seen) < max(FEWEST_ROWS, len(bounds)):
                continue
            what = f"fitting without some models ({number} of {len(tested.folds)})"
            stack, _ = self.fit(seen, bounds, what, best)
            others = sorted(fold)
            times = self.quick.predicted_s([steps[i] for i in others], stack)
            for i, seconds in zip(others, times, strict=True):
                unseen[i] = seconds
        return tested, unseen

    def larger(self, steps: Sequence[MeasuredStep], bounds: Bounds, best: Stack) -> Summary | None:
        """Errors on the larger models of a fit to the smaller ones."""
        small, large = halves(steps)
        if len(small) < max(FEWEST_ROWS, len(bounds)) or not large:
            return None
        stack, _ = self.fit(small, bounds, "fitting the smaller models", best)
        times = self.quick.predicted_s(large, stack)
        return summarize([s / step.seconds - 1 for s, step in zip(times, large, strict=True)])


class _Loss:
    """What a fit makes small, over constants as shares of their range; remembers the best it saw."""

    def __init__(
        self, fitter: _Fitter, steps: Sequence[MeasuredStep], bounds: Bounds, what: str
    ) -> None:
        self._fitter, self._steps, self._what = fitter, steps, what
        self._names = list(bounds)
        self._low = np.array([bounds[name][0] for name in self._names])
        self._range = np.array([bounds[name][1] for name in self._names]) - self._low
        self.start = self.unit_of(fitter.stack)
        self._least = (math.inf, self.start)
        self._pull = PULL * math.sqrt(len(steps)) * ROBUST_ERROR
        self._rounds = 0
        self._paths: list[Linear] = []
        self._paths_of = np.array([])

    def unit_of(self, stack: Stack) -> np.ndarray:
        """A stack's constants as shares of their range."""
        values = np.array([getattr(stack, name) for name in self._names])
        share: np.ndarray = (values - self._low) / self._range
        return share.clip(0.0, 1.0)

    def residuals(self, unit: np.ndarray) -> np.ndarray:
        """Log errors of the rows, and the pull to the starting values."""
        self._paths = self._fitter.quick.paths(self._steps, self._stack(unit))
        self._paths_of = unit.copy()
        logs = [math.log(s / step.seconds) for s, step in zip(self._paths, self._steps, strict=True)]
        all_residuals = np.concatenate([logs, self._pull * (unit - self.start)])
        loss = float(np.sum(np.log1p((all_residuals / ROBUST_ERROR) ** 2)))  # as the solver's own
        self._least = min(self._least, (loss, unit), key=lambda pair: pair[0])
        self._rounds += 1
        if self._fitter.progress is not None:
            self._fitter.progress(self._what, self._rounds, MOST_ROUNDS)
        return all_residuals

    def jacobian(self, unit: np.ndarray) -> np.ndarray:
        """Derivatives of the residuals, from the tasks that decide each step."""
        if not np.array_equal(unit, self._paths_of):
            self.residuals(unit)
        quick, steps, paths = self._fitter.quick, self._steps, self._paths
        columns = []
        for i in range(len(unit)):
            moved = unit.copy()
            moved[i] += DIFFERENCE if unit[i] < 0.5 else -DIFFERENCE
            seconds = quick.along(steps, paths, self._stack(moved))
            columns.append(
                [math.log(s / p) / (moved[i] - unit[i]) for s, p in zip(seconds, paths, strict=True)]
            )
        return np.vstack([np.array(columns).T, self._pull * np.eye(len(unit))])

    def first(self, stack: Stack) -> np.ndarray:
        """Where the solver begins: at a stack's constants, but in the middle of the range of one that
        something else hides there, as a longer device time hides the host's; nothing would move it.
        """
        unit = self.unit_of(stack).clip(0.02, 0.98)
        effects = np.abs(self.jacobian(unit)[: len(self._steps)])
        unit[effects.max(axis=0) < HIDDEN] = 0.5
        return unit

    def best(self) -> Stack:
        """The best stack so far, as a profile states it: three digits, nothing below 1e-4 of a range."""
        return self._stack(np.round(self._least[1], 4), digits=3)

    def _stack(self, unit: Iterable[float], digits: int = 17) -> Stack:
        values = self._low + np.asarray(unit) * self._range
        changes: dict[str, Any] = {
            name: float(f"{value:.{digits}g}") for name, value in zip(self._names, values, strict=True)
        }
        return replace(self._fitter.stack, **changes)
