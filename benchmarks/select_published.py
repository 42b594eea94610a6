"""Choose the published runs that parsim ships for `parsim validate --published`.

    python benchmarks/select_published.py RUNS.csv [RUNS.csv …]

writes published_runs/runs.csv. The rule, which knows nothing of parsim's errors: rows form cells of the
same source, framework, hardware and precision; in order of GPUs, width and id a cell gives its middle
row, or the ones at a quarter and three quarters where it has LARGE_CELL rows or more. Then each source
gives GROUPS whole ranking groups, evenly over its groups in order of size, so that the ranking of plans
can be reproduced as well. Columns that predict nothing stay out; notes, year and interconnect are kept
where a row's meaning hangs on them.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from parsim.compare.csv_table import Row
from parsim.compare.library import Library
from parsim.compare.ranking import MIN_ROWS
from parsim.compare.run_models import shipped_models
from parsim.compare.run_rows import run_of
from parsim.compare.runs import PUBLISHED, group_of, read_runs
from parsim.config import write_file

T = TypeVar("T")

LARGE_CELL = 8
GROUPS = 2
COLUMNS = (
    *("id", "source", "year", "framework", "hardware", "gpus", "gpus_per_node"),
    *("inter_node_gbit_per_gpu", "interconnect", "model_name", "layers", "hidden", "heads", "kv_heads"),
    *("ffn_hidden", "gated_mlp", "vocab", "seq_len", "experts", "top_k", "global_batch", "micro_batch"),
    *("tp", "pp", "vpp", "cp", "ep", "dp", "zero_or_fsdp", "sequence_parallel", "recompute"),
    *("precision", "schedule", "iter_time_s", "compile", "tp_overlap", "peak_memory_gib", "strict"),
    "notes",
)
ONLY_IF_NEEDED = ("notes", "year", "interconnect")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tables", nargs="+", type=Path, metavar="RUNS.csv")
    parser.add_argument("--out", type=Path, default=PUBLISHED)
    given = parser.parse_args()
    rows = [row for path in given.tables for row in read_runs(path)]
    chosen = {row["id"] for row in [*_of_cells(rows), *_of_groups(rows)]}
    library = Library(models=shipped_models())
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        if row["id"] in chosen:
            writer.writerow(_compact(row, library))
    write_file(given.out, text.getvalue())
    print(f"{given.out}: {len(chosen)} of {len(rows)} rows, {len(text.getvalue().encode())} bytes")
    return 0


def _of_cells(rows: Sequence[Row]) -> Iterator[Row]:
    cells: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        cells[tuple(row[key] for key in ("source", "framework", "hardware", "precision"))].append(row)
    for cell in cells.values():
        cell.sort(key=lambda row: (float(row["gpus"]), float(row["hidden"]), row["id"]))
        yield from _evenly(cell, 2 if len(cell) >= LARGE_CELL else 1)


def _of_groups(rows: Sequence[Row]) -> Iterator[Row]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[group_of(row)].append(row)
    by_source: dict[str, list[list[Row]]] = defaultdict(list)
    for group in groups.values():
        if len(group) >= MIN_ROWS:
            by_source[group[0]["source"]].append(group)
    for found in by_source.values():
        found.sort(key=lambda group: (len(group), group[0]["id"]))
        # The larger of two groups would be most of what is shipped.
        for group in _evenly(found, GROUPS if len(found) > 2 else 1, first=len(found) <= 2):
            yield from group


def _evenly(items: Sequence[T], number: int, *, first: bool = False) -> list[T]:
    if first:
        return list(items[:number])
    return [items[(2 * i + 1) * len(items) // (2 * number)] for i in range(min(number, len(items)))]


def _compact(row: Row, library: Library) -> Row:
    """The row with whole numbers as such, and without texts that change nothing about the run."""
    cells = {key: value.strip().removesuffix(".0") for key, value in row.items()}
    meant = replace(run_of(row, library), assumed=())
    for key in ONLY_IF_NEEDED:
        if replace(run_of(row | {key: ""}, library), assumed=()) == meant:
            cells[key] = ""
    return cells


if __name__ == "__main__":
    sys.exit(main())
