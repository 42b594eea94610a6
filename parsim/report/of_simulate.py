"""The report of `parsim simulate`: one step of one plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from parsim.report.document import Node
from parsim.report.item import (
    answer_of,
    breakdown_section,
    memory_section_parts,
)
from parsim.report.page import Cell, Chapter, Column, Row, Section, Table
from parsim.report.sources import inputs_section, reproduce_section
from parsim.report.step import step_of, timeline_sections
from parsim.timeline import Timeline

USUAL = {
    *("schema_version", "version", "command", "command_line", "seed", "inputs", "input_files"),
    *("model", "hardware"),
    *("hardware_overrides", "stack", "job", "plan", "stage_layers", "gpus", "num_micro_batches"),
    *("step_time_s", "interval_s", "tokens_per_s_per_gpu", "model_tflops_per_gpu", "mfu"),
    *("mfu_causal", "bubble_fraction", "fits", "memory_bytes", "breakdown_s"),
}
"""Keys of every ITEM and document; what an option adds has others."""
MOST_FIGURES = 300


def simulate_chapter(document: Node, timelines: tuple[Timeline, ...] = ()) -> Chapter:
    """The chapter of a `simulate --json` document; without its timelines it is simulated again."""
    step = step_of(document, timelines)
    costs = None if "rank_hardware" in document.table("inputs") else step.costs
    verdict = "" if document.truth("fits") else "This plan does not fit in device memory."
    answer = answer_of(document, costs, binds=step.binds, verdict=verdict)
    sections = [
        breakdown_section(document),
        *timeline_sections(step, memory_section_parts(document, costs)),
    ]
    asked = {key: value for key, value in document.data.items() if key not in USUAL}
    if asked:
        sections.append(_more(asked))
    sections += [inputs_section({"the plan": step}, document), reproduce_section(document, document)]
    title = f"{document.table('model').text('name')}, one step"
    return Chapter(command="simulate", title=title, answers=(answer,), sections=tuple(sections))


def _more(asked: Mapping[str, Any]) -> Section:
    """What options added to the answer, figure by figure."""
    figures = list(_flat(asked))
    rows = tuple(
        Row(cells=(Cell(text=name, value=name), Cell(text=text, value=text)))
        for name, text in figures[:MOST_FIGURES]
    )
    left_out = len(figures) - len(rows)
    table = Table(
        caption="As --json has it" + (f"; {left_out:,} more figures are only there" if left_out else ""),
        columns=(Column(key="what", title="figure"), Column(key="value", title="value", wide=True)),
        rows=rows,
    )
    return Section(title="What else was asked", parts=(table,))


def _flat(data: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Every figure of nested tables and lists with its place.

    >>> list(_flat({"goodput": {"share": 0.9}, "late": [1, 2]}))
    [('goodput.share', '0.9'), ('late', '1, 2')]
    """
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    elif isinstance(data, list) and any(isinstance(value, Mapping | list) for value in data):
        for i, value in enumerate(data):
            yield from _flat(value, f"{name}[{i}]")
    elif isinstance(data, list):
        shown = ", ".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in data[:20])
        yield name, shown + (f", … ({len(data):,} in all)" if len(data) > 20 else "")
    else:
        yield name, f"{data:.6g}" if isinstance(data, float) else str(data)
