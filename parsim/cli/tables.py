"""Tables on stdout: names left, figures right, and no word broken where the terminal is narrow."""

from __future__ import annotations

import sys
from collections.abc import Sequence

GAP = 2
"""Spaces between columns."""
LEAST_TEXT = 24
"""Columns of the terminal in which sentences can still be read."""


def print_table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", keys: int = 1
) -> None:
    """A table; where it is wider than the terminal its columns go on below, beside the first `keys`.

    Into a pipe it goes as wide as it is, one line a row.
    """
    from rich.console import Console

    widths = [max(map(_width, cells)) for cells in zip(headers, *rows, strict=True)]
    wide = None if sys.stdout.isatty() else sum(widths) + GAP * len(widths)
    console = Console(width=wide, highlight=False, markup=False)
    if title:
        console.print(title, style="bold", soft_wrap=True)
        console.print()
    for columns in split_columns(widths, console.width, keys=keys):
        table = _table(headers, rows, columns)
        needed = sum(widths[column] for column in columns) + GAP * len(columns)
        console.print(table, width=min(console.width, needed), crop=False)
        console.print()


def split_columns(widths: Sequence[int], limit: int, *, keys: int = 1) -> list[list[int]]:
    """Columns of each table that is at most `limit` wide, the first `keys` at the head of each.

    A last column of text may be folded to LEAST_TEXT; what is wider than that alone, too.

    >>> split_columns([4, 10, 10, 10], 30)
    [[0, 1, 2], [0, 3]]
    >>> split_columns([4, 10, 90], 50)
    [[0, 1, 2]]
    """
    heads = list(range(min(keys, len(widths))))
    tables, taken = [heads.copy()], sum(widths[:keys]) + GAP * keys
    start = taken
    for column in range(len(heads), len(widths)):
        width = widths[column]
        if column == len(widths) - 1:
            width = min(width, LEAST_TEXT)
        if taken + width > limit and len(tables[-1]) > len(heads):
            tables.append(heads.copy())
            taken = start
        tables[-1].append(column)
        taken += width + GAP
    return tables


def _width(text: str) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, text.split("\n")))


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], columns: Sequence[int]) -> object:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
    for column in columns:
        cells = [row[column] for row in rows]
        numeric = bool(cells) and all(cell[:1].isdigit() or cell[:1] in "-+–$?" for cell in cells)
        table.add_column(
            headers[column],
            justify="right" if numeric else "left",
            overflow="fold",
            no_wrap=column != len(headers) - 1,
        )
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    return table
