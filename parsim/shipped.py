"""The folders of data that parsim ships, and the names of what lies in them.

Standard library only: the shell asks for these names at every press of the Tab key.
"""

from __future__ import annotations

from pathlib import Path


def data_folder(kind: str) -> Path:
    """The folder of shipped data: "models" or "hardware_profiles".

    In an installed wheel it lies inside the package, in a checkout beside it.
    """
    package = Path(__file__).parent
    inside = package / "_data" / kind
    return inside if inside.is_dir() else package.parent / kind


def shipped(kind: str) -> dict[str, Path]:
    """Shipped files of one kind by the name users type."""
    return {path.stem: path for path in sorted(data_folder(kind).glob("*.toml"))}
