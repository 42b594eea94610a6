"""What `parsim capacity` answers, for reading."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from parsim.cli.output import print_lines
from parsim.cli.tables import print_table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from parsim.search.capacities import Capacity
    from parsim.search.capacity import Limits, Option
    from parsim.search.scaling import ScalingPoint
    from parsim.search.sensitivity import Sensitivity


def print_report(found: Capacity) -> None:
    """A table for each model, what binds, the answers, curves and sensitivities."""
    limits = found.wanted.limits
    cases = [option.case for option in found.options] + [no.case for no in found.refused]
    for model in dict.fromkeys(case.job.model.name for case in cases):
        own = [option for option in found.options if option.case.job.model.name == model]
        case = next(case for case in cases if case.job.model.name == model)
        if own:
            _print_table(own, limits, found.wanted.pue)
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
    print_lines(_note_lines(found.options, found.wanted.assumed))


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
    print_table([*headers, "Pareto"], rows, title=title, keys=2)


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
    from parsim.search.capacities import answers_by_model
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
    return f"; BEWARE: only {option.headroom:.0%} of the memory stays free"


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
        "Pareto: no other is better in time, cost, GPUs and free memory; intervals are 90%",
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
