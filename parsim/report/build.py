"""The report of a command's JSON document, or of several in one page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from parsim.errors import ParsimError, did_you_mean
from parsim.report.document import Node
from parsim.report.of_capacity import capacity_chapter
from parsim.report.of_plan import plan_chapter
from parsim.report.of_run import run_chapter
from parsim.report.of_simulate import simulate_chapter
from parsim.report.of_validate import validate_chapter
from parsim.report.page import Chapter, Page
from parsim.timeline import Timeline

CHAPTERS: dict[str, Callable[[Node, tuple[Timeline, ...]], Chapter]] = {
    "plan": lambda document, _: plan_chapter(document),
    "simulate": simulate_chapter,
    "capacity": lambda document, _: capacity_chapter(document),
    "run": run_chapter,
    "validate": validate_chapter,
}
"""Commands that have reports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A document, and the timelines behind it that it does not hold."""

    document: Mapping[str, Any]
    where: str
    """What to call it in messages: a command, or a file."""
    timelines: tuple[Timeline, ...] = ()


def page_of(findings: Sequence[Finding]) -> Page:
    """A page with a chapter for each document.

    Raises ParsimError for what is no document of a command that has reports, or is damaged.
    """
    chapters = []
    for finding in findings:
        if not isinstance(finding.document, Mapping):
            raise ParsimError("a document is a table", where=finding.where, got=finding.document)
        node = Node(data=finding.document, where=finding.where)
        command = node.text("command", "")
        if command not in CHAPTERS:
            raise ParsimError(
                "there is no report of this document",
                where=f"{finding.where}: command",
                got=command or "nothing",
                expected=f"what {', '.join(CHAPTERS)} write with --json",
                hint=did_you_mean(command, CHAPTERS),
            )
        chapters.append(CHAPTERS[command](node, finding.timelines))
    title = "; ".join(f"{chapter.command}: {chapter.title}" for chapter in chapters)
    return Page(title=title, chapters=tuple(chapters))
