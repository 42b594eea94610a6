"""Numbers that remember what they are made of, and the longest path through a Program in such terms.

A step's time is the length of the longest path through its tasks: a sum of stage times, transfers and
host times. While constants move a little the path stays the same, so its terms give the time under other
constants without lowering the step again. That is the exact derivative wherever there is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from parsim.schedule.program import Program


class Linear(float):
    """A float that knows itself as a weighted sum of parts."""

    weights: Mapping[int, float]
    """Weight of each part, by its place in `flat`."""

    def __new__(cls, value: float, weights: Mapping[int, float]) -> Linear:
        number = super().__new__(cls, value)
        number.weights = weights
        return number

    def __add__(self, other: float) -> Linear:
        if not isinstance(other, Linear):
            return Linear(float(self) + other, self.weights)
        weights = dict(self.weights)
        for part, weight in other.weights.items():
            weights[part] = weights.get(part, 0.0) + weight
        return Linear(float(self) + float(other), weights)

    __radd__ = __add__

    def __mul__(self, factor: float) -> Linear:
        return Linear(float(self) * factor, {p: w * factor for p, w in self.weights.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Linear:
        return self * (1 / divisor)


def flat(noun: Any) -> Iterator[float]:
    """Every float inside a noun of dataclasses and tuples, in order."""
    if isinstance(noun, float):
        yield noun
    elif isinstance(noun, tuple):
        for part in noun:
            yield from flat(part)
    elif is_dataclass(noun):
        for field in fields(noun):
            yield from flat(getattr(noun, field.name))


def tagged(noun: Any, first: int = 0) -> tuple[Any, int]:
    """The noun with every float as a Linear of itself, and the place after its last one.

    Zeros stay what they are: no task takes its time from them.
    """
    if isinstance(noun, float):
        return Linear(noun, {first: 1.0}) if noun else noun, first + 1
    if isinstance(noun, tuple):
        parts = []
        for part in noun:
            part, first = tagged(part, first)
            parts.append(part)
        return type(noun)(*parts) if hasattr(noun, "_fields") else tuple(parts), first
    if is_dataclass(noun) and not isinstance(noun, type):
        changes = {}
        for field in fields(noun):
            changes[field.name], first = tagged(getattr(noun, field.name), first)
        return replace(noun, **changes), first
    return noun, first


def longest_path(program: Program) -> Linear:
    """The step's time as the sum of the tasks that decide it."""
    end_s: list[float] = []
    last: dict[tuple[int, str], int] = {}
    before: list[int] = []
    for i, task in enumerate(program.tasks):
        stream = (task.rank, task.stream)
        decides, start_s = last.get(stream, -1), 0.0
        if decides >= 0:
            start_s = end_s[decides]
        for other in task.after:
            if end_s[other] > start_s:
                decides, start_s = other, end_s[other]
        before.append(decides)
        end_s.append(start_s + float(task.duration_s))
        last[stream] = i
    weights: dict[int, float] = {}
    i = max(range(len(end_s)), key=end_s.__getitem__, default=-1)
    total_s = max(end_s, default=0.0)
    while i >= 0:
        duration = program.tasks[i].duration_s
        if isinstance(duration, Linear):
            for part, weight in duration.weights.items():
                weights[part] = weights.get(part, 0.0) + weight
        i = before[i]
    return Linear(total_s, weights)
