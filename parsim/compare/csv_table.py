"""A CSV file as rows of text, with its header checked before anything is read into it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path

from parsim.config import csv_rows, read_text
from parsim.errors import ParsimError, did_you_mean

Row = dict[str, str]
"""Cells of one row by column; a cell that the row does not have is missing, an empty one is ""."""


def read_csv(path: Path, *, required: Collection[str], optional: Collection[str]) -> list[Row]:
    """The rows of a CSV file (UTF-8, comma), each with the cells it has; columns not asked for stay.

    Raises ParsimError for a file that is not readable, a column given twice, a required column that is
    missing, or an optional one that seems misspelt: its values would be lost without a word.
    """
    lines = [cells for _, cells in csv_rows(read_text(path), where=str(path)) if cells]
    if not lines:
        raise ParsimError("this file is empty", where=str(path), expected="a header and rows")
    header = [name.strip() for name in lines[0]]
    _check_header(header, path, required=required, optional=optional)
    return [
        dict(zip(header, cells, strict=False)) | ({} if len(cells) <= len(header) else {"": "extra"})
        for cells in lines[1:]
    ]


def _check_header(
    header: list[str], path: Path, *, required: Collection[str], optional: Collection[str]
) -> None:
    twice = [name for name, times in Counter(header).items() if times > 1]
    if twice:
        raise ParsimError("a column is given twice", where=str(path), got=twice[0])
    unknown = [name for name in header if name not in required and name not in optional]
    problems = []
    for name in (*required, *optional):
        if name in header:
            continue
        near = did_you_mean(name, unknown)
        if near is not None:
            problems.append(f"column {name!r} is missing, and {near.split()[-1][1:-2]!r} is near it")
        elif name in required:
            problems.append(f"column {name!r} is missing")
    if problems:
        raise ParsimError(
            "; ".join(problems),
            where=f"{path}, line 1",
            got=", ".join(header[:8]) + (" …" if len(header) > 8 else ""),
            expected=f"at least {', '.join(required)}",
        )
