"""Writing kernel constants into a hardware profile, as the tables at its end."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from parsim.config import read_text, write_file
from parsim.kernels import Kernels, Residuals

_FIRST_TABLE = re.compile(r"^\[+kernels\b", re.MULTILINE)


def kernels_toml(kernels: Kernels) -> str:
    """The [kernels] tables as TOML: the same constants give the same text.

    >>> print(kernels_toml(Kernels(relative="h100-sxm-80gb")), end="")
    [kernels]
    relative = "h100-sxm-80gb"
    """
    lines = ["[kernels]"]
    if kernels.relative:
        lines.append(f"relative = {_value(kernels.relative)}")
    for f in dataclasses.fields(kernels):
        noun = getattr(kernels, f.name)
        if f.name == "relative" or not noun:
            continue
        if isinstance(noun, tuple):
            for part in noun:
                lines += ["", f"[[kernels.{f.name}]]", *_lines(part)]
        else:
            lines += ["", f"[kernels.{f.name}]", *_lines(noun)]
    return "\n".join(lines) + "\n"


def write_kernels(path: Path, kernels: Kernels) -> None:
    """Put the constants at the end of a profile, in place of those it had."""
    text = read_text(path)
    found = _FIRST_TABLE.search(text)
    facts = text[: found.start()] if found else text
    write_file(path, facts.rstrip("\n") + "\n\n" + kernels_toml(kernels))


def _lines(noun: Any) -> list[str]:
    """One line a field; fields that hold their default are left out."""
    lines = []
    for f in dataclasses.fields(noun):
        value = getattr(noun, f.name)
        if value is None or value == f.default or value == {}:
            continue
        if isinstance(value, Residuals):
            lines += [f"{f.name}.{name} = {_value(getattr(value, name))}" for name in _SIZES]
            rows = ",\n".join(f"  {_value(row)}" for row in value.percent)
            lines.append(f"{f.name}.percent = [\n{rows},\n]")
        else:
            lines.append(f"{f.name} = {_value(value)}")
    return lines


_SIZES = ("rows", "columns", "knots")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, tuple):
        return "[" + ",".join(_value(part) for part in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_value(part)}" for key, part in value.items()) + " }"
    if dataclasses.is_dataclass(value):
        parts = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return _value(parts)
    return repr(value)
