"""Predictions against published runs and kernels, as a report with charts.

    python benchmarks/accuracy.py RUNS.csv [RUNS.csv …] [--measured FOLDER] [--out reports]

writes reports/accuracy.md with its charts, and the headline table in README.md (unless --out is given).
Tables of runs have the columns of `parsim validate --runs`; FOLDER holds tables of kernels by hardware.
Errors on rows left out of the fits are those that benchmarks/left_out.py recorded beside the report.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median

from accuracy_goals import headline, ranking_figures, summary_of, unseen_of
from accuracy_kernels import kernel_lines, kernel_section, kernels_in
from left_out import Record, coverage, read_records

from parsim.charts.accuracy import draw_errors, draw_ranking
from parsim.charts.errors import draw_predicted_measured
from parsim.charts.style import percent
from parsim.compare.csv_table import Row
from parsim.compare.ranking import MIN_ROWS
from parsim.compare.run_report import RunReport, RunResult, order_of, ranking_of, report_of
from parsim.compare.runs import Predictor, read_runs
from parsim.compare.stack_constants import BOUNDS, named_in
from parsim.compare.statistics import Summary
from parsim.config import load_stack, read_text, write_file
from parsim.units import format_count, format_duration

WORST = 10
IRREGULAR = 1.2
"""A run that took this much longer than its neighbour in micro-batch, against parsim's expectation."""
LARGE_MODEL = 30e9
REPORTS = Path(__file__).parents[1] / "reports"
README = REPORTS.parent / "README.md"
MARKS = "<!-- accuracy -->\n", "<!-- /accuracy -->\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tables", nargs="+", type=Path, metavar="RUNS.csv")
    parser.add_argument("--measured", type=Path, help="folder with tables of kernels by hardware")
    parser.add_argument("--out", type=Path, default=REPORTS)
    given = parser.parse_args()
    started = time.monotonic()
    tables = {path.name: read_runs(path) for path in given.tables}
    predictor = Predictor()
    reports = {name: report_of(predictor.result(row) for row in rows) for name, rows in tables.items()}
    rows = [row for report in reports.values() for row in report.rows]
    records = {record.id: record for record in read_records(given.out / "left_out.csv")}
    kernels = list(kernels_in(given.measured)) if given.measured else []
    table = _headline(rows, records, kernel_lines(kernels))
    lines = [*_head(), *table("../docs/kernels.md"), "", *_stacks(rows, records, given.out)]
    lines += _ranking(rows, records, given.out)
    lines += kernel_section(kernels, given.out) if kernels else []
    for name, report in reports.items():
        lines += _table_section(name, report, tables[name])
    write_file(given.out / "accuracy.md", "\n".join(lines).rstrip() + "\n")
    if given.out.resolve() == REPORTS:
        _into_readme(table("docs/kernels.md"))
    print(f"{given.out / 'accuracy.md'}: {len(rows)} rows in {time.monotonic() - started:.0f} s")
    return 0


def _headline(
    rows: Sequence[RunResult], records: dict[str, Record], kernels: Sequence[str]
) -> Callable[[str], list[str]]:
    """The headline table, for a page from which docs/kernels.md lies at a given place."""
    shares = coverage(list(records.values()))
    inside = None
    if records:
        inside = sum(shares[record.stack] for record in records.values()) / len(records)
    unseen = _times(records)
    lines = list(headline(rows, unseen, inside, kernels))
    return lambda place: [line.replace("KERNELS", place) for line in lines]


def _times(records: dict[str, Record]) -> dict[str, float]:
    return {name: record.left_out_s for name, record in records.items()}


def _into_readme(lines: Iterable[str]) -> None:
    """The headline table between its marks, the rest of the README as it stands."""
    start, end = MARKS
    text = read_text(README)
    if start in text and end in text:
        before, after = text.split(start)[0], text.split(end)[1]
        write_file(README, before + start + "\n".join(lines) + "\n" + end + after)


def _head() -> Iterator[str]:
    yield "# Accuracy against published runs"
    yield ""
    yield (
        "Step times that others measured and published, and what parsim predicts for the same model, "
        "plan, hardware and software. Error = predicted / measured − 1. Written by "
        "`python benchmarks/left_out.py RUNS.csv …`, then `python benchmarks/accuracy.py RUNS.csv … "
        "--measured FOLDER`; [docs/accuracy.md](../docs/accuracy.md) says how to read it, and "
        "`parsim validate --published` reproduces it on the rows that ship."
    )
    yield ""
    yield (
        "*fitted*: the shipped stacks, whose few constants were fitted to these rows. *left out*: each "
        "row as predicted by a fit of its stack that had not seen its model, which is what to expect of "
        "a new model. The few factors of devices (training_slowdown, clock_spread, host_slowdown) and "
        "of single networks were fitted to the same rows and stay: where a table has one model or few "
        "devices, the two columns say little of each other. "
        "Settings that a source does not state were taken by default; *strict* rows state all of them."
    )
    yield ""


def _stacks(rows: Sequence[RunResult], records: dict[str, Record], out: Path) -> Iterator[str]:
    charts = _draw_stacks(rows, out)
    unseen = _times(records)
    shares = coverage(list(records.values()))
    yield "## By stack"
    yield ""
    figures = "mean / median / p90"
    yield f"| stack | rows | fitted: {figures} | left out: {figures} | groups | in interval |"
    yield "|---|---|---|---|---|---|"
    for name in charts:
        own = [row for row in rows if row.stack == name]
        left = summary_of(unseen_of(own, unseen))
        groups = len({records[row.id].group for row in own if row.id in records})
        inside = f"{shares[name]:.0%}" if name in shares else "–"
        cells = (str(len(own)), _three(summary_of(own)), _three(left), str(groups or "–"), inside)
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""
    yield "groups: models (or configurations of the one that most rows are of) left out in turn."
    yield ""
    yield from _draw_sizes(rows, records, out)
    for name, chart in charts.items():
        stack = load_stack(name)
        yield f"### {name}"
        yield ""
        yield f"{stack.description}. Constants: {stack.source}."
        yield ""
        fitted = named_in(stack.source)
        if fitted:
            values = ", ".join(f"{key} {getattr(stack, key):g}{_bound(key, getattr(stack, key))}"
                               for key in fitted)  # fmt: skip
            yield f"Fitted: {values}."
            yield ""
        yield f"![predicted against measured step times of {name}]({chart})"
        yield ""


def _bound(key: str, value: float) -> str:
    """What is said of a constant that a bound decided."""
    low, high = BOUNDS[key]
    margin = 0.01 * (high - low)
    return "" if low + margin < value < high - margin else " (on its bound)"


def _draw_sizes(rows: Sequence[RunResult], records: dict[str, Record], out: Path) -> Iterator[str]:
    """Errors on left-out rows over the size of the model and over the step time."""
    known = [(records[row.id], row) for row in rows if row.id in records]
    if not known:
        return
    for name, sizes, size_text, limit, text in (
        ("model-size", "parameters of the model", format_count, LARGE_MODEL, "30 B parameters"),
        ("step-time", "measured step time", format_duration, 1.0, "a second"),
    ):
        points = [
            (
                _family(row),
                record.parameters if name == "model-size" else record.measured_s,
                record.left_out_s / record.measured_s,
            )
            for record, row in known
        ]
        sides = [
            [abs(ratio - 1) for _, size, ratio in points if (size >= limit) is want]
            for want in (False, True)
        ]
        below, above = (percent(median(side)) if side else "none" for side in sides)
        title = f"Left-out runs under {text} are off by {below} (median), others by {above}"
        draw_errors(points, out / f"accuracy-{name}.png", title=title, sizes=sizes, size_text=size_text)
        yield f"![error over {sizes}](accuracy-{name}.png)"
        yield ""


def _family(row: RunResult) -> str:
    if row.is_moe:
        return "experts"
    return "dense, 16 bits" if row.precision in ("bf16", "fp16", "") else "dense, fp8 or fp4"


def _ranking(rows: Sequence[RunResult], records: dict[str, Record], out: Path) -> Iterator[str]:
    unseen = unseen_of(rows, _times(records))
    yield "## Ranking of plans"
    yield ""
    yield (
        f"Groups of {MIN_ROWS} rows or more of the same source, model, hardware, GPUs, batch, sequence "
        "length and precision, which differ in the plan. Regret: how much longer the plan that parsim "
        "likes best took than the best one measured."
    )
    yield ""
    yield (
        "*by the search*: the same by the figures of the search's arrays (parsim/search/score.py), "
        "which order plans before any is replayed; what `parsim plan` prints is replayed."
    )
    yield ""
    yield (
        "| stack | groups | mean regret | worst | mean Kendall tau "
        "| by the search: regret | worst | tau | left out: regret | worst | tau |"
    )
    yield "|---" * 11 + "|"
    for name in [*sorted({row.stack for row in rows}), "all"]:
        own = [row for row in rows if name in (row.stack, "all")]
        ranking = ranking_of(own)
        if ranking:
            left = ranking_of([row for row in unseen if name in (row.stack, "all")])
            searched = ranking_of(own, lambda row: row.score_s)
            figures = map(ranking_figures, (ranking, searched, left))
            cells = [cell for triple in figures for cell in triple]
            yield f"| {name} | {len(ranking)} | {' | '.join(cells)} |"
    yield ""
    yield from _order(unseen or rows)
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in unseen or rows:
        if row.measured_s is not None and row.predicted_s is not None:
            groups[row.group].append((row.measured_s, row.predicted_s))
    ranked = [
        [(m / min(a for a, _ in group), p / min(b for _, b in group)) for m, p in group]
        for group in groups.values()
        if len(group) >= MIN_ROWS
    ]
    if ranked:
        first = sum(min(group, key=lambda pair: pair[1])[0] == 1.0 for group in ranked)
        title = f"In {first} of {len(ranked)} groups parsim's choice was the fastest plan measured"
        draw_ranking(ranked, out / "accuracy-ranking.png", title=title)
        yield "![measured against predicted order of plans](accuracy-ranking.png)"
        yield ""


def _order(rows: Sequence[RunResult]) -> Iterator[str]:
    """The measurement behind parsim/cost/order.py."""
    yield "### How sure an order is"
    yield ""
    yield (
        "Pairs of plans in these groups, as predicted by fits that had not seen their model. The scale "
        "is that of a logistic error of the log of their ratio, of greatest likelihood, every group "
        "weighing alike; parsim/cost/order.py holds both, rounded up. Two plans tie where the chance "
        "that their order is right is less than 90%."
    )
    yield ""
    yield "| pairs | number | groups | scale | tie within | tied | in the right order | others in it |"
    yield "|---" * 8 + "|"
    for stack in ["all", *sorted({row.stack for row in rows})]:
        for error in order_of([row for row in rows if stack in (row.stack, "all")]):
            shares = [
                "–" if right is None else f"{right:.0%}"
                for right in (error.right_tied, error.right_apart)
            ]
            yield (
                f"| {stack}: {error.pairs} | {error.number} | {error.groups} | {error.scale:.3f} | "
                f"{error.assumed_ratio - 1:.1%} | {error.tied} | {' | '.join(shares)} |"
            )
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
        yield f"{report.coverage:.0%} of the measured times lie in their prediction's 90% interval."
        yield ""
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


def _summary_header(what: str) -> Iterator[str]:
    yield f"| {what} | rows | predicted | mean | median | p90 | bias |"
    yield "|---|---|---|---|---|---|---|"


def _summary_row(name: str, summary: Summary) -> str:
    figures = (summary.mape, summary.median_ape, summary.p90_ape)
    text = " | ".join("–" if figure is None else f"{figure:.1%}" for figure in figures)
    bias = "–" if summary.bias is None else f"{summary.bias:+.1%}"
    return f"| {name} | {summary.rows} | {summary.ok} | {text} | {bias} |"


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


def _draw_stacks(rows: Sequence[RunResult], out: Path) -> dict[str, str]:
    """A chart for each stack; file names by stack."""
    points: dict[str, list[tuple[str, float, float]]] = defaultdict(list)
    for row in rows:
        if row.predicted_s is not None and row.measured_s is not None:
            group = "experts, any hardware" if row.is_moe else row.hardware
            points[row.stack].append((group, row.measured_s, row.predicted_s))
    charts = {}
    for stack in sorted(points):
        charts[stack] = f"accuracy-{stack}.png"
        errors = sorted(abs(predicted / measured - 1) for _, measured, predicted in points[stack])
        most = errors[max(0, round(0.9 * len(errors)) - 1)]
        title = f"{stack}: nine runs in ten are predicted within {percent(most)}"
        draw_predicted_measured(points[stack], out / charts[stack], title=title)
    return charts


def _three(summary: Summary) -> str:
    if summary.mape is None or summary.median_ape is None or summary.p90_ape is None:
        return "–"
    return f"{summary.mape:.1%} / {summary.median_ape:.1%} / {summary.p90_ape:.1%}"


if __name__ == "__main__":
    sys.exit(main())
