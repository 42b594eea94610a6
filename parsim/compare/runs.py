"""Measured runs against predictions: every row of a table is predicted and compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from parsim.compare.csv_table import Row, read_csv
from parsim.compare.library import Library
from parsim.compare.row_cells import (
    OPTIONAL_COLUMNS,
    REQUIRED_COLUMNS,
    measured_s,
    peak_memory_bytes,
)
from parsim.compare.run_models import shipped_models
from parsim.compare.run_report import RunReport, RunResult, report_of
from parsim.compare.run_rows import Run, run_of
from parsim.cost.cell import cell_of
from parsim.cost.interval import interval_s, leans_on
from parsim.cost.stage import CostModel
from parsim.errors import ParsimError
from parsim.schedule.program import step_time_s
from parsim.search.examine import Examiner
from parsim.search.score import score_s
from parsim.shipped import data_folder
from parsim.simulate.prediction import program_of
from parsim.stack import Stack
from parsim.units import format_bytes

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the rows that are done, and the rows there are."""

PUBLISHED = data_folder("published_runs") / "runs.csv"
"""Published runs that parsim ships, each with its source; benchmarks/select_published.py chose them."""

_GROUP_COLUMNS = (
    *("source", "layers", "hidden", "heads", "kv_heads", "ffn_hidden", "gated_mlp", "vocab"),
    *("experts", "top_k", "hardware", "gpus", "global_batch", "seq_len", "precision"),
)


def read_runs(path: Path) -> list[Row]:
    """The rows of a table of measured runs.

    Raises ParsimError naming every required column that is missing, with what is near it.
    """
    return read_csv(path, required=REQUIRED_COLUMNS, optional=OPTIONAL_COLUMNS)


def validate_runs(
    path: Path, *, stacks: Mapping[str, Stack] | None = None, progress: Progress | None = None
) -> RunReport:
    """Predict every run of a CSV file and compare it with what was measured.

    `stacks` replaces shipped stacks by framework. A row that cannot be predicted is "unsupported", with
    the reason; none is dropped, and memory refuses none.
    """
    rows = read_runs(path)
    predictor = Predictor(stacks)
    results = []
    for done, row in enumerate(rows, start=1):
        results.append(predictor.result(row))
        if progress is not None:
            progress("predicting runs", done, len(rows))
    return report_of(results)


class Predictor:
    """Predicts rows; clusters, stacks and costs that rows share are made once."""

    def __init__(self, stacks: Mapping[str, Stack] | None = None) -> None:
        self._library = Library(models=shipped_models(), stacks=dict(stacks or {}))
        self._costs: dict[tuple[object, ...], CostModel] = {}
        self._steps: dict[tuple[object, ...], tuple[float, float, float]] = {}

    def result(self, row: Row) -> RunResult:
        """What parsim says of a row, or why it says nothing."""
        common: dict[str, Any] = {
            "id": row.get("id", ""),
            "stack": row.get("framework", "").strip(),
            "hardware": row.get("hardware", "").strip(),
            "strict": row.get("strict", "").strip() in ("1", "1.0"),
            "is_moe": row.get("experts", "").strip() not in ("", "0", "0.0"),
            "group": group_of(row),
            "source": row.get("source", "").strip(),
            "precision": row.get("precision", "").strip(),
        }
        try:
            common["measured_s"] = measured_s(row)
            common["measured_peak_bytes"] = peak_memory_bytes(row)
            return self._predicted(run_of(row, self._library), common)
        except ParsimError as error:
            return RunResult(status="unsupported", reason=_one_line(error), **common)

    def _predicted(self, run: Run, common: dict[str, Any]) -> RunResult:
        seconds, peak, score = self._step(run)
        return RunResult(
            status="ok",
            predicted_s=seconds,
            score_s=score,
            layers=(cell_of(run.job, run.plan), run.plan.recompute_layers),
            interval_s=interval_s(seconds, run.job, run.cluster, run.stack),
            leans_on=leans_on(run.job, run.cluster, run.stack),
            predicted_peak_bytes=peak,
            memory_warning=_memory_warning(peak + run.stack.context_bytes, run),
            assumed=run.assumed,
            **common | {"stack": run.stack.name},
        )

    def _step(self, run: Run) -> tuple[float, float, float]:
        """Step time, the allocator's peak, the search's score; repeats of a run are predicted once."""
        key = (run.job, run.plan, run.cluster_key, run.stack)
        if key not in self._steps:
            program, memory = program_of(run.job, run.plan, self.costs(run))
            # An examiner takes plans of one search for granted; rows differ in more than these do.
            score = score_s(Examiner(run.job, self.costs(run)), run.plan)
            self._steps[key] = step_time_s(program), max(use.peak for use in memory), score
        return self._steps[key]

    def costs(self, run: Run) -> CostModel:
        """The cost model of a run's model, cluster and stack; runs that agree in them share it."""
        key = (run.job.model, run.cluster_key, run.stack)
        if key not in self._costs:
            self._costs[key] = CostModel(run.job.model, run.cluster, run.stack)
        return self._costs[key]


def _memory_warning(needed: float, run: Run) -> str:
    there = run.cluster.device.memory_bytes
    if needed <= there:
        return ""
    return f"predicted to need {format_bytes(needed)} of {format_bytes(there)}"


def group_of(row: Row) -> str:
    """Source, model, hardware and batch of a row as one text: rows that share it differ in the plan."""
    return "; ".join(_cell(row, key) for key in _GROUP_COLUMNS)


def _cell(row: Row, key: str) -> str:
    text = row.get(key, "").strip().removesuffix(".0")
    return text if key in ("source", "hardware", "precision") else f"{key} {text or '-'}"


def _one_line(error: ParsimError) -> str:
    """An error as one line."""
    parts = [error.what]
    if error.where is not None:
        parts.append(f"({error.where})")
    if error.got is not None:
        parts.append(f"got {error.got}")
    if error.expected is not None:
        parts.append(f"expected {error.expected}")
    return ", ".join(parts).replace(", (", " (")
