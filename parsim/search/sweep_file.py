"""The file that a sweep's rows are appended to, one line of JSON each, as they come.

A sweep that was interrupted reads it and goes on. A line is whole when it ends: what a killed process
left of its last line is cut off, and that scenario runs again.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parsim.config import parse_json
from parsim.errors import ParsimError
from parsim.search.sweep import key_of

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A row that is there, without its answer."""

    offset_bytes: int
    made_of: Mapping[str, str]
    status: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What a file of rows holds."""

    lines: dict[str, Line]
    """By the scenario's key; of several the last."""
    end_bytes: int
    """Where the last whole line ends."""
    torn: bool
    """Something follows that is no whole line."""


def read_recorded(path: Path) -> Recorded:
    """What is there of a sweep, line by line; nothing where there is no file.

    Raises ParsimError for a file of something else.
    """
    lines: dict[str, Line] = {}
    end, torn = 0, False
    if path.exists():
        for number, (offset, raw) in enumerate(_raw_lines(path), start=1):
            if not raw.endswith(b"\n"):
                torn = True
                break
            row = _row(raw, f"{path}, line {number}")
            lines[key_of(row["scenario"])] = Line(
                offset_bytes=offset, made_of=row["made_of"], status=row["status"]
            )
            end = offset + len(raw)
    return Recorded(lines=lines, end_bytes=end, torn=torn)


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    offset = 0
    try:
        with path.open("rb") as file:
            for raw in file:
                yield offset, raw
                offset += len(raw)
    except OSError as error:
        raise ParsimError("cannot read this file", where=str(path), got=error.strerror) from None


def _row(raw: bytes, where: str) -> Row:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise ParsimError("this file is not UTF-8 text", where=where, got=str(error)) from None
    row = parse_json(text, where=where)
    kinds = {"scenario": dict, "made_of": dict, "status": str, "plans": list}
    if not isinstance(row, dict) or not all(isinstance(row.get(k), kind) for k, kind in kinds.items()):
        raise ParsimError(
            "this is no row of a sweep",
            where=where,
            expected="a line as `parsim sweep` writes them: scenario, made_of, status, plans",
        )
    return row


@contextmanager
def appending(path: Path, end_bytes: int) -> Iterator[Callable[[Row], None]]:
    """Append rows behind `end_bytes`, each a whole line at once.

    Raises ParsimError where the file cannot be written, or another sweep writes it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab", buffering=0)
    except OSError as error:
        raise _unwritable(path, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ParsimError("another sweep is writing this file", where=str(path)) from None
        file.truncate(end_bytes)

        def append(row: Row) -> None:
            raw = json.dumps(row, allow_nan=False, ensure_ascii=False).encode() + b"\n"
            try:
                while raw:
                    raw = raw[file.write(raw) :]
            except OSError as error:
                raise _unwritable(path, error) from None

        yield append


def _unwritable(path: Path, error: OSError) -> ParsimError:
    return ParsimError("cannot write this file", where=str(path), got=error.strerror)


def rows_at(path: Path, offsets_bytes: Iterable[int]) -> Iterator[Row]:
    """The rows that begin at these places, in this order, one at a time."""
    with path.open("rb") as file:
        for offset in offsets_bytes:
            file.seek(offset)
            yield _row(file.readline(), str(path))
