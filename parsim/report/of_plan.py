"""The report of `parsim plan`: the plan to take, and how the others stand to it."""

from __future__ import annotations

from parsim.cost.stage import CostModel
from parsim.errors import ParsimError
from parsim.plan import recompute_text
from parsim.plan_file import plan_from_data
from parsim.report.document import Node
from parsim.report.item import (
    answer_of,
    breakdown_section,
    memory_section_parts,
    plan_text,
    robust_section,
    shares_of,
)
from parsim.report.page import Cell, Chapter, Column, Lines, Part, Picture, Row, Section, Table
from parsim.report.plot import Line, Plot, Point, Rule, linear_axis
from parsim.report.sources import inputs_section, reproduce_section
from parsim.report.step import step_of, timeline_sections
from parsim.search.pareto import pareto_front
from parsim.units import format_bytes, format_duration

SIZES = ("dp", "tp", "pp", "cp", "ep", "vpp")


def plan_chapter(document: Node) -> Chapter:
    """The chapter of a `plan --json` document.

    Raises ParsimError where it holds no plan.
    """
    items = document.tables("plans")
    if not items:
        raise ParsimError(
            "this document holds no plan, so there is nothing to report", where=document.where
        )
    chosen, index = items[0], 0
    reason = ""
    if "recommended" in document:
        advice = document.table("recommended")
        chosen, index = advice.table("item"), int(advice.number("index"))
        reason = advice.text("reason")
    step = step_of(chosen)
    space = document.table("space")
    answer = answer_of(chosen, step.costs, binds=step.binds, verdict=_verdict(document, space, reason))
    sections = [
        Section(title="Ranking", parts=(_ranking(items, index, chosen),)),
        breakdown_section(chosen),
        *timeline_sections(step, memory_section_parts(chosen, step.costs)),
    ]
    robust = robust_section(chosen)
    if robust is not None:
        sections.append(robust)
    if len(items) > 1:
        sections.append(_pareto(items, index, step.costs))
    sections += [
        _space(space, document),
        inputs_section({"the plan": step}, document),
        reproduce_section(document, chosen),
    ]
    title = f"{chosen.table('model').text('name')} on {chosen.number('gpus'):,.0f} GPUs"
    return Chapter(command="plan", title=title, answers=(answer,), sections=tuple(sections))


def _verdict(document: Node, space: Node, reason: str) -> str:
    count = f"{space.number('enumerated'):,.0f}"
    proof = (
        f"Proven: of {count} plans no other is faster under this model."
        if document.truth("optimal")
        else f"Not proven: the search of {count} plans stopped before all others were ruled out."
    )
    return f"{proof} {reason[:1].upper()}{reason[1:]}" + ("." if reason else "")


def _ranking(items: list[Node], index: int, chosen: Node) -> Table:
    first = items[0]
    shown = list(enumerate(items)) + ([(index, chosen)] if index >= len(items) else [])
    rows = [_row(place, item, first, marked=place == index) for place, item in shown]
    more = (
        Column(key="step", title="step", numeric=True, help="step time"),
        Column(key="mfu", title="MFU", numeric=True, help="model FLOPs over the dense peak, in %"),
        Column(key="goes", title="where it goes", help="sorted by the share of compute"),
        Column(key="bubble", title="bubble", numeric=True, help="in %"),
        Column(key="comm", title="comm", numeric=True, help="exposed communication, in %"),
        Column(key="memory", title="memory", numeric=True, help="peak of the fullest rank, in GiB"),
        Column(key="worst", title="at worst", numeric=True, help="step time in its worst case"),
        Column(key="why", title="why not first", help="what costs most against the first"),
    )
    columns = (
        Column(key="rank", title="#", numeric=True, help="by predicted step time"),
        *(Column(key=key, title=key, numeric=True) for key in SIZES),
        Column(key="mb", title="mb", numeric=True, help="sequences of a micro-batch"),
        Column(key="schedule", title="schedule"),
        Column(key="zero", title="zero", numeric=True, help="ZeRO stage"),
        Column(key="sp", title="sp", help="sequence parallelism"),
        Column(key="recompute", title="recompute"),
        Column(key="precision", title="dtype"),
        *more,
    )
    kept = _kept_columns(columns, rows)
    return Table(
        caption="The fastest plans; the highlighted one is the one to take",
        columns=tuple(columns[i] for i in kept),
        rows=tuple(Row(cells=tuple(r.cells[i] for i in kept), marked=r.marked) for r in rows),
        note="by words or by columns, as in: tp=8 pp<=4 schedule=zb mfu>40; a click on a heading sorts",
    )


def _kept_columns(columns: tuple[Column, ...], rows: list[Row]) -> list[int]:
    """Columns that say something: cp and ep where they vary or are not 1, one dtype not at all."""
    ones = {"cp": "1", "ep": "1", "vpp": "1"}
    kept = []
    for i, column in enumerate(columns):
        texts = {row.cells[i].text for row in rows}
        if column.key == "precision" and len(texts) == 1:
            continue
        if texts in ({ones.get(column.key)}, {""}):
            continue
        kept.append(i)
    return kept


def _row(place: int, item: Node, first: Node, *, marked: bool) -> Row:
    plan, step_s = item.table("plan"), item.positive("step_time_s")
    parts = item.seconds("breakdown_s")
    file = plan_from_data(dict(item.data), where=item.where)
    if file.job is None:
        raise ParsimError("this item does not say what is trained", where=item.where)
    exposed = sum(s for key, s in parts.items() if key.endswith("_exposed")) / step_s
    shares = shares_of(parts)
    said = ", ".join(f"{share.label} {share.share:.0%}" for share in shares)
    peak = item.seconds("memory_bytes").get("peak", 0.0)
    worst_s = item.table("robust").number("worst_step_time_s") if "robust" in item else None
    cells = [
        Cell(text=str(place + 1), value=place + 1),
        *(Cell(text=f"{plan.number(key):.0f}", value=plan.number(key)) for key in SIZES),
        Cell(text=f"{plan.number('micro_batch'):.0f}", value=plan.number("micro_batch")),
        Cell(text=plan.text("schedule"), value=plan.text("schedule")),
        Cell(text=f"{plan.number('zero'):.0f}", value=plan.number("zero")),
        _word("yes" if plan.truth("sequence_parallel") else "no"),
        _word(recompute_text(file.job.model, file.plan)),
        _word(file.job.precision),
        Cell(text=format_duration(step_s), value=step_s),
        Cell(text=f"{item.number('mfu'):.1%}", value=100 * item.number("mfu")),
        Cell(text=said, value=parts.get("compute", 0.0) / step_s, shares=shares),
        Cell(text=f"{item.number('bubble_fraction'):.1%}", value=100 * item.number("bubble_fraction")),
        Cell(text=f"{exposed:.1%}", value=100 * exposed),
        Cell(text=format_bytes(peak), value=peak / 2**30),
        Cell(text=format_duration(worst_s) if worst_s else "", value=worst_s),
        _word(_why_slower(item, first)),
    ]
    return Row(cells=tuple(cells), marked=marked)


def _word(text: str) -> Cell:
    return Cell(text=text, value=text)


def _why_slower(item: Node, first: Node) -> str:
    """The part of the step that costs a plan most against the first."""
    mine, theirs = (node.seconds("breakdown_s") for node in (item, first))
    more = {key: seconds - theirs.get(key, 0.0) for key, seconds in mine.items()}
    key = max(more, key=lambda each: more[each])
    return f"{key.removesuffix('_exposed')} +{format_duration(more[key])}" if more[key] > 0 else ""


def _pareto(items: list[Node], index: int, costs: CostModel | None) -> Section:
    """Step time against memory of the listed plans."""
    places = [(item.positive("step_time_s"), item.seconds("memory_bytes")["peak"]) for item in items]
    front = pareto_front(places)
    rules = []
    if costs is not None:
        there = costs.cluster.device.memory_bytes - costs.stack.context_bytes
        rules.append(Rule(value=there, text=f"a device offers {format_bytes(there)}"))
    points = [
        Point(
            x=seconds,
            y=peak,
            text=f"{plan_text(item)}: {format_duration(seconds)}, {format_bytes(peak)}",
            hollow=i not in front,
            ringed=i == index,
            label=str(i + 1),
        )
        for i, (item, (seconds, peak)) in enumerate(zip(items, places, strict=True))
    ]
    line = Line(points=tuple(sorted(places[i] for i in front)), color="muted", steps=True)
    plot = Plot(
        alt=f"Step time against peak memory of {len(items)} plans; {len(front)} of them are beaten by "
        "no other in both.",
        x=linear_axis("step time", (s for s, _ in places), format_duration, zero=False),
        y=linear_axis(
            "peak memory of the fullest rank",
            [*(peak for _, peak in places), *(rule.value for rule in rules)],
            format_bytes,
            zero=False,
            unit=2.0**30,
        ),
        lines=(line,),
        points=tuple(points),
        rules=tuple(rules),
    )
    caption = (
        "Each number is a plan of the ranking; filled: none of them is better in both; "
        "ring: the plan to take"
    )
    parts: tuple[Part, ...] = (Picture(caption=caption, plot=plot),)
    finding = f"{len(front)} of the {len(items)} fastest plans are on the front of time and memory"
    return Section(title="Time against memory", finding=finding, parts=parts)


def _space(space: Node, document: Node) -> Section:
    """What became of all plans."""
    enumerated = space.number("enumerated")
    rejected = space.seconds("rejected")
    rows = [
        Row(
            cells=(
                Cell(text=what, value=what),
                Cell(text=f"{count:,.0f}", value=count),
                Cell(text=f"{count / enumerated:.1%}" if enumerated else "", value=count),
            )
        )
        for what, count in {"fit": space.number("fits"), **rejected}.items()
    ]
    table = Table(
        caption="What became of the plans",
        columns=(
            Column(key="what", title="outcome"),
            Column(key="plans", title="plans", numeric=True),
            Column(key="share", title="share", numeric=True),
        ),
        rows=tuple(rows),
        plain=True,
    )
    finding = f"{enumerated:,.0f} plans, {space.number('fits'):,.0f} of them fit"
    lines: tuple[Part, ...] = ()
    given = document.table("inputs").table("constraints").data if "inputs" in document else {}
    if given:
        words = ", ".join(f"{key}: {value}" for key, value in given.items())
        lines = (Lines(lines=(f"Searched under constraints: {words}.",)),)
    return Section(title="The space that was searched", finding=finding, parts=(table, *lines))
