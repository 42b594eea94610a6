"""The report of `parsim validate PREDICTION MEASUREMENT`: one step, predicted and measured."""

from __future__ import annotations

from parsim.plan import ParallelPlan
from parsim.plan_file import PlanFile
from parsim.report.document import Node
from parsim.report.page import (
    Answer,
    Bar,
    Cell,
    Chapter,
    Column,
    Fact,
    Row,
    Section,
    Table,
    Waterfall,
)
from parsim.report.parts import comparison_table, off_by
from parsim.report.sources import inputs_section, reproduce_section
from parsim.report.step import Step, timeline_sections
from parsim.timeline import Timeline
from parsim.units import format_duration


def step_chapter(document: Node, timelines: tuple[Timeline, ...]) -> Chapter:
    """The chapter of a comparison; `timelines` are predicted and measured, where they are known."""
    predicted_s, measured_s = document.number("predicted_s"), document.number("measured_s")
    error = document.number("error")
    parts = document.tables("parts")
    worst = max(parts, key=lambda part: abs(part.number("difference_s")))
    answer = Answer(
        headline=f"Predicted {format_duration(predicted_s)}, measured {format_duration(measured_s)}: "
        f"{off_by(error)}",
        facts=(
            Fact(label="Predicted", value=format_duration(predicted_s)),
            Fact(label="Measured", value=format_duration(measured_s)),
            Fact(label="Error", value=f"{error:+.1%}", note="predicted over measured, less 1"),
            Fact(
                label="Largest part of the error",
                value=f"{worst.text('what')}: {worst.number('share_of_error'):+.1%} of the step",
                sentence=True,
            ),
        ),
    )
    table = comparison_table(
        {part.text("what"): part.number("predicted_s") for part in parts},
        {part.text("what"): part.number("measured_s") for part in parts},
        step_s=measured_s,
    )
    finding = document.text("finding", "")
    sections = [Section(title="Where the error is", finding=finding, parts=(table,))]
    if document.data.get("causes"):
        sections.append(_causes(document, predicted_s, measured_s))
    if timelines:
        sections += timeline_sections(Step(file=PlanFile(plan=ParallelPlan()), timelines=timelines))
    if document.data.get("actions"):
        sections.append(_actions(document))
    sections += [inputs_section({}, document), reproduce_section(document)]
    return Chapter(
        command="validate",
        title="one step",
        answers=(answer,),
        sections=tuple(sections),
    )


def _causes(document: Node, predicted_s: float, measured_s: float) -> Section:
    """From the predicted step to the measured one, cause by cause."""
    causes = document.tables("causes")
    heights = [predicted_s]
    for cause in causes:
        heights.append(heights[-1] - cause.number("difference_s"))
    widest = max(*heights, measured_s)
    bars = [_whole_bar("predicted", predicted_s, widest)]
    for cause, before, after in zip(causes, heights, heights[1:], strict=False):
        bars.append(
            Bar(
                label=f"{cause.text('what')} as measured",
                value=("+" if after >= before else "−") + format_duration(abs(after - before)),
                share=f"{(after - before) / measured_s:+.1%}",
                start=round(min(before, after) / widest, 5),
                end=round(max(before, after) / widest, 5),
                key="s1" if after > before else "s0",
            )
        )
    bars.append(_whole_bar("measured", measured_s, widest))
    waterfall = Waterfall(
        caption="The predicted step, replayed with what was measured of one part after another",
        bars=tuple(bars),
    )
    return Section(title="What explains the error", parts=(waterfall,))


def _whole_bar(label: str, seconds: float, widest: float) -> Bar:
    return Bar(
        label=label,
        value=format_duration(seconds),
        share="",
        start=0.0,
        end=round(seconds / widest, 5),
        key="total",
        total=True,
    )


def _actions(document: Node) -> Section:
    """Actions by stage and kind, predicted and measured."""
    rows = []
    for action in document.tables("actions"):
        times = [action.number(key) for key in ("predicted_s", "measured_s", "fastest_s", "slowest_s")]
        error = times[0] / times[1] - 1 if times[1] else None
        cells = [
            Cell(text=action.text("name"), value=action.text("name")),
            Cell(text=f"{action.number('number'):,.0f}", value=action.number("number")),
            *(Cell(text=format_duration(time_s), value=time_s) for time_s in times),
            Cell(text=action.text("slowest"), value=action.text("slowest")),
            Cell(text="" if error is None else f"{error:+.1%}", value=error and 100 * error),
        ]
        rows.append(Row(cells=tuple(cells)))
    table = Table(
        caption="Actions over micro-batches and replicas, those first that cost or save most in all",
        columns=(
            Column(key="action", title="action"),
            Column(key="number", title="number", numeric=True),
            Column(key="predicted", title="predicted", numeric=True),
            Column(key="measured", title="measured", numeric=True),
            Column(key="fastest", title="fastest", numeric=True),
            Column(key="slowest", title="slowest", numeric=True),
            Column(key="which", title="which"),
            Column(key="error", title="error", numeric=True, help="in %"),
        ),
        rows=tuple(rows),
    )
    return Section(title="Actions", parts=(table,))
