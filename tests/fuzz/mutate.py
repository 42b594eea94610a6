"""Valid files made wrong: bytes flipped, cut and spliced, values of the parsed tree replaced."""

from __future__ import annotations

import codecs
import copy
import csv
import gzip
import io
import json
import random
import re
import tomllib
from collections.abc import Callable, Sequence
from typing import Any

NUMBERS = (
    *("0", "-1", "1", "2", "3", "7", "0.5", "1.5", "-0.0", "1e-320", "1e-9", "1e15", "1e308", "1e400"),
    *("-1e308", "NaN", "Infinity", "-Infinity", "nan", "inf", str(2**31), str(2**63), str(2**64)),
    *(str(10**9), str(10**12), str(10**8), str(-(10**18)), str(10**400), "9" * 5000, "true", "null"),
)
"""What takes a number's place, as text."""
TEXTS = (
    *(
        "",
        " ",
        "x",
        "\0",
        "\n",
        "'",
        '"',
        "`id`",
        "$(id)",
        "; id",
        "../../x",
        "/etc/passwd",
        "-rf",
        "--",
    ),
    *(
        '"><script>alert(1)</script>',
        "{{ 1 }}",
        "[bold]",
        "[/x]",
        "$\\frac{1}{",
        "$x$",
        "%s",
        "\x1b[31m",
    ),
    *("\ud800", "\u202e", "\U0001f600", "é" * 40, "x" * 70_000, "1e400", "-1", "nan", "80 GiB", "-5 us"),
    *("1e999 GB", "auto", "none", "1,2,3", "a=b", "dp=2", "0x10", "1_000", "٣", "True", "=1+1"),
)
"""What takes a text's place."""
_LARGE = 100_000
"""Bytes of what an earlier mutation has blown up: the libraries here would swell on it themselves."""
_MARK = "\ue000"
_MARKED = re.compile(f'"{_MARK}([^"]*)"')
_TOKEN = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")

Mutation = Callable[[random.Random, bytes, Sequence[bytes]], bytes]


def mutated(kind: str, seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """One of the seeds with one to four things wrong; `kind` is json, toml, csv, text or binary, with
    ".gz" behind it where a file is compressed.
    """
    plain = kind.removesuffix(".gz")
    data = rng.choice(seeds)
    trees = _TREES.get(plain, ())
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        if trees and len(data) < _LARGE and rng.random() < 0.6:
            data = rng.choice(trees)(rng, data, seeds)
        else:
            data = rng.choice(_BYTES)(rng, data, seeds)
    if kind == plain:
        return data
    packed = gzip.compress(data, 1, mtime=0)
    return rng.choice(_BYTES)(rng, packed, [packed]) if rng.random() < 0.3 else packed


def nudged(kind: str, seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """One of the seeds with one to three numbers that a reader may well accept."""
    data = rng.choice(seeds)
    for _ in range(rng.choice((1, 1, 2, 3))):
        found = [m for m in _TOKEN.finditer(data) if data[m.start() - 1 : m.start()] in b" :,[=\n"]
        if not found:
            break
        at = rng.choice(found)
        old = at[0]
        new = rng.choice((*EXTREMES, old + b"0" * rng.choice((1, 3, 6)), old[:1], b"-" + old))
        if b"." not in old and rng.random() < 0.8:
            new = new.split(b".")[0].split(b"e")[0]
        data = data[: at.start()] + new + data[at.end() :]
    return data


EXTREMES = (b"0", b"1", b"2", b"3", b"7", b"97", b"4096", b"0.5", b"1e-6", b"1e-15", b"1e15", b"1000000")
EXTREMES += (b"10000", b"2147483647", b"1.5", b"1e9", b"64", b"1024")
"""Numbers that are allowed here or there."""


def _flip(rng: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if changed:
            changed[rng.randrange(len(changed))] = rng.choice(
                (0, 10, 34, 44, 91, 123, 255, rng.randrange(256))
            )
    return bytes(changed)


def _cut(rng: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return rng.choice((data[:a], data[b:], data[:a] + data[b:]))


def _splice(rng: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    other = rng.choice(seeds)
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def _number(rng: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    found = list(_TOKEN.finditer(data))
    if not found:
        return data
    at = rng.choice(found)
    return data[: at.start()] + rng.choice(NUMBERS).encode() + data[at.end() :]


def _line(rng: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """A line twice, gone, moved, or a thousand times."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    line = lines.pop(at)
    for _ in range(rng.choice((0, 1, 2, 2, 1000 if len(line) < 200 else 2))):
        lines.insert(rng.randrange(len(lines) + 1), line)
    return b"\n".join(lines)


def _insert(rng: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    text = rng.choice((rng.choice(TEXTS), rng.choice(NUMBERS), rng.choice("[]{}(),:;=\"'\\#\r\n\t ")))
    at = rng.randrange(len(data) + 1)
    return data[:at] + text.encode("utf-8", "surrogatepass") + data[at:]


def _nest(rng: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Brackets, and keys with dots, by the hundred or the hundred thousand."""
    depth = rng.choice((10, 1000, 100_000))
    opening, closing = rng.choice(
        ((b"[", b"]"), (b'{"a":', b"}"), (b"a.", b""), (b"(", b")"), (b"{a=", b"}"))
    )
    found = list(_TOKEN.finditer(data))
    at = rng.choice(found).start() if found and rng.random() < 0.7 else rng.randrange(len(data) + 1)
    return data[:at] + opening * depth + b"1" + closing * depth + data[at:]


def _encoded(rng: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    text = data.decode("utf-8", "replace")
    return rng.choice(
        (
            codecs.BOM_UTF8 + data,
            text.encode("utf-16"),
            text.encode("utf-16-le", "replace"),
            text.encode("utf-32"),
            (text + "é").encode("latin-1", "replace"),
            data.replace(b"\n", b"\r\n"),
            data.replace(b"\n", b"\r"),
            data.replace(b" ", b"\0"),
        )
    )


_BYTES: tuple[Mutation, ...] = (_flip, _cut, _splice, _number, _number, _line, _insert, _nest, _encoded)


def _raw(text: str) -> str:
    """A placeholder that stands as bare text in the file."""
    return _MARK + text


def _nasty(rng: random.Random) -> Any:
    def nested(depth: int) -> Any:
        value: Any = 1
        for _ in range(depth):
            value = [value] if rng.random() < 0.5 else {"a": value}
        return value

    return rng.choice(
        (
            lambda: _raw(rng.choice(NUMBERS)),
            lambda: _raw(rng.choice(NUMBERS)),
            lambda: rng.choice(TEXTS),
            lambda: rng.choice((True, False, [], {}, [[]], [{}], {"a": 1}, [1, "x", {}], {"": ""})),
            lambda: nested(rng.choice((2, 20, 200))),
            lambda: [rng.choice((0, "x", {}, []))] * rng.choice((1, 100, 20_000)),
        )
    )()


def _places(tree: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every container of a tree with each key in it."""
    keys = tree.keys() if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        found.append((tree, key))
        _places(tree[key], found)
    return found


def _changed_tree(rng: random.Random, tree: Any) -> Any:
    """A parsed tree with one value replaced, gone, doubled, wrapped, or swapped with another."""
    tree = copy.deepcopy(tree)
    places = _places(tree, [])
    if not places:
        return _nasty(rng)
    holder, key = rng.choice(places)
    what = rng.randrange(8)
    if what < 4:
        holder[key] = _nasty(rng)
    elif what == 4:
        del holder[key]
    elif what == 5:
        holder[key] = rng.choice(
            ([holder[key]], {"a": holder[key]}, str(holder[key]), [holder[key]] * 1000)
        )
    elif what == 6:
        other, name = rng.choice(places)
        holder[key] = copy.deepcopy(other[name]) if not isinstance(other[name], dict) else 1
    elif isinstance(holder, dict):
        holder[rng.choice((f"{key}s", f"{key}"[:-1], *TEXTS[:8]))] = holder[key]
    else:
        holder.extend(holder[:1000])
    return tree


def _json_tree(rng: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    try:
        text = json.dumps(_changed_tree(rng, json.loads(data)))
    except (ValueError, RecursionError):
        return _number(rng, data, seeds)
    # json.dumps writes the mark as an escape.
    text = _MARKED.sub(r"\1", text.replace("\\ue000", _MARK))
    if rng.random() < 0.1:  # a key twice
        keys = re.findall(r'("\w+": )(?=[\d"])', text)
        if keys:
            key = rng.choice(keys)
            text = text.replace(key, f"{key}1, {key}", 1)
    return text.encode()


def _toml_tree(rng: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    try:
        tree = _changed_tree(rng, tomllib.loads(data.decode()))
        text = "".join(f"{json.dumps(k)} = {_toml(v)}\n" for k, v in tree.items())
    except (ValueError, RecursionError, AttributeError):
        return _number(rng, data, seeds)
    return _MARKED.sub(r"\1", text).encode("utf-8", "surrogatepass")


def _toml(value: Any) -> str:
    """A value in TOML's inline form."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _csv_table(rng: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """A table with a cell replaced, a column gone, twice or renamed, or rows of other lengths."""
    try:
        rows = list(csv.reader(io.StringIO(data.decode())))
    except (ValueError, csv.Error):
        return _number(rng, data, seeds)
    rows = [row for row in rows if row] or [[""]]
    row = rng.choice(rows)
    at = rng.randrange(len(row))
    what = rng.randrange(6)
    if what < 3:
        text = rng.choice((rng.choice(NUMBERS), rng.choice(TEXTS)))
        row[at] = text
    elif what == 3:
        rows = [r[:at] + r[at + 1 :] for r in rows]
    elif what == 4:
        row.extend(row[: rng.choice((1, 3, 1000))])
    else:
        row[at] = rng.choice(rows[0])
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue().encode("utf-8", "surrogatepass")


_TREES: dict[str, tuple[Mutation, ...]] = {
    "json": (_json_tree,),
    "toml": (_toml_tree,),
    "csv": (_csv_table,),
}
