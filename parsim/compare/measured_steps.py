"""Measured runs on one stack, and quick predictions of them while the stack's constants vary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from parsim.compare.csv_table import Row
from parsim.compare.library import Library
from parsim.compare.linear import Linear, flat, longest_path, tagged
from parsim.compare.row_cells import measured_s
from parsim.compare.row_stack import ROW_SETTINGS, stack_named
from parsim.compare.run_models import shipped_models
from parsim.compare.run_rows import Run, run_of
from parsim.cost.stage import CostModel
from parsim.cost.step import StepCost, step_cost
from parsim.errors import ParsimError
from parsim.model import num_parameters
from parsim.schedule import make_schedule
from parsim.schedule.action import Action, Schedule
from parsim.schedule.lower import lower
from parsim.schedule.order import in_running_order
from parsim.schedule.program import Program, step_time_s
from parsim.shipped import shipped
from parsim.stack import Stack

T = TypeVar("T")
N = TypeVar("N", bound=float)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredStep:
    """A run that constants are fitted to."""

    id: str
    run: Run
    seconds: float

    @property
    def model(self) -> str:
        """Widths of the model: another number of layers is no other model."""
        shape = self.run.job.model
        experts = "" if shape.moe is None else f", {shape.moe.experts} experts"
        return f"hidden {shape.hidden}, {shape.heads} heads{experts}"

    @property
    def configuration(self) -> str:
        """The plan on its cluster; rows that share it repeat each other or differ in batch or length."""
        plan = replace(self.run.plan, micro_batch=1)
        return f"{self.run.cluster.name}, {plan.short()}"

    @property
    def parameters(self) -> int:
        return num_parameters(self.run.job.model)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A row that is not among the measured steps."""

    id: str
    framework: str
    reason: str


def measured_steps(
    rows: Sequence[Row], stack: Stack
) -> tuple[tuple[MeasuredStep, ...], tuple[LeftOut, ...]]:
    """The rows that run on the stack, and those that do not or cannot be predicted, with the reason."""
    library = Library(models=shipped_models(), stacks={stack.name: stack})
    known = {*shipped("hardware_profiles/stacks"), stack.name}
    steps, left_out = [], []
    for row in rows:
        name, framework = row.get("id", ""), row.get("framework", "").strip()
        try:
            step = MeasuredStep(id=name, run=run_of(row, library), seconds=measured_s(row))
        except ParsimError as error:
            reason = f"{error.what} ({error.where})" if error.where else error.what
            left_out.append(LeftOut(id=name, framework=framework, reason=reason))
            continue
        if stack_named(framework, row.get("year", ""), known) is None:
            left_out.append(LeftOut(id=name, framework=framework, reason="framework is unknown"))
        elif step.run.stack.name != stack.name:
            reason = f"runs on {step.run.stack.name}"
            left_out.append(LeftOut(id=name, framework=framework, reason=reason))
        else:
            steps.append(step)
    return tuple(steps), tuple(left_out)


@dataclass(slots=True)
class QuickSteps:
    """Predicts steps under one candidate after another; what does not depend on it is made once."""

    _orders: dict[tuple[str, int, int, int], tuple[Schedule, list[tuple[int, Action]]]] = field(
        default_factory=dict
    )

    def predicted_s(self, steps: Sequence[MeasuredStep], stack: Stack) -> list[float]:
        """Step times of runs under another stack."""
        return _each_once(steps, stack, self._step_s)

    def paths(self, steps: Sequence[MeasuredStep], stack: Stack) -> list[Linear]:
        """The same as sums over the parts of `_parts`, for `along`."""
        return _each_once(steps, stack, self._path)

    def along(self, steps: Sequence[MeasuredStep], paths: Sequence[Linear], stack: Stack) -> list[float]:
        """Step times under another stack if the same tasks decide them."""
        parts = _each_once(steps, stack, lambda run, costs: list(flat(_parts(run, costs))))
        return [
            sum(weight * values[part] for part, weight in path.weights.items())
            for path, values in zip(paths, parts, strict=True)
        ]

    def _step_s(self, run: Run, costs: CostModel) -> float:
        cost, stack = _parts(run, costs)
        return _extended(run, lambda m: step_time_s(self._program(run, m, cost, stack)))

    def _path(self, run: Run, costs: CostModel) -> Linear:
        (cost, stack), _ = tagged(_parts(run, costs))
        return _extended(run, lambda m: longest_path(self._program(run, m, cost, stack)))

    def _program(self, run: Run, num_micro_batches: int, cost: StepCost, stack: Stack) -> Program:
        plan = run.plan
        key = (plan.schedule, plan.pp, plan.vpp, num_micro_batches)
        if key not in self._orders:
            schedule = make_schedule(plan, num_micro_batches)
            self._orders[key] = schedule, in_running_order(schedule)
        schedule, order = self._orders[key]
        return lower(schedule, cost, plan, stack, order=order)


def _parts(run: Run, costs: CostModel) -> tuple[StepCost, Stack]:
    """All that lowering a step takes times from, whatever the number of micro-batches."""
    return step_cost(run.job, run.plan, costs), costs.stack


def _each_once(
    steps: Sequence[MeasuredStep], stack: Stack, make: Callable[[Run, CostModel], T]
) -> list[T]:
    """What `make` says of each run under a stack; repeats of a run are asked once."""
    costs: dict[tuple[object, ...], CostModel] = {}
    made: dict[tuple[object, ...], T] = {}
    for step in steps:
        run, key = step.run, _key(step.run)
        if key in made:
            continue
        # The settings that a row states for itself hold under every candidate.
        own = replace(stack, **{name: getattr(run.stack, name) for name in ROW_SETTINGS})
        cost_key = (run.job.model, run.cluster_key, own)
        if cost_key not in costs:
            costs[cost_key] = CostModel(run.job.model, run.cluster, own)
        made[key] = make(run, costs[cost_key])
    return [made[_key(step.run)] for step in steps]


def _key(run: Run) -> tuple[object, ...]:
    return run.job, run.plan, run.cluster_key, *(getattr(run.stack, name) for name in ROW_SETTINGS)


def _extended(run: Run, length: Callable[[int], N]) -> N:
    """Step time from two steps with fewer micro-batches: in a full pipeline each more takes as long.

    Exact for steps that are periodic after the warm-up, as those of all schedules here are. Those with
    more forwards ahead than 1F1B, or all of them, need more micro-batches to be full.
    """
    m = run.plan.num_micro_batches(run.job)
    few = run.plan.pp * (1 if run.plan.schedule in ("gpipe", "1f1b", "interleaved") else 2)
    more = few + run.plan.pp
    if m <= more:
        return length(m)
    share = (m - more) / (more - few)
    return (1 + share) * length(more) + -share * length(few)  # type: ignore[return-value]
