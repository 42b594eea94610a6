"""Chrome trace files, event by event: the text of a file, never all of its events as objects.

Formats: Google's "Trace Event Format" (an object with `traceEvents`, or a bare list of events), and what
torch.profiler's export_chrome_trace adds to it. Files may be compressed with gzip.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from parsim.errors import ParsimError

_DECODER = json.JSONDecoder()
_BLANK = re.compile(r"[\s,]*")
_SNIFFED = 65536
"""Characters of a file in which its first keys stand."""
LONGEST = 1 << 30
"""Characters of the largest file that is read, uncompressed: a few steps of a rank are a hundredth.
What a small compressed file unpacks to has no other bound."""


class Event(NamedTuple):
    """A complete event ("ph": "X"), in whole nanoseconds of the trace's own clock."""

    name: str
    category: str
    thread: tuple[object, object]
    """Process and thread, as the file names them."""
    start_ns: int
    end_ns: int
    args: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChromeFile:
    """What a trace file holds."""

    head: Mapping[str, Any]
    """Everything beside the events."""
    events: tuple[Event, ...]
    """Complete events of the wanted categories, in the file's order."""
    left_out: int
    """Events that last less than nothing, as profilers now and then write them."""


def is_chrome_trace(path: Path) -> bool:
    """Whether a file looks like a trace, by its first few kilobytes."""
    head = _text(path, _SNIFFED).lstrip()
    return head.startswith("[") or '"traceEvents"' in head or '"deviceProperties"' in head


def read_chrome_file(path: Path, categories: Collection[str]) -> ChromeFile:
    """The complete events of some categories.

    Raises ParsimError, with the place, for a file that is no trace, breaks off, is longer than LONGEST,
    or holds events whose times are no numbers.
    """
    text = _text(path, LONGEST + 1)
    if len(text) > LONGEST:
        raise ParsimError(
            "this trace is too large",
            where=str(path),
            got=f"more than {LONGEST:,} characters uncompressed",
            expected="a few steps of one rank",
            hint="let torch.profiler's schedule(active=…) record fewer steps",
        )
    head: dict[str, Any] = {}
    events: list[Event] = []
    left_out = 0
    found = False
    for key, value in _Scanner(text, str(path)).pairs():
        if key is not None:
            head[key] = value
            continue
        found = True
        event = _event(value, categories, str(path))
        if event is None:
            continue
        if event.end_ns < event.start_ns:
            left_out += 1
        else:
            events.append(event)
    if not found:
        raise ParsimError(
            "this trace holds no events",
            where=str(path),
            expected="traceEvents, as torch.profiler's export_chrome_trace writes them",
        )
    return ChromeFile(head=head, events=tuple(events), left_out=left_out)


def _text(path: Path, characters: int) -> str:
    """A file's beginning: so many characters, or all."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8", errors="replace") as file:
            return str(file.read(characters))
    except (OSError, EOFError, zlib.error) as error:
        raise ParsimError(
            "this file cannot be read",
            where=str(path),
            got=getattr(error, "strerror", None) or str(error),
        ) from None


class _Scanner:
    """Walks through a document's text; what it has passed is gone."""

    def __init__(self, text: str, where: str) -> None:
        self._text, self._where, self._at = text, where, 0

    def pairs(self) -> Iterator[tuple[str | None, Any]]:
        """(None, event) for each event, and (key, value) for everything else on the top level."""
        if self._passes("["):
            yield from self._events()
            return
        if not self._passes("{"):
            raise ParsimError(
                "this is no trace", where=self._where, expected="JSON, an object or a list"
            )
        while not self._passes("}"):
            key = self._value()
            self._passes(":")
            if key == "traceEvents" and self._passes("["):
                yield from self._events()
            else:
                yield str(key), self._value()

    def _events(self) -> Iterator[tuple[None, Any]]:
        while not self._passes("]"):
            yield None, self._value()

    def _passes(self, sign: str) -> bool:
        """Skip blanks and commas; whether a sign comes then, which is passed too."""
        match = _BLANK.match(self._text, self._at)
        self._at = match.end() if match else self._at
        if not self._text.startswith(sign, self._at):
            return False
        self._at += len(sign)
        return True

    def _value(self) -> Any:
        """The next value."""
        match = _BLANK.match(self._text, self._at)
        at = match.end() if match else self._at
        try:
            value, self._at = _DECODER.raw_decode(self._text, at)
        except (json.JSONDecodeError, RecursionError) as error:
            size = len(self._text)
            # A string that never ends is reported where it begins.
            broken = at >= size or getattr(error, "pos", 0) >= size - 1 or "Unterminated" in str(error)
            raise ParsimError(
                "the trace breaks off" if broken else "this is no valid JSON",
                where=f"{self._where}, character {at:,} of {size:,}",
                got=self._text[at : at + 60] or "the end of the file",
                hint="the process that wrote it may have been stopped too early" if broken else None,
            ) from None
        return value


def _event(value: Any, categories: Collection[str], where: str) -> Event | None:
    """A complete event of a wanted category; None for any other."""
    if not isinstance(value, dict) or value.get("ph") != "X" or value.get("cat") not in categories:
        return None
    start_ns, duration_ns = (_nanoseconds(value, key, where) for key in ("ts", "dur"))
    args = value.get("args")
    return Event(
        name=str(value.get("name", "")),
        category=value["cat"],
        thread=(value.get("pid"), value.get("tid")),
        start_ns=start_ns,
        end_ns=start_ns + duration_ns,
        args=args if isinstance(args, dict) else {},
    )


def _nanoseconds(event: Mapping[str, Any], key: str, where: str) -> int:
    """A time of an event, which the file has in microseconds."""
    time_us = event.get(key)
    if not isinstance(time_us, int | float) or not math.isfinite(time_us):
        raise ParsimError(
            "the time of an event must be a number",
            where=f"{where}: {key} of {event.get('name')!r}",
            got=time_us,
            expected="microseconds",
        )
    return round(time_us * 1000)
