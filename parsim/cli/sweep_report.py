"""What `parsim sweep` answers: table, JSON and CSV of the same rows, read one by one from its file."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from parsim.cli.output import print_lines
from parsim.cli.sweep_inputs import KEYS
from parsim.cli.tables import print_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from parsim.hardware import Price
    from parsim.search.sweep import Point

MOST_PRINTED = 200
"""Rows of the table; all of them are in the JSON and the CSV."""
WORDS = {
    "ok": "with a plan",
    "does_not_fit": "whose plan does not fit",
    "no_plan": "without any plan",
    "refused": "refused",
    "failed": "failed by a defect",
}
FIGURES = (
    "step_time_s", "tokens_per_s_per_gpu", "model_tflops_per_gpu", "mfu", "mfu_causal",
    "bubble_fraction",
)  # fmt: skip
"""Of an ITEM, as columns of the CSV."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows of a sweep in the order of its scenarios, read from their file whenever iterated."""

    path: Path
    settings: Sequence[Mapping[str, Any]]
    """Of each row."""
    offsets_bytes: Sequence[int]
    counts: Mapping[str, int]
    """Scenarios by status, in the order of WORDS."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """One by one, so that memory does not grow with their number."""
        from parsim.search.sweep_file import rows_at

        return rows_at(self.path, self.offsets_bytes)

    def differing(self) -> list[str]:
        """Keys of settings that are not the same in all scenarios."""
        return [key for key in KEYS if len({str(each.get(key)) for each in self.settings}) > 1]


def read_rows(path: Path, wanted: Sequence[Mapping[str, Any]]) -> Rows:
    """The rows that a file holds of the wanted scenarios."""
    from parsim.search.sweep import key_of
    from parsim.search.sweep_file import read_recorded

    lines = read_recorded(path).lines
    done = [settings for settings in wanted if key_of(settings) in lines]
    found = [lines[key_of(settings)] for settings in done]
    counts = Counter(line.status for line in found)
    return Rows(
        path=path,
        settings=done,
        offsets_bytes=[line.offset_bytes for line in found],
        counts={status: counts[status] for status in WORDS if counts[status]},
    )


@functools.cache
def _own_price(hardware: str) -> Price | None:
    from parsim.config import load_cluster

    return load_cluster(hardware).price


def usd_per_million_tokens(item: Mapping[str, Any], prices: Mapping[str, Price]) -> float | None:
    """Rent of the GPUs for a million tokens of a plan, at a price given or else the profile's own.

    None where nobody has said a price, and for a plan that does not fit.
    """
    price = prices.get(item["hardware"]) or _own_price(item["hardware"])
    if price is None or not item["fits"]:
        return None
    gpu_hours = 1e6 / float(item["tokens_per_s_per_gpu"]) / 3600
    return gpu_hours * price.usd_per_gpu_hour


def print_report(rows: Rows, prices: Mapping[str, Price]) -> None:
    """A table whose columns are what differs between scenarios, and what became of them."""
    shown = rows.differing()
    same = {key: value for key, value in rows.settings[0].items() if key in KEYS and key not in shown}
    lines: list[list[str]] = []
    unproven = 0
    for row in rows:
        unproven += row["status"] == "ok" and not row.get("optimal", True)
        if len(lines) < MOST_PRINTED:
            lines += _table_lines(row, shown, prices)
    title = ", ".join(f"{key} {_cell(value)}" for key, value in same.items())
    headers = ["GPUs" if key == "gpus" else key.replace("_", " ") for key in shown]
    figures = (
        ["plan", "step", "MFU", "tokens/s/GPU", "memory"] + ["USD/Mtoken"] * bool(prices) + ["note"]
    )
    print_table([*headers, *figures], lines[:MOST_PRINTED], title=title, keys=len(headers))
    total = len(rows.settings)
    notes = [f"{total:,} scenarios: "]
    notes[0] += ", ".join(f"{count:,} {WORDS[status]}" for status, count in rows.counts.items())
    if len(lines) >= MOST_PRINTED:
        notes.append(f"the first {MOST_PRINTED} lines are shown; --csv or --json have them all")
    if unproven:
        notes.append(f"{unproven:,} plans are not proven best: more time with --budget-s")
    elif rows.counts.get("ok") and any("plan" not in each for each in rows.settings):
        notes.append("every plan found is proven: no other of its space is faster under this model")
    print_lines(notes)


def _table_lines(
    row: Mapping[str, Any], keys: Sequence[str], prices: Mapping[str, Price]
) -> list[list[str]]:
    from parsim.errors import shorten
    from parsim.plan import ParallelPlan
    from parsim.units import format_bytes, format_duration

    settings = [_cell(row["scenario"].get(key, "")) for key in keys]
    reason = shorten(row["reason"], 60) if row["reason"] else ""
    if not row["plans"]:
        return [[*settings, *["–"] * (5 + bool(prices)), reason]]
    lines = []
    for item in row["plans"]:
        note = reason or ("" if row.get("optimal", True) else "not proven best")
        lines.append(
            [
                *settings,
                ParallelPlan(**_as_noun(item["plan"])).short(),
                format_duration(item["step_time_s"]),
                f"{item['mfu']:.1%}",
                f"{item['tokens_per_s_per_gpu']:,.0f}",
                format_bytes(item["memory_bytes"]["peak"] + item["memory_bytes"]["context"]),
                *([_dollars(usd_per_million_tokens(item, prices))] if prices else []),
                note,
            ]
        )
    return lines


def _dollars(usd: float | None) -> str:
    return "–" if usd is None else f"{usd:.3g}"


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _as_noun(plan: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists where a plan has tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in plan.items()}


def write_csv(rows: Rows, path: Path, prices: Mapping[str, Price]) -> None:
    """A row for each plan; a scenario without one has its reason."""
    import csv
    import io

    from parsim.config import write_file
    from parsim.plan import ParallelPlan

    used = {key for settings in rows.settings for key in settings}
    keys = [key for key in (*KEYS, "top", "budget_s") if key in used]
    names = [*keys, "status", "reason", "proven", "rank", "best_plan", *FIGURES[:1], "step_time_low_s",
             "step_time_high_s", *FIGURES[1:], "memory_bytes",
             *["usd_per_million_tokens"] * bool(prices)]  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        about = {"status": row["status"], "reason": row["reason"], "proven": row.get("optimal")}
        head = row["scenario"] | about
        if not row["plans"]:
            writer.writerow(head)
        for rank, item in enumerate(row["plans"], start=1):
            low, high = item["interval_s"]
            memory = item["memory_bytes"]
            writer.writerow(
                head
                | {key: item[key] for key in FIGURES}
                | {"rank": rank, "best_plan": ParallelPlan(**_as_noun(item["plan"])).short()}
                | {"step_time_low_s": low, "step_time_high_s": high}
                | {"memory_bytes": memory["peak"] + memory["context"]}
                | ({"usd_per_million_tokens": usd_per_million_tokens(item, prices)} if prices else {})
            )
    write_file(path, text.getvalue())


def print_document(head: dict[str, Any], rows: Rows, prices: Mapping[str, Price]) -> None:
    """One JSON document on stdout, whose rows are written as they are read."""
    import json
    import textwrap

    from parsim.config import dump_json

    start, end = dump_json(head | {"rows": []}).rsplit("[]", 1)
    sys.stdout.write(start + "[")
    for number, row in enumerate(rows):
        for item in row["plans"] if prices else ():
            item["usd_per_million_tokens"] = usd_per_million_tokens(item, prices)
        text = json.dumps(row, indent=2, allow_nan=False, ensure_ascii=False)
        sys.stdout.write((",\n" if number else "\n") + textwrap.indent(text, "    "))
    sys.stdout.write("\n  ]" + end)


def points_of(rows: Rows) -> list[Point]:
    """What the chart shows of the rows: the best plan of each scenario that has one."""
    from parsim.search.sweep import Point

    others = [key for key in rows.differing() if key not in ("model", "hardware", "gpus", "plan")]
    points = []
    for row in rows:
        if row["status"] != "ok":
            continue
        item, scenario = row["plans"][0], row["scenario"]
        series = [item["hardware"], *(f"{key} {scenario[key]}" for key in others if key in scenario)]
        points.append(
            Point(
                model=item["model"]["name"],
                series=", ".join(series),
                gpus=item["gpus"],
                tokens_per_s_per_gpu=item["tokens_per_s_per_gpu"],
                mfu=item["mfu"],
            )
        )
    return points
