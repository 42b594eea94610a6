"""A Timeline as JSON and back: one list a column, so that a long step stays small.

    {"source": "simulated", "title": "…",
     "spans": {"rank": [0, …], "stream": {"values": ["compute", "tp"], "index": [0, …]},
               "name": {…}, "kind": {…}, "start_s": [0.0, …], "end_s": […], "stage": […],
               "micro_batch": […]},
     "memory": {"rank": […], "time_s": […], "num_bytes": […]}}

Columns of words hold each word once, in `values`; `index` says which one every row has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from parsim.errors import ParsimError, did_you_mean
from parsim.timeline import STREAMS, MemorySample, Span, Timeline

SOURCES = ("simulated", "measured")
_WORDS = ("stream", "name", "kind")


def timeline_to_data(timeline: Timeline) -> dict[str, Any]:
    """A timeline as plain data for JSON."""
    spans: dict[str, Any] = {}
    for key, column in zip(Span._fields, _columns(timeline.spans, len(Span._fields)), strict=True):
        spans[key] = _indexed(column) if key in _WORDS else column
    memory = _columns(timeline.memory, len(MemorySample._fields))
    return {
        "source": timeline.source,
        "title": timeline.title,
        "spans": spans,
        "memory": dict(zip(MemorySample._fields, memory, strict=True)),
    }


def timeline_from_data(data: object, *, where: str) -> Timeline:
    """A timeline from what `timeline_to_data` gave, read from a file.

    Raises ParsimError, naming the key and the row, for anything that cannot be one.
    """
    table = _Table(data, where, ("source", "title", "spans", "memory"))
    source, title = table.get("source"), table.get("title")
    if source not in SOURCES:
        table.refuse("source", "unknown source of a timeline", source, " or ".join(SOURCES))
    if not isinstance(title, str):
        table.refuse("title", "a title must be text", title)
    spans = _spans(_Table(table.get("spans"), f"{where}: spans", Span._fields))
    memory = _memory(_Table(table.get("memory"), f"{where}: memory", MemorySample._fields))
    return Timeline(spans=spans, memory=memory, source=source, title=title)


def _spans(table: _Table) -> tuple[Span, ...]:
    columns: dict[str, Sequence[Any]] = {
        "rank": table.integers("rank", 0),
        "stream": table.words("stream", STREAMS),
        "name": table.words("name"),
        "start_s": table.numbers("start_s"),
        "end_s": table.numbers("end_s"),
        "kind": table.words("kind"),
        "stage": table.integers("stage", -1),
        "micro_batch": table.integers("micro_batch", -1),
    }
    spans = tuple(map(Span._make, table.rows(columns)))
    for i, span in enumerate(spans):
        if span.end_s < span.start_s:
            expected = f"at least its start, {span.start_s}"
            table.refuse(f"end_s[{i}]", "a span ends before it starts", span.end_s, expected)
    return spans


def _memory(table: _Table) -> tuple[MemorySample, ...]:
    columns: dict[str, Sequence[Any]] = {
        "rank": table.integers("rank", 0),
        "time_s": table.numbers("time_s"),
        "num_bytes": table.numbers("num_bytes"),
    }
    return tuple(map(MemorySample._make, table.rows(columns)))


def _columns(rows: Sequence[tuple[Any, ...]], width: int) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[]] * width


def _indexed(words: Sequence[str]) -> dict[str, list[Any]]:
    place = {word: i for i, word in enumerate(dict.fromkeys(words))}
    return {"values": list(place), "index": [place[word] for word in words]}


class _Table:
    """A table of a file: its keys checked, its columns read one by one."""

    def __init__(self, data: object, where: str, keys: Sequence[str]) -> None:
        self.where = where
        if not isinstance(data, Mapping):
            raise ParsimError("this must be a table", where=where, got=data, expected=", ".join(keys))
        self.data = data
        for key in data:
            if key not in keys:
                self.refuse(str(key), "unknown key", hint=did_you_mean(str(key), keys))
        for key in keys:
            if key not in data:
                self.refuse(key, "this key is missing")

    def refuse(
        self,
        key: str,
        what: str,
        got: object = None,
        expected: str | None = None,
        hint: str | None = None,
    ) -> NoReturn:
        raise ParsimError(what, where=f"{self.where}.{key}", got=got, expected=expected, hint=hint)

    def get(self, key: str) -> Any:
        return self.data[key]

    def column(self, key: str) -> list[Any]:
        column = self.data[key]
        if not isinstance(column, list):
            self.refuse(key, "a column must be a list", column)
        return column

    def integers(self, key: str, least: int, below: int | None = None) -> list[int]:
        """A column of whole numbers from `least`, and less than `below`."""
        column = self.column(key)
        for i, value in enumerate(column):
            right = type(value) is int and value >= least and (below is None or value < below)
            if not right:
                limits = f"{least} or more" if below is None else f"{least} to {below - 1}"
                self.refuse(f"{key}[{i}]", "this must be a whole number", value, limits)
        return column

    def numbers(self, key: str) -> list[float]:
        """A column of finite numbers."""
        column = self.column(key)
        for i, value in enumerate(column):
            if type(value) not in (int, float) or not math.isfinite(value):
                self.refuse(f"{key}[{i}]", "this must be a number", value, "a finite number")
        return column

    def words(self, key: str, known: Sequence[str] | None = None) -> list[str]:
        """A column of words, written as values and an index; all from `known` where that is given."""
        table = _Table(self.data[key], f"{self.where}.{key}", ("values", "index"))
        values = table.column("values")
        for i, value in enumerate(values):
            if not isinstance(value, str):
                table.refuse(f"values[{i}]", "this must be a word", value)
            if known is not None and value not in known:
                table.refuse(f"values[{i}]", f"unknown {key}", value, ", ".join(known))
        return [values[i] for i in table.integers("index", 0, len(values))]

    def rows(self, columns: Mapping[str, Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
        """The rows of columns, which must be of one length."""
        lengths = {key: len(column) for key, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ParsimError(
                "the columns differ in length",
                where=self.where,
                got=", ".join(f"{key} {length}" for key, length in lengths.items()),
            )
        return zip(*columns.values(), strict=True)
