"""`parsim simulate --detail operations`: what some actions of a rank consist of."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parsim.cli.output import Section
from parsim.cli.output_paths import to_picture

if TYPE_CHECKING:
    from parsim.cli.simulated_step import SimulatedStep
    from parsim.simulate.detail import ActionDetail
    from parsim.timeline import Timeline


class Detail(StrEnum):
    """How closely actions are looked at."""

    OPERATIONS = "operations"


DetailOption = Annotated[
    Detail | None,
    typer.Option(
        "--detail", help="Show actions of one rank operation by operation, in JSON, trace and chart."
    ),
]
DetailRankOption = Annotated[
    int | None, typer.Option("--detail-rank", help="Whose actions (the first rank's if not given).")
]
DetailMicroBatchesOption = Annotated[
    int | None, typer.Option("--detail-micro-batches", help="Of its first so many micro-batches (1).")
]
DetailChartOption = Annotated[
    Path | None,
    typer.Option(
        "--detail-chart", help="Draw their operations: .png, .svg or .pdf.", callback=to_picture
    ),
]

LISTED = 8
"""Actions that are listed for a reader."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DetailRequest:
    """Which actions to look at."""

    rank: int = 0
    micro_batches: int = 1
    chart: Path | None = None


def read_detail(
    detail: Detail | None, rank: int | None, micro_batches: int | None, chart: Path | None
) -> DetailRequest | None:
    """What the flags ask for; raises ParsimError for one that means nothing without --detail."""
    from parsim.errors import ParsimError

    flags = {"rank": rank, "micro-batches": micro_batches, "chart": chart}
    if detail is None:
        for name, value in flags.items():
            if value is not None:
                raise ParsimError(
                    "this says which operations to show, and none are asked for",
                    where=f"--detail-{name}",
                    got=str(value),
                    hint="add --detail operations",
                )
        return None
    if micro_batches is not None and micro_batches < 1:
        raise ParsimError(
            "operations of no micro-batch are none",
            where="--detail-micro-batches",
            got=micro_batches,
            expected="1 or more",
        )
    return DetailRequest(rank=rank or 0, micro_batches=micro_batches or 1, chart=chart)


def detail_section(request: DetailRequest | None, step: SimulatedStep) -> tuple[Section, Timeline]:
    """What the operations add to the answer, and the timeline with them in their actions' place."""
    timeline = step.timeline
    if request is None:
        return Section(), timeline
    from parsim.simulate.detail import StepOperations, action_details, detailed, left_out

    operations = StepOperations(
        job=step.request.setup.job,
        plan=step.request.plan,
        costs=step.request.costs,
        schedule=step.request.schedule,
        costs_by_rank=step.request.costs_by_rank,
    )
    details = action_details(
        timeline, operations, rank=request.rank, micro_batches=request.micro_batches
    )
    paired = left_out(timeline, operations, rank=request.rank, micro_batches=request.micro_batches)
    item = {
        "rank": request.rank,
        "micro_batches": request.micro_batches,
        "actions": [_action_item(detail) for detail in details],
        "left_out": [str(action) for action in paired],
        "seconds": _by_name(details),
    }
    section = Section(item={"operations": item}, lines=_lines(details, timeline, request.rank))
    if paired:
        names = ", ".join(map(str, paired[:8])) + (" …" if len(paired) > 8 else "")
        section.lines.append(f"  not shown, as each runs mixed with another pass: {names}")
    if request.chart is not None:
        from parsim.charts.operations import draw_operations

        draw_operations(details, timeline, request.chart, rank=request.rank)
        section.written.append(request.chart)
    return section, detailed(timeline, details, rank=request.rank)


def _action_item(detail: ActionDetail) -> dict[str, Any]:
    seconds: dict[str, float] = defaultdict(float)
    for span in detail.spans:
        seconds[span.stream] += span.duration_s
    exposed = {
        stream: max(0.0, total_s - detail.hidden_s.get(stream, 0.0))
        for stream, total_s in sorted(seconds.items())
        if stream != "compute"
    }
    return {
        "action": str(detail.action),
        "start_s": detail.start_s,
        "end_s": detail.end_s,
        "spans": len(detail.spans),
        "compute_s": seconds["compute"],
        "exposed_s": exposed,
        "hidden_s": dict(sorted(detail.hidden_s.items())),
    }


def _by_name(details: list[ActionDetail]) -> dict[str, dict[str, float]]:
    """Seconds of each operation over all parts of the model, by what the time is for."""
    total: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for detail in details:
        for span in detail.spans:
            total[span.kind][span.name.partition(": ")[2]] += span.duration_s
    return {
        kind: dict(sorted(seconds.items(), key=lambda entry: (-entry[1], entry[0])))
        for kind, seconds in sorted(total.items())
    }


def _lines(details: list[ActionDetail], timeline: Timeline, rank: int) -> list[str]:
    """The longest operations of each action, as a reader wants them."""
    from parsim.units import format_duration

    lines = [f"operations of {timeline.rank_name(rank)}"]
    for detail in details[:LISTED]:
        total: dict[str, float] = defaultdict(float)
        for span in detail.spans:
            name = span.name.partition(": ")[2]
            total[name if span.stream == "compute" else f"{name} ({span.stream})"] += span.duration_s
        longest = sorted(total.items(), key=lambda entry: (-entry[1], entry[0]))[:5]
        named = ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in longest)
        hidden = "".join(
            f"; {stream} beside compute {format_duration(seconds)}"
            for stream, seconds in sorted(detail.hidden_s.items())
        )
        lasting = format_duration(detail.end_s - detail.start_s)
        lines.append(f"  {detail.action!s:<8} {lasting}: {named}{hidden}")
    if len(details) > LISTED:
        lines.append(f"  and {len(details) - LISTED} more actions (--json has all)")
    return lines
