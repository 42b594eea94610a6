"""Scaling curves: what becomes of each GPU's work as GPUs are added, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parsim.plan import recompute_text
from parsim.simulate.prediction import Prediction

TERMS = {
    "compute": "compute",
    "tp_exposed": "exposed tensor-parallel communication",
    "cp_exposed": "exposed context-parallel communication",
    "ep_exposed": "exposed expert-parallel communication",
    "pp_exposed": "exposed pipeline transfers",
    "dp_exposed": "exposed data-parallel communication",
    "optimizer": "the optimizer",
    "overhead": "host overhead",
    "bubble": "the pipeline's bubble and waiting",
}
"""Terms of the breakdown in words."""
FELL = 0.005
"""Efficiency that is lost between two points and worth a reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingPoint:
    """One number of GPUs on a scaling curve."""

    prediction: Prediction
    efficiency: float
    """Tokens a second and GPU over those of the first point."""
    grew: str | None
    """The term of the breakdown that costs most more a token than at the point before; None at the first
    point, and where efficiency did not fall."""
    grew_by: float
    """How much more, as a share of the GPU time that a token takes at the first point."""

    switched: str
    """What the plan had to switch to since the point before where it recomputes more, in words."""

    @property
    def tokens_per_s(self) -> float:
        return self.prediction.job.tokens / self.prediction.step_time_s

    @property
    def reason(self) -> str:
        """Why efficiency fell since the point before; empty where it did not."""
        if self.grew is None:
            return ""
        text = f"{TERMS[self.grew]} +{100 * self.grew_by:.1f}% of the first point's GPU time"
        return text + (f" ({self.switched})" if self.switched else "")


def scaling_curve(predictions: Sequence[Prediction]) -> tuple[ScalingPoint, ...]:
    """The best plans of one model on several numbers of GPUs as a curve, fewest GPUs first.

    Strong scaling where the batch is the same in all of them, weak where it grows with the GPUs.
    Efficiency falls by exactly what the terms of the breakdown grow, counted in GPU time a token.
    """
    ordered = sorted(predictions, key=lambda p: p.plan.gpus)
    if not ordered:
        return ()
    first_s = sum(gpu_seconds_per_token(ordered[0]).values())
    points: list[ScalingPoint] = []
    for prediction in ordered:
        terms = gpu_seconds_per_token(prediction)
        efficiency = first_s / sum(terms.values())
        grew, by, switched = None, 0.0, ""
        if points and points[-1].efficiency - efficiency > FELL:
            before = gpu_seconds_per_token(points[-1].prediction)
            more = {key: seconds - before.get(key, 0.0) for key, seconds in terms.items()}
            grew = max(more, key=lambda key: more[key])
            by = more[grew] / first_s
            switched = _recompute_switch(points[-1].prediction, prediction) if grew == "compute" else ""
        points.append(
            ScalingPoint(
                prediction=prediction,
                efficiency=efficiency,
                grew=grew,
                grew_by=by,
                switched=switched,
            )
        )
    return tuple(points)


def gpu_seconds_per_token(prediction: Prediction) -> dict[str, float]:
    """GPU time that a token takes, by the terms of the breakdown."""
    share = prediction.plan.gpus / prediction.job.tokens
    return {key: seconds * share for key, seconds in prediction.breakdown_s.items()}


def _recompute_switch(before: Prediction, after: Prediction) -> str:
    """Why compute may have grown: activations that are recomputed now and were not."""
    old, new = (recompute_text(p.job.model, p.plan) for p in (before, after))
    return "" if old == new else f"recompute {new} instead of {old}"
