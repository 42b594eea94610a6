"""How every chart of parsim looks: colours, sizes, header and legend, and how it becomes a file.

The colours are those of `palette`. A file has the same bytes whenever it is drawn from the same data.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch
from matplotlib.transforms import Affine2DBase, ScaledTranslation

from parsim.charts.palette import MUTED_COLOR, TEXT_COLOR
from parsim.config import write_file
from parsim.errors import ParsimError

Color = tuple[float, float, float]

WIDTH_IN = 12.0
DPI = 150
"""Pixels an inch of PNG files, and of the parts of SVG and PDF that are drawn as an image."""
LEFT_IN = 0.86
RIGHT_IN = 0.26
FOOTER_IN = 0.58
TITLE_PT = 13.0
SMALL_PT = 9.0

_RC = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "font.size": SMALL_PT,
    "text.color": TEXT_COLOR,
    "axes.labelcolor": TEXT_COLOR,
    "axes.edgecolor": MUTED_COLOR,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED_COLOR,
    "ytick.color": MUTED_COLOR,
    "xtick.labelcolor": TEXT_COLOR,
    "ytick.labelcolor": TEXT_COLOR,
    "text.parse_math": False,  # a dollar sign in a name is one
    "svg.hashsalt": "parsim",
    "pdf.fonttype": 42,
}
# Dates and versions would make two drawings of one timeline differ.
_METADATA: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


Entry = tuple[str, Sequence[Color]]
"""One line of a legend: its words, and the colours that they stand for."""


@contextmanager
def style() -> Iterator[None]:
    """parsim's look inside, whatever the user's matplotlibrc says; the caller's settings after."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_RC)
        yield


def file_format(path: Path) -> str:
    """png, svg or pdf by the file's suffix; any other is refused before anything is drawn."""
    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in _METADATA:
        raise ParsimError(
            "unknown type of picture",
            where=str(path),
            got=path.suffix or "no suffix",
            expected=", ".join(f".{known}" for known in _METADATA),
        )
    return suffix


def save(figure: Figure, path: Path) -> None:
    """Write a figure to a file of the type that its suffix names."""
    kind = file_format(path)
    content = io.BytesIO()
    with style():
        figure.savefig(content, format=kind, dpi=DPI, metadata=_METADATA[kind])
    write_file(path, content.getvalue())


def lighter(color: str, share: float) -> Color:
    """A colour mixed with `share` of white.

    >>> lighter("#000000", 0.5)
    (0.5, 0.5, 0.5)
    """
    r, g, b = (value + (1.0 - value) * share for value in to_rgb(color))
    return r, g, b


def text_color_on(color: Sequence[float]) -> str:
    """Black or white, whichever reads better on a colour (relative luminance of WCAG 2.1).

    >>> text_color_on((1.0, 1.0, 1.0)), text_color_on((0.0, 0.0, 0.4))
    ('black', 'white')
    """
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in color]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > 0.179 else "white"


def time_unit(longest_s: float) -> tuple[str, float]:
    """The unit of a time axis and its length in seconds.

    >>> time_unit(2.5), time_unit(0.35)
    (('s', 1.0), ('ms', 0.001))
    """
    for unit, size_s in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if longest_s >= size_s:
            return unit, size_s
    return "ns", 1e-9


def counted(number: int, noun: str, ending: str = "s") -> str:
    """A number with its noun.

    >>> counted(1, "rank"), counted(4, "rank"), counted(8, "batch", "es")
    ('1 rank', '4 ranks', '8 batches')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{ending}"


def new_figure(width_in: float = WIDTH_IN) -> Figure:
    """An empty figure; its height is set once everything on it is known (see `grow`)."""
    figure = Figure(figsize=(width_in, 1.0), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def header(
    figure: Figure, finding: str, note: str, entries: Sequence[Entry] = (), *, name: str = ""
) -> float:
    """Title, subtitle and legend at the top left of a figure; returns the inches they take.

    The title is "name: finding", or the finding alone, with the name below, where that is too long for
    a line. Everything is wrapped to the figure's width, so that nothing is ever clipped.
    """
    width_in = figure.get_figwidth() - 0.4
    title, details = f"{name}: {finding}" if name else finding, [note]
    if name and len(wrapped(figure, title, TITLE_PT, "bold", width_in)) > 1:
        title, details = finding[:1].upper() + finding[1:], [name, note]
    # Inches from the top left corner, which stays where it is when the figure grows downward.
    top_left = ScaledTranslation(0, 1, cast(Affine2DBase, figure.transFigure))
    from_top = figure.dpi_scale_trans + top_left
    used_in = 0.18
    for text, size_pt, weight, color in (
        (title, TITLE_PT, "bold", TEXT_COLOR),
        *((detail, SMALL_PT + 0.5, "normal", MUTED_COLOR) for detail in details),
    ):
        for line in wrapped(figure, text, size_pt, weight, width_in):
            figure.text(
                0.2,
                -used_in,
                line,
                transform=from_top,
                va="top",
                size=size_pt,
                weight=weight,
                color=color,
            )
            used_in += size_pt * 1.45 / 72
    if entries:
        used_in += 0.08
        used_in += _place_legend(figure, entries, width_in, (0.2, -used_in), from_top)
    return used_in + 0.12


def wrapped(figure: Figure, text: str, size_pt: float, weight: str, width_in: float) -> list[str]:
    """Lines of a text, none wider than `width_in`."""
    probe = figure.text(0, 0, "", size=size_pt, weight=weight)

    def line_width_in(line: str) -> float:
        probe.set_text(line)
        return float(probe.get_window_extent().width) / figure.dpi

    limit = max(len(text), 1)
    lines = [text]
    while text and limit > 20 and max(map(line_width_in, lines)) > width_in:
        limit -= 4
        lines = textwrap.wrap(text, limit)
    probe.remove()
    return lines if text else []


def _place_legend(
    figure: Figure, entries: Sequence[Entry], width_in: float, at: tuple[float, float], transform: Any
) -> float:
    """A legend of as many columns as fit; returns its height in inches."""
    # A tuple of patches is one legend handle; matplotlib's type hints do not know it.
    patches: list[Any] = [tuple(_patch(color) for color in colors) for _, colors in entries]
    for columns in range(len(entries), 0, -1):
        legend = figure.legend(
            patches,
            [label for label, _ in entries],
            handler_map={tuple: HandlerTuple(ndivide=None, pad=0.0)},
            loc="upper left",
            bbox_to_anchor=at,
            bbox_transform=transform,
            ncols=columns,
            frameon=False,
            borderaxespad=0.0,
            borderpad=0.0,
            columnspacing=1.4,
            handlelength=1.1,
            handleheight=0.9,
            handletextpad=0.5,
        )
        box = legend.get_window_extent()
        if box.width / figure.dpi <= width_in or columns == 1:
            break
        legend.remove()
    return float(box.height) / figure.dpi


def _patch(color: Color) -> Patch:
    pale = min(color) > 0.85
    return Patch(facecolor=color, edgecolor="#C0C0C0" if pale else color, linewidth=0.6)


def grow(
    figure: Figure,
    header_in: float,
    panels_in: Sequence[float],
    gap_in: float,
    *,
    left_in: float = LEFT_IN,
) -> list[Axes]:
    """Set the figure's height and add one axes a panel, from the top down, sharing the time axis."""
    width_in = figure.get_figwidth()
    height_in = header_in + sum(panels_in) + gap_in * (len(panels_in) - 1) + FOOTER_IN
    figure.set_size_inches(width_in, height_in)
    axes: list[Axes] = []
    top_in = height_in - header_in
    for panel_in in panels_in:
        place = (
            left_in / width_in,
            (top_in - panel_in) / height_in,
            (width_in - left_in - RIGHT_IN) / width_in,
            panel_in / height_in,
        )
        axes.append(figure.add_axes(place, sharex=axes[0] if axes else None))
        top_in -= panel_in + gap_in
    return axes
