"""The colours of a page: those of the charts, and what becomes of them on a dark ground."""

from __future__ import annotations

from parsim.charts.palette import COLORS, IDLE_COLOR, OTHER_COLOR, SERIES_COLORS

DARK_GROUND = "#171b21"
CONTRAST = 3.0
"""What WCAG 2.2 (1.4.11) asks of graphics against their ground."""
SHADES = (
    *("#440154", "#482475", "#414487", "#355F8D", "#2A788E"),
    *("#21918C", "#22A884", "#44BF70", "#7AD151", "#A5DB36"),
)
"""Ten steps of matplotlib's viridis, for ranks from the first to the last."""


def themes() -> dict[str, dict[str, str]]:
    """Colours by theme and key: kinds of time, s0… for series, r0… for shades."""
    light = COLORS | {"other": OTHER_COLOR, "idle": IDLE_COLOR, "ideal": "#56B4E9", "total": "#3C4450"}
    light |= {f"s{i}": color for i, color in enumerate(SERIES_COLORS)}
    light |= {f"r{i}": color for i, color in enumerate(SHADES)}
    dark = {key: on_dark(color) for key, color in light.items()}
    return {"light": light, "dark": dark | {"idle": "#2C323B", "total": "#C3CAD5"}}


def on_dark(color: str) -> str:
    """A colour mixed with as much white as makes it stand out on a dark ground.

    >>> on_dark("#FFFFFF"), contrast(on_dark("#000000"), DARK_GROUND) >= CONTRAST
    ('#FFFFFF', True)
    """
    for share in range(0, 101, 4):
        mixed = _mixed(color, share / 100)
        if contrast(mixed, DARK_GROUND) >= CONTRAST:
            return mixed
    return "#FFFFFF"


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2.2, "contrast ratio").

    >>> contrast("#FFFFFF", "#000000")
    21.0
    """
    low, high = sorted(map(_luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(color: str) -> float:
    """Relative luminance of an sRGB colour (WCAG 2.2)."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in _rgb(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _rgb(color: str) -> tuple[float, float, float]:
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


def _mixed(color: str, share: float) -> str:
    """A colour with `share` of white."""
    return "#" + "".join(f"{round(255 * (v + (1 - v) * share)):02X}" for v in _rgb(color))
