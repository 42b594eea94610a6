"""What a report consists of: a Page of chapters, each with its answers and sections.

Everything here is text and numbers that are ready to be shown. Each part of a section names the template
that draws it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from parsim.report.plot import Plot


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One figure of an answer."""

    label: str
    value: str
    note: str = ""
    meter: float | None = None
    """The share of a bar under the value that is filled, 0 to 1."""
    meter_text: str = ""
    """What the bar shows, for those who cannot see it."""
    sentence: bool = False
    """The value is not a figure, but a sentence."""
    warns: bool = False
    """The reader must not miss it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a reader takes away if they read nothing else."""

    headline: str
    plan: str = ""
    """A short form to copy; empty where there is none."""
    facts: tuple[Fact, ...] = ()
    verdict: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A piece of a stacked bar."""

    key: str
    """Names its colour."""
    label: str
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of a table."""

    key: str
    """What filters call it: tp in "tp=8"."""
    title: str
    numeric: bool = False
    wide: bool = False
    """Its texts are long, and wrapped."""
    help: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A cell: what is read, and what it is sorted by."""

    text: str
    value: float | str | None = None
    """None sorts last."""
    shares: tuple[Share, ...] = ()
    """A stacked bar in the text's place, which then describes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of a table."""

    cells: tuple[Cell, ...]
    marked: bool = False
    """The one that the answer is about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table to sort and to filter."""

    template: ClassVar[str] = "table.html.j2"
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    note: str = ""
    plain: bool = False
    """Too short to be worth sorting."""
    folded: bool = False
    """Shown when asked for: the figures behind a picture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A bar of a waterfall; start and end are shares of the whole width."""

    label: str
    value: str
    share: str
    start: float
    end: float
    key: str
    """Names its colour."""
    total: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Waterfall:
    """Parts that add up, each bar starting where the one before ended."""

    template: ClassVar[str] = "waterfall.html.j2"
    caption: str
    bars: tuple[Bar, ...]
    limit: float | None = None
    """A line at this share of the width."""
    limit_text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What ran when, to zoom into; `data` is drawn by the page's script."""

    template: ClassVar[str] = "schedule.html.j2"
    caption: str
    note: str
    data: Mapping[str, Any]
    legend: tuple[tuple[str, str], ...]
    """Colour keys and their words."""
    rows: int
    summary: Table
    """The busy time of each row, for those who cannot see the picture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A plot with the figures behind it."""

    template: ClassVar[str] = "picture.html.j2"
    caption: str
    plot: Plot
    table: Table | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """Sentences, one below the other."""

    template: ClassVar[str] = "lines.html.j2"
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """Text to copy: commands."""

    template: ClassVar[str] = "code.html.j2"
    caption: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """A file that the page carries."""

    template: ClassVar[str] = "download.html.j2"
    name: str
    text: str
    caption: str


Part = Table | Waterfall | Schedule | Picture | Lines | Code | Download


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading with what stands below it."""

    title: str
    parts: tuple[Part, ...]
    finding: str = ""
    """The section in one sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chapter:
    """One command's answer."""

    command: str
    title: str
    answers: tuple[Answer, ...]
    sections: tuple[Section, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A report."""

    title: str
    chapters: tuple[Chapter, ...]
