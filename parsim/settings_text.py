"""Settings in one word of a command line: `name,key=value,…` or `key=value,…`, and numbers by stage.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from parsim.errors import ParsimError, did_you_mean

LONG_RUN = 5
"""So many equal numbers in a row are counted instead of written out."""
MOST_NUMBERS = 10_000
"""More than any plan has stages: what a slip of the finger shall not fill the memory with."""


class Settings(NamedTuple):
    """What a text says: the name in front (empty where there is none), and values by key."""

    name: str
    values: dict[str, Any]


def parse_settings(
    text: str, known: Mapping[str, Callable[[str], Any]], *, where: str, named: bool = False
) -> Settings:
    """The settings in `text`; `known` says how to read the value of each key, e.g. `int`.

    With `named` the text starts with a name of its own. `where` is what messages call the text, such as
    "--straggler". Keys that are left out are left out of the answer.

    Raises ParsimError for a missing name, an unknown key, a key given twice, a piece without "=", and a
    value that its reader refuses.

    >>> parse_settings("rank=7, slow=1.3", {"rank": int, "slow": float}, where="--straggler").values
    {'rank': 7, 'slow': 1.3}
    >>> parse_settings("torus,dims=4x4", {"dims": str}, where="--fabric", named=True)
    Settings(name='torus', values={'dims': '4x4'})
    """
    pieces = [piece.strip() for piece in text.split(",") if piece.strip()]
    name = ""
    if named:
        if not pieces or "=" in pieces[0]:
            raise ParsimError(
                "this starts with a name", where=where, got=text, expected="name,key=value,…"
            )
        name = pieces.pop(0)
    values: dict[str, Any] = {}
    for piece in pieces:
        key, equals, value = (part.strip() for part in piece.partition("="))
        if key not in known:
            raise ParsimError(
                f"unknown setting {key!r}",
                where=f"{where} {text}",
                expected=", ".join(known) or "no settings",
                hint=did_you_mean(key, known),
            )
        if not equals or not value:
            raise ParsimError(
                "a setting is written key=value", where=f"{where} {text}", got=piece, hint=f"{key}=…"
            )
        if key in values:
            raise ParsimError(f"setting {key!r} is given twice", where=f"{where} {text}")
        values[key] = _read(known[key], value, f"{where}: {key}")
    return Settings(name, values)


def choice(*words: str) -> Callable[[str], str]:
    """A reader of one word out of several.

    >>> choice("sync", "async")("async")
    'async'
    """

    def read(value: str) -> str:
        if value not in words:
            raise ParsimError(
                "unknown word", got=value, expected=", ".join(words), hint=did_you_mean(value, words)
            )
        return value

    return read


def positive(read: Callable[[str], Any], *, or_zero: bool = False) -> Callable[[str], Any]:
    """A reader of numbers above zero, or from zero on.

    >>> positive(int)("3"), positive(float, or_zero=True)("0")
    (3, 0.0)
    """

    def read_positive(value: str) -> Any:
        number = read(value)
        if not (number > 0 or (or_zero and number == 0)):
            raise ParsimError(
                "this number is too small", got=value, expected="0 or more" if or_zero else "more than 0"
            )
        return number

    return read_positive


def _read(reader: Callable[[str], Any], value: str, where: str) -> Any:
    try:
        return reader(value)
    except ParsimError as error:
        raise error.at(where) from None
    except ValueError:
        expected = {int: "a whole number", float: "a number"}.get(reader)  # type: ignore[call-overload]
        raise ParsimError("cannot read this value", where=where, got=value, expected=expected) from None


def numbers_text(numbers: Sequence[int]) -> str:
    """A number for every stage as the short form has them; long runs are counted.

    >>> numbers_text([9, 8, 8, 8, 8, 8, 7, 7])
    '9-8x5-7-7'
    """
    runs = ((number, len(list(run))) for number, run in groupby(numbers))
    return "-".join(
        f"{number}x{count}" if count >= LONG_RUN else "-".join([str(number)] * count)
        for number, count in runs
    )


def parse_numbers(text: str) -> tuple[int, ...]:
    """What numbers_text writes. Raises ValueError for anything else, and for more than MOST_NUMBERS.

    >>> parse_numbers("9-8x5-7-7")
    (9, 8, 8, 8, 8, 8, 7, 7)
    """
    numbers: list[int] = []
    for part in text.split("-"):
        number, times, text_of_count = part.partition("x")
        count = int(text_of_count) if times else 1
        if not 1 <= count <= MOST_NUMBERS - len(numbers):
            raise ValueError("no number, or too many")
        numbers += [int(number)] * count
    return tuple(numbers)
