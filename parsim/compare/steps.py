"""A predicted step against a measured one: where the error is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from parsim.errors import ParsimError
from parsim.plan import STAGE_LISTS

SHORTEST_S, LONGEST_S = 1e-12, 1e12
"""What a step and its parts lie between: of longer and shorter ones no ratio could be told."""

SAME = (
    *("dp", "tp", "pp", "cp", "ep", "vpp", "micro_batch", "schedule", "zero", "recompute"),
    *STAGE_LISTS,
)
"""Fields of a plan in which a prediction and a measurement that are compared must agree."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One part of the step, predicted and measured."""

    what: str
    predicted_s: float
    measured_s: float

    @property
    def difference_s(self) -> float:
        return self.predicted_s - self.measured_s


@dataclass(frozen=True, slots=True, kw_only=True)
class StepComparison:
    """A predicted step time against the measured one, itemised."""

    predicted_s: float
    measured_s: float
    parts: tuple[Difference, ...]
    """By the keys of `breakdown_s`, the largest difference first; they add up to the whole."""

    @property
    def error(self) -> float:
        """predicted / measured − 1."""
        return self.predicted_s / self.measured_s - 1

    def to_data(self) -> dict[str, Any]:
        """The answer of `validate PREDICTION MEASUREMENT --json`."""
        return {
            "predicted_s": self.predicted_s,
            "measured_s": self.measured_s,
            "error": self.error,
            "parts": [
                {
                    "what": part.what,
                    "predicted_s": part.predicted_s,
                    "measured_s": part.measured_s,
                    "difference_s": part.difference_s,
                    "share_of_error": part.difference_s / self.measured_s,
                }
                for part in self.parts
            ],
        }


def compare_steps(
    predicted_s: float,
    predicted: Mapping[str, float],
    measured_s: float,
    measured: Mapping[str, float],
) -> StepComparison:
    """Compare two steps by their breakdowns.

    The measured breakdown is of the step nearest to the median and is scaled to the median.
    """
    scale = measured_s / max(sum(measured.values()), 1e-12)
    keys = sorted(set(predicted) | set(measured))
    parts = [
        Difference(
            what=key,
            predicted_s=predicted.get(key, 0.0),
            measured_s=scale * measured.get(key, 0.0),
        )
        for key in keys
    ]
    parts = [part for part in parts if part.predicted_s or part.measured_s]
    return StepComparison(
        predicted_s=predicted_s,
        measured_s=measured_s,
        parts=tuple(sorted(parts, key=lambda part: -abs(part.difference_s))),
    )


def compare_documents(prediction: Any, measurement: Any, *, where: tuple[str, str]) -> StepComparison:
    """Compare the parsed JSON of a prediction (simulate, plan) with that of a measurement (run).

    Raises ParsimError where one of them is not what it should be, or they are of different plans.
    """
    if isinstance(prediction, Mapping) and isinstance(prediction.get("plans"), list):
        prediction = prediction["plans"][0] if prediction["plans"] else {}
    documents = (prediction, measurement)
    for data, place in zip(documents, where, strict=True):
        if isinstance(data, Mapping) and not isinstance(data.get("plan", {}), Mapping):
            raise ParsimError("this is no plan", where=f"{place}: plan", got=data["plan"])
    times = [_number(data, "step_time_s", place) for data, place in zip(documents, where, strict=True)]
    parts = [_breakdown(data, place) for data, place in zip(documents, where, strict=True)]
    plans: list[Mapping[str, Any]] = [data.get("plan", {}) for data in documents]
    for key in SAME:
        # Documents of earlier versions lack what was left out then.
        if plans[0] and plans[1] and (plans[0].get(key) or None) != (plans[1].get(key) or None):
            raise ParsimError(
                "these are two different plans",
                where=f"plan.{key}",
                got=f"{plans[0].get(key)} predicted, {plans[1].get(key)} measured",
            )
    return compare_steps(times[0], parts[0], times[1], parts[1])


def _number(data: Any, key: str, where: str) -> float:
    value = data.get(key) if isinstance(data, Mapping) else None
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not SHORTEST_S < value < LONGEST_S
    ):
        raise ParsimError(
            f"this document has no {key}",
            where=where,
            got=value,
            expected="what `parsim simulate --json` and `parsim run --json` write",
        )
    return float(value)


def _breakdown(data: Mapping[str, Any], where: str) -> dict[str, float]:
    parts = data.get("breakdown_s")
    if not isinstance(parts, Mapping) or not parts:
        raise ParsimError("this document has no breakdown_s", where=where)
    return {
        str(key): float(value)
        for key, value in parts.items()
        if isinstance(value, int | float) and 0 <= value < LONGEST_S
    }
