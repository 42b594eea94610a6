"""The report of `parsim capacity`: which cluster to take, for how long and for how much."""

from __future__ import annotations

from parsim.report.capacity_curves import pareto_sections, scaling_section, sensitivity_section
from parsim.report.document import Node
from parsim.report.item import (
    breakdown_section,
    memory_section_parts,
    plan_text,
    shares_of,
)
from parsim.report.page import Answer, Cell, Chapter, Column, Fact, Lines, Row, Section, Table
from parsim.report.schedule import MOST_SPANS
from parsim.report.sources import inputs_section, reproduce_section
from parsim.report.step import Step, step_of, timeline_sections
from parsim.units import format_bytes, format_count, format_duration, format_usd


def capacity_chapter(document: Node) -> Chapter:
    """The chapter of a `capacity --json` document."""
    rows = document.tables("rows")
    chosen: dict[str, Node] = {}
    answers = []
    by_model = dict.fromkeys(row.table("model").text("name") for row in rows)
    found = document.table("answers")
    for model in by_model:
        own = found.tables(model) if model in found else []
        if own:
            chosen[model] = rows[int(own[0].number("row"))]
        answers.append(_answer(model, own, rows))
    refused = document.tables("refused")
    models_refused = dict.fromkeys(no.text("model") for no in refused)
    answers += [
        Answer(headline=f"{model}: no plan on any of these clusters")
        for model in models_refused
        if model not in by_model
    ]
    steps = {model: step_of(item) for model, item in chosen.items()}
    sections = [_options(rows, chosen), *pareto_sections(rows, chosen, document)]
    sections += scaling_section(document)
    sections += sensitivity_section(document)
    sections += _step_sections(chosen, steps)
    if refused:
        sections.append(_refused(refused))
    sections += [_notes(document), inputs_section(steps, document)]
    first = next(iter(chosen.values()), None)
    sections.append(reproduce_section(document, first))
    title = f"training {', '.join(by_model) or 'capacity'}"
    return Chapter(command="capacity", title=title, answers=tuple(answers), sections=tuple(sections))


def _answer(model: str, own: list[Node], rows: list[Node]) -> Answer:
    if not own:
        return Answer(headline=f"{model}: no cluster trains it within the limits")
    answer = own[0]
    row = rows[int(answer.number("row"))]
    cluster = f"{row.number('gpus'):,.0f} × {row.text('hardware')}"
    usd = row.optional("usd")
    cost = "" if usd is None else f" for {format_usd(usd)}"
    facts = [
        Fact(label="Time to train", value=f"{days_text(row)} days", note=_interval_text(row)),
        _cost_fact(row),
        Fact(
            label="Step time and MFU",
            value=f"{format_duration(row.positive('step_time_s'))}, {row.number('mfu'):.1%}",
            note=f"{row.number('tokens_per_s_per_gpu'):,.0f} tokens/s a GPU",
            meter=row.number("mfu"),
            meter_text="MFU",
        ),
        Fact(
            label="Goodput",
            value=f"{row.number('goodput'):.1%}",
            note=f"of the time trains and is kept; a failure every {_mtbf(row)}",
            meter=row.number("goodput"),
            meter_text="share of the time that trains and is kept",
        ),
        Fact(
            label="Memory",
            value=format_bytes(sum_memory(row)),
            note=f"on the fullest rank; {row.number('memory_headroom'):.0%} stays free",
            meter=1 - row.number("memory_headroom"),
            meter_text="share of device memory in use",
            warns=row.number("memory_headroom") < 0,
        ),
        Fact(label="What binds", value=row.text("binds"), sentence=True),
    ]
    others = "; ".join(
        f"{each.text('objective')}: {_place(rows[int(each.number('row'))])}" for each in own
    )
    return Answer(
        headline=f"{model}: {cluster}, {days_text(row)} days{cost}",
        plan=plan_text(row),
        facts=tuple(facts),
        verdict=f"The {answer.text('objective')}: {answer.text('reason')}. Of all: {others}.",
    )


def _cost_fact(row: Node) -> Fact:
    usd, energy = row.optional("usd"), f"{row.number('energy_kwh') / 1000:,.0f} MWh of the GPUs"
    if usd is None:
        return Fact(label="Cost", value="unknown", note=f"no price in the profile; {energy}")
    low, high = row.numbers("usd_interval")
    return Fact(
        label="Cost",
        value=format_usd(usd),
        note=f"{format_usd(low)} to {format_usd(high)}, {energy}; "
        f"{row.number('usd_per_gpu_hour'):.2f} USD a GPU-hour, {row.text('price_source')}",
    )


def _mtbf(row: Node) -> str:
    return format_duration(row.number("mtbf_s")) if "mtbf_s" in row else "–"


def _place(row: Node) -> str:
    usd = row.optional("usd")
    cost = "" if usd is None else f", {format_usd(usd)}"
    return f"{row.number('gpus'):,.0f} × {row.text('hardware')}, {days_text(row)} days{cost}"


def days_text(row: Node) -> str:
    """Days to train, failures included; "never" where they let it make no progress."""
    days = row.optional("days")
    if days is None:
        return "never"
    return f"{days:.0f}" if days >= 100 else f"{days:.1f}" if days >= 1 else f"{days:.2g}"


def _interval_text(row: Node) -> str:
    if "days" not in row:
        return "failures let it make no progress"
    low, high = row.numbers("days_interval")
    return f"90% interval {low:.3g} to {high:.3g}; {row.number('days_ideal'):.3g} without failures"


def sum_memory(row: Node) -> float:
    """Allocator and context of the fullest rank."""
    memory = row.seconds("memory_bytes")
    return memory.get("peak", 0.0) + memory.get("context", 0.0)


def _options(rows: list[Node], chosen: dict[str, Node]) -> Section:
    columns = (
        Column(key="model", title="model"),
        Column(key="hardware", title="hardware"),
        Column(key="gpus", title="GPUs", numeric=True),
        Column(key="step", title="step", numeric=True),
        Column(key="mfu", title="MFU", numeric=True, help="in %"),
        Column(key="goes", title="where it goes", help="sorted by the share of compute"),
        Column(key="goodput", title="goodput", numeric=True, help="in %"),
        Column(key="days", title="days", numeric=True),
        Column(key="gpu_hours", title="GPU-hours", numeric=True),
        Column(key="usd", title="USD", numeric=True),
        Column(key="mwh", title="MWh", numeric=True),
        Column(key="free", title="free memory", numeric=True, help="in %"),
        Column(key="pareto", title="Pareto", help="none other is better in time, cost, GPUs and memory"),
        Column(key="plan", title="plan", wide=True),
    )
    table = Table(
        caption="Every cluster with its best plans; the highlighted ones are those to take",
        columns=columns,
        rows=tuple(
            _option_row(row, marked=any(row is each for each in chosen.values())) for row in rows
        ),
        note="by words or by columns, as in: h100 gpus>=1024 usd<5000000 pareto=yes; "
        "a click on a heading sorts",
    )
    return Section(title="Options", parts=(table,))


def _option_row(row: Node, *, marked: bool) -> Row:
    usd, shares = row.optional("usd"), shares_of(row.seconds("breakdown_s"))
    said = ", ".join(f"{share.label} {share.share:.0%}" for share in shares)
    model, hardware, plan = row.table("model").text("name"), row.text("hardware"), plan_text(row)
    headroom, energy = row.number("memory_headroom"), row.number("energy_kwh") / 1000
    pareto = "yes" if row.truth("pareto") else "no"
    gpu_hours = row.optional("gpu_hours")
    cells = (
        Cell(text=model, value=model),
        Cell(text=hardware, value=hardware),
        Cell(text=f"{row.number('gpus'):,.0f}", value=row.number("gpus")),
        Cell(text=format_duration(row.positive("step_time_s")), value=row.positive("step_time_s")),
        Cell(text=f"{row.number('mfu'):.1%}", value=100 * row.number("mfu")),
        Cell(text=said, value=row.seconds("breakdown_s").get("compute"), shares=shares),
        Cell(text=f"{row.number('goodput'):.1%}", value=100 * row.number("goodput")),
        Cell(text=days_text(row), value=row.optional("days")),
        Cell(text="–" if gpu_hours is None else format_count(gpu_hours), value=gpu_hours),
        Cell(text="?" if usd is None else format_usd(usd), value=usd),
        Cell(text=f"{energy:,.4g}", value=energy),
        Cell(text=f"{headroom:.0%}", value=100 * headroom),
        Cell(text=pareto, value=pareto),
        Cell(text=plan, value=plan),
    )
    return Row(cells=cells, marked=marked)


def _step_sections(chosen: dict[str, Node], steps: dict[str, Step]) -> list[Section]:
    """The step of each model's cluster."""
    sections = []
    for model, item in chosen.items():
        of = model if len(chosen) > 1 else ""
        breakdown = breakdown_section(item)
        title = f"{breakdown.title}: {model}" if of else breakdown.title
        sections.append(Section(title=title, finding=breakdown.finding, parts=breakdown.parts))
        sections += timeline_sections(
            steps[model],
            memory_section_parts(item, steps[model].costs),
            of=of,
            most_spans=MOST_SPANS // len(chosen),
        )
    return sections


def _refused(refused: list[Node]) -> Section:
    rows = [
        Row(
            cells=tuple(
                Cell(text=text, value=text)
                for text in (
                    no.text("model"),
                    f"{no.number('gpus'):,.0f} × {no.text('hardware')}",
                    no.text("reason"),
                )
            )
        )
        for no in refused
    ]
    table = Table(
        caption="Clusters without a plan",
        columns=(
            Column(key="model", title="model"),
            Column(key="cluster", title="cluster"),
            Column(key="reason", title="why", wide=True),
        ),
        rows=tuple(rows),
    )
    return Section(title="What does not work", parts=(table,))


def _notes(document: Node) -> Section:
    lines = [
        "Intervals are 90%. Pareto: no other is better in time, cost, GPUs and free memory.",
        "Energy is that of the GPUs alone, at half the board power limit while they do not compute.",
        *(f"Assumed: {text}." for text in document.texts("assumed")),
    ]
    if document.truth("partial"):
        lines.insert(0, "INTERRUPTED: only what was done by then is shown.")
    return Section(title="How to read it", parts=(Lines(lines=tuple(lines)),))
