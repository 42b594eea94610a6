"""Options that name what to write: refused while the command line is read, not after hours of work.

Each function is the `callback` of such an option.
"""

from __future__ import annotations

from pathlib import Path

import typer


def to_file(context: typer.Context, path: Path | None) -> Path | None:
    """A file that can be written; raises ParsimError where it cannot."""
    return _writable(context, path)


def to_folder(context: typer.Context, path: Path | None) -> Path | None:
    """A folder in which files can be written, there already or not."""
    return _writable(context, path, folder=True)


def to_picture(context: typer.Context, path: Path | None) -> Path | None:
    """A file of a type that charts can be drawn in."""
    if path is not None and not context.resilient_parsing:
        from parsim.charts.style import file_format

        file_format(path)
    return _writable(context, path)


def _writable(context: typer.Context, path: Path | None, *, folder: bool = False) -> Path | None:
    if path is not None and not context.resilient_parsing:  # which is the shell asking how to go on
        from parsim.config import require_writable

        require_writable(path, folder=folder)
    return path
