"""`parsim report`, and `--report` of the commands that have one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parsim.cli.output import say
from parsim.cli.output_paths import to_file, to_folder

if TYPE_CHECKING:
    from parsim.timeline import Timeline

ReportOption = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="DIR",
        help="Also write the answer as an HTML page into this folder.",
        callback=to_folder,
    ),
]


def report(
    documents: Annotated[
        list[Path],
        typer.Argument(metavar="DOCUMENT.json…", help="What a command wrote with --json."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.", callback=to_file)] = Path(
        "report.html"
    ),
) -> None:
    """Turn answers into one HTML page: self-contained, to look at, to print, to send.

    Documents of plan, simulate, capacity, run and validate have reports; several become chapters of one
    page. The schedule that a document does not hold is simulated again.

    \b
    Examples:
      parsim plan --model llama-3.1-8b --hardware h100-sxm-80gb --gpus 64 --global-batch 512 \\
          --json > plan.json
      parsim report plan.json
      parsim report plan.json measurement.json -o study.html
    """
    from parsim.config import read_json
    from parsim.report.build import Finding

    findings = [Finding(document=read_json(path), where=str(path)) for path in documents]
    _write(findings, output)


def write_report(
    folder: Path | None, document: Mapping[str, Any], timelines: Sequence[Timeline] = ()
) -> None:
    """Write the report of a command's document into a folder, where one is asked for; its timelines are
    those that are not to be simulated again.
    """
    if folder is None:
        return
    from parsim.report.build import Finding

    command = str(document["command"])
    finding = Finding(document=document, where=command, timelines=tuple(timelines))
    _write([finding], folder / f"{command}.html")


def _write(findings: Sequence[Any], path: Path) -> None:
    from parsim.config import write_file
    from parsim.report.build import page_of
    from parsim.report.render import render

    write_file(path, render(page_of(findings)))
    say(f"wrote {path}")
