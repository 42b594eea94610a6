"""Capacity as plain data: JSON documents and CSV of the same rows."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from parsim.search.capacities import Capacity, Wanted
from parsim.search.capacity import Answer, Case, Option, front, probability_within
from parsim.search.scaling import ScalingPoint
from parsim.search.sensitivity import Sensitivity


def row_data(option: Option, wanted: Wanted) -> dict[str, Any]:
    """What a row says beyond the plan's ITEM; unknown or infinite figures are null."""
    limits, pue = wanted.limits, wanted.pue
    low, high = 1 / option.spread, option.spread
    wall_s, usd = option.wall_s, option.usd
    data = {
        "tokens": option.case.tokens,
        "days_ideal": option.ideal_s / 86400,
        "goodput": option.goodput,
        "days": wall_s / 86400,
        "days_interval": [wall_s * low / 86400, wall_s * high / 86400],
        "gpu_hours": option.gpu_hours,
        "usd": usd,
        "usd_interval": None if usd is None else [usd * low, usd * high],
        "usd_per_gpu_hour": option.price and option.price.usd_per_gpu_hour,
        "price_source": option.price and f"{option.price.source} {option.price.date}".strip(),
        "energy_kwh": option.energy.kwh,
        "energy_kwh_bounds": list(option.energy),
        "facility_kwh": None if pue is None else option.energy.facility_kwh(pue),
        "memory_headroom": option.headroom,
        "mtbf_s": option.failures.mtbf_s,
        "checkpoint_interval_s": option.checkpointing.between_s,
        "binds": option.binds,
        "gains_of_10_percent": option.gains,
        "proven": option.proven,
        "meets": limits.met_by(option),
        "deadline_probability": probability_within(option, wall_s, limits.deadline_s),
        "budget_probability": probability_within(option, usd, limits.budget_usd),
    }
    return {key: _finite(value) for key, value in data.items()}


def _finite(value: Any) -> Any:
    """JSON knows no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return value


def capacity_data(found: Capacity) -> dict[str, Any]:
    """The answer of `capacity --json`; each of its rows is a plan file."""
    options = found.options
    best = front(options)
    rows = [
        option.prediction.to_item()
        | dict(option.case.origin)
        | row_data(option, found.wanted)
        | {"pareto": number in best}
        for number, option in enumerate(options)
    ]
    return {
        "partial": found.partial,
        "rows": rows,
        "refused": [
            {
                "model": no.case.job.model.name,
                "hardware": no.case.hardware,
                "gpus": no.case.gpus,
                "global_batch": no.case.job.global_batch,
                "reason": no.why,
            }
            for no in found.refused
        ],
        "answers": {
            model: [_answer_data(answer, options) for answer in found_answers]
            for model, found_answers in found.answers.items()
        },
        "scaling": {
            "strong": {key: [_point_data(p) for p in points] for key, points in found.strong.items()},
            "weak": {key: [_point_data(p) for p in points] for key, points in found.weak.items()},
        },
        "sensitivity": {
            name: [_sensitivity_data(effect) for effect in effects]
            for name, effects in found.sensitivity.items()
        },
        "assumed": list(found.wanted.assumed(options[0])) if options else [],
    }


def _answer_data(answer: Answer, options: Sequence[Option]) -> dict[str, Any]:
    place = {id(option): row for row, option in enumerate(options)}
    return {
        "objective": answer.objective,
        "row": place[id(answer.choice)],
        "best_by_figures": place[id(answer.best)],
        "cannot_be_told_apart": [place[id(option)] for option in answer.tied],
        "reason": answer.reason,
    }


def _point_data(point: ScalingPoint) -> dict[str, Any]:
    return {
        "gpus": point.prediction.plan.gpus,
        "global_batch": point.prediction.job.global_batch,
        "plan": point.prediction.plan.short(),
        "tokens_per_s": point.tokens_per_s,
        "efficiency": point.efficiency,
        "grew": point.grew,
        "grew_by": point.grew_by,
        "reason": point.reason,
    }


def _sensitivity_data(effect: Sensitivity) -> dict[str, Any]:
    return {
        "resource": effect.resource,
        "change": effect.change,
        "gain": effect.gain,
        "plan": effect.plan.short() if effect.plan else None,
        "replanned": effect.replanned,
    }


def capacity_csv(found: Capacity) -> str:
    """All rows as a table, the refused ones with their reason."""
    rows: list[dict[str, Any]] = []
    for option in found.options:
        data = row_data(option, found.wanted)
        for key in ("days", "usd"):
            ends = data.pop(f"{key}_interval") or (None, None)
            data |= {f"{key}_low": ends[0], f"{key}_high": ends[1]}
        for key in ("energy_kwh_bounds", "gains_of_10_percent"):
            data.pop(key)
        prediction = option.prediction
        step = {"step_time_s": prediction.step_time_s, "mfu": prediction.mfu}
        rows.append(_key_columns(option.case) | {"plan": prediction.plan.short()} | step | data)
    rows += [_key_columns(no.case) | {"reason": no.why} for no in found.refused]
    names = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _key_columns(case: Case) -> dict[str, Any]:
    return {
        "model": case.job.model.name,
        "hardware": case.hardware,
        "gpus": case.gpus,
        "global_batch": case.job.global_batch,
    }
