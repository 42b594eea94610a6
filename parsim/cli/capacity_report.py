"""What `parsim capacity` answers: table, JSON and CSV of the same rows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from parsim.cli.output import print_lines, print_table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from parsim.cli.capacity_run import Found
    from parsim.search.capacity import Answer, Case, Limits, Option
    from parsim.search.scaling import ScalingPoint
    from parsim.search.sensitivity import Sensitivity


def row_data(option: Option, limits: Limits, pue: float | None) -> dict[str, Any]:
    """What a row says beyond the plan's ITEM; unknown or infinite figures are null."""
    from parsim.search.capacity import probability_within

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


def report_data(
    found: Found,
    limits: Limits,
    pue: float | None,
    origins: Mapping[str, dict[str, Any]],
    assumed: Callable[[Option], tuple[str, ...]],
) -> dict[str, Any]:
    """The answer of `capacity --json`; each of its rows is a plan file."""
    from parsim.search.capacity import front

    options = found.options
    best = front(options)
    rows = [
        option.prediction.to_item()
        | origins[option.case.hardware]
        | row_data(option, limits, pue)
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
            for model, found_answers in answers_by_model(options, limits).items()
        },
        "scaling": {
            "strong": {key: [_point_data(p) for p in points] for key, points in found.strong.items()},
            "weak": {key: [_point_data(p) for p in points] for key, points in found.weak.items()},
        },
        "sensitivity": {
            name: [_sensitivity_data(effect) for effect in effects]
            for name, effects in found.sensitivity.items()
        },
        "assumed": list(assumed(options[0])) if options else [],
    }


def answers_by_model(options: Sequence[Option], limits: Limits) -> dict[str, tuple[Answer, ...]]:
    """Answers of every model, the recommended one first; none where nothing is within the limits."""
    from parsim.search.capacity import answers, recommended

    found = {}
    for model in dict.fromkeys(option.case.job.model.name for option in options):
        own = answers([o for o in options if o.case.job.model.name == model], limits)
        first = recommended(own, limits)
        found[model] = tuple(sorted(own, key=lambda answer: answer is not first))
    return found


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


def write_csv(found: Found, limits: Limits, pue: float | None, path: Path) -> None:
    """All rows as a table, the refused ones with their reason."""
    import csv
    import io

    from parsim.config import write_file

    rows: list[dict[str, Any]] = []
    for option in found.options:
        data = row_data(option, limits, pue)
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
    write_file(path, text.getvalue().encode())


def _key_columns(case: Case) -> dict[str, Any]:
    return {
        "model": case.job.model.name,
        "hardware": case.hardware,
        "gpus": case.gpus,
        "global_batch": case.job.global_batch,
    }


def print_report(
    found: Found,
    limits: Limits,
    pue: float | None,
    assumed: Callable[[Option], tuple[str, ...]],
) -> None:
    """A table for each model, what binds, the answers, curves and sensitivities."""
    cases = [option.case for option in found.options] + [no.case for no in found.refused]
    for model in dict.fromkeys(case.job.model.name for case in cases):
        own = [option for option in found.options if option.case.job.model.name == model]
        case = next(case for case in cases if case.job.model.name == model)
        if own:
            _print_table(own, limits, pue)
        else:
            print_lines([f"{model}: no plan on any of these clusters"])
        print_lines(
            [
                *(f"  {no.case.gpus:,} × {no.case.hardware}: {no.why}"
                  for no in found.refused if no.case.job.model.name == model),
                *_binding_lines(own),
                *_answer_lines(own, limits),
                f"global batch {case.job.global_batch:,} sequences of {case.job.seq_len:,} tokens",
            ]
        )  # fmt: skip
    for name, effects in found.sensitivity.items():
        print_lines(_sensitivity_lines(name, effects))
    for kind, curves in (("strong", found.strong), ("weak", found.weak)):
        for key, points in curves.items():
            print_lines(_curve_lines(kind, key, points))
    print_lines(_note_lines(found.options, assumed))


def _print_table(options: Sequence[Option], limits: Limits, pue: float | None) -> None:
    from parsim.search.capacity import front, probability_within
    from parsim.units import format_count, format_duration, format_usd

    best = front(options)
    rows = []
    for number, option in enumerate(options):
        prediction = option.prediction
        row = [
            option.case.hardware, f"{option.case.gpus:,}", prediction.plan.short(),
            format_duration(prediction.step_time_s), f"{prediction.mfu:.1%}", f"{option.goodput:.1%}",
            _days(option), format_count(option.gpu_hours),
            "?" if option.usd is None else format_usd(option.usd),
            _mwh(option.energy.kwh), f"{option.headroom:.0%}",
        ]  # fmt: skip
        if pue is not None:
            row.insert(-1, _mwh(option.energy.facility_kwh(pue)))
        for value, limit in ((option.wall_s, limits.deadline_s), (option.usd, limits.budget_usd)):
            if limit is not None:
                probability = probability_within(option, value, limit)
                row.append("?" if probability is None else f"{probability:.0%}")
        rows.append([*row, "*" if number in best else ""])
    headers = ["hardware", "GPUs", "plan", "step", "MFU", "goodput", "days", "GPU-hours", "USD", "MWh"]
    headers += ["facility MWh"] * (pue is not None) + ["free memory"]
    headers += ["in time"] * (limits.deadline_s is not None)
    headers += ["in budget"] * (limits.budget_usd is not None)
    case = options[0].case
    title = f"{case.job.model.name}, {format_count(case.tokens)} tokens"
    print_table([*headers, "Pareto"], rows, title=title)


def _days(option: Option) -> str:
    if not math.isfinite(option.wall_s):
        return "never"
    days = option.wall_s / 86400
    form = ".0f" if days >= 100 else ".1f" if days >= 1 else ".2g"
    return f"{days:{form}} ({days / option.spread:{form}}–{days * option.spread:{form}})"


def _mwh(kwh: float) -> str:
    return f"{kwh / 1000:,.0f}" if kwh >= 100_000 else f"{kwh / 1000:.3g}"


def _binding_lines(options: Sequence[Option]) -> list[str]:
    lines = [f"  {o.case.gpus:,} × {o.case.hardware}: {o.binds}" for o in options]
    return ["what binds:", *lines] if lines else []


def _answer_lines(options: Sequence[Option], limits: Limits) -> list[str]:
    from parsim.search.capacity import Limits
    from parsim.units import format_duration, format_usd

    if not options:
        return []
    within = []
    if limits.deadline_s is not None:
        within.append(f"within {format_duration(limits.deadline_s)}")
    if limits.budget_usd is not None:
        within.append(f"for at most {format_usd(limits.budget_usd)}")
    condition = " " + " and ".join(within) if within else ""
    (found,) = answers_by_model(options, limits).values()
    if not found:
        unlimited = answers_by_model(options, Limits()).values()
        nearest = (a for some in unlimited for a in some if a.objective != "smallest")
        lines = [f"{a.objective} of all: {_result(a.choice)}" for a in nearest]
        return [f"no cluster trains it{condition}", *lines]
    return [
        f"{a.objective}{condition}: {_result(a.choice)}; {a.reason}{_tight(a.choice)}" for a in found
    ]


def _result(option: Option) -> str:
    """What an option comes to."""
    from parsim.units import format_usd

    cost = "" if option.usd is None else f", {format_usd(option.usd)}"
    return f"{option.case.gpus:,} × {option.case.hardware}, {_days(option)} days{cost}"


def _tight(option: Option) -> str:
    """A warning where a small error of the predicted memory would be too much."""
    from parsim.cost.memory import ENOUGH_HEADROOM

    if option.headroom >= ENOUGH_HEADROOM:
        return ""
    return f"; BEWARE: only {option.headroom:.0%} of the memory stays free".replace("%", " %")


def _sensitivity_lines(name: str, effects: Sequence[Sensitivity]) -> list[str]:
    from parsim.search.sensitivity import RESOURCES

    lines = [f"speed of {name} with other hardware, the best plan searched for anew:"]
    for effect in effects:
        gain = "nothing fits" if effect.gain is None else f"{round(effect.gain, 3) + 0.0:+.1%}"
        other = f", by {effect.plan.short()}" if effect.plan and effect.replanned else ""
        lines.append(f"  {effect.change:+.0%} {RESOURCES[effect.resource]:<26}{gain}{other}")
    return lines


def _curve_lines(kind: str, key: str, points: Sequence[ScalingPoint]) -> list[str]:
    batch = points[0].prediction.job.global_batch
    how = f"global batch {batch:,} throughout" if kind == "strong" else "batch in proportion to the GPUs"
    lines = [f"{kind} scaling of {key}, {how}:"]
    for point in points:
        reason = f"  {point.reason}" if point.grew else ""
        lines.append(
            f"  {point.prediction.plan.gpus:>7,} GPUs {point.efficiency:7.1%} "
            f"{point.tokens_per_s / 1e6:8.2f} M tokens/s{reason}"
        )
    return lines


def _note_lines(options: Sequence[Option], assumed: Callable[[Option], tuple[str, ...]]) -> list[str]:
    """Sources and assumptions behind the figures."""
    if not options:
        return []
    prices = {_price_line(option) for option in options}
    gpu_mtbf_h = options[0].failures.mtbf_s * options[0].case.gpus / 3600
    unproven = sum(not option.proven for option in options)
    return [
        "Pareto: no other is better in time, cost, GPUs and free memory; intervals are 90 %",
        f"failures: every {gpu_mtbf_h:,.0f} h of a GPU; assumed: {'; '.join(assumed(options[0]))}",
        "energy: of the GPUs alone, at half the board power limit while they do not compute",
        *sorted(prices),
        *([f"{unproven} plans are not proven best: more time with --budget-s"] if unproven else []),
    ]


def _price_line(option: Option) -> str:
    price, hardware = option.price, option.case.hardware
    if price is None:
        return f"{hardware}: no price in the profile, so no cost (--usd-per-gpu-hour)"
    source = f"{price.source}, {price.date}" if price.date else price.source
    return f"{hardware}: {price.usd_per_gpu_hour:.2f} USD a GPU-hour ({source})"
