"""Why a space of plans is empty: which constraints exclude each other, and which one to give up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import Any

import numpy as np

from parsim.cost.stage import CostModel
from parsim.errors import ParsimError
from parsim.plan import MAX_GPUS, Job
from parsim.search.examine import Examiner
from parsim.search.search import NoPlan, Progress, search
from parsim.search.space import Constraints, families
from parsim.units import format_duration

CHOICE_AXES = {"zero": 0, "micro_batch": 1, "sequence_parallel": 2, "tp_overlap": 3, "recompute": 4}
"""Axes of a Family's choices."""
NEAR_GPUS = 32
"""How many smaller numbers of GPUs are tried before the next power of two."""
DOUBLINGS = 8
"""How often the GPUs are doubled to find a cluster that holds the model."""


def given(constraints: Constraints) -> tuple[str, ...]:
    """Names of what is constrained: fields, and max_tp for the most of tp.

    >>> given(Constraints(tp=(8,), max_sizes={"pp": 2}))
    ('tp', 'max_pp')
    """
    names = [f.name for f in fields(Constraints) if f.name != "max_sizes"]
    return (
        *(name for name in names if getattr(constraints, name)),
        *(f"max_{key}" for key in constraints.max_sizes),
    )


def without(constraints: Constraints, *names: str) -> Constraints:
    """The constraints less some."""
    most = {k: v for k, v in constraints.max_sizes.items() if f"max_{k}" not in names}
    dropped: dict[str, Any] = {name: () for name in names if not name.startswith("max_")}
    return replace(constraints, **dropped, max_sizes=most)


def as_flag(constraints: Constraints, name: str) -> str:
    """A constraint as it is typed.

    >>> as_flag(Constraints(micro_batch=(1, 2)), "micro_batch")
    '--micro-batch 1,2'
    """
    if name.startswith("max_"):
        value = str(constraints.max_sizes[name.removeprefix("max_")])
    else:
        value = _listed(getattr(constraints, name), ",")
    return f"--{name.replace('_', '-')} {value}"


def _listed(values: Any, separator: str = ", ") -> str:
    return separator.join(str(value).lower() for value in values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What was searched for."""

    job: Job
    gpus: int
    costs: CostModel
    constraints: Constraints

    def _spaces(self) -> Iterator[tuple[Any, Any]]:
        """Families with which of their plans are legal."""
        examiner = Examiner(self.job, self.costs)
        overlap, cluster = self.costs.stack.default_tp_overlap, self.costs.cluster
        listed = families(self.job, self.gpus, self.constraints, tp_overlap=overlap, cluster=cluster)
        for family in listed:
            yield family, examiner.legality(family)[1]

    def any_legal(self) -> bool:
        """Whether a plan is legal, whatever it needs of memory."""
        return any(legal.any() for _, legal in self._spaces())

    def legal_values(self, name: str) -> tuple[Any, ...]:
        """The values of a dimension that legal plans have."""
        found: set[Any] = set()
        for family, legal in self._spaces():
            if name not in CHOICE_AXES:
                found |= {getattr(family.base, name)} if legal.any() else set()
                continue
            axis = CHOICE_AXES[name]
            choices = [getattr(family, key) for key in CHOICE_AXES]
            by_choice = np.moveaxis(legal.reshape([len(values) for values in choices]), axis, 0)
            found |= {v for v, some in zip(choices[axis], by_choice, strict=True) if some.any()}
        return tuple(sorted(found))


def conflict(asked: Question) -> tuple[str, ...]:
    """The fewest constraints that together leave no legal plan; none where the job alone has none.

    Of several that are as few the first; `asked` has no legal plan.
    """
    names = given(asked.constraints)
    for size in range(len(names) + 1):
        for some in combinations(names, size):
            others = [name for name in names if name not in some]
            if not replace(asked, constraints=without(asked.constraints, *others)).any_legal():
                return some
    raise AssertionError("some plan is legal")


def explained(asked: Question, no: NoPlan, progress: Progress | None = None) -> ParsimError:
    """A better word on an empty space: the constraints that contradict each other, or what a search
    without each of them finds. Exit status 2 for flags that exclude each other, else 1.
    """
    if no.space.legal:
        hint = "; ".join(relaxations(asked, progress)) or no.hint
        return _no_plan(no, no.what, where=no.where, got=no.got, expected=no.expected, hint=hint)
    names = conflict(asked)
    flags = [as_flag(asked.constraints, name) for name in names]
    on = f"{asked.job.model.name} on {asked.gpus:,} GPUs, global batch {asked.job.global_batch}"
    if not names:
        hint = "; ".join(other_sizes(asked)) or no.hint
        return _no_plan(no, f"no plan is legal for {on}", where=no.where, got=no.got, hint=hint)
    alone = replace(
        asked,
        constraints=without(
            asked.constraints, *(name for name in given(asked.constraints) if name not in names)
        ),
    )
    instead = []
    for name, flag in zip(names, flags, strict=True):
        key = name.removeprefix("max_")
        values = replace(alone, constraints=without(alone.constraints, name)).legal_values(key)
        instead.append(f"without {flag}: {key} {_listed(values[:16])}")
    words = [flag.split()[0] for flag in flags]
    if len(names) == 1:
        what = f"{flags[0]} leaves no legal plan for {on}"
        got = no.got if no.space.enumerated else flags[0]
        hint = "; ".join((*instead, *other_sizes(asked)))
        return _no_plan(no, what, where=words[0], got=got, hint=hint)
    return ParsimError(
        f"{', '.join(words[:-1])} and {words[-1]} contradict each other for {on}",
        where=", ".join(words),
        got=", ".join(flags),
        expected="; or ".join(instead),
    )


def _no_plan(no: NoPlan, what: str, **parts: Any) -> NoPlan:
    error = NoPlan(what, **parts)
    error.space = no.space
    return error


def relaxations(asked: Question, progress: Progress | None = None) -> Iterator[str]:
    """What a search finds without each of the constraints in turn, the fastest first; with none that
    helps, on how many GPUs a plan fits.
    """
    found = []
    for name in given(asked.constraints):
        other = replace(asked, constraints=without(asked.constraints, name))
        best = _best(other, progress)
        if best is not None:
            found.append((best[0], f"without {as_flag(asked.constraints, name)}: {best[1]}"))
    yield from (text for _, text in sorted(found))
    if found:
        return
    for doubling in range(1, DOUBLINGS + 1):
        gpus = asked.gpus << doubling
        best = _best(replace(asked, gpus=gpus), progress) if gpus <= MAX_GPUS else None
        if best is not None:
            yield f"on {gpus:,} GPUs: {best[1]}"
            return


def _best(asked: Question, progress: Progress | None) -> tuple[float, str] | None:
    """Step time of the best plan, and a word on it with how many fit; None where none does."""
    try:
        result = search(
            asked.job,
            asked.gpus,
            asked.costs,
            constraints=asked.constraints,
            top=1,
            progress=progress,
            processes=None,
        )
    except ParsimError:
        return None
    step_s, number = result.plans[0].step_time_s, result.space.fits
    many = f"{number:,} plans fit" if number > 1 else "1 plan fits"
    return step_s, f"{many}, the fastest in {format_duration(step_s)} a step"


def other_sizes(asked: Question) -> Iterator[str]:
    """Batches and numbers of GPUs near those asked for that have legal plans."""
    odd, batch = asked.gpus // (asked.gpus & -asked.gpus), asked.job.global_batch
    for part in dict.fromkeys((odd, asked.gpus)):
        whole = -(-batch // part) * part
        job = replace(asked.job, global_batch=whole)
        if part > 1 and whole != batch and replace(asked, job=job).any_legal():
            yield f"a global batch that {part:,} divides has some: --global-batch {whole}"
            break
    nearest = range(asked.gpus - 1, max(0, asked.gpus - 1 - NEAR_GPUS), -1)
    for gpus in (*nearest, 1 << (asked.gpus.bit_length() - 1)):
        if gpus < asked.gpus and replace(asked, gpus=gpus).any_legal():
            yield f"{gpus:,} GPUs have some: --gpus {gpus}"
            return
