"""Chrome trace files, event by event: never a whole file at once, nor all of its events.

Formats: Google's "Trace Event Format" (an object with `traceEvents`, or a bare list of events), and what
torch.profiler's export_chrome_trace adds to it. Files may be compressed with gzip.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from parsim.errors import ParsimError

_DECODER = json.JSONDecoder()
_BLANK = re.compile(r"[\s,]*")
_MORE_OF_A_NUMBER = re.compile(r"[-+.eE\d]*")
_SNIFFED = 65536
"""Characters of a file in which its first keys stand."""
LONGEST = 1 << 30
"""Characters of the largest file that is read, uncompressed: a few steps of a rank are a hundredth.
What a small compressed file unpacks to has no other bound."""
_BLOCK = 1 << 20
"""Characters that are read at a time."""
LONGEST_VALUE = 1 << 24
"""Characters of one event, or of one value beside the events."""
MOST_EVENTS = 1_500_000
"""Of the wanted categories."""
_HEAD = ("distributedInfo", "host_name", "baseTimeNanoseconds")
"""What is kept of all that stands beside the events."""
_ARGUMENTS = {
    *("correlation", "Collective name", "Process Group Name", "Process Group Ranks"),
    *("Process Group Description", "Dst Rank", "Src Rank"),
}
"""What is kept of an event's arguments; a GPU's kernel has thirty."""
_MOST_US = 1e15
"""Microseconds; more than thirty years from a clock's zero."""


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
    """What stands beside the events: the rank and its groups, the host, the clock's zero."""
    events: tuple[Event, ...]
    """Complete events of the wanted categories, in the file's order."""
    left_out: int
    """Events that last less than nothing, as profilers now and then write them."""


def is_chrome_trace(path: Path) -> bool:
    """Whether a file looks like a trace, by its first few kilobytes."""
    with _opened(path) as file:
        head = _read(file, _SNIFFED, str(path)).lstrip()
    return head.startswith("[") or '"traceEvents"' in head or '"deviceProperties"' in head


def read_chrome_file(path: Path, categories: Collection[str]) -> ChromeFile:
    """The complete events of some categories.

    Raises ParsimError, with the place, for a file that is no trace, breaks off, is longer than LONGEST,
    or holds events whose times are no numbers.
    """
    head: dict[str, Any] = {}
    events: list[Event] = []
    left_out = 0
    found = False
    with _opened(path) as file:
        for key, value in _Scanner(file, str(path)).pairs():
            if key is not None:
                head |= {key: value} if key in _HEAD else {}
                continue
            found = True
            event = _event(value, categories, str(path))
            if event is None:
                continue
            if event.end_ns < event.start_ns:
                left_out += 1
            else:
                events.append(event)
            if len(events) > MOST_EVENTS:
                raise _too_large(str(path), f"more than {MOST_EVENTS:,} events")
    if not found:
        raise ParsimError(
            "this trace holds no events",
            where=str(path),
            expected="traceEvents, as torch.profiler's export_chrome_trace writes them",
        )
    return ChromeFile(head=head, events=tuple(events), left_out=left_out)


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """A file's text, unpacked where its name says that it is compressed."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        file = opener(path, "rt", encoding="utf-8", errors="replace")
    except (OSError, ValueError) as error:
        raise _unreadable(error, str(path)) from None
    with file:
        yield file


def _read(file: TextIO, characters: int, where: str) -> str:
    try:
        return file.read(characters)
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(error, where) from None


def _unreadable(error: Exception, where: str) -> ParsimError:
    reason = getattr(error, "strerror", None) or str(error)
    return ParsimError("this file cannot be read", where=where, got=reason)


def _too_large(where: str, got: str) -> ParsimError:
    return ParsimError(
        "this trace is too large",
        where=where,
        got=got,
        expected="a few steps of one rank",
        hint="let torch.profiler's schedule(active=…) record fewer steps",
    )


class _Scanner:
    """Walks through a document's text, of which it holds a block; what it has passed is gone."""

    def __init__(self, file: TextIO, where: str) -> None:
        self._file, self._where = file, where
        self._text, self._at = "", 0
        self._passed = 0
        """Characters before `_text`."""
        self._whole = False
        """Whether the file ends where `_text` does."""

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
        self._skip_blanks()
        if not self._text.startswith(sign, self._at):
            return False
        self._at += len(sign)
        return True

    def _skip_blanks(self) -> None:
        while True:
            match = _BLANK.match(self._text, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._text) or not self._extends():
                return

    def _extends(self) -> bool:
        """Hold more of the file; whether there was more."""
        if self._whole:
            return False
        more = _read(self._file, max(_BLOCK, len(self._text) - self._at), self._where)
        self._passed += self._at
        self._text, self._at = self._text[self._at :] + more, 0
        self._whole = not more
        if self._passed + len(self._text) > LONGEST:
            raise _too_large(self._where, f"more than {LONGEST:,} characters uncompressed")
        return bool(more)

    def _value(self) -> Any:
        """The next value; one that does not end in what is held is read again with more."""
        self._skip_blanks()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                # A string that never ends is reported where it begins.
                pos = getattr(error, "pos", self._at)
                cut = pos >= len(self._text) - 1 or "Unterminated" in str(error)
            else:
                # A number that what is held ends in may go on, be it a point or an exponent that is cut.
                rest = _MORE_OF_A_NUMBER.match(self._text, end)
                if (rest and rest.end() < len(self._text)) or not self._extends():
                    self._at = end
                    return value
                continue
            if len(self._text) - self._at > LONGEST_VALUE or not self._extends():
                raise self._no_value(broken=cut and self._whole)

    def _no_value(self, *, broken: bool) -> ParsimError:
        at = self._at
        return ParsimError(
            "the trace breaks off" if broken else "this is no valid JSON",
            where=f"{self._where}, character {self._passed + at:,}",
            got=self._text[at : at + 60] or "the end of the file",
            hint="the process that wrote it may have been stopped too early" if broken else None,
        )


def _event(value: Any, categories: Collection[str], where: str) -> Event | None:
    """A complete event of a wanted category; None for any other."""
    if not isinstance(value, dict) or value.get("ph") != "X" or value.get("cat") not in categories:
        return None
    start_ns, duration_ns = (_nanoseconds(value, key, where) for key in ("ts", "dur"))
    args = value.get("args")
    args = args if isinstance(args, dict) else {}
    return Event(
        name=str(value.get("name", "")),
        category=value["cat"],
        thread=(_plain(value.get("pid")), _plain(value.get("tid"))),
        start_ns=start_ns,
        end_ns=start_ns + duration_ns,
        args={key: _plain(args[key]) for key in _ARGUMENTS & args.keys()},
    )


def _plain(value: object) -> object:
    """A word or number as it is, anything else as text: it is looked up by."""
    return value if isinstance(value, str | int | float | None) else str(value)


def _nanoseconds(event: Mapping[str, Any], key: str, where: str) -> int:
    """A time of an event, which the file has in microseconds."""
    time_us = event.get(key)
    if not isinstance(time_us, int | float) or not -_MOST_US < time_us < _MOST_US:
        raise ParsimError(
            "the time of an event must be a number",
            where=f"{where}: {key} of {event.get('name')!r}",
            got=time_us,
            expected="microseconds",
        )
    return round(time_us * 1000)
