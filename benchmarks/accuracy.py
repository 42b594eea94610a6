"""Predictions against published runs, as a report with charts.

    python benchmarks/accuracy.py RUNS.csv [RUNS.csv …] [--out reports]

writes reports/accuracy.md and one chart a stack. Tables have the columns of `parsim validate --runs`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from parsim.charts.errors import draw_predicted_measured
from parsim.compare.csv_table import Row
from parsim.compare.ranking import Ranking
from parsim.compare.run_report import RunReport, RunResult, report_of
from parsim.compare.runs import Predictor, read_runs
from parsim.compare.statistics import Summary, summarize
from parsim.config import load_stack, write_file
from parsim.units import format_duration

WORST = 10
IRREGULAR = 1.2
"""A run that took this much longer than its neighbour in micro-batch, against parsim's expectation."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tables", nargs="+", type=Path, metavar="RUNS.csv")
    parser.add_argument("--out", type=Path, default=Path("reports"))
    given = parser.parse_args()
    started = time.monotonic()
    tables = {path.name: read_runs(path) for path in given.tables}
    predictor = Predictor()
    reports = {name: report_of(predictor.result(row) for row in rows) for name, rows in tables.items()}
    seconds = time.monotonic() - started
    charts = _draw(reports.values(), given.out)
    lines = [*_head(reports, seconds), *_stacks(reports.values(), charts)]
    for name, report in reports.items():
        lines += _table_section(name, report, tables[name])
    write_file(given.out / "accuracy.md", "\n".join(lines) + "\n")
    print(f"{given.out / 'accuracy.md'}: {sum(map(len, tables.values()))} rows in {seconds:.1f} s")
    return 0


def _head(reports: dict[str, RunReport], seconds: float) -> Iterator[str]:
    yield "# Accuracy against published runs"
    yield ""
    yield (
        "Step times that others measured and published, and what parsim predicts for the same model, "
        "plan, hardware and software. Error = predicted / measured − 1. Written by "
        "`python benchmarks/accuracy.py RUNS.csv …`."
    )
    yield ""
    yield (
        "Constants are those of the shipped profiles. Where a stack's constants were fitted to some of "
        "these rows, its `source` below says to which, with the error on models that were left out of "
        "the fit: that figure, not the table's, tells what to expect of a new model. Settings that a "
        "source does not state were taken by default; *strict* rows state all of them."
    )
    yield ""
    yield from _summary_header("table")
    for name, report in reports.items():
        yield _summary_row(name, report.summary)
    everything = [row for report in reports.values() for row in report.rows]
    for name, wanted in (("strict rows", True), ("rows with assumed settings", False)):
        yield _summary_row(name, _of(row for row in everything if row.strict is wanted))
    for name, wanted in (("dense models", False), ("mixtures of experts", True)):
        yield _summary_row(name, _of(row for row in everything if row.is_moe is wanted))
    yield _summary_row("strict and dense", _of(r for r in everything if r.strict and not r.is_moe))
    yield ""


def _stacks(reports: Iterable[RunReport], charts: dict[str, str]) -> Iterator[str]:
    rows = [row for report in reports for row in report.rows]
    yield "## By stack"
    yield ""
    yield from _summary_header("stack")
    for name in charts:
        yield _summary_row(name, _of(row for row in rows if row.stack == name))
    yield ""
    for name, chart in charts.items():
        yield f"### {name}"
        yield ""
        yield f"{load_stack(name).description}. Constants: {load_stack(name).source}."
        yield ""
        yield f"![predicted against measured step times of {name}]({chart})"
        yield ""


def _table_section(name: str, report: RunReport, rows: Sequence[Row]) -> Iterator[str]:
    yield f"## {name}"
    yield ""
    yield from _summary_header("rows")
    for parts in report.summaries().values():
        if len(parts) > 1:
            for part, summary in parts.items():
                yield _summary_row(part, summary)
    yield _summary_row("all", report.summary)
    if report.memory.ok:
        yield _summary_row("peak memory", report.memory)
    yield ""
    if report.coverage is not None:
        yield f"{report.coverage:.0%} of the measured times lie in their prediction's 90 % interval."
        yield ""
    yield from _ranking(report.ranking)
    unsupported = Counter(row.reason for row in report.rows if row.status != "ok")
    for reason, count in unsupported.most_common():
        yield f"- unsupported, {count} rows: {reason}"
    yield "The rows that are furthest off, each with a guess at the cause:"
    yield ""
    yield "| row | measured | predicted | error | guess |"
    yield "|---|---|---|---|---|"
    known = [(row, cells) for row, cells in zip(report.rows, rows, strict=True) if row.error is not None]
    neighbours = _neighbours(known)
    for row, cells in sorted(known, key=lambda pair: -abs(pair[0].error or 0.0))[:WORST]:
        yield (
            f"| {row.id} | {format_duration(row.measured_s or 0)} | "
            f"{format_duration(row.predicted_s or 0)} | {row.error:+.1%} | "
            f"{_guess(row, cells, neighbours)} |"
        )
    yield ""


def _ranking(ranking: tuple[Ranking, ...]) -> Iterator[str]:
    if not ranking:
        return
    regret = sum(group.regret for group in ranking) / len(ranking)
    taus = [group.kendall_tau for group in ranking if group.kendall_tau is not None]
    tau = f"{sum(taus) / len(taus):.2f}" if taus else "unknown"
    worst = max(ranking, key=lambda group: group.regret)
    yield (
        f"Ranking of plans: {len(ranking)} groups of three rows or more that differ only in the plan. "
        f"The plan parsim likes best took on average {regret:.1%} longer than the best one measured "
        f"(at worst {worst.regret:.1%}); mean Kendall tau {tau}."
    )
    yield ""


def _summary_header(what: str) -> Iterator[str]:
    yield f"| {what} | rows | predicted | mean | median | p90 | bias |"
    yield "|---|---|---|---|---|---|---|"


def _summary_row(name: str, summary: Summary) -> str:
    figures = (summary.mape, summary.median_ape, summary.p90_ape)
    text = " | ".join("–" if figure is None else f"{figure:.1%}" for figure in figures)
    bias = "–" if summary.bias is None else f"{summary.bias:+.1%}"
    return f"| {name} | {summary.rows} | {summary.ok} | {text} | {bias} |"


def _of(rows: Iterable[RunResult]) -> Summary:
    return summarize([row.error for row in rows])


Neighbours = dict[tuple[str, ...], list[RunResult]]


def _neighbours(known: Sequence[tuple[RunResult, Row]]) -> Neighbours:
    """Rows that differ in the micro-batch alone."""
    groups: Neighbours = defaultdict(list)
    for row, cells in known:
        groups[_but_micro_batch(cells)].append(row)
    return groups


def _but_micro_batch(cells: Row) -> tuple[str, ...]:
    left_out = ("id", "micro_batch", "iter_time_s", "tflops_per_gpu", "mfu", "tokens_per_s_per_gpu")
    left_out += ("notes", "peak_memory_gib")
    return tuple(value for key, value in cells.items() if key not in left_out)


def _guess(row: RunResult, cells: Row, neighbours: Neighbours) -> str:
    """What may be behind an error, from what is known of the row."""
    for other in neighbours[_but_micro_batch(cells)]:
        if other is row or not (row.measured_s and other.measured_s and row.predicted_s):
            continue
        surprise = row.measured_s / other.measured_s / (row.predicted_s / (other.predicted_s or 1))
        if max(surprise, 1 / surprise) > IRREGULAR:
            ratio = row.measured_s / other.measured_s
            return f"measured {ratio:.2f} × {other.id}, its neighbour: irregular"
    if row.is_moe:
        return "mixture of experts: routing, exchange and settings are the framework's, not stated"
    if "fp8" in cells.get("precision", "") or "fp4" in cells.get("precision", ""):
        return "low precision: scaling recipe and which GEMMs run in it"
    assumed = [text.split(":")[0] for text in row.assumed if "not stated" in text]
    if assumed:
        return "; ".join(assumed)
    nearest = [text for text in row.assumed if "nearest" in text]
    return nearest[0] if nearest else "kernels or host times of this shape"


def _draw(reports: Iterable[RunReport], out: Path) -> dict[str, str]:
    """A chart for each stack; file names by stack."""
    points: dict[str, list[tuple[str, float, float]]] = defaultdict(list)
    for report in reports:
        for row in report.rows:
            if row.predicted_s is not None and row.measured_s is not None:
                group = row.hardware + (", experts" if row.is_moe else "")
                points[row.stack].append((group, row.measured_s, row.predicted_s))
    charts = {}
    for stack in sorted(points):
        charts[stack] = f"accuracy-{stack}.png"
        draw_predicted_measured(points[stack], out / charts[stack], title=f"Published runs on {stack}")
    return charts


if __name__ == "__main__":
    sys.exit(main())
