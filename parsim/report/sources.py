"""Where a report's figures come from, and how to get them again."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator, Mapping

from parsim import __version__
from parsim.config import dump_json
from parsim.hardware import describe
from parsim.model import ModelSpec, num_parameters
from parsim.report.document import Node
from parsim.report.page import Cell, Code, Column, Download, Part, Row, Section, Table
from parsim.report.step import Step
from parsim.units import format_count

PACKAGES = ("numpy", "scipy", "simpy", "networkx")
"""What the figures depend on beside parsim."""

Entry = tuple[str, str, str]
"""What, its value, its source."""


def inputs_section(steps: Mapping[str, Step], document: Node) -> Section:
    """Model, job, hardware and software of each step, with their sources, and the files by hash.

    `steps` by what to call them; entries that several share stand once.
    """
    entries = dict.fromkeys(
        (f"{what} of {name}" if len(steps) > 1 and what == "plan" else what, value, source)
        for name, step in steps.items()
        for what, value, source in _entries(step)
    )
    parts: list[Part] = []
    if entries:
        shown = [
            (what, value, "as above" if before and source == before[2] and source else source)
            for before, (what, value, source) in zip([(), *entries], entries, strict=False)
        ]
        parts.append(
            Table(
                caption="What the figures rest on",
                columns=(
                    Column(key="what", title="input"),
                    Column(key="value", title="value", wide=True),
                    Column(key="source", title="source", wide=True),
                ),
                rows=tuple(Row(cells=tuple(Cell(text=t, value=t) for t in entry)) for entry in shown),
            )
        )
    files = document.tables("input_files") if "input_files" in document else []
    if files:
        parts.append(_files_table(files))
    return Section(title="Inputs and their sources", parts=tuple(parts))


def _entries(step: Step) -> Iterator[Entry]:
    job = step.file.job
    if job is None:
        return
    yield "plan", step.file.plan.short(), ""
    yield from _model_entries(job.model)
    yield "sequence", f"{job.seq_len:,} tokens", ""
    yield "global batch", f"{job.global_batch:,} sequences, {format_count(job.tokens)} tokens a step", ""
    yield "training", f"{job.precision}, {job.optimizer}", ""
    if step.costs is None:
        yield "hardware", step.file.hardware or "unknown", step.why_not
        return
    cluster, stack = step.costs.cluster, step.costs.stack
    yield "hardware", f"{cluster.name}: {cluster.description}".rstrip(": "), cluster.source
    for fact in describe(cluster):
        yield f"{cluster.name}: {fact.what}", fact.value, fact.source
    yield "software", f"{stack.name}: {stack.description}".rstrip(": "), stack.source


def _model_entries(model: ModelSpec) -> Iterator[Entry]:
    shape = (
        f"{format_count(num_parameters(model))} parameters: {model.layers} layers, hidden "
        f"{model.hidden:,}, {model.heads} heads, {model.kv_heads} KV heads, feed-forward "
        f"{model.ffn_hidden:,}, vocabulary {model.vocab:,}"
    )
    if model.moe is not None:
        shape += f"; {model.moe.experts} experts, {model.moe.top_k} a token"
    yield "model", f"{model.name}, {shape}", model.source


def _files_table(files: list[Node]) -> Table:
    """The files that the command had read, as its document says: this page reads none."""
    rows = [
        Row(
            cells=tuple(Cell(text=text, value=text) for text in (file.text("name"), file.text("sha256")))
        )
        for file in files
    ]
    return Table(
        caption="Files, by SHA-256",
        columns=(Column(key="file", title="file"), Column(key="sha256", title="SHA-256")),
        rows=tuple(rows),
        plain=True,
    )


def reproduce_section(document: Node, item: Node | None = None) -> Section:
    """The command, the versions, and the plan as a file."""
    versions = f"parsim {document.text('version', 'unknown')}"
    if document.text("version", "") != __version__:
        versions += f" (this page was written by {__version__})"
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    versions += f", Python {platform.python_version()}, {packages}"
    if "torch" in document:
        versions += f", torch {document.text('torch')}; run on {document.text('machine', '?')}"
    parts: list[Part] = []
    if "command_line" in document:
        parts.append(Code(caption="The command", text=document.text("command_line")))
    parts.append(Code(caption="Versions", text=f"{versions}; seed {document.number('seed'):.0f}"))
    if item is not None:
        parts.append(
            Download(
                name="plan.json",
                text=dump_json(dict(item.data)),
                caption="The plan, for parsim simulate --plan, parsim run and parsim export",
            )
        )
        parts.append(
            Code(
                caption="From here on",
                text="parsim simulate --plan plan.json --chart step.png --trace step.json\n"
                "parsim export plan.json --to slurm",
            )
        )
    return Section(title="How to reproduce it", parts=tuple(parts))
