"""Reading files from outside into nouns, and the folders that parsim ships its data in.

A file is data: it is parsed by a standard parser, its keys are checked against the noun's fields
(did-you-mean), quantities written with units are turned into SI by the unit in the key's name, and
pydantic validates the rest. All errors of a file are reported at once.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import gzip
import io
import json
import math
import os
import re
import tempfile
import tomllib
import types
import typing
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from parsim.errors import ParsimError, did_you_mean, shorten
from parsim.hardware import Cluster
from parsim.model import ModelSpec
from parsim.shipped import shipped
from parsim.stack import Stack
from parsim.units import out_of_range, parse_field

T = TypeVar("T")
LISTED_BY = {"model": "`parsim models` lists them", "hardware": "`parsim hardware` lists them"}
CONFIG = "config.json"
_DEVICES = (Path("/dev"), Path("/dev/fd"), Path("/proc/self/fd"))
"""What describes the model in a folder as of Hugging Face."""
GZIP = b"\x1f\x8b"
"""The first bytes of a file that is compressed."""
MAX_FILE_BYTES = 32 * 2**20
"""Larger files are refused, packed or not."""
MAX_JSON_BYTES, MAX_JSON_VALUES = 128 * 2**20, 8_000_000
"""Of a document, as parsim writes of long steps. At both limits it takes most of a gigabyte to hold."""
MAX_TOML_CHARACTERS = 2**19
"""Ten times a large profile; the standard library reads about a million characters a second."""
MOST_ROWS, MOST_CELLS = 250_000, 5_000_000
"""Of a table. A schedule has a cell for each action."""
MAX_NAME, MAX_TEXT = 200, 20_000
"""Characters of a name, and of any other text in a file."""
_LONG_KEY = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){33}""")
_LONG_NUMBER = re.compile(r"\d{19}")
_LONG_COLUMN = 32
"""Values from which on a list is written on one line."""
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
_FLAT = json.JSONEncoder(allow_nan=False, ensure_ascii=False)
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What moves a terminal's cursor, colours it, or turns the direction of what follows."""


def find(kind: str, name: str, *, what: str) -> Path:
    """The file for a name or path that the user gave.

    Raises ParsimError, with the nearest known name, where there is no such file.
    """
    known = shipped(kind)
    if name in known:
        return known[name]
    path = Path(name)
    if kind == "models" and is_file(path / CONFIG):
        return path / CONFIG
    if kind == "models" and is_folder(path):
        raise ParsimError(
            f"this folder has no {CONFIG}",
            where=name,
            expected=f"a TOML file, a {CONFIG}, or a folder with one",
            hint="download it beside the weights, or name the model on the Hub: hf:org/name",
        )
    looks_like_path = path.suffix in (".toml", ".json") or len(path.parts) > 1
    if looks_like_path:
        if is_file(path):
            return path
        raise ParsimError(f"no such {what} file", where=name, hint=did_you_mean(name, known))
    raise ParsimError(
        f"unknown {what} {name!r}",
        expected=(", ".join(known) if len(known) <= 15 else f"one of {len(known)} shipped names")
        + ", or a path to a file",
        hint=did_you_mean(name, known) or LISTED_BY.get(what),
    )


def is_folder(path: Path) -> bool:
    """Whether a folder is there; a name that no file can have is none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long for the file system, or with a null byte
        return False


def read_text(path: Path, *, max_bytes: int = MAX_FILE_BYTES) -> str:
    """The text of a file, unpacked where its first bytes are gzip's.

    Raises ParsimError for what is too large (packed or not), unreadable, damaged or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            is_larger = os.fstat(file.fileno()).st_size > max_bytes
            data = b"" if is_larger else file.read(max_bytes + 1)
        if data[:2] == GZIP:
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as unpacked:
                data = unpacked.read(max_bytes + 1)
        if is_larger or len(data) > max_bytes:
            raise ParsimError(
                "this file is too large", where=str(path), expected=f"at most {max_bytes} bytes"
            )
        return data.decode("utf-8-sig")
    except ParsimError:
        raise
    except UnicodeDecodeError as error:
        raise ParsimError("this file is not UTF-8 text", where=str(path), got=str(error)) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ParsimError("this gzip file is damaged", where=str(path), got=str(error)) from None
    except OSError as error:
        raise ParsimError("cannot read this file", where=str(path), got=error.strerror) from None
    except ValueError as error:  # a null byte in the name
        raise ParsimError("this is no path", where=str(path), got=str(error)) from None


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file."""
    text = read_text(path).replace("\r\n", "\n")
    if len(text) > MAX_TOML_CHARACTERS:
        raise ParsimError(
            "this file is too large",
            where=str(path),
            got=f"{len(text)} characters",
            expected=f"at most {MAX_TOML_CHARACTERS}",
        )
    if _LONG_KEY.search(text):  # tomllib takes quadratic time for one
        raise ParsimError(
            "this file is nested too deeply", where=str(path), expected="keys of few parts"
        )
    try:
        return tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError, or a whole number of thousands of digits
        raise ParsimError("this is no valid TOML", where=str(path), got=str(error)) from None
    except RecursionError:
        raise ParsimError("this file is nested too deeply", where=str(path)) from None


def csv_rows(text: str, *, where: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a table and the numbers of their lines; an empty line has no cells.

    Raises ParsimError for what the csv module cannot read, and for more rows or cells than there can be.
    """
    lines = csv.reader(io.StringIO(text, newline=""))
    try:
        all_cells = 0
        for count, cells in enumerate(lines):
            all_cells += len(cells)
            if count >= MOST_ROWS or all_cells > MOST_CELLS:
                raise ParsimError(
                    "this table is too large",
                    where=f"{where}, line {lines.line_num}",
                    expected=f"at most {MOST_ROWS} rows and {MOST_CELLS} cells",
                )
            yield lines.line_num, cells
    except csv.Error as error:
        raise ParsimError(
            "this is no valid CSV", where=f"{where}, line {lines.line_num}", got=str(error)
        ) from None


def parse_json(text: str, *, where: str) -> Any:
    """JSON without NaN, Infinity, numbers beyond float, halves of characters, or keys given twice.

    A whole number beyond 64 bits becomes a float, which no field of whole numbers takes: files have such
    where parsim does not look, as tokenizers without a longest text do (model_max_length 1e30).
    """
    if text.count(",") + text.count("[") + text.count("{") > MAX_JSON_VALUES:
        raise ParsimError(
            "this document is too large", where=where, expected=f"at most {MAX_JSON_VALUES} values"
        )

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(items)
        if len(table) < len(items):
            double = next(key for key, times in Counter(key for key, _ in items).items() if times > 1)
            raise ParsimError("a key is given twice", where=f"{where}: {double}")
        return table

    def refuse(name: str) -> float:
        raise ParsimError("a number must be finite", where=where, got=name)

    def finite(digits: str) -> float:
        number = float(digits)
        return number if math.isfinite(number) else refuse(digits)

    def whole(digits: str) -> int | float:
        number = int(digits) if len(digits) < 25 else 2**64
        return number if abs(number) < 2**63 else finite(digits)

    try:
        data = json.loads(
            text,
            object_pairs_hook=pairs,
            parse_constant=refuse,
            parse_float=finite,
            parse_int=whole if _LONG_NUMBER.search(text) else None,
        )
        if _HALF_CHARACTER.search(text):
            json.dumps(data, ensure_ascii=False).encode()
        return data
    except ParsimError:
        raise
    except UnicodeEncodeError as error:
        raise ParsimError("a text holds half a character", where=where, got=str(error)) from None
    except ValueError as error:
        raise ParsimError(
            "this is no valid JSON; is the file complete?", where=where, got=str(error)
        ) from None
    except RecursionError:
        raise ParsimError("this file is nested too deeply", where=where) from None


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return parse_json(read_text(path, max_bytes=MAX_JSON_BYTES), where=str(path))


def validate(cls: type[T], data: object, *, where: str) -> T:
    """An instance of the dataclass `cls` from parsed data.

    Raises ParsimError naming every wrong key at once: unknown (with the nearest known), missing, of
    the wrong type, or refused by the noun itself.
    """
    problems: dict[str, str] = {}
    try:
        clean = _with_si_units(cls, data, "", problems)
        # JSON mode is strict about numbers, words and truth values, and still reads arrays as tuples.
        noun = TypeAdapter(cls).validate_json(json.dumps(clean, default=str), strict=True)
        if not problems:
            return noun
    except ValidationError as error:
        for place, text in map(_describe, error.errors()):
            problems.setdefault(place, text)
    except RecursionError:
        raise ParsimError("this file is nested too deeply", where=where) from None
    lines = [f"{place}: {text}" if place else text for place, text in problems.items()]
    count = "a problem" if len(lines) == 1 else f"{len(lines)} problems"
    raise ParsimError(f"{count} in this file:\n  - " + "\n  - ".join(lines), where=where)


def _describe(error: Any) -> tuple[str, str]:
    """Place and text of one of pydantic's errors."""
    place = ""
    for part in error["loc"]:
        place += f"[{part}]" if isinstance(part, int) else f".{part}"
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, ParsimError):
        place += f".{cause.where}" if cause.where else ""
        text = cause.what + (f", got {shorten(cause.got)}" if cause.got is not None else "")
        text += f", expected {cause.expected}" if cause.expected else ""
        text += f"; {cause.hint}" if cause.hint else ""
    else:
        text = error["msg"][:1].lower() + error["msg"][1:]
        if error["type"] != "missing":
            text += f", got {shorten(error['input'])}"
    return place.removeprefix("."), text


def _with_si_units(cls: Any, data: object, at: str, problems: dict[str, str]) -> object:
    """`data` with units turned into SI numbers; what is wrong with it goes to `problems` by place."""
    if not dataclasses.is_dataclass(cls) or not isinstance(data, Mapping):
        return data
    hints = _hints(typing.cast(type, cls))
    clean: dict[str, object] = {}
    for key, value in data.items():
        place = f"{at}{key}"
        if key in hints:
            clean[key] = _value_in_si(hints[key], key, value, place, problems)
        else:
            near = did_you_mean(str(key), hints)
            problems[place] = "unknown key" + (f"; {near}" if near else "")
    return clean


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _value_in_si(hint: Any, key: str, value: object, place: str, problems: dict[str, str]) -> object:
    if isinstance(value, str):
        try:
            number = parse_field(key, value)
        except ParsimError as error:
            problems[place] = f"{error.what}, got {value!r}, expected {error.expected}"
            return value
        wrong = _wrong_text(key, value) if number is None else out_of_range(key, number)
        if wrong is not None:
            problems[place] = wrong
        return value if number is None else number
    if isinstance(value, float) and not math.isfinite(value):
        problems[place] = f"a number must be finite, got {value}"
    elif isinstance(value, bool):
        if hint in (int, float):
            problems[place] = f"this is a number, got {str(value).lower()}"
    elif isinstance(value, int | float) and (wrong := out_of_range(key, value)) is not None:
        problems[place] = wrong
    inner = _dataclass_in(hint)
    if isinstance(value, Mapping):
        if inner is not None and typing.get_origin(hint) is not dict:
            return _with_si_units(inner, value, f"{place}.", problems)
        # A table by dtype or scope: each value is read like the key that holds the table.
        return {
            k: _value_in_si(inner or hint, key, v, f"{place}.{k}", problems) for k, v in value.items()
        }
    if isinstance(value, list):
        return [_value_in_si(hint, key, v, f"{place}[{i}]", problems) for i, v in enumerate(value)]
    return value


def _wrong_text(key: str, text: str) -> str | None:
    """What is wrong with a text, or None: names and sources are printed, drawn and exported."""
    if key == "name" and not (text.isprintable() and 0 < len(text) <= MAX_NAME):
        return f"a name is a printable line of up to {MAX_NAME} characters, got {shorten(text)}"
    if len(text) > MAX_TEXT:
        return f"this text is too long, got {len(text)} characters, expected at most {MAX_TEXT}"
    return f"a text has no control characters, got {shorten(text)}" if _CONTROLS.search(text) else None


def _dataclass_in(hint: Any) -> Any:
    """The dataclass inside a hint such as X, X | None, dict[str, X] or tuple[X, ...]."""
    if dataclasses.is_dataclass(hint):
        return hint
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is not None:
        for part in typing.get_args(hint):
            found = _dataclass_in(part)
            if found is not None:
                return found
    return None


def load_cluster(name: str) -> Cluster:
    """A hardware profile by name or path."""
    path = find("hardware_profiles", name, what="hardware")
    return validate(Cluster, read_toml(path), where=str(path))


def load_stack(name: str) -> Stack:
    """A software stack by name or path."""
    path = find("hardware_profiles/stacks", name, what="stack")
    return validate(Stack, read_toml(path), where=str(path))


def load_model(name: str) -> ModelSpec:
    """A model by name, by path to TOML or a Hugging Face config.json, or from the Hub (hf:org/name)."""
    if name.startswith("hf:"):
        from parsim.importers.hub import hub_config
        from parsim.importers.huggingface import model_from_config

        downloaded, where = hub_config(name)
        return model_from_config(read_json(downloaded), where=where)
    path = find("models", name, what="model")
    if path.suffix == ".json":
        from parsim.importers.huggingface import model_from_config

        return model_from_config(read_json(path), where=str(path))
    return validate(ModelSpec, read_toml(path), where=str(path))


def to_data(noun: Any) -> dict[str, Any]:
    """A dataclass as plain data for JSON, without fields that hold nothing."""
    return {k: v for k, v in dataclasses.asdict(noun).items() if v not in (None, "", ())}


def dump_json(document: object) -> str:
    """JSON text as parsim writes it: two spaces, long columns on one line, no NaN, a newline at the end.

    >>> print(dump_json({"a": [1, {"b": None}], "c": [0] * 40}), end="")  # doctest: +ELLIPSIS
    {
      "a": [
        1,
        {
          "b": null
        }
      ],
      "c": [0, 0, ..., 0]
    }
    """
    return _indented(document, "\n") + "\n"


def _indented(value: object, line: str) -> str:
    """A value as JSON; `line` begins a line where it stands."""
    below = line + "  "
    if isinstance(value, dict) and value:
        parts = [f"{_FLAT.encode(str(key))}: {_indented(item, below)}" for key, item in value.items()]
        return "{" + below + f",{below}".join(parts) + line + "}"
    if isinstance(value, list | tuple) and value:
        is_flat = not any(isinstance(item, dict | list | tuple) for item in value)
        if len(value) < _LONG_COLUMN or not is_flat:
            return "[" + below + f",{below}".join(_indented(item, below) for item in value) + line + "]"
    return _FLAT.encode(value)


def to_toml(table: dict[str, Any], name: str = "") -> str:
    """Nested tables as TOML: values first, then sub-tables; lists of points one point a line.

    >>> print(to_toml({"a": 1.5, "b": {"c": "x"}, "d": ({"e": ((1, 2.0), (3, 4.0))},)}), end="")
    a = 1.5
    <BLANKLINE>
    [b]
    c = "x"
    <BLANKLINE>
    [[d]]
    e = [
      [1, 2.0],
      [3, 4.0],
    ]
    """
    lines: list[str] = []
    below: list[str] = []
    for key, value in table.items():
        place = f"{name}.{key}" if name else key
        if isinstance(value, dict):
            below.append(f"\n[{place}]\n{to_toml(value, place)}")
        elif isinstance(value, tuple | list) and value and isinstance(value[0], dict):
            below += [f"\n[[{place}]]\n{to_toml(item, place)}" for item in value]
        elif value is not None:
            lines.append(f"{key} = {_toml_value(value)}\n")
    return "".join(lines + below)


def _toml_value(value: object) -> str:
    if isinstance(value, tuple | list):
        if value and isinstance(value[0], tuple | list):
            return "[\n" + "".join(f"  {_toml_value(item)},\n" for item in value) + "]"
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, float):
        assert math.isfinite(value)
        return repr(value)
    # JSON's strings, whole numbers and booleans are also TOML's.
    return json.dumps(value, ensure_ascii=False)


def require_writable(path: Path, *, folder: bool = False) -> None:
    """Refuse a path at which no file (or folder of files) could be written; nothing is created.

    A file comes by renaming, so its folder must be writable and it may not be a device.
    Raises ParsimError.
    """
    try:
        there = next(place for place in (path, *path.absolute().parents) if place.exists())
        if there == path and there.is_dir() != folder:
            what = "this is a file, not a folder" if folder else "this is a folder, not a file"
            raise ParsimError(what, where=str(path))
        if there == path and not folder:
            if not path.is_file() or path.parent in _DEVICES:
                raise ParsimError("this is a device, not a file", where=str(path))
            there = path.resolve().parent
        if not there.is_dir():
            raise ParsimError("cannot write here", where=str(path), got=f"{there} is a file")
        if not os.access(there, os.W_OK | os.X_OK):
            raise ParsimError("cannot write here", where=str(path), got=f"{there} is read-only")
    except OSError as error:
        raise ParsimError("cannot write here", where=str(path), got=error.strerror) from None


def write_file(path: Path, content: str | bytes) -> None:
    """Write a whole file or nothing: to a temporary name beside it, then rename. Links are followed."""
    data = content.encode() if isinstance(content, str) else content
    try:
        path = path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise ParsimError("cannot write this file", where=str(path), got=error.strerror) from None
