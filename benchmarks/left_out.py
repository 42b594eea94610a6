"""Errors on rows that a stack's constants have not seen, and the widths of intervals that follow.

    python benchmarks/left_out.py RUNS.csv [RUNS.csv …] [--stack K …] [--write]

fits each stack afresh (from typical values, the constants that its `source` names) with some models left
out in turn, and records every row's time by the fit that had not seen its model in reports/left_out.csv,
which benchmarks/accuracy.py reads. A stack whose source names no constant has seen no row: its own
predictions count. With --stack the other stacks' records stay. Rows of a kind that only
one model has are not recorded. --write puts relative_error and fitted_parameters into the stacks'
files. Minutes a stack.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from parsim.compare.csv_table import Row
from parsim.compare.intervals import COVERAGE, base_half_width
from parsim.compare.measured_steps import MeasuredStep, QuickSteps, measured_steps
from parsim.compare.runs import read_runs
from parsim.compare.stack_constants import afresh, named_in
from parsim.compare.stack_fit import fit_stack
from parsim.config import load_stack, write_file
from parsim.cost.interval import WIDTHS, leans_on
from parsim.shipped import data_folder, shipped
from parsim.stack import Stack

COLUMNS = ("id", "stack", "group", "parameters", "measured_s", "left_out_s", "leans_on")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A row by a fit that has not seen its model."""

    id: str
    stack: str
    group: str
    parameters: float
    measured_s: float
    left_out_s: float
    leans_on: str
    """The keys of WIDTHS that apply, joined by "; "."""

    @property
    def leans(self) -> tuple[str, ...]:
        return tuple(filter(None, self.leans_on.split("; ")))

    @property
    def log_error(self) -> float:
        return abs(math.log(self.left_out_s / self.measured_s))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tables", nargs="*", type=Path, metavar="RUNS.csv")
    parser.add_argument("--stack", action="append", default=[], help="only this one (repeatable)")
    parser.add_argument("--out", type=Path, default=Path("reports/left_out.csv"))
    parser.add_argument("--write", action="store_true", help="write the stacks' intervals")
    given = parser.parse_args()
    rows = [row for path in given.tables for row in read_runs(path)]
    stacks = given.stack or (list(shipped("hardware_profiles/stacks")) if rows else [])
    records = [r for r in read_records(given.out) if r.stack not in stacks]
    for name in stacks:
        records += _left_out(rows, load_stack(name))
        write_file(given.out, _text(sorted(records, key=lambda r: (r.stack, r.id))))
    for line in _found(records):
        print(line)
    if given.write:
        for name in sorted({record.stack for record in records}):
            _write(name, [record for record in records if record.stack == name])
    return 0


def _left_out(rows: Sequence[Row], stack: Stack) -> list[Record]:
    """The rows of a stack by fits that had not seen their group; none of a row without such a fit."""
    steps, _ = measured_steps(rows, stack)
    if not steps:
        return []
    bounds = named_in(stack.source)
    groups = [step.model for step in steps]
    if bounds:
        print(f"{stack.name}: {len(steps)} rows, {', '.join(bounds)}", file=sys.stderr)
        found = fit_stack(rows, afresh(stack, bounds), bounds)
        groups = [row.group for row in found.rows]
        times: list[float | None] = [row.held_out_s for row in found.rows]
    else:
        times = [*QuickSteps().predicted_s(steps, stack)]
    records = [
        Record(
            id=step.id,
            stack=stack.name,
            group=group,
            parameters=float(step.parameters),
            measured_s=step.seconds,
            left_out_s=seconds,
            leans_on="; ".join(
                _leans_on(step, group, list(zip(groups, steps, strict=True)), bool(bounds))
            ),
        )
        for step, group, seconds in zip(steps, groups, times, strict=True)
        if seconds is not None
    ]
    return [record for record in records if not bounds or _kind_is_known(record, records)]


def _kind_is_known(record: Record, records: Sequence[Record]) -> bool:
    """Whether other models tell of rows of this kind: dense or with experts, in 16 bits or fewer.

    Else a fit without this row's model has to guess more than a new model (fits of megatron-core-2025
    without its one dense model in bf16 know that kind from fp8 alone, and are 40% off).
    """
    return any(_kind(other) == _kind(record) for other in records if other.group != record.group)


def _kind(record: Record) -> tuple[bool, bool]:
    return "experts" in record.leans_on, "narrow precision" in record.leans_on


def _leans_on(
    step: MeasuredStep, group: str, known: Sequence[tuple[str, MeasuredStep]], is_fitted: bool
) -> tuple[str, ...]:
    """What a prediction of this row leans on where its group was left out of the fit."""
    others = [other.parameters for name, other in known if name != group]
    largest = float(max(others, default=0)) if is_fitted else 0.0
    run = step.run
    return leans_on(run.job, run.cluster, replace(run.stack, fitted_parameters=largest))


def read_records(path: Path) -> list[Record]:
    """What was recorded before; nothing where nothing was."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Record(
                id=row["id"],
                stack=row["stack"],
                group=row["group"],
                parameters=float(row["parameters"]),
                measured_s=float(row["measured_s"]),
                left_out_s=float(row["left_out_s"]),
                leans_on=row["leans_on"],
            )
            for row in csv.DictReader(file)
        ]


def _text(records: Sequence[Record]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for r in records:
        figures = (f"{r.parameters:.6g}", f"{r.measured_s:.6g}", f"{r.left_out_s:.6g}")
        writer.writerow((r.id, r.stack, r.group, *figures, r.leans_on))
    return text.getvalue()


def base_width(records: Sequence[Record]) -> float:
    """A stack's relative_error."""
    errors = [math.expm1(r.log_error) for r in records]
    return base_half_width(errors, [bool(r.leans_on) for r in records])


def half_width_of(record: Record, base: float) -> float:
    """Half width of a row's interval."""
    return math.hypot(base, *(WIDTHS[name] for name in record.leans))


def coverage(records: Sequence[Record]) -> dict[str, float]:
    """Share of rows inside their interval, by stack, where the stack's width comes from other groups."""
    found = {}
    for stack in sorted({r.stack for r in records}):
        own = [r for r in records if r.stack == stack]
        inside = 0
        for group in {r.group for r in own}:
            others = [r for r in own if r.group != group]
            base = base_width(others or own)
            inside += sum(r.log_error <= half_width_of(r, base) for r in own if r.group == group)
        found[stack] = inside / len(own)
    return found


def _found(records: Sequence[Record]) -> Iterator[str]:
    shares = coverage(records)
    for stack, share in shares.items():
        own = [r for r in records if r.stack == stack]
        yield f"{stack}: relative_error {base_width(own)}, {len(own)} rows, coverage {share:.0%}"
    if records:
        inside = sum(shares[r.stack] for r in records) / len(records)
        yield f"all: {len(records)} rows, coverage {inside:.1%}"
    for name, (rows, width) in needed_widths(records).items():
        yield f"{name}: {rows} rows, width {width:.2f} (in use: {WIDTHS[name]})"


def needed_widths(records: Sequence[Record]) -> dict[str, tuple[int, float]]:
    """Rows and the least half width, in steps of 0.01, that covers them, for each key of WIDTHS.

    One after the other, experts last: each from rows that lean on it and on none that comes later.
    """
    bases = {
        stack: base_width([r for r in records if r.stack == stack])
        for stack in sorted({r.stack for r in records})
    }
    found: dict[str, tuple[int, float]] = {}
    for name in sorted(WIDTHS, key=lambda name: name == "experts"):
        allowed = {*found, name}
        rows = [r for r in records if name in r.leans and allowed.issuperset(r.leans)]

        def covered(width: float, rows: Sequence[Record] = rows, name: str = name) -> int:
            return sum(
                r.log_error
                <= math.hypot(bases[r.stack], width, *(found[k][1] for k in r.leans if k != name))
                for r in rows
            )

        steps = (i / 100 for i in range(101))
        found[name] = len(rows), next((w for w in steps if covered(w) >= COVERAGE * len(rows)), 1.0)
    return found


def _write(name: str, records: Sequence[Record]) -> None:
    """relative_error and fitted_parameters in a stack's file, the rest as it stands."""
    path = data_folder("hardware_profiles") / "stacks" / f"{name}.toml"
    text = path.read_text(encoding="utf-8").rstrip("\n") + "\n"
    values = {"relative_error": base_width(records)}
    if named_in(load_stack(name).source):
        values["fitted_parameters"] = float(f"{max(r.parameters for r in records):.6g}")
    for key, value in values.items():
        text = re.sub(rf"^{key} = .*\n", "", text, flags=re.MULTILINE) + f"{key} = {value!r}\n"
    write_file(path, text)


if __name__ == "__main__":
    sys.exit(main())
