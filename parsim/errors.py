"""The errors parsim raises on purpose.

ParsimError            bad input: says what, where, got, expected and a hint; exit status 2
└── NothingFits        a well-posed question whose answer is "no"; exit status 1

Anything else that escapes is a defect of parsim, not of the input.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

MOST_LINES, MOST_CHARACTERS = 40, 600
"""Of a message, and of a line of it."""


class ParsimError(ValueError):
    """Bad input, explained to the person who typed it."""

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        got: object = None,
        expected: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.got = got
        self.expected = expected
        self.hint = hint
        super().__init__(what)

    def __str__(self) -> str:
        """The message as some short lines, fit for a terminal; a part that is not known is left out.

        Files and flags from outside are quoted in it: control characters stand escaped, and what is very
        long is cut.
        """
        lines = self.what.split("\n")
        if len(lines) > MOST_LINES:
            lines[MOST_LINES:] = [f"  … and {len(lines) - MOST_LINES} more"]
        if self.where is not None:
            lines.append(f"  where:    {self.where}")
        if self.got is not None:
            lines.append(f"  got:      {shorten(self.got)}")
        if self.expected is not None:
            lines.append(f"  expected: {self.expected}")
        if self.hint is not None:
            lines.append(f"  hint:     {self.hint}")
        return "\n".join(map(_one_line, lines))

    def at(self, where: str) -> ParsimError:
        """The same error with the place it came from put before the place it already names."""
        place = where if self.where is None else f"{where}: {self.where}"
        return type(self)(self.what, where=place, got=self.got, expected=self.expected, hint=self.hint)


class NothingFits(ParsimError):  # noqa: N818 - an answer, not a failure
    """The question was understood and the answer is no: no plan fits, or a check failed."""

    exit_code = 1


def shorten(value: object, limit: int = 120) -> str:
    """A value as one line of at most `limit` characters, for messages.

    >>> shorten("x" * 9, limit=5), shorten("")
    ('xxxx…', "''")
    """
    plain = isinstance(value, str) and value.isprintable() and value and value == value.strip()
    text = str(value) if plain else repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _one_line(text: str) -> str:
    """A line without characters that move a terminal's cursor, colour it, or cannot be encoded.

    >>> _one_line("a\\x1b[31m" + chr(0xD800)) == "a\\\\x1b[31m\\\\ud800"
    True
    """
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return line if len(line) <= MOST_CHARACTERS else line[: MOST_CHARACTERS - 1] + "…"


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """A hint naming the nearest known words, or None where nothing is near.

    >>> did_you_mean("hiden", ["hidden", "heads"]), did_you_mean("h100", ["h100-sxm", "h100-pcie"])
    ("did you mean 'hidden'?", "did you mean 'h100-sxm' or 'h100-pcie'?")
    >>> did_you_mean("org/Llama-3.1-70B-Instruct", ["llama-3.1-8b", "llama-3.1-70b"])
    "did you mean 'llama-3.1-70b'?"
    >>> did_you_mean("A100-80GB", ["a100-pcie-80gb", "a100-sxm-40gb", "a100-sxm-80gb"])
    "did you mean 'a100-pcie-80gb' or 'a100-sxm-80gb'?"
    >>> did_you_mean("llama3-70b", ["llama-7b", "llama-2-70b", "llama-3.1-70b"])
    "did you mean 'llama-3.1-70b' or 'llama-2-70b'?"
    >>> did_you_mean("NVIDIA H100 80GB HBM3", ["a100-sxm-80gb", "h100-sxm-80gb"])
    "did you mean 'h100-sxm-80gb'?"
    """
    words = {word.lower(): word for word in known}
    typed = name[-200:].lower().rpartition("/")[2]
    near = [word for word in words if typed and word.startswith(typed)][:3]
    near = near or [word for word in words if len(word) > 3 and typed.startswith(f"{word}-")][-1:]
    near = near or [word for word in words if _parts(typed) and _parts(typed) <= _parts(word)][:3]
    close = difflib.get_close_matches(typed, words, n=8, cutoff=0.6)
    near = near or _sharing_most(typed, close) or close[:1] or _sharing_most(typed, words)
    return f"did you mean {' or '.join(repr(words[word]) for word in near)}?" if near else None


def _parts(name: str) -> set[str]:
    """The parts of a name of several: those with a digit in them say which product is meant.

    >>> sorted(_parts("a100-80gb")), _parts("tiny")
    (['80gb', 'a100'], set())
    """
    parts = {part for part in re.split(r"[-_. ]", name) if len(part) > 1}
    return parts if any(part[-1].isalnum() and not part.isalpha() for part in parts) else set()


def _sharing_most(typed: str, words: Iterable[str]) -> list[str]:
    """The words that share the most parts with what was typed, such as all of an H100's."""
    shared = {word: len(_parts(typed) & _parts(word)) for word in words}
    most = max(shared.values(), default=0)
    return [word for word, count in shared.items() if most and count == most][:3]
