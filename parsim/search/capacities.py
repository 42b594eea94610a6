"""Capacity of many clusters: every case searched, then curves and sensitivities."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from parsim.search.capacity import (
    Answer,
    Case,
    Limits,
    LongRunOf,
    NoOption,
    Option,
    answers,
    options_of,
    recommended,
)
from parsim.search.scaling import ScalingPoint, scaling_curve
from parsim.search.search import NoPlan, Progress, search
from parsim.search.sensitivity import Sensitivity, sensitivities
from parsim.search.space import Constraints


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a capacity question asks for, beside the cases."""

    limits: Limits
    constraints: Constraints
    long_run: LongRunOf
    top: int = 1
    """Plans for each cluster."""
    budget_s: float = 60.0
    """Seconds after which no more of a plan is proven."""
    scaling: bool = False
    """Also weak scaling."""
    sensitivity: bool = False
    assumed: Callable[[Option], tuple[str, ...]] = lambda option: ()
    """What the long run of an option takes for granted, in words."""
    pue: float | None = None
    """Power usage effectiveness of the facility whose energy is asked for too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What was found out; a part where the user interrupted."""

    wanted: Wanted
    options: tuple[Option, ...] = ()
    refused: tuple[NoOption, ...] = ()
    strong: dict[str, tuple[ScalingPoint, ...]] = field(default_factory=dict)
    """Curves by "model on hardware"."""
    weak: dict[str, tuple[ScalingPoint, ...]] = field(default_factory=dict)
    sensitivity: dict[str, tuple[Sensitivity, ...]] = field(default_factory=dict)
    """Of the recommended option of each model, by `option_name`."""
    notes: tuple[str, ...] = ()
    """What a curve leaves out, and why."""
    partial: bool = False

    @property
    def answers(self) -> dict[str, tuple[Answer, ...]]:
        """Answers of every model, the recommended one first; none where nothing is within the limits."""
        return answers_by_model(self.options, self.wanted.limits)


def answers_by_model(options: Sequence[Option], limits: Limits) -> dict[str, tuple[Answer, ...]]:
    """Answers of every model within the limits, the recommended one first."""
    found = {}
    for model in dict.fromkeys(option.case.job.model.name for option in options):
        own = answers([o for o in options if o.case.job.model.name == model], limits)
        first = recommended(own, limits)
        found[model] = tuple(sorted(own, key=lambda answer: answer is not first))
    return found


def find_capacity(
    cases: Sequence[Case],
    wanted: Wanted,
    *,
    progress: Progress | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Capacity:
    """Every case in turn, then what else was asked; Ctrl-C keeps what is done.

    `interrupted` says that the user has asked to stop, where somebody else took the KeyboardInterrupt.
    """
    found = Capacity(wanted=wanted)
    try:
        for step in _steps(cases, wanted, _stopping(progress or _silent, interrupted)):
            found = step(found)
            if interrupted():
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        if not found.options and not found.refused:
            raise
        found = replace(found, partial=True)
    return found


def _silent(what: str, done: int, total: int) -> None:
    pass


def _steps(
    cases: Sequence[Case], wanted: Wanted, report: Progress
) -> Iterator[Callable[[Capacity], Capacity]]:
    """The work, piece by piece: each turns what was found before into more."""
    for number, case in enumerate(cases, start=1):
        label = f"{_curve_of(case)}, {case.gpus} GPUs ({number} of {len(cases)})"
        yield partial(_with_case, case=case, wanted=wanted, report=_labelled(report, label))
    yield _with_strong_curves
    if wanted.scaling:
        for key in dict.fromkeys(map(_curve_of, cases)):
            yield partial(_with_weak_curve, key=key, wanted=wanted, report=report)
    if wanted.sensitivity:
        for name in dict.fromkeys(case.job.model.name for case in cases):
            yield partial(_with_sensitivity, name=name, wanted=wanted, report=report)


def _stopping(report: Progress, interrupted: Callable[[], bool]) -> Progress:
    """Progress that ends whatever reports it once the user has interrupted."""

    def show(what: str, done: int, total: int) -> None:
        if interrupted():
            raise KeyboardInterrupt
        report(what, done, total)

    return show


def _labelled(report: Progress, label: str) -> Progress:
    return lambda what, done, total: report(f"{label}: {what}", done, total)


def _with_case(found: Capacity, case: Case, wanted: Wanted, report: Progress) -> Capacity:
    options = options_of(
        case,
        wanted.long_run,
        constraints=wanted.constraints,
        top=wanted.top,
        budget_s=wanted.budget_s,
        progress=report,
    )
    if isinstance(options, NoOption):
        return replace(found, refused=(*found.refused, options))
    return replace(found, options=(*found.options, *options))


def _curve_of(case: Case) -> str:
    return f"{case.job.model.name} on {case.hardware}"


def _fastest(found: Capacity, key: str) -> list[Option]:
    """The fastest option of every number of GPUs on one curve, fewest GPUs first."""
    best: dict[int, Option] = {}
    for option in found.options:
        if _curve_of(option.case) == key:
            best.setdefault(option.case.gpus, option)
    return [best[gpus] for gpus in sorted(best)]


def _with_strong_curves(found: Capacity) -> Capacity:
    keys = dict.fromkeys(_curve_of(option.case) for option in found.options)
    curves = {key: scaling_curve([o.prediction for o in _fastest(found, key)]) for key in keys}
    return replace(found, strong={key: points for key, points in curves.items() if len(points) > 1})


def _with_weak_curve(found: Capacity, key: str, wanted: Wanted, report: Progress) -> Capacity:
    """The batch in proportion to the GPUs, from the smallest cluster that holds the model on.

    Clusters whose share would be no whole number of sequences have no point.
    """
    options = _fastest(found, key)
    if len(options) < 2:
        return found
    first = options[0].case
    predictions, notes = [options[0].prediction], list(found.notes)
    for option in options[1:]:
        case = option.case
        batch, rest = divmod(first.job.global_batch * case.gpus, first.gpus)
        if rest:
            notes.append(f"no weak scaling on {case.gpus} GPUs: the batch would be no whole number")
            continue
        try:
            result = search(
                replace(case.job, global_batch=batch),
                case.gpus,
                case.costs,
                constraints=wanted.constraints,
                top=1,
                budget_s=wanted.budget_s,
                progress=_labelled(report, f"weak scaling of {key}, {case.gpus} GPUs"),
            )
        except NoPlan as no:
            notes.append(f"no weak scaling on {case.gpus} GPUs: {no.what}")
            continue
        predictions.append(result.plans[0])
    weak = found.weak | {key: scaling_curve(predictions)}
    return replace(found, weak=weak, notes=tuple(notes))


def _with_sensitivity(found: Capacity, name: str, wanted: Wanted, report: Progress) -> Capacity:
    own = [option for option in found.options if option.case.job.model.name == name]
    answer = recommended(answers(own, wanted.limits), wanted.limits)
    if answer is None:
        return found
    option = answer.choice
    effects = sensitivities(
        option.prediction,
        option.case.costs,
        constraints=wanted.constraints,
        budget_s=wanted.budget_s,
        progress=_labelled(report, f"sensitivity of {name}"),
    )
    return replace(found, sensitivity=found.sensitivity | {option_name(option): effects})


def option_name(option: Option) -> str:
    """What to call an option: "llama-3.1-8b on 256 × h100-sxm-80gb"."""
    case = option.case
    return f"{case.job.model.name} on {case.gpus:,} × {case.hardware}"
