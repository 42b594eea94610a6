"""Tokens a second and GPU over the number of GPUs: a panel for each model, a line for each hardware."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from parsim.charts.palette import SERIES_COLORS
from parsim.charts.style import (
    SMALL_PT,
    Entry,
    file_format,
    grow,
    header,
    lighter,
    new_figure,
    save,
    style,
)
from parsim.search.sweep import Point
from parsim.units import percent

_WIDTH_IN = 9.0
_PANEL_IN = 2.7
_GAP_IN = 0.75
_PANELS = 12
"""Models of a chart; more would be a poster."""
_LINES = ("-", "--", ":")
"""For series beyond the colours."""
_LABEL = 0.065
"""Least distance of two labels, as a share of a panel's height."""

Curves = dict[str, list[Point]]
"""By series, fewest GPUs first."""


def draw_sweep(points: Sequence[Point], path: Path) -> None:
    """Write the points of a sweep (one at least) to a .png, .svg or .pdf file.

    Raises ParsimError for another suffix.
    """
    file_format(path)
    save(sweep_figure(points), path)


def sweep_figure(points: Sequence[Point]) -> Figure:
    """The points as a figure; of several with the same model, series and GPUs the fastest counts."""
    by_model = {model: _curves(points, model) for model in dict.fromkeys(p.model for p in points)}
    names = list(dict.fromkeys(point.series for point in points))
    looks = {
        name: (SERIES_COLORS[i % len(SERIES_COLORS)], _LINES[i // len(SERIES_COLORS) % len(_LINES)])
        for i, name in enumerate(names)
    }
    entries: list[Entry] = [(name, [lighter(color, 0.0)]) for name, (color, _) in looks.items()]
    drawn = list(by_model)[:_PANELS]
    note = "the best plan of every scenario, by the cost model; beside the ends of a line: MFU"
    if len(drawn) < len(by_model):
        note += f"; the first {len(drawn)} of {len(by_model)} models"
    with style():
        figure = new_figure(_WIDTH_IN)
        header_in = header(figure, _finding(by_model), note, entries)
        panels = grow(figure, header_in + 0.2, [_PANEL_IN] * len(drawn), _GAP_IN)
        for axes, model in zip(panels, drawn, strict=True):
            _draw_panel(axes, by_model[model], looks)
            axes.set_title(model, loc="left", size=SMALL_PT + 1)
    return figure


def _curves(points: Sequence[Point], model: str) -> Curves:
    best: dict[tuple[str, int], Point] = {}
    for point in points:
        key = point.series, point.gpus
        if point.model == model and (
            key not in best or point.tokens_per_s_per_gpu > best[key].tokens_per_s_per_gpu
        ):
            best[key] = point
    curves: Curves = {}
    for key in sorted(best, key=lambda key: key[1]):
        curves.setdefault(key[0], []).append(best[key])
    return curves


def _finding(by_model: Mapping[str, Curves]) -> str:
    """The curve that keeps least of its start; where there is one size only, the widest gap."""
    curves = [(model, curve) for model, own in by_model.items() for curve in own.values()]
    longer = [(model, curve) for model, curve in curves if len(curve) > 1]
    if longer:
        model, curve = min(longer, key=lambda pair: _kept(pair[1]))
        return (
            f"{model} on {curve[0].series}: {curve[-1].gpus:,} GPUs keep {percent(_kept(curve))} of the "
            f"tokens/s/GPU of {curve[0].gpus:,}, MFU {percent(curve[0].mfu)} → {percent(curve[-1].mfu)}"
            + (", the most that any curve loses" if len(longer) > 1 else "")
        )
    model, own = max(by_model.items(), key=lambda pair: _gap(pair[1]))
    low, *_, high = sorted(
        (curve[0] for curve in (*own.values(), *own.values())), key=lambda p: p.tokens_per_s_per_gpu
    )
    if low is high:
        return f"{model} on {high.gpus:,} × {high.series}: MFU {percent(high.mfu)}"
    times = high.tokens_per_s_per_gpu / low.tokens_per_s_per_gpu
    return f"{model}: a GPU of {high.series} trains {times:.1f} × what one of {low.series} does"


def _kept(curve: Sequence[Point]) -> float:
    return curve[-1].tokens_per_s_per_gpu / curve[0].tokens_per_s_per_gpu


def _gap(curves: Curves) -> float:
    speeds = [curve[0].tokens_per_s_per_gpu for curve in curves.values()]
    return max(speeds) / min(speeds)


def _draw_panel(axes: Axes, curves: Curves, looks: Mapping[str, tuple[str, str]]) -> None:
    counts = sorted({point.gpus for curve in curves.values() for point in curve})
    axes.set_xscale("log", base=2)
    for place, (name, curve) in enumerate(curves.items()):
        color, line = looks[name]
        axes.plot(
            [point.gpus for point in curve],
            [point.tokens_per_s_per_gpu for point in curve],
            color=color,
            linestyle=line,
            marker="o",
            # Later curves are narrower: of two that coincide both are seen.
            markersize=max(3.0, 7.0 - 1.5 * place),
            linewidth=max(0.8, 2.4 - 0.6 * place),
        )
    # With room above for the labels of curves that all end in one place.
    room = 1.05 / max(0.4, 1 - _LABEL * len(curves))
    axes.set_ylim(bottom=0, top=room * max(axes.dataLim.y1, 1e-9))
    longer = {name: curve for name, curve in curves.items() if len(curve) > 1}
    _label(axes, {name: curve[0] for name, curve in longer.items()}, looks, left=True)
    _label(axes, {name: curve[-1] for name, curve in curves.items()}, looks, left=False)
    axes.set_xlim(counts[0] / 1.35, counts[-1] * 1.35)
    axes.grid(color="#EDEDED", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("GPUs (log scale)")
    axes.set_ylabel("tokens/s/GPU")
    axes.xaxis.set_major_locator(FixedLocator(counts[:: max(1, len(counts) // 10)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _label(
    axes: Axes, ends: Mapping[str, Point], looks: Mapping[str, tuple[str, str]], *, left: bool
) -> None:
    """MFU beside the ends of curves; where those are close, one label above the other."""
    gap = _LABEL * axes.get_ylim()[1]
    lowest: dict[int, float] = {}
    for name, point in sorted(ends.items(), key=lambda end: end[1].tokens_per_s_per_gpu):
        y = max(point.tokens_per_s_per_gpu, lowest.get(point.gpus, 0.0))
        lowest[point.gpus] = y + gap
        axes.annotate(
            percent(point.mfu),
            (point.gpus, y),
            xytext=(-7 if left else 7, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            size=SMALL_PT - 1,
            color=looks[name][0],
        )
