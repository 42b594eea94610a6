"""Fitting the few constants of a Stack to measured runs, and testing them on models it has not seen.

The loss is robust (soft L1) over log(predicted / measured), so that a few congested runs do not pull the
constants; a weak pull towards the starting values keeps constants that no row decides where they were.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from statistics import quantiles
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from parsim.compare.csv_table import Row
from parsim.compare.run_models import shipped_models
from parsim.compare.run_rows import ROW_SETTINGS, Library, Run, measured_s, run_of
from parsim.compare.statistics import Summary, summarize
from parsim.cost.stage import CostModel
from parsim.errors import ParsimError, did_you_mean
from parsim.schedule.program import step_time_s
from parsim.simulate.prediction import program_of
from parsim.stack import Stack

Bounds = Mapping[str, tuple[float, float]]
"""Least and greatest plausible value of each constant that is fitted."""

BOUNDS: Bounds = {
    "gemm_slowdown": (0.95, 1.6),
    "attention_slowdown": (0.8, 3.0),
    "attention_max_flops_per_s": (5e13, 1e15),
    "memory_bound_slowdown": (0.6, 3.0),
    "layer_host_s": (0.0, 3e-3),
    "step_overhead_s": (0.0, 0.5),
    "collective_overhead_s": (0.0, 6e-4),
    "overlap_cost": (0.0, 1.0),
    "dp_slowdown": (0.8, 3.0),
    "zero_broadcast_s": (0.0, 1e-2),
    "routed_slowdown": (0.8, 4.0),
    "moe_host_s": (0.0, 1e-2),
    "ep_slowdown": (0.8, 3.0),
}
"""Kernels hardly faster than bare ones, and host times of the frameworks' order. Memory-bound kernels
may be: what profiles know of them is the traffic of GEMMs."""

ROBUST_ERROR = 0.05
"""Errors below count squared, errors above by their size."""
PULL = 0.2
"""Weight of the starting values: a constant at the other end of its bounds costs as much as one row that
is off by this much, times the square root of the rows."""


FOLDS = 4
"""Fits in which each has some models left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StackFit:
    """A fitted stack and how far off it is."""

    stack: Stack
    fitted: Summary
    """Over the rows that it was fitted to."""
    held_out: Summary | None
    """Over the same rows, each predicted by a fit that had not seen its model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    """A run that constants are fitted to."""

    run: Run
    seconds: float
    model: str
    """Rows of one model are held out together."""


def fit_stack(
    rows: Sequence[Row], stack: Stack, bounds: Bounds | None = None, *, cross_validate: bool = True
) -> StackFit:
    """The stack with the constants named in `bounds` fitted to the rows that run on it.

    Without bounds those constants are fitted that the rows can tell of. Rows that cannot be predicted
    are left out. Raises ParsimError for an unknown constant, and where there are fewer rows than
    constants.
    """
    measured = _measured(rows, stack)
    bounds = _decided_by(measured, stack) if bounds is None else bounds
    _check(stack, bounds)
    if len(measured) < len(bounds):
        raise ParsimError(
            "there are too few runs to fit this stack",
            where=stack.name,
            got=f"{len(measured)} runs",
            expected=f"at least {len(bounds)}, one for each constant",
        )
    best = _fit(measured, stack, bounds)
    errors = _errors(measured, best)
    held_out = summarize(_held_out_errors(measured, stack, bounds)) if cross_validate else None
    spread = _interval(errors)
    return StackFit(
        stack=replace(best, relative_error=spread), fitted=summarize(errors), held_out=held_out
    )


def _decided_by(measured: Sequence[_Measured], stack: Stack) -> Bounds:
    """Bounds of the constants that these runs depend on."""
    plans = [row.run.plan for row in measured]
    has_tp = any(plan.tp > 1 for plan in plans)
    has_experts = any(row.run.job.model.moe is not None for row in measured)
    depends = {
        "attention_slowdown": stack.attention == "flash",
        "attention_max_flops_per_s": stack.attention_max_flops_per_s > 0,
        "collective_overhead_s": has_tp,
        "overlap_cost": has_tp and (stack.tp_async_backward or any(plan.tp_overlap for plan in plans)),
        "dp_slowdown": any(plan.dp * plan.cp > 1 for plan in plans),
        "zero_broadcast_s": stack.zero_broadcast_s > 0,
        "routed_slowdown": has_experts,
        "moe_host_s": has_experts,
        "ep_slowdown": any(plan.ep > 1 for plan in plans),
    }
    return {name: bound for name, bound in BOUNDS.items() if depends.get(name, True)}


def _held_out_errors(measured: Sequence[_Measured], stack: Stack, bounds: Bounds) -> list[float]:
    """Errors of rows whose model a fit has not seen; whole models are held out, some at a time."""
    counts = Counter(row.model for row in measured)
    by_size = sorted(counts, key=lambda model: (-counts[model], model))
    errors: list[float] = []
    for fold in range(min(FOLDS, len(by_size))):
        left_out = set(by_size[fold::FOLDS])
        seen = [row for row in measured if row.model not in left_out]
        unseen = [row for row in measured if row.model in left_out]
        if len(seen) >= len(bounds):
            errors.extend(_errors(unseen, _fit(seen, stack, bounds)))
    return errors


def _check(stack: Stack, bounds: Bounds) -> None:
    known = [field.name for field in fields(stack)]
    for name, (low, high) in bounds.items():
        if name not in known:
            raise ParsimError("a stack has no such constant", where=name, hint=did_you_mean(name, known))
        if not low < high:
            raise ParsimError("bounds are low and high", where=name, got=(low, high))


def _measured(rows: Sequence[Row], stack: Stack) -> list[_Measured]:
    """The rows that run on the stack and can be predicted."""
    library = Library(models=shipped_models(), stacks={stack.name: stack})
    measured = []
    for row in rows:
        try:
            run, seconds = run_of(row, library), measured_s(row)
        except ParsimError:
            continue
        if run.stack.name == stack.name:
            shape = run.job.model
            name = f"{shape.hidden} x {shape.heads} heads"
            measured.append(_Measured(run=run, seconds=seconds, model=name))
    return measured


def _fit(measured: Sequence[_Measured], stack: Stack, bounds: Bounds) -> Stack:
    names = list(bounds)
    low = np.array([bounds[name][0] for name in names])
    high = np.array([bounds[name][1] for name in names])
    start = np.clip([getattr(stack, name) for name in names], low, high)
    unit_start = (start - low) / (high - low)
    pull = PULL * math.sqrt(len(measured))

    def residuals(unit: np.ndarray) -> np.ndarray:
        values = low + unit * (high - low)
        candidate = _with(stack, names, values)
        logs = [math.log1p(error) for error in _errors(measured, candidate)]
        return np.concatenate([logs, pull * ROBUST_ERROR * (unit - unit_start)])

    found = least_squares(
        residuals,
        np.clip(unit_start, 0.02, 0.98),
        bounds=(0.0, 1.0),
        loss="soft_l1",
        f_scale=ROBUST_ERROR,
        diff_step=np.full(len(names), 0.02),
        max_nfev=12,
    )
    values = low + found.x * (high - low)
    # Three digits, as a profile states them.
    return _with(stack, names, [float(f"{value:.3g}") for value in values])


def _with(stack: Stack, names: Sequence[str], values: Iterable[float]) -> Stack:
    changes: dict[str, Any] = dict(zip(names, map(float, values), strict=True))
    return replace(stack, **changes)


def _errors(measured: Sequence[_Measured], stack: Stack) -> list[float]:
    """predicted / measured - 1 of runs under another stack."""
    costs: dict[tuple[object, ...], CostModel] = {}
    steps: dict[tuple[object, ...], float] = {}
    errors = []
    for row in measured:
        run = row.run
        own = _with_settings_of(stack, run.stack)
        key = (run.job.model, run.cluster_key, own)
        if key not in costs:
            costs[key] = CostModel(run.job.model, run.cluster, own)
        step = (run.job, run.plan, key)
        if step not in steps:
            steps[step] = quick_step_s(run, costs[key])
        errors.append(steps[step] / row.seconds - 1)
    return errors


def _with_settings_of(stack: Stack, row: Stack) -> Stack:
    """A candidate with the settings that a row states for itself."""
    return replace(stack, **{name: getattr(row, name) for name in ROW_SETTINGS})


def quick_step_s(run: Run, costs: CostModel) -> float:
    """Step time from two steps with fewer micro-batches: in a full pipeline each more takes as long.

    Exact for steps that are periodic after the warm-up, as those of all schedules here are.
    """
    m = run.plan.num_micro_batches(run.job)
    few, more = run.plan.pp, 2 * run.plan.pp
    if m <= more:
        return _step_s(run, costs, m)
    few_s, more_s = _step_s(run, costs, few), _step_s(run, costs, more)
    return more_s + (m - more) * (more_s - few_s) / (more - few)


def _step_s(run: Run, costs: CostModel, num_micro_batches: int) -> float:
    job = replace(run.job, global_batch=num_micro_batches * run.plan.dp * run.plan.micro_batch)
    return step_time_s(program_of(job, run.plan, costs)[0])


def _interval(errors: Sequence[float]) -> float:
    """Half width of the 90 % interval of log(measured / predicted)."""
    sizes = [abs(math.log1p(error)) for error in errors]
    return float(f"{quantiles(sizes, n=10)[-1]:.2g}")
