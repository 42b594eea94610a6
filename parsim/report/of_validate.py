"""The report of `parsim validate`: predictions against measurements."""

from __future__ import annotations

import math
from collections import Counter

from parsim.errors import ParsimError
from parsim.report.compared_step import step_chapter
from parsim.report.document import Node
from parsim.report.page import (
    Answer,
    Cell,
    Chapter,
    Column,
    Fact,
    Lines,
    Picture,
    Row,
    Section,
    Table,
)
from parsim.report.plot import Line, Plot, Point, log_axis
from parsim.report.sources import inputs_section, reproduce_section
from parsim.timeline import Timeline
from parsim.units import format_bytes, format_duration

MOST_ROWS = 2_000
"""Rows of a table; of more, those with the largest errors are shown."""
PIXEL = 0.004
"""Points closer than this, as a share of a factor of ten, are one."""


def validate_chapter(document: Node, timelines: tuple[Timeline, ...] = ()) -> Chapter:
    """The chapter of a `validate --json` document: of one step, of runs, or of kernels."""
    if "parts" in document:
        return step_chapter(document, timelines)
    if "rows" not in document:
        raise ParsimError("this document compares nothing", where=document.where)
    return _rows_chapter(document)


def _rows_chapter(document: Node) -> Chapter:
    """Runs (times in seconds) or kernels (in milliseconds)."""
    unit_s, suffix = (1e-3, "_ms") if _is_of_kernels(document) else (1.0, "_s")
    rows, summary = document.tables("rows"), document.table("summary")
    noun = "kernels" if suffix == "_ms" else "runs"
    known = [row for row in rows if "error" in row]
    sections: list[Section] = []
    if known:
        sections.append(_scatter(known, suffix, unit_s, noun))
    if "summary_by" in document:
        sections.append(_summaries(document))
    sections.append(_rows_section(rows, suffix, unit_s, noun))
    unsupported = Counter(row.text("reason", "") for row in rows if row.text("status") != "ok")
    if unsupported:
        lines = tuple(f"{count:,} rows: {reason}" for reason, count in unsupported.most_common(50))
        sections.append(Section(title="Not predicted", parts=(Lines(lines=lines),)))
    sections += [inputs_section({}, document), reproduce_section(document)]
    return Chapter(
        command="validate",
        title=f"{len(rows):,} measured {noun}",
        answers=(_rows_answer(document, summary, noun),),
        sections=tuple(sections),
    )


def _is_of_kernels(document: Node) -> bool:
    return any("measured_ms" in row for row in document.tables("rows"))


def _rows_answer(document: Node, summary: Node, noun: str) -> Answer:
    rows, ok = summary.number("rows"), summary.number("ok")
    if "mape" not in summary:
        return Answer(headline=f"None of {rows:,.0f} {noun} could be predicted")
    mape, median = summary.number("mape"), summary.number("median_ape")
    facts = [
        Fact(label="Mean error", value=f"{mape:.1%}", note=f"of {ok:,.0f} {noun}"),
        Fact(
            label="Median",
            value=f"{median:.1%}",
            note=f"90% are within {summary.number('p90_ape'):.1%}",
        ),
        Fact(label="Bias", value=f"{summary.number('bias'):+.1%}", note="above 0: predicted too long"),
        Fact(
            label="Predicted",
            value=f"{ok:,.0f} of {rows:,.0f}",
            note="the others are listed with their reasons",
            meter=ok / rows if rows else 0.0,
            meter_text="share of the rows",
        ),
    ]
    if "interval_coverage" in summary:
        inside = summary.number("interval_coverage")
        facts.append(
            Fact(label="Inside the 90% interval", value=f"{inside:.0%}", note="of measured times")
        )
    ranking = document.tables("ranking") if "ranking" in document else []
    if ranking:
        regret = sum(group.number("regret") for group in ranking) / len(ranking)
        facts.append(
            Fact(
                label="Regret",
                value=f"{regret:.1%}",
                note=f"of the plan it likes best, mean of {len(ranking)} groups",
            )
        )
    headline = f"{mape:.1%} mean error over {ok:,.0f} measured {noun}"
    return Answer(headline=headline, facts=tuple(facts))


def _scatter(rows: list[Node], suffix: str, unit_s: float, noun: str) -> Section:
    """Predicted over measured times; the band is 10% to either side."""
    series = list(dict.fromkeys(row.text("hardware", "") for row in rows))
    shown: dict[tuple[int, int], Point] = {}
    for row in rows:
        measured_s, predicted_s = (
            unit_s * row.number(f"{w}{suffix}") for w in ("measured", "predicted")
        )
        if not (measured_s > 0 and predicted_s > 0):
            continue
        place = (round(math.log10(measured_s) / PIXEL), round(math.log10(predicted_s) / PIXEL))
        text = (
            f"{row.text('id', '')}: measured {format_duration(measured_s)}, predicted "
            f"{format_duration(predicted_s)} ({row.number('error'):+.1%})"
        )
        number = series.index(row.text("hardware", "")) % 8
        shown.setdefault(place, Point(x=measured_s, y=predicted_s, text=text, series=number))
    points = tuple(shown.values())
    times = [time_s for point in points for time_s in (point.x, point.y)]
    ends = (min(times) / 1.15, max(times) * 1.15)
    lines = [
        Line(points=tuple((s, s * f) for s in ends), color="muted", dashed=f != 1) for f in (1, 1.1, 0.9)
    ]
    plot = Plot(
        alt=f"Predicted against measured times of {len(rows)} {noun}, most of them near the diagonal.",
        x=log_axis("measured (log scale)", times, format_duration),
        y=log_axis("predicted (log scale)", times, format_duration),
        lines=tuple(lines),
        points=points,
        legend=tuple((f"s{i % 8}", name) for i, name in enumerate(series) if name)[:8],
    )
    merged = f"; {len(rows) - len(points):,} points lie under others" if len(points) < len(rows) else ""
    picture = Picture(caption=f"On the line: predicted as measured; dashed: 10% off{merged}", plot=plot)
    return Section(title="Predicted against measured", parts=(picture,))


def _summaries(document: Node) -> Section:
    rows = []
    for kind, groups in document.table("summary_by").each():
        for name, summary in groups.each():
            rows.append(_summary_row(kind, name, summary))
    columns = (
        Column(key="by", title="by"),
        Column(key="group", title="group"),
        Column(key="rows", title="rows", numeric=True),
        Column(key="ok", title="predicted", numeric=True),
        Column(key="mean", title="mean", numeric=True, help="in %"),
        Column(key="median", title="median", numeric=True, help="in %"),
        Column(key="p90", title="p90", numeric=True, help="in %"),
        Column(key="bias", title="bias", numeric=True, help="in %"),
    )
    table = Table(caption="Errors by group", columns=columns, rows=tuple(rows))
    return Section(title="Where it is good and where not", parts=(table,))


def _summary_row(kind: str, name: str, summary: Node) -> Row:
    shares = [summary.optional(key) for key in ("mape", "median_ape", "p90_ape", "bias")]
    forms = (".1%", ".1%", ".1%", "+.1%")
    return Row(
        cells=(
            Cell(text=kind, value=kind),
            Cell(text=name, value=name),
            *(
                Cell(text=f"{summary.number(key):,.0f}", value=summary.number(key))
                for key in ("rows", "ok")
            ),
            *(
                Cell(
                    text="" if share is None else f"{share:{form}}",
                    value=None if share is None else 100 * share,
                )
                for share, form in zip(shares, forms, strict=True)
            ),
        )
    )


def _rows_section(rows: list[Node], suffix: str, unit_s: float, noun: str) -> Section:
    order = sorted(range(len(rows)), key=lambda i: -abs(rows[i].optional("error") or 0.0))
    kept = sorted(order[:MOST_ROWS])
    columns = [
        Column(key="id", title="id"),
        Column(key="status", title="status"),
        Column(key="hardware", title="hardware"),
        Column(key="stack", title="stack"),
        Column(key="measured", title="measured", numeric=True, help="in seconds"),
        Column(key="predicted", title="predicted", numeric=True, help="in seconds"),
        Column(key="error", title="error", numeric=True, help="in %"),
        Column(key="size", title="size", numeric=True, help="of the error, in %"),
        Column(key="memory", title="peak memory", numeric=True, help="predicted, in GiB"),
        Column(key="note", title="note", wide=True),
    ]
    made = [_result_row(rows[i], suffix, unit_s) for i in kept]
    used = [i for i in range(len(columns)) if any(row.cells[i].text for row in made)]
    left_out = len(rows) - len(kept)
    table = Table(
        caption=f"All {noun}"
        if not left_out
        else f"The {len(kept):,} {noun} with the largest errors; {left_out:,} others are in --json",
        columns=tuple(columns[i] for i in used),
        rows=tuple(Row(cells=tuple(row.cells[i] for i in used)) for row in made),
        note="by words or by columns, as in: h100 size>10 status=ok; a click on a heading sorts",
    )
    return Section(title=noun.capitalize(), parts=(table,))


def _result_row(row: Node, suffix: str, unit_s: float) -> Row:
    name = f"row {row.number('row'):.0f}" if "row" in row else row.text("id", "")
    texts = [name, *(row.text(key, "") for key in ("status", "hardware", "stack"))]
    times = [row.optional(f"{key}{suffix}") for key in ("measured", "predicted")]
    error, peak = row.optional("error"), row.optional("predicted_peak_bytes")
    note = row.text("memory_warning", "") or row.text("reason", "")
    return Row(
        cells=(
            *(Cell(text=text, value=text) for text in texts),
            *(
                Cell(
                    text="" if t is None else format_duration(unit_s * t),
                    value=None if t is None else unit_s * t,
                )
                for t in times
            ),
            Cell(
                text="" if error is None else f"{error:+.1%}",
                value=None if error is None else 100 * error,
            ),
            Cell(
                text="" if error is None else f"{abs(error):.1%}",
                value=None if error is None else 100 * abs(error),
            ),
            Cell(text="" if peak is None else format_bytes(peak), value=peak and peak / 2**30),
            Cell(text=note, value=note),
        )
    )
