"""Time against cost of a training on clusters of any size, with the frontier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from parsim.charts.palette import MUTED_COLOR, SERIES_COLORS, TEXT_COLOR
from parsim.charts.style import (
    SMALL_PT,
    Entry,
    counted,
    file_format,
    grow,
    header,
    lighter,
    new_figure,
    save,
    style,
)
from parsim.search.capacity import Limits, Option, answers, front, recommended
from parsim.search.pareto import pareto_front
from parsim.units import format_count, format_duration, format_usd

_WIDTH_IN = 9.0
_PANEL_IN = 4.2
_DAY_S = 86400.0
_FAINT = 0.62
_LABELS = 24
"""Points of a panel that are labelled: those on the frontier first."""


def draw_pareto(options: Sequence[Option], limits: Limits, path: Path) -> None:
    """Write time against cost of some options to a .png, .svg or .pdf file, a panel for each model.

    Raises ParsimError for another suffix.
    """
    file_format(path)
    save(pareto_figure(options, limits), path)


def pareto_figure(options: Sequence[Option], limits: Limits) -> Figure:
    """Time against cost as a figure; GPU-hours stand for the cost where a price is unknown."""
    done = [option for option in options if math.isfinite(option.wall_s)]
    by_dollars = bool(done) and all(option.usd is not None for option in done)
    models = list(dict.fromkeys(option.case.job.model.name for option in done))
    hardware = list(dict.fromkeys(option.case.hardware for option in done))
    colors = {name: SERIES_COLORS[i % len(SERIES_COLORS)] for i, name in enumerate(hardware)}
    entries: list[Entry] = [(name, [lighter(color, 0.0)]) for name, color in colors.items()]
    with style():
        figure = new_figure(_WIDTH_IN)
        name, finding = _finding([o for o in done if o.case.job.model.name == models[0]], limits)
        note = (
            f"{counted(len(done), 'option')}, each with its best plan; filled: none other is better in "
            "time, cost, GPUs and free memory; line: the frontier of time and cost; "
            "slanted bars: 90% intervals; circled: what the title names"
        )
        header_in = header(figure, finding, note, entries, name=name)
        panels = grow(figure, header_in, [_PANEL_IN] * len(models), 0.75)
        for axes, model in zip(panels, models, strict=True):
            own = [option for option in done if option.case.job.model.name == model]
            _draw_panel(axes, own, colors, limits, by_dollars)
            if len(models) > 1:
                axes.set_title(
                    f"{model}, {format_count(own[0].case.tokens)} tokens", loc="left", size=10
                )
    return figure


def _finding(options: Sequence[Option], limits: Limits) -> tuple[str, str]:
    """What is trained, and which cluster the chart speaks for."""
    name = _training(options[0])
    answer = recommended(answers(options, limits), limits)
    if answer is None:
        return name, "no cluster keeps to the limits"
    option = answer.choice
    cost = "" if option.usd is None else f" for {format_usd(option.usd)}"
    return name, (
        f"{option.case.gpus:,} × {option.case.hardware} train it in "
        f"{format_duration(option.wall_s)}{cost}"
    )


def _training(option: Option) -> str:
    return f"{option.case.job.model.name}, {format_count(option.case.tokens)} tokens"


def _cost(option: Option, by_dollars: bool) -> float:
    return option.usd or 0.0 if by_dollars else option.gpu_hours


def _draw_panel(
    axes: Axes, options: Sequence[Option], colors: dict[str, str], limits: Limits, by_dollars: bool
) -> None:
    best = front(options)
    places = [(option.wall_s / _DAY_S, _cost(option, by_dollars)) for option in options]
    line = sorted(places[i] for i in pareto_front(places))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.step(
        [days for days, _ in line],
        [cost for _, cost in line],
        where="post",
        color=MUTED_COLOR,
        linewidth=1.1,
        zorder=1,
    )
    for number, (option, (days, cost)) in enumerate(zip(options, places, strict=True)):
        color, kept = colors[option.case.hardware], number in best
        faint = lighter(color, 0.0 if kept else _FAINT)
        axes.plot(
            [days / option.spread, days * option.spread],
            [cost / option.spread, cost * option.spread],
            color=lighter(color, _FAINT),
            linewidth=0.8,
            zorder=2,
        )
        axes.plot(
            days,
            cost,
            "o",
            color=faint if kept else "white",
            markeredgecolor=faint,
            markersize=6.5,
            zorder=3,
        )
    answer = recommended(answers(options, limits), limits)
    if answer is not None:
        place = places[next(i for i, option in enumerate(options) if option is answer.choice)]
        axes.plot(*place, "o", color="none", markeredgecolor=TEXT_COLOR, markersize=13, zorder=4)
    labelled = sorted(range(len(options)), key=lambda i: (i not in best, i))[:_LABELS]
    for i in labelled:
        axes.annotate(
            f"{options[i].case.gpus:,}",
            places[i],
            xytext=(5, 4),
            textcoords="offset points",
            size=SMALL_PT - 1,
            color=MUTED_COLOR,
        )
    _draw_limits(axes, limits, by_dollars)
    _set_axes(axes, by_dollars)


def _draw_limits(axes: Axes, limits: Limits, by_dollars: bool) -> None:
    """The deadline from the left, the budget from below."""
    color = TEXT_COLOR
    if limits.deadline_s is not None:
        axes.axvline(limits.deadline_s / _DAY_S, color=color, linewidth=1.0, linestyle="--")
        axes.annotate(
            "deadline",
            (limits.deadline_s / _DAY_S, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(-4, -3),
            textcoords="offset points",
            ha="right",
            va="top",
            size=SMALL_PT,
            color=color,
        )
    if limits.budget_usd is not None and by_dollars:
        axes.axhline(limits.budget_usd, color=color, linewidth=1.0, linestyle="--")
        axes.annotate(
            "budget",
            (0.0, limits.budget_usd),
            xycoords=("axes fraction", "data"),
            xytext=(4, -3),
            textcoords="offset points",
            va="top",
            size=SMALL_PT,
            color=color,
        )


def _set_axes(axes: Axes, by_dollars: bool) -> None:
    axes.grid(color="#EDEDED", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("days to train, failures included (log scale)")
    axes.set_ylabel("cost, USD (log scale)" if by_dollars else "GPU-hours (log scale)")
    for axis, text in (
        (axes.xaxis, lambda value, _: f"{value:g}"),
        (axes.yaxis, lambda value, _: format_usd(value) if by_dollars else format_count(value)),
    ):
        axis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0), numticks=30))
        axis.set_major_formatter(FuncFormatter(text))
        axis.set_minor_formatter(NullFormatter())
