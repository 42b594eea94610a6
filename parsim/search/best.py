"""The best plans found so far."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from parsim.search.candidates import Number
from parsim.simulate.prediction import Prediction


@dataclass(slots=True)
class Best:
    """The `top` fastest of the plans that were replayed: one for each number, and each plan once."""

    top: int
    _found: dict[Number, Prediction] = field(default_factory=dict)
    """By number of the plan that became this one."""

    def __len__(self) -> int:
        return len(self._found)

    def keep(self, prediction: Prediction, number: Number) -> None:
        """Keep a prediction if it is among the best."""
        found = self._found
        rivals = [n for n, other in found.items() if n == number or other.plan == prediction.plan]
        if any(found[n].step_time_s <= prediction.step_time_s for n in rivals):
            return
        for n in rivals:
            del found[n]
        found[number] = prediction
        if len(found) > self.top:
            del found[self._in_order()[-1]]

    def slowest_s(self) -> float:
        """Seconds that a plan must fall below to be among them: any, as long as they are too few."""
        if len(self._found) < self.top:
            return math.inf
        return max(prediction.step_time_s for prediction in self._found.values())

    def plans(self) -> tuple[Prediction, ...]:
        """Fastest first; of equal ones the first in the space."""
        return tuple(self._found[number] for number in self._in_order())

    def _in_order(self) -> list[Number]:
        return sorted(self._found, key=lambda number: (self._found[number].step_time_s, number))
