"""MEASUREMENT.json: what `parsim run` found, with what was predicted for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from parsim.execute.measurement import Measurement
from parsim.plan import STAGE_LISTS
from parsim.timeline import breakdown_s


def staleness_data(ages: Mapping[int, int]) -> dict[str, Any]:
    """How old gradients were, as `simulate --ps` has it.

    >>> staleness_data({0: 1, 2: 3})
    {'mean': 1.5, 'max': 2, 'histogram': {'0': 1, '2': 3}}
    """
    total = sum(ages.values())
    return {
        "mean": sum(age * count for age, count in ages.items()) / total if total else 0.0,
        "max": max(ages, default=0),
        "histogram": {str(age): ages[age] for age in sorted(ages)},
    }


def measurement_data(
    measurement: Measurement,
    *,
    predicted_s: float | None,
    predicted_gradient_bytes: Sequence[float] = (),
) -> dict[str, Any]:
    """The answer of `run --json`; `predicted_gradient_bytes`: what each rank sends, where compressed."""
    plan = asdict(measurement.plan)
    job = asdict(measurement.job)
    data = {
        "model": {k: v for k, v in job.pop("model").items() if v is not None},
        "job": job,
        "plan": plan | {key: list(plan[key]) for key in STAGE_LISTS},
        "world_size": measurement.world_size,
        "step_time_s": measurement.step_time_s,
        "steps_s": list(measurement.steps_s),
        "disturbed": list(measurement.disturbed),
        "spread": measurement.spread,
        "warmup": measurement.warmup,
        "loss": list(measurement.loss),
        "predicted_s": predicted_s,
        "error": None if predicted_s is None else predicted_s / measurement.step_time_s - 1,
        "breakdown_s": breakdown_s(measurement.timeline),
        "peak_memory_bytes": list(measurement.peak_memory_bytes),
        "device": measurement.device,
        "dtype": measurement.dtype,
        "machine": measurement.machine,
        "torch": measurement.torch_version,
        "resumed_at": measurement.resumed_at,
        "restarts": list(measurement.failures),
    }
    if measurement.gradient_sent_bytes:
        data["gradient_sent_bytes"] = list(measurement.gradient_sent_bytes)
        data["predicted_gradient_sent_bytes"] = list(predicted_gradient_bytes)
    if measurement.loss_scale:
        data["loss_scale"] = dict(measurement.loss_scale)
    if measurement.weight_versions:
        data["weight_versions"] = list(measurement.weight_versions)
    if measurement.staleness:
        data["staleness"] = [staleness_data(ages) for ages in measurement.staleness]
    return data
