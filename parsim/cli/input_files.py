"""The files behind an answer, by hash: what a command read stands in its document, as it was then."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from parsim.config import is_file
from parsim.shipped import data_folder, shipped

KINDS = {"model": "models", "hardware": "hardware_profiles", "stack": "hardware_profiles/stacks"}
"""Inputs that name shipped files or others, and where the shipped ones lie."""
FILES = (
    *("plan", "schedule_csv", "fabric", "ps", "one_rank"),
    *("prices", "runs", "kernels", "prediction", "measurement", "files"),
)
"""Inputs that may name files: what the command has read. Others are not, whatever lies there."""


def input_files(inputs: Mapping[str, Any], answer: Mapping[str, Any]) -> list[dict[str, str]]:
    """Name and SHA-256 of every file that a command has read, each once, by name.

    Hardware and stack that the user left to parsim are named by the answer.
    """
    found = dict(_named(inputs, answer))
    return [{"name": name, "sha256": _digest(path)} for name, path in sorted(found.items())]


def _named(inputs: Mapping[str, Any], answer: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    for kind, folder in KINDS.items():
        known = shipped(folder)
        parts = [part for key in ("plans", "rows") for part in answer.get(key) or ()]
        chosen = {str(item.get(kind)) for item in (answer, *parts) if isinstance(item, Mapping)}
        for name in {part.strip() for part in str(inputs.get(kind) or "").split(",")} | chosen:
            if name in known:
                path = known[name]
                yield f"{path.relative_to(data_folder(folder).parent)} (shipped)", path
            elif name not in chosen and is_file(Path(name)):
                yield name, Path(name)
    for key in FILES:
        value = inputs.get(key)
        for given in value if isinstance(value, list) else [value]:
            if isinstance(given, str) and is_file(Path(given)):
                yield given, Path(given)


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
