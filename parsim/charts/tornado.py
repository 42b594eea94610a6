"""Tornado chart: what more and less of each resource does to the speed of the best plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from parsim.charts.palette import MUTED_COLOR, SERIES_COLORS
from parsim.charts.style import (
    SMALL_PT,
    file_format,
    grow,
    header,
    lighter,
    new_figure,
    save,
    style,
)
from parsim.search.sensitivity import RESOURCES, Sensitivity

Effects = Mapping[str, Sequence[Sensitivity]]
"""By the option that they are of, such as "llama-3.1-8b on 256 × h100-sxm-80gb"."""

_WIDTH_IN = 9.0
_BAR_IN = 0.42
_LEFT_IN = 2.0
_GAP_IN = 0.9
_LEAST = 0.01
"""Half width of the axis at the least, so that noise does not look like a storm."""


def draw_tornado(effects: Effects, path: Path) -> None:
    """Write sensitivities to a .png, .svg or .pdf file, a panel for each option.

    Raises ParsimError for another suffix.
    """
    file_format(path)
    save(tornado_figure(effects), path)


def tornado_figure(effects: Effects) -> Figure:
    """Sensitivities as a figure, the resource with most effect on top."""
    change = max(abs(effect.change) for own in effects.values() for effect in own)
    note = (
        f"speed with {change:.0%} more (filled) and less (pale) of each, the best plan searched for "
        "anew; an asterisk: another plan is best then"
    )
    with style():
        figure = new_figure(_WIDTH_IN)
        name, own = next(iter(effects.items()))
        header_in = header(figure, _finding(own), note, name=name)
        heights = [_BAR_IN * len({e.resource for e in own}) + 0.1 for own in effects.values()]
        if len(effects) > 1:
            header_in += 0.25
        panels = grow(figure, header_in, heights, _GAP_IN, left_in=_LEFT_IN)
        for axes, (title, own) in zip(panels, effects.items(), strict=True):
            _draw_bars(axes, own)
            if len(effects) > 1:
                axes.set_title(title, loc="left", size=SMALL_PT + 1)
        gains = [abs(e.gain) for own in effects.values() for e in own if e.gain is not None]
        most = max((_LEAST, *gains)) * 1.25
        panels[0].set_xlim(-most, most)
    return figure


def _ranked(effects: Sequence[Sensitivity]) -> list[str]:
    """Resources by their longer bar, longest first; what makes nothing fit is longest."""
    width: dict[str, float] = {}
    for effect in effects:
        size = float("inf") if effect.gain is None else abs(effect.gain)
        width[effect.resource] = max(width.get(effect.resource, 0.0), size)
    return sorted(width, key=lambda resource: -width[resource])


def _finding(effects: Sequence[Sensitivity]) -> str:
    more = [effect for effect in effects if effect.change > 0 and effect.gain is not None]
    best = max(more, key=lambda effect: effect.gain or 0.0)
    return (
        f"{best.change:.0%} more {RESOURCES[best.resource]} would help most, by {best.gain or 0.0:.1%}"
    )


def _draw_bars(axes: Axes, effects: Sequence[Sensitivity]) -> None:
    order = _ranked(effects)
    color = SERIES_COLORS[0]
    for effect in effects:
        place = order.index(effect.resource)
        more = effect.change > 0
        gain = effect.gain if effect.gain is not None else 0.0
        axes.barh(place, gain, height=0.62, color=color if more else lighter(color, 0.55))
        text = "nothing fits" if effect.gain is None else f"{100 * gain:+.1f}%".replace("-0.0", "+0.0")
        axes.annotate(
            text + ("*" if effect.replanned else ""),
            (gain, place),
            xytext=(4 if more else -4, 0),
            textcoords="offset points",
            ha="left" if more else "right",
            va="center",
            size=SMALL_PT - 1,
        )
    axes.axvline(0.0, color=MUTED_COLOR, linewidth=0.8)
    axes.set_yticks(range(len(order)), [RESOURCES[resource] for resource in order])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color="#EDEDED", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("change of speed (tokens a second)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:+.3g}%"))
